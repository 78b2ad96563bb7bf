"""Exclusion globs: one meaning for all types of target.

Comma-separated patterns as in `shutil.ignore_patterns`: each is matched, case-sensitively, against the
NAME of every file and of every folder on the way to it (not against the path). Blanks around a pattern are
stripped; empty patterns are ignored.
"""

from __future__ import annotations

import re
from fnmatch import translate
from functools import lru_cache


def patterns(globs: str) -> tuple[str, ...]:
    """Split a comma-separated list of globs, blanks stripped, empty ones dropped."""
    return tuple(p for p in (part.strip() for part in globs.split(",")) if p)


def excluded(path: str, globs: tuple[str, ...]) -> bool:
    """Return True if a relative POSIX path, or any folder on the way to it, matches one of the patterns."""
    return bool(globs) and any(map(_any_of(globs).match, path.split("/")))


def is_excluded(name: str, globs: tuple[str, ...]) -> bool:
    """Return True if the name of a file or folder matches one of the patterns."""
    return _any_of(globs).match(name) is not None


@lru_cache(maxsize=64)
def _any_of(globs: tuple[str, ...]) -> re.Pattern[str]:
    """Return one compiled pattern for all of them, since it is applied to each file of each dispatch."""
    return re.compile("|".join(map(translate, globs)))
