"""What the conformance suite must know about a type of target to test its driver, and how the suite sends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from blocks import EXTENSIONS
from blocks.base import Target
from tasks import DRIVERS
from tasks.dispatch.delivery import Delivery
from tasks.driver import Driver
from transfer.confirmed import Spot
from transfer.errors import DispatchError, Unreachable
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.outcome import DELIVERED, Kind, Outcome
from transfer.plan import Item, Plan, scan
from transfer.receipt import Level, Receipt


@dataclass
class Harness:
    """One running server and how to look at it; made afresh (empty) for each test.

    What a server or a protocol can't do is declared here, and the suite asserts it.

    Attributes:
        name: shown in the test's id, e.g. `dicom-storescp`.
        target: reaches the server; small timeouts, no waiting between attempts.
        dead: the same target where nothing answers: a closed port, a folder that can't be reached.
        read_back: what the server holds under final names: bytes by relative path below the dispatch's folder
            (`keeps_names`), or the DICOM file's bytes by SOPInstanceUID.
        names: every name that is visible at the server now, final or not, marker included. Called during a push.
        final: returns True if a visible name is a final one (not hidden or temporary).
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


def of_extensions() -> dict[str, Factory]:
    """Return the harnesses of all types that other packages add."""
    return {name: factory for one in EXTENSIONS for name, factory in of_extension(one).items()}


def of_extension(type_name: str) -> dict[str, Factory]:
    """Return the harnesses of a type that another package adds.

    Raises:
        LookupError: its package names no module of harnesses, or that has none.
    """
    module = EXTENSIONS[type_name].harness
    harnesses: dict[str, Factory] = import_module(module).HARNESSES if module else {}
    if not harnesses:
        raise LookupError(f"the package that adds the type {type_name} brings no harness")
    return harnesses


def sources_of_extension(type_name: str) -> dict[str, Factory]:
    """Return those harnesses of a type of another package whose servers can be queried: its `SOURCES` name them."""
    harnesses = of_extension(type_name)
    names: tuple[str, ...] = getattr(import_module(EXTENSIONS[type_name].harness), "SOURCES", ())
    return {name: harnesses[name] for name in names}


@dataclass
class Sent:
    """What one attempt to push did.

    Attributes:
        plan: what was handed to the driver, narrowed for the target.
        refused: items that the target does not get, with the reason; they never reached the driver.
        outcomes: what the driver reported, by path.
        moved: bytes that the driver reported as moved.
        receipt: of the dispatch, all attempts; None if this one raised.
        error: the error that it raised, None if none.
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
        """Paths of the items that the driver reported as arrived."""
        return {path for path, outcome in self.outcomes.items() if outcome.arrived}

    @property
    def rejected(self) -> dict[str, str]:
        """Details by path of the items that the driver reported as rejected."""
        return {path: outcome.detail for path, outcome in self.outcomes.items() if outcome.kind is Kind.REJECTED}

    def require(self) -> Receipt:
        """Return the receipt, or raise what the push raised."""
        if self.error:
            raise self.error
        assert self.receipt is not None
        return self.receipt


class HarnessDispatch:
    """A dispatch to one target as the engine makes it: a `Delivery` over a ledger of its own; made by `sending`."""

    def __init__(
        self,
        delivery: Delivery,
        told: Callable[[Sent, Item, Outcome], None],
        moved: Callable[[Sent, int], None],
    ) -> None:
        self.delivery, self._told, self._moved = delivery, told, moved
        self._sent = Sent(delivery.plan, delivery.refused)
        self._lock = threading.Lock()

    def attempt(self) -> Sent:
        """Push what has no outcome yet, once."""
        delivery = self.delivery
        done = [path for path, outcome in delivery.known.glance().items() if outcome.arrived]
        self._sent = sent = Sent(delivery.plan.narrowed(delivery.plan.items, done), delivery.refused)
        begun = time.monotonic()
        try:
            sent.receipt = delivery.push()
        except DispatchError as exc:
            sent.error = exc
        sent.seconds = time.monotonic() - begun
        return sent

    def receipt(self) -> Receipt:
        """Return the receipt that the dispatch would leave now, over all attempts."""
        return self.delivery.receipt()

    def record(self, item: Item, outcome: Outcome) -> None:
        if item in self._sent.refused:
            return
        assert item in self._sent.plan.items, f"{item.shown} is not in the plan"
        self._sent.outcomes[item.path] = outcome
        self._told(self._sent, item, outcome)

    def move(self, count: int) -> None:
        with self._lock:
            self._sent.moved += count
        self._moved(self._sent, count)


class _WatchedLedger(Ledger):
    """A ledger that also reports each outcome to a listener."""

    listener: HarnessDispatch | None = None

    def record(
        self,
        dispatch_id: str,
        destination: str,
        endpoint: str,
        item: Item,
        outcome: Outcome,
        spot: Spot | None = None,
        since: float = 0.0,
        *,
        by_uid: bool = False,
    ) -> None:
        super().record(dispatch_id, destination, endpoint, item, outcome, spot, since, by_uid=by_uid)
        if self.listener and since:  # reported, and not found in the ledger
            self.listener.record(item, outcome)


class _WatchedDelivery(Delivery):
    """A delivery that also reports the bytes that were sent."""

    listener: HarnessDispatch

    def moved(self, count: int) -> None:
        super().moved(count)
        self.listener.move(count)


@contextmanager
def sending(
    target: Target,
    source: Plan | Path,
    *,
    done: Mapping[str, Outcome] | Iterable[str] = (),
    told: Callable[[Sent, Item, Outcome], None] = lambda sent, item, outcome: None,
    moved: Callable[[Sent, int], None] = lambda sent, count: None,
    cancelled: threading.Event | None = None,
    paused: threading.Event | None = None,
    folder: Path | None = None,
) -> Iterator[HarnessDispatch]:
    """Begin a dispatch to one target.

    Args:
        folder: the state directory, with the ledger; None for a new one.
        source: a plan, or the folder to plan.
        done: what has arrived according to the ledger: paths, or outcomes by path.
        told: called with each outcome, in whichever thread the driver reports it.
        moved: called with each count of bytes, likewise.
        cancelled: set to stop the push.
        paused: set to stop it after the items under way.
    """
    plan = scan([source]) if isinstance(source, Path) else source
    with TemporaryDirectory(prefix="talaria-home-") as new:
        home = Home(folder or Path(new))
        with _WatchedLedger(home.ledger) as ledger:
            what = DRIVERS.of(target), target, plan, ledger, home, cancelled or threading.Event()
            delivery = _WatchedDelivery(*what, paused=paused)
            there = dict(done) if isinstance(done, Mapping) else dict.fromkeys(done, DELIVERED)
            for item in delivery.plan.items:
                if item.path in there:
                    delivery.known.record(item, there[item.path], 0.0)
            sender = ledger.listener = delivery.listener = HarnessDispatch(delivery, told, moved)
            yield sender


def attempt(target: Target, source: Plan | Path, **how: Any) -> Sent:
    """Push once, through the engine's `Delivery`; the arguments are those of `sending`."""
    with sending(target, source, **how) as sender:
        return sender.attempt()
