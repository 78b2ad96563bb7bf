"""Retrieval from DICOM nodes: what came is on the disk, what the receipt says is what came, whatever the peer does."""

from __future__ import annotations

import json
import select
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pydicom
import pytest

from blocks import TYPES
from blocks.dicom import DicomTarget
from imaging.query import Query
from protocols.dimse import pull_move, scp
from protocols.dimse.get import Retriever
from protocols.dimse.moves import DESK, Expected, MoveDesk, Strangers
from protocols.dimse.receive import Depot
from protocols.net.tls import Tls
from talaria.cli.target import types
from talaria.testing import studies
from talaria.testing.process import as_loaded, free_port, until
from talaria.testing.relay import relay
from tasks import DRIVERS
from tasks.checking import check_target
from tasks.dicom import BOGUS, check, find, retrieve
from tests.protocols.intake import refusal
from tests.servers.certificates import Authority
from tests.servers.dcmtk import dcmqrscp
from tests.servers.orthanc import shared_orthanc
from tests.servers.qr import FIND, GET, MOVE, Archive, Instance, Last, Request, Send, Steps, archive, send_to, sends
from tests.servers.steps import REFUSED_CLASS, REFUSED_SYNTAXES, Abort, Silence
from tests.servers.wire import Context
from tests.targets.dicom import dicom_target
from tests.targets.dicom_tls import certificates, tls_target
from tests.targets.folder import ANOTHER_FILE_SYSTEM
from tests.targets.pulling import (
    AET,
    GETS,
    MOVES,
    assert_agrees,
    datasets,
    in_latin_1,
    only,
    port_of_moves,
    store,
    study,
)
from transfer.errors import Busy, Cancelled, DispatchError, Interrupted, Misconfigured, NotFound, TimedOut
from transfer.outcome import Kind
from transfer.receipt import Level, PushReport, Receipt, State


