"""Makes small studies for tests from pydicom's own test files: fresh UIDs, odd names, damaged files, other files.

Everything is made in the folder that the caller names, and costs milliseconds: a CT image is a copy of one
template's bytes with its UIDs replaced by others of the same length.
"""

from __future__ import annotations

import functools
import json
import os
import random
import struct
import uuid
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset

# What no log, error, name or receipt may show: looked for by tests of exactly that.
PATIENT_NAME = "Quellwasser^Zyprian"
PATIENT_ID = "PHI-4711-XQ"
BIRTH_DATE = "19440229"
PHI = ("Quellwasser", PATIENT_ID, BIRTH_DATE)

ACCESSION = "ACC-2031"
STUDY_DATE = "20240229"

# Names that break programs which quote, split or decode them wrongly. All are valid UTF-8.
UNICODE_NAMES = (
    "Zürich Hauptbahnhof.dcm",
    "影像 第一.dcm",
    "ελληνικά.dcm",
    "emoji 🩻 .dcm",
    "cafe\u0301.dcm",
    "a  b.dcm",
)
SHELL_NAMES = (
    "-rf.dcm",
    "--help",
    "~root.dcm",
    "$HOME.dcm",
    "$(touch owned).dcm",
    "`touch owned`.dcm",
    "a;touch owned;.dcm",
    "a|b&c.dcm",
    "quote'single.dcm",
    'quote"double.dcm',
    "back\\slash.dcm",
    "new\nline.dcm",
    "tab\there.dcm",
    "[a-z]*?{b,c}.dcm",
    "#hash%20?q=1&b=2+3.dcm",
    "<x>.dcm",
    "!bang^.dcm",
    "=cmd.dcm",
    "a:b@c.dcm",
)
# Bytes that no UTF-8 text can have; Python shows them as surrogates.
RAW_NAMES = (os.fsdecode(b"latin-1 caf\xe9.dcm"),)


def data_file(name: str) -> Path:
    """Return one of pydicom's own test files, never one that it would have to download."""
    root = Path(pydicom.__file__).parent / "data"
    for folder in ("test_files", "charset_files", "palettes"):
        if (root / folder / name).is_file():
            return root / folder / name
    raise FileNotFoundError(name)


def uid(chars: int = 0) -> str:
    """Return a UID that is used nowhere else, exactly `chars` characters long if that is given (PS3.5 Annex B.2)."""
    number = str(uuid.uuid4().int)
    if chars:
        number = (number + str(uuid.uuid4().int))[: chars - len("2.25.")]
    return "2.25." + number


@contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom's warnings about values in its own files that the standard doesn't allow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def dataset(name: str = "CT_small.dcm", *, study: str = "", series: str = "", **changes: Any) -> Dataset:
    """Return a test file as a new instance: fresh UIDs, the test patient, and these values."""
    with quiet():
        ds = pydicom.dcmread(data_file(name))
        for keyword, value in {
            "SOPInstanceUID": uid(),
            "StudyInstanceUID": study or uid(),
            "SeriesInstanceUID": series or uid(),
            "PatientName": PATIENT_NAME,
            "PatientID": PATIENT_ID,
            "PatientBirthDate": BIRTH_DATE,
            "AccessionNumber": ACCESSION,
            "StudyDate": STUDY_DATE,
            "StudyTime": "101112",
            "StudyID": "1",
            **changes,
        }.items():
            setattr(ds, keyword, value)
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
        return ds


def encoded(ds: Dataset) -> bytes:
    """Return the bytes of the file that holds a data set."""
    with quiet():
        buffer = BytesIO()
        ds.save_as(buffer, enforce_file_format=True)
        return buffer.getvalue()


def write(path: Path, data: bytes) -> Path:
    """Write a file, making the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def dicom(path: Path, name: str = "CT_small.dcm", *, study: str = "", series: str = "", **changes: Any) -> Path:
    """Write an instance made of one of pydicom's test files."""
    return write(path, encoded(dataset(name, study=study, series=series, **changes)))


_UID_CHARS = 56


@functools.cache
def _ct_template(side: int) -> tuple[bytes, str, str, str]:
    """A CT image of side x side pixels, and its instance, series and study UID."""
    instance, series, study = uid(_UID_CHARS), uid(_UID_CHARS), uid(_UID_CHARS)
    ds = dataset(SOPInstanceUID=instance, series=series, study=study)
    # Bytes that don't compress, the same in every run.
    noise = random.Random(side).randbytes(side * side * 2)
    ds.Rows = ds.Columns = side
    ds.PixelData = noise
    if "DataSetTrailingPadding" in ds:
        del ds.DataSetTrailingPadding
    return encoded(ds), instance, series, study


def ct_bytes(*, side: int = 16, study: str = "", series: str = "") -> bytes:
    """Return the file of one new CT image; UIDs that are given must be 56 characters long (`uid(56)`)."""
    data, *old = _ct_template(side)
    for known, new in zip(old, (uid(_UID_CHARS), series or uid(_UID_CHARS), study or uid(_UID_CHARS)), strict=True):
        if len(new) != _UID_CHARS:
            raise ValueError(f"UIDs must have {_UID_CHARS} characters")
        data = data.replace(known.encode(), new.encode())
    return data


