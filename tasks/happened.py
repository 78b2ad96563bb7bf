"""Says what has happened, in one place: to the ledger, for rules that write to people; to Prefect; to the log.

    event                                           about
    talaria.dispatch.delivered, partial, failed,    target, cause, counts of items, bytes, seconds, attempts,
                     cancelled                      verified, dispatch, run
    talaria.target.down, up                         target, cause, failures, since
    talaria.source.stuck                            source, words
    talaria.certificate.expires                     of, days
    talaria.disk.low                                of, free, size, percent

Rules and the log name them without `talaria.`. None of it holds a patient's data; paths and sentences that may hold
paths are apart (`paths`, `words`), and go only to whom they are meant for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

from prefect.context import FlowRunContext
from prefect.events import emit_event

from transfer.errors import Cancelled, DispatchError, Retryable, printable
from transfer.home import host_name
from transfer.ledger import Ledger
from transfer.receipt import Receipt, State

PREFIX = "talaria."
MOST_PATHS = 20  # of one dispatch
MOST_NAMES = 10_000  # of files that are looked for in a sentence
WORDS_CHARS = 300
PATH = re.compile(r"(?<![a-z]:)(?<!/)[/\\]")  # a slash that is not of a URL's beginning
logger = logging.getLogger("talaria.state")


class Cause(StrEnum):
    """Why a dispatch was not delivered."""

    NONE = ""
    OUTAGE = "outage"  # no connection, silence, a broken link, a peer that is busy: it may pass by itself
    REFUSED = "refused"  # password, certificate, settings, a missing place: somebody must change something
    REJECTED = "rejected"  # the peer, or we, refused single items; the others arrived or could have
    SCRIPT = "script"  # everything arrived, the target's own script failed
    UNEXPECTED = "unexpected"  # a fault of ours: the run's log has it


def cause_of(receipt: Receipt, error: BaseException | None, *, dead: bool = False) -> Cause:
    """Return why a delivery ended as it did.

    Args:
        error: that ended it.
        dead: whether a test found that the target does not answer.
    """
    if receipt.state in (State.DELIVERED, State.CANCELLED):
        return Cause.NONE
    if dead or isinstance(error, Retryable):
        return Cause.SCRIPT if receipt.hook == "failed" else Cause.OUTAGE
    if error is not None:
        known = type(error) is not DispatchError  # the base is what unexpected errors become
        return Cause.REFUSED if known else Cause.UNEXPECTED
    return Cause.SCRIPT if receipt.hook == "failed" else Cause.REJECTED


def dispatch_ended(
    ledger: Ledger,
    run: str,
    dispatch_id: str,
    receipt: Receipt,
    cause: Cause,
    paths: Iterable[str] = (),
    *,
    at_first: bool = False,
) -> None:
    """Say how a dispatch ended at a target; once, also if its run was killed before it could end.

    Args:
        at_first: whether it is said only if no end at this target has been said, as of one that was delivered before.
    """
    paths = list(paths)
    counts = {str(kind): count for kind, count in receipt.counts.items()} | {"unsent": receipt.unsent}
    facts = receipt.facts()
    about = {
        "target": receipt.target,
        "cause": str(cause),
        **{name: facts[name] for name in ("delivered", "warnings", "already", "rejected", "skipped", "unsent")},
        **{name: facts[name] for name in ("bytes", "seconds", "attempts", "verified", "hook")},
        "dispatch": dispatch_id,
        "run": run,
    }
    state = str(receipt.state)
    odd = (item.path for item in receipt.odd)
    hidden = _hidden(receipt.error or "", paths, islice(odd, MOST_NAMES))
    host = host_name() if ledger.shared else ""
    what = host, run, receipt.target, state, counts, receipt.bytes, receipt.seconds
    if ledger.happenings.ended(*what, f"dispatch.{state}", about | hidden, at_first=at_first):
        _say(f"dispatch.{state}", about)


def dispatch_refused(ledger: Ledger, run: str, targets: Iterable[str], error: BaseException, paths: list[str]) -> None:
    """Say that a dispatch ended before anything was sent: it could not begin, or was stopped, or failed by a fault."""
    cancelled = isinstance(error, Cancelled)
    cause = Cause.REFUSED if isinstance(error, DispatchError) else Cause.UNEXPECTED
    for target in targets:
        stopped = State.CANCELLED if cancelled else None
        words = error.message if isinstance(error, DispatchError) else f"unexpected {type(error).__name__}"
        receipt = Receipt(target, (), attempts=0, error=words, stopped=stopped)
        dispatch_ended(ledger, run, "", receipt, Cause.NONE if cancelled else cause, paths, at_first=True)


def target_stands(ledger: Ledger, target: str, *, up: bool, about: Mapping[str, Any], node: str = "") -> None:
    """Say that a target does not answer any more, or answers again; once for all hosts.

    Args:
        node: that one of several which are meant by it; "" if it is always the same.
    """
    state, subject = "up" if up else "down", f"target/{target}{f'/{node}' if node else ''}"
    if not ledger.happenings.stands(subject, state, at_first=not up):
        return
    known = {"target": target, "cause": "" if up else str(Cause.OUTAGE), **about, **({"node": node} if node else {})}
    happened(ledger, f"target.{state}", known)


def happened(ledger: Ledger, event: str, about: Mapping[str, Any], key: str = "", words: str = "") -> bool:
    """Say that something has happened; return False if that is known already.

    Args:
        about: for everybody; with `target` or `source`, the name of what it is about.
        key: the same for whoever sees the same, so that it is said once; "" for what comes anew each time.
        words: a sentence that may name paths.
    """
    if not ledger.happenings.happened(event, {**about, **_hidden(words, ())}, key):
        return False
    _say(event, about)
    return True


def _hidden(words: str, paths: Iterable[str], files: Iterable[str] = ()) -> dict[str, Any]:
    """Return the parts of a happening that may name paths: `words` without `plain`, if they can't be shown to all.

    Args:
        files: that words may be about.
    """
    known = [printable(one) for one in paths]
    names = {" ".join(Path(one).name.split()) for one in (*known, *map(printable, files))} - {""}
    words = " ".join(words.split())
    plain = not PATH.search(words) and not any(name in words for name in names)
    return {"paths": known[:MOST_PATHS], "words": words[:WORDS_CHARS], "plain": plain}


def _say(event: str, about: Mapping[str, Any]) -> None:
    """Send an event to Prefect and a line to the log."""
    name = str(about.get("target") or about.get("source") or about.get("of") or "")
    kind = "target" if "target" in about else "source" if "source" in about else event.partition(".")[0]
    # Within a run, Prefect adds the run, its deployment and its flow as related resources.
    run = str(about.get("run") or "") if FlowRunContext.get() is None else ""
    related = [{"prefect.resource.id": f"prefect.flow-run.{run}", "prefect.resource.role": "flow-run"}] if run else []
    cause = {"talaria.cause": str(about["cause"])} if about.get("cause") else {}  # automations match labels only
    emit_event(
        PREFIX + event,
        resource={"prefect.resource.id": f"{PREFIX}{kind}.{name}", "prefect.resource.name": name} | cause,
        related=related,
        payload={key: value for key, value in about.items() if value is not None},
    )
    words = f"{event}: {name}" + (f" ({about['cause']})" if about.get("cause") else "")
    logger.info(words, extra={"state": {"event": event, **about}})
