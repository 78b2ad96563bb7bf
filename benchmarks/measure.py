"""What all benchmarks share: sections measured in processes of their own, taken in turn, compared round by round.

A candidate is a command. Whatever it does before and after, it measures one section with `section()`, which prints
the result as the last line of its output: wall time, user and system time of the process, and its peak memory.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

MB = 1_000_000  # rates and sizes are told in these
MIB = 1 << 20


@dataclass(frozen=True)
class Run:
    """One measured section: seconds, seconds of CPU (user and system), peak memory of the process in MiB."""

    wall_s: float
    cpu_s: float
    peak_mib: float


@contextmanager
def section() -> Iterator[None]:
    """Measure the block, and print the result."""
    before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    yield
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps(asdict(Run(wall, cpu, peak_mib()))), flush=True)


def peak_mib() -> float:
    """The most memory that this process has had resident, MiB. Unlike ru_maxrss nothing of its parent is in it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def run(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Run:
    """Run a candidate and return what it measured."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | dict(env or {}))
    return Run(**json.loads(done.stdout.strip().splitlines()[-1]))


def in_turn(
    candidates: Mapping[str, Callable[[], Run]], rounds: int, between: Callable[[], None] = lambda: None
) -> dict[str, list[Run]]:
    """Warm up with one round, then run all candidates one after the other, round after round."""
    found: dict[str, list[Run]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, candidate in candidates.items():
            between()
            measured = candidate()
            if number:
                found[name].append(measured)
    return found


def table(found: Mapping[str, list[Run]], reference: str, size: int) -> str:
    """Medians as a Markdown table; the ratio is the median of the rounds' ratios of rates to the reference's.

    Args:
        size: bytes that each run moves.
    """
    lines = [
        f"| what | MB/s | wall s | CPU s | peak MiB | rate to {reference} |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        ratios = [ref.wall_s / one.wall_s for one, ref in zip(runs, found[reference], strict=True)]
        wall, cpu, peak = (
            statistics.median(getattr(one, what) for one in runs) for what in ("wall_s", "cpu_s", "peak_mib")
        )
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        lines.append(f"| {name} | {size / MB / wall:.0f} | {wall:.2f} | {cpu:.2f} | {peak:.0f} | {spread} |")
    return "\n".join(lines)


def machine() -> str:
    """One line about where a figure was taken."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    system = f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}"
    return f"{os.cpu_count()} cores ({model}), {system}"
