"""The folders at a target for which its script has been run, in the ledger."""

from __future__ import annotations

import hashlib

from transfer.ledger import AT, Ledger


class RanFolders:
    """The folders for which a target's script has succeeded since something came into them.

    Whichever dispatch it was: one that finds everything there does not run it again. Their names may be a patient's.
    """

    def __init__(self, ledger: Ledger, dispatch_id: str, destination: str, endpoint: str) -> None:
        self._ledger, self._dispatch_id, self._endpoint = ledger, dispatch_id, endpoint
        self._destination, self._place = destination, f"{AT}{endpoint}"

    def __contains__(self, folder: object) -> bool:
        row = self._ledger.hook(self._place, self._row(folder))
        return row is not None and row.outcome == "done"

    def add(self, folder: str) -> None:
        self._ledger.record_hook(self._place, self._row(folder), self._endpoint, "done", 0, "")

    def forget(self, folder: str) -> None:
        """Forget that the script was run for a folder, and so for the dispatch."""
        for key in ((self._place, self._row(folder)), (self._dispatch_id, self._destination)):
            row = self._ledger.hook(*key)
            if row and row.outcome == "done":
                self._ledger.record_hook(*key, self._endpoint, "outdated", None, row.output)

    def _row(self, folder: object) -> str:
        mark = hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()[:24]
        return f"{self._destination}/{mark}"
