"""Which paths of this machine files may be sent from and written to: the folders that they must lie in.

TALARIA_SOURCES    what may be sent
TALARIA_PLACES     where folder targets, DICOMweb folders (file://) and what is retrieved may lie

Both are lists of absolute paths, separated by `:` or commas. Without one, everything counts that this process's user
may read, or write, except the state directory, which holds secrets. What is allowed is decided on what was opened.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from transfer.beneath import WAY, open_beneath, resolved
from transfer.errors import Denied, Misconfigured, NotFound
from transfer.question import Question

SOURCES, PLACES = "TALARIA_SOURCES", "TALARIA_PLACES"
# What it means that they are not set.
_MEANING = {
    SOURCES: "everybody who may dispatch can send any file that this user can read",
    PLACES: "everybody who may change targets or retrieve can write wherever this user can",
}
# Of the state directory: what a retrieval fetched, and sends; what was kept of a dispatch that was given up; what was
# received, and what was uploaded; the lists of the units of a source that a dispatch sends.
SPOOLS = re.compile(
    r"(retrievals/[^/]+/spool|failed/[^/]+/files|received/[^/.][^/]*|uploads/[^/]+/files|sources/[^/]+/batches)(/|$)"
)
SPOOLED = ("retrievals", "failed", "received", "uploads", "sources")
LOOK_S = 2.0  # for the file system of a root to say where it leads
KNOWN_S = 1.0  # for which that is known then


@dataclass(frozen=True)
class Roots:
    """Folders below which paths must lie.

    Attributes:
        setting: the variable that names them.
        folders: absolute; `/` where the variable is not set.
        spools: whether spools of retrievals, dead letters and received units count, of the state directory.
    """

    setting: str
    folders: tuple[str, ...]
    spools: bool = False

    def open(self, path: str | os.PathLike[str], flags: int = os.O_RDONLY | os.O_NONBLOCK) -> int:
        """Open a path, links on it followed once; return a descriptor of what surely lies below a root.

        Raises:
            Denied: it lies elsewhere, or in the state directory, or somebody changes links while it is opened.
            NotFound: it doesn't exist. OSError: it can't be opened.
        """
        try:
            real = self._real(path, strict=True)
        except NotFound:
            self.check(path)  # what there is elsewhere is not shown
            raise
        root = self._root_of(real, path)
        fd = os.open(root, WAY)
        try:
            return open_beneath(fd, _below(real, root) or ".", flags)
        except OSError as exc:
            if exc.errno in (errno.ELOOP, errno.EXDEV):
                raise Denied(f"{os.fspath(path)}: a link was put on the way to it while it was opened") from exc
            raise
        finally:
            os.close(fd)

    def check(self, path: str | os.PathLike[str]) -> None:
        """Raise Denied if a path, which need not exist yet, lies elsewhere: for an early message.

        To read or write, open it with `open`.
        """
        self._root_of(self._real(path, strict=False), path)

    def _real(self, path: str | os.PathLike[str], *, strict: bool) -> str:
        try:
            return resolved(path, strict)
        except (FileNotFoundError, NotADirectoryError, ValueError) as exc:
            raise NotFound(f"{os.fspath(path)}: no such file or folder") from exc
        except OSError as exc:
            if exc.errno == errno.ELOOP:
                raise NotFound(f"{os.fspath(path)}: symbolic links in a circle") from exc
            raise

    def _root_of(self, real: str, path: str | os.PathLike[str]) -> str:
        if is_private(real) if self.spools else is_in(real, state_folder()):
            raise Denied(f"{os.fspath(path)}: lies in Talaria's state directory, which holds secrets")
        for root in self.folders:
            if is_in(real, base := base_of(root)):
                return base
        raise Denied(f"{os.fspath(path)}: lies below no folder of {self.setting}")


_asked: dict[str, Question[str]] = {}
_known: dict[str, str] = {}  # where roots led when their file systems answered last
_asking = threading.Lock()


def base_of(root: str) -> str:
    """Return a root without links; of one that does not answer, what it was before, or as it is written.

    Whoever opens a file below any root asks for all of them, and would else wait for the server of each share.
    """
    with _asking:
        one = _asked.get(root)
        if one is None or (not one.is_open and time.monotonic() >= one.ended + KNOWN_S):
            if one is not None and one.answer is not None:
                _known[root] = one.answer
            one = _asked[root] = Question(partial(resolved, root), "root")
    one.wait(max(0.0, one.begun + LOOK_S - time.monotonic()))
    return _known.get(root, root) if one.answer is None else one.answer


def is_silent(root: str) -> bool:
    """Return True if the file system of a root does not answer."""
    base_of(root)
    return _asked[root].is_open


def is_in(real: str, folder: str) -> bool:
    """Return True if a real path is a folder or lies below it."""
    return real == folder or real.startswith(folder.rstrip("/") + "/")


def is_private(real: str) -> bool:
    """Return True if a real path lies in the state directory, and not in what is about to be sent from there."""
    home = state_folder()
    return is_in(real, home) and not SPOOLS.match(_below(real, home))


def is_spooled(path: str) -> bool:
    """Return True if a path lies in what is about to be sent from the state directory, and goes when that is done."""
    real, home = os.path.realpath(path), state_folder()
    return is_in(real, home) and bool(SPOOLS.match(_below(real, home)))


def state_folder() -> str:
    """Return the real path of the state directory, whether it is there or not."""
    return os.path.realpath(os.path.expanduser(os.environ.get("TALARIA_HOME") or "~/.talaria"))


def _below(real: str, folder: str) -> str:
    return real[len(folder.rstrip("/")) + 1 :]


def parse(setting: str, text: str) -> tuple[str, ...]:
    """Return the folders that a setting lists.

    Raises:
        ValueError: one is not an absolute path.
    """
    folders = tuple(one for part in re.split(f"[,{os.pathsep}]", text) if (one := os.path.expanduser(part.strip())))
    for one in folders:
        if not os.path.isabs(one):
            raise ValueError(f"{setting}: {one} is not an absolute path")
    return tuple(os.path.normpath("/" + one.lstrip("/")) for one in folders)


def _of(setting: str) -> Roots:
    try:
        return Roots(setting, parse(setting, os.environ.get(setting, "")) or ("/",))
    except ValueError as exc:
        raise Misconfigured(str(exc)) from exc


def sources() -> Roots:
    """Return where may be sent from: also what was retrieved, kept, received or uploaded in the state directory."""
    made = _of(SOURCES)
    return Roots(SOURCES, (*made.folders, *(os.path.join(state_folder(), name) for name in SPOOLED)), spools=True)


def places() -> Roots:
    """Return where may be written to: nowhere in the state directory, whose spools hold the last copy of studies."""
    return _of(PLACES)


def missing(values: Mapping[str, str] = os.environ) -> list[str]:
    """Return the variables that must be set before anybody but this machine's users is let in.

    Args:
        values: what each is set to; one that isn't there is not set.
    """
    return [name for name in _MEANING if not parse(name, values.get(name, ""))]


def meaning() -> Iterable[str]:
    """Yield a sentence for each variable that is not set, on what that means."""
    for name in missing():
        yield f"{name} is not set: {_MEANING[name]}"
