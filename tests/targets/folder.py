"""Folders: on the disk of the test, with hard links, and on another file system (as a share is)."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from blocks.base import Target
from blocks.folder import FolderTarget, LinkPolicy
from talaria.testing.harness import Harness
from transfer.errors import NotFound
from transfer.plan import Item, Plan

ANOTHER_FILE_SYSTEM = Path("/dev/shm")


def final(name: str) -> bool:
    """Whether nothing on the way to a name says that it is not yet whole."""
    return not any(part.startswith((".incoming-", ".talaria-")) for part in name.split("/"))


def harness(folder: Path, *, name: str, link: LinkPolicy = LinkPolicy.NEVER) -> Harness:
    """Look at a folder as any program on the machine can."""

    def target(where: Path) -> FolderTarget:
        made = FolderTarget(folder=str(where), link=link, retry_delay_s=0, connect_timeout_s=5)
        made.named(name)
        return made

    def read_back(plan: Plan) -> dict[str, bytes]:
        root = folder / plan.dispatch_id
        found = {}
        for path, _, files in os.walk(root):  # what vanishes while it is looked at is not there
            for name in set(files) - {".complete"}:
                with suppress(FileNotFoundError):
                    full = os.path.join(path, name)
                    found[os.path.relpath(full, root)] = Path(full).read_bytes()
        return found

    def names() -> set[str]:
        return {os.path.relpath(os.path.join(path, name), folder) for path, a, b in os.walk(folder) for name in a + b}

    usual = target(folder)

    @contextmanager
    def reject(plan: Plan, item: Item) -> Iterator[Target]:
        (folder / plan.dispatch_id / item.path).mkdir(parents=True)
        yield usual

    return Harness(
        name=name,
        target=usual,
        dead=target(folder / "not-mounted"),
        dead_error=NotFound,
        read_back=read_back,
        names=names,
        final=final,
        leftovers=names,
        cut=partial(cut, usual),
        reject=reject,
        shorten=None if link is LinkPolicy.AUTO else partial(shorten, usual),  # a link has no end to lose
    )


@contextmanager
def _patched(**functions: Callable[..., Any]) -> Iterator[None]:
    """Put these in the place of system calls."""
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(mock.patch.object(os, name, function))
        yield


@contextmanager
def stale_after(limit: int) -> Iterator[None]:
    """Let the system calls that bring data fail once, after so many bytes, as those of a share whose server went."""
    moved, broken, lock = 0, False, threading.Lock()

    def counting(call: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal moved, broken
            with lock:
                if moved > limit and not broken:
                    broken = True
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            result = call(*args, **options)
            with lock:
                moved += size(result, *args)
            return result

        return wrapped

    def linked(result: None, source: Any, *_: Any) -> int:
        return os.stat(source).st_size if os.path.isabs(source) else 0  # of what lies there, one gets its final name

    with _patched(
        copy_file_range=counting(os.copy_file_range, lambda count, *_: count),
        write=counting(os.write, lambda count, *_: count),
        link=counting(os.link, linked),
    ):
        yield


@contextmanager
def cut(target: Target, count: int) -> Iterator[Target]:
    """The target on a share that goes once, after so many bytes."""
    with stale_after(count):
        yield target


@contextmanager
def shorten(target: Target) -> Iterator[Target]:
    """The target on a disk that loses the last byte of each file."""
    with losing_the_end():
        yield target


@contextmanager
def losing_the_end() -> Iterator[None]:
    """Let the last byte of every file that is written vanish without an error."""
    in_kernel, write = os.copy_file_range, os.write

    def short_in_kernel(reader: int, writer: int, count: int) -> int:
        moved = in_kernel(reader, writer, count)
        if not moved and (size := os.fstat(writer).st_size):
            os.ftruncate(writer, size - 1)
        return moved

    def short_write(writer: int, data: bytes) -> int:
        count = write(writer, data)
        os.ftruncate(writer, max(0, os.fstat(writer).st_size - 1))
        return count

    with _patched(copy_file_range=short_in_kernel, write=short_write):
        yield


@contextmanager
def _on_disk(folder: Path, **options: Any) -> Iterator[Harness]:
    yield harness(folder, **options)


@contextmanager
def _elsewhere(folder: Path, **options: Any) -> Iterator[Harness]:
    root = Path(tempfile.mkdtemp(prefix="talaria-folder-", dir=ANOTHER_FILE_SYSTEM))
    try:
        yield harness(root, **options)
    finally:
        shutil.rmtree(root)


HARNESSES: dict[str, Callable[[Path], AbstractContextManager[Harness]]] = {
    "folder": partial(_on_disk, name="folder"),
    "folder-link": partial(_on_disk, name="folder-link", link=LinkPolicy.AUTO),
    "folder-elsewhere": partial(_elsewhere, name="folder-elsewhere"),
}
NEEDED = {"folder": "/data/archive"}
