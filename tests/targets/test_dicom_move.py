"""Whether a node knows us as a move destination: shown by a move of one instance, of which nothing is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from protocols.dimse.get import DESTINATION_UNKNOWN
from protocols.dimse.moves import MoveDestination
from talaria.engine.leftovers import clear_staging
from talaria.testing import studies
from tasks import dicom_move, dicom_pull
from tasks.checking import check_target
from tasks.dicom import BOGUS
from tests.servers.dcmtk import dcmqrscp
from tests.servers.orthanc import shared_orthanc
from tests.servers.qr import FIND, GET, MOVE, Instance, Last, Request, Send, Steps, archive
from tests.servers.qrscp import qrscp
from tests.servers.scu import AE
from tests.targets.dicom import dicom_target
from tests.targets.pulling import AET, GETS, MOVES, in_latin_1, only, port_of_moves, store, study
from transfer.errors import REMEDIES, Misconfigured
from transfer.health import Health, Probe
from transfer.home import Home


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    yield port_of_moves(monkeypatch)
    assert_nothing_is_left()


def assert_nothing_is_left() -> None:
    home = Home.current()
    assert not [*home.staging.glob("**/*"), *(home.root / "owners").glob("*"), *home.root.rglob("*.dcm")]


def checked(at: int, aet: str, **settings: Any) -> tuple[Health, Probe]:
    """Test a node with a move; return the last probe as well."""
    fields = {"aet_target": aet, "direction": "query", "idle_timeout_s": 3, "quote_peer": "short", **settings}
    health = check_target(dicom_target(at, **fields), move=True)
    assert health.probes[-1].name == "move"
    return health, health.probes[-1]


def assert_shown(at: int, aet: str, *, known: bool) -> Probe:
    health, move = checked(at, aet)
    assert (move.result, health.ok) == (("ok", True) if known else ("failed", False)), move
    if known:
        assert f"{AET}, port " in move.detail and not move.remedy
    else:
        assert AET in move.detail and "register" in move.detail and f"register {AET} as a move" in move.remedy
    return move


@pytest.mark.parametrize("known", [True, False])
def test_dcmqrscp(tmp_path: Path, port: int, known: bool) -> None:
    with dcmqrscp(tmp_path / "qr", peers={AET: port} if known else {}) as server:
        store(tmp_path / "in", study(3, 1), server.port, server.aet)
        assert_shown(server.port, server.aet, known=known)


@pytest.mark.parametrize("known", [True, False])
def test_qrscp_of_pynetdicom(tmp_path: Path, port: int, known: bool) -> None:
    with qrscp(tmp_path / "qr", peers={AET: port} if known else {}) as server:
        store(tmp_path / "in", study(3, 1), server.port, server.aet)
        assert_shown(server.port, server.aet, known=known)


def test_orthanc(tmp_path: Path, port: int) -> None:
    server = shared_orthanc()
    store(tmp_path / "in", study(3, 1), server.dicom_port, server.aet)
    assert_shown(server.dicom_port, server.aet, known=False)
    server.know(AET, port)
    assert_shown(server.dicom_port, server.aet, known=True)


def other_host(request: Request, found: list[Instance]) -> Steps:
    """Connect from another address than the one that was asked."""
    ae = AE("ARCHIVE")
    ae.add_requested_context(Verification)
    port = int(dicom_pull.destination().port)
    assert not ae.associate("127.0.0.1", port, ae_title=AET, bind_address=("127.0.0.2", 0)).is_established
    return [Last(0xA702, 0, 1, 0)]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (lambda request, found: [Last(0)], "s: is RECEIVER registered there with this machine"),
        (lambda request, found: [Last(0, 1, 0, 0)], "has sent the series (status 0000, 1 completed, 0 failed, 0"),
        (lambda request, found: [Last(DESTINATION_UNKNOWN)], "doesn't know the move destination RECEIVER: register"),
        (lambda request, found: [Last(0xA702, 0, 1, 0)], "did not move the instance (status A702, 0 completed, 1 fail"),
        (lambda request, found: [Last(0xC000, comment=f"no way for {studies.PATIENT_NAME}")], "C000 (no way for "),
        (lambda request, found: [Send(found[0], originator="SOMEBODY"), Last(0xB000, 0, 1, 0)], "status B000"),
        (other_host, "associations from 127.0.0.2 were refused: that is no address of 127.0.0.1"),
    ],
    ids=["success with nothing", "success elsewhere", "A801", "A702", "C000", "of somebody else", "another address"],
)
def test_whatever_does_not_come_is_no_success(script: Callable[..., Steps], words: str, port: int) -> None:
    with archive(study(4, 2), on_move=script, ports={AET: port}) as peer:
        health, move = checked(peer.port, peer.aet, idle_timeout_s=1)
        assert move.result == "failed" and not health.ok and words in move.detail, move.detail
        assert not any(value in move.detail + move.remedy for value in studies.PHI)
        assert move.remedy and move.remedy not in REMEDIES.values()


def test_one_instance_is_moved_and_only_where_it_is_asked_for(port: int) -> None:
    with archive(study(4, 2), ports={AET: port}) as peer:
        target = dicom_target(peer.port, aet_target=peer.aet, direction="query")
        assert "move" not in [probe.name for probe in check_target(target).probes] and not peer.asked(MOVE)
        assert checked(peer.port, peer.aet)[0].ok
        [asked] = peer.asked(MOVE)
        assert asked.level == "IMAGE" and asked.destination == AET and len(peer.store_answers) == 1
        only_stored = dicom_target(peer.port, aet_target=peer.aet)
        assert "move" not in [probe.name for probe in check_target(only_stored, move=True).probes]


@pytest.mark.parametrize("what", ["empty", "refused", "no C-MOVE", "no port"])
def test_where_nothing_can_be_told_nothing_is_called_known(
    what: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(request: Request) -> int:
        narrow = "StudyInstanceUID" in request.keys and request.keys.StudyInstanceUID
        return 0xC001 if what == "refused" and request.kind == FIND and not narrow else 0

    if what == "no port":
        monkeypatch.setenv("TALARIA_SCP_PORT", "0")
    files = [] if what == "empty" else study(2, 1)
    with archive(files, accept=only(MOVES if what == "no C-MOVE" else ()), refuses=refuses) as peer:
        health, move = checked(peer.port, peer.aet)
        assert (move.result, health.ok) == ("skipped", True) and move.detail.startswith("can't be told: ")
        said = {"empty": "no instance", "refused": "C001", "no C-MOVE": "does not grant", "no port": "set scp_port"}
        assert said[what] in move.detail and not peer.asked(MOVE)


def test_an_earlier_failure_leaves_the_move_out(port: int) -> None:
    with archive([], accept=only((*GETS, *MOVES))) as peer:
        health, move = checked(peer.port, peer.aet)
        assert not health.ok and move.result == "skipped" and "earlier" in move.detail


def test_the_newest_and_smallest_is_moved_of_what_an_archive_shows(port: int) -> None:
    def one(number: int, **values: Any) -> bytes:
        return studies.encoded(studies.dataset(InstanceNumber=number, **values))

    new = f"{dicom_move.today():%Y%m%d}"
    large = [one(n, study="1.2.3", series="1.2.3.1", StudyDate=new, Modality="US") for n in range(3)]
    small = one(9, study="1.2.4", series="1.2.4.1", StudyDate=new, Modality="CT")
    with archive([one(0, StudyDate="20010101"), *large, small], ports={AET: port}) as peer:
        assert checked(peer.port, peer.aet)[0].ok
        [asked] = peer.asked(MOVE)
        assert asked.keys.StudyInstanceUID == "1.2.4"
        assert all(request.keys.StudyDate for request in peer.asked(FIND)[1:] if request.level == "STUDY")


def test_a_killed_test_leaves_nothing_for_long(tmp_path: Path, port: int) -> None:
    home = Home.current()
    with dicom_move.room() as folder:
        studies.dicom(folder / "one.dcm")
        assert clear_staging(home) == 0 and (folder / "one.dcm").exists()  # it is somebody's at work
    left = home.staging / folder.name
    studies.dicom(left / "one.dcm")  # as after a kill, which leaves the owner's file as well, without its lock
    (home.root / "owners" / folder.name).touch()
    assert clear_staging(home) == 1 and not left.exists()
    (home.root / "owners" / folder.name).unlink()


def test_a_port_that_is_taken_is_said(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocols.dimse.moves.PORT_S", 0.0)
    with archive(study(1, 1)) as peer:
        monkeypatch.setenv("TALARIA_SCP_PORT", str(peer.port))
        _, move = checked(peer.port, peer.aet)
        assert move.error == Misconfigured.__name__ and f"can't listen on 127.0.0.1, port {peer.port}" in move.detail
        assert MoveDestination(AET, peer.port, "127.0.0.1") == dicom_pull.destination()
        # Whether C-GET is granted is asked by what doesn't exist: no instance was got instead.
        assert {str(one.keys.StudyInstanceUID) for one in peer.asked(GET)} <= {BOGUS} and not peer.asked(MOVE)


def test_a_node_of_patient_root_is_asked_in_the_character_set_that_it_reads(port: int) -> None:
    with archive(**in_latin_1(), ports={AET: port}) as peer:
        assert checked(peer.port, peer.aet)[0].ok
        assert {request.charset for request in peer.asked(MOVE)} == {"ISO_IR 100"}
