"""What the front door writes into the audit trail: logins, logouts, refusals, and changes through Prefect's API."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from transfer.audit import AuditResult, Event, record

EVENTS = {
    "login": (Event.LOGIN, AuditResult.SUCCESS),
    "login refused": (Event.LOGIN, AuditResult.SERIOUS),
    "logout": (Event.LOGOUT, AuditResult.SUCCESS),
    "refused": (Event.REFUSED, AuditResult.SERIOUS),
    "target changed": (Event.TARGET_CHANGED, AuditResult.SUCCESS),
    "target removed": (Event.TARGET_REMOVED, AuditResult.SUCCESS),
    "run changed": (Event.DISPATCH, AuditResult.SUCCESS),
}
STRANGERS = 60  # entries a minute on clients that have not logged in, so that nobody fills the disk with refusals
_logger = logging.getLogger("talaria.front")


class AuditWriter:
    """Writes entries in order, in a thread of its own, because each waits for the disk."""

    def __init__(self, write: Callable[..., object] = record, clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit")
        self._strangers: list[float] = []

    def __call__(self, what: str, who: str, more: str) -> None:
        """Record what happened: one of EVENTS, the user, and the address (of a login) or the request."""
        event, result = EVENTS[what]
        if result is AuditResult.SERIOUS:
            _logger.warning("%s: %s %s", what, who or "nobody", more)
        if not who or what == "login refused":
            now = self._clock()
            self._strangers = [one for one in self._strangers if now - one < 60]
            if len(self._strangers) >= STRANGERS:
                return
            self._strangers.append(now)
        login = event in (Event.LOGIN, Event.LOGOUT)
        details = {"address": more} if login else {"request": more}
        self._thread.submit(partial(self._write, event, who or "nobody", result, **details))

    def close(self) -> None:
        """Wait until all is written."""
        self._thread.shutdown()
