"""Our own pages with many targets and dispatches: the server's time for each, and when a browser first paints it.

    python -m benchmarks.pages [--targets 500] [--dispatches 50000] [--rounds 25] [--folder DIR]

A `talaria up` runs on loopback, on a state directory as it is after a month of work (`benchmarks.pages_data`), which is
made first if the folder has none. Server time is from a request's first byte to its answer's last, over a connection
that is kept, in turn over all pages; CPU is what all processes of the server have used meanwhile, which other work on
the machine changes less. First paint is what Chromium reports (`first-contentful-paint`), page by page, each in a new
tab with nothing cached but what it loaded. Commands are measured from Enter to the prompt. The exit code is 1 if a page
misses an aim.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from benchmarks.measure import machine
from benchmarks.pages_data import NAME, PASSWORD, filled, prepared
from talaria.testing import process

AIM_MS, PAINT_MS = 100, 1000  # of pages; of the API and of commands it is only said what they take
SETTLED_S = 65  # after the start, when what a server does once is over
PAGES = (
    "", "targets", "targets?sort=type", f"targets?q={NAME}&state=unchecked", f"targets/{NAME}", f"targets/{NAME}/edit",
    "add-target", "add-target/dicom", "dispatches", "dispatches?days=", "dispatches?days=&offset=10000",
    "dispatches?state=failed&days=7", "dispatches?state=failed&days=", "dispatches?state=partial",
    "dispatches?state=waiting", "dispatches?state=running", "dispatches?state=delivered&days=30",
    f"dispatches?q={NAME}", f"dispatches?q={NAME}&days=", "dispatches?q=nothing-at-all&days=",
    f"dispatches?target={NAME}&days=", "dispatches/{run}", "dispatches/{large}", "dispatches/{large}?q=04999", "send",
    "upload", "query", "import", "sources", "sources/source-03", "sources/source-03/edit", "notifications",
    "notifications/rule-1", "settings", "settings/users", "settings/tokens", "settings/audit",
    "settings/audit?who=nobody", "login",
)  # fmt: skip
PARTS = ("targets?q=target-00", "dispatches/{run}")  # of pages, as their scripts ask for them again and again
API = ("api/v1/targets", "api/v1/jobs?limit=50", "api/v1/status")
COMMANDS = (("target", "list"), ("jobs", "list"), ("jobs", "list", "--failed"), ("status",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=500)
    parser.add_argument("--dispatches", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--folder", type=Path, help="keep the state directory there, or use the one that is there")
    parser.add_argument("--no-paint", action="store_true", help="leave the browser out")
    given = parser.parse_args()
    print(machine(), f"load {os.getloadavg()[0]:.1f}", sep=", ", flush=True)
    with tempfile.TemporaryDirectory(prefix="talaria-pages-") as folder:
        root: Path = given.folder or Path(folder)
        ids = made(root, given.targets, given.dispatches)
        begun = time.monotonic()
        with up(root) as environment:
            server = int(environment["SERVER"])
            print(f"\nready after {time.monotonic() - begun:.1f} s; {memory(server)}", flush=True)
            base = f"http://127.0.0.1:{environment['PORT']}"
            commands(environment)
            time.sleep(max(0.0, begun + SETTLED_S - time.monotonic()))
            missed = served(base, ids, given.rounds, server)
            missed += [] if given.no_paint else painted(base, ids)
            print(f"\nat the end {memory(server)}")
    print(f"\nmissed: {', '.join(missed) or 'none'}")
    sys.exit(1 if missed else 0)


def made(root: Path, targets: int, dispatches: int) -> dict[str, str]:
    """Make the state directory if it isn't there; return the ids of dispatches that pages are asked of."""
    mark = root / "ids.json"
    if not mark.exists():
        root.mkdir(exist_ok=True)
        with up(root) as environment:
            ids = prepared(root, environment)
        begun = time.monotonic()
        filled(root / "home", targets, dispatches, ids["run"])
        print(
            f"{targets} targets and {dispatches} dispatches were made in {time.monotonic() - begun:.0f} s", flush=True
        )
        mark.write_text(json.dumps(ids))
    return dict(json.loads(mark.read_text()))


