"""What the conformance suite must know of a type of target to test its driver."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from blocks.base import Target
from transfer.plan import Item, Plan


@dataclass
class Harness:
    """One running server and how to look at it; made afresh (empty) for each test.

    Attributes:
        name: shown in the test's id, e.g. `dicom-storescp`.
        target: reaches the server; small timeouts, no waiting between attempts.
        dead: the same target where nothing answers: a closed port, a folder that can't be reached.
        read_back: what the server holds under final names: bytes by relative path below the dispatch's folder
            (`keeps_names`), or the DICOM file's bytes by SOPInstanceUID.
        names: every name that is visible at the server now, final or not, marker included. Called during a push.
        final: tells of a visible name whether it is a final one (not hidden or temporary).
        leftovers: names at the server that neither a delivery nor a user put there; a check must leave it unchanged.
        cut: a target whose link breaks for good after about that many payload bytes, once; then it works.
        reject: makes the server refuse this one item; yields the target to use. None if no server could.
        shorten: makes the server, or the link, lose the end of what is written without an error; None if the
            protocol makes that impossible.
        secrets: values that must appear nowhere.
    """

    name: str
    target: Target
    dead: Target
    read_back: Callable[[Plan], dict[str, bytes]]
    names: Callable[[], set[str]]
    cut: Callable[[int], AbstractContextManager[Target]]
    final: Callable[[str], bool] = lambda name: True
    leftovers: Callable[[], set[str]] = set
    reject: Callable[[Plan, Item], AbstractContextManager[Target]] | None = None
    shorten: Callable[[], AbstractContextManager[Target]] | None = None
    secrets: tuple[str, ...] = field(default=())
