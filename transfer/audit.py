"""The audit trail: who did what, in a file that only grows, each entry chained to the one before it by its hash.

TALARIA_HOME/audit/
├── trail.jsonl    one entry per line; mode 0600
├── pseudonyms.key what patients' IDs are hidden behind
└── head           number and hash of the last entry: shows that a tail was cut off

An entry holds UIDs, names of targets and users, counts; never a secret, never a patient's data. Writing it never fails
whoever is recorded: what could not be written is counted, and the next entry says how many were lost.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import IO, Any

from transfer.home import Home
from transfer.oserrors import user

logger = logging.getLogger(__name__)

FIRST = "0" * 64  # what the first entry is chained to
TAIL_BYTES = 1 << 16  # read to find the last entry, and at once from the end; longer ones are not written
TEXT_CHARS = 500  # of one value in an entry


class Event(StrEnum):
    """What is recorded."""

    STARTED = "started"  # `talaria up`
    STOPPED = "stopped"
    LOGIN = "login"
    LOGOUT = "logout"
    REFUSED = "refused"  # a request, a path: not allowed to this user, or to anybody
    USER_CHANGED = "user-changed"  # users, roles, tokens
    TARGET_CHANGED = "target-changed"  # which fields, without their values
    TARGET_REMOVED = "target-removed"
    SOURCE_CHANGED = "source-changed"
    SOURCE_REMOVED = "source-removed"
    RULE_CHANGED = "rule-changed"  # who is written to, and when
    DISPATCH = "dispatch"  # somebody asked for one, or to cancel or retry it
    DELIVERY_BEGUN = "delivery-begun"
    DELIVERY = "delivery"  # and how it ended
    QUERY = "query"  # somebody asked for one to be queued, or a peer was asked
    RETRIEVAL = "retrieval"  # somebody asked for one, or it ended
    LOST = "lost"  # entries before this one that could not be written


class AuditResult(StrEnum):
    """How it ended (PS3.15 A.5.2: EventOutcomeIndicator)."""

    SUCCESS = "success"
    MINOR = "minor"  # partly
    SERIOUS = "serious"  # not


@dataclass(frozen=True)
class Trail:
    """The trail of one state directory."""

    home: Home

    @property
    def folder(self) -> str:
        return f"{self.home.root}/audit"

    @property
    def path(self) -> str:
        return f"{self.folder}/trail.jsonl"

    @property
    def head_path(self) -> str:
        return f"{self.folder}/head"

    def append(self, entry: dict[str, Any]) -> str:
        """Add an entry and return its hash, when it is on disk.

        Raises:
            OSError: it can't be written; then nothing of it is there.
        """
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        with _locked(self.path) as fd:
            size = os.fstat(fd).st_size
            number, before, torn = _last(fd, size)
            document = {"n": number + 1, **entry, "prev": before}
            if torn:
                document["torn"] = hashlib.sha256(torn).hexdigest()
            document["hash"] = hash_of(document)
            line = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"
            _write(fd, size, (b"\n" if torn else b"") + line)
            self._note(number + 1, document["hash"])
        return str(document["hash"])

    def _note(self, number: int, digest: str) -> None:
        """Keep what the last entry is; its few bytes are written at once or not at all."""
        fd = os.open(self.head_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.pwrite(fd, b"%020d %b\n" % (number, digest.encode("ascii")), 0)
            os.fdatasync(fd)
        finally:
            os.close(fd)


def hash_of(document: dict[str, Any]) -> str:
    """Return the hash of an entry, that of the one before it included."""
    rest = {key: value for key, value in document.items() if key != "hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def _locked(path: str) -> Iterator[int]:
    """Open the trail for one more entry; other processes wait."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def _last(fd: int, size: int) -> tuple[int, str, bytes]:
    """Return number and hash of the last entry, and what a process that was killed left behind it."""
    tail = os.pread(fd, 2 * TAIL_BYTES, max(0, size - 2 * TAIL_BYTES))
    whole, _, torn = tail.rpartition(b"\n")
    for line in reversed(whole.split(b"\n")):
        with suppress(ValueError, KeyError, TypeError):
            document = json.loads(line)
            return int(document["n"]), str(document["hash"]), torn
    return 0, FIRST, torn