@pytest.fixture(autouse=True)
def _no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no test listen on the usual port, which others may use meanwhile."""
    monkeypatch.setenv("TALARIA_SCP_PORT", "0")


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    return port_of_moves(monkeypatch)


def pull(peer: Archive, folder: Path, report: PushReport | None = None, **settings: Any) -> Receipt:
    target = dicom_target(peer.port, **{"aet_target": peer.aet, "idle_timeout_s": 3, "direction": "query"} | settings)
    return retrieve(target, Query(AccessionNumber=(studies.ACCESSION,)), folder, report or PushReport())


@pytest.mark.parametrize("way", ["get", "move"])
@pytest.mark.parametrize("where", ["disk", "memory"])
def test_everything_comes_and_the_choice_is_told(way: str, where: str, tmp_path: Path, port: int) -> None:
    refused = GETS if way == "move" else ()
    with ExitStack() as ends:
        peer = ends.enter_context(archive(study(), accept=only(refused), ports={AET: port}))
        root = tmp_path if where == "disk" else Path(ends.enter_context(TemporaryDirectory(dir=ANOTHER_FILE_SYSTEM)))
        receipt = pull(peer, root / "in")
        assert receipt.state is State.DELIVERED and receipt.verified is Level.LISTED
        assert_agrees(receipt, root / "in", peer)
        [note] = receipt.notes
        assert (
            note
            == {
                "get": "retrieved by C-GET, which the peer grants",
                "move": f"retrieved by C-MOVE to {AET}: the peer does not accept C-GET",
            }[way]
        )
        again = pull(peer, root / "in")
        assert again.counts[Kind.ALREADY] == 6 and len(peer.asked(GET if way == "get" else MOVE)) == 2


@pytest.mark.parametrize("way", ["get", "move"])
@pytest.mark.parametrize("alike", [True, False], ids=["copied", "other"])
def test_one_uid_in_two_series_comes_once_and_what_differs_is_not_taken_for_it(
    way: str, alike: bool, tmp_path: Path, port: int
) -> None:
    uid, first, second = studies.uid(), studies.uid(), studies.uid()
    files = [studies.dataset(study=uid, series=first) for _ in range(2)]
    copies = [studies.dataset(study=uid, series=second, SOPInstanceUID=one.SOPInstanceUID) for one in files]
    if not alike:
        copies[0].PixelData = bytes(len(copies[0].PixelData))
    held = [studies.encoded(one) for one in (*files, *copies, studies.dataset(study=uid, series=second))]
    refused = GETS if way == "move" else ()
    with archive(held, accept=only(refused), ports={AET: port}) as peer:
        for _ in range(2):  # what is here already is as much as what comes
            receipt = pull(peer, tmp_path / "in", concurrency=1)
            assert receipt.state is (State.DELIVERED if alike else State.PARTIAL), receipt.notes
            assert datasets(tmp_path / "in").keys() == {one.uid for one in peer.instances}
            said = "; ".join(receipt.notes)
            if alike:
                assert receipt.unsent == 0
                assert f"series {second}: 2 instances are in another series as well, and come once" in said
            else:
                assert receipt.unsent == 1
                assert "were not taken: another instance of the same UID is in series " in said


@pytest.mark.parametrize("way", ["get", "move"])
@pytest.mark.parametrize("alike", [True, False], ids=["copied", "other"])
def test_one_uid_that_a_series_has_twice_comes_once_and_what_differs_is_said(
    way: str, alike: bool, tmp_path: Path, port: int
) -> None:
    one = studies.dataset()
    first = studies.encoded(one)
    if not alike:
        one.PixelData = bytes(len(one.PixelData))
    with archive([first, studies.encoded(one)], accept=only(GETS if way == "move" else ()), ports={AET: port}) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert datasets(tmp_path / "in") == {peer.instances[0].uid: peer.instances[0].data}
        assert peer.store_answers == [0, 0 if alike else 0x0124]
        words = "1 instances were not taken: another instance of the same UID came before"
        assert any(words in note for note in receipt.notes) is not alike


@pytest.mark.parametrize("way", ["get", "move"])
@pytest.mark.parametrize("quotes", ["short", "none"])
def test_a_peers_words_are_said_as_its_target_allows_and_name_no_patient(
    way: str, quotes: str, tmp_path: Path, port: int
) -> None:
    comment = f"can't give {studies.PATIENT_NAME} of {studies.PATIENT_ID}"

    def script(request: Request, found: list[Instance]) -> Steps:
        return [*(Send(one) for one in found[1:]), Last(0xB000, len(found) - 1, 1, 0, comment=comment)]

    refused = GETS if way == "move" else ()
    with archive(study(), accept=only(refused), on_get=script, on_move=script, ports={AET: port}) as peer:
        receipt = pull(peer, tmp_path / "in", quote_peer=quotes)
        said = "; ".join([*receipt.notes, *(item.detail for item in receipt.items)])
        assert receipt.state is State.PARTIAL and "B000" in said
        assert not any(value in said for value in studies.PHI)
        assert ("can't give" in said) == (quotes == "short")


# What a peer does wrong in the first retrieval of a series, and what must come of it.
def half_then(*last: Any) -> Callable[[Request, list[Instance]], Steps]:
    return lambda request, found: [*(Send(one) for one in found[: len(found) // 2]), *last]


@pytest.mark.parametrize("way", ["get", "move"])
@pytest.mark.parametrize(
    "last",
    [
        Last(0xB000, 1, 2, 0),  # failed sub-operations
        Last(0xA702, 1, 2, 0),
        Last(0x0000, 3, 0, 0),  # counters that lie
        Last(0x0000),  # no counters
        Last(0xC000, 0, 3, 0),
    ],
    ids=["B000", "A702", "lie", "bare", "C000"],
)
def test_what_a_peer_leaves_out_is_asked_for_again(way: str, last: Last, tmp_path: Path, port: int) -> None:
    def script(request: Request, found: list[Instance]) -> Steps:
        return half_then(last)(request, found) if request.level == "SERIES" else sends(found)

    refused = GETS if way == "move" else ()
    with archive(study(), accept=only(refused), on_get=script, on_move=script, ports={AET: port}) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.DELIVERED
        assert_agrees(receipt, tmp_path / "in", peer)


@pytest.mark.parametrize("way", ["get", "move"])
def test_what_a_peer_never_gives_makes_a_partial_receipt(way: str, tmp_path: Path, port: int) -> None:
    files = study()
    lost = Instance.of(files[0]).uid

    def script(request: Request, found: list[Instance]) -> Steps:
        there = [one for one in found if one.uid != lost]
        return [*(Send(one) for one in there), Last(0, len(found), 0, 0)]  # and calls it a success

    refused = GETS if way == "move" else ()
    with archive(files, accept=only(refused), on_get=script, on_move=script, ports={AET: port}) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.PARTIAL
        assert_agrees(receipt, tmp_path / "in", peer)
        [item] = [item for item in receipt.items if item.outcome is Kind.REJECTED]
        assert item.sop_instance_uid == lost and "not given" in item.detail


@pytest.mark.parametrize("count", ["-1", "0", "1", "2147483648"])
def test_a_count_that_is_none_keeps_nothing_from_being_asked_for(count: str, tmp_path: Path) -> None:
    said = dict.fromkeys(("NumberOfSeriesRelatedInstances", "NumberOfStudyRelatedInstances"), count)
    with archive(study(), says=said) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.DELIVERED, receipt.notes
        assert_agrees(receipt, tmp_path / "in", peer)
        found = find(dicom_target(peer.port, aet_target=peer.aet), Query(AccessionNumber=(studies.ACCESSION,)))
        assert [match.instances for match in found] == [int(count) if len(count) == 1 else None]


@pytest.mark.parametrize("lacking", ["counts", "images"])
def test_a_success_with_nothing_completed_is_not_retrieved(lacking: str, tmp_path: Path) -> None:
    def refuses(request: Request) -> int:
        return 0xA900 if lacking == "images" and request.level == "IMAGE" else 0

    left_out = frozenset(("NumberOfSeriesRelatedInstances", "NumberOfStudyRelatedInstances"))
    nothing: Callable[[Request, list[Instance]], Steps] = lambda request, found: [Last(0, 0, 0, 0)]  # noqa: E731
    with archive(study(), on_get=nothing, leaves_out=left_out, refuses=refuses) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.FAILED
        assert_agrees(receipt, tmp_path / "in", peer)


def test_without_counts_and_lists_the_peers_last_word_decides(tmp_path: Path) -> None:
    left_out = frozenset(("NumberOfSeriesRelatedInstances", "NumberOfStudyRelatedInstances"))

    def refuses(request: Request) -> int:
        return 0xA900 if request.level == "IMAGE" and request.kind == FIND else 0

    with archive(study(), leaves_out=left_out, refuses=refuses) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.DELIVERED and receipt.counts[Kind.DELIVERED] == 6
    script = half_then(Last(0xB000, 1, 2, 0))
    with archive(study(), leaves_out=left_out, refuses=refuses, on_get=script) as peer:
        receipt = pull(peer, tmp_path / "half")
        assert receipt.state is State.PARTIAL and receipt.verified is Level.ACCEPTED
        assert_agrees(receipt, tmp_path / "half", peer)


UNCOUNTED = frozenset(("NumberOfSeriesRelatedInstances", "NumberOfStudyRelatedInstances"))


@pytest.mark.parametrize("ignored", ["", "InstanceNumber"])
@pytest.mark.parametrize("limit", [7, 10])
def test_instances_beyond_a_limit_of_lists_are_retrieved_too(limit: int, ignored: str, tmp_path: Path) -> None:
    # The peer lists fewer instances of a series than it announces, and gives half of them at first.
    def script(request: Request, found: list[Instance]) -> Steps:
        return half_then(Last(0xB000, 15, 15, 0))(request, found) if request.number == 1 else sends(found)

    with archive(study(30, 1), limit=limit, on_get=script, ignores=frozenset((ignored,))) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.DELIVERED
        assert_agrees(receipt, tmp_path / "in", peer)


def test_instances_beyond_a_limit_of_lists_come_over_a_long_way_too(tmp_path: Path) -> None:
    with archive(study(50, 1), limit=30, ignores=frozenset(("InstanceNumber",))) as peer:
        with relay(peer.port, delay_s=0.005) as link:
            target = dicom_target(
                link.port, aet_target=peer.aet, direction="query", concurrency=3, max_dispatches=3, idle_timeout_s=10
            )
            receipt = retrieve(target, Query(AccessionNumber=(studies.ACCESSION,)), tmp_path / "in", PushReport())
        assert receipt.state is State.DELIVERED
        assert_agrees(receipt, tmp_path / "in", peer)


@pytest.mark.parametrize("ignored", ["", "InstanceNumber"])
@pytest.mark.parametrize("limit", [7, 10, 20])
def test_a_list_that_ends_at_a_limit_makes_nothing_whole_that_the_peer_calls_partial(
    limit: int, ignored: str, tmp_path: Path
) -> None:
    ignores, lost = frozenset((ignored,)), 10

    def script(request: Request, found: list[Instance]) -> Steps:
        there = found[:-lost] if len(found) > lost else found
        failed = len(found) - len(there)
        return [*(Send(one) for one in there), Last(0xB000 if failed else 0, len(there), failed, 0)]

    with archive(study(30, 1), limit=limit, leaves_out=UNCOUNTED, on_get=script, ignores=ignores) as peer:
        for _ in range(2):  # nor when it is asked for again
            receipt = pull(peer, tmp_path / "in")
            assert_agrees(receipt, tmp_path / "in", peer)
            if receipt.state is State.DELIVERED:
                break
            assert receipt.state is State.PARTIAL and receipt.unsent
        # Instances that are found by number can be asked for alone; others are never said to be all.
        assert (receipt.state is State.DELIVERED) == (not ignored)


def test_a_list_that_is_whole_costs_one_query_where_the_peer_gives_all(tmp_path: Path) -> None:
    with archive(study(10, 1), leaves_out=UNCOUNTED) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.DELIVERED and receipt.verified is Level.LISTED
        assert_agrees(receipt, tmp_path / "in", peer)
        assert [request.level for request in peer.asked(FIND)].count("IMAGE") <= 3


@pytest.mark.parametrize("way", ["get", "move"])
@pytest.mark.parametrize("end", [Abort(), Silence()], ids=["abort", "silence"])
def test_an_association_that_ends_midway_is_begun_again_for_the_rest(
    way: str, end: Any, tmp_path: Path, port: int
) -> None:
    def script(request: Request, found: list[Instance]) -> Steps:
        return half_then(end)(request, found) if request.number == 1 else sends(found)

    refused = GETS if way == "move" else ()
    with archive(study(), accept=only(refused), on_get=script, on_move=script, ports={AET: port}) as peer:
        receipt = pull(peer, tmp_path / "in", idle_timeout_s=1)
        assert receipt.state is State.DELIVERED
        assert_agrees(receipt, tmp_path / "in", peer)


@pytest.mark.parametrize(("end", "error"), [(Abort(), Interrupted), (Silence(), TimedOut)], ids=["abort", "silence"])
def test_a_peer_that_gives_nothing_more_ends_the_retrieval(
    end: Any, error: type[DispatchError], tmp_path: Path
) -> None:
    def nothing(request: Request, found: list[Instance]) -> Steps:
        return [end]

    with archive(study(), on_get=nothing, on_move=nothing) as peer, pytest.raises(error):
        pull(peer, tmp_path / "in", idle_timeout_s=1)
    assert not list((tmp_path / "in").iterdir())


def ends(request: Request, found: list[Instance]) -> Steps:
    return [Abort()]


def test_c_move_is_used_where_a_peer_ends_the_association_at_c_get(tmp_path: Path, port: int) -> None:
    """An Orthanc accepts the context also where its settings forbid a node C-GET."""
    with archive(study(), on_get=ends, ports={AET: port}) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.DELIVERED
        assert_agrees(receipt, tmp_path / "in", peer)
        [note] = [one for one in receipt.notes if "by C-MOVE" in one]
        assert "accepts C-GET, and ends the association" in note


def test_a_link_that_breaks_at_c_get_is_worth_another_attempt_though_c_move_is_not_possible(
    tmp_path: Path, port: int
) -> None:
    with (
        archive(study(), on_get=ends, on_move=lambda request, found: [Last(0xA801, None, None, None)]) as peer,
        pytest.raises(Interrupted, match=r"asked by C-GET: is \S+ registered .*the peer doesn't know the move"),
    ):
        pull(peer, tmp_path / "in")


def test_silence_on_the_wire_ends_a_retrieval_not_the_time_since_a_response(tmp_path: Path) -> None:
    files = study(4, 1)

    def slow(request: Request, found: list[Instance]) -> Steps:
        from tests.servers.steps import Wait

        steps: list[Any] = []
        for one in found:
            steps += [Send(one), Wait(0.7)]
        return [*steps, Last(0, 4, 0, 0)]  # no pending response, longer than the time limit

    with archive(files, on_get=slow) as peer:
        begun = time.monotonic()
        receipt = pull(peer, tmp_path / "in", idle_timeout_s=1.5)
        assert receipt.state is State.DELIVERED and time.monotonic() - begun > 2


def test_what_comes_by_c_move_breaks_the_silence_even_if_an_instance_comes_all_at_once(
    tmp_path: Path, port: int
) -> None:
    noted: list[bool] = []

    def script(request: Request, found: list[Instance]) -> Any:
        for one in found:
            before = DESK._expected[0].last_heard()
            yield Send(one)
            noted.append(DESK._expected[0].last_heard() > before)
        yield Last(0, len(found), 0, 0)

    with archive(study(4, 1), accept=only(GETS), on_move=script, ports={AET: port}) as peer:
        assert pull(peer, tmp_path / "in").state is State.DELIVERED
    assert noted == [True] * 4


def test_instances_of_another_study_and_copies_are_not_kept(tmp_path: Path) -> None:
    files, others = study(2, 1), study(1, 1)
    stranger = Instance.of(others[0])

    def script(request: Request, found: list[Instance]) -> Steps:
        return [Send(found[0]), Send(stranger), Send(found[0]), Send(found[1]), Last(0, 4, 0, 0)]

    with archive(files, on_get=script) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.DELIVERED
        assert_agrees(receipt, tmp_path / "in", peer)
        assert any("not taken" in note for note in receipt.notes)
        assert peer.store_answers == [0, 0x0124, 0, 0]


def test_what_is_damaged_or_named_wrong_is_not_kept(tmp_path: Path) -> None:
    files = study(3, 1)

    def script(request: Request, found: list[Instance]) -> Steps:
        if request.level == "IMAGE":
            return [Last(0xC000, 0, 1, 0)]
        bad = [Send(found[0], data=found[0].data[:40]), Send(found[1], uid="1.2.3/../x"), Send(found[1], uid="1.2.3")]
        return [*bad, Send(found[2]), Last(0, 4, 0, 0)]

    with archive(files, on_get=script) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.PARTIAL and receipt.counts[Kind.DELIVERED] == 1
        assert_agrees(receipt, tmp_path / "in", peer)
    assert not (tmp_path / "x.dcm").exists()


@pytest.mark.parametrize("name", ["JPEG2000.dcm", "MR_small_bigendian.dcm", "image_dfl.dcm", "SC_rgb_jpeg_dcmtk.dcm"])
def test_every_syntax_is_kept_as_sent(name: str, tmp_path: Path) -> None:
    with archive(study(2, 1, name)) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.DELIVERED
        assert_agrees(receipt, tmp_path / "in", peer)


@pytest.mark.parametrize(("count", "together"), [(90, False), (260, True)], ids=["series", "one series"])
def test_private_classes_and_more_contexts_than_one_association_holds(
    count: int, together: bool, tmp_path: Path
) -> None:
    uid, series = studies.uid(), studies.uid()
    files = []
    for number in range(count):
        ds = studies.dataset(study=uid, series=series if together else studies.uid())
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = f"1.2.826.0.1.3680043.9.9999.{number + 1}"
        files.append(studies.encoded(ds))
    with archive(files) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.DELIVERED and receipt.counts[Kind.DELIVERED] == count
        assert_agrees(receipt, tmp_path / "in", peer)


def test_an_answer_without_roles_does_not_matter(tmp_path: Path) -> None:
    with archive(study(), gives_roles=False) as peer:
        assert pull(peer, tmp_path / "in").state is State.DELIVERED


@pytest.mark.parametrize("status", [0x0122, 0x0211, 0xA702, 0xC000])
def test_c_move_is_used_where_c_get_is_not_carried_out(status: int, tmp_path: Path, port: int) -> None:
    def refuses(request: Request) -> int:
        return status if request.kind == GET else 0

    with archive(study(), refuses=refuses, ports={AET: port}) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.DELIVERED
        assert any("C-MOVE" in note and f"{status:04X}" in note for note in receipt.notes)
        assert_agrees(receipt, tmp_path / "in", peer)


OTHERS = {
    "CT": "1.2.840.10008.5.1.4.1.1.2", "RTSTRUCT": "1.2.840.10008.5.1.4.1.1.481.3",
    "DOC": "1.2.840.10008.5.1.4.1.1.104.1", "OT": "1.3.12.2.1107.5.9.1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("leaves_out", "knows_us"),
    [((), True), (("Modality",), True), ((*UNCOUNTED,), True), ((), False)],
    ids=["as usual", "modality", "counts", "no move"],
)
def test_a_peer_that_names_no_sop_classes_gives_those_of_all_kinds(
    tmp_path: Path, port: int, leaves_out: tuple[str, ...], knows_us: bool
) -> None:
    """By C-GET as far as the modality says what to ask for, the rest by C-MOVE where that is possible."""
    uid = studies.uid()
    files = [
        studies.encoded(studies.dataset(study=uid, series=studies.uid(), Modality=modality, SOPClassUID=sop_class))
        for modality, sop_class in OTHERS.items()
    ]

    def script(request: Request, found: list[Instance]) -> Steps:
        proposal = peer.associations[request.association - 1].proposal
        assert proposal is not None
        offered = {(one.abstract_syntax, one.offered[0]) for one in proposal.contexts}
        there = [one for one in found if (one.ds.SOPClassUID, one.syntax) in offered]
        failed = len(found) - len(there)
        return [*map(Send, there), Last((0xB000 if there else 0xA702) if failed else 0, len(there), failed, 0)]

    unknown: Steps = [Last(0)]  # as some answer to a destination that they don't know
    moves = None if knows_us else lambda request, found: unknown
    with archive(
        files, on_get=script, on_move=moves, leaves_out=frozenset((*leaves_out, "SOPClassUID")), ports={AET: port}
    ) as peer:
        receipt = pull(peer, tmp_path / "in", idle_timeout_s=1)
        assert_agrees(receipt, tmp_path / "in", peer)
        here = {one.ds.Modality for one in peer.instances if one.uid in datasets(tmp_path / "in")}
        assert here == (OTHERS.keys() if knows_us else OTHERS.keys() - {"OT"})
        assert receipt.state is (State.DELIVERED if knows_us else State.PARTIAL)
        assert knows_us or any(f"is {AET} registered there" in note for note in receipt.notes)


JPEG_2000, RETIRED = "1.2.840.10008.1.2.4.91", "1.2.840.10008.1.2.4.53"
PRIVATE = "1.3.12.2.1107.5.9.1"


def mixed(rest: Callable[[pydicom.Dataset], None], modality: str = "CT", more: int = 2) -> list[bytes]:
    """A series of CT images, and some that `rest` makes into something else."""
    uid, series, files = studies.uid(), studies.uid(), []
    for number in range(2 + more):
        name = "CT_small.dcm" if number < 2 else "JPEG2000.dcm"
        ds = studies.dataset(name, study=uid, series=series, Modality=modality, InstanceNumber=number)
        if number >= 2:
            ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = OTHERS["CT"]
            rest(ds)
        files.append(studies.encoded(ds))
    return files


def is_jpeg_2000(ds: pydicom.Dataset) -> None:
    """Leave it as it is."""


def is_of_a_retired_syntax(ds: pydicom.Dataset) -> None:
    ds.file_meta.TransferSyntaxUID = pydicom.uid.UID(RETIRED)


def is_private(ds: pydicom.Dataset) -> None:
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = PRIVATE


def no_jpeg_2000(context: Context) -> str | int:
    return REFUSED_SYNTAXES if context.offered[0] == JPEG_2000 else context.offered[0]


def honest(peer: Callable[[], Archive]) -> Callable[[Request, list[Instance]], Steps]:
    """Send what there are contexts for, and count the rest as failed."""

    def script(request: Request, found: list[Instance]) -> Steps:
        association = peer().associations[request.association - 1]
        assert association.proposal is not None
        offered = {(one.abstract_syntax, one.offered[0]) for one in association.proposal.contexts}
        taken = [one for one in found if (str(one.ds.SOPClassUID), one.syntax) in offered and one.syntax != JPEG_2000]
        failed = len(found) - len(taken)
        status = 0 if not failed else 0xB000 if taken else 0xA702
        return [*map(Send, taken), Last(status, len(taken), failed, 0)]

    return script


@pytest.mark.parametrize("counts", ["honest", "all completed"])
@pytest.mark.parametrize(
    ("rest", "leaves_out"),
    [
        (is_jpeg_2000, ("AvailableTransferSyntaxUID",)),
        (is_jpeg_2000, ()),
        (is_of_a_retired_syntax, ()),
        (is_private, ("SOPClassUID",)),
    ],
    ids=["refused syntax", "named one", "unknown syntax", "unnamed class"],
)
def test_what_c_get_has_no_context_for_comes_by_c_move(
    rest: Callable[[pydicom.Dataset], None], leaves_out: tuple[str, ...], counts: str, tmp_path: Path, port: int
) -> None:
    with ExitStack() as ends:
        script = honest(lambda: peer) if counts == "honest" else None
        peer = ends.enter_context(
            archive(
                mixed(rest), accept=no_jpeg_2000, on_get=script, leaves_out=frozenset(leaves_out), ports={AET: port}
            )
        )
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.DELIVERED, receipt.notes
        assert_agrees(receipt, tmp_path / "in", peer)
        assert any("retrieved by C-MOVE" in note and "does not bring all of it" in note for note in receipt.notes), (
            receipt.notes
        )


@pytest.mark.parametrize("how", ["no C-MOVE", "unknown", "success and nothing", "no port"])
def test_what_does_not_come_by_c_move_either_leaves_what_came(
    how: str, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One series is tried, and no other: each might take its time."""
    files = [*mixed(is_jpeg_2000, more=3), *mixed(is_jpeg_2000, more=3)]
    settings: dict[str, Any] = {
        "no C-MOVE": {
            "accept": lambda context: REFUSED_CLASS if context.abstract_syntax in MOVES else no_jpeg_2000(context)
        },
        "unknown": {"refuses": lambda request: 0xA801 if request.kind == MOVE else 0},
        "success and nothing": {"on_move": lambda request, found: [Last(0)]},
        "no port": {},
    }[how]
    if how == "no port":
        monkeypatch.setenv("TALARIA_SCP_PORT", "0")
    with archive(files, **{"accept": no_jpeg_2000, "on_get": honest(lambda: peer)} | settings) as peer:
        receipt = pull(peer, tmp_path / "in", idle_timeout_s=1, max_dispatches=1)
        assert receipt.state is State.PARTIAL and receipt.counts[Kind.DELIVERED] == 4
        assert_agrees(receipt, tmp_path / "in", peer)
        [note] = [note for note in receipt.notes if "; nor does C-MOVE: " in note]
        words = {
            "no C-MOVE": "the peer does not accept C-MOVE", "unknown": f"doesn't know the move destination {AET}",
            "success and nothing": "and nothing came within", "no port": "set scp_port",
        }  # fmt: skip
        assert words[how] in note
        assert len(peer.asked(MOVE)) == (how in ("unknown", "success and nothing"))


