"""What runs leave behind in the state directory, and what is old there. Imports no Prefect: a command uses it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from protocols.dicomfolder.indexes import clear_indexes
from transfer import deadletters, nearby, spool, unitlist, uploads
from transfer.database import LONG_S
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.staging import STAGED_BY, discard

PART = re.compile(r"\..+\.\d+\.\d+|.+\.part")  # the name of a file as long as it is being written
DEAD_S = 86_400.0  # nobody is still writing what was begun before


def clear_staging(home: Home) -> int:
    """Remove the staging folders of processes that are no more; return how many there were."""
    # Each ends with the owner's id, who is there before it.
    folders = list(home.staging.iterdir()) if home.staging.is_dir() else []
    orphans = [one for one in folders if not home.alive(one.name.rpartition(STAGED_BY)[2])]
    for folder in orphans:
        discard(folder)
    return len(orphans)


@dataclass(frozen=True)
class Forgotten:
    """How much has gone: rows of the ledger, receipts, staging folders, and unused indexes of read-only folders."""

    rows: int = 0
    receipts: int = 0
    staging: int = 0
    indexes: int = 0


def forget(home: Home, age: float, open_runs: Collection[str], failed_age: float, shared_age: float) -> Forgotten:
    """Forget what is older than `age` seconds, but nothing of runs that go on, and clear orphans of staging.

    Args:
        open_runs: ids of runs that have not ended, and of those whose kept files they are to read.
        failed_age: that of the files of dispatches that were given up.
        shared_age: for what is in a ledger that several hosts share, if it is longer: no host knows of which runs the
            others keep files.
    """
    # Millions of rows are looked through: PostgreSQL may take minutes for the answer.
    with Ledger(home.ledger, answer_s=LONG_S) as ledger:
        now = ledger.now()
        before, common = now - age, now - (max(age, shared_age) if ledger.shared else age)
        deadletters.clear(home, now - failed_age, {*open_runs, *ledger.rests.runs()})
        kept = {*open_runs, *deadletters.kept(home)}
        rows = ledger.prune(common, kept)
        ledger.rests.prune(common, kept)
        discard(home.root / "waiting")  # where an earlier Talaria had what runs left behind
        kept |= ledger.rests.runs()
        uploads.tidy(home, before, kept)
        _clear_parts(home, now - DEAD_S)
        receipts = _forget_receipts(home, before, kept)
        kept |= {run_id for run_id, owner in ledger.runs.unfinished().items() if home.alive(owner)}
        _forget_retrievals(home, before, kept)
        return Forgotten(rows, receipts, clear_staging(home), clear_indexes(home.root, before))


def _clear_parts(home: Home, before: float) -> None:
    """Remove what processes that were killed had begun to write, where nobody takes its name again."""
    places = (home.receipt("").parent, home.root / "checks")
    lists = (home.root / unitlist.SOURCES).glob(f"*/{unitlist.BATCHES}")
    reports = (home.root / spool.FOLDER / spool.REPORTS).glob("*")
    for folder in (*places, *lists, *reports):
        for path in folder.glob("*"):
            with suppress(OSError):
                if PART.fullmatch(path.name) and path.stat().st_mtime < before:
                    path.unlink()


def _forget_receipts(home: Home, before: float, kept: Collection[str]) -> int:
    count = 0
    for path in home.receipt("").parent.glob("*.json"):
        with suppress(FileNotFoundError, IsADirectoryError):  # somebody else has removed it, or it is none of ours
            if path.stem not in kept and path.stat().st_mtime < before:
                path.unlink()
                path.with_suffix(".csv").unlink(missing_ok=True)
                count += 1
    return count


def _forget_retrievals(home: Home, before: float, kept: Collection[str]) -> None:
    for state in (home.root / "retrievals").glob("*/job.json"):
        try:
            is_old = state.stat().st_mtime < before
        except FileNotFoundError:  # somebody else has removed it
            continue
        if is_old and state.parent.name not in kept:
            with suppress(OSError, ValueError, KeyError, TypeError):  # it has none, or is of an earlier Talaria
                nearby.discard_spool(Path(json.loads(state.read_bytes())["spool"]), state.parent.name)
            discard(state.parent)
