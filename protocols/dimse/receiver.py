"""A process that receives beside the listener, so that many associations don't wait for one interpreter.

    listener --(forks for me)--> forker --> receiver, receiver, ...
    listener <--(a channel each: associations, terms; ends, news)--> receiver

The listener admits associations (`protocols.dimse.receivers`) and lends them, connection and all; an instance is kept
and answered here, without a word to anybody. Whatever is killed, what was answered lies on disk, where the listener
finds it. A receiver ends when its channel does, so with the listener.

The forker has imported what a receiver needs and nothing else, runs no threads, and shares its memory with those that
it forks: one costs 2 MiB, not 70.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import Any

from protocols.dimse.keeping import Receiving, SpoolVisit, Terms, Versions
from protocols.dimse.served import Accepted, Caller, ServedAssociation
from transfer.errors import DispatchError
from transfer.spool import Spool

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 17  # of a message: the socket's buffer takes more
BUFFERS = 1 << 16, 1 << 16  # bytes of an association: there may be many
REPORT_S = 0.1  # between two reports of what has come
MOST_UNITS = 200  # in one message: 300 bytes each


def fork_receivers(orders: int) -> None:
    """Fork a receiver for each channel that comes, until there is nobody who would send one.

    Args:
        orders: the descriptor that a channel and the memory of `Versions` come by.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # meant for the listener, who lets associations end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    gc.freeze()
    with socket.socket(fileno=orders) as asked:
        while True:
            data, fds, _, _ = socket.recv_fds(asked, MOST_BYTES, 2)
            if not data:
                return
            try:
                if not os.fork():
                    break
            except OSError as exc:  # no more processes now: the listener notices that its channel has ended
                print(f"no process can be forked to receive: {exc.strerror}", file=sys.stderr, flush=True)
            for fd in fds:
                os.close(fd)
    memory, slot = mmap(fds[1], 0), int(data)
    os.close(fds[1])
    Receiver(socket.socket(fileno=fds[0]), Versions(memory, slot)).run()


class Receiver:
    """Serves the associations that come by a channel, in threads of its own."""

    def __init__(self, channel: socket.socket, versions: Versions) -> None:
        self._channel, self._versions = channel, versions
        self._sources: dict[str, Receiving] = {}  # by folder
        self._open = 0
        self._lock = threading.Lock()  # so that news come before the end that they belong to
        self._busy = threading.Event()
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_Forwarded(self._say)], force=True)

    def run(self) -> None:
        """Serve until the channel ends, and then break what is open."""
        self._say("ready")
        threading.Thread(target=self._report, name="news", daemon=True).start()
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._channel, MOST_BYTES, 1)
            except OSError:
                data = b""
            if not data:
                os._exit(0)
            kind, *body = json.loads(data)
            if kind == "serve":
                if fds:
                    self._begin(socket.socket(fileno=fds[0]), *body)
                else:  # this process has no more descriptors now
                    self._say("over", body[0], 0, 0)
            else:
                self._change(*body)

    def _change(self, folder: str, terms: dict[str, Any]) -> None:
        there = self._sources.get(folder)
        if there is not None:
            there.terms = Terms(**terms)

    def _begin(
        self, sock: socket.socket, number: int, folder: str, terms: dict[str, Any], asked: dict[str, Any]
    ) -> None:
        self._change(folder, terms)
        with self._lock:
            self._open += 1
        self._busy.set()
        serve = partial(self._serve, sock, number, folder, terms, asked)
        try:
            threading.Thread(target=serve, name="store", daemon=True).start()
        except RuntimeError as exc:  # this process, or its user, may have no more threads now
            logger.warning("an association ended: %s", exc)
            self._over(sock, number, None)

    def _serve(
        self, sock: socket.socket, number: int, folder: str, terms: dict[str, Any], asked: dict[str, Any]
    ) -> None:
        visit = None
        caller = Caller(**asked["caller"])
        try:
            visit = self._source(folder, terms).visit(caller)
            contexts = {int(context): (abstract, syntax) for context, (abstract, syntax) in asked["contexts"].items()}
            accepted = Accepted(sock, caller, visit, asked["max_pdu"], contexts, asked["idle_timeout_s"])
            ServedAssociation(accepted, buffers=BUFFERS).run()
        except (OSError, DispatchError) as exc:
            logger.info("association from %s ended: %s", caller.host, exc)
        except Exception:
            logger.exception("association from %s ended", caller.host)
        finally:
            self._over(sock, number, visit)

    def _source(self, folder: str, terms: dict[str, Any]) -> Receiving:
        """Return what receives for a source; raises OSError if nothing can be written there."""
        with self._lock:
            known = self._sources.get(folder)
            if known is None:
                known = Receiving(Terms(**terms), Spool(Path(folder)), self._versions)
                known.begin()
                self._sources[folder] = known
            return known

    def _over(self, sock: socket.socket, number: int, visit: SpoolVisit | None) -> None:
        """Close a connection, which the listener has open as well, and report the end of its association."""
        if visit is not None:
            try:
                visit.ended()
            except Exception:
                logger.exception("the end of an association")
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()
        with self._lock:
            self._open -= 1
            try:
                self._send_news()
            finally:
                self._say("over", number, *((visit.instances, visit.bytes) if visit is not None else (0, 0)))

    def _report(self) -> None:
        never = threading.Event()
        while True:
            self._busy.wait()
            never.wait(REPORT_S)
            with self._lock:
                if not self._open:
                    self._busy.clear()
                try:
                    self._send_news()
                except Exception:  # whatever it is, it must not end this thread
                    logger.exception("what has come can't be reported now")

    def _send_news(self) -> None:
        for folder, source in self._sources.items():
            news = source.news()
            if news is None:
                continue
            units = [[*asdict(unit).values(), heard] for unit, heard in news.heard]
            counts = [news.instances, news.bytes, news.duplicates, news.versions, news.failed]
            for at in range(0, len(units) or 1, MOST_UNITS):
                self._say("news", folder, counts if not at else [0] * len(counts), units[at : at + MOST_UNITS])

    def _say(self, *message: Any) -> None:
        try:
            self._channel.sendall(json.dumps(message).encode())
        except BrokenPipeError:
            os._exit(0)


class _Forwarded(logging.Handler):
    """Has the listener log what this process would, in its form and at its level."""

    def __init__(self, say: Callable[..., None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record, with the traceback if there is one."""
        self._say("log", record.name, record.levelno, self.format(record)[: MOST_BYTES // 8])
