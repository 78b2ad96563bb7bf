"""What a DICOM source has received: its units, their origin and routes, dispatched and removed, and never lost."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from blocks.dicom_source import DicomSource
from talaria.service import Office, sources
from talaria.testing import studies
from tasks.sources import dicom
from tasks.sources.checks import check_removal
from tasks.sources.dicom import confirmed, orphans
from tasks.sources.sweep import Sweep
from tasks.sources.swept import Swept
from tasks.sources.units import units
from tests.protocols.intake import listening
from tests.protocols.test_dimse_intake import associated, stored
from tests.sources.bench import Bench
from transfer.errors import Misconfigured, NotFound
from transfer.ledger import Ledger
from transfer.plan import Origin
from transfer.spool import ReceivedUnit, Spool

UIDS = {"study": "1.2.3", "series": "1.2.3.4"}


@pytest.fixture(autouse=True)
def _without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)  # it would start one


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    one = Bench(tmp_path, "pacs", "archive", "other")
    one.source = router()
    return one


def router(**fields: Any) -> DicomSource:
    return DicomSource(**{"targets": ["archive"], "settle_s": 0, "aet": "ROUTER", **fields}).named("box")


def spool(bench: Bench) -> Spool:
    return Spool(bench.home.root / "received" / "box")


def receive(bench: Bench, *, calling: str = "CT1", version: int = 1, study: str = "1.2.3", **values: Any) -> Path:
    """Put an instance where the listener does."""
    unit = ReceivedUnit(calling, "ROUTER", "10.1.2.3", study, version)
    ds = studies.dataset(study=study, **values)
    return studies.write(spool(bench).folder / unit.name / f"{ds.SOPInstanceUID}.dcm", studies.encoded(ds))


def kept(bench: Bench, target: str) -> int:
    return sum(path.is_file() and path.suffix == ".dcm" for path in bench.at(target).rglob("*"))


def told(bench: Bench) -> list[str]:
    with Ledger(bench.home.ledger) as ledger:
        rows = ledger._db.execute("SELECT about FROM happenings WHERE event='source.stuck'")
        return [json.loads(row[0])["words"] for row in rows]


def test_what_was_received_is_dispatched_with_its_origin_and_removed(bench: Bench) -> None:
    for number in range(3):
        receive(bench, InstanceNumber=number)
    bench.sweep()
    [asked] = bench.asked.values()
    assert (asked["sender_aet"], asked["receiver_aet"], asked["sender_host"]) == ("CT1", "ROUTER", "10.1.2.3")
    assert asked["targets"] == ["archive"]
    bench.dispatch()
    bench.sweep()
    assert kept(bench, "archive") == 3 and set(bench.states().values()) == {"done"}
    assert list(spool(bench).folder.iterdir()) == []
    assert not bench.sweep().runs


def test_a_study_that_something_comes_for_without_end_goes_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a sender that never pauses for as long as its source waits."""
    bench.source = router(settle_s=60, max_open_s=200)
    path = receive(bench)
    came = path.stat().st_ctime

    def swept_after(seconds: float) -> Swept:
        os.utime(path.parent, (came + seconds, came + seconds))  # something is coming
        monkeypatch.setattr("tasks.sources.sweep.time", SimpleNamespace(time=lambda: came + seconds))
        return bench.sweep()

    for seconds, again in ((1, 61), (110, 170), (190, 200)):
        done = swept_after(seconds)
        assert not done.runs and done.next == pytest.approx(came + again)
    assert swept_after(201).runs
    bench.down = {"archive"}
    bench.dispatch()
    bench.sweep()
    assert set(bench.states().values()) == {"failed"}
    # What comes for it then counts from its own first instance on, though what came before lies there still.
    receive(bench, InstanceNumber=2)
    monkeypatch.undo()
    monkeypatch.setenv("TALARIA_HOME", str(bench.home.root))
    with Ledger(bench.home.ledger) as ledger:
        sweep = Sweep(bench.source, bench.targets, bench.home, ledger, bench)
        [unit], row = [*units(bench.source, ledger)], bench.rows().popitem()[1]
        long_ago = replace(unit, oldest=came - 86_400), replace(row, time=came - 3600)
        assert sweep._latest(*long_ago, came) == pytest.approx(came + 200, abs=60)
        assert sweep._latest(long_ago[0], None, came) == came - 86_400 + 200


def test_it_waits_for_as_long_as_a_study_settles_at_least() -> None:
    assert router(settle_s=60).longest_s == 43_200 and router(settle_s=86_400).longest_s == 86_400


