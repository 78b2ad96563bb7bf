"""The listener for modalities beside `storescp --fork`: on disk and in memory, over 1, 16 and 50 associations.

    .venv/bin/python -m benchmarks.receive [--rounds 5] [--set small] [--associations 1] [--disk /var/tmp]

Two anchors, `storescp --fork` as it comes, which parses and re-encodes what it gets, and with `+B`, which keeps bytes
as Talaria does. Neither flushes anything; Talaria answers when data and name of a file are on disk. What that costs by
itself is "writing alone": a process that writes, flushes and names as many files of this size, one behind the other in
as many threads as there are associations, with nothing else to do; nobody who answers for each instance can be faster
on this disk. Over one association a bare loop (`benchmarks.bare`) does that with what comes over a connection. The
sender has its PDUs in memory and waits for each answer. Candidates take turns, ratios are those of a round; between two
runs the folder is emptied and the disk has written what it holds. On a disk files are emptied and put aside, not
removed: ext4 without a journal looks for inodes beside those that were given up in the last half minute, which took
whoever came next up to 1 ms for each file. CPU is the receiver's, with all processes below it. Memory is what the
listener and these take above what they took when nothing had come yet.
"""

from __future__ import annotations

import argparse
import itertools
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

from benchmarks.measure import MB, Run, in_turn, machine, run, section
from benchmarks.retrieve import SETS, _children_cpu, emptied, show, storescp
from benchmarks.retrieve_source import CLASS, PDU, instance, pdus
from talaria.testing.process import listening
from tests.servers import wire

AET = "DST"
ASSOCIATIONS = (1, 16, 50)
MEMORY = "/dev/shm"
ALONE = "writing alone"
NUMBERS = itertools.count()  # of files that were put aside


def listen(folder: Path) -> None:
    """Receive as the product's process does, until somebody ends it."""
    from protocols.dimse.committing import Reports
    from protocols.dimse.intake import ListenerDesk, Reception
    from protocols.dimse.keeping import Terms
    from protocols.dimse.receivers import Receivers
    from protocols.dimse.scp import StorageScp
    from transfer.spool import Spool

    receivers = Receivers()
    terms = Terms("ct", AET, most=64, keep_free=0)
    reception = Reception(terms, Spool(folder), lambda origin, uids: set(), Reports(), receivers.versions)
    reception.prepare()
    desk = ListenerDesk()
    desk.seat([reception])
    print(StorageScp("127.0.0.1", 0, "", desk, lend=receivers.lend).port, flush=True)
    threading.Event().wait()


def send(port: int, associations: int, count: int, size: int) -> None:
    """Store instances from memory over several associations at once; each waits for its answers."""
    each = count // associations
    prepared = [[pdus(1, *instance(at * each + n, size)) for n in range(each)] for at in range(associations)]
    socks = [_associate(port) for _ in range(associations)]
    failed: list[BaseException] = []

    def store(sock: socket.socket, messages: list[bytes]) -> None:
        try:
            for one in messages:
                sock.sendall(one)
                _answered(sock)
        except BaseException as exc:
            failed.append(exc)

    threads = [threading.Thread(target=store, args=pair) for pair in zip(socks, prepared, strict=True)]
    with section():
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    for sock in socks:
        sock.sendall(b"\5\0\0\0\0\4\0\0\0\0")
        sock.recv(10)
        sock.close()
    if failed:
        raise failed[0]