def test_what_a_node_has_lost_costs_no_wait_for_it_by_c_move(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that it sends nothing, and needs not be waited for: 3 s for each instance, else."""
    monkeypatch.setattr(pull_move, "LATE_S", 600.0)
    lost = set[str]()

    def script(request: Request, found: list[Instance]) -> Steps:
        lost.update(one.uid for one in peer.instances[4:])
        there = [one for one in found if one.uid not in lost]
        failed = len(found) - len(there)
        return [*map(Send, there), Last(0xB000 if failed else 0, len(there), failed, 0)]

    with archive(study(12, 1), on_get=script, on_move=script, ports={AET: port}) as peer:
        receipt = pull(peer, tmp_path / "in", idle_timeout_s=600)
        assert receipt.state is State.PARTIAL and receipt.counts[Kind.DELIVERED] == 4
        assert_agrees(receipt, tmp_path / "in", peer)
        assert len(peer.asked(MOVE)) > 8


def test_damaged_instances_are_not_asked_for_by_c_move(tmp_path: Path, port: int) -> None:
    def script(request: Request, found: list[Instance]) -> Steps:
        return [*(Send(one, data=one.data[:40]) for one in found), Last(0xB000, 0, len(found), 0)]

    with archive(study(2, 1), on_get=script, ports={AET: port}) as peer:
        pull(peer, tmp_path / "in")
        assert not peer.asked(MOVE)


def test_no_syntax_is_lost_of_more_classes_than_one_association_has_room_for(tmp_path: Path) -> None:
    """Thirty-one syntaxes of each class; four classes fill an association."""
    uid, series, files = studies.uid(), studies.uid(), []
    for number in range(9):
        ds = studies.dataset("JPEG2000.dcm", study=uid, series=series, Modality="MR")
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = f"{PRIVATE}.{number}"
        ds.file_meta.TransferSyntaxUID = pydicom.uid.UID("1.2.840.10008.1.2.4.93")
        files.append(studies.encoded(ds))
    with archive(files, accept=only(MOVES)) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.DELIVERED, receipt.notes
        assert_agrees(receipt, tmp_path / "in", peer)


def test_a_later_series_that_c_get_is_refused_for_comes_by_c_move(tmp_path: Path, port: int) -> None:
    """The series before it, on the same association, had nothing to give: that one is not begun again in its place."""
    files, first = study(4, 2), ""

    def refuses(request: Request) -> int:
        nonlocal first
        if request.kind != GET:
            return 0
        series = str(request.keys.SeriesInstanceUID)
        first = first or series
        return 0 if series == first else 0xA702

    def gives_nothing(request: Request, instances: list[Instance]) -> Steps:
        return [Last(0, 0, 0, 0)]

    def moves(request: Request, instances: list[Instance]) -> Steps:
        return [Last(0xB000, 0, 2, 0)] if request.keys.SeriesInstanceUID == first else sends(instances)

    with archive(files, refuses=refuses, on_get=gives_nothing, on_move=moves, ports={AET: port}) as peer:
        receipt = pull(peer, tmp_path / "in", max_dispatches=1)
        assert receipt.counts[Kind.DELIVERED] == 2
        assert_agrees(receipt, tmp_path / "in", peer)


@pytest.mark.parametrize("status", [0xFE00, 0xA702, 0xC000])
@pytest.mark.parametrize("place", [0, 1])
def test_one_series_that_is_refused_takes_no_other_to_c_move(
    status: int, place: int, tmp_path: Path, port: int
) -> None:
    """By C-MOVE, which this peer does not do either, nothing would come."""
    files = study(6, 3)
    bad = sorted({str(Instance.of(file).ds.SeriesInstanceUID) for file in files})[place]

    def refuses(request: Request) -> int:
        return status if request.kind == GET and str(request.keys.SeriesInstanceUID) == bad else 0

    with archive(files, accept=only(MOVES), refuses=refuses) as peer:
        receipt = pull(peer, tmp_path / "in", max_dispatches=1)
        assert receipt.state is State.PARTIAL and receipt.counts[Kind.DELIVERED] == 4
        assert_agrees(receipt, tmp_path / "in", peer)
        assert any(bad in note and f"{status:04X}" in note for note in receipt.notes)


def test_a_retrieval_that_a_peer_cancels_midway_is_asked_for_again(tmp_path: Path) -> None:
    def script(request: Request, found: list[Instance]) -> Steps:
        return half_then(Last(0xFE00, 1, 0, 0))(request, found) if request.number == 1 else sends(found)

    with archive(study(), on_get=script) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.DELIVERED
        assert_agrees(receipt, tmp_path / "in", peer)


def test_instances_are_listed_only_where_what_came_is_not_what_was_announced(tmp_path: Path) -> None:
    with archive(study()) as peer:
        assert pull(peer, tmp_path / "in").state is State.DELIVERED
        assert not [request for request in peer.asked(FIND) if request.level == "IMAGE"]
        next((tmp_path / "in").iterdir()).unlink()
        assert pull(peer, tmp_path / "in").counts[Kind.ALREADY] == 5
        assert [request.level for request in peer.asked(FIND)].count("IMAGE") == 1
        assert peer.asked(GET)[-1].level == "IMAGE"  # of the series that had begun, what is missing


def test_a_series_far_away_comes_over_several_associations(tmp_path: Path) -> None:
    with archive(study(60, 1)) as peer, relay(peer.port, delay_s=0.01) as link:
        target = dicom_target(
            link.port, aet_target=peer.aet, direction="query", concurrency=3, max_dispatches=3, idle_timeout_s=10
        )
        receipt = retrieve(target, Query(AccessionNumber=(studies.ACCESSION,)), tmp_path / "in", PushReport())
        assert receipt.state is State.DELIVERED
        assert_agrees(receipt, tmp_path / "in", peer)
        assert len({request.association for request in peer.asked(GET)}) == 2  # 25 instances at least are worth one


def test_a_peer_without_c_get_and_c_move_says_so(tmp_path: Path, port: int) -> None:
    refused = (*GETS, *MOVES)
    with (
        archive(study(), accept=only(refused)) as peer,
        pytest.raises(Misconfigured, match="nor does it accept C-MOVE"),
    ):
        pull(peer, tmp_path / "in")


def test_strangers_who_hold_connections_keep_no_source_out(tmp_path: Path, port: int) -> None:
    """Who says nothing, or one byte now and then, has a few seconds and a few connections."""
    held: list[socket.socket] = []

    def script(request: Request, found: list[Instance]) -> Steps:
        for _ in range(scp.MOST_NEW_OF_ONE + 8):
            held.append(socket.create_connection(("127.0.0.1", port), 5, ("127.0.0.2", 0)))
        return sends(found)

    with archive(study(4, 1), accept=only(GETS), on_move=script, ports={AET: port}) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.DELIVERED
        assert_agrees(receipt, tmp_path / "in", peer)
    ended = 0
    for one in held:
        one.settimeout(30)
        ended += one.recv(1) == b""  # those beyond the limit at once, the others when nobody listens any more
        one.close()
    assert ended == len(held)


def test_half_a_request_has_no_longer_than_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scp, "HANDSHAKE_S", 0.5)
    one = scp.StorageScp("127.0.0.1", 0, AET, MoveDesk())
    try:
        with socket.create_connection(("127.0.0.1", one.port), 5) as sock:
            begun = time.monotonic()
            with suppress(OSError):
                for byte in b"\1\0\0\0\1\0" + bytes(256):
                    sock.sendall(bytes((byte,)))
                    if select.select([sock], [], [], 0.1)[0]:
                        break
            assert time.monotonic() - begun < as_loaded(5)
    finally:
        one.close()


def test_an_unknown_move_destination_names_what_to_register(tmp_path: Path, port: int) -> None:
    def refuses(request: Request) -> int:
        return 0xA801 if request.kind == MOVE else 0

    with archive(study(), accept=only(GETS), refuses=refuses) as peer, pytest.raises(Misconfigured, match=AET):
        pull(peer, tmp_path / "in")


def test_c_move_takes_only_what_was_asked_for(tmp_path: Path, port: int) -> None:
    files, stranger = study(2, 1), Instance.of(study(1, 1)[0])

    def script(request: Request, found: list[Instance]) -> Steps:
        return [Send(stranger), Send(found[0], originator="SOMEBODY"), *(Send(one) for one in found), Last(0, 4, 0, 0)]

    with archive(files, accept=only(GETS), on_move=script, ports={AET: port}) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.DELIVERED
        assert_agrees(receipt, tmp_path / "in", peer)
        assert peer.store_answers[:2] == [0x0124, 0x0124] and peer.store_answers[2:] == [0, 0]


def test_c_move_takes_what_does_not_say_whose_move_it_is(tmp_path: Path, port: int) -> None:
    def script(request: Request, found: list[Instance]) -> Steps:
        return [*(Send(one, originator="") for one in found), Last(0, len(found), 0, 0)]

    with archive(study(), accept=only(GETS), on_move=script, ports={AET: port}) as peer:
        receipt = pull(peer, tmp_path / "in")
        assert receipt.state is State.DELIVERED
        assert_agrees(receipt, tmp_path / "in", peer)


def test_a_move_that_is_answered_before_anything_is_sent(tmp_path: Path, port: int) -> None:
    with archive(study(4, 1), accept=only(GETS), ports={AET: port}) as peer:
        late: list[threading.Thread] = []

        def script(request: Request, found: list[Instance]) -> Steps:
            thread = threading.Thread(target=send_to, args=(peer, request, found), daemon=True)
            late.append(thread)
            thread.start()
            return [Last(0)]

        peer.on_move = script
        receipt = pull(peer, tmp_path / "in")
        for thread in late:
            thread.join()
        assert receipt.state is State.DELIVERED
        assert_agrees(receipt, tmp_path / "in", peer)


def test_a_move_that_sends_nowhere_says_what_to_look_at(tmp_path: Path, port: int) -> None:
    nothing: Callable[[Request, list[Instance]], Steps] = lambda request, found: [Last(0)]  # noqa: E731
    peers = archive(study(), accept=only(GETS), on_move=nothing)
    with peers as peer, pytest.raises(TimedOut, match=f"{AET} registered"):
        pull(peer, tmp_path / "in", idle_timeout_s=1)


def test_nobody_else_gets_an_association(tmp_path: Path, port: int) -> None:
    refused: list[tuple[int, ...]] = []

    def script(request: Request, found: list[Instance]) -> Steps:
        refused.append(refusal(port, called="WRONG"))
        return sends(found)

    with archive(study(2, 1), accept=only(GETS), on_move=script, ports={AET: port}) as peer:
        assert pull(peer, tmp_path / "in").state is State.DELIVERED
    assert refused == [(1, 1, 7)]
    with socket.socket() as sock:  # nobody listens when nothing is retrieved
        assert sock.connect_ex(("127.0.0.1", port)) != 0


def test_a_peer_that_takes_one_association_only(tmp_path: Path) -> None:
    from tests.servers.steps import Reject

    with archive(study(12, 6)) as peer:
        peer.on_associate = lambda proposal: Reject(2, 3, 2) if peer.open > 1 else None
        for _ in range(20):
            with suppress(Busy):  # the peer may count an association that has just ended, as any attempt may meet it
                receipt = pull(peer, tmp_path / "in", concurrency=4, max_dispatches=4)
                break
        assert receipt.state is State.DELIVERED
        assert_agrees(receipt, tmp_path / "in", peer)


def test_no_more_associations_than_dispatches_are_allowed(tmp_path: Path) -> None:
    with archive(study(12, 6)) as peer:
        assert pull(peer, tmp_path / "in", concurrency=8, max_dispatches=2).state is State.DELIVERED
        assert peer.most_open <= 2


def test_cancelling_ends_the_association_soon(tmp_path: Path) -> None:
    cancelled = threading.Event()

    def script(request: Request, found: list[Instance]) -> Steps:
        cancelled.set()
        return [Send(found[0]), Silence()]

    with archive(study(), on_get=script) as peer:
        begun = time.monotonic()
        with pytest.raises(Cancelled):
            pull(peer, tmp_path / "in", PushReport(cancelled=cancelled), idle_timeout_s=60)
        assert time.monotonic() - begun < as_loaded(5) and peer.wait_closed()


def test_a_pause_ends_after_the_running_series_and_the_rest_is_fetched_later(tmp_path: Path) -> None:
    pausing = threading.Event()

    def script(request: Request, found: list[Instance]) -> Steps:
        pausing.set()
        return sends(found)

    with archive(study(9, 3), on_get=script) as peer:
        pull(peer, tmp_path / "in", PushReport(pausing=pausing), concurrency=1)
        assert len(datasets(tmp_path / "in")) == 3 and len(peer.asked(GET)) == 1
        receipt = pull(peer, tmp_path / "in", concurrency=1)
        assert receipt.counts[Kind.ALREADY] == 3 and receipt.counts[Kind.DELIVERED] == 6
        assert len(peer.asked(GET)) == 3


def test_what_is_here_from_before_is_not_whole_because_a_pause_keeps_the_rest_from_being_asked_for(
    tmp_path: Path,
) -> None:
    def refuses(request: Request) -> int:
        return 0xA900 if request.level == "IMAGE" and request.kind == FIND else 0

    with archive(study(6, 2), leaves_out=UNCOUNTED, refuses=refuses) as peer:
        whole = pull(peer, tmp_path / "whole")
        assert whole.state is State.DELIVERED
        (tmp_path / "in").mkdir()
        for one in peer.instances[:2]:  # one of each series
            shutil.copy(tmp_path / "whole" / f"{one.uid}.dcm", tmp_path / "in")
        pausing = threading.Event()
        pausing.set()
        asked = len(peer.asked(GET))
        receipt = pull(peer, tmp_path / "in", PushReport(pausing=pausing))
        assert len(peer.asked(GET)) == asked and receipt.counts[Kind.ALREADY] == 2
        assert receipt.state is State.PARTIAL and receipt.unsent
        assert any("it was not asked for any more" in note for note in receipt.notes)
        assert pull(peer, tmp_path / "in").state is State.DELIVERED


@pytest.mark.parametrize("way", ["get", "move", "move, an association for each"])
def test_bandwidth_is_limited_and_bytes_are_counted(way: str, tmp_path: Path, port: int) -> None:
    """Also of what a peer sends on associations of its own; what waits for its turn there is not silence."""
    moved: list[int] = []

    def script(request: Request, found: list[Instance]) -> Steps:
        if way == "move":
            return sends(found)
        for one in found:  # all that is sent of one is there before anybody knows whose it is
            send_to(peer, request, [one])
        return [Last(0, len(found), 0, 0)]

    refused = () if way == "get" else GETS
    with archive(study(2, 1), accept=only(refused), on_move=script, ports={AET: port}) as peer:
        begun = time.monotonic()
        report = PushReport(moved=moved.append)
        receipt = pull(peer, tmp_path / "in", report, bandwidth_limit=25_000, idle_timeout_s=1)
        assert receipt.state is State.DELIVERED
        assert time.monotonic() - begun > 2.5  # 80 kB
        assert sum(moved) > sum(len(one.data) for one in peer.instances)


def test_nothing_that_matches_is_an_error(tmp_path: Path) -> None:
    with archive([]) as peer, pytest.raises(NotFound):
        pull(peer, tmp_path / "in")


@pytest.mark.parametrize(
    ("refused", "words"),
    [((), "C-GET is granted, and C-MOVE"), (MOVES, "C-MOVE is not"), (GETS, "must be registered"), (None, "neither")],
)
def test_a_check_of_a_source_shows_what_it_answers_and_grants(refused: Any, words: str, port: int) -> None:
    gone = (*GETS, *MOVES) if refused is None else refused
    with archive(study(1, 1), accept=only(gone)) as peer:
        health = check(dicom_target(peer.port, aet_target=peer.aet, direction="query"))
        probes = {probe.name: probe for probe in health.probes}
        assert probes["find"].result == "ok" and words in probes["retrieve"].detail
        assert health.ok == (refused is not None)
        assert not peer.asked(MOVE) and {str(one.keys.StudyInstanceUID) for one in peer.asked(GET)} <= {BOGUS}
    with archive([], refuses=lambda request: 0xC000) as peer:
        health = check(dicom_target(peer.port, aet_target=peer.aet, direction="both"))
        assert {probe.name: probe.result for probe in health.probes}["find"] == "failed" and not health.ok
        assert "find" not in [probe.name for probe in check(dicom_target(peer.port, aet_target=peer.aet)).probes]


@pytest.mark.parametrize("answer", [Abort(), Silence(), Last(0x0124), Last(0x0122, 0, 0, 0)])
def test_a_check_shows_that_c_get_is_accepted_and_not_done(answer: Any, port: int) -> None:
    with archive(study(1, 1), on_get=lambda request, found: [answer]) as peer:
        target = dicom_target(peer.port, aet_target=peer.aet, direction="query", idle_timeout_s=1)
        health = check(target)
        assert health.ok and health.probes[-1].name == "retrieve"
        assert "C-MOVE is granted, C-GET is not" in health.probes[-1].detail
    with archive(study(1, 1), on_get=lambda request, found: [answer], accept=only(MOVES)) as peer:
        health = check(dicom_target(peer.port, aet_target=peer.aet, direction="query", idle_timeout_s=1))
        assert not health.ok and "neither C-GET nor C-MOVE" in health.probes[-1].detail


def test_a_check_takes_nothing_of_a_node_that_sends_what_was_not_asked_for() -> None:
    with archive(study(3, 1), on_get=lambda request, found: sends(peer.instances)) as peer:
        health = check(dicom_target(peer.port, aet_target=peer.aet, direction="query"))
        assert "C-GET is granted" in health.probes[-1].detail and peer.wait_closed()
        assert not peer.store_answers


def test_what_types_say_of_queries_is_what_their_drivers_can(capsys: pytest.CaptureFixture[str]) -> None:
    for name, cls in TYPES.items():
        driver = DRIVERS[name]
        assert cls.can_query == bool(driver.find and driver.retrieve) == bool(driver.find or driver.retrieve), name
        words = f"{cls.__doc__}".lower()
        assert cls.can_query == ("quer" in words or "qido" in words), name
    types(as_json=True)
    shown = json.loads(capsys.readouterr().out)["types"]
    for name, cls in TYPES.items():
        assert shown[name]["query"] == shown[name]["pull"] == cls.can_query, name


@pytest.mark.parametrize("way", ["get", "move"])
@pytest.mark.parametrize("key", ["PatientID", "PatientName", "AccessionNumber"])
def test_a_patient_s_id_is_asked_for_in_the_character_set_that_the_peer_reads(
    way: str, key: str, tmp_path: Path, port: int
) -> None:
    values = {"PatientID": "Müller-7", "PatientName": studies.PATIENT_NAME, "AccessionNumber": (studies.ACCESSION,)}
    with archive(**in_latin_1(GETS if way == "move" else ()), ports={AET: port}) as peer:
        target = dicom_target(peer.port, aet_target=peer.aet, direction="query", idle_timeout_s=3)
        receipt = retrieve(target, Query(**{key: values[key]}), tmp_path / "in", PushReport())  # type: ignore[arg-type]
        assert receipt.state is State.DELIVERED, receipt.notes
        assert {one.charset for one in peer.asked(GET if way == "get" else MOVE)} == {"ISO_IR 100"}
        assert "ISO_IR 100" in {one.charset for one in peer.asked(FIND) if one.level == "SERIES"}


@pytest.mark.mounts
@pytest.mark.parametrize("way", ["get", "move"])
def test_a_full_disk_ends_the_association_and_leaves_nothing_half(
    way: str, disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    number = free_port()
    monkeypatch.setenv("TALARIA_SCP_PORT", str(number))
    monkeypatch.setenv("TALARIA_SCP_AET", AET)
    full = disk("size=200k")
    refused = GETS if way == "move" else ()
    with archive(study(12, 1), accept=only(refused), ports={AET: number}) as peer:
        with pytest.raises(Busy, match="can't write"):
            pull(peer, full, idle_timeout_s=5)
        assert peer.wait_closed(20)
        assert 0xA700 in peer.store_answers
        assert len(peer.store_answers) <= 7 or way == "move"
        assert 0 < len(datasets(full)) < 12


def test_real_servers_by_both_ways(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    files = study(10, 3)
    server = shared_orthanc()
    server.know(AET, port)
    with dcmqrscp(tmp_path / "qr", peers={AET: port}) as other:
        for name, at, aet in (("orthanc", server.dicom_port, server.aet), ("dcmqrscp", other.port, other.aet)):
            store(tmp_path / name, files, at, aet)
            for way in ("get", "move"):
                folder = tmp_path / name / way
                target: DicomTarget = dicom_target(at, aet_target=aet, direction="query")
                with monkeypatch.context() as patch:
                    if way == "move":  # both grant C-GET
                        patch.setattr(Retriever, "stores", property(lambda one: False))
                    receipt = retrieve(target, Query(AccessionNumber=(studies.ACCESSION,)), folder, PushReport())
                assert receipt.state is State.DELIVERED, receipt
                assert ("C-MOVE" in receipt.notes[0]) == (way == "move")
                held = server.files() if name == "orthanc" else other.files()
                assert datasets(folder) == {uid: Instance.of(data).data for uid, data in held.items()}
                assert len(held) == 10
            assert [match.instances for match in find(target, Query(StudyDate=studies.STUDY_DATE))] in ([10], [None])


def test_c_move_over_tls_comes_over_tls(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = certificates()
    server = shared_orthanc(made.server, made.ca)
    here = {"AET": AET, "Host": "127.0.0.1", "Port": port, "UseDicomTls": True}
    server.request("PUT", f"/modalities/{AET.lower()}", json.dumps(here).encode())
    for data in study(4, 2):
        server.request("POST", "/instances", data)
    monkeypatch.setattr(Retriever, "stores", property(lambda one: False))  # it grants C-GET
    target = tls_target(server.dicom_port, aet_target=server.aet, direction="query")
    query = Query(AccessionNumber=(studies.ACCESSION,))
    driver = DRIVERS["dicom-tls"]
    assert driver.retrieve is not None
    receipt = driver.retrieve(target, query, tmp_path / "in", PushReport())
    assert receipt.state is State.DELIVERED and "C-MOVE" in receipt.notes[0], receipt
    assert datasets(tmp_path / "in").keys() == server.uids()
    # It is to come over TLS, and nothing else: not in clear, if the peer's entry for us says so.
    server.request("PUT", f"/modalities/{AET.lower()}", json.dumps(here | {"UseDicomTls": False}).encode())
    receipt = driver.retrieve(target, query, tmp_path / "clear", PushReport())
    assert receipt.state is not State.DELIVERED and not datasets(tmp_path / "clear"), receipt
    assert "associations without TLS from 127.0.0.1 were refused" in receipt.notes[-1]


def test_c_move_over_tls_needs_a_certificate_of_ours(tmp_path: Path, port: int) -> None:
    """The peer opens the connections that it sends on."""
    context = certificates().accepting(client_certificate=False)
    with archive(study(1, 1), accept=only(GETS), tls=context, ports={AET: port}) as peer:
        settings = {"tls_cert": "", "tls_key": "", "tls_key_password": "", "direction": "query"}
        target = tls_target(peer.port, aet_target=peer.aet, **settings)
        with pytest.raises(Misconfigured, match="set tls_cert and tls_key"):
            retrieve(target, Query(AccessionNumber=(studies.ACCESSION,)), tmp_path / "in", PushReport())
        health = check_target(target, move=True)
        probes = {probe.name: probe for probe in health.probes}
        assert not health.ok and "set tls_cert and tls_key" in probes["retrieve"].detail
        assert probes["move"].result == "skipped" and not peer.asked(MOVE)


def test_each_source_s_own_certificate_answers_it_on_the_port_that_all_share(tmp_path: Path) -> None:
    """By its address, which is all that is known before the handshake; and what fails in that is told."""
    desk, authorities = MoveDesk(), [Authority(tmp_path / name) for name in ("a", "b")]
    sides = [
        Tls(ca=str(one.ca), cert=str(leaf.cert), key=str(leaf.key))
        for one in authorities
        for leaf in [one.leaf("both")]
    ]
    one = scp.StorageScp("127.0.0.1", 0, AET, desk, security=desk)

    def shake(address: str, side: Tls) -> None:
        context = side.client()
        context.maximum_version = ssl.TLSVersion.TLSv1_2  # with 1.3 we don't wait for the other side's verdict
        with socket.create_connection(("127.0.0.1", one.port), 5, (address, 0)) as sock:
            context.wrap_socket(sock, server_hostname="127.0.0.1").close()

    with ExitStack() as stack:
        stack.callback(one.close)
        strangers = [Strangers("pacs"), Strangers("other")]
        for address, side, refused in zip(("127.0.0.1", "127.0.0.2"), sides, strangers, strict=True):
            expected = Expected(frozenset(), 1, frozenset((address,)), None, Depot(tmp_path), refused, side.server())
            stack.enter_context(desk.expecting(expected))
        for address, side in zip(("127.0.0.1", "127.0.0.2"), sides, strict=True):
            shake(address, side)
        with pytest.raises(ssl.SSLError):
            shake("127.0.0.1", sides[1])
        with pytest.raises(OSError):
            shake("127.0.0.3", sides[0])
        until(lambda: strangers[0].broken)
        assert "; the TLS handshake with 127.0.0.1 failed: tlsv1 alert unknown ca" in str(strangers[0])
        assert "127.0.0.3" in str(strangers[1]) and not strangers[1].broken
