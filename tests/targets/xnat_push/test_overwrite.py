"""What happens to a session that XNAT has already."""

from __future__ import annotations

from pathlib import Path

from talaria.testing import studies
from talaria.testing.harness import attempt
from tests.servers.xnat import Xnat
from tests.targets.xnat import xnat_target
from tests.targets.xnat_push.pushing import _sop, all_of, kinds, sessions
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import State


def test_append_adds_and_touches_nothing_else(server: Xnat, study: Path) -> None:
    uid, series = studies.uid(56), studies.uid(56)
    target = xnat_target(server.url, overwrite="append")
    studies.ct(study, 3, study=uid, series=series)
    attempt(target, study).require()
    before = dict(server.instances())
    [session] = server.store.experiments.values()
    paths = {file.path for file in session.files}
    studies.ct(study, 2, study=uid, series=series, first=4)  # more of the same series
    studies.ct(study / "new", 2, study=uid)  # and another one
    sent = attempt(target, study)
    assert kinds(sent) == {
        "CT0001.dcm": Kind.ALREADY, "CT0002.dcm": Kind.ALREADY, "CT0003.dcm": Kind.ALREADY,
        "CT0004.dcm": Kind.DELIVERED, "CT0005.dcm": Kind.DELIVERED,
        "new/CT0001.dcm": Kind.DELIVERED, "new/CT0002.dcm": Kind.DELIVERED,
    }  # fmt: skip
    assert before.items() <= server.instances().items()
    assert paths <= {file.path for file in session.files}, "what was there has been written again"
    assert len(server.instances()) == 7
    assert server.imports[-1]["overwrite"] == "append"


def test_none_sends_nothing_to_a_session_that_is_there(server: Xnat, study: Path) -> None:
    uid = studies.uid(56)
    studies.ct(study / "a", 2, study=uid)
    attempt(xnat_target(server.url), study).require()
    studies.ct(study / "b", 2, study=uid)
    server.rules.always_merges = True  # `dest=/archive` merges at XNAT, whatever `overwrite` says
    sent = attempt(xnat_target(server.url), study)
    assert {path: kind for path, kind in kinds(sent).items() if path[0] == "a"} == dict.fromkeys(
        ["a/CT0001.dcm", "a/CT0002.dcm"], Kind.ALREADY
    )
    assert set(sent.rejected) == {"b/CT0001.dcm", "b/CT0002.dcm"}
    assert "Session already exists" in sent.rejected["b/CT0001.dcm"]
    assert sent.require().state is State.PARTIAL
    assert len(server.imports) == 1, "it was sent for nothing"
    assert len(server.instances()) == 2


def test_none_goes_on_with_a_session_of_its_own(server: Xnat, study: Path) -> None:
    """What an earlier attempt of the same dispatch left over is added, whatever `overwrite` says."""
    studies.ct(study, 4)
    plan = scan([study])
    first = attempt(xnat_target(server.url), plan.narrowed(plan.items[:2]))
    sent = attempt(xnat_target(server.url), plan, done=first.arrived)
    assert kinds(sent) == {"CT0003.dcm": Kind.DELIVERED, "CT0004.dcm": Kind.DELIVERED}
    assert len(server.instances()) == 4


def test_delete_replaces_what_is_sent(server: Xnat, study: Path) -> None:
    studies.ct(study, 3)
    attempt(xnat_target(server.url), study).require()
    victim = study / "CT0001.dcm"
    data = victim.read_bytes()
    victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (study / "CT0002.dcm").unlink()
    sent = attempt(xnat_target(server.url, overwrite="delete"), study)
    assert all_of(sent, Kind.DELIVERED)
    assert server.instances()[_sop(sent, "CT0001.dcm")] == victim.read_bytes()
    assert len(server.instances()) == 3, "what was not sent stays"


def test_delete_never_touches_another_study(server: Xnat, study: Path) -> None:
    studies.ct(study / "a", 3)
    studies.ct(study / "b", 2)
    target = xnat_target(server.url, overwrite="delete")
    for name in "ab":
        assert all_of(attempt(target, study / name), Kind.DELIVERED)
    assert sorted(count for _, count in sessions(server).values()) == [2, 3]
    assert {query["overwrite"] for query in server.imports} == {"none"}


def test_strict_scans_are_rejected_in_xnats_words(server: Xnat, study: Path) -> None:
    uid, series = studies.uid(56), studies.uid(56)
    server.rules.strict_scans = True
    target = xnat_target(server.url, overwrite="append")
    studies.ct(study, 2, study=uid, series=series)
    attempt(target, study).require()
    studies.ct(study, 1, study=uid, series=series, first=3)
    sent = attempt(target, study)
    assert set(sent.rejected) == {"CT0003.dcm"}
    assert "Session already contains a scan (1) with the same UID and number" in sent.rejected["CT0003.dcm"]
    assert "CONFLICT" in sent.rejected["CT0003.dcm"]


def test_delete_replaces_a_single_file(server: Xnat, study: Path) -> None:
    [path] = studies.ct(study, 1)
    target = xnat_target(server.url, overwrite="delete")
    attempt(target, study).require()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    sent = attempt(target, study)
    assert all_of(sent, Kind.DELIVERED)
    assert server.instances()[_sop(sent, path.name)] == path.read_bytes()
