"""Compares instances that two files hold: servers change headers, so the pixel data says which are the same."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag

from imaging.header import DEFLATED_LITTLE, EXPLICIT_BIG, IMPLICIT_LITTLE, Header

COMPARE_BYTES = 1 << 20
PIXELS = frozenset((0x7FE00008, 0x7FE00009, 0x7FE00010))  # float, double float and integer pixel data


def equal(ours: int, at: int, theirs: int, there: int, check: Callable[[], None]) -> bool:
    """Return True if two files are equal from these positions to their ends."""
    while True:
        check()
        piece = os.pread(ours, COMPARE_BYTES, at)
        if piece != os.pread(theirs, COMPARE_BYTES, there):
            return False
        if not piece:
            return True
        at, there = at + len(piece), there + len(piece)


def pixel_data(fd: int, header: Header) -> int | None:
    """Return the position of the pixel data (or what stands for it); None if none is found."""
    syntax = header.TransferSyntaxUID
    if syntax == DEFLATED_LITTLE:
        return None
    with open(os.dup(fd), "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file.seek(header.dataset_offset)
        found: list[int] = []

        def at_pixels(tag: BaseTag, vr: str | None, length: int) -> bool:
            if tag in PIXELS:
                found.append(tag)
            return tag in PIXELS

        read_dataset(file, syntax == IMPLICIT_LITTLE, syntax != EXPLICIT_BIG, stop_when=at_pixels, specific_tags=[])
        return file.tell() if found else None


def same(ours: int, sent: Header, theirs: int, got: Header, check: Callable[[], None]) -> bool:
    """Return True if two files hold the same pixel data in the same transfer syntax, or are the same data set."""
    if sent.TransferSyntaxUID != got.TransferSyntaxUID:
        return False
    if equal(ours, sent.dataset_offset, theirs, got.dataset_offset, check):
        return True
    at, there = pixel_data(ours, sent), pixel_data(theirs, got)
    return at is not None and there is not None and equal(ours, at, theirs, there, check)
