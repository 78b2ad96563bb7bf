"""Asks targets that do not answer whether they do again: where no run waits for one, nobody else would see it.

So that people who heard that a target is down also hear that it is up, and the next dispatch to it begins at once.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable
from contextlib import suppress

from prefect.client.orchestration import PrefectClient

from blocks import Target
from tasks.checking import check_target
from tasks.dispatch import breaker
from tasks.targets import load
from transfer.database import LOST
from transfer.errors import DispatchError
from transfer.fanout import each
from transfer.home import Home
from transfer.ledger import Ledger

AT_ONCE = 16  # targets that are asked: one behind a network that swallows everything takes its whole time-out
logger = logging.getLogger(__name__)

_lock = threading.Lock()  # held while targets are asked


async def ask_again(client: PrefectClient, home: Home, ledger: Ledger, targets: Iterable[Target]) -> None:
    """Ask in the background those that do not answer, unless it is too early; of those that hung in pushes, nobody.

    Args:
        targets: all that are saved; without secrets.
    """
    if _lock.locked():
        return
    names = await asyncio.to_thread(_due, ledger, [one for one in targets if one.enabled])
    found = []
    for name in names:
        with suppress(DispatchError):  # removed meanwhile, or its secrets can't be read
            found += await load(client, [name])
    if found:
        threading.Thread(target=_ask, args=(home, found), name="dead-targets", daemon=True).start()


def ask(home: Home, ledger: Ledger, targets: Iterable[Target]) -> None:
    """Test targets, several at once, that nobody else tests now; note which of them answer."""

    def ask_one(target: Target) -> None:
        with breaker.testing(home, ledger, target) as mine, suppress(DispatchError):
            if mine and check_target(target).ok:
                breaker.reached(ledger, target)

    found = [*targets]
    each(found, ask_one, min(AT_ONCE, len(found)), "dead-targets")


def _due(ledger: Ledger, targets: list[Target]) -> list[str]:
    known, now = breaker.every(ledger, targets), ledger.now()
    return [name for name, one in known.items() if one.opened and one.trial is None and one.until <= now]


def _ask(home: Home, targets: list[Target]) -> None:
    if not _lock.acquire(blocking=False):
        return
    try:
        with Ledger(home.ledger) as ledger:
            ask(home, ledger, targets)
    except LOST as exc:  # the next look tries again
        logger.warning("whether targets answer again can't be noted: %s", type(exc).__name__)
    except Exception:  # a fault of a driver's must not be silent
        logger.exception("whether targets answer again can't be seen")
    finally:
        _lock.release()
