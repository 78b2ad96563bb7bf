"""A glance at an instance's first bytes: what it shows is what a walk over all elements finds, or it shows nothing."""

from __future__ import annotations

import functools
import os
import random
import struct

import pytest

from imaging.glance import HEAD_BYTES, Glance
from imaging.header import Damaged, Header, read_header
from talaria.testing import studies

UNCOMPRESSED = ("CT_small.dcm", "MR_small.dcm", "MR_small_implicit.dcm")
OTHERS = ("JPEG2000.dcm", "image_dfl.dcm", "ExplVR_BigEnd.dcm", "test-SR.dcm", "rtplan.dcm")


def walked(file: bytes) -> Header:
    fd = os.memfd_create("glance")
    try:
        os.write(fd, file)
        return read_header(fd, len(file))
    finally:
        os.close(fd)


def glanced(file: bytes) -> Header | None:
    header = walked(file)
    data = file[header.dataset_offset :]
    return Glance()(data[:HEAD_BYTES], len(data), header.TransferSyntaxUID, header.dataset_offset)


def uids(header: Header) -> tuple[str, ...]:
    return (
        header.SOPClassUID, header.SOPInstanceUID, header.TransferSyntaxUID, header.StudyInstanceUID,
        header.SeriesInstanceUID,
    )  # fmt: skip


@functools.cache
def plain(name: str) -> bytes:
    with studies.quiet():
        ds = studies.dataset(name)
        if "DataSetTrailingPadding" in ds:
            del ds.DataSetTrailingPadding
        return studies.encoded(ds)


@pytest.mark.parametrize("name", UNCOMPRESSED)
def test_an_uncompressed_image_is_known_at_a_glance(name: str) -> None:
    file = plain(name)
    seen = glanced(file)
    assert seen is not None and uids(seen) == uids(walked(file))


@pytest.mark.parametrize("name", OTHERS)
def test_what_needs_a_walk_shows_nothing(name: str) -> None:
    assert glanced(studies.encoded(studies.dataset(name))) is None


@pytest.mark.parametrize("name", UNCOMPRESSED)
def test_what_is_cut_or_has_bytes_too_many_shows_nothing(name: str) -> None:
    file = plain(name)
    header = walked(file)
    whole = file[header.dataset_offset :]
    for size in [*random.Random(1).sample(range(len(whole) + 100), 300), len(whole)]:
        cut = (whole + bytes(100))[:size]
        seen = Glance()(cut[:HEAD_BYTES], len(cut), header.TransferSyntaxUID, 0)
        assert (seen is not None) == (size == len(whole)), size


@pytest.mark.parametrize("name", UNCOMPRESSED)
def test_whatever_a_bit_becomes_no_other_uids_are_seen_than_a_walk_finds(name: str) -> None:
    file = plain(name)
    header = walked(file)
    end = file.index(b"\xe0\x7f\x10\x00")
    chance, glance = random.Random(2), Glance()
    for _ in range(300):
        other = bytearray(file)
        other[chance.randint(header.dataset_offset, end)] ^= 1 << chance.randint(0, 7)
        data = bytes(other[header.dataset_offset :])
        seen = glance(data[:HEAD_BYTES], len(data), header.TransferSyntaxUID, header.dataset_offset)
        if seen is not None:
            try:
                found = walked(bytes(other))
            except Damaged:
                continue  # an element of no interest here is damaged; the instance is the one that it says
            # A length that is wrong leads the walk past elements, the glance not.
            assert all(other in (ours, "") for ours, other in zip(uids(seen), uids(found), strict=True))


def test_uids_of_items_are_not_taken_for_those_of_the_instance() -> None:
    from pydicom.dataset import Dataset

    ds = studies.dataset()
    del ds.DataSetTrailingPadding
    item = Dataset()
    item.StudyInstanceUID, item.SeriesInstanceUID = studies.uid(), studies.uid()
    ds.RelatedSeriesSequence = [item]
    assert glanced(studies.encoded(ds)) is None
    ds.RelatedSeriesSequence[0].clear()
    assert glanced(studies.encoded(ds)) is not None


def test_a_length_beyond_the_head_shows_nothing() -> None:
    file = plain("CT_small.dcm")
    header = walked(file)
    data = bytearray(file[header.dataset_offset :])
    at = data.index(b"\x20\x00\x0d\x00UI")
    struct.pack_into("<H", data, at + 6, 60_000)
    assert Glance()(bytes(data[:HEAD_BYTES]), len(data), header.TransferSyntaxUID, 0) is None


def test_instances_of_series_after_series_are_known_each() -> None:
    """Of one class and series, of another, and in files that begin otherwise; whatever instance their request names."""
    glance = Glance()
    for number in range(40):
        series = f"1.2.{number // 8}"
        sop_class = "1.2.840.10008.5.1.4.1.1.2" + ".1" * (number % 3 // 2)
        with studies.quiet():
            ds = studies.dataset(
                study="1.2.3", series=series, SOPInstanceUID=f"1.2.3.{10 ** (number % 8)}", InstanceNumber=10**number,
                StationName="x" * (number % 16), SOPClassUID=sop_class, ImageType=["DERIVED"] * (1 + number % 5 // 4),
            )  # fmt: skip
            del ds.DataSetTrailingPadding
            file = studies.encoded(ds)
        header = walked(file)
        data = file[header.dataset_offset :]
        offset = header.dataset_offset + number % 2
        likely = (("", ""), (sop_class, header.SOPInstanceUID), (sop_class, "1.2.99"))[number % 3]
        seen = glance(data[:HEAD_BYTES], len(data), header.TransferSyntaxUID, offset, likely)
        assert seen is not None and uids(seen) == uids(header) and seen.dataset_offset == offset
