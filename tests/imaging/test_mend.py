"""Odd lengths are padded, and nothing else changes."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import pydicom
import pytest
from pydicom.encaps import generate_fragments

from imaging.header import EXPLICIT_BIG, EXPLICIT_LITTLE, IMPLICIT_LITTLE, read_header
from imaging.mend import mended
from imaging.part10 import preamble_and_meta
from talaria.testing import studies
from tests.imaging.encoded import UID, element, header_of, opened, part10

JPEG = "1.2.840.10008.1.2.4.50"
BEGIN = element(8, 0x16, b"UI", b"1.2.840.10008.5.1.4.1.1.2\0") + element(8, 0x18, b"UI", UID)


def mend(data: bytes) -> bytes:
    """Return the file that holds the mended data set; nothing in it is odd."""
    with opened(data) as fd:
        header = read_header(fd, len(data))
        assert header.odd
        with mended(fd, header) as copy:
            made = preamble_and_meta(header) + os.pread(copy.fd, copy.size, 0)
    assert not header_of(made).odd
    return made


def read(data: bytes) -> pydicom.Dataset:
    with studies.quiet():
        return pydicom.dcmread(io.BytesIO(data))


def item(value: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(value)) + value


END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def test_strings_get_a_blank_and_bytes_a_zero() -> None:
    data = BEGIN + element(8, 0x70, b"LO", b"odd") + element(0x20, 0x0D, b"UI", b"1.2.3.4.5")
    data += element(0x7FE0, 0x10, b"OW", b"\1\2\3", "long")
    made = mend(part10(EXPLICIT_LITTLE, data))
    assert element(8, 0x70, b"LO", b"odd ") in made
    assert element(0x20, 0x0D, b"UI", b"1.2.3.4.5\0") in made
    assert made.endswith(element(0x7FE0, 0x10, b"OW", b"\1\2\3\0", "long"))


def test_within_sequences() -> None:
    inner = element(8, 0x1150, b"UI", b"1.2.34") + element(8, 0x104, b"LO", b"odd")
    data = BEGIN + element(8, 0x1140, b"SQ", item(inner), "long")
    ds = read(mend(part10(EXPLICIT_LITTLE, data)))
    assert ds.ReferencedImageSequence[0].CodeMeaning == "odd"
    assert ds.ReferencedImageSequence[0].ReferencedSOPClassUID == "1.2.34"


@pytest.mark.parametrize("tables", [False, True])
def test_fragments_and_the_tables_of_their_offsets(tables: bool) -> None:
    frames = [b"\xff\xd8a\xff\xd9", b"\xff\xd8abc\xff\xd9", b"\xff\xd8abcd\xff\xd9"]
    offsets = [0, 8 + 5, 8 + 5 + 8 + 7]
    table = struct.pack("<3I", *offsets) if tables else b""
    data = BEGIN + element(0x28, 8, b"IS", b"3 ")
    if tables:
        data += element(0x7FE0, 1, b"OV", struct.pack("<3Q", *offsets), "long")
    data += struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF) + item(table) + b"".join(map(item, frames)) + END
    made = mend(part10(JPEG, data))
    ds = read(made)
    fragments = list(generate_fragments(ds.PixelData[8 + len(table) :]))
    assert fragments == [frame + b"\0" * (len(frame) % 2) for frame in frames]
    if tables:
        moved = (0, 8 + 6, 8 + 6 + 8 + 8)
        assert struct.unpack("<3I", ds.PixelData[8:20]) == moved
        assert struct.unpack("<3Q", ds.ExtendedOffsetTable) == moved


def test_deflated_data_of_odd_length_gets_a_byte_and_no_other(tmp_path: Path) -> None:
    data = studies.data_file("image_dfl.dcm").read_bytes()
    header = header_of(data)
    with opened(data) as fd, mended(fd, header) as copy:
        assert os.pread(copy.fd, copy.size, 0) == data[header.dataset_offset :] + b"\0"


def test_deflated_data_with_an_odd_value() -> None:
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    data = deflate.compress(BEGIN + element(8, 0x70, b"LO", b"odd")) + deflate.flush()
    assert read(mend(part10("1.2.840.10008.1.2.1.99", data))).Manufacturer == "odd"


@pytest.mark.parametrize("syntax", [IMPLICIT_LITTLE, "1.2.840.113619.5.2"])
def test_without_VRs(syntax: str) -> None:
    def implicit(group: int, number: int, value: bytes) -> bytes:
        return struct.pack("<HHI", group, number, len(value)) + value

    data = implicit(8, 0x16, b"1.2.840.10008.5.1.4.1.1.2\0") + implicit(8, 0x18, UID) + implicit(8, 0x70, b"odd")
    made = mend(part10(syntax, data))
    assert implicit(8, 0x70, b"odd ") in made


def test_big_endian() -> None:
    ds = studies.dataset("MR_small_bigendian.dcm")
    data = studies.encoded(ds)
    at = data.index(b"\0\x08\0\x70LO")
    length = int.from_bytes(data[at + 6 : at + 8], "big")
    odd = data[:at] + b"\0\x08\0\x70LO\0\3odd" + data[at + 8 + length :]
    made = read(mend(odd))
    assert header_of(odd).TransferSyntaxUID == EXPLICIT_BIG
    assert made.Manufacturer == "odd"
    assert made.PixelData == ds.PixelData


def test_zeros_at_the_end_are_left_out() -> None:
    made = mend(part10(EXPLICIT_LITTLE, BEGIN + element(0x7FE0, 0x10, b"OW", b"\1\2", "long") + b"\0" * 3))
    assert made.endswith(element(0x7FE0, 0x10, b"OW", b"\1\2", "long"))
