"""Data sets without preamble, file meta information or value representations, and under syntaxes that we don't know."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging.header import EXPLICIT_BIG, EXPLICIT_LITTLE, IMPLICIT_LITTLE, Damaged, Header, NotDicom, read_header
from imaging.part10 import beginning
from talaria.testing import studies
from tests.imaging.encoded import UID, element, header_of, part10

GE_PRIVATE = "1.2.840.113619.5.2"
SYNTAXES = {
    "CT_small.dcm": EXPLICIT_LITTLE,
    "MR_small_implicit.dcm": IMPLICIT_LITTLE,
    "MR_small_bigendian.dcm": EXPLICIT_BIG,
    "rtplan.dcm": IMPLICIT_LITTLE,
    "test-SR.dcm": EXPLICIT_LITTLE,
    "waveform_ecg.dcm": EXPLICIT_LITTLE,
    "liver_1frame.dcm": EXPLICIT_LITTLE,
}


def whole(name: str) -> bytes:
    return studies.data_file(name).read_bytes()


def bare(name: str) -> bytes:
    data = whole(name)
    return data[header_of(data).dataset_offset :]


CUTS: dict[str, Callable[[str], bytes]] = {
    "data set alone": bare,
    "meta header without preamble": lambda name: whole(name)[132:],
    "preamble without meta header": lambda name: whole(name)[:132] + bare(name),
    "a byte of padding before": lambda name: b"\0" + bare(name),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", SYNTAXES)
def test_the_transfer_syntax_is_found_out(cut: str, name: str) -> None:
    data = CUTS[cut](name)
    found, expected = header_of(data), header_of(whole(name))
    assert found.TransferSyntaxUID == SYNTAXES[name]
    assert data[found.dataset_offset :] == bare(name)
    assert not found.part10
    assert (found.SOPClassUID, found.SOPInstanceUID, found.PatientID) == (
        expected.SOPClassUID, expected.SOPInstanceUID, expected.PatientID,
    )  # fmt: skip


@pytest.mark.parametrize("name", [*SYNTAXES, "no_meta.dcm", "ExplVR_BigEndNoMeta.dcm", "rtstruct.dcm"])
def test_the_file_that_others_get_is_read_by_pydicom(name: str) -> None:
    data = bare(name) if name in SYNTAXES else whole(name)
    header = header_of(data)
    head, offset = beginning(header)
    made = head + data[offset:]
    with studies.quiet():
        ds = pydicom.dcmread(io.BytesIO(made))
        assert ds.file_meta.TransferSyntaxUID == header.TransferSyntaxUID
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID == header.SOPInstanceUID
        pydicom.filewriter.validate_file_meta(ds.file_meta)
        len(str(ds))  # every value of it
    again = header_of(made)
    assert again.part10
    assert again.TransferSyntaxUID == header.TransferSyntaxUID


def test_a_file_as_it_should_be_stays_as_it_is() -> None:
    assert beginning(header_of(whole("CT_small.dcm"))) == (b"", 0)


@pytest.mark.parametrize("name", ["MR_small_RLE.dcm", "JPEG2000.dcm", "SC_rgb_jpeg_gdcm.dcm"])
def test_compressed_pixels_of_which_nothing_says_how_are_rejected(name: str) -> None:
    with pytest.raises(Damaged, match="compressed"):
        header_of(bare(name))


@pytest.mark.parametrize("data", [b"\x08\0\x05\0" + bytes(100), b" \x08\0\x05\0CS\4\0abcd"])
def test_what_looks_like_an_instance_is_never_skipped(data: bytes) -> None:
    with pytest.raises(Damaged):
        header_of(data)


@pytest.mark.parametrize("data", [b"PNG and more of it", b"\x08 is no group", bytes(range(256)), b"\0\x08\0\x05ab"])
def test_what_does_not_is_no_dicom(data: bytes) -> None:
    with pytest.raises(NotDicom):
        header_of(data)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(SYNTAXES)), st.integers(0, 5000), st.binary(max_size=6))
def test_a_damaged_data_set_is_refused_or_read(name: str, at: int, change: bytes) -> None:
    data = bytearray(bare(name))
    at %= len(data)
    data[at : at + len(change)] = change
    try:
        found = header_of(bytes(data))
    except (Damaged, NotDicom):
        return
    assert isinstance(found, Header)


# ---- syntaxes that we don't know, or that say something else


@pytest.mark.parametrize("syntax", [GE_PRIVATE, "1.2.3.4", EXPLICIT_LITTLE, "1.2.840.10008.1.2.4.50"])
def test_a_data_set_without_VRs_under_any_syntax(syntax: str) -> None:
    data = part10(syntax, bare("MR_small_implicit.dcm"))
    found = header_of(data)
    assert found.TransferSyntaxUID == syntax
    assert found.part10
    assert not found.explicit
    assert found.PatientID == header_of(whole("MR_small_implicit.dcm")).PatientID


@pytest.mark.parametrize("syntax", ["1.2.3.4", IMPLICIT_LITTLE])
def test_a_data_set_with_VRs_under_any_syntax(syntax: str) -> None:
    found = header_of(part10(syntax, bare("CT_small.dcm")))
    assert found.TransferSyntaxUID == syntax
    assert found.explicit


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"])
def test_deflated_by_jpip(syntax: str) -> None:
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    data = part10(syntax, deflate.compress(bare("CT_small.dcm")) + deflate.flush())
    assert header_of(data).SOPInstanceUID == header_of(whole("CT_small.dcm")).SOPInstanceUID


BLANKS: dict[str, bytes] = {
    "blanks, short": element(8, 0x70, b"  ", b"maker!"),
    "zeros, short": element(8, 0x70, b"\0\0", b"maker!"),
    "question marks": element(8, 0x70, b"??", b"maker!"),
    "empty": element(8, 0x70, b"  ", b""),
    "long": element(8, 0x70, b"  ", b"maker!", "long"),
    "at the end of the VRs": element(0x18, 0x10, b"  ", b"contrast"),
}


@pytest.mark.parametrize("kind", BLANKS)
def test_blank_VRs(kind: str) -> None:
    begin = element(8, 0x16, b"UI", b"1.2.840.10008.5.1.4.1.1.2\0") + element(8, 0x18, b"UI", UID)
    data = part10(EXPLICIT_LITTLE, begin + BLANKS[kind] + element(0x20, 0x0D, b"UI", b"1.2.34"))
    found = header_of(data)
    assert found.SOPInstanceUID == UID.decode()
    assert found.StudyInstanceUID == "1.2.34"


def test_a_blank_VR_of_which_no_reading_makes_sense_is_damage() -> None:
    data = part10(EXPLICIT_LITTLE, element(8, 0x18, b"UI", UID) + b"\x08\0\x70\0  \xff\xffrubbish")
    with pytest.raises(Damaged, match="VR"):
        header_of(data)


def test_odd_lengths_are_noticed(tmp_path: Path) -> None:
    begin = element(8, 0x16, b"UI", b"1.2.840.10008.5.1.4.1.1.2\0") + element(8, 0x18, b"UI", UID)
    assert not header_of(part10(EXPLICIT_LITTLE, begin)).odd
    assert header_of(part10(EXPLICIT_LITTLE, begin + element(8, 0x70, b"LO", b"odd"))).odd
    two = element(8, 0x70, b"LO", b"odd") + element(8, 0x80, b"LO", b"too")
    assert header_of(part10(EXPLICIT_LITTLE, begin + two)).odd
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 3) + b"odd"
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF) + item + item + end
    assert header_of(part10("1.2.840.10008.1.2.4.50", begin + pixels)).odd
    path = studies.write(tmp_path / "a", whole("image_dfl.dcm"))
    fd = os.open(path, os.O_RDONLY)
    assert read_header(fd, path.stat().st_size).odd
    os.close(fd)
