"""What each status of a C-STORE response does to its instance."""

from __future__ import annotations

from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import as_loaded
from tests.servers.scp import scp
from tests.servers.steps import (
    Answer,
)  # fmt: skip
from tests.targets.dicom_peers.peers import SLACK_S, finish, target_of, uids
from transfer.errors import (
    Busy,
    Denied,
    DispatchError,
)  # fmt: skip
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import State

STATUSES: list[tuple[int, Kind | type[DispatchError]]] = [
    (0x0000, Kind.DELIVERED),
    (0xB000, Kind.WARNING),
    (0xB006, Kind.WARNING),
    (0xB007, Kind.WARNING),
    (0xB123, Kind.WARNING),
    (0x0111, Kind.ALREADY),
    (0xA700, Kind.REJECTED),  # for now, each time, while others are stored
    (0xA702, Kind.REJECTED),
    (0xA900, Kind.REJECTED),
    (0xA9FF, Kind.REJECTED),
    (0xC000, Kind.REJECTED),
    (0xC123, Kind.REJECTED),
    (0x0110, Kind.REJECTED),
    (0x0117, Kind.REJECTED),
    (0x0122, Kind.REJECTED),
    (0x0124, Denied),
    (0x7777, Kind.REJECTED),  # what no clause knows says not that it was kept
]


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize(("status", "wanted"), STATUSES, ids=lambda value: f"{value:04X}" if type(value) is int else "")
def test_status(status: int, wanted: Kind | type[DispatchError], concurrency: int, study: Path) -> None:
    studies.ct(study, 8)
    plan = scan([study])
    victim = uids(plan)[3]
    with scp(
        on_store=lambda store: Answer(status, comment="see the log") if store.SOPInstanceUID == victim else 0
    ) as peer:
        if status == 0x0111:
            peer.on_store = lambda store: Answer(status, kept=True) if store.SOPInstanceUID == victim else 0
        sent = attempt(target_of(peer, concurrency=concurrency), plan)
        path = plan.items[3].path
        if isinstance(wanted, Kind):
            receipt = sent.require()
            assert sent.outcomes[path].kind is wanted
            assert set(sent.outcomes) == {item.path for item in plan.items}
            assert len(sent.arrived) == 8 - (wanted is Kind.REJECTED)
            assert receipt.state is (State.PARTIAL if wanted is Kind.REJECTED else State.DELIVERED)
            if wanted in (Kind.WARNING, Kind.REJECTED):
                assert f"{status:04X}" in sent.outcomes[path].detail
                assert "see the log" in sent.outcomes[path].detail
            if wanted is not Kind.REJECTED:
                assert set(peer.kept) == set(uids(plan))
        else:
            assert type(sent.error) is wanted
            assert f"{status:04X}" in str(sent.error)
            assert path not in sent.outcomes
            assert not sent.rejected
            finish(peer, plan, sent, concurrency=concurrency)
        assert sent.seconds < as_loaded(SLACK_S)
        assert not peer.repeated


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_peer_without_resources_is_left_in_peace(concurrency: int, study: Path) -> None:
    studies.ct(study, 30)
    plan = scan([study])
    with scp(on_store=lambda store: 0xA700 if store.number > 8 else 0) as peer:
        sent = attempt(target_of(peer, concurrency=concurrency), plan)
        assert type(sent.error) is Busy
        assert "A700" in str(sent.error)
        assert not sent.rejected
        assert len(peer.stores) < 8 + 16, "it was asked again and again"
        assert sent.seconds < as_loaded(SLACK_S)
        finish(peer, plan, sent, concurrency=concurrency)


def test_no_patient_shows_in_an_error_comment(study: Path) -> None:
    """Peers write what they like into (0000,0902); only so much of it is taken over, and on one line."""
    studies.ct(study, 1)
    with scp(on_store=lambda store: Answer(0xC001, comment="x" * 60 + "\r\n\x1b[2J")) as peer:
        sent = attempt(target_of(peer), study)
    detail = next(iter(sent.rejected.values()))
    assert detail.isprintable()
