"""Presentation contexts that peers take or refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import as_loaded
from tests.servers.scp import scp
from tests.servers.wire import Proposal
from tests.targets.dicom_peers.peers import CT, IMPLICIT, SLACK_S, target_of, uids
from transfer.plan import scan
from transfer.receipt import State


@pytest.mark.parametrize("reason", [1, 2, 3, 4])
def test_no_context_is_accepted(reason: int, study: Path) -> None:
    studies.ct(study, 50)
    with scp(accept=lambda context: reason) as peer:
        sent = attempt(target_of(peer), study)
        receipt = sent.require()
        assert receipt.state is State.FAILED
        assert len(sent.rejected) == 50
        assert sent.seconds < as_loaded(SLACK_S), "at once, not one timeout per instance"
        detail = next(iter(sent.rejected.values()))
        assert "CT Image Storage" in detail
        assert "Explicit VR Little Endian" in detail
        assert len(peer.associations) <= 4
        assert not peer.stores


def test_only_some_classes_are_accepted(study: Path) -> None:
    paths = studies.sample(study, others=False)
    with scp(accept=lambda context: context.offered[0] if context.abstract_syntax == CT else 3) as peer:
        sent = attempt(target_of(peer), study)
        assert sent.require().state is State.PARTIAL
        ct = {item.path for item in sent.plan.items if item.header and item.header.SOPClassUID == CT}
        assert sent.arrived == ct
        assert set(sent.rejected) == {item.path for item in sent.plan.items} - ct
        assert len(paths) == len(sent.outcomes)


def test_refused_syntax_names_offered_and_accepted(study: Path) -> None:
    studies.dicom(study / "a.dcm", "MR_small_jp2klossless.dcm")
    with scp(accept=lambda context: IMPLICIT if IMPLICIT in context.offered else 4) as peer:
        sent = attempt(target_of(peer, transcode="never"), study)
        detail = sent.rejected["a.dcm"]
        assert "JPEG 2000" in detail
        assert "Implicit VR Little Endian" in detail
        assert "transcode is never" in detail
        assert not peer.stores


def test_more_contexts_than_an_association_holds(study: Path) -> None:
    """200 SOP classes, private ones among them: split over associations, each within its 128 contexts."""
    for number in range(200):
        path = studies.dicom(study / f"{number:03}.dcm", SOPClassUID=f"2.25.4711.{number}" if number else CT)
        assert path.exists()
    plan = scan([study])
    with scp() as peer:
        assert attempt(target_of(peer), plan).require().state is State.DELIVERED
        assert set(peer.kept) == set(uids(plan))
        for one in peer.associations:
            assert one.proposal
            assert 1 <= len(one.proposal.contexts) <= 128
        # An association or a few for each group, not one per instance.
        assert len(peer.associations) <= 60


def test_every_syntax_of_a_class_is_offered_on_its_own(study: Path) -> None:
    studies.every_syntax(study)
    seen: list[Proposal] = []
    with scp(on_associate=seen.append) as peer:
        sent = attempt(target_of(peer), study)
        assert sent.require().state is State.DELIVERED
        held = {(item.header.SOPClassUID, item.header.TransferSyntaxUID) for item in sent.plan.items if item.header}
        offered = {(one.abstract_syntax, syntax) for one in seen[0].contexts for syntax in one.offered}
        assert held <= offered
        assert all(len(one.offered) == 1 for one in seen[0].contexts)
        # As they are: no conversion where the peer takes what is there.
        for item in sent.plan.items:
            assert item.header
            store = peer.kept[item.header.SOPInstanceUID]
            assert store.syntax == item.header.TransferSyntaxUID
            assert store.data == sent.plan.file(item).read_bytes()[item.header.dataset_offset :]
