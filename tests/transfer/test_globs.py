"""Exclusion globs mean what `shutil.ignore_patterns` means, for every type."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.globs import excluded, patterns


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ("", ()),
        (" , ,, ", ()),
        ("*.png", ("*.png",)),
        (" *.png ,*.json", ("*.png", "*.json")),
        ("a b , c", ("a b", "c")),
        ("*.png,\n*.json\t", ("*.png", "*.json")),
    ],
)
def test_patterns(globs: str, expected: tuple[str, ...]) -> None:
    assert patterns(globs) == expected


@pytest.mark.parametrize(
    ("path", "globs", "expected"),
    [
        ("a.png", "*.png", True),
        ("deep/er/a.png", "*.png", True),
        ("a.PNG", "*.png", False),
        ("a.png.dcm", "*.png", False),
        ("results/a.dcm", "results", True),
        ("my/results/a.dcm", "results", True),
        ("results2/a.dcm", "results", False),
        ("results", "results/", False),  # a pattern is one name, as in shutil
        ("a/b.dcm", "a/*", False),
        ("[x].dcm", "[[]x].dcm", True),
        ("x.dcm", "[!a]*", True),
        ("new\nline.png", "*.png", True),
        (".hidden", "*", True),
        (os.fsdecode(b"caf\xe9.png"), "*.png", True),
        (os.fsdecode(b"caf\xe9.png"), "caf?.png", True),
    ],
)
def test_excluded(path: str, globs: str, expected: bool) -> None:
    assert excluded(path, patterns(globs)) is expected


NAMES = st.sampled_from(["a", "b.png", "c.json", "d.dcm", "x y", "[q]", ".e"])
GLOBS = st.sampled_from(["*.png", "a", "*", "?", "[abc]*", "*.*", "x*", "[[]q]", "d.dc?", ".*", "!a", " a"])


@given(st.lists(NAMES, min_size=1, max_size=3), st.lists(GLOBS, max_size=3))
def test_means_what_shutil_means(names: list[str], globs: list[str]) -> None:
    """copytree leaves a file out if it, or any folder on the way to it, is in what the function returns."""
    ignore = shutil.ignore_patterns(*patterns(",".join(globs)))
    left_out = any(ignore(str(Path(*names[:at])), [name]) for at, name in enumerate(names))
    assert excluded("/".join(names), patterns(",".join(globs))) is bool(left_out)
