"""What runs leave behind in the state directory, and what is old there. Imports no Prefect: a command uses it."""

from __future__ import annotations

from contextlib import suppress

from protocols.dicomfolder.indexes import clear_indexes
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.staging import discard


def clear_staging(home: Home, ledger: Ledger) -> int:
    """Remove the staging folders of runs that no process runs any more; return how many there were."""
    # Listed first: a run is in the ledger before it has a folder.
    folders = list(home.staging.iterdir()) if home.staging.is_dir() else []
    living = {run_id for run_id, owner in ledger.unfinished().items() if home.alive(owner)}
    orphans = [folder for folder in folders if folder.name not in living]
    for folder in orphans:
        discard(folder)
    return len(orphans)


def clear(home: Home, ledger: Ledger, before: float) -> tuple[int, int, int]:
    """Remove what is older than `before` (seconds since the epoch), and orphans of staging; return how many of each.

    Returns:
        How many receipts, staging folders, and unused indexes of read-only folders.
    """
    receipts = home.receipt("").parent
    old = [path for path in receipts.glob("*.json") if path.stat().st_mtime < before] if receipts.is_dir() else []
    for path in old:
        path.unlink(missing_ok=True)
        path.with_suffix(".csv").unlink(missing_ok=True)
    for path in home.waiting.glob("*.json"):
        with suppress(FileNotFoundError):  # the run goes on just now
            if path.stat().st_mtime < before:
                path.unlink()
    living = {run_id for run_id, owner in ledger.unfinished().items() if home.alive(owner)}
    for state in (home.root / "retrievals").glob("*/job.json"):
        if state.stat().st_mtime < before and state.parent.name not in living:
            discard(state.parent)
    return len(old), clear_staging(home, ledger), clear_indexes(home.root, before)
