"""What forgetting takes: start, first page and memory with much to remember, and what goes on while half of it goes.

    python -m benchmarks.pruned [--targets 500] [--dispatches 50000] [--days 15] [--folder DIR] [--rounds 3]

`talaria up` runs on a state directory as it is after a month of work (`benchmarks.pages_data`), which is made first,
or on a copy of the one in DIR, which `benchmarks.pages --folder DIR` makes. First it is started some times, beside one
with two dispatches. Then it is told to keep some days only, while a client asks for dispatches of the next day and
another process records what was delivered, all the time; a row says how long they waited while the old went, and
before that. The exit code is 1 if anything waited for more than 2 s meanwhile.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx

from benchmarks.measure import MB, machine
from benchmarks.pages import cpu_ms, family, made, memory, up
from benchmarks.pages_data import PASSWORD
from transfer.confirmed import Spot
from transfer.ledger import Ledger
from transfer.outcome import DELIVERED
from transfer.plan import Item

AIM_S = 2.0  # longest wait of a write
LOOK_S, QUIET_S = 1.0, 10.0  # between two looks at what is left; without a change at the end
WAIT_S = 1800.0  # until all of it has gone
EACH_S = 0.05  # between two writes
LISTS = ("", "dispatches?days=", "targets")


class Writer(threading.Thread):
    """Writes again and again, and notes how long each time took."""

    def __init__(self, write: Callable[[int], None]) -> None:
        super().__init__(daemon=True)
        self._write, self._over = write, threading.Event()
        self._wrong: Exception | None = None
        self.took: list[tuple[float, float]] = []  # when it began, and the seconds

    def run(self) -> None:
        try:
            while not self._over.wait(EACH_S):
                begun = time.monotonic()
                self._write(len(self.took))
                self.took.append((begun, time.monotonic() - begun))
        except Exception as exc:
            self._wrong = exc

    def stop(self) -> None:
        """Write no more; raise what ended it before."""
        self._over.set()
        self.join()
        if self._wrong:
            raise self._wrong

    def row(self, name: str, since: float, until: float) -> tuple[str, float]:
        """Return a row of the table, and the longest wait in it."""
        quiet = [took for begun, took in self.took if begun < since]
        beside = [took for begun, took in self.took if since <= begun <= until] or [0.0]
        cells = [f"{len(beside)}", f"{1000 * statistics.median(quiet):.0f}", f"{1000 * statistics.median(beside):.0f}"]
        cells += [f"{max(quiet):.2f}", f"{max(beside):.2f}"]
        return f"| {name} | {' | '.join(cells)} |", max(beside)


def started(root: Path, rounds: int) -> str:
    """Return how long a start takes, what each first page takes then, and what the server process holds."""
    times, pages, holds = [], dict[str, list[float]](), ""
    for _ in range(rounds):
        begun = time.monotonic()
        with up(root, TALARIA_KEEP_DAYS="3650") as environment:
            times.append(time.monotonic() - begun)
            headers = {"Accept": "text/html", "Origin": base(environment)}
            with httpx.Client(base_url=base(environment), timeout=300, trust_env=False, headers=headers) as web:
                web.post("/talaria/login", data={"user": "anna", "password": PASSWORD, "next": "/"})
                for page in LISTS:
                    asked = time.monotonic()
                    answer = web.get(f"/talaria/{page}")
                    pages.setdefault(page, []).append(time.monotonic() - asked)
                    assert answer.status_code == 200, f"{page}: {answer.status_code}"
            holds = memory(int(environment["SERVER"]))
    each = ", ".join(f"`{page or 'home'}` {1000 * statistics.median(took):.0f} ms" for page, took in pages.items())
    return f"{statistics.median(times):.1f} s ({min(times):.1f}-{max(times):.1f}); first {each}; {holds}"


def base(environment: Mapping[str, str]) -> str:
    return f"http://127.0.0.1:{environment['PORT']}"


def left(home: Path, now: datetime, days: int) -> list[int]:
    """Return how many runs, events, and dispatches of the ledger are left that were older than so many days then."""
    before, said = now - timedelta(days=days), "%Y-%m-%d %H:%M:%S.%f"
    ended = "SELECT COUNT(*) FROM flow_run WHERE state_type IN ('COMPLETED','FAILED') AND end_time<?"
    asked: dict[str, list[tuple[str, str | float]]] = {
        "prefect/prefect.db": [(ended, before.strftime(said))],
        "ledger.sqlite": [
            ("SELECT COUNT(*) FROM (SELECT 1 FROM items GROUP BY dispatch_id HAVING MAX(time)<?)", before.timestamp())
        ],
    }
    occurred = (now - timedelta(days=min(days, 7))).strftime(said)
    asked["prefect/prefect.db"].append(("SELECT COUNT(*) FROM events WHERE occurred<?", occurred))
    found = []
    for path, queries in asked.items():
        with closing(sqlite3.connect(f"file:{home / path}?mode=ro", uri=True, timeout=60)) as db:
            found += [int(db.execute(query, (value,)).fetchone()[0]) for query, value in queries]
    return found


def sizes(home: Path) -> str:
    """Return what the databases take of the disk, and how much of it is free to be used again."""
    said = []
    for path in (home / "prefect" / "prefect.db", home / "ledger.sqlite"):
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60)) as db:
            free, size = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_size"))
        said.append(f"{path.name} {path.stat().st_size / MB:.0f} MB ({free * size / MB:.0f} free)")
    return ", ".join(said)


def pruned(root: Path, days: int) -> bool:
    """Print what a look takes after which so many days are left; return whether nothing waited too long."""
    home = root / "home"
    print(f"\nbefore: {sizes(home)}", flush=True)
    with up(root, TALARIA_KEEP_DAYS=str(days)) as environment, Ledger(home / "ledger.sqlite") as ledger:
        ready = time.monotonic()
        user, _, password = (home / "api.auth").read_text().strip().partition(":")
        with httpx.Client(base_url=base(environment), timeout=300, trust_env=False, auth=(user, password)) as web:
            deployment = web.get("/api/deployments/name/dispatch/talaria").json()["id"]
            tomorrow = {"scheduled_time": (datetime.now(UTC) + timedelta(days=1)).isoformat()}
            state = {"type": "SCHEDULED", "state_details": tomorrow}
            body = {"state": state, "parameters": {"paths": ["/x"], "targets": ["target-000"]}}

            def create(_: int) -> None:
                web.post(f"/api/deployments/{deployment}/create_flow_run", json=body).raise_for_status()

            def record(number: int) -> None:
                item = Item(f"{number}.dcm", 1, 1)
                ledger.record("new", "target-000", "endpoint", item, DELIVERED, Spot("", f"1.{number}"))

            writers = {"asked for a dispatch": Writer(create), "recorded an item": Writer(record)}
            for one in writers.values():
                one.start()
            front = {one: line for one, line in family(int(environment["SERVER"])).items() if "talaria.front" in line}
            now = datetime.now(UTC)
            there = still = left(home, now, days)
            begun = ended = quiet = math.inf
            size = ""
            while time.monotonic() < quiet + QUIET_S:
                time.sleep(LOOK_S)
                still, late = left(home, now, days), time.monotonic()
                if still != there and begun == math.inf:
                    begun, used = late - LOOK_S, cpu_ms(front)
                if not any(still):
                    ended = min(ended, late)
                    size, before = sizes(home), size
                    quiet = min(quiet, late) if size == before else late
                if late > ready + WAIT_S:
                    raise RuntimeError(f"{still} of {there} are still there")
            cpu = (cpu_ms(front) - used) / 1000
            for one in writers.values():
                one.stop()
        print(f"{there[0]} runs, {there[1]} events, and {there[2]} dispatches of the ledger went", end=" ")
        print(f"in {ended - begun:.0f} s, and their disk within {quiet - begun:.0f} s;", end=" ")
        print(f"{cpu:.1f} s of CPU with the writers'; {memory(int(environment['SERVER']))}")
    print(f"after: {sizes(home)}\n")
    print("| while it goes | times | median before, ms | median, ms | longest before, s | longest, s |")
    print("|---|---:|---:|---:|---:|---:|")
    rows = [writer.row(name, begun, quiet) for name, writer in writers.items()]
    print("\n".join(row for row, _ in rows), flush=True)
    return all(longest <= AIM_S for _, longest in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=500)
    parser.add_argument("--dispatches", type=int, default=50_000)
    parser.add_argument("--days", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="copy the state directory that is there")
    given = parser.parse_args()
    print(machine(), f"load {os.getloadavg()[0]:.1f}", sep=", ", flush=True)
    with tempfile.TemporaryDirectory(prefix="talaria-pruned-") as folder:
        empty, full = Path(folder) / "empty", Path(folder) / "full"
        made(empty, 1, 0)
        if given.folder:
            shutil.copytree(given.folder, full, symlinks=True)
        else:
            made(full, given.targets, given.dispatches)
        with up(full, TALARIA_KEEP_DAYS="3650"):
            pass  # brings a database of an older Prefect up to date
        print(f"ready with two dispatches after {started(empty, given.rounds)}", flush=True)
        print(f"with {given.dispatches} dispatches after {started(full, given.rounds)}", flush=True)
        sys.exit(0 if pruned(full, given.days) else 1)


if __name__ == "__main__":
    main()
