"""Dead letters of floods: the files of the studies that were given up, each as those of a dispatch of its own.

TALARIA_HOME/failed/<flow run id>/
├── studies.json      of each study that is kept: its number, and the folder that its files' paths were relative to
└── files/1/, 2/ …    what was staged of it (`transfer.deadletters`)
    files/studies.jsonl   where several hosts share a ledger: all studies of the flood, for another dispatch
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from transfer import unitlist
from transfer.deadletters import FILES, folder_of, is_whole
from transfer.errors import DispatchError
from transfer.home import Home
from transfer.ledger import write_json
from transfer.staging import discard
from transfer.studies import Each, FloodStudy, listed

STUDIES = "studies.json"
LIST = "studies.jsonl"  # the name of a list of studies that are no units of a source


def is_list(path: str) -> bool:
    """Return True for a list of studies of which no source moves, or deletes, the files when they are delivered."""
    return os.path.basename(path) == LIST


class Letters:
    """The studies that are kept of a run; what it is told is on the disk after `save`."""

    def __init__(self, home: Home, run_id: str) -> None:
        self.folder = folder_of(home, run_id)
        self._known: dict[str, tuple[int, str]] = {}  # by name: number, and where its files came from
        with suppress(OSError, ValueError, TypeError, KeyError):
            for one in json.loads((self.folder / STUDIES).read_bytes())["studies"]:
                source = os.fsdecode(bytes.fromhex(one["source"]))
                self._known[str(one["study"])] = int(one["number"]), source
        # Also those that a killed process has left, and not written down.
        self._last = max((int(one.name) for one in (self.folder / FILES).glob("[0-9]*")), default=0)

    def __contains__(self, study: str) -> bool:
        return study in self._known

    @property
    def names(self) -> set[str]:
        """The studies that are kept."""
        return {*self._known}

    def files(self, study: str) -> Path:
        """Return the folder of a study that is kept."""
        return self.folder / FILES / str(self._known[study][0])

    def keep(self, study: str, staged: Path, source: Path) -> None:
        """Keep the staged files of a study; their folder is taken away.

        Args:
            source: the folder that their paths were relative to.
        """
        self._last += 1
        for folder in (self.folder.parent, self.folder, self.folder / FILES):
            folder.mkdir(mode=0o700, exist_ok=True)
        os.rename(staged, self.folder / FILES / str(self._last))
        self._known[study] = self._last, str(source)

    def save(self, studies: Collection[str]) -> bool:
        """Write down which studies are kept, and let the others go; return whether there are any.

        Args:
            studies: those that are wanted.
        """
        self._known = {name: one for name, one in self._known.items() if name in studies}
        if not self._known:
            discard(self.folder)
            return False
        found = [
            {"study": name, "number": number, "source": os.fsencode(source).hex()}
            for name, (number, source) in self._known.items()
        ]
        write_json(self.folder / STUDIES, {"studies": found})
        kept = {str(number) for number, _ in self._known.values()}
        for folder in (self.folder / FILES).iterdir():
            if folder.name not in kept:
                discard(folder)
        return True

    def list_all(self, studies: Sequence[FloodStudy]) -> str:
        """Write a list of all studies of the flood, for a dispatch of this host's to other targets; return its path."""
        writer = unitlist.Writer(self.folder / FILES / LIST)
        try:
            for study in studies:
                one = self.instead(study) if study.name in self else study
                writer.add(unitlist.ListedUnit(one.name, one.paths, one.within))
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        return str(writer.path)

    def instead(self, study: FloodStudy) -> FloodStudy:
        """Return a study that is kept as it is read from here."""
        return FloodStudy(study.name, (str(self.files(study.name)),))

    def lacking(self) -> list[str]:
        """Return the studies that are kept and whose source has not all of their files any more."""
        found = [name for name, (_, source) in self._known.items() if not is_whole(self.files(name), source)]
        if found:
            os.utime(self.folder)  # they are wanted: the time of their retention begins anew
        return found


def listed_or_kept(
    home: Home, run_id: str, paths: Sequence[str], each: Each, exclude: tuple[str, ...]
) -> list[FloodStudy]:
    """Return the studies that the paths of a run name, as `listed` does, and those that were kept in their place.

    Raises:
        NotFound, Denied, Misconfigured: as `listed` does, where nothing was kept.
    """
    letters = Letters(home, run_id)
    instead = dict.fromkeys(letters.lacking())
    try:
        found = listed(paths, each, exclude)
    except DispatchError:
        if not instead:
            raise
        found = []
    names = {study.name for study in found}
    found += [FloodStudy(name, ()) for name in instead if name not in names]
    return [letters.instead(study) if study.name in instead else study for study in found]
