"""Converts a file as a driver does, and compares it with what it was."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels.utils import pixel_array

from imaging.header import Header, read_header
from imaging.transcode import converted
from talaria.testing import studies
from tests.servers import wire


def convert(data: bytes, folder: Path, *targets: str) -> bytes:
    """Convert a file given as bytes; return the converted file."""
    path = studies.write(folder / "source.dcm", data)
    fd = os.open(path, os.O_RDONLY)
    try:
        header = read_header(fd, len(data))
        with converted(fd, header.dataset_offset, header.TransferSyntaxUID, targets) as made:
            whole = os.pread(made.fd, made.size + 1, 0)
            assert len(whole) == made.size
            assert len(whole) % 2 == 0
            out = wire.part10(header.SOPClassUID, header.SOPInstanceUID, made.syntax, whole)
    finally:
        os.close(fd)
    assert header_of(out, folder).SOPInstanceUID == header.SOPInstanceUID
    return out


def header_of(data: bytes, folder: Path) -> Header:
    path = studies.write(folder / "converted.dcm", data)
    with path.open("rb") as file:
        return read_header(file.fileno(), len(data))


def read(data: bytes) -> Dataset:
    with studies.quiet():
        return pydicom.dcmread(io.BytesIO(data))


def pixels_of(data: bytes, *, raw: bool = True) -> Any:
    with studies.quiet():
        return pixel_array(read(data), raw=raw)


PIXEL_TAGS = {0x7FE00010, 0x7FE00001, 0x7FE00002, 0x7FE00003, 0x00280004, 0x00280006}


def source_file(name: str) -> bytes:
    """One of pydicom's test files; made an instance where it is none."""
    if name in ("priv_SQ.dcm", "UN_sequence.dcm"):
        return studies.encoded(studies.dataset(name, SOPClassUID="1.2.840.10008.5.1.4.1.1.7"))
    return studies.data_file(name).read_bytes()


def assert_same_elements(a: Dataset, b: Dataset, *, swapped: bool = False) -> None:
    """Assert that all elements but those of the pixel data are equal; `swapped` if the byte order changed."""
    with studies.quiet():
        _assert_same_elements(a, b, swapped)


def _assert_same_elements(a: Dataset, b: Dataset, swapped: bool) -> None:

    def tags(ds: Dataset) -> set[int]:
        return {int(tag) for tag in ds.keys() if tag.element} - PIXEL_TAGS  # noqa: SIM118 (it iterates over elements)

    assert tags(a) == tags(b)
    for tag in tags(a):
        one, other = a[tag], b[tag]
        if one.VR == "SQ" and other.VR == "SQ":
            assert len(one.value) == len(other.value)
            for item, copy in zip(one.value, other.value, strict=True):
                _assert_same_elements(item, copy, swapped)
        elif one.VR == other.VR and not (swapped and one.VR == "OW"):
            assert one.value == other.value, one.tag
        elif one.VR == "OW" == other.VR:
            assert other.value == np.frombuffer(one.value, "u2").byteswap().tobytes()
        # Else: without VRs in the source the reader's dictionary chose, which may differ for private elements.
