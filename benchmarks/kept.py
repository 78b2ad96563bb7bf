"""What dispatches leave behind: the disk that they take, the memory of server and worker, and the next start.

    python -m benchmarks.kept [--dispatches 10000] [--rows 10]

A `talaria up` on a state directory of its own, on SQLite; each dispatch is one small CT image to a folder, some at a
time. After each part of them a row says what all of them have taken so far: `TALARIA_KEEP_DAYS` and
`TALARIA_KEEP_LIMIT` bound what is kept (docs/operations.md), and neither is reached here. Memory is what server and
worker have resident then. At the end `talaria up` is started again, beside the start with nothing to remember.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from benchmarks.measure import MB, MIB, machine
from talaria.engine.retention import used
from talaria.testing import studies
from tests.servers.up import Talaria, talaria
from transfer.home import Home

AT_ONCE = 32  # that have been asked for and not ended
LOOK_S = 0.2
STUDIES = 50  # different ones, sent again and again with --force's means


def restarted(up: Talaria) -> float:
    """Start it again; return the seconds until it is ready."""
    up.stop()
    begun = time.monotonic()
    up.start()
    return time.monotonic() - begun


def dispatched(up: Talaria, deployment: str, sources: list[Path], count: int) -> None:
    """Make so many dispatches, and wait for their end.

    Raises:
        RuntimeError: one has failed, so that the figures would say nothing.
    """

    def ended(*states: str) -> int:
        asked = {"flow_runs": {"state": {"type": {"any_": states}}}, "deployments": {"id": {"any_": [deployment]}}}
        return int(up.api("POST", "/flow_runs/count", **asked))

    before, made = ended("COMPLETED"), 0
    while (done := ended("COMPLETED") - before) < count:
        if bad := ended("FAILED", "CRASHED", "CANCELLED"):
            raise RuntimeError(f"{bad} dispatches have not ended well")
        for _ in range(min(count - made, AT_ONCE - (made - done))):
            asked = {"paths": [str(sources[made % len(sources)])], "targets": ["shelf"], "force": True}
            up.api("POST", f"/deployments/{deployment}/create_flow_run", parameters=asked)
            made += 1
        time.sleep(LOOK_S)


def row(up: Talaria, count: int, rate: float) -> str:
    home = Home(up.home)
    prefect = sum(path.stat().st_size for path in up.database.parent.glob("prefect.db*"))
    ledger = sum(path.stat().st_size for path in up.home.glob("ledger.sqlite*"))
    memory = [up.child(mark).memory_info().rss / MIB for mark in ("talaria.front", "talaria.engine.worker")]
    sizes = [one / MB for one in (prefect, ledger, used(home))]
    cells = [f"{count}", f"{rate:.2f}", *(f"{one:.1f}" for one in sizes), *(f"{one:.0f}" for one in memory)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dispatches", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=10)
    given = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(prefix="talaria-benchmark-") as name, talaria(Path(name)) as up:
        first = restarted(up)  # the very first one migrates the database
        sources = [Path(name) / "studies" / str(number) for number in range(STUDIES)]
        for source in sources:
            studies.ct(source, 1, side=16)
        (Path(name) / "shelf").mkdir()
        up.apply(shelf={"type": "folder", "folder": str(Path(name) / "shelf"), "max_dispatches": 16})
        deployment = str(up.api("GET", "/deployments/name/dispatch/talaria")["id"])
        print("| dispatches | a second | Prefect MB | ledger MB | kept in all MB | server MiB | worker MiB |")
        print("|---|---|---|---|---|---|---|")
        each = max(1, given.dispatches // given.rows)
        for part in range(given.rows):
            begun = time.monotonic()
            dispatched(up, deployment, sources, each)
            print(row(up, (part + 1) * each, each / (time.monotonic() - begun)), flush=True)
        shutil.rmtree(Path(name) / "studies")
        print(f"\nstart with nothing to remember {first:.1f} s, after all these dispatches {restarted(up):.1f} s")


if __name__ == "__main__":
    main()
