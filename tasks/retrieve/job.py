"""A retrieval's state, kept in the state directory: it may be paused, killed and taken up again.

Holds accession numbers and UIDs, no other data of a patient.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from transfer.home import Home
from transfer.ledger import noted, write_whole

STEPS_BYTES = 8 << 20  # of the file of steps, some ten thousand; then they become part of the state's file


class Stage(StrEnum):
    """How far a study has come."""

    FOUND = "found"  # at the source
    WHOLE = "whole"  # fetched, and not handed on yet
    DELIVERED = "delivered"
    PARTIAL = "partial"  # the source gave less than it announced
    FAILED = "failed"


@dataclass
class Study:
    """One study that was found.

    Attributes:
        reason: why it is partial or failed, in one sentence.
        notes: how it was fetched.
        targets: state by target, as its dispatch left it.
        dispatch: flow run of the dispatch that sends it.
        again: when that may go on, in seconds since the epoch; 0 if it does not wait.
        doubt: why more may belong to it than came; "" if nothing does.
        announced: how many instances the source says that are asked for of it; 0 if it doesn't.
        changed: whether it has, since it was saved; the lists are replaced, never added to.
    """

    changed: ClassVar[bool] = True
    study: str
    accession: str = ""
    stage: Stage = Stage.FOUND
    instances: int = 0
    missing: int = 0
    bytes: int = 0
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    targets: dict[str, str] = field(default_factory=dict)
    dispatch: str = ""
    again: float = 0.0
    doubt: str = ""
    announced: int = 0

    def __setattr__(self, name: str, value: object) -> None:
        before = self.__dict__.get(name, ...)
        super().__setattr__(name, value)
        if before != value:
            self.__dict__["changed"] = True

    def saved(self) -> dict[str, Any]:
        """Return its document, and count it as saved."""
        self.__dict__["changed"] = False  # before: another thread may change it meanwhile
        return {name: value for name, value in self.__dict__.items() if name != "changed"}

    @property
    def came_whole(self) -> bool:
        """Whether it was fetched whole, without a doubt, and failed only when it was sent on."""
        return self.stage is Stage.FAILED and self.instances > 0 and not (self.missing or self.doubt)


@dataclass
class Job:
    """A retrieval's state.

    Attributes:
        pending: accession numbers that have not been searched for.
        missing: accession numbers for which the source has no match.
        unknown: study UIDs that were asked for and for which the source has no match.
        failed: accession numbers whose search failed, with the reason.
        also: study UIDs by those accession numbers that stand for a study which is known by another one.
        searched: whether a search by other keys has been made.
        ended: whether it has ended; a run after that is a retry.
        since: since when it waits for slots of its source, in seconds since the epoch; 0 if it doesn't.
        spool: folder outside the state directory that holds what was fetched; "" for none.
        next_study: seconds since the epoch before which no study is fetched, for the limit of studies per hour.
    """

    folder: Path
    pending: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    also: dict[str, str] = field(default_factory=dict)
    searched: bool = False
    error: str = ""
    ended: bool = False
    since: float = 0.0
    next_study: float = 0.0
    spool: str = ""
    studies: dict[str, Study] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._number = 0  # of the file of steps that belongs to the state's file
        self._noting = False  # whether this object has begun it

    @classmethod
    def load(cls, home: Home, flow_run_id: str, accessions: tuple[str, ...]) -> Job:
        """Read a retrieval's state, or begin one, also where it is damaged: what was delivered is in the ledger."""
        folder = folder_of(home, flow_run_id)
        try:
            known: dict[str, Any] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
            number = known.pop("steps", 0)
            for step in _steps(folder / f"steps.{number}"):
                known["studies"] |= step.pop("studies")
                known |= step
            studies = {uid: Study(**one | {"stage": Stage(one["stage"])}) for uid, one in known.pop("studies").items()}
            job = cls(folder, studies=studies, **known)
            job._number = number
            return job
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls(folder, pending=list(accessions))

    def save(self) -> None:
        """Save the state, whole or not at all.

        Raises:
            LedgerFull: the disk of the state directory is full.
        """
        with self._lock, noted():
            self._save()

    def note(self) -> None:
        """Save what has become of studies since the last time: of thousands, the whole state takes seconds.

        Raises:
            LedgerFull: the disk of the state directory is full.
        """
        with self._lock, noted():
            if not self._noting:
                self._save()
                return
            changed = {one.study: one.saved() for one in [*self.studies.values()] if one.changed}
            self._noting = False  # until it is written: nothing is added behind a part of a line
            line = json.dumps(self._course() | {"studies": changed}) + "\n"
            with (self.folder / f"steps.{self._number}").open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fdatasync(file.fileno())
                self._noting = file.tell() < STEPS_BYTES

    def _save(self) -> None:
        self._noting, number = False, self._number + 1
        (self.folder / f"steps.{number}").unlink(missing_ok=True)  # of a state that was damaged
        document = {
            "steps": number,
            "pending": self.pending,
            "missing": self.missing,
            "unknown": self.unknown,
            "failed": self.failed,
            "also": self.also,
            **self._course(),
            "studies": {one.study: one.saved() for one in [*self.studies.values()]},
        }
        write_whole(self.folder / "job.json", [json.dumps(document).encode()])
        self._number, self._noting = number, True
        (self.folder / f"steps.{number - 2}").unlink(missing_ok=True)  # who has just read the former state reads on

    def _course(self) -> dict[str, Any]:
        return {
            "searched": self.searched,
            "error": self.error,
            "ended": self.ended,
            "since": self.since,
            "next_study": self.next_study,
            "spool": self.spool,
        }

    def again(self, numbers: Iterable[str] = ()) -> None:
        """Begin a run; after an earlier end, schedule everything that did not succeed once more.

        Args:
            numbers: accession numbers that were asked for: what they stand for may have changed since.
        """
        if not self.ended:
            return
        self.ended = False
        self.pending = [*self.pending, *self.missing, *self.failed]
        self.missing, self.failed, self.error = [], {}, ""
        asked = {number.strip().casefold() for number in numbers}
        # Of those for which the search itself failed nothing is known.
        unfound = any(not (one.accession or one.announced or one.instances) for one in self.studies.values())
        for one in self.studies.values():
            one.again = 0.0
            if one.stage is Stage.DELIVERED and not one.doubt:
                continue
            one.dispatch = ""  # has ended as the retrieval did: cancelled, it would be so for good
            if one.stage is not Stage.WHOLE:
                one.stage = Stage.WHOLE if one.came_whole else Stage.FOUND
                one.reason = one.doubt = ""
            if one.stage is Stage.FOUND and one.accession.casefold() in asked and one.accession not in self.pending:
                self.pending.append(one.accession)
        found = {uid for uid, one in self.studies.items() if one.stage is Stage.FOUND}
        anew = [number for number, uid in self.also.items() if uid in found]
        self.pending += anew  # they may be missing by now, and stand for it no more
        self.also = {number: uid for number, uid in self.also.items() if number not in anew}
        self.searched = self.searched and bool(self.studies) and not (self.unknown or unfound)

    def forget(self, numbers: Iterable[str], found: Collection[str]) -> None:
        """Forget studies of accession numbers that were to be fetched once more, and are not found by them any more.

        Args:
            found: UIDs of those that are.
        """
        asked = {number.strip().casefold() for number in numbers}
        gone = [
            uid
            for uid, one in self.studies.items()
            if one.stage is Stage.FOUND and one.accession.casefold() in asked and uid not in found
        ]
        for uid in gone:
            del self.studies[uid]
        self.also = {number: uid for number, uid in self.also.items() if uid in self.studies}

    def without_studies(self, numbers: Iterable[str]) -> list[str]:
        """Return those accession numbers of which no study is known."""
        known = {one.accession.casefold() for one in self.studies.values()}
        return [number for number in numbers if number.strip().casefold() not in known]

    @property
    def whole(self) -> bool:
        """Whether everything that was asked for has been delivered."""
        delivered = all(one.stage is Stage.DELIVERED and not one.doubt for one in self.studies.values())
        rest = self.pending or self.missing or self.unknown or self.failed or self.error
        return delivered and bool(self.studies) and not rest


def _steps(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what was noted since a state was saved, up to what a kill or a full disk has cut short."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            try:
                step = json.loads(line)
            except ValueError:
                return
            yield step


def folder_of(home: Home, flow_run_id: str) -> Path:
    """Return the folder of a retrieval's state and of what it has fetched."""
    return home.root / "retrievals" / flow_run_id


def size_of(folder: Path) -> tuple[int, int]:
    """Return number and bytes of the instances in a folder; some may be moved away meanwhile."""
    sizes = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                sizes += [entry.stat().st_size] if entry.name.endswith(".dcm") else []
    return len(sizes), sum(sizes)


def discard(folder: Path) -> None:
    """Remove what has been fetched of a study."""
    shutil.rmtree(folder, ignore_errors=True)
