"""Retrievals beside DCMTK's programs: from a source in memory, from real ones, over a long way; and answers to C-FIND.

    .venv/bin/python -m benchmarks.retrieve [--rounds 5] [--set small]

Two anchors: `getscu`, and `movescu` to `storescp --fork`, as they come, which parse and re-encode what they get; and
with `+B`, which keeps bytes as Talaria does. "a bare loop" is what the kernel takes for as many bytes into as many
files (`benchmarks.bare`): the limit of all of them; "files kept" is that with the calls by which Talaria names files.
DCMTK's programs get PDUs as large as they take them, and no Nagle. Own CPU is that of the process, of `storescp` that
of its children too. Candidates take turns, ratios are of a round. What is received goes to a file system in memory.
Memory is what a retrieval takes above the idle process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import psutil

from benchmarks.measure import MB, Run, in_turn, machine, peak_mib, run, section
from benchmarks.retrieve_source import ANSWERS, CLASS, PDU, SERIES, STUDY, instance, source
from talaria.testing.process import free_port, listening

NODELAY = {"TCP_NODELAY": "1"}
SETS = {
    "small": (2000, 30_000), "ct": (500, 524_288), "large": (1, 300_000_000), "many": (20_000, 9_000),
    "huge": (1, 2_000_000_000),
}  # fmt: skip
FAR = 200  # small instances over the long way
LISTED, LISTED_FEW = 2000, 490  # accession numbers
SLOTS = 2  # of a source, unless its `max_dispatches` says otherwise
UNKNOWN = 10  # of them, where nearly all are there
DCMQRSCP_STUDIES = 500  # more it keeps of no AE title, whatever its configuration says: enough for LISTED_FEW
ROOT = "/dev/shm"


# ---- the candidates


def ours(task: str, *arguments: object, env: Mapping[str, str] | None = None) -> Run:
    """Run a function of this module in a fresh interpreter."""
    return run([sys.executable, "-m", "benchmarks.retrieve", f"--task={task}", *map(str, arguments)], env)


def program(
    argv: Sequence[str], server: psutil.Process | None = None, folder: Path | None = None, count: int = 0
) -> Run:
    """Run a program of DCMTK's; its CPU is its own, and that of the server's children."""
    before = _children_cpu(server)
    begun = time.perf_counter()
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | NODELAY)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - begun
    if child.returncode:
        raise RuntimeError(f"{argv[0]} ended with {child.returncode}")
    if folder is not None and len(list(folder.iterdir())) != count:
        raise RuntimeError(f"{argv[0]} left {len(list(folder.iterdir()))} files of {count}")
    return Run(wall, used.ru_utime + used.ru_stime + _children_cpu(server) - before, 0.0)


def _children_cpu(server: psutil.Process | None) -> float:
    """Seconds that a process has used, and its children, those too that nobody has waited for yet."""
    if server is None:
        return 0.0
    while True:
        children = {}
        for child in server.children():
            with suppress(psutil.Error):
                children[child.pid] = sum(child.cpu_times()[:2])
        times = server.cpu_times()
        if {child.pid for child in server.children()} == children.keys():  # else one that has ended is in both or none
            own = times.user + times.system + times.children_user + times.children_system
            return float(own + sum(children.values()))


@contextmanager
def above_idle() -> Iterator[None]:
    """As `measure.section`, but memory is what the block takes above what the process has before it, MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: imports had theirs
    idle = peak_mib()
    before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    yield
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps(asdict(Run(wall, cpu, peak_mib() - idle))), flush=True)


def retrieve(port: int, folder: Path, aet: str, associations: int, study: str) -> None:
    """Retrieve a study as a driver does: find, fetch, compare."""
    from blocks.base import Direction
    from blocks.dicom import DicomTarget
    from imaging.query import Query
    from tasks.dicom import retrieve as fetch
    from transfer.receipt import PushReport

    target = DicomTarget(
        host="127.0.0.1", port=port, direction=Direction.QUERY, idle_timeout_s=60, aet_target=aet,
        concurrency=associations, max_dispatches=associations,
    )  # fmt: skip
    with above_idle():
        receipt = fetch(target, Query(StudyInstanceUID=study), folder, PushReport())
    if receipt.state != "delivered":
        raise RuntimeError(f"{receipt}")


