"""Conversion between transfer syntaxes: what is chosen, and that nothing but the encoding changes."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames, get_frame, parse_basic_offsets

from imaging import pixels, transcode
from imaging.header import read_header
from imaging.pixels import EXPLICIT, JPEG_2000, JPEG_2000_LOSSY, JPEG_LS, JPEG_LS_NEAR, RLE, Unfit
from imaging.transcode import ANY, BIG, DEFLATED, IMPLICIT, LOSSLESS, NEVER, NoRoom, converted, fallbacks
from talaria.testing import studies
from talaria.testing.process import program
from tests.conversion import assert_same_elements, convert, header_of, pixels_of, read
from transfer.errors import Cancelled

JPEG_BASELINE, JPEG_LOSSLESS = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.70"
MPEG2 = "1.2.840.10008.1.2.4.100"

COMPRESSED_FILES = (
    "MR_small_RLE.dcm", "SC_rgb_rle.dcm", "SC_rgb_rle_2frame.dcm", "SC_rgb_rle_16bit_2frame.dcm", "rtdose_rle.dcm",
    "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "SC_rgb_jpeg_gdcm.dcm", "J2K_pixelrep_mismatch.dcm",
    "GDCMJ2K_TextGBR.dcm", "examples_jpeg2k.dcm",
    "JPEG2000.dcm", "693_J2KI.dcm", "JPGExtended.dcm", "JPEGLSNearLossless_16.dcm", "SC_rgb_jls_lossy_line.dcm",
    "SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_dcmtk_+eb+cy+s4.dcm", "examples_ybr_color.dcm",
)  # fmt: skip


# ---- what is chosen


@pytest.mark.parametrize("syntax", [EXPLICIT, JPEG_2000, JPEG_BASELINE, DEFLATED, MPEG2, "1.2.3"])
def test_never_converts_nothing(syntax: str) -> None:
    assert fallbacks(syntax, NEVER) == ()


@pytest.mark.parametrize("policy", [NEVER, LOSSLESS, ANY])
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG, DEFLATED, JPEG_2000, JPEG_BASELINE, RLE, MPEG2])
def test_own_syntax_is_no_fallback(syntax: str, policy: str) -> None:
    assert syntax not in fallbacks(syntax, policy)


@pytest.mark.parametrize(
    ("syntax", "accepted", "policy", "wanted"),
    [
        (JPEG_2000, {IMPLICIT}, LOSSLESS, (IMPLICIT,)),
        (JPEG_2000, {IMPLICIT, EXPLICIT}, LOSSLESS, (EXPLICIT, IMPLICIT)),
        (JPEG_LOSSLESS, {JPEG_LS, RLE}, LOSSLESS, (JPEG_LS, RLE)),
        (EXPLICIT, {IMPLICIT, JPEG_2000}, LOSSLESS, (IMPLICIT, JPEG_2000)),
        (EXPLICIT, {JPEG_BASELINE}, LOSSLESS, ()),
        (EXPLICIT, {JPEG_BASELINE}, ANY, ()),  # never with loss
        (EXPLICIT, {JPEG_2000_LOSSY, JPEG_LS_NEAR}, LOSSLESS, ()),
        (EXPLICIT, {JPEG_2000_LOSSY, JPEG_LS_NEAR}, ANY, (JPEG_2000_LOSSY, JPEG_LS_NEAR)),
        (BIG, {EXPLICIT, IMPLICIT}, LOSSLESS, (EXPLICIT, IMPLICIT)),
        (DEFLATED, {IMPLICIT}, LOSSLESS, (IMPLICIT,)),
        (IMPLICIT, {BIG}, ANY, ()),  # retired: read, never written
        # What was compressed with loss is decompressed, but not compressed again unless the policy says so.
        (JPEG_BASELINE, {EXPLICIT, JPEG_2000}, LOSSLESS, (EXPLICIT,)),
        (JPEG_BASELINE, {JPEG_2000, JPEG_LS, RLE}, LOSSLESS, ()),
        (JPEG_BASELINE, {JPEG_2000, RLE}, ANY, (JPEG_2000, RLE)),
        (JPEG_2000_LOSSY, {JPEG_2000}, LOSSLESS, ()),
        (MPEG2, {EXPLICIT, IMPLICIT}, ANY, ()),
        ("1.2.3", {EXPLICIT}, ANY, ()),
    ],
)
def test_fallbacks(syntax: str, accepted: set[str], policy: str, wanted: tuple[str, ...]) -> None:
    assert tuple(each for each in fallbacks(syntax, policy) if each in accepted) == wanted


@pytest.mark.parametrize("policy", [NEVER, LOSSLESS, ANY])
def test_nothing_is_ever_converted_to_a_syntax_that_loses(policy: str) -> None:
    known = {*transcode.ENCODINGS, *transcode.LOSSLESS_SYNTAXES, *transcode.LOSSY_SYNTAXES}
    for syntax in known:
        for to in fallbacks(syntax, policy):
            assert to != syntax
            assert to in transcode.ENCODINGS or pixels.ENCODERS[to] in transcode.LOSSLESS_SYNTAXES


# ---- with codecs


@pytest.mark.parametrize("to", [EXPLICIT, IMPLICIT, DEFLATED])
@pytest.mark.parametrize("name", COMPRESSED_FILES)
def test_decompressed(name: str, to: str, tmp_path: Path) -> None:
    source = studies.data_file(name).read_bytes()
    got = convert(source, tmp_path, to)
    a, b = read(source), read(got)
    assert np.array_equal(pixels_of(source), pixels_of(got))
    assert np.array_equal(pixels_of(source, raw=False), pixels_of(got, raw=False)), "another colour"
    assert_same_elements(a, b)
    assert ("OB" if a.BitsAllocated <= 8 and to != IMPLICIT else "OW") == b["PixelData"].VR
    assert len(b.PixelData) == pixels_of(got).nbytes + pixels_of(got).nbytes % 2
    assert "YBR_FULL_422" not in b.PhotometricInterpretation, "every pixel has its own colour now"
    if a.SamplesPerPixel > 1:
        assert b.PlanarConfiguration == 0
    else:
        assert a.PhotometricInterpretation == b.PhotometricInterpretation


@pytest.mark.parametrize("to", [JPEG_2000, JPEG_LS, RLE, JPEG_2000_LOSSY, JPEG_LS_NEAR])
@pytest.mark.parametrize(
    "name",
    ["CT_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "image_dfl.dcm", "examples_rgb_color.dcm",
     "MR_small_RLE.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_jp2klossless.dcm", "examples_palette.dcm",
     "SC_rgb_rle_16bit_2frame.dcm", "SC_ybr_full_422_uncompressed.dcm", "examples_ybr_color.dcm"],
)  # fmt: skip
def test_compressed_without_loss(name: str, to: str, tmp_path: Path) -> None:
    source = studies.data_file(name).read_bytes()
    if header_of(source, tmp_path).TransferSyntaxUID == to:
        return
    got = convert(source, tmp_path, to)
    a, b = read(source), read(got)
    assert np.array_equal(pixels_of(source), pixels_of(got))
    assert np.array_equal(pixels_of(source, raw=False), pixels_of(got, raw=False)), "another colour"
    assert_same_elements(a, b, swapped="bigendian" in name)
    assert b["PixelData"].is_undefined_length
    frames = list(generate_frames(b.PixelData, number_of_frames=int(b.get("NumberOfFrames", 1))))
    assert len(frames) == int(a.get("NumberOfFrames", 1))
    table = parse_basic_offsets(b.PixelData)
    assert len(table) == (len(frames) if len(frames) > 1 else 0)
    if table:
        for offset, frame in zip(table, frames, strict=True):
            start = 8 + 4 * len(table) + offset
            assert b.PixelData[start + 8 : start + 8 + len(frame.rstrip(b"\0"))] == frame.rstrip(b"\0")


@pytest.mark.parametrize(
    ("decompress", "name"),
    [
        ("dcmdjpeg", "SC_rgb_jpeg_gdcm.dcm"),
        ("dcmdrle", "MR_small_RLE.dcm"),
        ("dcmdjpls", "MR_small_jpeg_ls_lossless.dcm"),
    ],
)
def test_dcmtk_decodes_to_the_same(decompress: str, name: str, tmp_path: Path) -> None:
    ours = read(convert(studies.data_file(name).read_bytes(), tmp_path, EXPLICIT))
    subprocess.run([program(decompress), studies.data_file(name), tmp_path / "theirs.dcm"], check=True)
    theirs = read((tmp_path / "theirs.dcm").read_bytes())
    assert np.array_equal(ours.pixel_array, theirs.pixel_array)


@pytest.mark.parametrize(("decompress", "to"), [("dcmdrle", RLE), ("dcmdjpls", JPEG_LS)])
@pytest.mark.parametrize("name", ["CT_small.dcm", "examples_rgb_color.dcm", "SC_rgb_rle_2frame.dcm"])
def test_dcmtk_decodes_what_we_compress(decompress: str, to: str, name: str, tmp_path: Path) -> None:
    source = studies.data_file(name).read_bytes()
    if header_of(source, tmp_path).TransferSyntaxUID == to:
        return
    studies.write(tmp_path / "ours.dcm", convert(source, tmp_path, to))
    subprocess.run([program(decompress), tmp_path / "ours.dcm", tmp_path / "theirs.dcm"], check=True)
    assert np.array_equal(read((tmp_path / "theirs.dcm").read_bytes()).pixel_array, read(source).pixel_array)


def test_samples_by_plane(tmp_path: Path) -> None:
    ds = studies.dataset("examples_rgb_color.dcm")
    by_pixel = pixels_of(studies.encoded(ds))
    ds.PixelData = np.moveaxis(by_pixel, -1, 0).tobytes()
    ds.PlanarConfiguration = 1
    source = studies.encoded(ds)
    assert np.array_equal(pixels_of(source), by_pixel)
    assert read(convert(source, tmp_path, IMPLICIT)).PlanarConfiguration == 1
    for to in (JPEG_2000, JPEG_LS, RLE):
        got = convert(source, tmp_path, to)
        assert read(got).PlanarConfiguration == 0
        assert np.array_equal(pixels_of(got), by_pixel)


def test_a_missing_planar_configuration_is_added(tmp_path: Path) -> None:
    ds = studies.dataset("SC_rgb_rle.dcm")
    del ds.PlanarConfiguration
    got = convert(studies.encoded(ds), tmp_path, EXPLICIT)
    assert read(got).PlanarConfiguration == 0
    tags = [int(element.tag) for element in read(got)]
    assert tags == sorted(tags)


def test_overlays_in_unused_bits_are_not_lost(tmp_path: Path) -> None:
    """What an encoder would drop is noticed: this instance arrives as RLE, which keeps all bits, or not at all."""
    ds = studies.dataset("CT_small.dcm")
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, 0
    values = (np.arange(ds.Rows * ds.Columns) % 4096).astype("u2")
    values[::3] |= 0x8000
    ds.PixelData = values.tobytes()
    source = studies.encoded(ds)
    with pytest.raises(Unfit, match="can't be converted"):
        convert(source, tmp_path, JPEG_2000, JPEG_LS)
    assert read(convert(source, tmp_path, IMPLICIT)).PixelData == values.tobytes()


def test_the_next_syntax_is_tried_where_an_encoder_cannot(tmp_path: Path) -> None:
    ds = studies.dataset("SC_rgb_small_odd.dcm")  # 3 x 3 pixels: too small for the JPEG encoders
    got = convert(studies.encoded(ds), tmp_path, JPEG_2000, RLE)
    assert read(got).file_meta.TransferSyntaxUID == RLE
    assert np.array_equal(pixels_of(got), pixels_of(studies.encoded(ds)))


def test_an_icon_is_decompressed_with_its_image(tmp_path: Path) -> None:
    icon = Dataset()
    icon.SamplesPerPixel, icon.PhotometricInterpretation = 1, "MONOCHROME2"
    icon.Rows = icon.Columns = 64
    icon.BitsAllocated, icon.BitsStored, icon.HighBit, icon.PixelRepresentation = 16, 16, 15, 1
    big = read(studies.data_file("MR_small_RLE.dcm").read_bytes())
    frame = get_frame(big.PixelData, 0, number_of_frames=1)
    icon.PixelData = encapsulate([frame])
    icon["PixelData"].is_undefined_length, icon["PixelData"].VR = True, "OB"
    ds = studies.dataset("MR_small_RLE.dcm")
    ds.IconImageSequence = [icon]
    got = read(convert(studies.encoded(ds), tmp_path, EXPLICIT))
    assert not got.IconImageSequence[0]["PixelData"].is_undefined_length
    assert got.IconImageSequence[0].PixelData == got.PixelData


@pytest.mark.parametrize(
    ("change", "to", "why"),
    [
        (lambda ds: setattr(ds, "NumberOfFrames", 3), EXPLICIT, "frames"),
        (lambda ds: setattr(ds, "PixelData", encapsulate([b"\0" * 64])), EXPLICIT, "decoded"),
    ],
)
def test_damaged_pixels_are_rejected(change: Callable[[Dataset], None], to: str, why: str, tmp_path: Path) -> None:
    ds = studies.dataset("SC_rgb_rle_2frame.dcm")
    change(ds)
    ds["PixelData"].is_undefined_length = True
    with pytest.raises(Unfit, match=why):
        convert(studies.encoded(ds), tmp_path, to)


@pytest.mark.parametrize(("name", "why"), [("test-SR.dcm", "no pixel data"), ("liver_1frame.dcm", "1 bits")])
def test_what_cannot_be_compressed_is_rejected(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(Unfit, match=why):
        convert(studies.data_file(name).read_bytes(), tmp_path, JPEG_2000, RLE)


def test_a_report_under_a_compressed_syntax_is_converted(tmp_path: Path) -> None:
    """Some senders label all they have with one syntax; without pixels there is nothing to decode."""
    source = studies.data_file("test-SR.dcm").read_bytes()
    explicit = (
        convert(source, tmp_path, EXPLICIT) if header_of(source, tmp_path).TransferSyntaxUID != EXPLICIT else source
    )
    labelled = explicit.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0", 1)
    assert_same_elements(read(source), read(convert(labelled, tmp_path, IMPLICIT)))


def test_missing_libraries_reject_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom.pixels.decoders.base", None)
    with pytest.raises(Unfit, match=r"install talaria\[transcode\]"):
        convert(studies.data_file("JPEG2000.dcm").read_bytes(), tmp_path, EXPLICIT)
    # What needs none of them goes on.
    assert convert(studies.data_file("MR_small_bigendian.dcm").read_bytes(), tmp_path, EXPLICIT)


def test_no_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: _Full())
    with pytest.raises(NoRoom, match="no room"):
        convert(studies.data_file("CT_small.dcm").read_bytes(), tmp_path, IMPLICIT)


class _Full(io.BytesIO):
    def write(self, data: Any) -> int:
        raise OSError(28, "No space left on device")


def test_can_be_cancelled(tmp_path: Path) -> None:
    path = studies.multiframe(tmp_path / "large.dcm", 16)
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise Cancelled("stop")

    for targets in ([IMPLICIT], [RLE], [DEFLATED]):
        calls = 0
        with path.open("rb") as file:
            header = read_header(file.fileno(), path.stat().st_size)
            with (
                pytest.raises(Cancelled),
                converted(file.fileno(), header.dataset_offset, header.TransferSyntaxUID, targets, check=check),
            ):
                pass


def test_a_decoder_that_panics_rejects_the_instance(tmp_path: Path) -> None:
    """As that of RLE does, which is in Rust, at a segment that is longer than its frame: no Exception is raised."""
    segments = [b"\x81\0" * count for count in (33, 32)]  # of 128 bytes each; 64 * 64 bytes are wanted
    head = struct.pack("<16I", 2, 64, 64 + len(segments[0]), *[0] * 13)
    ds = studies.dataset("MR_small_RLE.dcm")
    ds.PixelData = encapsulate([head + b"".join(segments)])
    ds["PixelData"].is_undefined_length = True
    with pytest.raises(Unfit, match="can't be decoded: index out of bounds"):
        convert(studies.encoded(ds), tmp_path, EXPLICIT)


def test_a_box_without_a_length_is_not_looked_behind_without_end(tmp_path: Path) -> None:
    """Some writers put the boxes of a JP2 file before the codestream; a damaged one may say that it has no length."""
    ds = studies.dataset("GDCMJ2K_TextGBR.dcm")
    (frame,) = generate_frames(ds.PixelData, number_of_frames=1)
    assert frame[4:8] == b"jP  "
    for length in (0, 7):
        ds.PixelData = encapsulate([frame[:12] + struct.pack(">I", length) + frame[16:]])
        ds["PixelData"].is_undefined_length = True
        with pytest.raises(Unfit, match="can't be decoded"):
            convert(studies.encoded(ds), tmp_path, EXPLICIT)
    assert convert(studies.data_file("GDCMJ2K_TextGBR.dcm").read_bytes(), tmp_path, EXPLICIT)


@pytest.mark.parametrize("to", [EXPLICIT, JPEG_LS, DEFLATED])
def test_a_stop_is_a_stop_wherever_it_comes(to: str) -> None:
    """Nothing is wrong with the file: taken for damage, it would be rejected for good."""
    path, calls, left = studies.data_file("SC_rgb_rle_2frame.dcm"), 0, -1

    def check() -> None:
        nonlocal calls, left
        calls, left = calls + 1, left - 1
        if not left:
            raise Cancelled("stop")

    with path.open("rb") as file:
        header = read_header(file.fileno(), path.stat().st_size)
        what = file.fileno(), header.dataset_offset, header.TransferSyntaxUID, [to]
        with converted(*what, check=check):
            pass
        for stop in range(1, calls + 1):
            left = stop
            with pytest.raises(Cancelled), converted(*what, check=check):
                pass


@pytest.mark.parametrize("to", [RLE, JPEG_LS])
def test_native_pixels_that_are_fewer_than_they_should_be_are_rejected(tmp_path: Path, to: str) -> None:
    ds = read(studies.multiframe(tmp_path / "few.dcm", 4, side=64).read_bytes())
    ds.NumberOfFrames = 5
    with pytest.raises(Unfit, match="can't be read"):
        convert(studies.encoded(ds), tmp_path, to)


def test_leaves_the_file_and_no_other_behind(tmp_path: Path) -> None:
    path = studies.dicom(tmp_path / "a.dcm", "MR_small_RLE.dcm")
    folder = tmp_path / "temporary"
    folder.mkdir()
    before = path.read_bytes()
    with path.open("rb", buffering=0) as file:
        header = read_header(file.fileno(), path.stat().st_size)
        file.seek(17)
        with converted(
            file.fileno(), header.dataset_offset, header.TransferSyntaxUID, [JPEG_LS], folder=folder
        ) as made:
            assert made.size
            assert not list(folder.iterdir()), "a crash would leave it behind"
        assert file.tell() == 17
    assert path.read_bytes() == before
    assert not list(folder.iterdir())


MEMORY = """
import os, resource, sys
import pydicom.pixels.decoders, pydicom.pixels.encoders, numpy
from imaging.transcode import converted
from imaging.header import read_header
path, to = sys.argv[1:]
fd = os.open(path, os.O_RDONLY)
header = read_header(fd, os.fstat(fd).st_size)
begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with converted(fd, header.dataset_offset, header.TransferSyntaxUID, [to], folder=os.path.dirname(path)) as made:
    print(made.size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin) // 1024)
"""


@pytest.mark.parametrize(("first", "to"), [(EXPLICIT, IMPLICIT), (RLE, EXPLICIT), (EXPLICIT, RLE)])
def test_memory_does_not_grow_with_the_file(first: str, to: str, tmp_path: Path) -> None:
    frames = 200  # of 0.5 MB
    path = studies.multiframe(tmp_path / "large.dcm", 1 if first == RLE else frames)
    if first == RLE:
        ds = read(convert(path.read_bytes(), tmp_path, RLE))
        ds.PixelData = encapsulate(list(generate_frames(ds.PixelData, number_of_frames=1)) * frames)
        ds["PixelData"].is_undefined_length, ds.NumberOfFrames = True, frames
        ds.save_as(path)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [sys.executable, "-W", "ignore", "-c", MEMORY, str(path), to]
    run = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
    size, grown = map(int, run.stdout.split())
    assert size > 100_000_000
    assert grown < 40, f"memory grew by {grown} MB"
