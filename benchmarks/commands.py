"""Commands of `talaria` as people type them, from Enter to the prompt, beside DCMTK's `dcmsend` in the same rounds.

    python -m benchmarks.commands [--rounds 7]

A `talaria up` runs on loopback, on a state directory of its own. `send` and `dcmsend` take the same 500 CT of 0.5 MB to
the same sink, which throws everything away (benchmarks/discard.c); every round has each of them once, in turn. What a
push itself takes is what its receipt says; the rest of `send` is what is held against the aim. An interpreter that does
nothing, and one that has what commands are written with, are the floor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.dicom import NODELAY, discard, make, program
from benchmarks.measure import Run, in_turn, machine
from talaria.testing import process

READY_S = 180
REFERENCE = "`dcmsend`"
SEND = "`talaria send`"
# Seconds on an idle machine; of `send`, beyond the push itself.
AIMS = {"`talaria --help`": 0.3, "`talaria target list`": 0.5, f"{SEND}, beyond the push": 1.0}


@contextmanager
def up(root: Path, sink: int) -> Iterator[dict[str, str]]:
    """Run `talaria up` with a target named sink until the block ends; yields the environment of its commands."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TALARIA_"))}
    environment = kept | {"TALARIA_HOME": str(root / "home"), "HOME": str(root)}
    with (root / "up.log").open("wb") as log:
        running = subprocess.Popen(
            [talaria(), "up", "--port", str(process.free_port())],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + READY_S
            while b"ready:" not in (root / "up.log").read_bytes():
                if running.poll() is not None or time.monotonic() > end:
                    raise RuntimeError((root / "up.log").read_text())
                time.sleep(0.2)
            targets = root / "targets.yaml"
            targets.write_text(f"targets:\n  sink: {{type: dicom, host: 127.0.0.1, port: {sink}}}\n")
            command(environment, "target", "apply", str(targets))
            yield environment
        finally:
            process.stop(running, wait_s=60)


def talaria() -> str:
    return str(Path(sys.executable).with_name("talaria"))


def command(environment: Mapping[str, str], *arguments: str) -> str:
    """Run a command to its end and return what it printed."""
    done = subprocess.run([talaria(), *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"talaria {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-800:]}")
    return done.stdout


def send(environment: Mapping[str, str], folder: Path, pushes: list[float]) -> Run:
    """Measure `talaria send`, and note how long its push took."""
    before = os.times()
    begun = time.perf_counter()
    told = command(environment, "send", str(folder), "--to", "sink", "--force", "--json")
    wall, after = time.perf_counter() - begun, os.times()
    receipt = json.loads(told)["targets"]["sink"]
    if receipt["delivered"] != len(list(folder.iterdir())):
        raise RuntimeError(f"{receipt['delivered']} were delivered")
    pushes.append(receipt["seconds"])
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(wall, used, 0.0)


def quiet(environment: Mapping[str, str], *arguments: str) -> Run:
    return program([talaria(), *arguments], environment)


def table(found: Mapping[str, list[Run]], pushes: list[float]) -> str:
    """Medians (and the range) of the rounds, and of their ratios to dcmsend's."""
    lines = ["| from Enter to the prompt | s | range | CPU s | to `dcmsend` | aim, s |", "|---|---|---|---|---|---|"]
    beyond = [Run(one.wall_s - push, 0.0, 0.0) for one, push in zip(found[SEND], pushes, strict=True)]
    for name, runs in {**found, f"{SEND}, beyond the push": beyond}.items():
        walls = [one.wall_s for one in runs]
        ratio = statistics.median(one.wall_s / ref.wall_s for one, ref in zip(runs, found[REFERENCE], strict=True))
        cpu = statistics.median(one.cpu_s for one in runs)
        spread = f"{min(walls):.2f}-{max(walls):.2f}"
        used = f"{cpu:.2f}" if cpu else ""
        aim = AIMS.get(name, "")
        lines.append(f"| {name} | {statistics.median(walls):.2f} | {spread} | {used} | {ratio:.2f} | {aim} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--share", type=float, default=1.0, help="how much of the set, as a fraction")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="talaria-benchmark-") as name:
        root = Path(name)
        folder = make(root, "ct", options.share)
        pushes: list[float] = []
        with discard(root / "sink") as (sink, _), up(root, sink) as environment:
            dcmsend = ["dcmsend", "-pdu", "131072", "+sd", "127.0.0.1", str(sink), str(folder)]
            bare = [sys.executable, "-c", "pass"]
            candidates: dict[str, Callable[[], Run]] = {
                "`python -c pass`": partial(program, bare),
                "`python -c 'import typer'`": partial(program, [sys.executable, "-c", "import typer"]),
                "`talaria --help`": partial(quiet, environment, "--help"),
                "`talaria target list`": partial(quiet, environment, "target", "list"),
                "`talaria jobs list`": partial(quiet, environment, "jobs", "list"),
                SEND: partial(send, environment, folder, pushes),
                REFERENCE: partial(program, dcmsend, NODELAY),
            }
            found = in_turn(candidates, options.rounds)
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1_000_000
        print(f"{machine()}; load {os.getloadavg()[0]:.1f}; {len(list(folder.iterdir()))} files, {size:.0f} MB\n")
        print(table(found, pushes[1:]))  # the first round is a warm-up


if __name__ == "__main__":
    main()
