"""Makes a PS3.10 file of an item whose own file lacks preamble or file meta information.

Targets that take files (STOW, XNAT) send `beginning(header)` and then the file from where that says:

    head, offset = beginning(item.header)  # b"" and 0 for a file that is as it should be
"""

from __future__ import annotations

import struct

from imaging.header import Header

IMPLEMENTATION_CLASS_UID = "2.25.276386529264531863407331127064327358273"  # of Talaria's files; a UUID (PS3.5 B.2)


def beginning(header: Header) -> tuple[bytes, int]:
    """Return the bytes to send first, and the offset from which the file is to follow them."""
    return (b"", 0) if header.part10 else (preamble_and_meta(header), header.dataset_offset)


def preamble_and_meta(header: Header) -> bytes:
    """Return preamble, prefix and file meta information for a data set (PS3.10 section 7.1)."""
    elements = (
        _element(0x0001, b"OB", b"\0\1")
        + _element(0x0002, b"UI", _uid(header.SOPClassUID))
        + _element(0x0003, b"UI", _uid(header.SOPInstanceUID))
        + _element(0x0010, b"UI", _uid(header.TransferSyntaxUID))
        + _element(0x0012, b"UI", _uid(IMPLEMENTATION_CLASS_UID))
    )
    return bytes(128) + b"DICM" + _element(0x0000, b"UL", struct.pack("<I", len(elements))) + elements


def _element(number: int, vr: bytes, value: bytes) -> bytes:
    if vr == b"OB":
        return struct.pack("<HH2sHI", 0x0002, number, vr, 0, len(value)) + value
    return struct.pack("<HH2sH", 0x0002, number, vr, len(value)) + value


def _uid(value: str) -> bytes:
    raw = value.encode("latin-1", "replace")
    return raw + b"\0" * (len(raw) % 2)
