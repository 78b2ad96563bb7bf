"""The lines of a receipt, one for each item: as few bytes in memory as they can be, where there are 100,000 of them."""

from __future__ import annotations

import json
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from sys import intern
from typing import Any, overload

from transfer.item import Item
from transfer.outcome import Kind, Outcome

PACKED_LINES = 500  # that are compressed together
ALIKE = ("state", "verified", "hook")  # what has the same few words in each receipt
ITEM, ROW = '{"path": ', '{"study": '  # begin a line of a document that is an item, or a study of a flood


@dataclass(frozen=True, slots=True)
class ItemResult:
    """One line of a receipt."""

    path: str
    sop_instance_uid: str
    outcome: Kind
    detail: str = ""

    @classmethod
    def of(cls, item: Item, outcome: Outcome) -> ItemResult:
        """Return the line about an item."""
        return cls(item.shown, item.sop_instance_uid, outcome.kind, outcome.detail)

    @classmethod
    def from_json(cls, one: dict[str, str]) -> ItemResult:
        """Return the line that `to_json` made this of."""
        return cls(one["path"], one["sop_instance_uid"], Kind(one["outcome"]), one["detail"])

    def to_json(self) -> dict[str, str]:
        """Return the JSON of one item."""
        return {
            "path": self.path,
            "sop_instance_uid": self.sop_instance_uid,
            "outcome": str(self.outcome),
            "detail": self.detail,
        }


class Made(Sequence[ItemResult]):
    """Lines that are made when they are asked for."""

    __slots__ = ()

    @abstractmethod
    def counts(self) -> Counter[Kind]:
        """Return the number of lines by kind of outcome."""

    @abstractmethod
    def of(self, kinds: Collection[Kind]) -> Iterator[ItemResult]:
        """Yield the lines whose outcome is of one of these kinds."""

    @overload
    def __getitem__(self, at: int) -> ItemResult: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[ItemResult]: ...
    def __getitem__(self, at: int | slice) -> ItemResult | Sequence[ItemResult]:
        return [*self][at] if isinstance(at, slice) else next(islice(self, range(len(self))[at], None))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(len(self))


