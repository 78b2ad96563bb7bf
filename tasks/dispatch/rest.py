"""What a dispatch that waits leaves behind for its next part, so that it holds nothing meanwhile.

A run that can't go on for a while ends its part: no thread, no slot of a target, no staged file is kept. What it has
achieved stands in the ledger (`transfer.rests`), for whichever host has its next part; names of files stand in it, as
in a receipt. Its receipts so far are a file of the host that had the last part, and the server's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import AwaitingRetry

from tasks.dispatch import kept as kept_receipts
from tasks.dispatch import running
from transfer.errors import LedgerAway, LedgerFull, SourceAway
from transfer.home import Home
from transfer.ledger import Ledger

LEDGER_S = 20.0  # after which a run looks again for the ledger's database; its statements have waited for longer
SOURCE_S = 60.0  # after which a run asks again whether the share of its files answers
ONLY = "talaria.only"  # label of a run that is retried: the one target that is tried again; "" for all
TRIES_AGAIN = "tries again"  # begins the message of a run that waits for something that may come soon
WAITS = "waits"  # and of one that waits for a time that people have set


@dataclass
class Wait:
    """What a run waits for.

    Attributes:
        until: when it looks again.
        what: what for, as in "a slot at pacs".
        soon: whether nobody has to do anything for it to come.
    """

    until: datetime
    what: str
    soon: bool = True


def next_attempt(target: str, again: float, script: int = 0) -> Wait:
    """Return the wait for a target's next attempt, or the next run of its script, at a time since the epoch."""
    what = "run of the script" if script else "attempt"
    return Wait(datetime.fromtimestamp(again, UTC), f"the next {what} at {target}")


def for_what_is_away(error: LedgerAway | SourceAway) -> Wait:
    """Return the wait for the ledger's database, or the share of the files, to be there again; or for room."""
    if isinstance(error, SourceAway):
        return Wait(datetime.now(UTC) + timedelta(seconds=SOURCE_S), "the share of its files to answer")
    return for_the_ledger(error)


def for_the_ledger(error: LedgerAway) -> Wait:
    """Return the wait for the ledger's database to be there again, or for room where it, or a receipt, is a file."""
    what = "room in the state directory" if isinstance(error, LedgerFull) else "the ledger's database"
    return Wait(datetime.now(UTC) + timedelta(seconds=LEDGER_S), what)


@dataclass
class Left:
    """What a run has achieved at one target, and what it knows of the rest.

    Attributes:
        begun: when its first attempt began, in seconds since the epoch; 0 before it.
        since: when it began to wait for a slot; 0 if it doesn't.
        again: when its next attempt may begin.
        error: the name of the class of its last error.
        given_up: that of what studies of a flood were given up for.
        ended: whether nothing is left to do.
        beside: the lock of another run that does the same at the target, for whose end it waits.
        hook_tries: how often the target's script has failed; then everything has arrived, `verified` says how surely.
    """

    attempts: int = 0
    futile: int = 0
    failures: list[str] = field(default_factory=list)
    begun: float = 0.0
    tried: float = 0.0
    since: float = 0.0
    again: float = 0.0
    error: str = ""
    ended: bool = False
    stumbled: list[str] = field(default_factory=list)
    unanswered: dict[str, int] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    put_off: dict[str, str] = field(default_factory=dict)
    hook_tries: int = 0
    verified: str = "accepted"
    notes: list[str] = field(default_factory=list)
    given_up: str = ""
    beside: str = ""


@dataclass
class Rest:
    """What a run has left behind.

    Attributes:
        document: its receipts so far; {} for a run that has not rested, or has read no files.
        left: by target.
        artifacts: ids of its progress artifacts, by target.
        unread: whether it has read no files yet, so that it has no receipts.
        kept: whether the ledger has it.
    """

    document: dict[str, Any] = field(default_factory=dict)
    left: dict[str, Left] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    unread: bool = False
    kept: bool = False

    def studies(self, target: str) -> Sequence[dict[str, Any]]:
        """Return the rows of a flood's studies, if it has begun at a target; where it is retried, it begins anew."""
        return self.document.get("studies", ()) if target in self.left and self.left[target].begun else ()


async def load(home: Home, ledger: Ledger, flow_run: FlowRun, targets: Iterable[str]) -> Rest:
    """Return what a run has left behind; an empty one if it is not known, and then the ledger knows what arrived.

    Args:
        targets: of the run; where its label says that one alone is tried again, nothing is left to do for the others.
    """
    async with get_client() as client:
        return await load_with(client, home, ledger, flow_run, targets)


