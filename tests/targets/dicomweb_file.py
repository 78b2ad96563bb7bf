"""A folder as a DICOMweb target (`file://`), on the disk of the test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import pydicom

from blocks.base import Direction, Target
from blocks.dicomweb import DicomWebTarget
from talaria.testing import studies
from talaria.testing.harness import Harness
from tests.targets.folder import cut, final, shorten
from transfer.errors import NotFound
from transfer.plan import Item, Plan


def target(folder: Path) -> DicomWebTarget:
    """Return a target that stores in a folder and can be queried."""
    made = DicomWebTarget(
        url=f"file://{quote(str(folder))}",
        direction=Direction.BOTH,
        retry_delay_s=0,
        connect_timeout_s=5,
        concurrency=2,
    )
    made.named("dicomweb-file")
    return made


def seen(root: Path) -> list[str]:
    """Every name below a folder; what vanishes meanwhile may be among them."""
    return [
        os.path.relpath(os.path.join(folder, name), root)
        for folder, folders, files in os.walk(root)
        for name in (*folders, *files)
    ]


def held(root: Path) -> dict[str, bytes]:
    """What any program finds in the folder: the bytes of every file that has a final name, by SOP instance UID."""
    found = {}
    for path in (root / name for name in seen(root) if final(name)):
        if path.is_file():
            data = path.read_bytes()
            with studies.quiet():
                uid = str(pydicom.dcmread(BytesIO(data), stop_before_pixels=True).SOPInstanceUID)
            assert uid not in found, f"{uid} is there twice"
            found[uid] = data
    return found


@contextmanager
def harness(folder: Path) -> Iterator[Harness]:
    """A folder whose name must be encoded in a URL, for the conformance suite."""
    root = folder / "archive #1 ü%20"
    root.mkdir()
    usual = target(root)

    def names() -> set[str]:
        return set(seen(root))

    @contextmanager
    def reject(plan: Plan, item: Item) -> Iterator[Target]:
        assert item.header
        series = root / item.header.StudyInstanceUID / item.header.SeriesInstanceUID
        (series / f"{item.header.SOPInstanceUID}.dcm").mkdir(parents=True)
        yield usual

    yield Harness(
        name="dicomweb-file",
        target=usual,
        dead=target(root / "not-mounted"),
        dead_error=NotFound,
        read_back=lambda plan: held(root),
        names=names,
        final=final,
        leftovers=names,
        cut=partial(cut, usual),
        reject=reject,
        shorten=partial(shorten, usual),
    )
