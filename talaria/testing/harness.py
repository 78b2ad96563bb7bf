"""What the conformance suite must know of a type of target to test its driver, and how it sends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from blocks.base import Target
from tasks import DRIVERS
from tasks.dispatch.delivery import lacking, sort_out
from tasks.driver import Driver
from transfer.errors import DispatchError, Unreachable
from transfer.outcome import Kind, Outcome
from transfer.plan import Item, Plan, scan
from transfer.receipt import Level, PushReport, Receipt


@dataclass
class Harness:
    """One running server and how to look at it; made afresh (empty) for each test.

    What a server, or a protocol, can't do is declared here and asserted as such by the suite.

    Attributes:
        name: shown in the test's id, e.g. `dicom-storescp`.
        target: reaches the server; small timeouts, no waiting between attempts.
        dead: the same target where nothing answers: a closed port, a folder that can't be reached.
        read_back: what the server holds under final names: bytes by relative path below the dispatch's folder
            (`keeps_names`), or the DICOM file's bytes by SOPInstanceUID.
        names: every name that is visible at the server now, final or not, marker included. Called during a push.
        final: tells of a visible name whether it is a final one (not hidden or temporary).
        leftovers: names at the server that neither a delivery nor a user put there; a check must leave it unchanged.
        cut: a target whose link breaks for good after about that many payload bytes, once; then it works.
        reject: makes the server refuse this one item; yields the target to use. None if no server could.
        shorten: makes the server, or the link, lose the end of what is written without an error; None if the
            protocol makes that impossible.
        secrets: values that must appear nowhere.
        dead_error: the class of the error at `dead`; NotFound for what isn't reached over a network.
        reaches: the levels of verification that this server lets the driver reach; None for all that the type can.
    """

    name: str
    target: Target
    dead: Target
    read_back: Callable[[Plan], dict[str, bytes]]
    names: Callable[[], set[str]]
    cut: Callable[[int], AbstractContextManager[Target]]
    final: Callable[[str], bool] = lambda name: True
    leftovers: Callable[[], set[str]] = set
    reject: Callable[[Plan, Item], AbstractContextManager[Target]] | None = None
    shorten: Callable[[], AbstractContextManager[Target]] | None = None
    secrets: tuple[str, ...] = field(default=())
    dead_error: type[DispatchError] = Unreachable
    reaches: tuple[Level, ...] | None = None

    @property
    def driver(self) -> Driver[Target]:
        """The driver under test."""
        return DRIVERS.of(self.target)


Factory = Callable[[Path], AbstractContextManager[Harness]]  # starts the server; its argument is an empty folder


@dataclass
class Sent:
    """What one attempt to push did.

    Attributes:
        plan: what was handed to the driver, narrowed for the target.
        refused: what the target does not get, with the reason; it never reached the driver.
        outcomes: what the driver told, by path.
        moved: bytes that the driver told as moved.
        receipt: None if it raised.
        error: what it raised, None if nothing.
    """

    plan: Plan
    refused: dict[Item, Outcome]
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    moved: int = 0
    receipt: Receipt | None = None
    error: DispatchError | None = None
    seconds: float = 0.0

    @property
    def arrived(self) -> set[str]:
        """Paths of the items that the driver told as arrived."""
        return {path for path, outcome in self.outcomes.items() if outcome.arrived}

    @property
    def rejected(self) -> dict[str, str]:
        """Details by path of the items that the driver told as rejected."""
        return {path: outcome.detail for path, outcome in self.outcomes.items() if outcome.kind is Kind.REJECTED}

    def require(self) -> Receipt:
        """Return the receipt, or raise what the push raised."""
        if self.error:
            raise self.error
        assert self.receipt is not None
        return self.receipt


def attempt(
    target: Target,
    source: Plan | Path,
    *,
    done: Iterable[str] = (),
    told: Callable[[Sent, Item, Outcome], None] = lambda sent, item, outcome: None,
    moved: Callable[[Sent, int], None] = lambda sent, count: None,
    cancelled: threading.Event | None = None,
) -> Sent:
    """Push once, as a dispatch does: what is not for the target is left out, what is done is not sent again.

    Args:
        source: a plan, or the folder to plan.
        done: paths that the ledger would know as arrived.
        told: called with each outcome, in whichever thread the driver tells it.
        moved: called with each count of bytes, likewise.
        cancelled: set by whoever wants the push to stop.
    """
    driver = DRIVERS.of(target)
    plan = scan([source]) if isinstance(source, Path) else source
    refused, wanted = sort_out(driver.facts, target, plan)
    sent = Sent(plan.narrowed(wanted, done, lacking(refused)), refused)
    lock = threading.Lock()

    def record(item: Item, outcome: Outcome) -> None:
        assert item in sent.plan.items, f"{item.shown} is not in the plan"
        sent.outcomes[item.path] = outcome
        told(sent, item, outcome)

    def move(count: int) -> None:
        with lock:
            sent.moved += count
        moved(sent, count)

    begun = time.monotonic()
    try:
        sent.receipt = driver.push(target, sent.plan, PushReport(record, cancelled, move))
    except DispatchError as exc:
        sent.error = exc
    sent.seconds = time.monotonic() - begun
    return sent
