"""The one interface between a dispatch and a type of target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from blocks.base import Target
from imaging.query import Match, Query
from transfer.health import Health
from transfer.plan import Plan
from transfer.receipt import Level, PushReport, Receipt

T = TypeVar("T", bound=Target)


@dataclass(frozen=True)
class HookResult:
    """The result of a target's own script: exit code (None if it was stopped when its time was up) and last output."""

    exit_code: int | None
    output: str


class Ran(Protocol):
    """The folders for which a target's own script has ended well; a set will do."""

    def __contains__(self, folder: object, /) -> bool: ...

    def add(self, folder: str, /) -> None: ...


@dataclass(frozen=True)
class Facts:
    """What a type of target does and what it doesn't; asserted by the conformance suite.

    Attributes:
        dicom_only: carries DICOM instances only; other files are skipped.
        keeps_names: files keep their relative paths at the target.
        resumes: a broken attempt leaves parts of files behind, and the next one continues them.
        reconnects: a broken connection is made again within the same attempt, where the peer lets us.
        atomic_replace: no reader ever sees half a file, or half a dispatch, under a final name.
        verifies_by: the levels that the driver can reach.
        by_name: hands the files' names to another program, so that none may be read in its place.
    """

    dicom_only: bool = False
    keeps_names: bool = False
    resumes: bool = False
    reconnects: bool = False
    atomic_replace: bool = False
    verifies_by: tuple[Level, ...] = (Level.ACCEPTED,)
    by_name: bool = False


@dataclass(frozen=True)
class Driver(Generic[T]):
    """What can be done with one type of target. A capability is a function that is there.

    Attributes:
        check: staged probes, from name resolution to what a push needs; leaves nothing behind,
            and puts every failure into the Health that it returns.
        push: delivers `plan.pending`; returns when every one of them has an outcome. Idempotent per item; may
            run again after a crash, also with nothing pending (then it only completes what comes last, such as a
            marker). Raises Retryable when the link is lost, Permanent when nothing can be sent at all, Cancelled
            when `report.check()` does; never swallows what it doesn't know.
        find: yields what matches, as the peer gives it.
        retrieve: fetches what the query names into a folder; the receipt compares with what was announced.
        check_move: adds the probe `move` to a check that went well: whether the peer knows us as a move destination,
            shown by a move of one instance to our Storage SCP, of which nothing is kept. Only where somebody asks.
        hook: runs the target's own script after everything is there, for every folder that is not among those given,
            and adds those for which it ended well; none of an argument's characters reaches a shell unquoted. Raises
            Retryable if it could not be run because the connection failed, Permanent if it can't be run at all.
    """

    target: type[T]
    check: Callable[[T], Health]
    push: Callable[[T, Plan, PushReport], Receipt]
    find: Callable[[T, Query], Iterator[Match]] | None = None
    retrieve: Callable[[T, Query, Path, PushReport], Receipt] | None = None
    hook: Callable[[T, Plan, PushReport, Ran], HookResult] | None = None
    check_move: Callable[[T, Health], None] | None = None
    facts: Facts = Facts()
