"""Deals tests out to the processes of pytest-xdist: what shares a server to one of them, what takes longest first.

A unit is what one process runs in a row: the tests of a file, in the conformance suite those of one harness. Some
of the processes begin with units that start Talaria, which takes a processor for eight seconds each time and much of
it after that; the others with those that wait for their peers. Who is through with his kind helps with the other.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from xdist.scheduler.loadscope import LoadScopeScheduling

STARTS = re.compile(r"\btalaria\(|\bTalaria\(|\bup: Talaria\b")
SHARES = re.compile(r"(?:def test_|@pytest\.fixture.*\ndef )\w+\([^)]*\bup: Talaria\b")
OFFERS = re.compile(r"^def up\(", re.MULTILINE)
HARNESS = re.compile(r"::\w+\[(.+?)(-proven|-accepted)?\]$")
# Few tests for the time they take; other units come in the order of how many tests they have.
LONG = (
    "tests/engine/test_fair.py",
    "tests/engine/test_kills.py",
    "tests/engine/test_retrieve_parts.py",
    "tests/engine/test_states.py",
    "tests/protocols/test_dimse_wire.py",
    "tests/sources/test_dicom_up.py",
    "tests/sources/test_inbox_up.py",
    "tests/targets/dicom_peers/test_associations.py",
    "tests/targets/folder_push/test_disk.py",
    "tests/targets/test_dicom_files.py",
    "tests/targets/test_dicom_kinds.py",
    "tests/targets/test_dicom_progress.py",
    "tests/targets/test_dicom_requests.py",
    "tests/targets/test_dicom_sources.py",
    "tests/targets/test_dicomweb_searches.py",
    "tests/targets/test_ninth.py",
)
# Of the processes begin with what starts Talaria: half of the time of all tests is theirs. Were they fewer, the others
# would start it once more each, to help them.
HEAVY = 1 / 2


def unit_of(test: str) -> str:
    """Return the name of a test's unit, from the test's id."""
    path = test.partition("::")[0]
    harness = HARNESS.search(test) if path.endswith("/conformance.py") else None
    return f"{path}[{harness[1]}]" if harness else path


@cache
def starts(unit: str, root: Path) -> bool:
    """Return True if a unit's tests start Talaria, or use one that is shared."""
    return STARTS.search(_text(root / unit.partition("[")[0])) is not None


@cache
def home_of(unit: str, root: Path) -> str:
    """Return what a unit has in common with others: the folder whose server and worker it shares, else itself."""
    path = root / unit.partition("[")[0]
    text = _text(path)
    shares = SHARES.search(text) and not OFFERS.search(text) and OFFERS.search(_text(path.with_name("conftest.py")))
    return str(path.parent) if shares else unit


@cache
def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


def ordered(tests: Iterable[str]) -> dict[str, int]:
    """Return all units and the place of each: long ones, then those of many tests."""
    count: dict[str, int] = {}
    for test in tests:
        unit = unit_of(test)
        count[unit] = count.get(unit, 0) + 1
    order = sorted(count, key=lambda unit: (unit not in LONG, -count[unit], unit))
    return {unit: place for place, unit in enumerate(order)}


def next_unit(waiting: Sequence[str], begun: set[str], home: str | None, heavy: bool, root: Path) -> str:
    """Return the unit that a process runs next: of its home, or of the largest one where nobody has been.

    Args:
        waiting: the units that nobody has begun, in their order.
        begun: the homes that some process has been at.
        home: that of the process's last unit.
        heavy: it is one of those that start Talaria first.
    """
    mine = [unit for unit in waiting if starts(unit, root) is heavy] or list(waiting)
    homes = Counter(home_of(unit, root) for unit in mine)
    if home not in homes:
        new = [each for each in homes if each not in begun]
        home = max(new, key=lambda each: (each in LONG, homes[each]), default=None)
    return next((unit for unit in mine if home_of(unit, root) == home), mine[0])


class Dealer(LoadScopeScheduling):
    """Gives each process its next unit when it is nearly through with its last."""

    def __init__(self, config: Any, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # tests come in the order of their units
        self._homes: dict[object, str] = {}  # by process: where it was last
        self._begun: set[str] = set()

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)

    def _assign_work_unit(self, node: Any) -> None:
        heavy = self.nodes.index(node) < max(1, int(self.numnodes * HEAVY))
        root: Path = self.config.rootpath
        unit = next_unit(list(self.workqueue), self._begun, self._homes.get(node), heavy, root)
        self._homes[node] = home_of(unit, root)
        self._begun.add(self._homes[node])
        self.workqueue.move_to_end(unit, last=False)
        super()._assign_work_unit(node)

    def _reschedule(self, node: Any) -> None:
        if node in self.registered_collections:  # else it is there for one that died, and has not collected yet
            super()._reschedule(node)

    def remove_node(self, node: Any) -> str | None:
        """Give others what a process that has died, or ended, leaves; return the test that it died of, or None.

        That test has failed: it would end one process after the other.
        """
        left: dict[str, dict[str, bool]] = self.assigned_work.pop(node)
        ended_by = next((test for unit in left.values() for test, done in unit.items() if not done), None)
        if ended_by is not None:
            left[unit_of(ended_by)][ended_by] = True
            self.workqueue.update({name: unit for name, unit in left.items() if not all(unit.values())})
            for other in self.nodes:
                self._reschedule(other)
        return ended_by
