"""XNAT's refusals as our own errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from protocols.http.head import BUSY_STATUS
from protocols.net.hiding import hiding, quieted
from protocols.net.words import clean
from protocols.xnat.answers import XnatRefused
from transfer.errors import Busy, Denied, DispatchError, Interrupted, Misconfigured, NotFound

# What a status means once somebody is logged in. A login that is refused is Denied, see `connect`.
STATUS: dict[int, type[DispatchError]] = {
    **dict.fromkeys(BUSY_STATUS, Busy),
    400: Misconfigured,
    401: Interrupted,  # the session expired; the next attempt logs in afresh, and is Denied if that is what it is
    403: Denied,
    404: NotFound,
    405: Misconfigured,
    406: Misconfigured,
    409: Busy,
    415: Misconfigured,
    423: Busy,
}


@contextmanager
def classified(hidden: Iterable[str] = ()) -> Iterator[None]:
    """Turn XNAT's refusals into our errors.

    Args:
        hidden: what no message may show.
    """
    with quieted(hiding(hidden)):
        try:
            yield
        except XnatRefused as exc:
            words = clean(exc.words, hidden)
            if exc.status < 400:
                # A page of the login, or of a proxy, in the place of data; or the way to one.
                what = "a redirect" if exc.status >= 300 else "a web page"
                raise Interrupted(f"XNAT answered with {what} (status {exc.status}): {words}") from exc
            kind = STATUS.get(exc.status, Busy if exc.status >= 500 else Misconfigured)
            message = f"XNAT answered with status {exc.status}: {words}"
            if kind is Busy:
                raise Busy(message, retry_after=exc.retry_after) from exc
            raise kind(message) from exc
