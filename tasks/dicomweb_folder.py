"""What is done with a folder that stands for a DICOMweb server (`file://`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from blocks.dicomweb import DicomWebTarget
from transfer.health import Health
from transfer.plan import Plan
from transfer.query import Match, Query
from transfer.receipt import OnOutcome, Receipt


def check(target: DicomWebTarget) -> Health:
    raise NotImplementedError


def push(target: DicomWebTarget, plan: Plan, on_outcome: OnOutcome) -> Receipt:
    raise NotImplementedError


def find(target: DicomWebTarget, query: Query) -> Iterator[Match]:
    raise NotImplementedError


def retrieve(target: DicomWebTarget, query: Query, folder: Path, on_outcome: OnOutcome) -> Receipt:
    raise NotImplementedError
