"""One file of a plan: what it is packed from comes out again."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imaging.header import Header
from talaria.testing import studies
from transfer.item import Item, path_of
from transfer.plan import scan

WORDS = ("1.2.840.10008.1.2", "1.2.3", "1.2.3.4", 300)


def item(**values: Any) -> Item:
    return Item(**{"path": "a/b.dcm", "size": 7, "mtime_ns": 1_764_500_000_123_456_789} | values)


@example("1.2.840.113619.2.55.3")
@example("1.23")
@example("." * 64)
@example("1.2 ")
@example("abc")
@example("1.a")
@example("1.2f")
@example("²")
@example("\u0661.\u0662")  # digits, too
@example("\udce9")
@given(st.text(alphabet="0123456789.", max_size=64) | st.text(max_size=8))
def test_every_uid_comes_out_as_it_went_in(uid: str) -> None:
    header = Header.of("1.2", uid, *WORDS, "CT")
    one = item(header=header)
    assert one.sop_instance_uid == uid
    assert one.header == header
    assert one.shared is header.shared


@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**31 - 1),
    st.integers(0, 2**64 - 1),
    st.booleans(),
    st.integers(0, 2**31 - 1),
)
def test_every_number_comes_out_as_it_went_in(
    mtime_ns: int, ctime_ns: int, links: int, inode: int, in_place: bool, watch: int
) -> None:
    facts = (mtime_ns, ctime_ns, links, inode, in_place, watch)
    one = Item("a", 1, mtime_ns, None, "", "", False, *facts[1:])
    assert (one.mtime_ns, one.ctime_ns, one.links, one.inode, one.in_place, one.watch) == facts
    now = cast("os.stat_result", SimpleNamespace(st_ctime_ns=ctime_ns, st_nlink=links, st_ino=inode))
    seen = item(header=Header.of("1.2", "1.2.3", *WORDS), problem="gone", watch=5).seen(now, in_place=in_place)
    assert (seen.ctime_ns, seen.links, seen.inode, seen.in_place, seen.watch) == (*facts[1:5], 5)
    assert (seen.path, seen.size, seen.sop_instance_uid, seen.problem) == ("a/b.dcm", 7, "1.2.3", "gone")


def test_what_makes_two_of_them_equal() -> None:
    header = Header.of("1.2", "1.2.3", *WORDS)
    one = item(header=header, not_sent="x", damaged=True, ctime_ns=5)
    same = item(header=header, not_sent="x", damaged=True, ctime_ns=6, links=2, inode=9, in_place=True, watch=3)
    assert one == same
    assert hash(one) == hash(same)
    others: list[dict[str, Any]] = [
        {"path": "b"},
        {"size": 8},
        {"mtime_ns": 1},
        {"header": None},
        {"header": Header.of("1.2", "1.2.4", *WORDS)},
        {"header": Header.of("1.3", "1.2.3", *WORDS)},
        {"problem": "y"},
        {"not_sent": ""},
        {"damaged": False},
    ]
    for values in others:
        assert one.but(**values) != one, values
    assert one != "a/b.dcm"


def test_it_does_not_change_and_can_be_copied() -> None:
    one = item(header=Header.of("1.2", "1.2.3", *WORDS), in_place=True, watch=3)
    with pytest.raises(AttributeError, match="path"):
        one.path = "other"
    copy = pickle.loads(pickle.dumps(one))
    assert copy == one
    assert (copy.in_place, copy.watch) == (True, 3)
    assert "1.2.3" in repr(one)


def test_it_shows_no_patient(tmp_path: Path) -> None:
    studies.ct(tmp_path, 1)
    (one,) = scan([tmp_path]).items
    assert one.header
    assert one.header.PatientID
    assert one.header.PatientID not in repr(one)


def test_it_is_small() -> None:
    uid = "1.2.826.0.1.3680043.8.498.123456789012345678901234567890"
    one = item(header=Header.of("1.2", uid, *WORDS))
    assert sys.getsizeof(one) + sys.getsizeof(one._own) < 180


@example(b"raw\xff\x80")
@example(b"a\\b\\x41\\\\n")
@example(b"a\nb\tc\rd\x01\x7f")
@example("\xa0\x85\u2028\U000e0001'\"".encode())
@given(st.binary(min_size=1, max_size=8).filter(lambda data: b"\0" not in data) | st.text(max_size=8).map(str.encode))
def test_a_path_is_known_by_what_is_shown_of_it(data: bytes) -> None:
    path = os.fsdecode(data)
    assert path_of(Item(path, 0, 0).shown) == path
