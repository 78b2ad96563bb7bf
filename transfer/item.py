"""One file of a plan, as small as it can be: a study may have 100,000 of them.

What many files have in common is in memory once; the numbers of each, and its own UID, lie in one string of bytes.
"""

from __future__ import annotations

import os
import re
import struct
from functools import lru_cache
from typing import Any, NoReturn

from imaging.header import Header, Shared
from transfer.fingerprint import LAST_NS

# Modification time, ctime and inode; links, and the number of the watch; what is true of the file. Then its own UID.
_FACTS = struct.Struct("<qqQIiB")
_UID = _FACTS.size
_MTIME = struct.Struct("<q")
_IN_PLACE, _DIGITS = 1, 2  # whether a staged plan reads it where it lies; whether its UID is packed
# As they are given, in their order.
_KNOWN = ("path", "size", "mtime_ns", "header", "problem", "not_sent", "damaged")
_ESCAPE = re.compile(r"\\(\\|x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|[a-z'])")
_SIGNS = {"n": "\n", "r": "\r", "t": "\t"}
_FIELDS = (*_KNOWN, "ctime_ns", "links", "inode", "in_place", "watch")


class Item:
    """One file of a plan. Immutable. Two are equal if all up to `damaged` is.

    Attributes:
        path: relative POSIX path, unique in the plan; bytes that are not UTF-8 are kept as surrogates.
        size: bytes.
        mtime_ns: modification time, nanoseconds since the epoch, as far as 64 bits go.
        header: what the DICOM header says, None if the file isn't DICOM or can't be sent as such; made when it is
            asked for.
        problem: why no target may have this file (a link out of the source, unreadable); "" if nothing is wrong.
        not_sent: why targets that carry only DICOM reject (damaged) or skip (not DICOM) it, "" if they take it.
        damaged: whether `not_sent` is a rejection.
        ctime_ns, links, inode: time of the last change to the file or to what is known of it, number of its hard links,
            and of its inode, when it was planned or staged; 0 if that is not known.
        in_place: whether a staged plan reads the file where it lies.
        watch: number of its watch (`transfer.watch`), 0 if it has none.
        shared: what the header says of the file and others alike; None where there is no header.
    """

    __slots__ = ("_flaw", "_own", "path", "shared", "size")
    path: str
    size: int
    shared: Shared | None
    _own: bytes
    _flaw: tuple[str, str, bool]

    def __init__(
        self,
        path: str,
        size: int,
        mtime_ns: int,
        header: Header | None = None,
        problem: str = "",
        not_sent: str = "",
        damaged: bool = False,
        ctime_ns: int = 0,
        links: int = 0,
        inode: int = 0,
        in_place: bool = False,
        watch: int = 0,
    ) -> None:
        uid, flags = _packed(header.SOPInstanceUID) if header else (b"", 0)
        flags |= in_place * _IN_PLACE
        try:
            facts = _FACTS.pack(mtime_ns, ctime_ns, inode, links, watch, flags)
        except struct.error:
            facts = _FACTS.pack(_kept(mtime_ns), _kept(ctime_ns), inode, links, watch, flags)
        flaw = _common_flaw(problem, not_sent, damaged) if problem or not_sent or damaged else _NONE
        _fill(self, path, size, header.shared if header else None, facts + uid, flaw)

    def seen(self, now: os.stat_result, *, in_place: bool = False, watch: int = 0) -> Item:
        """Return the item with what is known of its file now, and with the number of its watch, if it has another."""
        mtime_ns, _, _, _, old, flags = _FACTS.unpack_from(self._own)
        flags = flags & ~_IN_PLACE | in_place * _IN_PLACE
        facts = _FACTS.pack(mtime_ns, _kept(now.st_ctime_ns), now.st_ino, now.st_nlink, watch or old, flags)
        item = Item.__new__(Item)
        _fill(item, self.path, self.size, self.shared, facts + self._own[_UID:], self._flaw)
        return item

    def but(self, **others: Any) -> Item:
        """Return the item with other values of some attributes."""
        return Item(**{name: getattr(self, name) for name in _FIELDS} | others)

    @property
    def sop_instance_uid(self) -> str:
        """Its own UID; "" where there is no header."""
        uid = self._own[_UID:]
        return _unpacked(uid) if self._own[_UID - 1] & _DIGITS else uid.decode("utf-8", "surrogatepass")

    @property
    def header(self) -> Header | None:
        return Header(self.sop_instance_uid, self.shared) if self.shared else None

    @property
    def mtime_ns(self) -> int:
        return int(_MTIME.unpack_from(self._own)[0])

    @property
    def ctime_ns(self) -> int:
        return int(_FACTS.unpack_from(self._own)[1])

    @property
    def inode(self) -> int:
        return int(_FACTS.unpack_from(self._own)[2])

    @property
    def links(self) -> int:
        return int(_FACTS.unpack_from(self._own)[3])

    @property
    def watch(self) -> int:
        return int(_FACTS.unpack_from(self._own)[4])

    @property
    def in_place(self) -> bool:
        return self._own[_UID - 1] & _IN_PLACE != 0

    @property
    def problem(self) -> str:
        return self._flaw[0]

    @property
    def not_sent(self) -> str:
        return self._flaw[1]

    @property
    def damaged(self) -> bool:
        return self._flaw[2]

    @property
    def shown(self) -> str:
        """The path for logs, JSON and the ledger: valid UTF-8, one line, different for different paths.

        What can't be shown is escaped as in Python; a backslash of the name itself is doubled. `\\xa0` stands for a
        byte that is not UTF-8, and the character of that number is `\\u00a0`.
        """
        if self.path.isprintable() and "\\" not in self.path:
            return self.path
        safe = self.path.replace("\\", "\\\\").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return "".join(c if c.isprintable() else _escaped(c) for c in safe)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Item):
            return NotImplemented
        return self is other or self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash((self.path, self.size))

    def _identity(self) -> tuple[Any, ...]:
        return self.path, self.size, self._own[: _MTIME.size], self.shared, self._own[_UID:], self._flaw

    def __repr__(self) -> str:
        return f"Item({', '.join(f'{name}={getattr(self, name)!r}' for name in _FIELDS)})"

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"an item's {name} does not change")

    def __reduce__(self) -> tuple[Any, ...]:
        return Item, tuple(getattr(self, name) for name in _FIELDS)


