"""Folders on servers and on this machine: SFTP, rsync and folder targets beside the programs that people use for them.

    python -m benchmarks.files [sftp-large sftp-small rsync-large rsync-small folder-large folder-small memory]

The server is an unprivileged sshd on loopback that writes into memory (/dev/shm); `small` goes over a relay that adds
5 ms to a round trip. CPU is that of the sender with all programs that it starts, not the server's; memory is that of
our process, or of the program. Ratios are of rates, round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import MB, Run, in_turn, peak_mib, run, table

MEMORY = Path("/dev/shm")
ROUND_TRIP_S = 0.005
SMALL_FILES, SMALL_BYTES = 2000, 30_000
GROUPS = ("sftp-large", "sftp-small", "rsync-large", "rsync-small", "folder-large", "folder-small", "memory")


# ---- candidates: each is this module in a process of its own, with a job in JSON


@contextmanager
def whole_section() -> Iterator[None]:
    """Measure the block with all programs that it starts, and print the result."""

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    before, begun = cpu(), time.perf_counter()
    yield
    wall = time.perf_counter() - begun
    print(json.dumps(asdict(Run(wall, cpu() - before, peak_mib()))), flush=True)


def talaria(job: dict[str, Any]) -> None:
    """Push as a dispatch does, without Prefect and ledger."""
    from blocks.folder import FolderTarget
    from blocks.rsync import RsyncTarget
    from blocks.sftp import SftpTarget
    from tasks import DRIVERS
    from transfer.plan import scan
    from transfer.receipt import PushReport

    os.environ["TALARIA_HOME"] = job["home"]
    kinds = {"sftp": SftpTarget, "rsync": RsyncTarget, "folder": FolderTarget}
    target = kinds[job["type"]](**job["fields"])
    push = DRIVERS.of(target).push
    plan = scan([job["source"]])
    with whole_section():
        receipt = push(target, plan, PushReport())
    if receipt.unsent or any(not item.outcome.value == "delivered" for item in receipt.items):
        raise RuntimeError("not everything arrived")


def program(job: dict[str, Any]) -> None:
    """Run a program; its peak memory is the largest of all that it starts."""
    begun = time.perf_counter()
    process = subprocess.Popen(job["argv"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stdin
    process.stdin.write(job.get("input", "").encode())
    process.stdin.close()
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begun
    if status:
        raise RuntimeError(f"{job['argv'][0]} failed")
    print(json.dumps(asdict(Run(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024))), flush=True)


def by_asyncssh(job: dict[str, Any]) -> None:
    """Send with asyncssh: 64 files at once, with the cipher that we ask for too."""
    import asyncio

    import asyncssh

    paths, folder = sorted(Path(job["source"]).iterdir()), job["folder"]

    async def main() -> None:
        async with (
            asyncssh.connect(
                "127.0.0.1", job["port"], username=job["user"], client_keys=[job["key"]], known_hosts=None, config=None,
                encryption_algs=["aes128-gcm@openssh.com"],
            ) as connection,
            connection.start_sftp_client() as session,
        ):  # fmt: skip
            await session.makedirs(folder)
            limit = asyncio.Semaphore(64)

            async def put(path: Path) -> None:
                async with limit:
                    await session.put(str(path), f"{folder}/{path.name}")

            await asyncio.gather(*map(put, paths))

    with whole_section():
        asyncio.run(main())


def by_paramiko(job: dict[str, Any]) -> None:
    """Send with paramiko: eight sessions in threads over one connection, writes pipelined as `put` does."""
    from concurrent.futures import ThreadPoolExecutor

    import paramiko

    with whole_section():
        client = paramiko.SSHClient()
        client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        client.connect(
            "127.0.0.1", job["port"], job["user"], key_filename=job["key"], allow_agent=False, look_for_keys=False
        )
        paths = sorted(Path(job["source"]).iterdir())
        sessions = [client.open_sftp() for _ in range(min(8, len(paths)))]
        sessions[0].mkdir(job["folder"])

        def put(number: int) -> None:
            for path in paths[number :: len(sessions)]:
                sessions[number].put(str(path), f"{job['folder']}/{path.name}")

        with ThreadPoolExecutor(len(sessions)) as pool:
            list(pool.map(put, range(len(sessions))))
        client.close()


CANDIDATES: dict[str, Callable[[dict[str, Any]], None]] = {
    "talaria": talaria, "program": program, "asyncssh": by_asyncssh, "paramiko": by_paramiko,
}  # fmt: skip


def candidate(kind: str, **job: Any) -> Run:
    return run([sys.executable, "-m", "benchmarks.files", "--candidate", kind, "--job", json.dumps(job)])


# ---- what is sent, and where to


def make(folder: Path, large_mb: int) -> dict[str, tuple[Path, int]]:
    """Write the large file and the small ones; return the folders and their bytes."""
    large, small = folder / "large", folder / "small"
    large.mkdir()
    small.mkdir()
    with open(large / "large.dcm", "wb") as file:
        for _ in range(large_mb):
            file.write(os.urandom(MB))
    for number in range(SMALL_FILES):
        (small / f"{number:04}.dcm").write_bytes(os.urandom(SMALL_BYTES))
    return {"large": (large, large_mb * MB), "small": (small, SMALL_FILES * SMALL_BYTES)}


def against_ssh(kind: str, source: Path, size: int, work: Path, stack: ExitStack, rounds: int, delay_s: float) -> str:
    """SFTP or rsync targets beside `sftp`, the libraries, or `rsync -rt`."""
    from talaria.testing.relay import relay
    from tests.servers.openssh import openssh

    server = stack.enter_context(openssh(work / f"sshd-{kind}-{source.name}"))
    port = stack.enter_context(relay(server.port, delay_s=delay_s / 2)).port if delay_s else server.port
    into = work / "into"
    known = work / "known_hosts"
    known.write_text("".join(f"[127.0.0.1]:{port} {key}\n" for key in server.host_keys))
    options = [
        "-F", "/dev/null", "-i", str(server.key), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
        "-o", f"UserKnownHostsFile={known}", "-o", "StrictHostKeyChecking=yes",
    ]  # fmt: skip
    fields = {
        "host": "127.0.0.1", "port": port, "user": server.user, "private_key": str(server.key),
        "host_key": server.host_keys[0], "folder": str(into),
    }  # fmt: skip
    library = {
        "port": port, "user": server.user, "key": str(server.key), "source": str(source), "folder": f"{into}/there",
    }  # fmt: skip
    ours = partial(candidate, "talaria", type=kind, fields=fields, source=str(source), home=str(work / "home"))
    if kind == "sftp":
        name = "sftp"
        argv = ["sftp", "-q", "-b", "-", "-P", str(port), *options, f"{server.user}@127.0.0.1"]
        candidates: dict[str, Callable[[], Run]] = {
            "Talaria": ours,
            name: partial(candidate, "program", argv=argv, input=f"put -r {source} {into}/there\n"),
            "asyncssh": partial(candidate, "asyncssh", **library),
            "paramiko": partial(candidate, "paramiko", **library),
        }
    else:
        name = "rsync -rt"
        shell = " ".join(["ssh", "-p", str(port), *options])
        argv = ["rsync", "-rt", "-e", shell, f"{source}/", f"{server.user}@127.0.0.1:{into}/there/"]
        candidates = {"Talaria": ours, name: partial(candidate, "program", argv=argv)}

    def between() -> None:
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir()

    found = in_turn(candidates, rounds, between)
    shutil.rmtree(into)
    return table(found, name, size)


def against_cp(source: Path, size: int, work: Path, rounds: int) -> str:
    """Folder targets beside `cp -r`, without and with links; flushed to the disk or not, as each does."""
    into = work / "into"
    ours = partial(candidate, "talaria", type="folder", source=str(source), home=str(work / "home"))
    argv = ["cp", "-r", str(source), f"{into}/there"]
    candidates: dict[str, Callable[[], Run]] = {
        "Talaria, copies": partial(ours, fields={"folder": str(into), "link": "never"}),
        "Talaria, links": partial(ours, fields={"folder": str(into), "link": "auto"}),
        "cp -r": partial(candidate, "program", argv=argv),
        "cp -r; sync": partial(
            candidate, "program", argv=["sh", "-c", 'cp -r "$1" "$2" && sync -f "$2"', "sh", *argv[2:]]
        ),
    }

    def between() -> None:
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir()
        os.sync()

    found = in_turn(candidates, rounds, between)
    shutil.rmtree(into)
    return table(found, "cp -r", size)


def flat(work: Path, stack: ExitStack, gib: int) -> str:
    """Peak memory of our process for a small file, and for one of some GiB (holes: nothing of it lies anywhere)."""
    from tests.servers.openssh import openssh

    server = stack.enter_context(openssh(work / "sshd-memory"))
    lines = ["| target | file | peak MiB | wall s |", "|---|---|---|---|"]
    for kind in ("sftp", "rsync"):
        for size in (1 << 20, gib << 30):
            source, into = work / "holes", work / "into"
            for folder in (source, into):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            with open(source / "holes.bin", "wb") as file:
                file.truncate(size)
            fields = {
                "host": "127.0.0.1", "port": server.port, "user": server.user, "private_key": str(server.key),
                "host_key": server.host_keys[0], "folder": str(into),
            }  # fmt: skip
            got = candidate("talaria", type=kind, fields=fields, source=str(source), home=str(work / "home"))
            lines.append(f"| {kind} | {size / MB:,.0f} MB | {got.peak_mib:.0f} | {got.wall_s:.1f} |")
            shutil.rmtree(into)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", default=list(GROUPS), help=" ".join(GROUPS))
    parser.add_argument("--large-mb", type=int, default=512, help="size of the large file, MB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gib", type=int, default=5, help="size of the file for the group `memory`, GiB")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="for folder targets")
    parser.add_argument("--candidate", help=argparse.SUPPRESS)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.candidate:
        CANDIDATES[given.candidate](given.job)
        return
    for group in given.groups:
        kind, _, which = group.partition("-")
        where = given.disk if kind == "folder" else MEMORY
        with ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="talaria-bench-", dir=where)))
            work.chmod(0o755)
            print(f"\n### {group}\n", flush=True)
            if kind == "memory":
                print(flat(work, stack, given.gib), flush=True)
                continue
            source, size = make(work, given.large_mb)[which]
            if kind == "folder":
                print(against_cp(source, size, work, given.rounds), flush=True)
            else:
                delay_s = ROUND_TRIP_S if which == "small" else 0.0
                print(against_ssh(kind, source, size, work, stack, given.rounds, delay_s), flush=True)


if __name__ == "__main__":
    main()