class Lines(Made):
    """Lines about items and their outcomes.

    Kept, those of 100,000 items would be 7 MB more, and each look at one of them costs less than to make it.
    """

    __slots__ = ("_items", "_outcomes")

    def __init__(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> None:
        self._items, self._outcomes = items, outcomes

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[ItemResult]:
        return map(ItemResult.of, self._items, self._outcomes)

    def counts(self) -> Counter[Kind]:
        return Counter(outcome.kind for outcome in self._outcomes)

    def of(self, kinds: Collection[Kind]) -> Iterator[ItemResult]:
        for item, outcome in zip(self._items, self._outcomes, strict=True):
            if outcome.kind in kinds:
                yield ItemResult.of(item, outcome)


class Packed(Made):
    """Lines that nobody looks at for a while, compressed: some 70 bytes each, where an item takes 250."""

    __slots__ = ("_counts", "_pieces")

    def __init__(self, lines: Iterable[ItemResult]) -> None:
        every, pieces, counts = iter(lines), list[bytes](), Counter[Kind]()
        while piece := [*islice(every, PACKED_LINES)]:
            counts.update(one.outcome for one in piece)
            text = json.dumps([(one.path, one.sop_instance_uid, one.outcome.value, one.detail) for one in piece])
            pieces.append(zlib.compress(text.encode(), 1))
        self._pieces, self._counts = tuple(pieces), tuple(counts[kind] for kind in Kind)

    def __len__(self) -> int:
        return sum(self._counts)

    def __iter__(self) -> Iterator[ItemResult]:
        for piece in self._pieces:
            yield from _unpacked(piece)

    def counts(self) -> Counter[Kind]:
        return Counter(dict(zip(Kind, self._counts, strict=True)))

    def of(self, kinds: Collection[Kind]) -> Iterator[ItemResult]:
        counts = self.counts()
        return (one for one in self if one.outcome in kinds) if any(counts[kind] for kind in kinds) else iter(())


class Joined(Made):
    """The lines of several receipts: each path is below the name of its receipt.

    Args:
        parts: names, and the lines of each.
    """

    __slots__ = ("_parts",)

    def __init__(self, parts: Iterable[tuple[str, Sequence[ItemResult]]]) -> None:
        self._parts = [*parts]

    def __len__(self) -> int:
        return sum(len(lines) for _, lines in self._parts)

    def __iter__(self) -> Iterator[ItemResult]:
        return (_below(name, one) for name, lines in self._parts for one in lines)

    def counts(self) -> Counter[Kind]:
        found = Counter[Kind]()
        for _, lines in self._parts:
            found += counts(lines)
        return found

    def of(self, kinds: Collection[Kind]) -> Iterator[ItemResult]:
        return (_below(name, one) for name, lines in self._parts for one in of(lines, kinds))


def counts(lines: Sequence[ItemResult]) -> Counter[Kind]:
    """Return the number of lines by kind of outcome."""
    return lines.counts() if isinstance(lines, Made) else Counter(one.outcome for one in lines)


def of(lines: Sequence[ItemResult], kinds: Collection[Kind]) -> Iterator[ItemResult]:
    """Yield the lines whose outcome is of one of these kinds."""
    return lines.of(kinds) if isinstance(lines, Made) else (one for one in lines if one.outcome in kinds)


def document(text: Iterable[bytes]) -> dict[str, Any]:
    """Return the receipts of a run from their JSON, line by line, with the lines of each packed.

    Read as a whole, those of 100,000 items of a flood are 160 MB for a while. A document in which items and rows have
    no lines of their own is taken, too.
    """
    rest, rows, packs = list[str](), list[dict[str, Any]](), list[Packed]()
    given = map(bytes.decode, text)
    for line in given:
        if line.startswith(ITEM):
            ends: list[str] = []
            packs.append(Packed(_items(line, given, ends)))
            rest.append(f"{len(packs) - 1}{ends[0]}")
        elif line.startswith(ROW):
            row, end = _ROWS.raw_decode(line)
            rows.append(row)
            rest.append(f"{len(rows) - 1}{line[end:]}")
        else:
            rest.append(line)

    def put(found: dict[str, Any]) -> dict[str, Any]:
        if isinstance(found.get("items"), list) and found["items"] and isinstance(found["items"][0], int):
            found["items"] = packs[found["items"][0]]
        return _packed(found)

    found: dict[str, Any] = json.loads("".join(rest), object_hook=put)
    if "studies" in found:
        found["studies"] = [rows[one] if isinstance(one, int) else one for one in found["studies"]]
    return found


def _items(line: str, others: Iterator[str], ends: list[str]) -> Iterator[ItemResult]:
    """Yield the items of a receipt; note what follows the last one in its line."""
    while True:
        one, end = _PLAIN.raw_decode(line)
        yield ItemResult.from_json(one)
        if line[end:].strip() != ",":
            ends.append(line[end:])
            return
        line = next(others, "")


def _packed(found: dict[str, Any]) -> dict[str, Any]:
    """Return an object of a document as small as it can be: rows have the same words in each."""
    if "hook" in found and isinstance(found.get("items"), list):
        found["items"] = Packed(map(ItemResult.from_json, found["items"]))
    return {intern(key): intern(value) if key in ALIKE else value for key, value in found.items()}


_PLAIN, _ROWS = json.JSONDecoder(), json.JSONDecoder(object_hook=_packed)


def as_json(lines: object) -> list[dict[str, str]]:
    """Return the JSON of packed lines that a document holds: the `default` of `json.dumps`."""
    if not isinstance(lines, Made):
        raise TypeError(f"{type(lines).__name__} is not JSON")
    return [one.to_json() for one in lines]


def read(lines: Sequence[dict[str, str]] | Packed) -> Sequence[ItemResult]:
    """Return the lines of a receipt's JSON, packed or not."""
    return lines if isinstance(lines, Packed) else tuple(map(ItemResult.from_json, lines))


def _unpacked(piece: bytes) -> Iterator[ItemResult]:
    for path, uid, outcome, detail in json.loads(zlib.decompress(piece)):
        yield ItemResult(path, uid, Kind(outcome), detail)


def _below(name: str, one: ItemResult) -> ItemResult:
    return ItemResult(f"{name}/{one.path}", one.sop_instance_uid, one.outcome, one.detail)