def look_up(port: int, aet: str, single: bool, numbers: Path) -> None:
    """Find a list of accession numbers, each by a query of its own or as a retrieval with two slots does.

    Args:
        numbers: file of them, those in the list that are not there behind a minus.
    """
    from imaging.query import Query
    from protocols.dimse.query import finder
    from protocols.dimse.search import PeerSearch
    from protocols.dimse.transport import Peer

    lines = numbers.read_text().split()
    wanted, known = tuple(one.removeprefix("-") for one in lines), {one for one in lines if not one.startswith("-")}
    with finder(Peer("127.0.0.1", port, aet)) as asked, section():
        search = PeerSearch(asked, 1 if single else SLOTS)
        queries = [Query(AccessionNumber=(one,)) for one in wanted] if single else [Query(AccessionNumber=wanted)]
        found = {one.attributes["AccessionNumber"] for query in queries for one in search.find(query)}
    if found != known:
        raise RuntimeError(f"{len(found)} of {len(wanted)} numbers found")


def find(port: int) -> None:
    from protocols.dimse.levels import STUDY_FIELDS
    from protocols.dimse.query import finder
    from protocols.dimse.transport import Peer

    with finder(Peer("127.0.0.1", port)) as asked, section():
        found = list(asked.ask_for("STUDY", {"AccessionNumber": "MANY"}, STUDY_FIELDS[:11]))
    if len(found) != ANSWERS:
        raise RuntimeError(f"{len(found)} answers")


def find_pynetdicom(port: int) -> None:
    from pydicom.dataset import Dataset
    from pynetdicom import AE

    from protocols.dimse.levels import STUDY_FIELDS

    ae = AE()
    ae.add_requested_context("1.2.840.10008.5.1.4.1.2.2.1")
    assoc = ae.associate("127.0.0.1", port)
    keys = Dataset()
    for keyword in STUDY_FIELDS[:11]:
        setattr(keys, keyword, "")
    keys.QueryRetrieveLevel, keys.AccessionNumber = "STUDY", "MANY"
    with section():
        found = [one for _, one in assoc.send_c_find(keys, "1.2.840.10008.5.1.4.1.2.2.1") if one is not None]
    assoc.release()
    if len(found) != ANSWERS:
        raise RuntimeError(f"{len(found)} answers")


# ---- the tables


