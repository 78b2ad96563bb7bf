"""Reading headers: against pydicom on all of its files, cut at every byte, and with anything for a file."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.filereader import data_element_generator
from pydicom.uid import DeflatedExplicitVRLittleEndian

from imaging.header import EXPLICIT_BIG, EXPLICIT_LITTLE, IMPLICIT_LITTLE, Damaged, Header, NotDicom, read_header
from talaria.testing import studies
from tests.imaging.encoded import element, header_of, opened, part10

FILES = sorted(
    path
    for path in (Path(pydicom.__file__).parent / "data").rglob("*")
    if path.is_file() and path.suffix not in (".py", ".pyc", ".json", ".txt", ".md", ".gz", ".icc", ".dump")
)
# What pydicom reads without complaint, and we refuse, and why.
REFUSED = {
    "MR_truncated.dcm": "truncated",
    "rtplan_truncated.dcm": "truncated",
    "empty_charset_LEI.dcm": "SOP Class UID",
    "chrSQEncoding.dcm": "SOP Class UID",
    "chrSQEncoding1.dcm": "SOP Class UID",
    "UN_sequence.dcm": "SOP Class UID",
    "meta_missing_tsyntax.dcm": "Transfer Syntax",  # and no SOP class
    "nested_priv_SQ.dcm": "SOP Class UID",
    "no_meta_group_length.dcm": "SOP Class UID",
    "priv_SQ.dcm": "SOP Class UID",
}
# Data sets without preamble or file meta information: transfer syntax, and where they begin.
BARE = {
    "ExplVR_BigEndNoMeta.dcm": (EXPLICIT_BIG, 0),
    "ExplVR_LitEndNoMeta.dcm": (EXPLICIT_LITTLE, 0),
    "no_meta.dcm": (EXPLICIT_LITTLE, 1),  # cut out with the padding of what came before
    "rtstruct.dcm": (IMPLICIT_LITTLE, 0),
}
KEYWORDS = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "SeriesNumber", "StudyDate",
    "StudyTime", "AccessionNumber", "PatientID",
)  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_reads_what_pydicom_reads(path: Path) -> None:
    data = path.read_bytes()
    with studies.quiet():
        try:
            wanted = pydicom.dcmread(io.BytesIO(data))
        except pydicom.errors.InvalidDicomError:
            if path.name in BARE:
                found = header_of(data)
                assert (found.TransferSyntaxUID, found.dataset_offset) == BARE[path.name]
                assert not found.part10
                return
            with pytest.raises((NotDicom, Damaged)):
                header_of(data)
            return
    if wanted.file_meta.get("MediaStorageSOPClassUID") == "1.2.840.10008.1.3.10":
        with pytest.raises(NotDicom, match="DICOMDIR"):
            header_of(data)
        return
    if path.name in REFUSED:
        with pytest.raises(Damaged, match=REFUSED[path.name]):
            header_of(data)
        return
    found = header_of(data)
    assert found.part10
    assert found.explicit is (path.name != "SC_rgb_jpeg.dcm" and found.TransferSyntaxUID != IMPLICIT_LITTLE)
    assert found.TransferSyntaxUID == wanted.file_meta.TransferSyntaxUID
    for keyword in KEYWORDS:
        value = wanted.get(keyword)
        assert getattr(found, keyword) == ("" if value is None else str(value)), keyword
    stream = io.BytesIO(data)
    with studies.quiet():
        pydicom.filereader.read_preamble(stream, False)
        pydicom.filereader._read_file_meta_info(stream)
    assert found.dataset_offset == stream.tell()


SMALL = (
    "SC_rgb_small_odd.dcm", "SC_rgb_small_odd_big_endian.dcm", "rtdose_1frame.dcm", "rtdose_expb_1frame.dcm",
    "SC_rgb_rle.dcm", "JPEGLSNearLossless_08.dcm", "reportsi.dcm", "rtplan.dcm", "image_dfl.dcm", "CT_small.dcm",
)  # fmt: skip


def ends_of_elements(data: bytes, header: Header) -> set[int]:
    """Where pydicom sees a top-level element end: a file cut there is a data set, if a shorter one."""
    stream = io.BytesIO(data)
    stream.seek(header.dataset_offset)
    ends = set()
    implicit = header.TransferSyntaxUID == "1.2.840.10008.1.2"
    little = header.TransferSyntaxUID != "1.2.840.10008.1.2.2"
    with studies.quiet():
        for _ in data_element_generator(stream, implicit, little):
            ends.add(stream.tell())
    return ends


@pytest.mark.parametrize("name", SMALL)
def test_every_prefix_is_refused_or_a_data_set(name: str) -> None:
    data = studies.data_file(name).read_bytes()
    places = list(range(len(data)))
    if name == "CT_small.dcm":  # of its pixel data, a few places stand for all
        places = places[:7000] + places[7000::997]
    whole = header_of(data)
    if whole.TransferSyntaxUID == DeflatedExplicitVRLittleEndian:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        inflate.decompress(data[whole.dataset_offset :])
        complete = set(range(len(data) - len(inflate.unused_data), len(data)))  # what follows its end is no data
    else:
        complete = ends_of_elements(data, whole)
        assert len(data) in complete
    accepted = set()
    with opened(data) as fd:
        for size in reversed(places):
            os.ftruncate(fd, size)
            try:
                found = read_header(fd, size)
            except (Damaged, NotDicom):
                continue
            accepted.add(size)
            assert found.SOPInstanceUID == whole.SOPInstanceUID
    assert accepted <= complete, sorted(accepted - complete)[:20]


def test_a_cut_while_reading_is_noticed() -> None:
    """The size that was asked for a moment ago is no longer there."""
    data = studies.ct_bytes()
    with opened(data[:5000]) as fd, pytest.raises(Damaged, match="truncated"):
        read_header(fd, len(data))


ANYTHING = (Damaged, NotDicom)


@given(st.binary(max_size=600))
def test_anything_is_refused_or_read(data: bytes) -> None:
    for content in (data, bytes(128) + b"DICM" + data):
        try:
            header_of(content)
        except ANYTHING:
            continue


TEMPLATES = tuple(
    studies.data_file(name).read_bytes() for name in ("reportsi.dcm", "rtplan.dcm", "SC_rgb_rle.dcm", "image_dfl.dcm")
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.sampled_from(TEMPLATES),
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from(("set", "cut", "add")), st.binary(max_size=8)), max_size=6),
)
def test_a_damaged_file_is_refused_or_read(data: bytes, changes: list[tuple[float, str, bytes]]) -> None:
    for where, what, new in changes:
        at = 132 + int(where * max(0, len(data) - 132))
        if what == "set":
            data = data[:at] + new + data[at + len(new) :]
        elif what == "cut":
            data = data[:at] + data[at + len(new) :]
        else:
            data = data[:at] + new + data[at:]
    try:
        found = header_of(data)
    except ANYTHING:
        return
    assert found.SOPClassUID
    assert found.SOPInstanceUID
    assert len(found.SOPInstanceUID) <= 64
    assert found.dataset_offset <= len(data)


def test_sequences_without_end_are_refused_not_followed() -> None:
    deep = b"\x40\x00\x30\xa7SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 5000
    with pytest.raises(Damaged, match="nested"):
        header_of(studies.ct_bytes() + deep)


def test_a_length_of_gigabytes_costs_nothing() -> None:
    data = studies.ct_bytes()
    at = data.index(b"\x10\x00\x20\x00LO")
    large = 1 << 31
    patched = data[:at] + b"\x10\x00\x20\x00UT\0\0" + struct.pack("<I", large)
    with opened(patched) as fd:
        os.ftruncate(fd, len(patched) + large)  # sparse
        header = read_header(fd, len(patched) + large)
    assert header.PatientID == ""
    meta = data[:132] + b"\x02\x00\x02\x01OB\0\0" + struct.pack("<I", large)
    with opened(meta) as fd:
        os.ftruncate(fd, len(meta) + large + 8)
        with pytest.raises(ANYTHING):
            read_header(fd, len(meta) + large + 8)


@pytest.mark.parametrize("zeros", [1, 2, 8, 500, 100_000])
def test_zeros_after_pixel_data_are_padding(zeros: int) -> None:
    data = studies.ct_bytes()
    assert header_of(data + bytes(zeros)).SOPInstanceUID == header_of(data).SOPInstanceUID


def test_zeros_and_then_something_are_damage() -> None:
    with pytest.raises(Damaged):
        header_of(studies.ct_bytes() + bytes(16) + b"\x08\x00")


def test_the_position_of_the_file_stays() -> None:
    data = studies.ct_bytes()
    with opened(data) as fd:
        os.lseek(fd, 17, os.SEEK_SET)
        read_header(fd, len(data))
        assert os.lseek(fd, 0, os.SEEK_CUR) == 17


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated", "truncated"),
        ("truncated-pixels", "truncated"),
        ("empty", "empty"),
        ("no-preamble", "preamble"),
        ("no-sop-instance-uid", "SOP Instance UID"),
        ("meta-only", "truncated"),
    ],
)
def test_damaged_files_say_why(tmp_path: Path, kind: str, reason: str) -> None:
    with pytest.raises(Damaged, match=reason):
        header_of(studies.damaged(tmp_path)[kind].read_bytes())


@pytest.mark.parametrize("value", [b"1.2.3\0", b"1.2.3 ", b"1.2.3\0\0\0", b"1.2.3\x004.5", b"1.2.3 \0rest"])
def test_what_is_behind_a_nul_is_not_of_a_value(value: bytes) -> None:
    """A ledger in PostgreSQL takes no text with a NUL, nor does SQLite find one in a list again."""
    uids = [element(8, 0x16, b"UI", value), element(8, 0x18, b"UI", value), element(8, 0x50, b"SH", value)]
    header = header_of(part10(EXPLICIT_LITTLE, b"".join([*uids, element(0x20, 0xD, b"UI", value)])))
    assert (header.SOPClassUID, header.SOPInstanceUID, header.StudyInstanceUID) == ("1.2.3",) * 3
    assert header.AccessionNumber == "1.2.3"


def test_what_is_no_dicom(tmp_path: Path) -> None:
    for data in (studies.png(tmp_path / "a.png").read_bytes(), b"{}", b"%PDF-1.7\n" + bytes(300), b"x" * 132):
        with pytest.raises(NotDicom):
            header_of(data)


def test_repr_shows_nothing_of_the_patient() -> None:
    header = header_of(studies.encoded(studies.dataset()))
    assert header.PatientID == studies.PATIENT_ID
    assert studies.PATIENT_ID not in repr(header)
    assert studies.ACCESSION not in repr(header)
