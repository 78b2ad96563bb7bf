"""The file system's errors as those of a dispatch, for targets that are folders of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blocks.dicomweb import DicomWebTarget
from blocks.folder import FolderTarget
from protocols.files import filesystem as fs
from transfer.errors import DispatchError, Interrupted, NotFound, Unreachable
from transfer.oserrors import FULL, kind_of, words_of


@contextmanager
def file_errors(target: FolderTarget | DicomWebTarget) -> Iterator[None]:
    """Turn the file system's errors into our own, which name the target's folder.

    A path below it may hold a patient's data, and is left out.

    Raises:
        DispatchError: as `transfer.oserrors` says; with the target's name. OSError: it is a bug of ours.
    """
    where = target.url if isinstance(target, DicomWebTarget) else target.folder
    folder = Path(target.folder or "/")
    try:
        yield
    except fs.Silent as exc:
        raise Unreachable(f"{where} did not answer within {target.connect_timeout_s:g} s", target.name) from exc
    except DispatchError as exc:
        exc.target = exc.target or target.name
        raise
    except OSError as exc:
        exc.filename = exc.filename2 = None
        kind = kind_of(exc)
        if kind is None:
            raise
        if kind is NotFound and folder.is_dir():
            raise Interrupted(
                f"{where}: what is being read or written there vanishes: another program removes it", target.name
            ) from exc
        words = words_of(exc)
        if exc.errno in FULL:
            words += f"; {fs.size(fs.room(folder)[0])} are free"
        raise kind(f"{where}: {words}", target.name) from exc
