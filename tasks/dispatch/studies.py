"""The studies of a flood, as its targets get them: planned and staged when they are asked for, and kept no longer."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.dispatch.gone import GONE, gone_studies
from transfer.deadletters import may_be_kept
from transfer.deadstudies import is_list, listed_or_kept
from transfer.errors import Cancelled
from transfer.home import Home
from transfer.plan import Origin, Plan
from transfer.receipt import State
from transfer.staging import Way, discard, stage
from transfer.studies import Each, FloodStudy, flood_id

KEPT = 32  # staged studies that wait for the other targets; one that is late finds its study staged anew


class Studies:
    """The studies of a flood, staged when they are asked for; safe to use from several threads.

    Args:
        into: the folder for staged files, which the caller removes.
        sharers: how many targets get each study.
    """

    def __init__(
        self,
        studies: Sequence[FloodStudy],
        exclude: tuple[str, ...],
        origin: Origin,
        into: Path,
        cancelled: threading.Event,
        way: Way,
        sharers: int,
    ) -> None:
        self.all, self.plan, self.into = studies, Plan(flood_id(studies), into, (), origin=origin), into
        self.ids: dict[str, str] = {}  # of the dispatches, by the study's name
        self.earlier: dict[str, dict[str, Any]] = {}  # rows of receipts of an earlier part, or of what is retried
        self._exclude, self._cancelled, self._way = exclude, cancelled, way
        self._kept = KEPT if sharers > 1 else 0
        self._staged: dict[str, _Staged] = {}
        self._failed: set[str] = set()  # names of those that have failed at some target
        self._left: dict[str, tuple[Path, Path]] = {}  # and their files, as `left` returns them
        self._lock, self._numbers = threading.Lock(), itertools.count()
        into.mkdir(parents=True, mode=0o700, exist_ok=True)

    def lack(self, before: Sequence[dict[str, Any]]) -> None:
        """Let those studies of earlier receipts fail, where they have yet to come to, that are there no more."""
        gone = gone_studies(self.all, before)
        # Nobody needs the others: rows of 100,000 files are 40 MB.
        self.earlier = {one: row for row in before if (one := row["study"]) in gone or row["state"] != State.DELIVERED}
        self.all = [*self.all, *(FloodStudy(name, (), problem=GONE) for name in gone)]
        self.ids |= {name: str(self.earlier[name]["dispatch_id"]) for name in gone}

    @contextmanager
    def staged(self, study: FloodStudy) -> Iterator[Plan]:
        """Plan and stage a study's files for the time of the block.

        Raises:
            DispatchError: as `scan` and `stage` do.
        """
        with self._lock:
            one = self._staged.pop(study.name, None) or _Staged(self.into / str(next(self._numbers)))
            self._staged[study.name] = one  # the one that was used last comes last
            one.users += 1
        try:
            with one.lock:
                if one.plan is None:
                    one.plan = self._stage(study, one)
            yield one.plan
        finally:
            with self._lock:
                one.users -= 1
                idle = [name for name, other in self._staged.items() if not other.users]
                gone = {name: self._staged.pop(name) for name in idle[: max(0, len(idle) - self._kept)]}
            for name, other in gone.items():
                self._leave(name, other)

    def _stage(self, study: FloodStudy, one: _Staged) -> Plan:
        plan = study.read(self._exclude, self.plan.origin, self.check)
        one.source = plan.root
        # What a source moves or deletes is looked at once more, if something has happened to it since it was confirmed.
        is_unit = self._way is Way.COPY and bool(study.within)
        copied = {item.path: item.ctime_ns for item in plan.items} if is_unit else {}
        plan = replace(stage(plan, one.folder, self.check, self._way), copied=copied)
        # A target that is late gets the dispatch that the others got, even if a file has changed since.
        return replace(plan, dispatch_id=self.ids.setdefault(study.name, plan.dispatch_id))

    def check(self) -> None:
        """Raise Cancelled if the run is to stop."""
        if self._cancelled.is_set():
            raise Cancelled("the dispatch was cancelled")

    def _leave(self, name: str, one: _Staged) -> None:
        """Forget a study's plan, and its files unless it has failed: its source may go before the flood has ended."""
        if name not in self._failed or one.plan is None or not may_be_kept(one.plan):
            discard(one.folder, one.plan)
            return
        if one.plan.watch:
            one.plan.watch.close()
        before, self._left[name] = self._left.get(name), (one.folder, one.source)
        if before:
            discard(before[0])

    def fails(self, study: FloodStudy) -> None:
        """Note that a study has failed at some target; while it is staged, so that its files stay."""
        self._failed.add(study.name)

    def left(self, study: FloodStudy) -> tuple[Path, Path] | None:
        """Return where a study's files are staged that has failed, and the folder that their paths were relative to.

        To be called when the flood is over. None if not all of them can be.

        Raises:
            DispatchError: as `scan` and `stage` do, where it has to be read once more.
        """
        self.fails(study)
        self._kept = 0
        if study.name not in self._left:
            with self.staged(study):
                pass
        return self._left.get(study.name)


def studies_of(
    home: Home,
    run_id: str,
    paths: Sequence[str],
    each: Each,
    exclude: tuple[str, ...],
    origin: Origin,
    into: Path,
    cancelled: threading.Event,
    way: Way,
    copies: bool,
    sharers: int,
) -> Studies:
    """List the studies of a run's flood, as `listed_or_kept` does, without reading any of them.

    Args:
        copies: whether the files are copied before they are sent. The others: as of `Studies`.
    """
    if each is Each.UNIT and not all(map(is_list, paths)):
        way = Way.COPY if copies else Way.PLACE  # what a source moves or deletes is not to be changed by a link of ours
    return Studies(listed_or_kept(home, run_id, paths, each, exclude), exclude, origin, into, cancelled, way, sharers)


class _Staged:
    """A study that is staged, or about to be."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.users, self.source = folder, 0, folder
        self.plan: Plan | None = None
        self.lock = threading.Lock()
