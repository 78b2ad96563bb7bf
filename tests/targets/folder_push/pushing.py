"""Folder targets, and what is asserted of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blocks.folder import FolderTarget
from talaria.testing.harness import Sent
from transfer.receipt import State


def target(folder: Path, **fields: Any) -> FolderTarget:
    made = FolderTarget(folder=str(folder), **fields)
    made.named("archive")
    return made


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def delivered(sent: Sent) -> Sent:
    assert sent.require().state is State.DELIVERED, sent.rejected
    return sent
