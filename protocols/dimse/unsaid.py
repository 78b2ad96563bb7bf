"""Descriptions that a peer's answers leave out, though a query filters by them: read in an instance of each answer.

Archives keep the optional attributes that they like for searches, and leave the others out of their answers or send
them empty (PS3.4 section C.2.2.1.3): dcmqrscp has no Series Description.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from imaging.loss import WANTED
from imaging.match import Test
from imaging.query import text
from transfer.errors import Misconfigured

Answer = dict[str, Any]

DESCRIPTIONS = ("StudyDescription", "SeriesDescription")
MOST_READ = 2000  # instances for one search
AT_ONCE = 20  # instances that are read before it is looked whether others have to be
# Studies with instances that have no description either, or so many of these, after which empty ones in answers are
# taken for what they are. Of one study alone, a few series without one say little: localizers, and reports.
BELIEVED, BELIEVED_INSTANCES = 3, 20


class UnsaidDescriptions:
    """One description in the answers of one peer.

    Args:
        keyword: the attribute.
        unique: keyword of the UID of what it describes.
        read: returns the values of an instance of each answer; None for one of which the peer gives none.
        where: the peer, for messages.

    Attributes:
        notes: where a description was read, by UID.
    """

    def __init__(
        self, keyword: str, unique: str, read: Callable[[list[Answer]], list[Answer | None]], where: str
    ) -> None:
        self.keyword, self._unique, self._read, self._where = keyword, unique, read, where
        self._shown = self._hidden = False  # whether an answer has had one, and an instance one that its answer hid
        self._empty: Counter[str] = Counter()  # by study, instances that had none either, or could not be read
        self._known: dict[str, str | None] = {}  # what was read, by UID; None if it could not be
        self.notes: dict[str, str] = {}

    def see(self, answer: Answer) -> None:
        """Look at an answer, before any is filled."""
        self._shown = self._shown or bool(text(answer.get(self.keyword)))

    def lacks(self, answer: Answer) -> bool:
        """Return True if an instance may have a description that an answer doesn't show."""
        if self.keyword not in answer:
            return True
        believed = len(self._empty) >= BELIEVED or self._empty.total() >= BELIEVED_INSTANCES
        return not (self._shown or text(answer[self.keyword]) or (believed and not self._hidden))

    def fill(self, answers: Sequence[Answer], tests: Mapping[str, Test]) -> None:
        """Give answers the descriptions of their instances, as far as these can be read and the query needs them.

        Args:
            tests: those of the query; what fails one of the others needs no description.

        Raises:
            Misconfigured: there are too many. Others: as `read`.
        """
        if self.keyword not in tests:
            return
        for one in answers:
            self.see(one)
        while some := [one for one in answers if self._uid(one) not in self._known and self._is_open(one, tests)]:
            some = some[:AT_ONCE]
            if len(self._known) + len(some) > MOST_READ:
                raise Misconfigured(
                    f"{self._where}: the peer's answers have no {self.keyword}, and more than {MOST_READ} instances "
                    "would have to be read for it: narrow the query"
                )
            for one, values in zip(some, self._read(some), strict=True):
                value = None if values is None else text(values.get(self.keyword))
                self._known[self._uid(one)] = value
                self._hidden = self._hidden or bool(value)
                if not value:
                    self._empty[str(one.get("StudyInstanceUID", ""))] += 1
        for one in answers:
            value = self._known.get(self._uid(one)) if self._is_open(one, tests) else None
            if value is not None:
                one[self.keyword] = value
            if value:
                self.notes[self._uid(one)] = f"the peer doesn't show {self.keyword}: it was read in an instance"

    def _uid(self, answer: Answer) -> str:
        return str(answer.get(self._unique, ""))

    def _is_open(self, answer: Answer, tests: Mapping[str, Test]) -> bool:
        """Return True if it depends on the description whether an answer matches."""
        shown = (keyword for keyword in tests if keyword in answer and keyword not in WANTED)
        return self.lacks(answer) and all(tests[keyword](text(answer[keyword])) for keyword in shown)