def write(folder: Path, threads: int, count: int, size: int) -> None:
    """Write files from memory, each flushed and named before the next of its thread; as many threads at once."""
    from protocols.files.durable import way_of

    way, data = way_of(folder), memoryview(os.urandom(size))
    failed: list[BaseException] = []

    def keep(thread: int) -> None:
        try:
            for number in range(count // threads):
                part = way(folder)
                for at in range(0, size, PDU):
                    part.wrote(at + os.write(part.fd, data[at : at + PDU]))
                part.written()
                part.keep(f"{thread}.{number}", replace=False)
                part.named(str(folder))
                part.close()
        except BaseException as exc:
            failed.append(exc)

    running = [threading.Thread(target=keep, args=(thread,)) for thread in range(threads)]
    with section():
        for one in running:
            one.start()
        for one in running:
            one.join()
    if failed:
        raise failed[0]


def _associate(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    context = wire.item(0x30, CLASS.encode()) + wire.item(0x40, wire.EXPLICIT.encode())
    user = wire.item(0x51, struct.pack(">I", PDU)) + wire.item(0x52, b"1.2.3")
    items = wire.item(0x10, b"1.2.840.10008.3.1.1.1") + wire.item(0x20, b"\1\0\0\0" + context) + wire.item(0x50, user)
    body = struct.pack(">HH16s16s32x", 1, 0, AET.encode().ljust(16), b"BENCH".ljust(16)) + items
    sock.sendall(struct.pack(">BxI", 1, len(body)) + body)
    head = _exactly(sock, 6)
    if head[0] != 2:
        raise RuntimeError("the association was not accepted")
    _exactly(sock, int.from_bytes(head[2:], "big"))
    return sock


def _answered(sock: socket.socket) -> None:
    head = _exactly(sock, 6)
    body = _exactly(sock, int.from_bytes(head[2:], "big"))
    status = wire.number(wire.decode_command(body[6:])[0x00000900])
    if head[0] != 4 or status:
        raise RuntimeError(f"answered with {status:04X}")


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise RuntimeError("the receiver hung up")
        data += piece
    return data


# ---- the candidates


@contextmanager
def talaria(folder: Path) -> Iterator[tuple[int, psutil.Process]]:
    argv = [sys.executable, "-m", "benchmarks.receive", "--task=listen", str(folder)]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout
        port = int(child.stdout.readline())
        while not listening(port):
            time.sleep(0.01)
        time.sleep(1)  # until what it has started has imported what it needs
        yield port, psutil.Process(child.pid)
    finally:
        child.kill()
        child.wait()


def measured(
    folder: Path, server: tuple[int, psutil.Process], idle_mib: float, associations: int, count: int, size: int
) -> Run:
    """Send, count what lies there, and return wall time, the receiver's CPU, and what it took above idle, MiB."""
    port, process = server
    _begin_peak(process)
    cpu = _cpu(process)
    wall_s = task("send", port, associations, count, size).wall_s
    check(folder, count)
    return Run(wall_s, _cpu(process) - cpu, _peak(process) - idle_mib)


def writing_alone(folder: Path, associations: int, count: int, size: int) -> Run:
    done = task("write", folder, associations, count, size)
    check(folder, count)
    return done


def task(name: str, *arguments: object) -> Run:
    """Run a function of this module in a fresh interpreter."""
    return run([sys.executable, "-m", "benchmarks.receive", f"--task={name}", *map(str, arguments)])


def check(folder: Path, count: int) -> None:
    there = sum(len(files) for _, _, files in os.walk(folder))
    if there != count:
        raise RuntimeError(f"{there} files of {count}")


def _tree(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def _cpu(process: psutil.Process) -> float:
    """Seconds that a process and all below it have used, those too that have ended."""
    used = _children_cpu(process)
    for one in process.children(recursive=True):
        with suppress(psutil.Error):
            used += 0 if one.ppid() == process.pid else sum(one.cpu_times()[:2])
    return used


def _begin_peak(process: psutil.Process) -> None:
    for one in _tree(process):
        with suppress(OSError):  # it has ended
            Path(f"/proc/{one.pid}/clear_refs").write_text("5")


def _peak(process: psutil.Process) -> float:
    """The most that a process and all below it have held since their peaks began anew, what they share once, MiB."""
    kib = 0
    for one in _tree(process):
        with suppress(OSError):
            peak = _kib(one, "status", "VmHWM:") - _kib(one, "status", "VmRSS:")
            kib += _kib(one, "smaps_rollup", "Pss:") + peak
    return kib / 1024


def _kib(process: psutil.Process, table: str, key: str) -> int:
    lines = Path(f"/proc/{process.pid}/{table}").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def compare(name: str, associations: int, rounds: int, root: Path) -> None:
    """Print the table of one set over so many associations."""
    count, size = SETS[name]
    count -= count % associations
    where = "in memory" if str(root).startswith(MEMORY) else "on disk"
    print(f"\n## {name}, {where}: {count} instances of {size / MB:.2f} MB over {associations} associations")
    ours, plain, kept, alone, aside = (root / each for each in ("ours", "plain", "kept", "alone", "aside"))
    aside.mkdir(exist_ok=True)
    with (
        emptied(ours), emptied(plain), emptied(kept), emptied(alone),
        talaria(ours) as one, storescp(plain) as two, storescp(kept, "+B") as three,
    ):  # fmt: skip

        def clear() -> None:
            for folder in (ours, plain, kept, alone):
                for path in sorted(folder.rglob("*"), reverse=True):
                    if path.is_dir():
                        path.rmdir()
                    elif str(root).startswith(MEMORY):
                        path.unlink()
                    else:
                        os.truncate(path, 0)
                        path.rename(aside / str(next(NUMBERS)))
            os.sync()

        def candidate(folder: Path, server: tuple[int, psutil.Process]) -> Callable[[], Run]:
            _begin_peak(server[1])
            return partial(measured, folder, server, _peak(server[1]), associations, count, size)

        candidates = {
            "talaria": candidate(ours, one),
            "storescp --fork": candidate(plain, two),
            "storescp --fork +B": candidate(kept, three),
            ALONE: partial(writing_alone, alone, associations, count, size),
        }
        if associations == 1:
            argv = [sys.executable, "-m", "benchmarks.bare", str(alone), str(count), str(size), "--kept"]
            candidates["a bare loop, files kept"] = partial(run, argv)
        show(in_turn(candidates, rounds, clear), count * size, ("storescp --fork", "storescp --fork +B", ALONE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", choices=["small", "ct", "large"], action="append")
    parser.add_argument("--associations", type=int, action="append")
    parser.add_argument("--disk", default="/var/tmp", help="a folder on a real disk")
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task == "listen":
        listen(Path(args.arguments[0]))
    elif args.task == "send":
        send(*map(int, args.arguments))
    elif args.task == "write":
        write(Path(args.arguments[0]), *map(int, args.arguments[1:]))
    else:
        print(f"{machine()}, load {os.getloadavg()[0]:.1f}")
        for base in (args.disk, MEMORY):
            with tempfile.TemporaryDirectory(dir=base, prefix="talaria-receive-") as root:
                for name in args.set or ("small", "ct"):
                    for associations in args.associations or ASSOCIATIONS:
                        compare(name, associations, args.rounds, Path(root))


if __name__ == "__main__":
    main()
