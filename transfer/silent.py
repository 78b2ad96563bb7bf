"""Looks at paths that may lie in a share whose server is away: the kernel answers nothing then, and ends no thread.

Whoever looks waits for a moment only, and nobody looks there again while such a look goes on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from transfer.errors import SourceAway

LOOK_S = 2.0  # for a file system to answer
ANSWER_S = 30.0  # for the server of a share whose disks may have to spin up
BESIDE_S = 20.0  # between two looks while what lies there is read
AGAIN_S = 0.5  # between two looks whether one that is slow has answered
MOUNTS = "/proc/self/mounts"
logger = logging.getLogger(__name__)
R = TypeVar("R")


async def looked(
    look: Callable[[str], R], paths: Iterable[str], where: Callable[[str], str] | None = None
) -> dict[str, R]:
    """Look at paths, one after another, in a thread; return what `look` returns of each whose file system answers.

    Args:
        where: returns the folder in which nobody else is to look meanwhile, of a path that does not answer; `place`
            unless given.

    Raises:
        Exception: what `look` raises.
    """
    found, left = dict[str, R](), list(dict.fromkeys(paths))
    while left := [one for one in left if not _is_silent(one)]:
        looking = _Look(look, left)
        await looking.wait()
        if looking.error is not None:
            raise looking.error
        answers = dict(looking.answers)
        found |= answers
        left = left[len(answers) :]
        if left:
            folder = (where or place)(left.pop(0))
            _silent[folder] = looking
            logger.warning("the file system of %s does not answer: what lies there is not looked at meanwhile", folder)
    return found


async def mute(paths: Iterable[str], seconds: float) -> list[str]:
    """Return those of some paths whose file system has not answered for so many seconds.

    One that is slow, as of disks that have to spin up, is waited for so long; one that is known to be silent is not.
    """
    wanted = list(dict.fromkeys(paths))
    while True:
        answered = await looked(_ask, wanted, _own_place)
        wanted = [one for one in wanted if one not in answered]
        if all(_silent_s(one) >= seconds for one in wanted):
            return wanted
        await asyncio.sleep(AGAIN_S)


async def check(paths: Iterable[str], seconds: float) -> None:
    """Check that the file systems of some paths answer, as by `mute`.

    Raises:
        SourceAway: one does not.
    """
    for path in await mute(paths, seconds):
        raise SourceAway(f"{path}: its file system does not answer: is the server of its share away?")


async def away(paths: Iterable[str]) -> SourceAway:
    """Wait until the file system of one of some paths, which are being read, has not answered for ANSWER_S."""
    wanted = await asyncio.to_thread(_own_places, paths)
    while True:
        await asyncio.sleep(BESIDE_S)
        try:
            await check(wanted, ANSWER_S)
        except SourceAway as exc:
            return exc


def _own_place(path: str) -> str:
    """Return where what a path names is mounted; it itself, if that is the root: it may be a link to a share."""
    return _own_places([path])[0]


def _own_places(paths: Iterable[str]) -> list[str]:
    """Return the places of many paths, each once."""
    mounts, found = _mounts(), dict[str, None]()
    for path in map(os.path.abspath, paths):
        found[path if (mount := _mount(path, mounts)) == "/" else mount] = None
    return [*found]


def _ask(path: str) -> None:
    """Ask the server of a path's file system: what the kernel remembers of a folder is no answer."""
    with suppress(OSError, ValueError):
        os.statvfs(path)


class _Look(Generic[R]):
    """A thread that looks, until it is given up."""

    def __init__(self, look: Callable[[str], R], paths: list[str]) -> None:
        self._look, self._paths = look, paths
        self.answers: dict[str, R] = {}
        self.error: Exception | None = None
        self.is_over = False
        self.since = time.monotonic()  # when it began to look at the path that it looks at
        self._given_up = False

    async def wait(self) -> None:
        """Wait as long as it gets on."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def main() -> None:
            self._main()
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=main, name="look", daemon=True).start()
        count = -1
        while not ended.is_set() and len(self.answers) > count:
            count = len(self.answers)
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), LOOK_S)
        self._given_up = True

    def _main(self) -> None:
        try:
            for path in self._paths:
                answer = self._look(path)
                if self._given_up:
                    break
                self.answers[path], self.since = answer, time.monotonic()
        except Exception as exc:
            self.error = exc
        self.is_over = True


_silent: dict[str, _Look[Any]] = {}  # looks that go on, by the folder in which nobody else is to look


def _is_silent(path: str) -> bool:
    for where in [where for where, looking in [*_silent.items()] if looking.is_over]:
        _silent.pop(where, None)  # runs look in threads of their own
    return any(_is_below(os.path.abspath(path), where) for where in [*_silent])


def _silent_s(path: str) -> float:
    """Return for how long the file system of a path has been silent, in seconds; 0 if it has answered."""
    path, now = os.path.abspath(path), time.monotonic()
    return max((now - one.since for where, one in [*_silent.items()] if _is_below(path, where)), default=0.0)


def place(path: str) -> str:
    """Return where what a path names is mounted, as far as its name says that; its folder, if that is the root."""
    path = os.path.abspath(path)
    return mount if (mount := _mount(path, _mounts())) != "/" else os.path.dirname(path)


def _mounts() -> list[str]:
    """Return where file systems are mounted."""
    with suppress(OSError), open(MOUNTS, encoding="utf-8", errors="surrogateescape") as lines:
        return [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[1]) for line in lines]
    return []


def _mount(path: str, mounts: Iterable[str]) -> str:
    return max((one for one in mounts if _is_below(path, one)), key=len, default="/")


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
