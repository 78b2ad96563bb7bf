"""Deflated data sets that inflate to a thousand times their size cost neither memory nor time."""

from __future__ import annotations

import os
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian

from imaging import header as headers
from imaging import transcode
from imaging.header import Damaged, inflated_limit, read_header
from imaging.pixels import Reader
from talaria.testing import studies

BOMB_BYTES = 128 << 10  # which inflate to 128 MiB


def deflated(pieces: Iterator[bytes] | list[bytes]) -> bytes:
    deflate = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    data = b"".join(deflate.compress(piece) for piece in pieces)
    return data + deflate.flush()


def whole(data: bytes) -> bytes:
    """Return a file whose deflated data set is `data`."""
    made = studies.data_file("image_dfl.dcm").read_bytes()
    header_bytes = made[: _offset(made)]
    return header_bytes + data


def _offset(made: bytes) -> int:
    fd = os.memfd_create("made")
    try:
        os.write(fd, made)
        return read_header(fd, len(made)).dataset_offset
    finally:
        os.close(fd)


@pytest.fixture(autouse=True)
def _bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds a hundredth as large, for bombs a hundredth as large."""
    monkeypatch.setattr(headers, "INFLATED_BYTES", 4 << 20)
    monkeypatch.setattr(headers, "END_BYTES", 2 << 20)


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image whose pixel data are zeros without end, as long as zlib can say in so few bytes."""
    made = studies.data_file("image_dfl.dcm").read_bytes()
    plain = zlib.decompress(made[_offset(made) :], -zlib.MAX_WBITS)
    at = plain.rindex(b"\xe0\x7f\x10\x00")
    deflate = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    head = deflate.compress(plain[:at] + b"\xe0\x7f\x10\x00OB\0\0\xfe\xff\xff\xff") + deflate.flush(zlib.Z_FULL_FLUSH)
    # Blocks after a full flush stand for themselves: one of them, again and again.
    other = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    zeros = other.compress(bytes(8 << 20)) + other.flush(zlib.Z_FULL_FLUSH)
    end = zlib.compressobj(9, wbits=-zlib.MAX_WBITS).flush()
    path = tmp_path_factory.mktemp("bomb") / "bomb.dcm"
    path.write_bytes(whole(head + zeros * (BOMB_BYTES // len(zeros)) + end))
    return path


def test_its_header_costs_nothing(bomb: Path) -> None:
    size = bomb.stat().st_size
    with bomb.open("rb") as file:
        tracemalloc.start()
        begun = time.process_time()
        header = read_header(file.fileno(), size)
        took = time.process_time() - begun
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert header.TransferSyntaxUID == DeflatedExplicitVRLittleEndian
    assert peak < 16 << 20
    assert took < 1  # 4 MB of 128 MB; milliseconds on an idle machine


def test_it_is_refused_where_it_would_have_to_be_inflated(bomb: Path, tmp_path: Path) -> None:
    size = bomb.stat().st_size
    with bomb.open("rb") as file, open(tmp_path / "out", "wb") as out:
        offset = read_header(file.fileno(), size).dataset_offset
        with pytest.raises(Damaged, match="far more than images do"):
            transcode.inflate(Reader(file.fileno(), offset), out, lambda: None)
    assert (tmp_path / "out").stat().st_size <= inflated_limit(size) + (2 << 20)


def test_images_that_deflate_well_are_taken(tmp_path: Path) -> None:
    """Zeros, as most of a segmentation is."""
    size = 4 << 20
    path = tmp_path / "zeros"
    path.write_bytes(whole(deflated([bytes(size)])))
    offset = _offset(studies.data_file("image_dfl.dcm").read_bytes())
    with path.open("rb") as file, open(tmp_path / "out", "wb") as out:
        transcode.inflate(Reader(file.fileno(), offset), out, lambda: None)
    assert (tmp_path / "out").stat().st_size == size


@pytest.mark.parametrize("cut", [100, 5000])
def test_one_that_is_cut_short_is_damaged(tmp_path: Path, cut: int) -> None:
    data = studies.data_file("image_dfl.dcm").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(data[: -cut - 1])
    with open(tmp_path / "cut.dcm", "rb") as file, pytest.raises(Damaged):
        read_header(file.fileno(), len(data) - cut - 1)


def test_the_bounds_follow_from_the_size() -> None:
    assert inflated_limit(0) == headers.INFLATED_BYTES
    assert inflated_limit(10) - inflated_limit(0) == 10 * headers.INFLATED_TIMES
