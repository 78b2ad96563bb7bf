"""What is said of a target to people: without its secrets, without patients' data, and as little of a peer as it says.

The one place that every error, outcome and probe of every type passes, whatever its driver has hidden already.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr

from blocks.base import QuotePeer, Target
from protocols.http.proxy import ENVIRONMENT
from protocols.net.hiding import Hide, hiding, identifying, secret_forms
from transfer.errors import (
    Busy,
    Denied,
    DispatchError,
    Interrupted,
    LedgerAway,
    Misconfigured,
    NotFound,
    NotTrusted,
    Rejected,
    TimedOut,
    Unreachable,
    Unread,
)
from transfer.oserrors import ITEM_ERRORS
from transfer.outcome import UNSENT, Kind, Outcome
from transfer.plan import CHANGED, LEADS_OUT, TOO_LATE, Plan

USERS = ("user", "http_user", "client_id", "access_key_id")  # fields that stand before a secret in credentials
MAX_NUMBER_CHARS = 3  # a patient's number so short is also a status, a count, a port
# Status codes of HTTP and DICOM (PS3.7 annex C): they say why, and are nobody's words.
_CODE = re.compile(r"(?<=status )[1-5][0-9]{2}\b|(?<=: )[1-5][0-9]{2}\b|\b(?:0x)?(?:[A-CF][0-9A-F]|01|02)[0-9A-F]{2}\b")
_OWN = frozenset((*ITEM_ERRORS.values(), CHANGED, LEADS_OUT, TOO_LATE, UNSENT.detail, ""))
# The most specific first.
_MEANING: tuple[tuple[type[DispatchError], str], ...] = (
    (Unreachable, "no connection could be made"),
    (TimedOut, "the peer was silent for too long"),
    (Busy, "the peer can't take it now"),
    (Interrupted, "the connection broke, or what came made no sense"),
    (NotTrusted, "the peer's certificate or host key is not accepted"),
    (Unread, "part of it can't be read: what was not found may be there"),
    (Denied, "the peer refuses these credentials, or this operation to them"),
    (NotFound, "what the target names is not there"),
    (Rejected, "refused by the peer"),
    (Misconfigured, "the target's settings do not fit the peer"),
)


class Quiet:
    """Takes out of texts what must not show.

    Args:
        plan: whose patients are meant; None for none.
    """

    def __init__(self, target: Target, plan: Plan | None = None) -> None:
        self._target, self._plan = target, plan
        self._quotes = target.quote_peer is not QuotePeer.NONE

    @cached_property
    def hide(self) -> Hide:
        """Replace what must not show; files are read when the first text needs it."""
        private = identifying(self._plan, self._plan.items) if self._plan else set()
        return hiding(secrets_of(self._target) | set(filter(_is_telling, private)))

    def error(self, exc: DispatchError) -> None:
        """Take it out of an error, and out of what it came from, which is logged with it."""
        message = self.hide(exc.message)
        quoted = self._quotes or isinstance(exc, LedgerAway)  # which is nothing that a peer has said
        exc.message = message if quoted else _with_codes(_meaning(exc), message)
        exc.args = (exc.message,)
        exc.__cause__ = None
        exc.__suppress_context__ = True

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Take it out of every error that passes."""
        try:
            yield
        except DispatchError as exc:
            self.error(exc)
            raise

    def outcome(self, outcome: Outcome) -> Outcome:
        """Return an outcome without it."""
        if outcome.detail in _OWN or outcome.kind is Kind.DELIVERED:
            return outcome
        if outcome.elsewhere:  # our own words, which say that it can't be asked for
            return Outcome(outcome.kind, self.hide(outcome.detail))
        return Outcome(outcome.kind, self.text(outcome.detail))

    def output(self, text: str) -> str:
        """Return what a script of the target's printed without it; nothing where nothing is quoted."""
        return self.hide(text) if self._quotes else ""

    def text(self, text: str) -> str:
        """Return a peer's reason without it."""
        text = self.hide(text) if text else text
        return text if self._quotes or not text else _with_codes("the peer's reason is not quoted (quote_peer)", text)


def secrets_of(target: Target) -> set[str]:
    """Return a target's secrets, in the forms in which they show.

    Where a key lies, and which proxy is on the way, is no secret, though what stands in these fields may be.
    """
    secrets, users = [], []
    for name in type(target).model_fields:
        value = getattr(target, name)
        if isinstance(value, SecretStr):
            secrets += _parts(value.get_secret_value())
        elif name in USERS and isinstance(value, str):
            users.append(value)
    return secret_forms(secrets, users)


def _parts(value: str) -> list[str]:
    """Return what is secret in a field: the password of a URL, each line of a key, else all of it."""
    if value.startswith("/") or value == ENVIRONMENT:
        return []
    if "://" in value:
        try:
            password = urlsplit(value).password or ""
        except ValueError:
            return [value]
        return [password, unquote(password)]
    lines = value.splitlines()
    # A peer may show one line of a key.
    return [value] if len(lines) < 2 else [value, *(one for one in lines if not one.startswith("-----"))]


def _is_telling(value: str) -> bool:
    return not (value.isdigit() and len(value) <= MAX_NUMBER_CHARS)


def _meaning(exc: DispatchError) -> str:
    meaning = next((words for kind, words in _MEANING if isinstance(exc, kind)), "it failed")
    return f"{meaning}; its words are not quoted (quote_peer)"


def _with_codes(words: str, text: str) -> str:
    codes = list(dict.fromkeys(_CODE.findall(text)))[:3]
    return f"{words}: {', '.join(codes)}" if codes else words