def _write(fd: int, size: int, data: bytes) -> None:
    try:
        if os.write(fd, data) < len(data):
            raise OSError(28, os.strerror(28))  # noqa: TRY301 - ENOSPC: a part of it fitted
        os.fsync(fd)
    except OSError:
        with suppress(OSError):
            os.ftruncate(fd, size)
        raise


# ---- what everybody calls

_lost = 0
_lock = threading.Lock()


def record(
    event: Event, who: str = "", result: AuditResult = AuditResult.SUCCESS, *, address: str = "", **details: Any
) -> bool:
    """Record what somebody did; return whether it is on disk. Takes some milliseconds; never raises.

    Args:
        who: name of the user, or of the token; "" for the user who runs this process.
        address: of the client, if the request came over a network.
        details: what it was about; UIDs, names and counts only. What is None or empty is left out.
    """
    global _lost
    entry: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "event": str(event),
        "who": _short(who or f"{user()} (local)"),
        "result": str(result),
        **({"source": _short(address)} if address else {}),
    }
    kept = {name: _plain(value) for name, value in details.items() if value not in (None, "", (), [], {})}
    if kept:
        entry["details"] = kept
    with _lock:
        try:
            trail = Trail(Home.current())
            if _lost:
                trail.append(entry | {"event": str(Event.LOST), "details": {"count": _lost}})
                _lost = 0
            trail.append(entry)
        except OSError as exc:
            _lost += 1
            logger.error("an entry of the audit trail could not be written: %s", exc.strerror)  # noqa: TRY400
            return False
    return True


def pseudonym(value: str) -> str:
    """Return what stands for a patient's ID in the trail: the same for the same, and nobody's who has not the key.

    Empty if there is no key to be had.
    """
    try:
        key = _key(Trail(Home.current()))
    except OSError:
        return ""
    return hmac.new(key, value.encode("utf-8", "replace"), hashlib.sha256).hexdigest()[:16]


def _key(trail: Trail) -> bytes:
    """Return the key of the pseudonyms, made on first use; its file is there whole or not at all."""
    path = f"{trail.folder}/pseudonyms.key"
    with suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read()
    os.makedirs(trail.folder, mode=0o700, exist_ok=True)
    part = f"{path}.{secrets.token_hex(8)}"
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(fd)
        with suppress(FileExistsError):  # another process was faster
            os.link(part, path)
    finally:
        os.unlink(part)
    with open(path, "rb") as file:
        return file.read()


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, short."""
    if isinstance(value, bool | int | float) or value is None:
        return value
    if isinstance(value, dict):
        return {_short(str(name)): _plain(one) for name, one in list(value.items())[:50]}
    if isinstance(value, list | tuple | set | frozenset):
        some = sorted(map(str, value)) if isinstance(value, set | frozenset) else list(value)
        return [_plain(one) for one in some[:50]]
    return _short(str(value))


def _short(text: str) -> str:
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= TEXT_CHARS else f"{text[:TEXT_CHARS]}…"


# ---- looking at it


@dataclass(frozen=True)
class Fault:
    """What is wrong with a trail, and at which line, counted from 1; 0 for its end."""

    line: int
    what: str


def entries(trail: Trail) -> Iterator[dict[str, Any]]:
    """Yield the entries, oldest first; what is not an entry is skipped.

    Raises:
        OSError: it can't be read.
    """
    with suppress(FileNotFoundError), open(trail.path, "rb") as file:
        for line in file:
            with suppress(ValueError):
                if isinstance(document := json.loads(line), dict):
                    yield document


def latest(
    trail: Trail,
    wanted: Callable[[dict[str, Any]], bool],
    count: int,
    most: int,
    end: int | None = None,
    words: Sequence[str] = (),
) -> tuple[list[dict[str, Any]], int]:
    """Return the last entries that are wanted, the newest first, without reading those before them.

    Args:
        count: entries that are returned, at most.
        most: bytes of the trail that are looked through, about.
        end: byte of the trail before which to begin; None for its end.
        words: that the text of each has that is wanted; others are not even parsed.

    Returns:
        The entries, and the `end` from which to go on to older ones; 0 where there are none.

    Raises:
        OSError: it can't be read.
    """
    found: list[dict[str, Any]] = []
    with suppress(FileNotFoundError), open(trail.path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        end = size if end is None else min(end, size)
        needed = [word.encode() for word in words]
        for at, line in _backwards(file, end):
            with suppress(ValueError):
                if not all(word in line for word in needed):
                    pass
                elif isinstance(document := json.loads(line), dict) and wanted(document):
                    found.append(document)
            if len(found) >= count or end - at >= most:
                return found, at
    return found, 0


def _backwards(file: IO[bytes], end: int) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file before a byte, the last first, and where each begins."""
    begun = b""  # what a line that began in an earlier block ends with
    while end > 0:
        at = max(0, end - TAIL_BYTES)
        file.seek(at)
        data = file.read(end - at) + begun
        first, *lines = data.split(b"\n")
        where = at + len(data)
        for line in reversed(lines):
            where -= len(line)
            yield where, line
            where -= 1
        begun = first if len(first) <= 2 * TAIL_BYTES else b""  # longer than any entry
        if not at:
            yield 0, begun
        end = at


