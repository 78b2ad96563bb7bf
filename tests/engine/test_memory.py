"""How much memory a dispatch takes for a file: what is known of each is kept once, and without what nobody asks for."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from pathlib import Path

import pytest

from blocks.folder import FolderTarget
from talaria.testing import studies
from tasks import DRIVERS
from tasks.dispatch import kept
from tasks.dispatch.delivery import Delivery
from tasks.dispatch.flood import Flood, rows
from tasks.dispatch.report import pieces
from tasks.dispatch.stage import plan_and_stage
from tasks.dispatch.studies import studies_of
from transfer.home import Home
from transfer.ledger import Ledger, write_whole
from transfer.outcome import Kind
from transfer.plan import Origin
from transfer.receipt import Receipt
from transfer.staging import Way
from transfer.studies import Each

FILES = 2000  # many, as other tests of the process may have left threads at work
FEW, STUDIES, EACH = 40, 120, 5  # studies of a flood, how many more of another one, and files of each
MOST_OF_FLOOD = 1200  # bytes for each of its files; it has a name, a path and a row for each study
MOST_BYTES = 620  # for each, of Python's own objects; benchmarks/around.py measures what a process takes beside them


def dispatched(source: Path, folder: Path) -> tuple[Receipt, int]:
    """Dispatch a study to a folder as a run does; return the receipt, and the most memory that it took, in bytes."""
    folder.mkdir()
    (folder / "archive").mkdir()
    home, stop = Home(folder / "home"), threading.Event()
    home.root.mkdir()
    target = FolderTarget(folder=str(folder / "archive"))
    target.named("archive")
    with Ledger(home.ledger) as ledger:
        gc.collect()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            staged = plan_and_stage([str(source)], "", Origin(), home.staging / "run", stop)
            delivery = Delivery(DRIVERS.of(target), target, staged.plan, ledger, home, stop)
            waiting = [delivery.receipt(waiting=True)]
            write_whole(folder / "plan.json", pieces(staged.plan.dispatch_id, "run", waiting[0].state, waiting))
            del waiting
            delivery.push()
            receipt = delivery.receipt()
            write_whole(home.receipt("run"), pieces(staged.plan.dispatch_id, "run", receipt.state, [receipt]))
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    return receipt, most - before


def test_a_file_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfer.receipt.PIECE_ITEMS", 10)  # few, as for many files
    studies.ct(tmp_path / "few", 3, side=8)
    studies.ct(tmp_path / "many", FILES + 3, side=8)
    dispatched(tmp_path / "few", tmp_path / "first")  # what is loaded once is not counted
    _, few = dispatched(tmp_path / "few", tmp_path / "second")
    receipt, many = dispatched(tmp_path / "many", tmp_path / "third")
    assert receipt.counts[Kind.DELIVERED] == FILES + 3
    assert (many - few) / FILES < MOST_BYTES


def flooded(source: Path, folder: Path) -> tuple[Receipt, int]:
    """Dispatch a folder of studies to a folder as a run does; return the receipt of all, and that most, in bytes."""
    (folder / "archive").mkdir(parents=True)
    home, stop = Home(folder / "home"), threading.Event()
    home.root.mkdir()
    target = FolderTarget(folder=str(folder / "archive"))
    target.named("archive")
    with Ledger(home.ledger) as ledger:
        gc.collect()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            how = (), Origin(), home.staging / "run", stop, Way.READ, False, 1
            studies = studies_of(home, "run", [str(source)], Each.FOLDER, *how)
            flood = Flood(DRIVERS.of(target), target, studies, ledger, home, stop, "run", "")
            flood.push()
            receipt = flood.receipt()
            what = studies.plan.dispatch_id, "run", receipt.state, [receipt], rows(studies, [flood], ())
            write_whole(home.receipt("run"), pieces(*what))
            del studies, flood, what
            assert kept.here(home, "run", packed=True)  # as a part that comes back reads it
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    return receipt, most - before


def test_a_file_of_a_flood_takes_no_more(tmp_path: Path) -> None:
    """Its receipt had each file twice, as objects, and its study's plan beside them, until the last one was done."""
    for number in range(2 * FEW + STUDIES):
        studies.ct(tmp_path / ("few" if number < FEW else "many") / f"{number:03}", EACH, side=8)
    _, few = flooded(tmp_path / "few", tmp_path / "first")
    receipt, many = flooded(tmp_path / "many", tmp_path / "second")
    assert receipt.counts[Kind.DELIVERED] == (FEW + STUDIES) * EACH
    assert (many - few) / STUDIES / EACH < MOST_OF_FLOOD
