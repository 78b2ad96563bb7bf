"""Received instances that wait for their dispatch: one folder per unit, whose name says what it is and who sent it.

received/<source>/<calling AE>+<called AE>+<sender's host>+<UID of study or series>[+<version>]/<SOP instance UID>.dcm

All that must be known of a unit is in the name of its folder, so that making and removing one is a single step: who
adds an instance finds the folder there, or makes it again; whoever has delivered all of it removes it only if it is
empty. A file never changes under its name: what comes again with other content gets another folder, a later version.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from urllib.parse import quote, unquote

from transfer.plan import Origin

MOST_UID_CHARS = 64  # as PS3.5 section 9.1 has it; some senders' are longer
FOLDER = "received"  # in the state directory
SEPARATOR = "+"
REPORTS = ".reports"  # beside the folders of sources: commitments that the sender has not been told of


@dataclass(frozen=True)
class ReceivedUnit:
    """What is dispatched together: the instances of one study or series, from one sender to one AE title.

    Attributes:
        calling, called: AE titles of the sender and of us.
        host: the sender's address.
        uid: of the study or series; a mark of one that no folder could be named by.
        version: 1; higher for instances that came again with another content.
    """

    calling: str
    called: str
    host: str
    uid: str
    version: int = 1

    @cached_property
    def name(self) -> str:
        """The name of its folder, at most 240 bytes."""
        parts = [_quoted(self.calling), _quoted(self.called), _quoted(self.host), _quoted(self.uid)]
        return SEPARATOR.join(parts + ([str(self.version)] if self.version > 1 else []))

    @property
    def origin(self) -> Origin:
        """Where it came from, as targets that pass it on must know it."""
        return Origin(self.calling, self.called, self.host)

    def of(self, uid: str) -> ReceivedUnit:
        """Return the same sender's unit of another study or series, whatever its UID is made of."""
        if len(_quoted(uid)) > MOST_UID_CHARS:
            uid = f"long-{hashlib.sha256(uid.encode()).hexdigest()[:32]}"
        return replace(self, uid=uid, version=1)

    @property
    def later(self) -> ReceivedUnit:
        """The unit for instances of which this one has another content."""
        return replace(self, version=self.version + 1)

    @staticmethod
    def parse(name: str) -> ReceivedUnit | None:
        """Return the unit of a folder; None if the name is not one's."""
        parts = name.split(SEPARATOR)
        if not 4 <= len(parts) <= 5 or name.startswith("."):
            return None
        version = parts[4] if len(parts) == 5 else "1"
        if not (version.isascii() and version.isdigit()):
            return None
        calling, called, host, uid = (unquote(part, encoding="latin-1") for part in parts[:4])
        unit = ReceivedUnit(calling, called, host, uid, int(version))
        return unit if unit.name == name else None


@dataclass(frozen=True)
class Spool:
    """The folder of one source."""

    folder: Path

    @property
    def reports(self) -> Path:
        """The folder of reports of storage commitment that wait to be sent."""
        return self.folder.parent / REPORTS / self.folder.name

    def prepare(self) -> None:
        """Make the folder, so that it is there after a power cut too.

        Raises:
            OSError: it can't be made.
        """
        for path in (self.folder.parent, self.folder):
            if not path.is_dir():
                path.mkdir(mode=0o700, exist_ok=True)
                sync(path.parent)

    def make(self, unit: ReceivedUnit) -> None:
        """Make the folder of a unit, unless it is there, so that it is there after a power cut too."""
        path = self.folder / unit.name
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        sync(self.folder)

    def units(self) -> Iterator[tuple[ReceivedUnit, Path, float]]:
        """Yield the units, their folders, and when something was last added (seconds since the epoch)."""
        try:
            entries = os.scandir(self.folder)
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                unit = ReceivedUnit.parse(entry.name)
                if unit is not None and entry.is_dir(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        yield unit, Path(entry.path), entry.stat(follow_symlinks=False).st_mtime

    def touch(self, unit: ReceivedUnit) -> None:
        """Count a unit as one to which something was just added."""
        with suppress(FileNotFoundError):
            os.utime(self.folder / unit.name)


def remove(folder: Path) -> bool:
    """Remove a unit's folder if it is empty; return whether it is gone."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def sync(folder: Path | str) -> None:
    """Wait until the names in a folder are on disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _quoted(text: str) -> str:
    """Return text without separators, and without a dot at its beginning, which would hide a folder."""
    made = quote(text, safe=" ", encoding="latin-1", errors="replace")  # as AE titles come: three bytes a letter
    return f"%2E{made[1:]}" if made.startswith(".") else made
