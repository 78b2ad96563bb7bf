"""A sweep of 10,000 studies with 100,000 files: when all are new, and when nothing is; seconds, CPU and memory.

    python -m benchmarks.sources [--studies 10000] [--files 10] [--rounds 3]

Files are small CT images on the disk of the state directory. Runs are not created at a server: what is measured is
what a sweep does itself. Each sweep is a process of its own; `idle` is one of an empty inbox, whose memory the others
are compared with.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import Run, machine, run, section
from talaria.testing import studies

UNITS = ("folder", "study")


class _Nowhere:
    """Takes what is asked for; no run ever ends."""

    async def create(self, batch: str, parameters: Mapping[str, Any]) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, batch))

    async def ended(self, runs: Collection[str]) -> dict[str, Any]:
        return {}

    async def going(self, runs: Collection[str]) -> set[str]:
        return set()

    async def resting(self, runs: Collection[str]) -> set[str]:
        return set()


def sweep(folder: Path, unit: str) -> None:
    """Measure one sweep in this process."""
    from blocks.inbox import InboxSource
    from tasks.sources.sweep import Sweep
    from transfer.home import Home
    from transfer.ledger import Ledger

    given: dict[str, Any] = {"folder": str(folder), "targets": ["nowhere"], "unit": unit, "settle_s": 0}
    source = InboxSource(**given).named(f"{unit}-{folder.name}")
    home = Home.current()
    with Ledger(home.ledger) as ledger, section():
        asyncio.run(Sweep(source, {}, home, ledger, _Nowhere()).run())


def swept(folder: Path, unit: str, home: Path) -> Run:
    code = [sys.executable, "-m", "benchmarks.sources", "--sweep", str(folder), "--unit", unit]
    return run(code, {"TALARIA_HOME": str(home)})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--studies", type=int, default=10_000)
    parser.add_argument("--files", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sweep", type=Path)
    parser.add_argument("--unit", default="folder")
    given = parser.parse_args()
    if given.sweep:
        sweep(given.sweep, given.unit)
        return
    print(machine())
    with tempfile.TemporaryDirectory(prefix="talaria-sources-") as name:
        root = Path(name)
        full, empty = root / "full", root / "empty"
        empty.mkdir()
        for number in range(given.studies):
            studies.ct(full / f"s{number:05}", given.files, study=studies.uid(56))
        os.sync()
        print(f"\n{given.studies} studies, {given.studies * given.files} files\n")
        print("| unit | sweep | s | CPU s | MiB at most |\n|---|---|---|---|---|")
        for unit in UNITS:
            home = root / unit
            rows = [("idle", [swept(empty, unit, home)]), ("all new", [swept(full, unit, home)])]
            rows.append(("nothing new", [swept(full, unit, home) for _ in range(given.rounds)]))
            for what, runs in rows:
                one = min(runs, key=lambda each: each.wall_s)
                print(f"| {unit} | {what} | {one.wall_s:.2f} | {one.cpu_s:.2f} | {one.peak_mib:.0f} |", flush=True)


if __name__ == "__main__":
    main()
