"""Says how the deliveries of a run ended, or that it could not begin."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from textwrap import shorten
from typing import Any

from prefect import states
from prefect.client.schemas.objects import State as RunState
from prefect.context import FlowRunContext

from tasks.dispatch import audited, line, rest
from tasks.dispatch.asked import asked_list
from tasks.dispatch.delivery import Delivery
from tasks.happened import WORDS_CHARS, Cause, cause_of, dispatch_ended, dispatch_refused
from transfer.database import LOST
from transfer.deliveries import Standing
from transfer.errors import Cancelled, Denied, DispatchError, LedgerAway, Misconfigured, SourceAway
from transfer.happenings import CANCELLED
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.outcome import ARRIVED, Kind
from transfer.receipt import Receipt, State, overall

UNKNOWN = "(unknown)"  # counts for targets that are not there
_known: ContextVar[tuple[str, ...]] = ContextVar("targets", default=())
logger = logging.getLogger(__name__)


class Paused(Cancelled):
    """The dispatch was paused."""


class LeftToAnother(Cancelled):
    """The process of the dispatch ends, and another one goes on with it."""


def say_ended(
    ledger: Ledger, dispatch_id: str, receipts: Sequence[Receipt], deliveries: Sequence[Delivery], dead: Collection[str]
) -> None:
    """Say how the deliveries ended that ended in this part of the run of this context.

    Args:
        dead: the names of targets that a test found not to answer.
    """
    run_id, paths = _asked()
    errors = {delivery.target.name: delivery.reason for delivery in deliveries}
    with unsaid_is_no_failure(run_id):
        states = [receipt.state for receipt in receipts]
        ledger.deliveries.stand(run_id, overall(states), (standing(receipt) for receipt in receipts))
        for receipt in receipts:
            name = receipt.target
            if (name in dead or name in errors) and receipt.state is not State.WAITING:
                cause = cause_of(receipt, errors.get(name), dead=name in dead)
                dispatch_ended(ledger, run_id, dispatch_id, receipt, cause, paths)


def say_refused(error: BaseException) -> None:
    """Say that the run of this context could not begin, or go on: for each target for which no end has been said.

    Targets that it names and that are not known to be there count as one: their names may be anything.
    """
    run_id, paths = _asked()
    if run_id:
        with unsaid_is_no_failure(run_id), Ledger(Home.current().ledger) as ledger:
            state = State.CANCELLED if isinstance(error, Cancelled) else State.FAILED
            words = error.message if isinstance(error, DispatchError) else ""
            known = ledger.deliveries.of([run_id]).get(run_id, {})
            left = [one for one in _known.get() if one not in known or known[one].state == State.WAITING]
            if left:  # what an earlier part of it has brought stays
                ledger.deliveries.stand(run_id, state, [Standing(name, state, 0, 0, words) for name in left])
            dispatch_refused(ledger, run_id, _known.get() or (UNKNOWN,), error, paths)


def say_unfit(run_id: str, targets: Sequence[str], paths: list[str], words: str) -> None:
    """Say that a dispatch has failed whose run can't begin with what it was asked for.

    Args:
        targets: those that it names and that are there.
    """
    with unsaid_is_no_failure(run_id), Ledger(Home.current().ledger) as ledger:
        ledger.deliveries.stand(run_id, State.FAILED, [Standing(one, State.FAILED, 0, 0, words) for one in targets])
        dispatch_refused(ledger, run_id, targets or (UNKNOWN,), Misconfigured(words), paths)


def say_stopped(
    ledger: Ledger,
    run_id: str,
    mark: str,
    targets: Sequence[str],
    paths: list[str],
    document: dict[str, Any],
    *,
    given_up: str = "",
) -> None:
    """Say that a run was cancelled while it waited, of each target for which it still had something to do; once.

    Args:
        mark: names this cancellation; the run may be retried, and cancelled again.
        document: its receipts so far; {} if it has none.
        given_up: why it has failed instead, if it was given up after a crash; its receipts may be of an earlier time.
    """
    so_far, end = document.get("targets", {}), State.FAILED if given_up else State.CANCELLED
    with unsaid_is_no_failure(run_id), ledger.together():
        if not ledger.happenings.stands(f"{CANCELLED}{run_id}", mark):
            return
        for name in targets:
            receipt = Receipt.from_json(name, so_far[name]) if name in so_far else Receipt(name, (), attempts=0)
            if name not in so_far or receipt.stopped or (given_up and receipt.state is not State.DELIVERED):
                ended = replace(receipt, stopped=end, error=given_up or receipt.error)
                dispatch_id, cause = str(document.get("dispatch_id", "")), Cause.UNEXPECTED if given_up else Cause.NONE
                dispatch_ended(ledger, run_id, dispatch_id, ended, cause, paths, at_first=True)
        ledger.happenings.may_end_again(run_id, str(end))
        known = ledger.deliveries.of([run_id]).get(run_id, {})
        words = shorten(given_up, WORDS_CHARS, placeholder=" …")
        stood = [known.get(name, Standing(name, State.WAITING, 0, 0, "")) for name in targets if name != UNKNOWN]
        ends = [replace(one, state=str(end), words=words or one.words) for one in stood]
        stands = [new if old.state == State.WAITING else old for old, new in zip(stood, ends, strict=True)]
        whole = overall([State(one.state) for one in stands] or [end]) if given_up else end
        ledger.deliveries.stand(run_id, whole, stands)


def knows(targets: Iterable[str]) -> None:
    """Note the names of the targets of the run of this context: they are there."""
    _known.set(tuple(targets))


@contextmanager
def unsaid_is_no_failure(run_id: str) -> Iterator[None]:
    """Let a run end as it does where that can't be said."""
    try:
        yield
    except LOST as exc:
        logger.warning("the end of run %s is not known to others: %s", run_id, exc)


