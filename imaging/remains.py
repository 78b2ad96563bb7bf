"""Reads what a damaged file still says of itself: to which study and series it belongs, and which instance it was."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from imaging.charset import decoded
from imaging.header import DEFLATED_SYNTAXES, EXPLICIT_BIG, KEPT_BYTES, PREAMBLE_BYTES, UID, plain_text
from imaging.walk import Damaged, FileWindow, Walk

_STUDY, _SERIES, _INSTANCE, _ACCESSION, _CHARSET = 0x0020000D, 0x0020000E, 0x00080018, 0x00080050, 0x00080005
_META_INSTANCE, _META_SYNTAX = 0x00020003, 0x00020010
_WANTED = frozenset((_STUDY, _SERIES, _INSTANCE, _ACCESSION, _CHARSET))
_META = frozenset((_META_INSTANCE, _META_SYNTAX))


class Remains(NamedTuple):
    """What can be read of a damaged instance; "" for what can't."""

    study: str = ""
    series: str = ""
    instance: str = ""
    accession: str = ""


def remains(fd: int, size: int) -> Remains:
    """Return what the beginning of a damaged file says, as far as it can be read.

    Raises:
        OSError: the file can't be read.
    """
    window = FileWindow(fd, size)
    offset = PREAMBLE_BYTES if size > PREAMBLE_BYTES and window.at(128, 4) == b"DICM" else 0
    meta, offset = _meta(window, offset)
    best = Remains(instance=_uid(meta.get(_META_INSTANCE, b"")))
    for found in _readings(window, offset, plain_text(meta.get(_META_SYNTAX, b""))):
        one = Remains(
            _uid(found.get(_STUDY, b"")),
            _uid(found.get(_SERIES, b"")),
            _uid(found.get(_INSTANCE, b"")) or best.instance,
            decoded(found.get(_ACCESSION, b""), found.get(_CHARSET, b"")).strip("\0 "),
        )
        if sum(map(bool, one)) > sum(map(bool, best)):
            best = one
    return best


def _meta(window: FileWindow, pos: int) -> tuple[dict[int, bytes], int]:
    """Return what is wanted of the file meta information, and where that ends, by the damage or by the data set."""
    found: dict[int, bytes] = {}
    walk = Walk(window, "<", True, _META)
    with suppress(Damaged, struct.error):
        while pos + 8 <= window.size:
            tag, _, length, start = walk.element(pos, explicit=True)
            if tag >> 16 != 0x0002:
                break
            if tag in _META:
                found[tag] = window.at(start, min(length, PREAMBLE_BYTES))
            pos = start + length
    return found, pos


def _readings(window: FileWindow, offset: int, syntax: str) -> Iterator[dict[int, bytes]]:
    """Yield what the data set says up to its damage, in each way in which it may be encoded."""
    if syntax in DEFLATED_SYNTAXES:
        inflated = _inflated(window, offset)
        window, offset = FileWindow(window.fd, len(inflated), inflated), 0
    ways = [("<", True), ("<", False), (">", True)]
    for endian, explicit in ways[2:] if syntax == EXPLICIT_BIG else ways[:2] if syntax else ways:
        found: dict[int, bytes] = {}
        with suppress(Damaged, struct.error):
            Walk(window, endian, explicit, _WANTED).top(offset, found)
        yield found


def _inflated(window: FileWindow, offset: int) -> bytes:
    """Return the beginning of a deflated data set, piece by piece, so that what stands before the damage is there."""
    inflate, data = zlib.decompressobj(-zlib.MAX_WBITS), bytearray()
    with suppress(Damaged, zlib.error):
        while offset < window.size and len(data) < KEPT_BYTES and not inflate.eof:
            piece = window.at(offset, min(256, window.size - offset))
            offset += len(piece)
            data += inflate.decompress(piece, KEPT_BYTES)
    return bytes(data)


def _uid(raw: bytes) -> str:
    """Return a value if it can be a UID: what is read behind a damage may be anything."""
    uid = plain_text(raw)
    return uid if UID.fullmatch(uid) else ""
