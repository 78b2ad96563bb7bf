"""C-STORE: Talaria's sender beside DCMTK's `dcmsend` and `storescu`, and pynetdicom's `send_c_store`.

    python -m benchmarks.dicom --sink discard      a sink that throws everything away (benchmarks/discard.c)
    python -m benchmarks.dicom --sink storescp     storescp --fork --ignore -pdu 131072, with TCP_NODELAY=1
    python -m benchmarks.dicom --sink orthanc      an Orthanc that stores
    python -m benchmarks.dicom --sink 5ms|20ms     the first sink behind a relay with such a round trip
    python -m benchmarks.dicom --whole             `talaria send`, from its start to its exit

Three sets, which it makes: `ct` 500 CT of 0.5 MB, `small` 2,000 of 30 kB, `large` one multi-frame of 300 MB; fewer and
smaller ones for the sinks that are slow. Each candidate looks at its input files first, as dcmsend does, and then sends
them: Talaria's time has both in it (and the second part on its own line), but not the imports of its interpreter, which
are told apart. `+` means TCP_NODELAY=1 in the environment of DCMTK's programs, which is their best; what takes minutes
runs once. Files are hot in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.measure import MB, Run, in_turn, machine, run, section
from talaria.testing import process, studies
from talaria.testing.relay import relay
from tests.servers.dcmtk import storescp
from tests.servers.orthanc import orthanc

REFERENCE = "dcmsend+"
SINKS = ("discard", "storescp", "orthanc", "5ms", "20ms")
SETS = ("ct", "small", "large")
SENDS = ("send", "send-planned", "send-at-once")  # whether it plans first; whether all associations are opened at once
LONG_WAYS = {"5ms": 0.0025, "20ms": 0.010}  # seconds in each direction
SEVERAL = 4  # associations at most, the default of a target
MANY = 8  # on a long way each association waits for its answers
# Bytes of a set in proportion, for sinks that would take minutes: an Orthanc stores some MB/s of small files, and a
# round trip of 20 ms lets one association send 50 instances a second.
SHARE = {"discard": 1.0, "storescp": 1.0, "orthanc": 0.1, "5ms": 0.2, "20ms": 0.2}
NODELAY = {"TCP_NODELAY": "1"}


def make(root: Path, name: str, share: float) -> Path:
    """Write one of the sets, or a part of it."""
    folder = root / name
    if name == "ct":
        studies.ct(folder, max(1, int(500 * share)), side=512)
    elif name == "small":
        studies.ct(folder, max(1, int(2000 * share)), side=108)
    else:
        studies.multiframe(folder / "large.dcm", max(1, int(572 * share)), side=512)
    return folder


# ---- what is measured, in processes of its own


def send(port: int, concurrency: int, folder: Path, *, plan_first: bool, at_once: bool = False) -> None:
    """Send as Talaria does: plan the folder (or have it planned before), send it.

    Args:
        at_once: whether all associations are opened from the start, whether they help or not.
    """
    from protocols.dimse import pace
    from protocols.dimse.fleet import Fleet
    from protocols.dimse.transport import Peer
    from transfer.plan import scan
    from transfer.receipt import PushReport
    from transfer.throttle import Throttle

    plan = scan([folder])
    told = PushReport()
    if at_once:
        pace.LOOK_S, pace.ENOUGH, pace.CERTAIN, pace.AIM = 0.0, 1e9, 1e9, 1e9
    with section():
        if plan_first:
            plan = scan([folder])
        Fleet(Peer("127.0.0.1", port, called="ANY-SCP"), plan, told, concurrency, "lossless", Throttle(None)).deliver()
    arrived = sum(outcome.arrived for outcome in told.outcomes.values())
    if arrived != len(plan.items):
        raise RuntimeError(f"{arrived} of {len(plan.items)} arrived")


def pynetdicom(port: int, folder: Path) -> None:
    """The loop that pynetdicom's documentation shows.

    With a pause between two operations, or a fast peer's answer gets lost about once in some hundred: its reactor may
    not have woken up from the operation before, counts as paused, and takes the answer when it does.
    """
    from pydicom import dcmread
    from pynetdicom import AE

    paths = sorted(folder.iterdir())
    with section():
        ae = AE()
        heads = [dcmread(path, stop_before_pixels=True) for path in paths]
        for pair in {(ds.SOPClassUID, ds.file_meta.TransferSyntaxUID) for ds in heads}:
            ae.add_requested_context(*pair)
        assoc = ae.associate("127.0.0.1", port)
        if not assoc.is_established:
            raise RuntimeError("no association")
        for path in paths:
            while assoc._is_paused:
                time.sleep(0.0005)
            if assoc.send_c_store(dcmread(path)).get("Status") != 0:
                raise RuntimeError(f"{path} was refused")
        assoc.release()


def program(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Run:
    """Run a program to its end and measure it: wall time, CPU and peak memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TCP_NODELAY"} | dict(env or {})
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=said, env=environment)
        watch = _Peak(child.pid)
        _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - begun
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise RuntimeError(f"{argv[0]} ended with {child.returncode}: {said.read()[-500:]!r}")
    return Run(wall, used.ru_utime + used.ru_stime, watch.stop())


