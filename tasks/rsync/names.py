"""Names under which rsync can open files that are read where they lie.

rsync opens by name, and what a name leads to may change between two looks: to another file, or by a link out of the
source. So each file is opened as everywhere (`Plan.descriptor`), and rsync is given a folder of links to descriptors,
`/proc/<process>/fd/<number>`: it reads what was opened, whatever becomes of the name. A process of its own keeps them
open, as many as the system grants: here, so many would be in everybody's way.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Self

from transfer.beneath import is_link_error
from transfer.errors import Busy, Rejected
from transfer.oserrors import kind_of, words_of
from transfer.plan import CHANGED, Item, Plan
from transfer.staging import discard

AT_ONCE = 50  # descriptors that are open here at a time, and in one message; the system takes 253
NONE_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # says nothing about the file
DESCRIPTORS = Path("/proc/self/fd")  # is there where a process's descriptors have names
PREFIX = ".talaria-names-"
# Ends with the process that it serves, whose end of the socket is closed then.
HOLDER = """
import resource, socket
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
asked = socket.socket(fileno=0)
while True:
    data, found, flags, _ = socket.recv_fds(asked, 1, 253)
    if not data:
        break
    asked.sendall((" ".join(map(str, found)) + "\\n").encode())
"""


class NamedFiles:
    """A folder in which a plan's files have their names. A context manager.

    Where all are staged, it is the staging folder; else one of links, below it.

    Attributes:
        lacking: by path, why a file has no name there: it has changed, or can't be opened.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._stack = plan, ExitStack()
        self._folder: Path | None = None
        self._known: set[str] = set()
        self._holders: list[subprocess.Popen[bytes]] = []
        self.lacking: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def folder(self, items: Iterable[Item]) -> Path:
        """Return the folder; some items have their names there now, except those that are `lacking`.

        Raises:
            Busy: there is no room for links, or the system grants no more open files.
        """
        if any(one.poll() is not None for one in self._holders):  # killed: the links lead nowhere
            self._stack.close()
            self._folder = None
            self._known.clear()
            self._holders.clear()
        items = [item for item in items if item.path not in self._known]
        if self._folder is None and not any(item.in_place for item in items):
            return self._plan.root
        try:
            return self._linked(items)
        except OSError as exc:
            raise (kind_of(exc) or Busy)(f"files can't be given names: {words_of(exc)}") from exc

    def _linked(self, items: list[Item]) -> Path:
        if self._folder is None:
            self._plan.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder = Path(mkdtemp(prefix=PREFIX, dir=self._plan.root))
            self._stack.callback(discard, self._folder)
            self._hold()
        for at in range(0, len(items), AT_ONCE):
            some = items[at : at + AT_ONCE]
            self._link_in_place([item for item in some if item.in_place])
            for item in some:
                if not item.in_place:
                    self._link(item, f"{self._plan.root}/{item.path}")
        return self._folder

    def _hold(self) -> None:
        """Start a process that keeps descriptors open."""
        self._asked, there = socket.socketpair()
        self._stack.callback(self._asked.close)
        with there:
            argv = [sys.executable, "-I", "-S", "-c", HOLDER]
            process = subprocess.Popen(argv, stdin=there.fileno(), stdout=subprocess.DEVNULL, start_new_session=True)
        self._holders.append(self._stack.enter_context(process))
        self._answers = self._stack.enter_context(self._asked.makefile("r", encoding="ascii"))
        self._stack.callback(_end, self._asked)

    def _link_in_place(self, items: list[Item]) -> None:
        opened: list[tuple[Item, int]] = []
        try:
            for item in items:
                self.lacking.pop(item.path, None)
                try:
                    opened.append((item, self._plan.descriptor(item)))
                except OSError as exc:
                    if exc.errno in NONE_LEFT:
                        raise
                    self.lacking[item.path] = CHANGED if is_link_error(exc) else f"can't be read: {exc.strerror}"
            good = [(item, fd) for item, fd in opened if self._is_same(item, fd)]
            fresh = False
            while good:
                socket.send_fds(self._asked, [b"."], [fd for _, fd in good])
                numbers = self._answers.readline().split()
                for (item, _), number in zip(good, numbers, strict=False):
                    self._link(item, f"/proc/{self._holders[-1].pid}/fd/{number}")
                good = good[len(numbers) :]
                if good and fresh and not numbers:
                    raise Busy("the system grants no more open files (ulimit -n)")
                if good:  # it has as many as it may have
                    self._hold()
                    fresh = True
        finally:
            for _, fd in opened:
                os.close(fd)

    def _is_same(self, item: Item, fd: int) -> bool:
        try:
            self._plan.check(item, fd)
        except Rejected as exc:
            self.lacking[item.path] = exc.message
            return False
        return True

    def _link(self, item: Item, to: str) -> None:
        path = Path(f"{self._folder}/{item.path}")
        with suppress(FileExistsError):
            path.parent.mkdir(parents=True, mode=0o700)
        path.symlink_to(to)
        self._known.add(item.path)


def _end(asked: socket.socket) -> None:
    """Let the process at the other end of a socket end, unless it has ended."""
    with suppress(OSError):
        asked.shutdown(socket.SHUT_RDWR)
