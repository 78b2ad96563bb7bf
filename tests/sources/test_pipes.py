"""A pipe in the place of a file: who opens it would wait for whoever writes to it, for ever."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from protocols.files.tree import Tree
from talaria.testing.process import as_loaded
from tasks.sources import after
from transfer.content import same_content
from transfer.unitlist import FileFacts


def holds(pipe: Path) -> bool:
    return after.holds((9, 5, "the sum of nine bytes"), FileFacts(str(pipe), 9, 5, 6, 7))


def moves(pipe: Path) -> bool:
    folder = os.open(pipe.parent, os.O_RDONLY)
    try:
        with Tree(pipe.parent) as tree:
            after._move(folder, pipe.name, tree, "moved")
    finally:
        os.close(folder)
    return not (pipe.parent / "moved").is_fifo()


def is_copy(pipe: Path) -> bool:
    with open(__file__, "rb") as file:
        return same_content(file.fileno(), pipe)


@pytest.mark.parametrize("opens", [holds, moves, is_copy])
def test_a_pipe_in_the_place_of_a_file_holds_nobody_up(tmp_path: Path, opens: Callable[[Path], bool]) -> None:
    found: list[bool] = []
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    thread = threading.Thread(target=lambda: found.append(opens(pipe)), daemon=True)
    thread.start()
    thread.join(as_loaded(10))
    assert found == [False]
