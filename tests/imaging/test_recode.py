"""Conversion between uncompressed transfer syntaxes: nothing but the encoding changes."""

from __future__ import annotations

import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

from imaging.pixels import EXPLICIT
from imaging.transcode import BIG, DEFLATED, IMPLICIT
from talaria.testing import studies
from talaria.testing.process import program
from tests.conversion import assert_same_elements, convert, header_of, pixels_of, read, source_file
from tests.servers import wire

UNCOMPRESSED_FILES = (
    "CT_small.dcm", "MR_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "ExplVR_BigEnd.dcm",
    "image_dfl.dcm", "liver_1frame.dcm", "liver_expb_1frame.dcm", "rtdose.dcm", "rtdose_expb.dcm", "rtplan.dcm",
    "reportsi.dcm", "test-SR.dcm", "waveform_ecg.dcm", "examples_overlay.dcm", "examples_palette.dcm",
    "examples_rgb_color.dcm", "SC_rgb_small_odd.dcm", "SC_rgb_small_odd_big_endian.dcm", "priv_SQ.dcm",
    "UN_sequence.dcm", "SC_ybr_full_422_uncompressed.dcm",
)  # fmt: skip


@pytest.mark.parametrize("to", [EXPLICIT, IMPLICIT, DEFLATED])
@pytest.mark.parametrize("name", UNCOMPRESSED_FILES)
def test_uncompressed(name: str, to: str, tmp_path: Path) -> None:
    source = source_file(name)
    syntax = header_of(source, tmp_path).TransferSyntaxUID
    if syntax == to:
        return
    got = convert(source, tmp_path, to)
    a, b = read(source), read(got)
    assert b.file_meta.TransferSyntaxUID == to
    assert_same_elements(a, b, swapped=syntax == BIG)
    assert a.get("PhotometricInterpretation") == b.get("PhotometricInterpretation")
    assert a.get("PlanarConfiguration") == b.get("PlanarConfiguration")
    if "PixelData" in a:
        assert np.array_equal(pixels_of(source), pixels_of(got))


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "waveform_ecg.dcm", "test-SR.dcm"])
def test_there_and_back_again(name: str, tmp_path: Path) -> None:
    source = studies.data_file(name).read_bytes()
    other = IMPLICIT if header_of(source, tmp_path).TransferSyntaxUID == EXPLICIT else EXPLICIT
    back = header_of(source, tmp_path).TransferSyntaxUID
    a, b = read(source), read(convert(convert(source, tmp_path, other), tmp_path, back))
    for element in a:
        if element.tag.element and element.VR != "SQ" and element.tag.group % 2 == 0:
            assert b[element.tag].value == element.value


@pytest.mark.parametrize("arguments", [("+te",), ("+ti",), ("+td",)])
@pytest.mark.parametrize("name", ["MR_small_bigendian.dcm", "rtplan.dcm", "waveform_ecg.dcm", "CT_small.dcm"])
def test_dcmtk_says_the_same(name: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    """DCMTK converts to what we convert to: another reader and writer, which shares no code with ours."""
    to = {"+te": EXPLICIT, "+ti": IMPLICIT, "+td": DEFLATED}[arguments[0]]
    source = studies.data_file(name).read_bytes()
    if header_of(source, tmp_path).TransferSyntaxUID == to:
        return
    ours = convert(source, tmp_path, to)
    studies.write(tmp_path / "ours.dcm", ours)
    subprocess.run([program("dcmconv"), *arguments, "-g", studies.data_file(name), tmp_path / "theirs.dcm"], check=True)
    a, b = read((tmp_path / "theirs.dcm").read_bytes()), read(ours)
    assert_same_elements(a, b)
    if "PixelData" in a:
        assert a.PixelData == b.PixelData
    # And it reads ours without a word.
    said = subprocess.run([program("dcmdump"), "-q", tmp_path / "ours.dcm"], capture_output=True, text=True, check=True)
    assert said.stderr == ""


def element(tag: int, vr: str, value: bytes, order: str = "<") -> bytes:
    """One element in explicit VR."""
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF) + vr.encode()
    long = vr in ("OB", "OW", "OF", "SQ", "UN", "UT", "UC", "OV")
    return (
        head
        + (b"\0\0" + struct.pack(order + "I", len(value)) if long else struct.pack(order + "H", len(value)))
        + value
    )


def marks(tag: int, length: int = 0xFFFFFFFF, order: str = "<") -> bytes:
    return struct.pack(order + "HHI", tag >> 16, tag & 0xFFFF, length)


def instance(*elements: bytes, syntax: str = EXPLICIT) -> bytes:
    """A file of these elements, with the UIDs that an instance needs."""
    order = ">" if syntax == BIG else "<"
    uid = studies.uid(40).encode()
    head = element(0x00080016, "UI", b"1.2.840.10008.5.1.4.1.1.7\0", order) + element(0x00080018, "UI", uid, order)
    return wire.part10("1.2.840.10008.5.1.4.1.1.7", uid.decode(), syntax, head + b"".join(elements))


def dataset_of(data: bytes, folder: Path) -> bytes:
    return data[header_of(data, folder).dataset_offset :]


