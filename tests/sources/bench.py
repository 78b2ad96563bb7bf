"""Sweeps without a server: dispatches are floods in this process, by real drivers, into folders, with a real ledger."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from blocks.folder import FolderTarget
from blocks.inbox import InboxSource
from blocks.source import Source
from tasks import DRIVERS
from tasks.dispatch.flood import Flood, rows
from tasks.dispatch.studies import Studies
from tasks.driver import Driver
from tasks.sources.sweep import Sweep
from tasks.sources.swept import Swept
from tasks.sources.ways import EndedRun
from transfer.errors import DispatchError
from transfer.globs import patterns
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.plan import Origin
from transfer.sourcebook import UnitRow
from transfer.staging import Way
from transfer.studies import Each, listed


class Bench:
    """An inbox, targets that are folders, and what runs dispatches when the test says so.

    Attributes:
        asked: what was asked for, by run, and not done yet.
        done: how the others ended.
        down: the names of targets whose pushes fail.
        waiting: what all runs wait for, in words; "" if they don't.
        resting_runs: those that have begun, and wait to go on.
    """

    def __init__(self, folder: Path, *targets: str, **fields: Any) -> None:
        self.folder, self.home = folder, Home(folder / "home")
        for path in (self.home.root, folder / "inbox", folder / "sent"):
            path.mkdir(parents=True)
        self.inbox = folder / "inbox"
        self.targets = {name: self.target(name) for name in targets or ("shelf",)}
        self.source: Source = self.named(**fields)
        self.asked: dict[str, Mapping[str, Any]] = {}
        self.done: dict[str, EndedRun] = {}
        self.down: set[str] = set()
        self.waiting = ""
        self.resting_runs: set[str] = set()
        self.drivers: dict[str, Driver[Any]] = {}

    def named(self, **fields: Any) -> InboxSource:
        given = {"folder": str(self.inbox), "targets": [*self.targets], "settle_s": 0, **fields}
        return InboxSource(**given).named("box")

    def target(self, name: str, **fields: Any) -> FolderTarget:
        place = self.folder / "at" / name
        place.mkdir(parents=True, exist_ok=True)
        given = {"folder": str(place), "layout": "{StudyInstanceUID}", "max_attempts": 1, "retry_delay_s": 0, **fields}
        return FolderTarget(**given).named(name)

    def at(self, name: str) -> Path:
        return Path(str(self.targets[name].folder))

    # ---- Dispatching

    async def create(self, batch: str, parameters: Mapping[str, Any]) -> str:
        run = str(uuid.uuid5(uuid.NAMESPACE_URL, batch))
        if run not in self.done:
            self.asked.setdefault(run, parameters)
        return run

    async def ended(self, runs: Collection[str]) -> Mapping[str, EndedRun]:
        gone = {run: EndedRun(gone=True) for run in runs if run not in self.asked and run not in self.done}
        return gone | {run: self.done[run] for run in runs if run in self.done}

    async def going(self, runs: Collection[str]) -> set[str]:
        return {run for run in runs if run in self.asked or (run in self.done and self._is_well(self.done[run]))}

    async def resting(self, runs: Collection[str]) -> set[str]:
        return self.resting_runs & {*runs}

    async def waits(self, runs: Collection[str]) -> Mapping[str, str]:
        return {run: self.waiting for run in runs if self.waiting}

    @staticmethod
    def _is_well(end: EndedRun) -> bool:
        return all(row["state"] == "delivered" for row in end.studies.values())

    # ---- what happens

    def sweep(self) -> Swept:
        with Ledger(self.home.ledger) as ledger:
            return asyncio.run(Sweep(self.source, self.targets, self.home, ledger, self).run())

    def dispatch(self) -> None:
        """Run everything that was asked for."""
        for run, asked in list(self.asked.items()):
            self.done[run] = self._run(run, asked)
            del self.asked[run]

    def all(self) -> Swept:
        """Sweep, dispatch, and sweep again."""
        self.sweep()
        self.dispatch()
        return self.sweep()

    def again(self, run: str, asked: Mapping[str, Any]) -> None:
        """Let a run that has ended run once more."""
        self.asked[run] = asked
        self.done.pop(run)

    def rows(self) -> dict[str, UnitRow]:
        with Ledger(self.home.ledger) as ledger:
            return ledger.sources.units("box")

    def states(self) -> dict[str, str]:
        return {key: str(row.state) for key, row in self.rows().items()}

    def _run(self, run: str, asked: Mapping[str, Any]) -> EndedRun:
        stop, globs = threading.Event(), patterns(asked["exclude"])
        origin = Origin(asked["sender_aet"], asked["receiver_aet"], asked["sender_host"])
        with Ledger(self.home.ledger) as ledger:
            try:
                found = listed(asked["paths"], Each.UNIT, globs)
            except DispatchError as exc:
                return EndedRun(message=exc.message)
            by_name = any(DRIVERS.of(self.targets[name]).facts.by_name for name in asked["targets"])
            way = Way.COPY if by_name or asked["copy_first"] else Way.PLACE  # as `tasks.dispatch.flood` has it
            studies = Studies(found, globs, origin, self.home.staging / run, stop, way, len(asked["targets"]))
            floods = []
            for name in asked["targets"]:
                target = self.targets[name]
                if name in self.down:
                    target = target.model_copy(update={"folder": "/nowhere/at/all"})
                    target.named(name)
                driver = self.drivers.get(name) or DRIVERS.of(target)
                flood = Flood(driver, target, studies, ledger, self.home, stop, run, "", (), force=asked["force"])
                try:
                    flood.push()
                except DispatchError:
                    flood.futile = 99
                floods.append(flood)
            return EndedRun(studies={str(row["study"]): row for row in rows(studies, floods, ())})


def aged(path: Path, seconds: float = 3600) -> None:
    """Give files an earlier modification time; that of their change can't be set."""
    then = time.time() - seconds
    for one in [path, *path.rglob("*")]:
        os.utime(one, (then, then + 0.123))
