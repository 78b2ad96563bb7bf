"""Our own pages with many targets and dispatches: the server's time for each, and when a browser first paints it.

    python -m benchmarks.pages [--targets 500] [--dispatches 50000] [--rounds 20] [--folder DIR]

A `talaria up` runs on loopback, on a state directory of its own, whose database is filled before it starts: targets of
type folder, dispatches of the last 30 days to one of them each, a tenth failed, 200 waiting. Server time is from a
request's first byte to its answer's last, over a connection that is kept, in turn over all pages. CPU is what all
processes of the server have used meanwhile, which other work on the machine changes little. First paint is what
Chromium reports (`first-contentful-paint`), page by page, each in a new tab with nothing cached but what it loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx

from benchmarks.measure import machine
from talaria.testing import process

AIM_MS, PAINT_MS = 100, 1000
PASSWORD = "benchmark-of-pages"
PAGES = (
    "/talaria/", "/talaria/targets", "/talaria/targets?q=target-007&state=unchecked", "/talaria/targets/target-007",
    "/talaria/targets/target-007/edit", "/talaria/add-target", "/talaria/dispatches",
    "/talaria/dispatches?state=failed&days=7", "/talaria/dispatches?q=target-007", "/talaria/dispatches/{run}",
    "/talaria/send", "/talaria/upload", "/talaria/query", "/talaria/settings", "/talaria/settings/users",
    "/talaria/settings/audit",
)  # fmt: skip
LAST = {"COMPLETED": "Completed", "FAILED": "Failed", "SCHEDULED": "Scheduled"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=500)
    parser.add_argument("--dispatches", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="keep the state directory there, or use the one that is there")
    parser.add_argument("--no-paint", action="store_true", help="leave the browser out")
    given = parser.parse_args()
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="talaria-pages-") as folder:
        root: Path = given.folder or Path(folder)
        mark = root / "run"
        if not mark.exists():
            root.mkdir(exist_ok=True)
            with up(root) as environment:
                run = prepared(root, environment, given.targets)
            filled(root / "home", given.targets, given.dispatches, run)
            mark.write_text(run)
        run = mark.read_text()
        with up(root) as environment:
            base = f"http://127.0.0.1:{environment['PORT']}"
            served(base, run, given.rounds, int(environment["SERVER"]))
            if not given.no_paint:
                painted(base, run)


@contextmanager
def up(root: Path) -> Iterator[dict[str, str]]:
    """Run `talaria up` until the block ends; yields the environment of its commands."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TALARIA_"))}
    port = process.free_port()
    environment = kept | {"TALARIA_HOME": str(root / "home"), "HOME": str(root), "PORT": str(port)}
    log = root / "up.log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "talaria", "up", "--port", str(port)]
        running = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            process.until(lambda: b"ready:" in log.read_bytes() or running.poll() is not None, 300)
            if running.poll() is not None:
                raise RuntimeError(log.read_text())
            yield environment | {"SERVER": str(running.pid)}
        finally:
            process.stop(running)


def prepared(root: Path, environment: dict[str, str], targets: int) -> str:
    """Make the targets, a user, and a dispatch that stands for all; return the id of its run."""
    (root / "archive").mkdir()
    known = {
        f"target-{number:03}": {"type": "folder", "folder": str(root / "archive"), "contact": "team@example.org"}
        for number in range(targets)
    }
    (root / "targets.yaml").write_text(json.dumps({"targets": known}))
    (root / "note.txt").write_text("a study")
    talaria = [sys.executable, "-m", "talaria"]
    subprocess.run([*talaria, "target", "apply", str(root / "targets.yaml")], env=environment, check=True, stdout=-3)
    add = [*talaria, "user", "add", "anna", "--role", "admin"]
    subprocess.run(add, env=environment, check=True, input=PASSWORD, text=True, stdout=-3)
    send = [*talaria, "send", str(root / "note.txt"), "--to", "target-007", "--json"]
    done = subprocess.run(send, env=environment, check=True, capture_output=True, text=True)
    return str(json.loads(done.stdout)["flow_run_id"])


