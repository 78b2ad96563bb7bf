"""Programs of the system that speak a protocol: started in process groups of their own, and reliably stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from typing import IO, Any

from transfer.errors import Misconfigured

GRACE_S = 2.0  # between SIGTERM and SIGKILL; a cancelled push must be over within 5
PACKAGES = {"rsync": "rsync"}  # Debian's; everything else here is in openssh-client
# What a program may know of our environment: no settings of its own (RSYNC_*, SSH_*), no secrets of other targets.
KEPT = ("PATH", "HOME", "USER", "LOGNAME", "TMPDIR")


def program(name: str) -> str:
    """Return the path of a program.

    Raises:
        Misconfigured: it is not installed.
    """
    path = shutil.which(name)
    if path is None:
        package = PACKAGES.get(name, "openssh-client")
        raise Misconfigured(f"the program {name} is missing here: install the package {package}")
    return path


def environment(**more: str) -> dict[str, str]:
    """Return a program's environment, in which its messages are in English."""
    return {name: os.environ[name] for name in KEPT if name in os.environ} | {"LC_ALL": "C"} | more


def start(
    argv: list[str],
    errors: str,
    env: dict[str, str],
    *,
    stdin: int | IO[bytes] = subprocess.PIPE,
    stdout: int = subprocess.PIPE,
) -> subprocess.Popen[bytes]:
    """Start a program as the leader of its own process group.

    Args:
        errors: file to whose end its standard error goes.
    """
    with open(errors, "ab") as err:
        return subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=err,
            env=env,
            bufsize=0,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[Any], grace_s: float = GRACE_S) -> None:
    """End a process group and wait until its leader is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            break
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with suppress(OSError):
                stream.close()
