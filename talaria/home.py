"""Where the state directory is, as the settings name it; for commands that need no other setting, and load nothing."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

FILE = "talaria.toml"
LINKS = 40  # followed at most, as by the kernel
SIZE = 1 << 20  # most bytes of a file of settings


def settings_files() -> dict[Path, dict[str, Any]]:
    """Return what stands in the files of settings that are there, by their paths; the one that counts more first.

    Raises:
        ValueError: somebody else can change what stands in one, or it can't be read.
    """
    home = Path(os.environ.get("TALARIA_HOME") or "~/.talaria").expanduser()
    texts = {file: text for file in (Path(FILE), home / FILE) if (text := _read(file)) is not None}
    if not texts:
        return {}
    import tomllib

    found = {}
    for file, text in texts.items():
        try:
            found[file] = tomllib.loads(text.decode("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise ValueError(f"{file} can't be read: {exc}") from exc
    return found


def home_of_settings() -> Path:
    """Return the state directory; nothing is made.

    Raises:
        ValueError: a file of settings can't be used.
    """
    if home := os.environ.get("TALARIA_HOME"):
        return Path(home).expanduser().absolute()
    for values in settings_files().values():
        if isinstance(home := values.get("home"), str):
            return Path(home or "~/.talaria").expanduser().absolute()
    return Path("~/.talaria").expanduser().absolute()


def _read(file: Path) -> bytes | None:
    """Return what stands in a file of settings; None if there is none.

    What is checked is what is read, the opened file: whoever may write to the folder could put another one in its
    place between a check and a reading by its path.

    Raises:
        ValueError: another user can change it, or it is no file.
    """
    try:
        fd = _opened(file)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ValueError(f"{file} can't be read: {exc.strerror}") from exc
    try:
        info = os.fstat(fd)
        _check_owner(info, file)
        if not stat.S_ISREG(info.st_mode):
            raise ValueError(f"{file} can't be read: it is no file")
        if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError(f"{file} can be changed by other users: chmod go-w {file}")
        with open(fd, "rb", closefd=False) as opened:
            text = opened.read(SIZE + 1)
    finally:
        os.close(fd)
    if len(text) > SIZE:
        raise ValueError(f"{file} can't be read: it is larger than {SIZE} bytes")
    return text


def _opened(file: Path) -> int:
    """Open a file; each link that leads to it must be ours or root's."""
    path = file
    for _ in range(LINKS):
        try:
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            if exc.errno != errno.ELOOP:
                raise
        link = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            info = os.fstat(link)
            if stat.S_ISLNK(info.st_mode):
                _check_owner(info, file)
                path = path.parent / os.readlink("", dir_fd=link)
        finally:
            os.close(link)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(file))


def _check_owner(info: os.stat_result, file: Path) -> None:
    if info.st_uid not in (os.geteuid(), 0):
        raise ValueError(f"{file} belongs to another user: its settings are not used")