def filled(home: Path, targets: int, dispatches: int, run: str) -> None:
    """Add dispatches as copies of one, with times, states and targets of their own."""
    chance = random.Random(7)
    now = datetime.now(UTC)
    with closing(sqlite3.connect(home / "prefect" / "prefect.db")) as db, db:
        db.row_factory = sqlite3.Row
        one = dict(db.execute("SELECT * FROM flow_run WHERE id=?", (run,)).fetchone())
        state = dict(db.execute("SELECT * FROM flow_run_state WHERE id=?", (one["state_id"],)).fetchone())
        runs, states = [], []
        for number in range(dispatches):
            kind = "SCHEDULED" if number < 200 else "FAILED" if number % 10 == 0 else "COMPLETED"
            begun = now - timedelta(seconds=chance.random() * 30 * 86_400)
            if kind == "SCHEDULED":
                begun = now + timedelta(days=1)
            at, name = begun.strftime("%Y-%m-%d %H:%M:%S.%f"), f"target-{chance.randrange(targets):03}"
            key, state_key = str(uuid.UUID(int=chance.getrandbits(128))), str(uuid.UUID(int=chance.getrandbits(128)))
            mine = json.loads(one["parameters"]) | {"targets": [name]}
            runs.append({
                **one, "id": key, "state_id": state_key, "name": f"{chance.getrandbits(80):020x} to {name}",
                "state_type": kind, "state_name": LAST[kind], "start_time": None if kind == "SCHEDULED" else at,
                "end_time": None if kind == "SCHEDULED" else at, "expected_start_time": at, "created": at,
                "updated": at,
                "next_scheduled_start_time": at if kind == "SCHEDULED" else None, "state_timestamp": at,
                "parameters": json.dumps(mine), "idempotency_key": None,
            })  # fmt: skip
            states.append({
                **state, "id": state_key, "flow_run_id": key, "type": kind, "name": LAST[kind], "timestamp": at
            })  # fmt: skip
        for table, rows in (("flow_run", runs), ("flow_run_state", states)):
            names = ", ".join(f'"{name}"' for name in rows[0])
            marks = ", ".join(f":{name}" for name in rows[0])
            db.executemany(f"INSERT INTO {table} ({names}) VALUES ({marks})", rows)


def cpu_ms(server: int) -> float:
    """Return the CPU time that a process and those that it has started have used so far."""
    parents, family = dict[int, int](), {server}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    while more := {one for one, parent in parents.items() if parent in family} - family:
        family |= more
    ran = (one.read_text() for process in family for one in Path(f"/proc/{process}").glob("task/*/schedstat"))
    return sum(int(one.split()[0]) for one in ran) / 1e6


def served(base: str, run: str, rounds: int, server: int) -> None:
    """Print the server's time for each page."""
    times: dict[str, list[float]] = {path: [] for path in PAGES}
    works: dict[str, list[float]] = {path: [] for path in PAGES}
    with httpx.Client(
        base_url=base, timeout=300, trust_env=False, headers={"Accept": "text/html", "Origin": base}
    ) as web:
        web.post("/talaria/login", data={"user": "anna", "password": PASSWORD, "next": "/"})
        for number in range(rounds + 1):
            for path in PAGES:
                used, begun = cpu_ms(server), time.perf_counter()
                answer = web.get(path.format(run=run))
                took = 1000 * (time.perf_counter() - begun)
                if answer.status_code != 200:
                    raise RuntimeError(f"{path}: {answer.status_code}")
                if number:  # the first loads templates
                    times[path].append(took)
                    works[path].append(cpu_ms(server) - used)
    print(f"\n| page | median, ms | p95, ms (aim {AIM_MS}) | CPU, median, ms |\n|---|---:|---:|---:|")
    for path, found in times.items():
        p95 = statistics.quantiles(found, n=20)[-1]
        mark, work = " **" if p95 > AIM_MS else "", statistics.median(works[path])
        print(f"| `{path}` | {statistics.median(found):.0f} | {p95:.0f}{mark} | {work:.0f} |", flush=True)


def painted(base: str, run: str) -> None:
    """Print when Chromium first paints each page."""
    from playwright.sync_api import sync_playwright

    print(f"\n| page | first paint, ms (aim {PAINT_MS}) |\n|---|---:|")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{base}/talaria/login")
        page.fill("[name=user]", "anna")
        page.fill("[name=password]", PASSWORD)
        page.keyboard.press("Enter")
        page.wait_for_load_state()
        for path in PAGES:
            page = context.new_page()
            page.goto(base + path.format(run=run))
            paint = page.wait_for_function(
                "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
            ).json_value()
            print(f"| `{path}` | {paint:.0f}{' **' if paint > PAINT_MS else ''} |", flush=True)
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