def standing(receipt: Receipt) -> Standing:
    """Return a receipt as lists show it, with the reason that most of what is missing has."""
    counts = receipt.counts
    reasons = Counter(item.detail for item in receipt.of(Kind.REJECTED) if item.detail)
    words = receipt.error or ""
    if not words and reasons:
        reason, count = reasons.most_common(1)[0]
        words = f"{reason} ({count} files)" if count > 1 else reason
        words += f", and {len(reasons) - 1} other reasons" if len(reasons) > 1 else ""
    if not words and receipt.hook == "failed":
        words = "the script at the end failed"
    arrived = sum(counts[kind] for kind in ARRIVED)
    items = len(receipt.items) - counts[Kind.SKIPPED] + receipt.missing
    words = shorten(words, WORDS_CHARS, placeholder=" …")
    return Standing(receipt.target, str(receipt.state), items, arrived, words)


def sentence(receipt: Receipt) -> str:
    """Return a receipt in a line, for the state of its run."""
    parts = [one for one in (receipt.words, receipt.error) if one]
    parts += [f"hook {receipt.hook}"] if receipt.hook == "failed" else []
    return f"{receipt.target} {receipt.state}: " + (", ".join(parts) or "nothing")


def refusal(error: DispatchError) -> RunState[Any]:
    """Return the state of a run that could not begin, or was stopped before it began.

    Where the ledger's database is away, or the disk of the state directory full, nothing can be known or noted, and
    where the share of the files does not answer, nothing can be read: the run comes back, and nobody is told.
    """
    if isinstance(error, Paused):
        return rest.paused(error.message)
    if isinstance(error, LeftToAnother):  # its engine makes of it that it goes on
        return states.Cancelled(message=error.message)
    if isinstance(error, LedgerAway | SourceAway) and line.may_rest():
        wait = rest.for_what_is_away(error)
        return states.AwaitingRetry(scheduled_time=wait.until, message=rest.message([wait], error.message))
    say_refused(error)
    if isinstance(error, Denied):
        run = getattr(FlowRunContext.get(), "flow_run", None)
        audited.refused(str(error), str(getattr(run, "id", "")), audited.requester(run), target=error.target)
    stopped = isinstance(error, Cancelled)
    return states.Cancelled(message=str(error)) if stopped else states.Failed(message=str(error))


def _asked() -> tuple[str, list[str]]:
    """Return the id of this context's run and its paths; "" if it is no dispatch."""
    context = FlowRunContext.get()
    asked = (context and context.parameters) or {}
    if context is None or context.flow_run is None or "source" in asked:
        return "", []
    return str(context.flow_run.id), asked_list(asked, "paths")
