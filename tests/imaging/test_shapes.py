"""What headers have in common is recognised in one step, and nothing else is found in them by that."""

from __future__ import annotations

import random
import struct

import pytest

from imaging import shapes, walk
from imaging.walk import Damaged, FileWindow, Walk

WANTED = frozenset((0x00080018, 0x00080060, 0x0020000E, 0x00200011, 0x00280010))
TAGS = [group << 16 | element for group in (0x0008, 0x0010, 0x0018, 0x0020, 0x0028) for element in range(0, 64, 2)]


def element(endian: str, tag: int, vr: bytes, value: bytes) -> bytes:
    if vr == b"OB":
        return struct.pack(endian + "HH2sHI", tag >> 16, tag & 0xFFFF, vr, 0, len(value)) + value
    return struct.pack(endian + "HH2sH", tag >> 16, tag & 0xFFFF, vr, len(value)) + value


def data_set(endian: str, chance: random.Random, layout: int) -> bytes:
    """Make a header: of the same elements as others of its layout, of which some have values of other lengths."""
    same, made = random.Random(layout), []
    for tag in TAGS:
        if same.random() < 0.1 and tag not in WANTED:
            continue
        vr = same.choice([b"LO", b"US", b"DS", b"UI", b"OB"] if same.random() < 0.1 else [b"LO", b"US", b"DS"])
        length = same.randrange(0, 20)
        if chance.random() < 0.02:
            length = chance.randrange(0, 40)
        made.append(element(endian, tag, vr, chance.randbytes(length)))
    return b"".join(made)


def read(data: bytes, endian: str) -> tuple[dict[int, bytes], bool] | str:
    found: dict[int, bytes] = {}
    one = Walk(FileWindow(-1, len(data), data), endian, True, WANTED)
    try:
        one.top(0, found)
    except Damaged as exc:
        return str(exc)
    return found, one.odd


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("layouts", [1, 2, 50])
def test_a_header_is_read_the_same_whatever_was_read_before_it(endian: str, layouts: int) -> None:
    chance = random.Random(layouts)
    files = [data_set(endian, chance, chance.randrange(layouts)) for _ in range(150)]
    files += [data[: chance.randrange(len(data))] for data in files[::10]]  # truncated
    chance.shuffle(files)
    alone = []
    for data in files:
        walk._fast.cache_clear()
        alone.append(read(data, endian))
    walk._fast.cache_clear()
    assert [read(data, endian) for data in files] == alone
    known = walk._fast(endian, WANTED)[-1].known
    assert known, "something is recognised"
    assert len(known) <= shapes.MAX_SHAPES
    assert all(len(shape.heads) >= shapes.MIN_ELEMENTS for shape in known.values())


def test_one_step_where_nothing_differs_and_few_where_little_does() -> None:
    walk._fast.cache_clear()
    plain = b"".join(element("<", tag, b"LO", b"1234") for tag in TAGS)
    first = read(plain, "<")
    (shape,) = walk._fast("<", WANTED)[-1].known.values()
    assert (len(shape.heads), shape.size) == (len(TAGS), len(plain))
    assert read(plain, "<") == first
    for number in range(4):
        middle = element("<", TAGS[80], b"LO", b"12" * number)
        data = plain[: 80 * 12] + middle + plain[81 * 12 :]
        assert read(data, "<") == first
    lengths = [len(shape.heads) for shape in walk._fast("<", WANTED)[-1].known.values()]
    assert sorted(lengths) == [len(TAGS) - 81, 80]


def test_files_that_have_nothing_in_common_make_few_shapes() -> None:
    walk._fast.cache_clear()
    chance = random.Random(1)
    made = 0
    known = walk._fast("<", WANTED)[-1]
    learn = known.learn

    def counted(heads: list[bytes]) -> None:
        nonlocal made
        before = known._left
        learn(heads)
        made += known._left < before

    known.learn = counted  # type: ignore[method-assign,assignment]
    for number in range(400):
        read(data_set("<", chance, number), "<")
    assert made <= shapes.FIRST_MADE + 400 / shapes.HEADERS_EACH + 1
