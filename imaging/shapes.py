"""Recognises in one step what headers have in common: the same elements, one after the other, with the same lengths.

The images of a series differ in few elements. What was stepped over once is a shape: where its elements begin, so that
one call reads all their tags, VRs and lengths, to be compared with those of the shape. A header that differs is stepped
over where it does, and its shapes are cut there, so that they soon are what its series has in common.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

HEAD_BYTES = 8  # tag, VR and 16-bit length of an element
MIN_ELEMENTS = 8  # fewer are stepped over as fast
MAX_SHAPES = 256
# Making a shape costs as much as stepping over a header: some at once, then one for so many headers, so that files
# that have nothing in common cost little more than without.
FIRST_MADE, HEADERS_EACH = 64, 4


class Shape:
    """Elements that follow one another.

    Attributes:
        heads: tag, VR and length of each, as they stand in the file.
        unpack: reads them.
        size: bytes of all elements.
        wanted: offset and length of the values that are wanted, and their tags.
        last: the tag of the last element, as `Walk` reads it.
        lengths: the lengths of all values, by bitwise or.
    """

    __slots__ = ("heads", "last", "lengths", "size", "unpack", "wanted")

    def __init__(
        self, heads: tuple[bytes, ...], parts: Callable[[bytes, int], tuple[int, int, int]], wanted: dict[int, int]
    ) -> None:
        self.heads, self.size, self.last, self.lengths = heads, 0, -1, 0
        self.wanted: list[tuple[int, int, int]] = []
        form = []
        for head in heads:
            self.last, _, length = parts(head, 0)
            if self.last in wanted:
                self.wanted.append((self.size + HEAD_BYTES, length, wanted[self.last]))
            self.size += HEAD_BYTES + length
            self.lengths |= length
            form.append(f"{HEAD_BYTES}s{length}x")
        self.unpack: Callable[[bytes, int], tuple[bytes, ...]] = struct.Struct("<" + "".join(form)).unpack_from


class Shapes:
    """The shapes that were seen last; safe to use from several threads.

    Args:
        parts: reads tag, VR and length.
        wanted: the tags of the values that are wanted, by what `parts` reads.

    Attributes:
        known: shapes by their first element's head.
    """

    def __init__(self, parts: Callable[[bytes, int], tuple[int, int, int]], wanted: dict[int, int]) -> None:
        self.known: dict[bytes, Shape] = {}
        self._parts, self._wanted = parts, wanted
        self._left = float(FIRST_MADE)

    def earn(self) -> None:
        """Note that a header was read."""
        self._left = min(self._left + 1 / HEADERS_EACH, FIRST_MADE)

    def learn(self, heads: Sequence[bytes]) -> None:
        """Make a shape of elements that follow one another, if they are worth it."""
        if len(heads) < MIN_ELEMENTS or self._left < 1:
            return
        self._left -= 1
        if len(self.known) >= MAX_SHAPES:
            self.known.clear()
        self.known[heads[0]] = Shape(tuple(heads), self._parts, self._wanted)

    def cut(self, shape: Shape, heads: tuple[bytes, ...]) -> None:
        """Cut a shape where these heads, which were read as if they had it, differ."""
        self.known.pop(shape.heads[0], None)
        same = next(index for index, head in enumerate(heads) if head != shape.heads[index])
        self.learn(shape.heads[:same])
        self.learn(shape.heads[same + 1 :])