@contextmanager
def up(root: Path, **more: str) -> Iterator[dict[str, str]]:
    """Run `talaria up`, with more variables, until the block ends; yields the environment of its commands."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TALARIA_"))}
    port = process.free_port()
    environment = kept | {"TALARIA_HOME": str(root / "home"), "HOME": str(root), "PORT": str(port)} | more
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


def family(server: int) -> dict[int, str]:
    """Return a process and those that it has started, each with its command line."""
    parents, found = dict[int, int](), {server}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    while more := {one for one, parent in parents.items() if parent in found} - found:
        found |= more
    lines = {}
    for one in found:
        with suppress(OSError):
            lines[one] = Path(f"/proc/{one}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return lines


def cpu_ms(processes: Mapping[int, str]) -> float:
    """Return the CPU time that processes have used so far."""
    ran = 0
    for one in processes:
        for stat in Path(f"/proc/{one}/task").glob("*/schedstat"):
            with suppress(OSError):  # the thread has ended
                ran += int(stat.read_text().split()[0])
    return ran / 1e6


def memory(server: int) -> str:
    """Say what the process with the pages holds in memory, and what it held at most."""
    (front,) = (one for one, line in family(server).items() if "talaria.front" in line)
    status = Path(f"/proc/{front}/status").read_text().splitlines()
    held = {
        key: int(value.split()[0]) >> 10 for key, _, value in (one.partition(":") for one in status) if "kB" in value
    }
    return f"the server process holds {held['VmRSS']} MiB ({held['RssAnon']} of its own), at most {held['VmHWM']}"


def commands(environment: Mapping[str, str], rounds: int = 5) -> None:
    """Print how long commands take."""
    talaria = str(Path(sys.executable).with_name("talaria"))
    print("\n| command | median, ms |\n|---|---:|")
    for arguments in COMMANDS:
        times = []
        for _ in range(rounds):
            begun = time.perf_counter()
            subprocess.run([talaria, *arguments], env=dict(environment), check=True, stdout=subprocess.DEVNULL)
            times.append(1000 * (time.perf_counter() - begun))
        print(f"| `talaria {' '.join(arguments)}` | {statistics.median(times):.0f} |", flush=True)


def percentile(found: list[float], part: float) -> float:
    """Return what so many percent of the values are not above: the nearest of them (no value is made up)."""
    return sorted(found)[math.ceil(part / 100 * len(found)) - 1]


def served(base: str, ids: Mapping[str, str], rounds: int, server: int) -> list[str]:
    """Print the server's time for each page, and return those that take longer than they may."""
    asked = [
        (f"/talaria/{path}", path in PARTS and part)
        for part in (False, True)
        for path in (PARTS if part else (*PAGES, *API))
    ]
    times: dict[tuple[str, bool], list[tuple[float, float]]] = {one: [] for one in asked}
    processes = family(server)
    headers = {"Accept": "text/html", "Origin": base}
    with httpx.Client(base_url=base, timeout=300, trust_env=False, headers=headers) as web:
        web.post("/talaria/login", data={"user": "anna", "password": PASSWORD, "next": "/"})
        for number in range(rounds + 1):
            for path, part in asked:
                used, begun = cpu_ms(processes), time.perf_counter()
                answer = web.get(path.format(**ids), headers={"HX-Request": "true"} if part else {})
                took = 1000 * (time.perf_counter() - begun)
                if answer.status_code != 200:
                    raise RuntimeError(f"{path}: {answer.status_code}")
                if number:  # the first loads templates
                    times[path, part].append((took, cpu_ms(processes) - used))
    print(f"\n{rounds} requests of each:\n")
    print(f"| page | median, ms | p95, ms (aim {AIM_MS}) | longest, ms | CPU, median, ms |\n|---|---:|---:|---:|---:|")
    missed = []
    for (path, part), found in times.items():
        walls, works = ([one[index] for one in found] for index in (0, 1))
        p95, name = percentile(walls, 95), path + (" (part)" if part else "")
        mark = " **" if p95 > AIM_MS and path.removeprefix("/talaria/") not in API else ""
        missed += [name] if mark else []
        middle, work = statistics.median(walls), statistics.median(works)
        print(f"| `{name}` | {middle:.0f} | {p95:.0f}{mark} | {max(walls):.0f} | {work:.0f} |")
    every = [one[0] for found in times.values() for one in found]
    print(f"| all | {statistics.median(every):.0f} | {percentile(every, 95):.0f} | {max(every):.0f} | |", flush=True)
    return missed


def painted(base: str, ids: Mapping[str, str]) -> list[str]:
    """Print when Chromium first paints each page, and return those that it paints too late."""
    from playwright.sync_api import sync_playwright

    missed = []
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
        for path in (f"/talaria/{one}" for one in PAGES):
            page = context.new_page()
            page.goto(base + path.format(**ids))
            paint = page.wait_for_function(
                "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
            ).json_value()
            missed += [f"{path} (paint)"] if paint > PAINT_MS else []
            print(f"| `{path}` | {paint:.0f}{' **' if paint > PAINT_MS else ''} |", flush=True)
            page.close()
        browser.close()
    return missed


if __name__ == "__main__":
    main()