def show(found: Mapping[str, list[Run]], size: int, anchors: Sequence[str]) -> None:
    heads = [f"rate to {anchor}" for anchor in anchors] + [f"CPU to {anchors[0]}"]
    print(f"\n| what | MB/s | wall s | CPU s | MiB more | {' | '.join(heads)} |")
    print("|---|---|---|---|---|" + "---|" * len(heads))
    for name, runs in found.items():
        keys = ("wall_s", "cpu_s", "peak_mib")
        wall, cpu, peak = (statistics.median(getattr(one, key) for one in runs) for key in keys)
        cells = []
        for anchor in anchors:
            ratios = [other.wall_s / one.wall_s for one, other in zip(runs, found[anchor], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        shares = [one.cpu_s / other.cpu_s for one, other in zip(runs, found[anchors[0]], strict=True)]
        own = name.startswith("talaria")
        print(f"| {name} | {size / MB / wall:.0f} | {wall:.3f} | {cpu:.3f} | {f'{peak:.0f}' if own else ''} | "
              f"{' | '.join(cells)} | {statistics.median(shares):.2f} |")  # fmt: skip


@contextmanager
def storescp(folder: Path, *options: str) -> Iterator[tuple[int, psutil.Process]]:
    port = free_port()
    argv = ["storescp", "--fork", "-pdu", str(PDU), "-aet", "DST", "-od", str(folder), *options, str(port)]
    server = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | NODELAY)
    try:
        while not listening(port):
            time.sleep(0.01)
        yield port, psutil.Process(server.pid)
    finally:
        server.kill()
        server.wait()


def dcmtk(tool: str, port: int, aet: str, study: str, *options: str) -> list[str]:
    keys = ["-S", "-k", "0008,0052=STUDY", "-k", f"0020,000d={study}"]
    return [tool, "-pdu", str(PDU), "-aec", aet, *keys, *options, "127.0.0.1", str(port)]


@contextmanager
def emptied(folder: Path) -> Iterator[partial[None]]:
    """Yield what makes a folder empty again."""

    def clear() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    clear()
    yield partial(clear)


def compare(name: str, rounds: int, root: Path) -> None:
    count, size = SETS[name]
    print(f"\n## {name}: {count} instances of {size / MB:.2f} MB")
    folder, scp_port = root / "in", free_port()
    with (
        emptied(folder) as clear,
        storescp(folder) as (plain, plain_server),
        storescp(folder, "+B") as (kept, kept_server),
        source(count, size, {"PLAIN": plain, "KEPT": kept, "TALARIA": scp_port}) as port,
    ):
        get = partial(dcmtk, "getscu", port, "ANY-SCP", STUDY, "-od", str(folder))
        move = partial(dcmtk, "movescu", port, "ANY-SCP", STUDY)
        bare = partial(run, [sys.executable, "-m", "benchmarks.bare", str(folder), str(count), str(size)])
        bare_kept = partial(run, [*bare.args[0], "--kept"])
        scp = {"TALARIA_SCP_PORT": str(scp_port), "TALARIA_SCP_HOST": "127.0.0.1"}
        by_get = {
            "talaria, C-GET": partial(ours, "retrieve", port, folder, "ANY-SCP", 2, STUDY),
            "getscu": partial(program, get(), None, folder, count),
            "getscu +B": partial(program, get("+B"), None, folder, count),
            "a bare loop": bare,
            "a bare loop, files kept": bare_kept,
        }
        show(in_turn(by_get, rounds, clear), count * size, ("getscu", "getscu +B"))
        by_move = {
            "talaria, C-MOVE": partial(ours, "retrieve", port, folder, "NOGET", 2, STUDY, env=scp),
            "movescu to storescp": partial(program, move("-aem", "PLAIN"), plain_server, folder, count),
            "movescu to storescp +B": partial(program, move("-aem", "KEPT"), kept_server, folder, count),
            "a bare loop": bare,
            "a bare loop, files kept": bare_kept,
        }
        show(in_turn(by_move, rounds, clear), count * size, ("movescu to storescp", "movescu to storescp +B"))


def compare_memory(root: Path) -> None:
    """What one retrieval of very many instances, and of a very large one, takes above the idle process."""
    print("\n## Memory\n\n| set | MiB above idle | wall s | CPU s |\n|---|---|---|---|")
    folder = root / "in"
    for name in ("small", "many", "huge"):
        count, size = SETS[name]
        with emptied(folder), source(count, size, {}) as port:
            made = ours("retrieve", port, folder, "ANY-SCP", 2, STUDY)
        print(f"| {count} of {size / MB:.2f} MB | {made.peak_mib:.0f} | {made.wall_s:.2f} | {made.cpu_s:.2f} |")


def compare_far(rounds: int, root: Path) -> None:
    from talaria.testing.relay import relay

    print(f"\n## 20 ms to the source and back: {FAR} instances of 0.03 MB")
    folder = root / "in"
    with emptied(folder) as clear, source(FAR, 30_000, {}) as near, relay(near, delay_s=0.01) as way:
        get = partial(dcmtk, "getscu", way.port, "ANY-SCP", STUDY, "-od", str(folder))
        show(
            in_turn(
                {
                    "talaria, one association": partial(ours, "retrieve", way.port, folder, "ANY-SCP", 1, STUDY),
                    "talaria, up to 4": partial(ours, "retrieve", way.port, folder, "ANY-SCP", 4, STUDY),
                    "getscu": partial(program, get(), None, folder, FAR),
                    "getscu +B": partial(program, get("+B"), None, folder, FAR),
                },
                rounds,
                clear,
            ),
            FAR * 30_000,
            ("getscu", "getscu +B"),
        )


Maker = Callable[[Path], AbstractContextManager[tuple[str, int, str, int]]]


def compare_real(maker: Maker, rounds: int, root: Path) -> None:
    """From a real server, whose own CPU is below the table."""
    with maker(root / "server") as (name, port, aet, pid):
        for kind, count, size in (("small", 600, 30_000), ("ct", 100, 524_288)):
            study = fill(port, aet, count, size, root / f"{name}-{kind}")
            print(f"\n## From {name}, {kind}: {count} instances of {size / MB:.2f} MB")
            folder, server = root / "in", psutil.Process(pid)
            get = partial(dcmtk, "getscu", port, aet, study, "-od", str(folder))
            spent: dict[str, list[float]] = {}

            def counted(what: str, work: partial[Run], spent: dict[str, list[float]] = spent,
                        server: psutil.Process = server) -> Run:  # fmt: skip
                before = _children_cpu(server)
                done = work()
                spent.setdefault(what, []).append(_children_cpu(server) - before)
                return done

            with emptied(folder) as clear:
                candidates = {
                    "talaria": partial(ours, "retrieve", port, folder, aet, 2, study),
                    "getscu": partial(program, get(), None, folder, count),
                    "getscu +B": partial(program, get("+B"), None, folder, count),
                }
                turns = {what: partial(counted, what, work) for what, work in candidates.items()}
                show(in_turn(turns, rounds, clear), count * size, ("getscu", "getscu +B"))
            shares = ", ".join(f"{what} {statistics.median(each[1:]):.2f} s" for what, each in spent.items())
            print(f"\n{name}'s own CPU: {shares}")


@contextmanager
def real_orthanc(folder: Path) -> Iterator[tuple[str, int, str, int]]:
    from tests.servers.orthanc import orthanc

    with orthanc(folder) as running:
        yield "Orthanc", running.dicom_port, running.aet, running.pid


@contextmanager
def real_dcmqrscp(folder: Path) -> Iterator[tuple[str, int, str, int]]:
    from tests.servers.dcmtk import dcmqrscp

    os.environ.update(NODELAY)  # else each of its small instances waits 40 ms for getscu's acknowledgement
    with dcmqrscp(folder, studies=DCMQRSCP_STUDIES) as running:
        yield "dcmqrscp", running.port, running.aet, running.process.pid


def fill(port: int, aet: str, count: int, size: int, folder: Path) -> str:
    """Store one series at a node; returns its study's UID."""
    digit, first = ("1", 0) if size < 100_000 else ("2", 5000)
    for number in range(first, first + count):
        write(folder, number, size, {STUDY: STUDY + digit, SERIES: SERIES + digit})
    send(port, aet, folder)
    return STUDY + digit


def write(folder: Path, number: int, size: int, changes: Mapping[str, str]) -> None:
    """Write an instance of the source's, in which values are replaced by others that take as many bytes."""
    from tests.servers import wire

    command, data = instance(number, size)
    for old, new in changes.items():
        if len(wire.padded(old)) != len(wire.padded(new)) or wire.padded(old) not in data:
            raise ValueError(f"{new} can't stand in the place of {old}")
        data = data.replace(wire.padded(old), wire.padded(new), 1)
    uid = wire.uid_of(wire.decode_command(command)[0x00001000])
    folder.mkdir(exist_ok=True)
    (folder / f"{number}.dcm").write_bytes(wire.part10(CLASS, uid, wire.EXPLICIT, data))


def send(port: int, aet: str, folder: Path) -> None:
    argv = ["dcmsend", "--no-halt", "-aec", aet, "--scan-directories", "127.0.0.1", str(port), str(folder)]
    subprocess.run(argv, check=True, env=os.environ | NODELAY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shutil.rmtree(folder)


def compare_find(rounds: int) -> None:
    print(f"\n## C-FIND: {ANSWERS} answers of 11 attributes")
    with source(1, 1000, {}) as port:
        from protocols.dimse.levels import STUDY_FIELDS

        keys = [part for keyword in STUDY_FIELDS[:11] if keyword != "AccessionNumber" for part in ("-k", keyword)]
        argv = ["findscu", "-q", "-S", "-pdu", str(PDU), "-k", "QueryRetrieveLevel=STUDY", "-k", "AccessionNumber=MANY"]
        found = in_turn(
            {
                "talaria": partial(ours, "find", port),
                "findscu -q": partial(program, [*argv, *keys, "127.0.0.1", str(port)]),
                "pynetdicom": partial(ours, "find-pynetdicom", port),
            },
            rounds,
        )
        show(found, 0, ("findscu -q", "pynetdicom"))


def compare_lists(rounds: int, root: Path) -> None:
    """A list of accession numbers beside a query for each; those that are not there have to be asked for alone."""
    from talaria.testing.studies import ACCESSION

    for maker, count in ((real_orthanc, LISTED), (real_dcmqrscp, LISTED_FEW)):
        numbers = [f"{number:0{len(ACCESSION)}}" for number in range(count * 10 // 9)]
        there = [one for number, one in enumerate(numbers) if number % 10]
        with maker(root / f"list-{maker.__name__}") as (name, port, aet, _):
            for number, accession in enumerate(there):
                own = {STUDY: f"1.2.826.{100_000 + number}", SERIES: f"1.2.826.{200_000 + number}"}
                write(root / "list", number, 1000, own | {ACCESSION: accession})
            send(port, aet, root / "list")
            for unknown in (UNKNOWN, count // 10):
                print(f"\n## {count} accession numbers at {name}, of which {unknown} are not there")
                given = root / "numbers"
                missing = [f"-{one}" for one in numbers[::10][:unknown]]
                given.write_text("\n".join(there[: count - unknown] + missing))
                found = {
                    "talaria, the list": partial(ours, "look-up", port, aet, 0, given),
                    "talaria, one by one": partial(ours, "look-up", port, aet, 1, given),
                }
                show(in_turn(found, rounds), 0, ("talaria, one by one",))


OTHERS = ("memory", "far", "find", "orthanc", "dcmqrscp", "lists")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sets = ("small", "ct", "large", *OTHERS)
    parser.add_argument("--set", choices=sets, action="append", help="one or several; all if none is named")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--task", choices=("retrieve", "look-up", "find", "find-pynetdicom"), help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    given = options.arguments
    if options.task == "retrieve":
        retrieve(int(given[0]), Path(given[1]), given[2], int(given[3]), given[4])
    elif options.task == "look-up":
        look_up(int(given[0]), given[1], given[2] == "1", Path(given[3]))
    elif options.task == "find":
        find(int(given[0]))
    elif options.task == "find-pynetdicom":
        find_pynetdicom(int(given[0]))
    else:
        print(machine())
        with tempfile.TemporaryDirectory(prefix="talaria-benchmark-", dir=ROOT) as name:
            root, rounds = Path(name), options.rounds
            others = {
                "memory": partial(compare_memory, root), "far": partial(compare_far, rounds, root),
                "find": partial(compare_find, rounds),
                "orthanc": partial(compare_real, real_orthanc, rounds, root),
                "dcmqrscp": partial(compare_real, real_dcmqrscp, rounds, root),
                "lists": partial(compare_lists, min(rounds, 3), root),
            }  # fmt: skip
            for one in options.set or sets:
                others.get(one, partial(compare, one, rounds, root))()


if __name__ == "__main__":
    main()