async def load_with(
    client: PrefectClient, home: Home, ledger: Ledger, flow_run: FlowRun, targets: Iterable[str]
) -> Rest:
    """Return the same by a client of the server."""
    run_id = str(flow_run.id)
    if only := str(flow_run.labels.get(ONLY) or ""):
        left = {name: Left(ended=True) for name in targets if name != only}
        rest = Rest(await receipts(client, home, run_id) or {}, left, kept=True)
        save(home, ledger, run_id, rest)
        await client.update_flow_run_labels(flow_run.id, {ONLY: ""})  # its next parts, and retries, go by what is kept
        return rest
    row = ledger.rests.of(run_id)
    if row is None:
        return Rest()
    with suppress(ValueError, TypeError, KeyError):
        where, kept = row[0], json.loads(row[1])
        left = _left(ledger, run_id, kept)
        if kept.get("unread"):
            return Rest(left=left, unread=True, kept=True)
        document = await receipts(client, home, run_id, here=where == home.identity())
        if document is not None:
            return Rest(document, left, kept["artifacts"], kept=True)
    return Rest(kept=True)


async def receipts(client: PrefectClient, home: Home, run_id: str, *, here: bool = False) -> dict[str, Any] | None:
    """Return a run's receipts so far, with their lines packed; None if there are none.

    Args:
        here: whether this host had its last part; else its file may be of an earlier one, and the server's comes first.
    """
    read, at_home = kept_receipts.read, partial(kept_receipts.here, home, run_id, packed=True)
    found = at_home() if here else None
    return found or await read(client, UUID(run_id), packed=True) or at_home()


def save(home: Home, ledger: Ledger, run_id: str, rest: Rest) -> None:
    """Keep what a run leaves behind, whose receipts are here."""
    left = {name: asdict(one) for name, one in rest.left.items()}
    kept = {"left": left, "artifacts": rest.artifacts, "unread": rest.unread}
    ledger.rests.keep(run_id, home.identity(), json.dumps(kept))


def rests(ledger: Ledger, run_id: str) -> bool:
    """Return True if a run has ended a part of it only."""
    return ledger.rests.of(run_id) is not None


def unread(ledger: Ledger, run_id: str) -> dict[str, Left] | None:
    """Return what a run that has read no files knows of its targets, by name; None for one that has read some."""
    row = ledger.rests.of(run_id)
    if row is None:
        return {}
    with suppress(ValueError, TypeError, KeyError):
        kept = json.loads(row[1])
        if kept.get("unread"):
            return _left(ledger, run_id, kept)
    return None


def _left(ledger: Ledger, run_id: str, kept: dict[str, Any]) -> dict[str, Left]:
    """Return what a run knows of its targets, by name."""
    left, now = {name: Left(**one) for name, one in kept["left"].items()}, ledger.now()
    if ledger.rests.is_ahead(run_id):  # it comes at once
        for one in left.values():
            one.since, one.tried, one.again = min(one.since, now), min(one.tried, now), 0.0
    return left


def forget(ledger: Ledger, run_id: str) -> None:
    """Remove what a run has left behind: it is over, or begins anew."""
    ledger.rests.forget(run_id)


def message(waits: Iterable[Wait], receipts: str) -> str:
    """Return the message of a run that waits: until when, for what, and how far it is."""
    return f"{until(waits)}; {receipts}"


def paused(said: str) -> State[Any]:
    """Return the state of a run that has paused: one that did so with its whole goes on with that."""
    if not running.pauses_with_its_whole():
        return running.paused(said)
    wait = Wait(datetime.now(UTC) + running.UNTIL_RESUMED, "its retrieval to be resumed", soon=False)
    return AwaitingRetry(scheduled_time=wait.until, message=message([wait], said))


def until(waits: Iterable[Wait]) -> str:
    """Return until when a run waits, and for what."""
    found = sorted(waits, key=lambda one: one.until)
    how, at = (TRIES_AGAIN, "at") if any(one.soon for one in found) else (WAITS, "until")
    first = found[0].until.astimezone(UTC)
    day = "" if first.date() == datetime.now(UTC).date() else f"{first:%Y-%m-%d} "
    return f"{how} {at} {day}{first:%H:%M:%S} UTC: {', '.join(one.what for one in found)}"


def awaited(said: str) -> str:
    """Return what a run waits for, by such a message; "" if it is none."""
    if not said.startswith((TRIES_AGAIN, WAITS)):
        return ""
    return said.partition(" UTC: ")[2].partition("; ")[0]
