"""Accession numbers over several associations at once: never more than may be open, and nothing lost if one fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from blocks.base import Direction
from blocks.dicom import DicomTarget
from imaging.query import Query
from protocols.dimse.query import finder
from protocols.dimse.search import PeerSearch
from protocols.dimse.transport import Peer
from talaria.testing import studies
from talaria.testing.process import until
from tasks.dicom import find
from tasks.retrieve.fetch import Fetcher
from tasks.retrieve.job import Job
from tests.servers.qr import FIND, Archive, Request, archive
from tests.servers.scp import Association
from tests.servers.steps import Abort, Reject, Reset, Script, Silence
from tests.servers.wire import Proposal
from transfer.errors import Cancelled, Denied
from transfer.granted import granting

THERE = [f"{number}X" for number in range(4)]
ABSENT = [f"N{number}" for number in range(40)]
WANTED = (*THERE, *ABSENT)


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return [studies.encoded(studies.dataset(AccessionNumber=number, PatientID=number)) for number in THERE]


def found(peer: Archive, associations: int, check: Callable[[], None] = lambda: None) -> list[str]:
    with finder(Peer("127.0.0.1", peer.port, idle_timeout_s=60), check) as asked:
        search = PeerSearch(asked, associations)
        return sorted(str(one.attributes["AccessionNumber"]) for one in search.find(Query(AccessionNumber=WANTED)))


def asked_alone(peer: Archive) -> set[str]:
    return {str(request.keys.AccessionNumber) for request in peer.asked(FIND)} & {*ABSENT}


def waits_for(peer: Archive, count: int) -> None:
    """Let the peer answer numbers that it doesn't have when so many associations have asked for one."""

    def refuses(request: Request) -> int:
        if str(request.keys.AccessionNumber) in ABSENT:
            until(
                lambda: (
                    len({one.association for one in peer.asked(FIND) if one.keys.AccessionNumber in ABSENT}) >= count
                )
            )
        return 0

    peer.refuses = refuses


@pytest.mark.parametrize("most", [1, 3])
def test_numbers_are_asked_for_over_as_many_associations_as_may_be_open(files: list[bytes], most: int) -> None:
    with archive(files) as peer:
        waits_for(peer, most)
        assert found(peer, most) == THERE
        assert peer.most_open == most
        assert asked_alone(peer) == {*ABSENT}
        assert peer.wait_closed()
        assert {one.ended for one in peer.associations} == {"released"}


def test_few_numbers_are_not_worth_another_association(files: list[bytes]) -> None:
    with archive(files) as peer, finder(Peer("127.0.0.1", peer.port)) as asked:
        query = Query(AccessionNumber=(*THERE, *ABSENT[:5]))
        assert len(list(PeerSearch(asked, 4).find(query))) == len(THERE)
        assert len(peer.associations) == 1


@pytest.mark.parametrize("answer", [Reject(2, 3, 2), Reject(1, 1, 1), Silence(), Abort(), Reset()], ids=str)
def test_a_peer_that_gives_one_association_is_asked_over_that_alone(files: list[bytes], answer: Script) -> None:
    def on_associate(proposal: Proposal) -> Script:
        return answer if proposal.association > 1 else None

    def refuses(request: Request) -> int:
        if str(request.keys.AccessionNumber) in ABSENT:
            until(lambda: len(peer.associations) > 1)
        return 0

    with archive(files, on_associate=on_associate, refuses=refuses) as peer:
        assert found(peer, 2) == THERE
        assert asked_alone(peer) == {*ABSENT}
        assert len({request.association for request in peer.asked(FIND)}) == 1
        assert len([one for one in peer.associations if one.proposal]) == 2  # it is not tried again


def test_what_an_association_was_asked_that_breaks_is_asked_again(files: list[bytes]) -> None:
    def on_data(association: Association, count: int) -> Script:
        second = count and any(one.association == association.number for one in peer.asked(FIND))
        return Reset() if second and association.number > 1 else None

    def refuses(request: Request) -> int:
        if str(request.keys.AccessionNumber) in ABSENT and request.association == 1:
            until(lambda: any(one.ended for one in peer.associations[1:]))
        return 0

    with archive(files, on_data=on_data, refuses=refuses) as peer:
        assert found(peer, 2) == THERE
        assert asked_alone(peer) == {*ABSENT}
        assert len([one for one in peer.asked(FIND) if one.association > 1]) == 1


def test_what_a_peer_answers_to_one_of_the_numbers_ends_the_search_as_ever(files: list[bytes]) -> None:
    with archive(files) as peer:
        waits_for(peer, 2)
        waiting = peer.refuses
        peer.refuses = lambda request: waiting(request) or (0x0124 if request.keys.AccessionNumber == "N30" else 0)
        with pytest.raises(Denied, match="0124"):
            found(peer, 2)
        assert peer.wait_closed()


def test_a_search_over_several_associations_is_cancelled(files: list[bytes]) -> None:
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Cancelled("stopped")

    def refuses(request: Request) -> int:
        if str(request.keys.AccessionNumber) in ABSENT:
            until(lambda: len({one.association for one in peer.asked(FIND) if one.keys.AccessionNumber in ABSENT}) == 2)
            stop.set()
            peer.stopped.wait(60)
        return 0

    with archive(files, refuses=refuses) as peer:
        with pytest.raises(Cancelled):
            found(peer, 2, check)
        assert not [one for one in threading.enumerate() if one.name == "find-beside"]


def source(peer: Archive, concurrency: int = 4, max_dispatches: int = 2) -> DicomTarget:
    return DicomTarget(
        host="127.0.0.1", port=peer.port, aet_target=peer.aet, direction=Direction.QUERY, concurrency=concurrency,
        max_dispatches=max_dispatches,
    )  # fmt: skip


def test_a_search_has_one_association_unless_its_caller_holds_more_slots(files: list[bytes]) -> None:
    with archive(files) as peer:
        assert len(list(find(source(peer), Query(AccessionNumber=WANTED)))) == len(THERE)
        assert len(peer.associations) == 1
        waits_for(peer, 3)
        with granting(3):
            assert len(list(find(source(peer), Query(AccessionNumber=WANTED)))) == len(THERE)
        assert peer.most_open == 3


@pytest.mark.parametrize(("concurrency", "max_dispatches", "open_"), [(4, 2, 2), (1, 2, 1), (3, 8, 3)])
def test_a_retrieval_looks_for_its_numbers_over_as_many_associations_as_it_holds_slots(
    files: list[bytes], tmp_path: Path, concurrency: int, max_dispatches: int, open_: int
) -> None:
    with archive(files) as peer:
        waits_for(peer, open_)
        job = Job(tmp_path, pending=list(WANTED))
        events = threading.Event(), threading.Event()
        Fetcher(source(peer, concurrency, max_dispatches), Query(), job, *events).find_pending()
        assert peer.most_open == open_
        assert job.missing == ABSENT and len(job.studies) == len(THERE)