def verify(trail: Trail, head: str = "") -> tuple[int, str, list[Fault]]:
    """Check the whole chain: return number and hash of the last entry, and what is wrong.

    An entry that was altered, removed, put in or moved breaks the chain where that was. That the end was cut off shows
    in the kept head, or in one that somebody noted elsewhere.

    Args:
        head: hash of an entry that must be there; "" for none.

    Raises:
        OSError: it can't be read.
    """
    faults: list[Fault] = []
    number, before, torn = 0, FIRST, b""
    seen = {FIRST: 0}
    with suppress(FileNotFoundError), open(trail.path, "rb") as file:
        for at, line in enumerate(file, start=1):
            document = _entry(line)
            if document is None:
                if torn:
                    faults.append(Fault(at - 1, "is no entry"))
                torn = line.rstrip(b"\n")
                continue
            faults += _wrong(at, document, number, before, torn)
            number, before, torn = int(document["n"]), str(document["hash"]), b""
            seen[before] = number
    if torn:
        faults.append(
            Fault(0, "the last line is no whole entry: a process was killed while it wrote it, or it was cut")
        )
    faults += _tail_faults(trail, number, seen)
    if head and head not in seen:
        faults.append(
            Fault(0, f"the entry with hash {head} is not there: the trail was cut off before it, or replaced")
        )
    return number, before, faults


def _entry(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError, KeyError, TypeError):
        document = json.loads(line)
        int(document["n"]), str(document["prev"]), str(document["hash"])
        return dict(document) if line.endswith(b"\n") else None
    return None


def _wrong(at: int, document: dict[str, Any], number: int, before: str, torn: bytes) -> Iterator[Fault]:
    if hash_of(document) != document["hash"]:
        yield Fault(at, f"entry {document['n']} was altered")
    if document["prev"] != before:
        if document["n"] == number + 1:
            yield Fault(at, f"entry {document['n']} does not follow the one before it: that one was altered or put in")
        else:
            yield Fault(at, f"entry {document['n']} follows entry {number}: entries were removed, moved or put in here")
    if torn and document.get("torn") != hashlib.sha256(torn).hexdigest():
        yield Fault(at - 1, "is no entry")


def _tail_faults(trail: Trail, number: int, seen: dict[str, int]) -> Iterator[Fault]:
    try:
        with open(trail.head_path, encoding="ascii") as file:
            noted, digest = file.read(86).split()
    except FileNotFoundError:
        if number:
            yield Fault(0, "the head is missing: whether the end was cut off is not known")
        return
    except ValueError:
        yield Fault(0, "the head is damaged: whether the end was cut off is not known")
        return
    # Who is killed between the two leaves a head that is one entry old, which is no fault.
    if digest not in seen:
        yield Fault(0, f"it ends with entry {number}, but entry {int(noted)} was written: the end was cut off")
