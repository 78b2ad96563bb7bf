"""What a damaged file still says of itself: what stands before the damage, in every encoding, and nothing else."""

from __future__ import annotations

import io
from pathlib import Path

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imaging.remains import Remains, remains
from talaria.testing import studies
from tests.imaging.encoded import opened

DATA = Path(pydicom.__file__).parent / "data" / "test_files"
CUTS = 60  # of each file, more of them where its header is


def left(data: bytes) -> Remains:
    with opened(data) as fd:
        return remains(fd, len(data))


def whole(data: bytes) -> Remains:
    with studies.quiet():
        ds = pydicom.dcmread(io.BytesIO(data), force=True)
        names = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "AccessionNumber")
        return Remains(*(str(ds.get(name) or "").strip() for name in names))


@pytest.mark.parametrize(
    "name",
    ["CT_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm", "image_dfl.dcm",
     "ExplVR_BigEndNoMeta.dcm", "ExplVR_LitEndNoMeta.dcm", "rtstruct.dcm"],
)  # fmt: skip
def test_a_cut_file_says_what_stands_before_the_cut(name: str) -> None:
    data = (DATA / name).read_bytes()
    wanted, said = whole(data), set()
    for part in range(1, CUTS):
        found = left(data[: max(1, int(len(data) * (part / CUTS) ** 3))])
        for value, full in zip(found, wanted, strict=True):
            assert value in ("", full)
        said.add(found)
    assert wanted in said and len(said) > 2
    assert left(data[: len(data) - 5]) == wanted


def test_a_damage_in_the_data_set_leaves_what_the_file_meta_information_says() -> None:
    data = (DATA / "CT_small.dcm").read_bytes()
    at = data.index(b"\x08\x00\x05\x00CS")
    assert left(data[:at] + b"\xf5" * (len(data) - at)) == Remains(instance=whole(data).instance)


@given(st.binary(max_size=400))
def test_anything_may_be_read(data: bytes) -> None:
    left(data)
    left(bytes(128) + b"DICM" + data)
    left(studies.ct_bytes()[:300] + data)
