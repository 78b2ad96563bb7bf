"""Folders made of a patient's data: no message holds any of it."""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protocols.files.tree import Tree
from talaria.testing import studies
from talaria.testing.harness import attempt
from tests.targets.folder_push.pushing import delivered, target


def test_messages_hold_nothing_of_the_patient(archive: Path, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout may make folders of a patient's data; what goes wrong in them must not tell."""
    studies.dicom(study / "1.dcm")
    studies.dicom(study / "2.dcm")
    layout = {"layout": "{PatientID}/{AccessionNumber}"}
    first = delivered(attempt(target(archive, **layout), study))
    texts = [repr(first.receipt)]
    there = archive / studies.PATIENT_ID / studies.ACCESSION
    (there / "1.dcm").unlink()
    (there / "1.dcm").mkdir()
    rejected = attempt(target(archive, **layout), first.plan)
    texts += [*rejected.rejected.values(), repr(rejected.receipt)]
    shutil.rmtree(archive / studies.PATIENT_ID)

    def fail(number: int) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            raise OSError(number, os.strerror(number), str(there), None, str(there))

        return call

    for number in (2, 5, 13, 28, 116):
        for name in ("rename", "open", "make_folders"):
            with monkeypatch.context() as patch:
                real = getattr(Tree, name)
                patch.setattr(
                    Tree,
                    name,
                    lambda *a, real=real, number=number, **o: (
                        fail(number)() if ".incoming" in str(a[1]) else real(*a, **o)
                    ),
                )
                sent = attempt(target(archive, **layout), first.plan)
            if sent.error:
                texts += ["".join(traceback.format_exception(sent.error)), repr(sent.error)]
            texts += list(sent.rejected.values())
            shutil.rmtree(archive / studies.PATIENT_ID, ignore_errors=True)
    assert len(texts) > 10
    for text in texts:
        assert studies.PATIENT_ID not in text
        assert studies.ACCESSION not in text
