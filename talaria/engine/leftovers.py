"""What runs leave behind in the state directory, and what is old there. Imports no Prefect: a command uses it."""

from __future__ import annotations

from collections.abc import Collection

from protocols.dicomfolder.indexes import clear_indexes
from transfer import deadletters, uploads
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.staging import discard


def clear_staging(home: Home, ledger: Ledger) -> int:
    """Remove the staging folders of runs that no process runs any more; return how many there were."""
    # Listed first: a run is in the ledger before it has a folder.
    folders = list(home.staging.iterdir()) if home.staging.is_dir() else []
    living = {run_id for run_id, owner in ledger.runs.unfinished().items() if home.alive(owner)}
    orphans = [one for one in folders if one.name not in living and not home.alive(one.name)]  # some bear an owner's id
    for folder in orphans:
        discard(folder)
    return len(orphans)


def waiting(home: Home) -> set[str]:
    """Return the ids of the runs that wait for their next part, and have left behind what it must know."""
    with Ledger(home.ledger) as ledger:
        return ledger.rests.runs()


def clear(
    home: Home, ledger: Ledger, before: float, keep: Collection[str] = (), failed_before: float = 0.0
) -> tuple[int, int, int]:
    """Remove what is older than `before` (seconds since the epoch), and orphans of staging; return how many of each.

    Args:
        keep: ids of runs that have not ended.
        failed_before: the time for files of dispatches that were given up, if it is later.

    Returns:
        How many receipts, staging folders, and unused indexes of read-only folders.
    """
    # Of runs whose files another host may keep, where several share the ledger, that stays as long as these.
    ledger.rests.prune(min(before, failed_before) if ledger.shared else before, keep)
    discard(home.root / "waiting")  # where an earlier Talaria had what runs left behind
    kept = {*keep, *ledger.rests.runs()}
    uploads.tidy(home, before, kept)
    deadletters.clear(home, max(before, failed_before), kept)
    old = []
    for path in home.receipt("").parent.glob("*.json"):
        if path.stem not in kept and path.stat().st_mtime < before:
            old.append(path)
            path.unlink(missing_ok=True)
            path.with_suffix(".csv").unlink(missing_ok=True)
    kept |= {run_id for run_id, owner in ledger.runs.unfinished().items() if home.alive(owner)}
    for state in (home.root / "retrievals").glob("*/job.json"):
        if state.stat().st_mtime < before and state.parent.name not in kept:
            discard(state.parent)
    return len(old), clear_staging(home, ledger), clear_indexes(home.root, before)