_set_path, _set_size, _set_shared, _set_own, _set_flaw = (
    vars(Item)[name].__set__ for name in ("path", "size", "shared", "_own", "_flaw")
)


def _fill(item: Item, path: str, size: int, shared: Shared | None, own: bytes, flaw: tuple[str, str, bool]) -> None:
    _set_path(item, path)
    _set_size(item, size)
    _set_shared(item, shared)
    _set_own(item, own)
    _set_flaw(item, flaw)


_NONE = ("", "", False)


def _kept(time_ns: int) -> int:
    return max(-LAST_NS - 1, min(time_ns, LAST_NS))


@lru_cache(maxsize=256)
def _common_flaw(*flaw: Any) -> tuple[str, str, bool]:
    return flaw


def _packed(uid: str) -> tuple[bytes, int]:
    """Return a UID, two characters in a byte as far as it has only digits and periods, and whether it is so packed."""
    if uid.isascii() and uid.replace(".", "0").isdigit():
        return bytes.fromhex(uid.replace(".", "a") + "f" * (len(uid) & 1)), _DIGITS
    return uid.encode("utf-8", "surrogatepass"), 0


def _unpacked(packed: bytes) -> str:
    return packed.hex().replace("a", ".").rstrip("f")


def _escaped(char: str) -> str:
    return f"\\u{ord(char):04x}" if "\x80" <= char <= "\xff" else repr(char)[1:-1]


def path_of(shown: str) -> str:
    """Return the path of the item that is shown so."""
    return _ESCAPE.sub(_unescaped, shown) if "\\" in shown else shown


def _unescaped(found: re.Match[str]) -> str:
    sign, number = found[1], found[2] or found[3] or found[4]
    if not number:
        return _SIGNS.get(sign, sign)
    # Of what is escaped by two digits, all from 0x80 are bytes that are not UTF-8.
    code = int(number, 16)
    return chr(code + 0xDC00 if len(number) == 2 and code >= 0x80 else code)
