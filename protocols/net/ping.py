"""ICMP echo by the system's `ping`: whether a host answers at all, as a hint for people who look for a fault.

If there is no such program, or it may not send, the result is that it could not be tried. Source: ping(8).
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from dataclasses import dataclass

WAIT_S = 1.0  # for an answer: on the way round the earth it takes a third of that
NO_ANSWER = 1  # exit code of ping(8)


@dataclass(frozen=True)
class Echo:
    """The result: whether the host answered (None: it could not be tried), and details for people."""

    answered: bool | None
    detail: str


class Ping:
    """One echo request, sent at once from a thread of its own, so that it delays nothing else.

    Attributes:
        ms: how long it took, milliseconds.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.ms = round(WAIT_S * 1000, 1)
        self._end = time.monotonic() + WAIT_S
        self._echo = Echo(None, "the name was not resolved in time for an answer")
        self._thread = threading.Thread(target=self._run, name="ping", daemon=True)
        self._thread.start()

    def result(self) -> Echo:
        """Return the result, at most `WAIT_S` after the start."""
        self._thread.join(max(0.0, self._end - time.monotonic()))
        return self._echo

    def _run(self) -> None:
        program = shutil.which("ping")
        if program is None:
            self.ms = 0.0
            self._echo = Echo(None, "no ping program is installed here")
            return
        try:
            address = str(socket.getaddrinfo(self.host, None, type=socket.SOCK_DGRAM)[0][4][0])
        except (OSError, UnicodeError):
            self._echo = Echo(None, "the name can't be resolved")
            return
        left = self._end - time.monotonic()
        if left < WAIT_S / 3:
            return
        self._echo = Echo(False, f"no answer from {address} within {left:.1g} s, which many hosts never give")
        begun = time.monotonic()
        code, said = _ping(program, address)
        if code == 0:
            self.ms = round((time.monotonic() - begun) * 1000, 1)
            self._echo = Echo(True, f"{address} answered in {self.ms:.1f} ms")
        elif code not in (None, NO_ANSWER):
            self._echo = Echo(None, f"ping could not be tried: {said}")


def _ping(program: str, address: str) -> tuple[int | None, str]:
    """Ping once and return exit code and last line; `address` is numeric, so it is never an option."""
    try:
        done = subprocess.run(
            [program, "-n", "-c", "1", "-W", "1", address],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=2 * WAIT_S,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    except OSError as exc:
        return -1, exc.strerror or str(exc)
    lines = done.stderr.decode(errors="replace").split("\n")
    return done.returncode, next((line.strip() for line in reversed(lines) if line.strip()), f"code {done.returncode}")