def test_private_and_unknown_elements_are_kept(tmp_path: Path) -> None:
    inner = struct.pack("<HHI", 0x0011, 0x0101, 4) + b"abcd"
    unknown = (
        struct.pack("<HH2sHI", 0x0011, 0x1020, b"UN", 0, 0xFFFFFFFF)
        + marks(0xFFFEE000) + inner + marks(0xFFFEE00D, 0)
        + marks(0xFFFEE000, len(inner)) + inner
        + marks(0xFFFEE0DD, 0)
    )  # fmt: skip
    source = instance(
        element(0x00110010, "LO", b"SOMEBODY"),
        element(0x00111010, "UN", b"\x01\x02\x03\x04"),
        element(0x00111011, "FD", struct.pack("<d", 2.5)),
        element(0x00111012, "DS", b"1.25\\not a number "),  # not to be parsed
        unknown,
        element(0x00280106, "SS", struct.pack("<h", -3)),
        element(0x00404060, "QQ", b"")[:4] + b"QQ\0\0" + struct.pack("<I", 4) + b"wxyz",  # a VR of the future
    )
    got = dataset_of(convert(source, tmp_path, IMPLICIT), tmp_path)
    assert struct.pack("<HHI", 0x0011, 0x1010, 4) + b"\x01\x02\x03\x04" in got
    assert struct.pack("<HHI", 0x0011, 0x1012, 18) + b"1.25\\not a number " in got
    assert struct.pack("<HHI", 0x0040, 0x4060, 4) + b"wxyz" in got
    assert struct.pack("<HHI", 0x0011, 0x1020, 0xFFFFFFFF) + unknown[12:] in got
    again = dataset_of(convert(source, tmp_path, DEFLATED), tmp_path)
    assert zlib.decompress(again, -15) == dataset_of(source, tmp_path)


def test_big_endian_swaps_numbers_and_nothing_else(tmp_path: Path) -> None:
    item = element(0x00280010, "US", b"\x01\x02", ">") + element(0x00081150, "UI", b"1.2\0", ">")
    source = instance(
        element(0x00081140, "SQ", struct.pack(">HHI", 0xFFFE, 0xE000, len(item)) + item, ">"),
        element(0x00110010, "LO", b"SOMEBODY", ">"),
        element(0x00111011, "FD", struct.pack(">d", 2.5), ">"),
        element(0x00111012, "UN", b"\1\2", ">"),
        element(0x00280009, "AT", struct.pack(">HH", 0x0018, 0x1063), ">"),
        element(0x00280100, "US", struct.pack(">H", 8), ">"),
        element(0x7FE00010, "OW", b"\x02\x01\x04\x03", ">"),
        syntax=BIG,
    )
    ds = read(convert(source, tmp_path, EXPLICIT))
    assert ds[0x00081140].value[0].Rows == 0x0102
    assert ds[0x00111011].value == 2.5
    assert ds[0x00280009].value == 0x00181063
    assert ds.PixelData == b"\x01\x02\x03\x04"
    assert ds[0x00111012].value == b"\1\2", "nobody knows what is in it"


def test_values_too_long_for_their_representation_become_UN(tmp_path: Path) -> None:
    """A decimal string of 70,000 bytes is fine in implicit VR, but not in explicit VR (PS3.5 section 6.2.2)."""
    long = b"1.5\\" * 17_500
    head = struct.pack("<HHI", 0x3006, 0x0050, len(long)) + long
    uid = studies.uid(40).encode()
    ids = struct.pack("<HHI", 8, 0x16, 26) + b"1.2.840.10008.5.1.4.1.1.7\0" + struct.pack("<HHI", 8, 0x18, 40) + uid
    source = wire.part10("1.2.840.10008.5.1.4.1.1.7", uid.decode(), IMPLICIT, ids + head)
    got = dataset_of(convert(source, tmp_path, EXPLICIT), tmp_path)
    assert struct.pack("<HH2sHI", 0x3006, 0x0050, b"UN", 0, len(long)) + long in got
    back = convert(convert(source, tmp_path, EXPLICIT), tmp_path, IMPLICIT)
    assert dataset_of(back, tmp_path) == ids + head


def test_representations_that_the_dictionary_leaves_open(tmp_path: Path) -> None:
    def implicit(tag: int, value: bytes) -> bytes:
        return struct.pack("<HHI", tag >> 16, tag & 0xFFFF, len(value)) + value

    uid = studies.uid(40).encode()
    waveform = implicit(0x54001004, b"\x08\0") + implicit(0x54001010, b"\1\2\3\4")
    wide = implicit(0x54001004, b"\x10\0") + implicit(0x54001010, b"\1\2\3\4")
    for bits, signed, vr in ((8, 0, "OB"), (16, 1, "OW")):
        body = b"".join(
            [
                implicit(0x00080016, b"1.2.840.10008.5.1.4.1.1.7\0"),
                implicit(0x00080018, uid),
                implicit(0x00189810, b"\xff\xff"),  # before the element that says whether it is signed
                implicit(0x00280100, bytes([bits, 0])),
                implicit(0x00280103, bytes([signed, 0])),
                implicit(0x00280106, b"\xfe\xff"),
                implicit(0x54000100, marks(0xFFFEE000, len(waveform)) + waveform + marks(0xFFFEE000, len(wide)) + wide),
                implicit(0x60003000, b"\0\0"),
                implicit(0x7FE00010, b"\1\2"),
            ]
        )
        ds = read(convert(wire.part10("1.2", uid.decode(), IMPLICIT, body), tmp_path, EXPLICIT))
        assert vr == ds[0x7FE00010].VR
        assert ds[0x60003000].VR == "OW"
        assert [item[0x54001010].VR for item in ds[0x54000100].value] == ["OB", "OW"]
        assert ds[0x00280106].value == (-2 if signed else 0xFFFE)
        assert ds[0x00189810].value == (-1 if signed else 0xFFFF)