def ct(folder: Path, count: int, *, side: int = 16, study: str = "", series: str = "", first: int = 1) -> list[Path]:
    """Write `count` CT images of one series into a folder, as CT0001.dcm and so on.

    A file has about 2 * side * side + 6600 bytes: 7 kB with side 16, 39 kB with 128, 0.5 MB with 512.
    """
    study, series = study or uid(_UID_CHARS), series or uid(_UID_CHARS)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write(folder / f"CT{number:04}.dcm", ct_bytes(side=side, study=study, series=series))
        for number in range(first, first + count)
    ]


def multiframe(path: Path, frames: int, *, side: int = 512, study: str = "") -> Path:
    """Write an uncompressed multi-frame image of about 2 * frames * side * side bytes."""
    ds = dataset(study=study, SOPClassUID="1.2.840.10008.5.1.4.1.1.7.3", Modality="OT", NumberOfFrames=frames)
    ds.Rows = ds.Columns = side
    ds.PixelData = random.Random(frames).randbytes(side * side * 2) * frames
    return write(path, encoded(ds))


SAMPLE = {
    "CT/1.dcm": "CT_small.dcm",
    "CT/2.dcm": "CT_small.dcm",
    "MR/1.dcm": "MR_small.dcm",
    "MR/implicit.dcm": "MR_small_implicit.dcm",
    "US/multiframe.dcm": "examples_ybr_color.dcm",
    "NM/compressed.dcm": "JPEG2000.dcm",
    "SC/rle.dcm": "SC_rgb_rle.dcm",
    "RT/dose.dcm": "rtdose.dcm",
    "SR/report.dcm": "test-SR.dcm",
}


def sample(folder: Path, *, others: bool = True) -> list[Path]:
    """Write one study of many kinds: CT, MR, multi-frame, compressed, dose, report; with a PNG and a JSON."""
    study = uid()
    series = {kind: uid() for kind in {Path(name).parts[0] for name in SAMPLE}}
    paths = [
        dicom(folder / path, name, study=study, series=series[Path(path).parts[0]]) for path, name in SAMPLE.items()
    ]
    if others:
        paths += [png(folder / "results" / "overlay.png"), note(folder / "results" / "result.json")]
    return paths


def every_syntax(folder: Path) -> list[Path]:
    """Write one instance in every transfer syntax of which pydicom has a file, big endian and deflated included."""
    names = (
        "CT_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "image_dfl.dcm", "MR_small_RLE.dcm",
        "SC_rgb_jpeg_dcmtk.dcm", "JPGExtended.dcm", "SC_rgb_jpeg_gdcm.dcm", "MR_small_jpeg_ls_lossless.dcm",
        "JPEGLSNearLossless_16.dcm", "MR_small_jp2klossless.dcm", "JPEG2000.dcm",
    )  # fmt: skip
    study = uid()
    return [dicom(folder / name, name, study=study) for name in names]


def png(path: Path) -> Path:
    """Write a valid PNG of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0\x7f")) + chunk(b"IEND", b"")
    return write(path, b"\x89PNG\r\n\x1a\n" + body)


def note(path: Path) -> Path:
    """Write a JSON file, different each time."""
    return write(path, json.dumps({"finding": uuid.uuid4().hex}).encode())


def odd_names(folder: Path, names: tuple[str, ...] = UNICODE_NAMES + SHELL_NAMES + RAW_NAMES) -> list[Path]:
    """Write one CT image under each of these names."""
    study, series = uid(_UID_CHARS), uid(_UID_CHARS)
    return [write(folder / name, ct_bytes(study=study, series=series)) for name in names]


def _data_set(name: str) -> bytes:
    """Return an instance without preamble and file meta information."""
    data = encoded(dataset(name))
    at = data.index(b"\x08\0\x05\0CS") if b"\x08\0\x05\0CS" in data else data.index(b"\x08\0\x08\0CS")
    return data[at:]


def damaged(folder: Path) -> dict[str, Path]:
    """Write files that are meant to be DICOM but are damaged; the keys say what is wrong with each."""
    whole = ct_bytes()
    no_uid = dataset()
    bare = encoded(no_uid)
    uid_element = b"\x08\x00\x18\x00UI" + struct.pack("<H", len(no_uid.SOPInstanceUID) + len(no_uid.SOPInstanceUID) % 2)
    at = bare.index(uid_element)
    end = at + 8 + struct.unpack_from("<H", bare, at + 6)[0]
    kinds = {
        "truncated": whole[: len(whole) // 2],
        "truncated-pixels": whole[:-1],
        "empty": b"",
        "no-preamble": _data_set("MR_small_RLE.dcm"),
        "no-sop-instance-uid": bare[:at] + bare[end:],
        "meta-only": whole[: whole.index(b"\x08\x00\x05\x00CS")],
    }
    return {kind: write(folder / f"{kind}.dcm", data) for kind, data in kinds.items()}
