"""Where the state directory is, as the settings name it; for commands that need no other setting, and load nothing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

FILE = "talaria.toml"


def files() -> list[Path]:
    """Return the files of settings that are there, the one that counts more first.

    Raises:
        ValueError: somebody else can change what stands in one.
    """
    home = Path(os.environ.get("TALARIA_HOME") or "~/.talaria").expanduser()
    return [file for file in (Path(FILE), home / FILE) if _is_ours(file)]


def home_of_settings() -> Path:
    """Return the state directory; nothing is made.

    Raises:
        ValueError: a file of settings can't be used.
    """
    if home := os.environ.get("TALARIA_HOME"):
        return Path(home).expanduser().absolute()
    found = files()
    if found:
        import tomllib

        for file in found:
            try:
                values = tomllib.loads(file.read_text(encoding="utf-8"))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
                raise ValueError(f"talaria.toml can't be read: {exc}") from exc
            if isinstance(home := values.get("home"), str):
                return Path(home).expanduser().absolute()
    return Path("~/.talaria").expanduser().absolute()


def _is_ours(file: Path) -> bool:
    """Return True if a file of settings is there.

    Raises:
        ValueError: another user can change it.
    """
    try:
        info, link = file.stat(), file.lstat()
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise ValueError(f"{file} can't be read: {exc.strerror}") from exc
    if not {info.st_uid, link.st_uid} <= {os.geteuid(), 0}:
        raise ValueError(f"{file} belongs to another user: its settings are not used")
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"{file} can be changed by other users: chmod go-w {file}")
    return True
