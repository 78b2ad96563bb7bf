"""Exclusion globs: one meaning for all eight types of target.

Comma-separated patterns as in `shutil.ignore_patterns`: each is matched, case-sensitively, against the
NAME of every file and of every folder on the way to it (not against the path). Blanks around a pattern are
stripped; empty patterns are ignored.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import PurePosixPath


def patterns(globs: str) -> tuple[str, ...]:
    """Split a comma-separated list of globs, blanks stripped, empty ones dropped."""
    return tuple(p for p in (part.strip() for part in globs.split(",")) if p)


def excluded(path: str, globs: tuple[str, ...]) -> bool:
    """Tell whether a relative POSIX path, or any folder on the way to it, matches one of the patterns."""
    return any(fnmatchcase(name, glob) for name in PurePosixPath(path).parts for glob in globs)