def test_senders_are_dispatched_apart(bench: Bench) -> None:
    receive(bench, calling="CT1")
    receive(bench, calling="CT2")
    bench.sweep()
    assert sorted(asked["sender_aet"] for asked in bench.asked.values()) == ["CT1", "CT2"]


@pytest.mark.parametrize(
    ("routes", "targets"),
    [
        ([{"targets": ["pacs"]}], ["archive", "pacs"]),
        ([{"modality": "CT", "targets": ["pacs"]}], ["archive", "pacs"]),
        ([{"modality": "MR", "targets": ["pacs"]}], ["archive"]),
        ([{"modality": "SR", "targets": ["pacs"]}, {"calling": "CT*", "targets": ["other"]}],
         ["archive", "pacs", "other"]),
        ([{"calling": "MR*", "targets": ["pacs"]}, {"called": "ROUTER", "targets": ["other"]}], ["archive", "other"]),
        ([{"study_description": "*tho?ax*", "targets": ["pacs"]}], ["archive", "pacs"]),
        ([{"study_description": "*thorax*", "calling": "MR1", "targets": ["pacs"]}], ["archive"]),
        ([{"series_description": "lung", "modality": "SR", "targets": ["pacs"]}], ["archive"]),
        ([{"series_description": "müll*", "targets": ["pacs"]}], ["archive", "pacs"]),
    ],
)  # fmt: skip
def test_a_study_goes_as_a_whole_where_one_of_its_series_fits(
    bench: Bench, routes: list[dict[str, Any]], targets: list[str]
) -> None:
    bench.source = router(routes=routes)
    receive(bench, Modality="CT", StudyDescription="CT Thorax", SeriesDescription="Lung")
    receive(
        bench,
        Modality="SR",
        StudyDescription="CT Thorax",
        SeriesDescription="Müller",
        SpecificCharacterSet="ISO_IR 192",
    )
    bench.sweep()
    [asked] = bench.asked.values()
    assert asked["targets"] == targets
    bench.dispatch()
    bench.sweep()
    assert [kept(bench, name) for name in targets] == [2] * len(targets)
    assert list(spool(bench).folder.iterdir()) == []


