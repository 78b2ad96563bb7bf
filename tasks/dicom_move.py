"""Whether a DICOM node knows us as a move destination: it is asked to move one instance to our Storage SCP.

Nothing less shows that: some nodes answer a move of nothing with success, whoever is to get it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path

from imaging.query import Match
from protocols.dimse.moves import MoveDestination, cannot_come
from protocols.dimse.pull import Pull
from protocols.dimse.query import finder
from protocols.dimse.sample import Sample, Sampler
from protocols.dimse.series import PulledSeries
from protocols.dimse.transport import Peer
from tasks.dicom_pull import destination, grants, without_patients
from transfer.errors import Misconfigured, TimedOut
from transfer.health import SKIPPED, Health, Probe
from transfer.home import Home
from transfer.receipt import PushReport
from transfer.staging import discard
from transfer.throttle import Throttle

LONGEST_S = 300.0  # for the whole of it: a node may fetch from tapes, and say now and then that it is at it
UNTOLD = "can't be told"


def probe_move(health: Health, peer: Peer, quote: Callable[[str], str]) -> None:
    """Move one instance of the peer's to our Storage SCP, as the probe `move`; nothing is left of it here.

    The probe is skipped where a move can show nothing: the peer has no instance, or grants no C-MOVE.

    Args:
        quote: returns what may be said of the peer's own words, by the target's settings.
    """
    with health.probe("move") as probe:
        at, end = destination(), time.monotonic() + LONGEST_S

        def check() -> None:
            if time.monotonic() > end:
                raise TimedOut(f"{peer.where}: the move of one instance took longer than {LONGEST_S:g} s")

        if obstacle := cannot_come(peer, at):
            _skip(probe, obstacle)
        elif not grants(peer)[1]:
            _skip(probe, "the peer does not grant C-MOVE")
        elif sample := _sampled(peer, probe, check):
            probe.remedy = (
                f"Ask the node's operator to register {at.aet} as a move destination, with this machine's address and "
                f"port {at.port}, and let the node connect to that; or set scp_aet and scp_port to what is registered."
            )
            _move(peer, sample, at, quote, check)
            probe.remedy = ""
            probe.detail = f"the peer has moved one instance to {at.aet}, port {at.port}, where it came"


def _skip(probe: Probe, why: str) -> None:
    probe.result, probe.detail = SKIPPED, f"{UNTOLD}: {why}"


def _sampled(peer: Peer, probe: Probe, check: Callable[[], None]) -> Sample | None:
    """Return an instance of the peer's; None if it shows none, which the probe says."""
    with finder(peer, check) as asked:
        sampler = Sampler(asked, today())
        sample = sampler.find()
    if sample is None:
        refusal = f"; {sampler.refusal.message}" if sampler.refusal else ""
        _skip(probe, f"the peer shows no instance that could be moved{refusal}")
    return sample


def _move(
    peer: Peer, sample: Sample, at: MoveDestination, quote: Callable[[str], str], check: Callable[[], None]
) -> None:
    """Move an instance here, and remove it.

    Raises:
        Misconfigured: the peer doesn't move it, or it did not come. TimedOut: the peer says that it has sent it, and
            nothing came. Others: as `Pull.run`.
    """
    one = sample.series
    one.moves = "that is to be tested"
    report = _Report(check)
    with room() as folder:
        pull = Pull(
            peer,
            [one],
            folder,
            report,
            lambda _: None,
            associations=1,
            throttle=Throttle(None),
            destination=at,
            quote=without_patients([Match(sample.study)], quote),
        )
        pull.run()
        came = all((folder / f"{uid}.dcm").is_file() for uid in one.images or ())
    if not came:
        raise Misconfigured(f"{peer.where}: {_why(one, at)}{pull.strangers}")


class _Report(PushReport):
    """Notes nothing; ends the move when its time is up."""

    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__()
        self._in_time = check

    def check(self) -> None:
        self._in_time()


def today() -> date:
    """Return the date by which studies are new, give or take a day."""
    return datetime.now(UTC).date()


@contextmanager
def room() -> Iterator[Path]:
    """Make a folder in the state directory, and remove it at the end; a killed process's is cleared as others are."""
    home = Home.current()
    with home.owner() as mine:
        folder = home.staging / mine
        try:
            folder.mkdir(parents=True, mode=0o700)
            yield folder
        finally:
            discard(folder)


def _why(one: PulledSeries, at: MoveDestination) -> str:
    """Return why an instance did not come, and what to do about it, by the peer's last answer."""
    last = one.answers[-1] if one.answers else None
    if one.refused:
        return f"what came was not the instance that was asked for: {', '.join(one.refused)}"
    if last is not None and last.status == 0 and not last.failed:
        return f"the peer answers that it has sent the instance ({last}), and nothing came: {at.question}"
    return f"the peer did not move the instance ({last}): {at.question}"
