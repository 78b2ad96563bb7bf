"""Every error that a driver may raise.

    DispatchError
    ├── Retryable          the same call may succeed later
    │   ├── Unreachable    no connection: refused, no route, name not resolved
    │   ├── TimedOut       connected, but idle for longer than allowed
    │   │   └── NothingCame    the peer says that it has sent something: it may not know where to
    │   ├── Busy           the peer asks to come back later (retry_after, seconds)
    │   │   └── DiskFull   no room where it is written, on this machine
    │   ├── Interrupted    the link broke midway
    │   ├── LedgerAway     the ledger's database can't be reached: it says nothing of the target
    │   │   └── LedgerFull     it is a file here, whose disk is full
    │   └── SourceAway     the share that the files lie in does not answer: it says nothing of the target
    ├── Permanent          the same call will fail again until somebody changes something
    │   ├── Misconfigured  the target's settings are wrong
    │   ├── NotTrusted     certificate or host key not accepted
    │   ├── Denied         authenticated or authorised: no
    │   │   ├── Unauthorized   our credentials are not accepted, whatever is asked for
    │   │   └── Unread     part of a source can't be read: what was not found may be there
    │   ├── NotFound       bucket, project, folder or study does not exist
    │   └── Rejected       this item only; the other items go on
    └── Cancelled          somebody asked the dispatch to stop

Messages hold paths, UIDs, host names and the peer's own words; never a patient's data, never a secret.
What is not one of these is a bug: it propagates and is not retried.
"""

from __future__ import annotations

from typing import Any, ClassVar


class DispatchError(Exception):
    """A dispatch, or one item of it, did not succeed.

    Survives pickling with all its fields.

    Args:
        message: one sentence that says what happened and, where known, what to change.
        target: name of the target, "" where the caller fills it in.
        item: relative path of the item that it is about, None for the whole target.
    """

    retryable: ClassVar[bool] = False

    def __init__(self, message: str, target: str = "", item: str | None = None) -> None:
        message = message if message.isascii() else printable(message)
        super().__init__(message)
        self.message = message
        self.target = target
        self.item = item

    def __str__(self) -> str:
        where = f"{self.target}: " if self.target else ""
        what = f" ({self.item})" if self.item else ""
        return f"{where}{self.message}{what}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.target, self.item), dict(self.__dict__)


def printable(text: str) -> str:
    """Return a text that every JSON may hold: bytes of a path that are not UTF-8 are escaped."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # halves of characters, of a peer's words
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


class Retryable(DispatchError):
    """The same call may succeed later."""

    retryable = True


class Unreachable(Retryable):
    """No connection could be made."""


class TimedOut(Retryable):
    """The peer stayed silent for longer than the target's idle timeout."""


class NothingCame(TimedOut):
    """The peer says that it has sent something, and nothing came: it may not know where to."""


class Busy(Retryable):
    """The peer is out of resources, or asks to come back later.

    Args:
        retry_after: seconds that the peer asks to wait; wins over the target's own back-off.
    """

    def __init__(
        self, message: str, target: str = "", item: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message, target, item)
        self.retry_after = retry_after


class DiskFull(Busy):
    """The file system that is written to, on this machine, has no room."""


class Interrupted(Retryable):
    """The link broke midway; what was confirmed before stays confirmed."""


class LedgerAway(Retryable):
    """The ledger's database can't be reached, or has lost what was under way: nothing of that is the target's fault."""


class LedgerFull(LedgerAway):
    """The disk of the state directory has no room for what is to be noted there."""


class SourceAway(Retryable):
    """The share that the files lie in does not answer: whoever looked there would not come back."""


class Permanent(DispatchError):
    """The same call fails again until somebody changes something."""


class Misconfigured(Permanent):
    """The target's settings, or the call itself, are wrong."""


class NotTrusted(Permanent):
    """The peer's certificate or host key is not accepted."""


class Denied(Permanent):
    """The peer refuses these credentials, or this operation to them."""


class Unauthorized(Denied):
    """The peer does not accept our credentials, whatever is asked for with them."""


class Unread(Denied):
    """Part of a source can't be read: what was found is whole, what was not may be in that part.

    Args:
        about: accession numbers and study UIDs, in lower case, that are known to be in it; empty if anything may be.
    """

    def __init__(
        self, message: str, target: str = "", item: str | None = None, about: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(message, target, item)
        self.about = about


class NotFound(Permanent):
    """The bucket, project, folder or study does not exist at the peer."""


class Rejected(Permanent):
    """The peer refuses this item, and only this one."""


class Cancelled(DispatchError):
    """Somebody asked the dispatch to stop; what was confirmed stays confirmed."""


# What somebody can do about an error that ends a test, where its own message does not say more.
REMEDIES: dict[type[DispatchError], str] = {
    Unreachable: "Check host and port, that the service runs there, and that no firewall is between it and the machine "
    "that sends.",
    TimedOut: "Something takes connections there but does not answer: check that the port is that of this service, and "
    "whether the service hangs.",
    NothingCame: "Ask the operator of the other side whether this machine is registered there as a move destination, "
    "and whether a firewall is between.",
    Busy: "Wait and test again; if it stays so, let fewer dispatches or connections go there at once.",
    DiskFull: "Make room where it is written, on the machine that receives it.",
    Interrupted: "Test again; if it breaks each time, look into the log of the other side and at firewalls between.",
    LedgerAway: "Look whether the database that TALARIA_LEDGER names runs, takes connections, and has any to spare; "
    "where it is a file, whether another program has it open, and how fast its disk is.",
    LedgerFull: "Make room on the disk of the state directory (TALARIA_HOME).",
    SourceAway: "See that the server of the share answers, and this machine reaches it; then it goes on by itself.",
    Misconfigured: "Correct the settings of the target.",
    NotTrusted: "Compare the certificate or key with what its operator tells you by another way; if it is the right "
    "one, enter it, or the authority behind it, in the target's settings.",
    Denied: "Check user, password, key, token or AE titles, and ask the operator of the other side for the rights.",
    Unauthorized: "Check user, password, key or token: the other side accepts them no more, or never did.",
    Unread: "Let the user who runs Talaria read all that lies there, and check that the share is mounted.",
    NotFound: "Create it at the other side, or correct its name in the target's settings.",
    Rejected: "The other side refuses what was written to try it: ask its operator what it accepts.",
    Cancelled: "Test again: somebody has stopped it.",
    DispatchError: "This should not happen: look into the log of the machine that sends.",
}


def known_as(error: DispatchError) -> type[DispatchError]:
    """Return the class of this module that says what somebody can do about an error: its own, or one above it."""
    return next(cls for cls in type(error).__mro__ if cls in REMEDIES)


def error_named(name: str) -> type[DispatchError]:
    """Return the class of this module with a name; that of all of them if there is none."""
    return next((cls for cls in REMEDIES if cls.__name__ == name), DispatchError)
