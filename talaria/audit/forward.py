"""Sends the audit trail on to a syslog server: the file is the buffer, and what was sent is noted beside it.

Recording an entry never waits for the server. One process forwards at a time. It notes an entry as sent once the other
machine has it, so that after a lost connection or a crash an entry comes twice rather than never.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from talaria.audit.messages import message
from talaria.audit.syslog import SyslogConnection, SyslogTarget, formatted
from transfer.audit import Trail
from transfer.home import Home
from transfer.ledger import write_whole

logger = logging.getLogger(__name__)

SETTING = "TALARIA_AUDIT_SYSLOG"
LOOK_S = 1.0  # between two looks at the file: one call
MAX_WAIT_S = 60.0  # between two tries to reach the server
BATCH_BYTES = 256 << 10  # of the trail that are read at a time


def syslog_target() -> SyslogTarget | None:
    """Return the syslog server that the environment names; None if it names none.

    Raises:
        ValueError: the address is not valid.
    """
    address = os.environ.get(SETTING, "").strip()
    if not address:
        return None
    return SyslogTarget.of(address, *(os.environ.get(f"{SETTING}_{name}", "") for name in ("CA", "CERT", "KEY")))


class Forwarder:
    """Forwards a trail until it is stopped."""

    def __init__(self, home: Home, target: SyslogTarget) -> None:
        self.trail, self.target = Trail(home), target
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._connection: SyslogConnection | None = None
        self._host = socket.gethostname()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop; the next forwarder sends what is left."""
        self._stop.set()
        self._thread.join(15)

    def _run(self) -> None:
        said = ""
        while not self._stop.is_set():
            try:
                self._forward_alone()
            except Exception as exc:  # a full disk, say: whatever it is, this thread must go on
                said = self._say("they can't be sent on", exc, said)
            self._stop.wait(LOOK_S)

    def _forward_alone(self) -> None:
        """Forward until it is stopped, if no other process does."""
        Path(self.trail.folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(f"{self.trail.folder}/forwarding.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._forward()
        except BlockingIOError:
            pass  # another process forwards; the kernel drops its lock if it dies
        finally:
            os.close(fd)
            self._close()

    def _forward(self) -> None:
        wait_s, said = LOOK_S, ""
        while not self._stop.wait(wait_s if said else LOOK_S):
            try:
                while self._step():
                    wait_s, said = LOOK_S, ""
            except Exception as exc:  # a name that can't be asked for, say: whatever it is, this thread must go on
                self._close()
                where = f"{self.target.host}:{self.target.port}"
                said = self._say(f"the syslog server can't be reached: {where}", exc, said)
                wait_s = min(wait_s * 2, MAX_WAIT_S)

    @staticmethod
    def _say(words: str, exc: Exception, said: str) -> str:
        """Log why audit messages wait, unless that was the last that was logged; return it."""
        known = isinstance(exc, OSError | ValueError)
        words = f"{words}: {getattr(exc, 'strerror', None) or str(exc) or type(exc).__name__}"
        if words != said:
            logger.warning("audit messages wait, %s", words, exc_info=None if known else exc)
        return words

    def _step(self) -> bool:
        """Send the next entries; return whether there were any."""
        position = self._position()
        try:
            with open(self.trail.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < position:  # somebody has put the trail away: this is another one
                    position = 0
                    self._note(position)  # it may be longer than that when the server can be reached
                if size == position:
                    return False
                file.seek(position)
                piece = file.read(BATCH_BYTES)
        except FileNotFoundError:
            return False
        whole = piece[: piece.rfind(b"\n") + 1]
        if not whole:
            return False
        messages = [one for line in whole.splitlines() if (one := self._message(line))]
        if messages:
            self._connection = self._connection or SyslogConnection(self.target)
            self._connection.send(b"".join(messages))
        self._note(position + len(whole))
        return True

    def _message(self, line: bytes) -> bytes:
        try:
            entry = json.loads(line)
            text = message(entry, self._host)
            return formatted(text, str(entry["time"]), self._host) if text else b""
        except Exception:
            return b""  # not a valid entry: `talaria audit verify` reports it

    def _position(self) -> int:
        try:
            with open(f"{self.trail.folder}/forwarded", encoding="ascii") as file:
                return int(file.read())
        except (OSError, ValueError):
            return 0

    def _note(self, position: int) -> None:
        write_whole(Path(self.trail.folder, "forwarded"), [str(position).encode("ascii")])

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@contextmanager
def forwarding(home: Home) -> Iterator[None]:
    """Forward the trail while the block runs, if a server is configured."""
    target = syslog_target()
    if target is None:
        yield
        return
    forwarder = Forwarder(home, target)
    forwarder.start()
    try:
        yield
    finally:
        forwarder.stop()
