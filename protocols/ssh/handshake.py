"""The beginning of an SSH connection in this process, by paramiko: greetings, algorithms, the host's key.

the host closes without a word, or says that it is full      Busy (sshd with MaxStartups clients)
it speaks, but not SSH                                       Misconfigured, with its words
no algorithm in common, or SSH 1 only                        NothingInCommon
silence                                                      TimedOut
the link ends midway                                         Interrupted
"""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence

import paramiko
from paramiko.ssh_exception import IncompatiblePeer

from transfer.errors import Busy, DispatchError, Interrupted, Misconfigured, TimedOut

LOOK_S = 0.05  # between two looks at whether to stop
END_S = 2.0  # for the rest of what a host has sent, once nothing can be sent to it
KEPT_WORDS = 50  # of one connection's notes
FULL = re.compile(r"Not allowed at this time|MaxStartups|[Tt]oo many connections|[Ss]erver (is )?busy")
_BANNER, _PARTING = "Banner: ", "Disconnect (code "


class NothingInCommon(Misconfigured):
    """paramiko and the host have no algorithm in common; ssh(1) knows more of them."""


class _Notes(logging.Handler):
    """Keeps a peer's words from paramiko's log, where alone they appear, by the connection's thread."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        kept, text = self.of.get(record.threadName or ""), record.getMessage()
        if kept is not None and len(kept) < KEPT_WORDS and text.startswith((_BANNER, _PARTING)):
            kept.append(text)


_notes = _Notes()
_log = logging.getLogger("paramiko.transport")
_log.setLevel(logging.DEBUG)
_log.propagate = False  # a refused login would fill a run's log with its traceback
_log.addHandler(_notes)


class Transport(paramiko.Transport):
    """A connection of paramiko's that keeps the host's last words, and can be waited for.

    Args:
        where: the host, for messages.
        kinds: the types of keys by which the host may prove who it is; all that paramiko knows if empty.
    """

    def __init__(self, sock: socket.socket, where: str, kinds: Sequence[str] = ()) -> None:
        super().__init__(sock)
        self.where = where
        self.name = f"ssh-{uuid.uuid4().hex}"
        self._said: list[str] = []
        _notes.of[self.name] = self._said
        if kinds:
            self.get_security_options().key_types = tuple(kinds)

    def close(self) -> None:
        super().close()
        self.sock.close()
        _notes.of.pop(self.name, None)

    @property
    def came(self) -> str:
        """What the host sent before, or instead of, SSH's first line."""
        return " ".join(text.removeprefix(_BANNER).strip() for text in self._said if text.startswith(_BANNER))

    @property
    def parting(self) -> str:
        """The host's words when it ended the connection."""
        texts = [text.partition("): ")[2].strip() for text in self._said if text.startswith(_PARTING)]
        return texts[-1] if texts else ""

    def exchange(self, timeout_s: float, check: Callable[[], None] = lambda: None) -> paramiko.PKey:
        """Exchange keys; return the host's key, after it has proven to have the private half.

        Args:
            timeout_s: for the first line, and again for the exchange.

        Raises:
            as the table above.
        """
        self.banner_timeout, self.handshake_timeout = timeout_s, 3 * timeout_s  # its own would pass for a broken link
        done, end = threading.Event(), time.monotonic() + 2 * timeout_s
        self.start_client(done)
        while not done.wait(LOOK_S) and self.is_active():
            check()
            if time.monotonic() > end:
                raise TimedOut(f"{self.where}: no answer to the handshake within {2 * timeout_s:g} s")
        if not self.is_active():
            raise self.failure()
        # That it returned means nothing: only a key means that keys were exchanged.
        return self.get_remote_server_key()

    def wait_for_end(self) -> None:
        """Read the last words of a broken connection, and end it: sending fails before reading does."""
        self.join(END_S)
        super().close()

    def failure(self) -> DispatchError:
        """Return why a connection has ended before the login."""
        exc = self.get_exception()
        if isinstance(exc, IncompatiblePeer):
            return NothingInCommon(f"{self.where}: {exc}")
        if not self.remote_version:
            if self.came:
                full = FULL.search(self.came)
                return (Busy if full else Misconfigured)(
                    f"{self.where}: {self.came}" if full else f"{self.where}: what answers is not SSH: {self.came[:80]}"
                )
            if isinstance(exc, TimeoutError) or isinstance(getattr(exc, "__context__", None), TimeoutError):
                return TimedOut(f"{self.where}: the host says nothing")
            return Busy(f"{self.where}: the host closed the connection before its first line: too many clients?")
        if self.parting:
            return (Busy if FULL.search(self.parting) else Interrupted)(f"{self.where}: {self.parting}")
        why = f" ({exc})" if exc is not None and str(exc) else ""
        return Interrupted(f"{self.where}: the connection broke{why}")