def test_a_study_waits_whose_routes_nobody_knows_while_it_can_not_be_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.source = router(routes=[{"modality": "CT", "targets": ["pacs"]}])
    path = receive(bench, Modality="CT")

    def fails(*args: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr("tasks.sources.dicom.read_elements", fails)
        for _ in range(2):
            assert not bench.sweep().runs, "it would go to the archive alone, and be removed"
    assert set(bench.states().values()) == {"held"} and path.is_file()
    [words] = told(bench)
    assert "can't be read: Too many open files" in words
    bench.all()
    assert (kept(bench, "pacs"), kept(bench, "archive")) == (1, 1) and not path.exists()


def test_a_study_that_no_route_takes_stays_and_is_reported_once(bench: Bench) -> None:
    bench.source = router(targets=[], routes=[{"modality": "MR", "targets": ["pacs"]}])
    path = receive(bench, Modality="CT")
    for _ in range(3):
        assert not bench.sweep().runs
    assert path.is_file() and set(bench.states().values()) == {"held"}
    [words] = told(bench)
    assert "no route takes it" in words
    bench.source = router(targets=[], routes=[{"modality": "MR,CT", "targets": ["pacs"]}])
    bench.all()
    assert kept(bench, "pacs") == 1 and not path.exists()


def test_instances_are_read_for_their_routes_when_a_unit_goes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a backlog all were read by each sweep, to find again that no route takes them."""
    read, reads = dicom._facts, list[Path]()
    monkeypatch.setattr(dicom, "_facts", lambda path: reads.append(path) or read(path))
    bench.source = router(targets=[], routes=[{"modality": "MR", "targets": ["pacs"]}], settle_s=3600)
    path = receive(bench, Modality="CT")
    receive(bench, study="1.2.4", Modality="MR")
    bench.sweep()
    assert not reads and not bench.states(), "something may still come"
    bench.source = router(targets=[], routes=[{"modality": "MR", "targets": ["pacs"]}])
    bench.down = {"pacs"}
    bench.all()
    assert sorted(bench.states().values()) == ["failed", "held"] and len(reads) == 2
    bench.all()
    assert len(reads) == 2
    with Ledger(bench.home.ledger) as ledger:
        assert sorted(one.problem for one in units(bench.source, ledger)) == ["", dicom.NO_ROUTE]
    bench.source = router(targets=[], routes=[{"modality": "CT", "targets": ["archive"]}])
    bench.all()
    assert kept(bench, "archive") == 1 and not path.exists()


def test_a_unit_of_the_future_goes_where_its_routes_lead(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.source = router(routes=[{"modality": "MR", "targets": ["pacs"]}])
    path = receive(bench, Modality="CT")
    os.utime(path.parent, (path.stat().st_mtime + 7200,) * 2)
    for _ in range(3):
        bench.all()
    assert (kept(bench, "archive"), kept(bench, "pacs")) == (1, 0)


def test_what_a_target_does_not_take_stays(bench: Bench) -> None:
    bench.source = router(targets=["pacs", "archive"])
    bench.down = {"pacs"}
    path = receive(bench)
    bench.all()
    assert path.is_file() and set(bench.states().values()) == {"failed"} and kept(bench, "archive") == 1
    assert not bench.sweep().runs, "it is not tried again and again"


def test_nothing_is_left_of_what_was_under_way_when_a_target_was_added(bench: Bench) -> None:
    receive(bench)
    bench.sweep()
    bench.source = router(targets=["archive", "pacs"])
    bench.dispatch()
    for _ in range(2):
        bench.all()
    assert (kept(bench, "archive"), kept(bench, "pacs")) == (1, 1) and list(spool(bench).folder.iterdir()) == []


def test_what_stays_in_the_folder_of_a_listener_is_dispatched_again_when_somebody_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive(bench)
    bench.sweep()
    bench.dispatch()
    archive = bench.targets["archive"]
    bench.targets["archive"] = bench.target("archive", verify="proven")  # asked for after it was sent
    for _ in range(2):
        assert not bench.sweep().runs
    assert set(bench.states().values()) == {"done"} and len(list(spool(bench).folder.iterdir())) == 1
    [words] = told(bench)
    assert "stay, which `talaria source show` lists: not confirmed by every target" in words
    bench.targets["archive"] = archive

    async def loaded(*_: Any) -> DicomSource:
        return cast(DicomSource, bench.source)

    async def nothing(*_: Any) -> None:
        pass

    monkeypatch.setattr(sources, "load_source", loaded)
    monkeypatch.setattr(sources.batches, "start", nothing)
    office = Office(cast("Any", object()), bench.home)
    done = asyncio.run(sources.retry_source(office, "box"))
    assert done["action"] == "1 unit is dispatched again"
    bench.all()
    assert list(spool(bench).folder.iterdir()) == [] and kept(bench, "archive") == 1
    with pytest.raises(NotFound, match="no unit has failed, is held, or has files that stay"):
        asyncio.run(sources.retry_source(office, "box"))


def test_what_comes_late_is_dispatched_too(bench: Bench) -> None:
    receive(bench)
    bench.sweep()
    receive(bench)  # while the first is under way
    bench.dispatch()
    bench.all()
    bench.all()
    assert kept(bench, "archive") == 2
    receive(bench)  # and long after
    bench.all()
    assert kept(bench, "archive") == 3 and list(spool(bench).folder.iterdir()) == []


def test_versions_of_an_instance_are_all_dispatched(bench: Bench) -> None:
    """Into one folder by dispatch: both are there."""
    bench.targets["archive"] = bench.target("archive", layout="{dispatch_id}")
    uid = studies.uid()
    receive(bench, SOPInstanceUID=uid, InstanceNumber=1)
    receive(bench, SOPInstanceUID=uid, InstanceNumber=2, version=2)
    bench.all()
    bench.all()
    assert kept(bench, "archive") == 2 and list(spool(bench).folder.iterdir()) == []


def test_versions_go_one_after_the_other_as_received_and_the_last_one_stays(bench: Bench) -> None:
    uid = studies.uid()
    for number in (1, 2, 3):
        path = receive(bench, SOPInstanceUID=uid, InstanceNumber=number, version=number)
    last = path.read_bytes()
    receive(bench, calling="CT2")
    assert sum(bench.sweep().runs.values()) == 2, "the first version, and what another has sent"
    assert not bench.sweep().runs, "while it is under way"
    for _ in range(2):
        bench.dispatch()
        assert sum(bench.sweep().runs.values()) == 1
    bench.dispatch()
    bench.sweep()
    assert list(spool(bench).folder.iterdir()) == []
    assert last in [one.read_bytes() for one in bench.at("archive").rglob("*.dcm")]


def test_a_version_that_was_not_taken_does_not_hold_up_the_next(bench: Bench) -> None:
    uid = studies.uid()
    receive(bench, SOPInstanceUID=uid, InstanceNumber=1)
    bench.down = {"archive"}
    bench.all()
    bench.down = set()
    receive(bench, SOPInstanceUID=uid, InstanceNumber=2, version=2)
    bench.all()
    assert sorted(bench.states().values()) == ["done", "failed"] and kept(bench, "archive") == 1


def test_what_the_listener_has_confirmed_arrives(bench: Bench) -> None:
    """From an association to a target, by what each leaves for the other."""
    with listening(bench.home.root, settle_s=0) as there:
        folder = there.folder
        assoc = associated(there.port)
        ds = studies.dataset()
        assert stored(assoc, ds) == 0
        assoc.release()
    bench.source = router().named("ct")
    bench.all()
    assert kept(bench, "archive") == 1 and list(folder.iterdir()) == []
    with Ledger(bench.home.ledger) as ledger:
        uid = str(ds.SOPInstanceUID)
        where = bench.targets["archive"].endpoint_for()
        assert ledger.confirmed_instances([uid, "1.2.3"], "archive", where) == {uid}
        origin = Origin("CT1", "ROUTER", "127.0.0.1")

        def committed(saved: Any = bench.targets, **fields: Any) -> bool:
            return confirmed(router(**fields), origin, [uid, "1.2.3"], saved, ledger) == {uid}

        both = [{"modality": "CT", "targets": ["pacs"]}, {"targets": ["archive"], "modality": "MR"}]
        assert committed() and committed(routes=both[:1]) and committed(targets=["folder/archive"])
        assert committed(targets=[], routes=both)
        assert not committed(targets=[], routes=both[:1])
        assert not committed(targets=["archive", "pacs"])  # one of two
        assert not committed(routes=[{"calling": "CT*", "targets": ["pacs"]}])
        assert committed(routes=[{"calling": "MR*", "targets": ["pacs"]}])
        assert not committed({})  # it is not there any more
        assert not committed({"archive": bench.target("archive", layout="{PatientID}")})  # it was moved


def test_a_source_for_which_units_wait_is_not_removed(bench: Bench) -> None:
    check_removal(bench.home, "box")
    receive(bench)
    with pytest.raises(Misconfigured, match="1 units that it received are not delivered yet"):
        check_removal(bench.home, "box")
    assert orphans(bench.home, {"box"}) == {} and orphans(bench.home, {"other"}) == {"box": 1}
    bench.all()
    check_removal(bench.home, "box")
    assert orphans(bench.home, set()) == {}


def test_what_another_host_has_received_is_that_host_s_to_say(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hosts_of(client: Any) -> dict[str, str]:
        return {"box": "there"}

    def ask(type_name: str = "dicom") -> None:
        asyncio.run(sources.check_removal(Office(cast("Any", object()), bench.home), "box", type_name))

    monkeypatch.setattr("tasks.sources.belonging.hosts_of", hosts_of)
    monkeypatch.setenv("TALARIA_HOST_NAME", "here")
    ask()
    monkeypatch.setenv("TALARIA_LEDGER", "postgresql://database/talaria")
    with pytest.raises(Misconfigured, match="only there knows whether all that it received is delivered"):
        ask()
    ask("inbox")
    monkeypatch.setenv("TALARIA_HOST_NAME", "there")
    ask()
    receive(bench)
    with pytest.raises(Misconfigured, match="1 units that it received are not delivered yet"):
        ask()


def test_what_is_no_unit_is_left_alone(bench: Bench) -> None:
    for name in (".reports", "a+b", "CT1+ROUTER+10.1.2.3+1.2+x"):
        (spool(bench).folder / name).mkdir(parents=True)
        studies.dicom(spool(bench).folder / name / "1.dcm")
    assert not bench.sweep().runs and bench.states() == {}


@pytest.mark.parametrize(
    "unit",
    [
        ReceivedUnit("CT 1", "ROUTER", "10.1.2.3", "1.2.3"),
        ReceivedUnit("A+B/..", ".", "fe80::1%eth0", "..", 7),
        ReceivedUnit("%2E", "*", "::1", "1" * 64, 12),
    ],
)
def test_the_name_of_a_folder_says_what_a_unit_is(unit: ReceivedUnit) -> None:
    assert ReceivedUnit.parse(unit.name) == unit
    assert "/" not in unit.name and not unit.name.startswith(".") and len(unit.name) < 250