class _Peak(threading.Thread):
    """Looks at the peak memory of a process while it lives: what `wait4` tells has its parent's in it."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status, self._over, self._mib = Path(f"/proc/{pid}/status"), threading.Event(), 0.0
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.02):
            with suppress(OSError):
                text = self._status.read_text()
                if "VmHWM:" in text:
                    self._mib = int(text.split("VmHWM:")[1].split()[0]) / 1024

    def stop(self) -> float:
        self._over.set()
        self.join()
        return self._mib


def ours(task: str, *arguments: object) -> Run:
    """Run one of the functions above in a fresh interpreter."""
    return run([sys.executable, "-m", "benchmarks.dicom", f"--task={task}", *map(str, arguments)])


def candidates(
    port: int, folder: Path, associations: Sequence[int]
) -> tuple[dict[str, Callable[[], Run]], dict[str, Callable[[], Run]]]:
    """Who takes part, by name: in every round, and once. Programs of DCMTK get PDUs as large as they take them."""
    dcmsend = ["dcmsend", "-pdu", "131072", "+sd", "127.0.0.1", str(port), str(folder)]
    storescu = ["storescu", "-pdu", "131072", "+sd", "127.0.0.1", str(port), str(folder)]
    return {
        "talaria, one association": partial(ours, "send", port, 1, folder),
        "talaria, sending only": partial(ours, "send-planned", port, 1, folder),
        **{f"talaria, up to {count}": partial(ours, "send", port, count, folder) for count in associations},
        **{f"talaria, {count} at once": partial(ours, "send-at-once", port, count, folder) for count in associations},
        REFERENCE: partial(program, dcmsend, NODELAY),
        "storescu+": partial(program, storescu, NODELAY),
    }, {
        "dcmsend, once": partial(program, dcmsend),
        "pynetdicom, once": partial(ours, "pynetdicom", port, folder),
    }


# ---- where it goes


@contextmanager
def discard(folder: Path) -> Iterator[tuple[int, int]]:
    """Compile and run the sink that throws everything away; yields its port and its process id."""
    folder.mkdir()
    built = folder / "discard"
    source = Path(__file__).with_name("discard.c")
    subprocess.run([process.program("cc"), "-O2", "-o", str(built), str(source)], check=True)
    port = process.free_port()
    with process.server([str(built), str(port)], port, folder / "discard.log") as running:
        yield port, running.pid


@contextmanager
def sink(name: str, folder: Path) -> Iterator[Sink]:
    """Run a sink until the block ends."""
    with ExitStack() as stack:
        if name == "storescp":
            server = stack.enter_context(storescp(folder / name, "--ignore", "-q", "-pdu", "131072", env=NODELAY))
            yield Sink(server.port, server.process.pid)
        elif name == "orthanc":
            archive = stack.enter_context(orthanc(folder / name))
            yield Sink(archive.dicom_port, archive.pid, archive.clear)
        else:
            port, pid = stack.enter_context(discard(folder / name))
            if name in LONG_WAYS:
                port = stack.enter_context(relay(port, delay_s=LONG_WAYS[name])).port
            yield Sink(port, pid)


@dataclass(frozen=True)
class Sink:
    """A running sink: its port, its process, and what empties it between runs."""

    port: int
    pid: int
    empty: Callable[[], None] = lambda: None

    def cpu_s(self) -> float:
        """What it has used so far, with its children: who is busy all the time is the limit."""
        total = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                # proc(5): after the name in brackets come state, parent, group, session; CPU times are 14 to 17.
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.pid:
                    total += sum(map(int, fields[11:15]))
        return total / os.sysconf("SC_CLK_TCK")


# ---- what is told


def table(found: Mapping[str, list[Run]], busy: Mapping[str, Sequence[float]], size: int) -> str:
    """Medians, and medians of the rounds' ratios to the reference: of rates, and of CPU times.

    Args:
        busy: CPU seconds of the sink in each run, the warm-up too.
    """
    lines = [
        f"| sender | MB/s | wall s | CPU s | sink's CPU s | peak MiB | rate to {REFERENCE} | CPU to {REFERENCE} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        pairs = list(zip(runs, found[REFERENCE][: len(runs)], strict=True))
        rates = [ref.wall_s / one.wall_s for one, ref in pairs]
        cpus = [one.cpu_s / ref.cpu_s for one, ref in pairs]
        wall, cpu, peak = (
            statistics.median(getattr(one, what) for one in runs) for what in ("wall_s", "cpu_s", "peak_mib")
        )
        receiver = statistics.median(busy[name][-len(runs) :])
        times = f"{size / MB / wall:.0f} | {wall:.2f} | {cpu:.2f} | {receiver:.2f}"
        lines.append(f"| {name} | {times} | {peak:.0f} | {_spread(rates)} | {_spread(cpus)} |")
    return "\n".join(lines)


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def compare(name: str, sets: Sequence[str], rounds: int, *, with_slow: bool, share: float | None, root: Path) -> None:
    """Measure all candidates at one sink, set by set."""
    with sink(name, root) as receiver:
        for each in sets:
            folder = make(root / name, each, SHARE[name] if share is None else share)
            files = list(folder.iterdir())
            size = sum(path.stat().st_size for path in files)
            every, once = candidates(receiver.port, folder, (SEVERAL, MANY) if name in LONG_WAYS else (SEVERAL,))
            busy: dict[str, list[float]] = {who: [] for who in (*every, *once)}
            watched = {who: partial(_with_sink, one, receiver, busy[who]) for who, one in every.items()}
            found = in_turn(watched, rounds, receiver.empty)
            for slow, candidate in once.items() if with_slow else ():  # enough to see where they are
                receiver.empty()
                found[slow] = [_with_sink(candidate, receiver, busy[slow])]
            print(
                f"\n{each}: {len(files)} files, {size / MB:.0f} MB, to {name}\n\n{table(found, busy, size)}", flush=True
            )
            shutil.rmtree(folder)


def _with_sink(candidate: Callable[[], Run], receiver: Sink, busy: list[float]) -> Run:
    """Run a candidate and note the CPU time that the sink used meanwhile."""
    before = receiver.cpu_s()
    measured = candidate()
    busy.append(receiver.cpu_s() - before)
    return measured


def idle() -> Run:
    """What an interpreter with the sender's libraries takes without sending anything."""
    return program([sys.executable, "-c", "import protocols.dimse.fleet"])


