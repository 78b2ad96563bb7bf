"""Files made by hand, element by element, and their headers."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from imaging.header import Header, read_header

UID = b"1.2.3.45"


@contextmanager
def opened(data: bytes) -> Iterator[int]:
    """A file in memory."""
    fd = os.memfd_create("header")
    try:
        os.write(fd, data)
        yield fd
    finally:
        os.close(fd)


def header_of(data: bytes) -> Header:
    with opened(data) as fd:
        return read_header(fd, len(data))


def element(group: int, number: int, vr: bytes, value: bytes, form: str = "short") -> bytes:
    if form == "short":
        return struct.pack("<HH2sH", group, number, vr, len(value)) + value
    return struct.pack("<HH2sHI", group, number, vr, 0, len(value)) + value


def part10(syntax: str, data: bytes) -> bytes:
    uid = syntax.encode() + b"\0" * (len(syntax) % 2)
    meta = element(2, 0x10, b"UI", uid)
    return bytes(128) + b"DICM" + element(2, 0, b"UL", struct.pack("<I", len(meta))) + meta + data
