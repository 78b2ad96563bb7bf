"""Answers that a peer shows with fewer letters than the query asks for: the peer is asked whether it matches them.

Orthanc answers in Latin-1 unless told otherwise, and leaves all other letters out. It matches by what it has stored,
but finds none of these letters by a `?`. Whether one stands there is read in an instance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from imaging.charset import lacking
from imaging.loss import PATTERNS, is_hazy, may_be, others, shape
from imaging.query import text
from protocols.dimse.identifier import ENCODINGS, encodings
from protocols.dimse.wording import forms, worded
from transfer.errors import Misconfigured

Answer = dict[str, Any]
Keys = dict[str, str]
Ask = Callable[[Keys, str], Iterable[Answer]]  # keys, and the character set that they are written in

UID_LIST = 50  # UIDs in one query
MOST_READ = 200  # instances, for one query


class UnshownLetters:
    """The doubtful answers to one query.

    Args:
        ask: asks the peer.
        unique: keyword of the UID by which the answers are asked for again.
        wanted: what is asked for, by keyword.
        where: the peer, for messages.
        stored: reads the values of an answer in one of its instances; returns None if the peer gives none.

    Attributes:
        notes: what is not shown of an answer, by UID.
    """

    def __init__(
        self,
        ask: Ask,
        unique: str,
        wanted: Mapping[str, Sequence[str]],
        where: str,
        stored: Callable[[Answer], Answer | None],
    ) -> None:
        self._ask, self._unique, self._wanted, self._where, self._stored = ask, unique, wanted, where, stored
        self._instances: dict[str, Answer | None] = {}  # what was read of one, by UID
        self._kept: dict[str, tuple[Answer, dict[str, list[str]]]] = {}
        self._takes_lists = False
        self.notes: dict[str, str] = {}

    def add(self, answer: Answer, failed: Iterable[str]) -> None:
        """Keep an answer for later if letters that it can't show are all that it lacks.

        Args:
            failed: keywords of which it doesn't show what the query asks for.
        """
        charset = text(answer.get("SpecificCharacterSet"))
        open_ = {
            keyword: may_be(keyword, self._wanted.get(keyword, ()), text(answer.get(keyword)), charset)
            for keyword in failed
        }
        if open_ and all(open_.values()):
            self._kept.setdefault(str(answer[self._unique]), (answer, open_))

    def matched(self, seen: Iterable[str] = ()) -> Iterator[Answer]:
        """Yield the answers that the peer matches, though it doesn't show that.

        Args:
            seen: UIDs of answers that need not be asked for.

        Raises:
            Misconfigured: the peer neither shows nor matches what the query asks for.
        """
        for uid in set(seen) & self._kept.keys():
            del self._kept[uid]
        uids = list(self._kept)
        for start in range(0, len(uids), UID_LIST):
            left = uids[start : start + UID_LIST]
            for keyword in self._wanted:
                concerned = [uid for uid in left if keyword in self._kept[uid][1]]
                passed = self._matched_by(keyword, concerned)
                left = [uid for uid in left if uid not in concerned or uid in passed]
            for uid in left:
                answer, open_ = self._kept[uid]
                charset = text(answer.get("SpecificCharacterSet")).replace("\\", ", ") or "ASCII"
                how = "matches" if self._instances.get(uid) is None else "has"
                self.notes[uid] = (
                    f"the peer {how} {' and '.join(open_)}, and shows it in {charset}, without the other letters"
                )
                yield answer

    def _matched_by(self, keyword: str, uids: list[str]) -> set[str]:
        """Return those that the peer finds by what is asked for, and not by other letters in its place.

        Their answers get the values that were asked for, or those that are stored, in the place of what is shown.
        """
        if any(is_hazy(keyword, value) for value in self._wanted[keyword]):
            return self._stored_with(keyword, uids)
        passed: set[str] = set()
        open_: set[str] = set()  # of which nothing is known yet
        for value in dict.fromkeys(value for uid in uids for value in self._kept[uid][1][keyword]):
            some = [uid for uid in uids if value in self._kept[uid][1][keyword] and uid not in passed]
            lost = frozenset[str]().union(
                *(lacking(value, text(self._kept[uid][0].get("SpecificCharacterSet"))) for uid in some)
            )
            found, unknown = self._found_by(keyword, value, lost, some)
            passed |= found
            open_ |= unknown
            if keyword not in PATTERNS:  # what is found by such a value has it
                for uid in found:
                    self._kept[uid][0][keyword] = value
        if any(text(self._kept[uid][0].get(keyword)) for uid in open_ - passed):
            raise Misconfigured(
                f"{self._where}: the peer shows {keyword} without some of its letters, and doesn't look at them: "
                f"leave it out of the query"
            )
        return passed

    def _stored_with(self, keyword: str, uids: list[str]) -> set[str]:
        """Return those of which an instance shows what is asked for.

        Raises:
            Misconfigured: the peer gives no instance of one, or there are too many to read.
        """
        shapes: dict[str, list[str]] = {}
        for uid in uids:
            shapes.setdefault(shape(text(self._kept[uid][0].get(keyword))), []).append(uid)
        complete: set[str] = set()  # those that have no more letters than are shown
        for one, alike in shapes.items():
            with suppress(Misconfigured):
                found = self._come(keyword, [one], "", alike) if one.strip("^=") else set()
                complete |= found - self._come(keyword, [f"?{one}"], "", sorted(found))  # which of two lengths it heeds
        tests = [PATTERNS[keyword](value) for value in self._wanted[keyword]]
        passed: set[str] = set()
        for uid in uids:
            if uid in complete:
                continue
            answer = self._kept[uid][0]
            if uid not in self._instances:
                self._instances[uid] = self._stored(answer) if len(self._instances) < MOST_READ else None
            stored = self._instances[uid]
            if stored is None:
                raise Misconfigured(
                    f"{self._where}: the peer shows {keyword} without some letters, so that what stands for ? is not "
                    f"known: narrow the query, or write * for ?"
                )
            value = text(stored.get(keyword))
            if any(test(value) for test in tests):
                passed.add(uid)
                answer[keyword] = value
        return passed

    def _found_by(self, keyword: str, value: str, lost: frozenset[str], uids: list[str]) -> tuple[set[str], set[str]]:
        """Return those that are found by a value, and those of which that can't be found out."""
        passed: set[str] = set()
        unheeded: set[str] = set()
        refused = True
        for charset in encodings(value):
            left = [uid for uid in uids if uid not in passed]
            if not left:
                break
            alike = others(value, lost, ENCODINGS[charset])
            try:
                for made in (forms, _loosely):  # a peer that doesn't read the letters may find it by the second only
                    came = self._come(keyword, made(keyword, value), charset, left)
                    refused = False
                    either = came
                    for other in alike:
                        either = self._come(keyword, made(keyword, other), charset, sorted(either))
                    unheeded |= either
                    passed |= came - either if made is forms else set()
                    left = [uid for uid in left if uid not in came]
            except Misconfigured:
                continue
        return passed, (set(uids) if refused else unheeded) - passed

    def _come(self, keyword: str, values: list[str], charset: str, uids: list[str]) -> set[str]:
        """Return those of some UIDs that the peer finds together with one of the values."""
        found: set[str] = set()
        for form in values:
            left = [uid for uid in uids if uid not in found]
            if len(left) > 1:
                with suppress(Misconfigured):  # some refuse lists, and some look at the first UID only
                    came = self._asked(keyword, form, charset, left)
                    self._takes_lists = self._takes_lists or len(came) > 1
                    found |= came
            if len(left) == 1 or not self._takes_lists:
                for uid in left:
                    found |= self._asked(keyword, form, charset, [uid])
        return found

    def _asked(self, keyword: str, form: str, charset: str, uids: list[str]) -> set[str]:
        keys = {self._unique: "\\".join(uids), keyword: form}
        return {str(one.get(self._unique, "")) for one in self._ask(keys, charset)} & set(uids)


def _loosely(keyword: str, value: str) -> list[str]:
    return [worded(keyword, value)]