# ---- `talaria send` as a whole


def whole(sets: Sequence[str], rounds: int, share: float, root: Path) -> None:
    """Measure `talaria send` against a running `talaria up`, beside the bare sender, to the discarding sink."""
    talaria = Path(sys.executable).with_name("talaria")
    port = process.free_port()
    home = root / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TALARIA_"))}
    environment = kept | {"TALARIA_HOME": str(home), "HOME": str(root)}
    log = (root / "up.log").open("wb")
    with discard(root / "sink") as (at, _):
        up = subprocess.Popen(
            [talaria, "up", "--port", str(port)], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            target = root / "targets.yaml"
            target.write_text(f"targets:\n  sink: {{type: dicom, host: 127.0.0.1, port: {at}}}\n")
            _until(lambda: _quiet([talaria, "status"], environment), 120)
            if not _quiet([talaria, "target", "apply", target], environment):
                raise RuntimeError("talaria target apply failed")
            print("\n| set | `talaria send`, s | of which the push, s | bare sender, s | overhead, s |")
            print("|---|---|---|---|---|")
            for each in sets:
                folder = make(root, each, share)
                rows = [_whole_round(talaria, folder, at, environment) for _ in range(rounds + 1)][1:]
                medians = [statistics.median(column) for column in zip(*rows, strict=True)]
                print(f"| {each} | " + " | ".join(f"{value:.2f}" for value in medians) + " |", flush=True)
                shutil.rmtree(folder)
        finally:
            process.stop(up)
            log.close()


def _whole_round(talaria: Path, folder: Path, port: int, env: Mapping[str, str]) -> tuple[float, float, float, float]:
    begun = time.perf_counter()
    argv = [str(talaria), "send", str(folder), "--to", "sink", "--force", "--json"]
    done = subprocess.run(argv, env=env, capture_output=True, check=False)
    wall = time.perf_counter() - begun
    if done.returncode:
        raise RuntimeError(f"talaria send ended with {done.returncode}: {done.stderr.decode()[-800:]}")
    push = json.loads(done.stdout)["targets"]["sink"]["seconds"]
    bare = ours("send", port, SEVERAL, folder).wall_s
    return wall, push, bare, wall - bare


def _until(ready: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise RuntimeError("talaria up is not ready")
        time.sleep(0.5)


def _quiet(argv: Sequence[str | Path], env: Mapping[str, str]) -> bool:
    done = subprocess.run(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sink", choices=SINKS, action="append", help="one or several; discard if none is named")
    parser.add_argument("--set", choices=SETS, action="append", help="one or several; all if none is named")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--share", type=float, help="how much of each set, as a fraction")
    parser.add_argument("--no-slow", action="store_true", help="leave out what takes minutes")
    parser.add_argument("--whole", action="store_true", help="`talaria send` as a whole")
    parser.add_argument(
        "--task", choices=("send", "send-planned", "send-at-once", "pynetdicom"), help=argparse.SUPPRESS
    )
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task in SENDS:
        port, associations, folder = options.arguments
        send(
            int(port),
            int(associations),
            Path(folder),
            plan_first=options.task != "send-planned",
            at_once=options.task == "send-at-once",
        )
        return
    if options.task == "pynetdicom":
        pynetdicom(int(options.arguments[0]), Path(options.arguments[1]))
        return
    sets = options.set or SETS
    with tempfile.TemporaryDirectory(prefix="talaria-benchmark-") as name:
        root = Path(name)
        print(machine())
        if options.whole:
            whole(sets, options.rounds, options.share or 1.0, root)
            return
        start = idle()
        print(f"Start of an interpreter with the sender: {start.wall_s:.2f} s, {start.peak_mib:.0f} MiB")
        for each in options.sink or ("discard",):
            compare(each, sets, options.rounds, with_slow=not options.no_slow, share=options.share, root=root)


if __name__ == "__main__":
    main()
