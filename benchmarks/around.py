"""What a dispatch of many small files costs around its push: from Enter to the receipt, and in the worker's memory.

    python -m benchmarks.around [--files 20000 80000] [--rounds 3] [--in-place] [--each 3]

A `talaria up` runs on loopback, on a state directory of its own; `talaria send` takes CT images of some 10 kB to a
folder target on the same file system. The source is on that file system, too, so that its files are linked into
staging; with --in-place it lies in memory (/dev/shm), and they are read where they lie. What the push takes is what its
receipt says. Memory is what the worker's peak rises by in the first dispatch, for each file. With --each they are
studies of so many files, which go as one flood.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.commands import command, up
from benchmarks.measure import machine
from talaria.testing import studies

PER_SERIES = 500
UID_CHARS = 56  # of those that images may be given
SIDE = 48  # pixels
AIM = 2.0  # from Enter to the receipt, of the push alone
MEMORY_AIM_BYTES = 1000  # for each file


@dataclass(frozen=True)
class Round:
    """One dispatch: seconds, seconds of the worker's CPU, and by how many bytes its peak rose."""

    whole_s: float
    push_s: float
    cpu_s: float
    memory: int


def make(folder: Path, count: int, each: int = 0) -> None:
    """Write so many images, in some series of one study, or in studies of so many each."""
    study, size = studies.uid(UID_CHARS), each or PER_SERIES
    for first in range(0, count, size):
        number = min(size, count - first)
        place, series = folder / f"{first // size:05}", studies.uid(UID_CHARS)
        studies.ct(place, number, side=SIDE, study=studies.uid(UID_CHARS) if each else study, series=series)


def worker() -> psutil.Process:
    """Return the process that runs dispatches."""
    ours = psutil.Process().children(recursive=True)
    (found,) = [one for one in ours if any("talaria.engine.worker" in part for part in one.cmdline())]
    return found


def peak(process: psutil.Process) -> int:
    """Return the most memory that a process has had resident, in bytes."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def send(environment: Mapping[str, str], source: Path, count: int, archive: Path, each: int) -> Round:
    """Send the files into an empty folder, in studies of so many each, or as one."""
    archive.mkdir()
    process = worker()
    used, most = process.cpu_times(), peak(process)
    begun = time.perf_counter()
    flood = ["--each", "folder"] if each else []
    told = command(environment, "send", str(source), "--to", "archive", "--force", "--json", *flood)
    whole = time.perf_counter() - begun
    after = process.cpu_times()
    receipt = json.loads(told)["targets"]["archive"]
    if receipt["delivered"] != count:
        raise RuntimeError(f"{receipt['delivered']} of {count} were delivered")
    shutil.rmtree(archive)
    cpu = after.user + after.system - used.user - used.system
    return Round(whole, receipt["seconds"], cpu, peak(process) - most)


def measure(root: Path, sources: Path, count: int, rounds: int, each: int) -> str:
    """Return a line of the table."""
    source, archive = sources / f"{count}", root / "archive"
    source.mkdir()
    make(source, count, each)
    few = sources / "few"
    few.mkdir(exist_ok=True)
    with up(root, 1) as environment:
        targets = root / "archive.yaml"
        targets.write_text(f"targets:\n  archive: {{type: folder, folder: {archive}}}\n")
        command(environment, "target", "apply", str(targets))
        if not any(few.iterdir()):
            make(few, 3, each)
        send(environment, few, 3, archive, each)  # what the worker loads for its first dispatch is not counted
        found = [send(environment, source, count, archive, each) for _ in range(rounds)]
    shutil.rmtree(source)
    whole = statistics.median(one.whole_s for one in found)
    push = statistics.median(one.push_s for one in found)
    ratios = [one.whole_s / one.push_s for one in found]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    each = f"{1e6 * statistics.median(one.cpu_s for one in found) / count:.0f}"
    return f"| {count} | {whole:.1f} | {push:.1f} | {spread} | {AIM:g} | {each} | {found[0].memory / count:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[20_000, 80_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--each", type=int, default=0, help="files of each study of a flood; 0 for one study")
    parser.add_argument("--in-place", action="store_true", help="let the source lie on another file system")
    options = parser.parse_args()
    print(f"{machine()}; memory aimed at: {MEMORY_AIM_BYTES} bytes for each file\n")
    print(
        "| files | Enter to receipt s | push s | to the push | aim | CPU of the worker, us/file | memory, bytes/file |"
    )
    print("|---|---|---|---|---|---|---|")
    for count in options.files:
        with (
            tempfile.TemporaryDirectory(prefix="talaria-benchmark-") as name,
            tempfile.TemporaryDirectory(prefix="talaria-", dir="/dev/shm" if options.in_place else None) as other,
        ):
            print(measure(Path(name), Path(other), count, options.rounds, options.each), flush=True)


if __name__ == "__main__":
    main()
