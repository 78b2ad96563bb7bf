"""What is asserted of pushes to XNAT."""

from __future__ import annotations

from talaria.testing import studies
from talaria.testing.harness import Sent
from tests.servers.xnat import Xnat
from transfer.errors import (
    DispatchError,
)
from transfer.outcome import Kind

LABEL = f"{studies.PATIENT_ID}_{studies.STUDY_DATE}_101112"


def sessions(server: Xnat) -> dict[str, tuple[str, int]]:
    """Study and number of files of the archived sessions, by label."""
    return {one.label: (one.uid, len(one.files)) for one in server.store.experiments.values()}


def kinds(sent: Sent) -> dict[str, Kind]:
    return {path: outcome.kind for path, outcome in sent.outcomes.items()}


def all_of(sent: Sent, kind: Kind) -> bool:
    return set(kinds(sent)) == {item.path for item in sent.plan.pending} and set(kinds(sent).values()) == {kind}


def fails(sent: Sent, expected: type[DispatchError]) -> DispatchError:
    assert type(sent.error) is expected, repr(sent.error)
    assert not sent.outcomes
    shown = str(sent.error)
    assert not any(phi in shown for phi in studies.PHI), shown
    return sent.error


def _sop(sent: Sent, path: str) -> str:
    header = next(item.header for item in sent.plan.items if item.path == path)
    assert header
    return header.SOPInstanceUID
