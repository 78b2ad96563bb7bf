"""Starts real servers for tests, on loopback and free ports, stopped by their own process ids; reckons with load."""

from __future__ import annotations

import gc
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

START_S = 90  # a busy machine; most are up in less than one
STOP_S = 5
# These would override the certificates that a test names.
AMBIENT_TRUST = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR", "AWS_CA_BUNDLE")
# Below those that systems give to whoever connects, or asks for any port: a server may take its time to bind its own.
PORTS = range(10_000, 32_720)
SHARES = 32  # of them; each process has one to itself


def as_loaded(seconds: float) -> float:
    """Return how long something may take here that takes so many seconds at most where nothing else runs."""
    running = os.getloadavg()[0]  # over a minute
    with suppress(OSError):
        running = max(running, float(Path("/proc/loadavg").read_text("ascii").split()[3].partition("/")[0]))  # now
    return seconds * max(1.0, running / (os.cpu_count() or 1))


def patient(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a target's settings with more time for its peers where they must wait for a processor.

    A second is long for a server on loopback; where ten others are at work it is not. Timeouts that a test waits for
    stay what they are at twice as much load as there are processors.
    """
    shortest = {"idle_timeout_s": 0.5, "connect_timeout_s": 5}  # shorter ones are waited for in any case
    return dict(settings) | {
        name: max(value, as_loaded(value / 2))
        for name, value in settings.items()
        if name in shortest and value >= shortest[name]
    }


def _share() -> Iterator[int] | None:
    """Return this process's own ports, again and again; None where all shares are taken, or can't be."""
    size = len(PORTS) // SHARES
    for number in range(SHARES):
        mark = socket.socket(socket.AF_UNIX)
        try:
            mark.bind(f"\0talaria-testing-ports-{number}")  # abstract: gone with the process, however it ends
        except OSError:
            mark.close()
            continue
        mark.detach()
        return itertools.cycle(PORTS[number * size : (number + 1) * size])
    return None


_ports = _share()


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on, and that nobody else is given meanwhile."""
    for port in itertools.islice(_ports or (), len(PORTS) // SHARES):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program(name: str) -> str:
    """Return the path of a server's program; a missing one is a failure, never a skip."""
    path = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if path is None:
        raise RuntimeError(f"{name} is not installed: run `make servers`")
    return path


def listening(port: int) -> bool:
    """Return True if something accepts connections on 127.0.0.1:port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def server(
    argv: Sequence[str],
    port: int,
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    ready: Callable[[], bool] | None = None,
    cwd: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends; yields when `ready` returns True, or when its port answers.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message ends with its log.
    """
    environment = {k: v for k, v in os.environ.items() if k not in AMBIENT_TRUST} | dict(env or {})
    with log.open("ab") as out:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, cwd=cwd, start_new_session=True
        )
    try:
        wait(process, ready or (lambda: listening(port)), log)
        yield process
    finally:
        stop(process)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for a condition; fail the test if it doesn't come true."""
    end = time.monotonic() + seconds
    while True:
        asked = time.monotonic()
        if condition():
            return
        now = time.monotonic()
        assert now < end, f"waited {seconds} s in vain"
        time.sleep(pause(now - asked))


def pause(took_s: float) -> float:
    """Return after how many seconds to ask again what took so long to answer.

    A server that is asked all the time does little else.
    """
    return min(0.5, max(0.02, 10 * took_s))


def open_descriptors() -> Counter[str]:
    """Return what this process has open, by kind; first collects garbage, of which a plan's watch of files may be."""
    gc.collect()
    kinds: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the folder itself, and what threads close meanwhile
            kinds[re.sub(r"\d+", "N", os.readlink(f"/proc/self/fd/{fd}"))] += 1
    return kinds


def wait(process: subprocess.Popen[bytes], ready: Callable[[], bool], log: Path) -> None:
    """Wait until a started server is ready."""
    end = time.monotonic() + START_S
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            text = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{process.args!r} is not ready (exit code {process.poll()}):\n{text}")
        time.sleep(0.02)


def stop(process: subprocess.Popen[bytes], wait_s: float = STOP_S) -> None:
    """Stop a server's whole process group: politely, then by force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(as_loaded(wait_s))
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()
