"""Searches by C-FIND: all studies and series that a query matches, each once, and nothing else.

Peers differ: some ignore a key that they don't know, some refuse it, some match other things than they were asked
for, some stop at a number of answers, with a status (A700) or without a word. So everything is compared with the
query on this side, by the rules of `imaging.match`; an answer that may be cut short is asked for again in parts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from imaging.loss import WANTED, wanted
from imaging.match import Test, in_days
from imaging.query import Match, Query, count, listed, text
from protocols.dimse import stored
from protocols.dimse.accessions import Accessions, Ask, AskEach
from protocols.dimse.below import CAPS, InParts
from protocols.dimse.beside import SideBySide
from protocols.dimse.identifier import LATIN, encodings, loosened
from protocols.dimse.levels import IMAGE_FIELDS, SERIES_FIELDS, STUDY_FIELDS
from protocols.dimse.lone import studies_of
from protocols.dimse.patients import Patients
from protocols.dimse.query import PATIENT_ROOT_FIND, Finder
from protocols.dimse.unsaid import DESCRIPTIONS, UnsaidDescriptions
from protocols.dimse.unshown import UID_LIST, UnshownLetters
from protocols.dimse.whole import LEAST, HasMore, WholeSearch
from protocols.dimse.wording import worded
from transfer.errors import Busy, DispatchError, Misconfigured
from transfer.query import AskedNumbers, series_tests, study_tests

T = TypeVar("T")
R = TypeVar("R")
Answer = dict[str, Any]

OPTIONAL = ("ModalitiesInStudy", "StudyDescription")  # keys that may be left out where a peer refuses them
EXACT = ("StudyInstanceUID", "AccessionNumber")  # keys that narrow a search so far that nothing is cut short
CONFIRMED = 2  # studies with as many series as parts of them bring, after which so many are no limit
EASTERN = r"[\u1100-\u11ff\u2e80-\ud7ff\uf900-\ufaff\uff00-\uffef]"  # letters that are written with code extensions
MOST_STALE = 3  # studies that announce more series than they have, after which a peer's counts say nothing


class PeerSearch:
    """The studies, series and instances of one peer.

    Args:
        associations: how many may be open at once, the finder's among them.
    """

    def __init__(self, finder: Finder, associations: int = 1) -> None:
        self.finder = finder
        self._beside = SideBySide(self, finder, self._another, associations)
        self._refused: set[str] = set()  # optional keys that this peer doesn't take
        self._whole = WholeSearch(self._at_study_level, finder.peer.where, stops=finder.root != PATIENT_ROOT_FIND)
        self._below = Patients(
            lambda keys, charset: finder.ask_for("PATIENT", keys, ("PatientID", "PatientName"), charset),
            finder.peer.where,
        )
        self._most_series = 0  # the most that the peer has given of a study
        self._were_all = Counter[int]()  # studies by number of series, where parts showed that these were all
        self._stale = 0  # studies that announced more series than there were
        self._patients: dict[str, str] = {}  # PatientID by study, for peers of Patient Root
        self._charsets: dict[str, str] = {}  # in which it was found, by PatientID
        self._notes: dict[str, str] = {}  # what is not shown of a study or series, by UID
        self._study_descriptions, self._series_descriptions = (
            UnsaidDescriptions(keyword, unique, self._stored, finder.peer.where)
            for keyword, unique in zip(DESCRIPTIONS, ("StudyInstanceUID", "SeriesInstanceUID"), strict=True)
        )

    def _another(self, finder: Finder) -> PeerSearch:
        """Return who asks for the same over another association, and knows what has been learnt of the peer."""
        other = PeerSearch(finder)
        other._refused, other._charsets = self._refused, self._charsets
        return other

    def find(self, query: Query) -> Iterator[Match]:
        """Yield the studies or series that match, each once; a study under each number that was asked for it.

        Raises:
            Misconfigured: the query is not valid, or the peer can't answer it in full. Others: as `Finder.ask_for`.
        """
        of_series = dict(series_tests(query))
        for study in self._studies(query):
            if query.level == "series":
                for series in self.series(study, query):
                    instances = count(series.get("NumberOfSeriesRelatedInstances"))
                    yield Match({**study, **series}, instances, self._note(study, series))
            elif self._has_series(study, of_series, query):
                yield Match(study, count(study.get("NumberOfStudyRelatedInstances")), self._note(study))

    def _note(self, *answers: Answer) -> str:
        uids = [str(one.get(uid)) for one in answers for uid in ("StudyInstanceUID", "SeriesInstanceUID")]
        return "; ".join(dict.fromkeys(self._notes[uid] for uid in uids if uid in self._notes))

    def series(self, study: Answer, query: Query) -> Iterator[Answer]:
        """Yield the series of a study that match a query."""
        tests = dict(series_tests(query))
        doubts = self._doubts("SeriesInstanceUID", query, {"StudyInstanceUID": str(study["StudyInstanceUID"])})
        every = self._all_series(study)
        for found in every:
            found["StudyInstanceUID"] = str(study["StudyInstanceUID"])
        self._series_descriptions.fill(every, tests)
        self._notes |= self._series_descriptions.notes
        for found in every:
            if self._passes(found, tests, doubts):
                yield found
        yield from self._matched(doubts)

    def _doubts(self, unique: str, query: Query, above: Mapping[str, str]) -> UnshownLetters:
        """Return a place for answers that may match, though they don't show it."""

        def ask(keys: dict[str, str], charset: str) -> Iterable[Answer]:
            if unique == "StudyInstanceUID":
                return self._at_study_level(keys, charset)
            return self.answers("SERIES", {**above, **keys}, SERIES_FIELDS, charset=charset)

        def read(answer: Answer) -> Answer | None:
            return self._stored([{**above, **answer}])[0]

        return UnshownLetters(ask, unique, wanted(query), self.finder.peer.where, read)

    def _stored(self, answers: list[Answer]) -> list[Answer | None]:
        """Return the values of an instance of each study or series; None for one of which the peer gives none."""
        asked, check = [self._instance(answer) for answer in answers], self.finder.stream.check
        with self.finder.aside():
            return [
                keys
                and stored.values(
                    self.finder.peer, keys, classes, check, self.charset_of(str(keys.get("PatientID", "")))
                )
                for keys, classes in asked
            ]

    def _instance(self, answer: Answer) -> tuple[dict[str, str] | None, tuple[str, ...]]:
        """Return the UIDs of an instance of a study or a series, and its SOP class if the peer lists it."""
        study, series = str(answer["StudyInstanceUID"]), text(answer.get("SeriesInstanceUID"))
        if not series:
            every: dict[str, Answer] = {}
            try:
                self.answers("SERIES", {"StudyInstanceUID": study}, SERIES_FIELDS, every)
            except Busy:
                if not every:
                    raise  # else one is enough, also of a peer that stops at a limit
            if not every:
                return None, ()
            series = next(iter(every))
        images, _ = self.images(study, series, self._patients.get(study, ""))
        one = images[0] if images else {}
        keys = {
            "StudyInstanceUID": study,
            "SeriesInstanceUID": series,
            "PatientID": self._patients.get(study, ""),
            "SOPInstanceUID": text(one.get("SOPInstanceUID")),
        }
        classes = filter(None, (text(one.get("SOPClassUID")),))
        return {key: value for key, value in keys.items() if value}, tuple(classes)

    def _matched(self, doubts: UnshownLetters, seen: Iterable[str] = ()) -> Iterator[Answer]:
        for one in doubts.matched(seen):
            self._notes |= doubts.notes
            yield one

    def _all_series(self, study: Answer) -> list[Answer]:
        """Return the series of a study, asked for in parts if the study announces more than come at once.

        Raises:
            HasMore: the peer has more than it gives.
        """
        keys = {"StudyInstanceUID": str(study["StudyInstanceUID"])}
        unique: dict[str, Answer] = {}
        cut = False
        try:
            self.answers("SERIES", keys, SERIES_FIELDS, unique)
        except Busy:
            if not unique:
                raise
            cut = True  # it says that it stops at a limit
        first = list(unique.values())
        announced = count(study.get("NumberOfStudyRelatedSeries")) or 0
        at_limit = cut or len(first) in CAPS
        # Of a peer that doesn't count, as many as it has ever given may be all that it gives at once.
        most = max(LEAST, self._most_series)
        doubtful = cut or (not announced and len(first) >= most and self._were_all[len(first)] < CONFIRMED)
        self._most_series = max(self._most_series, len(first))
        stale = self._stale >= MOST_STALE and not at_limit
        if not doubtful and (len(first) >= announced or not first or stale):
            return first
        parts = InParts(lambda more: self.answers("SERIES", keys | more, SERIES_FIELDS), first, announced or None)
        parts.by_modality(text(study.get("ModalitiesInStudy")).split("\\"))
        if not parts.whole:
            parts.by_number()
        if not parts.whole and not ((cut or not announced) and parts.exhausted):
            if parts.cut or cut or (at_limit and not parts.heeded and announced):
                more = f": it announces {announced}" if announced else ""
                raise HasMore(
                    f"{self.finder.peer.where}: the peer gives {len(parts.found)} series of a study and has more{more}"
                )
            self._stale += bool(announced)
        self._were_all[len(first)] += not parts.cut
        return list(parts.found.values())

    def _passes(self, found: Answer, tests: Mapping[str, Test], doubts: UnshownLetters) -> bool:
        """Return True if an answer passes all tests; one that may, though it doesn't show it, is kept among `doubts`.

        Raises:
            Misconfigured: the answer lacks what the query needs: "nothing found" would be wrong.
        """
        failed = [keyword for keyword, test in tests.items() if keyword in found and not test(text(found[keyword]))]
        lacking = [keyword for keyword in tests if keyword not in found]
        if lacking and all(keyword in WANTED for keyword in failed):
            read = ", and it gives no instance to read it in" if {*lacking} & {*DESCRIPTIONS} else ""
            raise Misconfigured(
                f"{self.finder.peer.where}: the peer's answers have no {', '.join(lacking)}{read}: the query can't ask "
                "for it"
            )
        if failed:
            doubts.add(found, failed)
        return not failed

    def images(
        self,
        study: str,
        series: str,
        patient: str = "",
        *,
        charset: str = "",
        announced: int | None = None,
        doubtful: bool = False,
    ) -> tuple[list[Answer], bool]:
        """Return the instances of a series as far as the peer lists them, and whether these are all.

        Args:
            charset: in which the peer takes the patient's ID, where another search has found that out.
            announced: how many there are, as the peer says.
            doubtful: whether the peer is to show that it doesn't stop at a limit, if it doesn't say how many there are.
        """
        self._patients.setdefault(study, patient)
        if charset:
            self._charsets.setdefault(patient, charset)
        keys = {"StudyInstanceUID": study, "SeriesInstanceUID": series}
        first: dict[str, Answer] = {}
        cut = False
        try:
            self.answers("IMAGE", keys, IMAGE_FIELDS, first)
        except (Busy, Misconfigured) as exc:
            cut = isinstance(exc, Busy)
        found = list(first.values())
        if not found:
            return [], False
        doubtful = doubtful or len(found) in CAPS
        if not cut and (not doubtful if announced is None else len(found) >= announced):
            return found, True
        parts = InParts(
            lambda more: self.answers("IMAGE", keys | more, IMAGE_FIELDS),
            found, announced, unique="SOPInstanceUID", number="InstanceNumber",
        )  # fmt: skip
        parts.by_number()
        whole = parts.whole or parts.exhausted or (parts.heeded and not parts.cut and not cut)
        return list(parts.found.values()), whole

    def answers(
        self,
        level: str,
        keys: Mapping[str, str],
        fields: tuple[str, ...],
        unique: dict[str, Answer] | None = None,
        charset: str = "",
    ) -> list[Answer]:
        """Return everything below a study or a series, each once.

        Args:
            unique: takes the answers as they come.
            charset: of the keys.
        """
        keys = dict(keys)
        if self.finder.root == PATIENT_ROOT_FIND:
            keys["PatientID"] = self._patients.get(keys["StudyInstanceUID"], "")
            charset = charset or self.charset_of(keys["PatientID"])
        name = fields[0]
        unique = {} if unique is None else unique
        for one in self.finder.ask_for(level, keys, fields, charset):
            uid = str(one.get(name, ""))
            if not uid:
                raise Misconfigured(f"{self.finder.peer.where}: the peer answers at level {level} without {name}")
            other = one.get("StudyInstanceUID"), one.get("SeriesInstanceUID")
            if other[0] in (None, "", keys["StudyInstanceUID"]) and (
                level == "SERIES" or other[1] in (None, "", keys["SeriesInstanceUID"])
            ):
                unique.setdefault(uid, one)
        return list(unique.values())

    def charset_of(self, patient: str) -> str:
        """Return the character set in which the peer takes a patient's ID, as a search has shown; "" if it is ASCII."""
        return self._charsets.get(patient, "")

    # ---- studies

    def _studies(self, query: Query) -> Iterator[Answer]:
        tests = dict(study_tests(query))
        doubts = self._doubts("StudyInstanceUID", query, {})
        descriptions = self._study_descriptions
        seen: set[str] = set()
        numbers = AskedNumbers(query)
        late: dict[str, tuple[Mapping[str, str], Answer]] = {}  # without a description, until all answers are here
        for sent, study in self._candidates(query):
            uid = str(study.get("StudyInstanceUID", ""))
            if not uid:
                raise Misconfigured(f"{self.finder.peer.where}: the peer answers without Study Instance UIDs")
            number = text(study.get("AccessionNumber"))
            if uid in late or (uid in seen and not numbers.is_another(uid, number)):
                continue
            numbers.show(uid, number)
            self._patients[uid] = str(study.get("PatientID", ""))
            descriptions.see(study)
            if descriptions.keyword in tests and descriptions.lacks(study):
                late[uid] = sent, study
            elif self._passes(study, _untrusted(tests, study, sent), doubts):
                seen.add(uid)
                yield study
        descriptions.fill([study for _, study in late.values()], tests)
        self._notes |= descriptions.notes
        for uid, (sent, study) in late.items():
            if self._passes(study, _untrusted(tests, study, sent), doubts):
                seen.add(uid)
                yield study
        yield from self._matched(doubts, seen)

    def _candidates(self, query: Query) -> Iterator[tuple[Mapping[str, str], Answer]]:
        """Yield studies that may match, with the keys that the peer was asked to match."""
        for values in (query.AccessionNumber, query.StudyDescription, query.SeriesDescription):
            if values and not any(value.strip() for value in values):
                return  # blanks match nothing: not worth a list of all that there is
        keys = {
            keyword: value.strip()
            for keyword, value in (
                ("PatientID", query.PatientID),
                ("PatientName", query.PatientName),
                ("StudyDate", query.StudyDate.strip() and in_days(query.StudyDate)),
            )
            if value.strip()
        }
        modalities = listed(query.Modality)
        if len(modalities) == 1:
            keys["ModalitiesInStudy"] = modalities[0].upper()  # as all code strings are (PS3.5 section 6.2)
        studies = listed(query.StudyInstanceUID)
        if not studies and query.SeriesInstanceUID.strip():
            known = studies_of(self.finder, listed(query.SeriesInstanceUID))
            if known is not None and not known:
                return
            studies = known or []
        accessions = list(dict.fromkeys(value.strip() for value in query.AccessionNumber if value.strip()))
        if studies:
            yield from self._by_uid(
                studies, keys | ({"AccessionNumber": accessions[0]} if len(accessions) == 1 else {})
            )
        elif accessions:
            yield from Accessions(self._each(keys)).find(accessions)
        elif query.StudyDescription and not keys:
            for value in query.StudyDescription:
                yield from self._worded({"StudyDescription": value.strip().replace("\\", "?")})
        else:
            yield from self._worded(keys)

    def _each(self, keys: dict[str, str]) -> AskEach:
        """Return what asks for studies by further keys, several at once where it may."""

        def each(work: Callable[[Ask, T], R], values: Sequence[T]) -> list[R]:
            def one(search: PeerSearch, value: T) -> R:
                return work(lambda given, most: search._worded({**keys, **given}, most), value)

            return self._beside.each(one, values)

        return each

    def _by_uid(self, uids: list[str], keys: dict[str, str]) -> Iterator[tuple[Mapping[str, str], Answer]]:
        """Yield studies by lists of UIDs, and ask for each alone that no list brings: not every peer accepts lists."""
        uids = list(dict.fromkeys(uids))
        found: set[str] = set()
        for start in range(0, len(uids), UID_LIST) if len(uids) > 1 else ():
            some = uids[start : start + UID_LIST]
            try:
                for sent, one in self._worded(keys | {"StudyInstanceUID": "\\".join(some)}):
                    if str(one.get("StudyInstanceUID", "")) in some:
                        found.add(str(one["StudyInstanceUID"]))
                        yield sent, one
            except Misconfigured:
                break
        left = [uid for uid in uids if uid not in found]
        alone = self._beside.each(lambda search, uid: list(search._worded(keys | {"StudyInstanceUID": uid})), left)
        for answers in alone:
            yield from answers

    def _worded(self, keys: dict[str, str], most: int = 0) -> Iterator[tuple[Mapping[str, str], Answer]]:
        """Ask in a form that the peer accepts: in one character set after another, without keys that it refuses."""
        failed: DispatchError | None = None
        answered = False
        for wording, charset in self._wordings(keys):
            wording = {key: value for key, value in wording.items() if key not in self._refused}
            try:
                found = self._asked(wording, charset, most)
            except Misconfigured as exc:
                failed = failed or exc
                continue
            answered = True
            sent = {key: value for key, value in wording.items() if value == keys[key]}  # as it is meant
            yield from ((sent, one) for one in found)
            if found and charset == "":
                return
        if failed and not answered:
            raise failed

    def _wordings(self, keys: dict[str, str]) -> Iterator[tuple[dict[str, str], str]]:
        """Yield the keys unchanged; if they are not ASCII, with wild cards, then in one character set after another.

        Nothing shows in which character sets a peer reads queries, or has stored its names.
        """
        keys = {key: worded(key, value) for key, value in keys.items()}
        foreign = "".join(dict.fromkeys("".join(value for value in keys.values() if not value.isascii())))
        if not foreign:
            yield keys, ""
            return
        loose = {key: re.sub(r"[^\x00-\x7f]+", "*", value) for key, value in keys.items()}
        if any(re.search(r"[A-Za-z0-9]", value) for value in loose.values()):
            yield loose, ""
        for charset in (each := encodings(foreign)):
            yield keys, charset
        patterns = all(value.isascii() or "*" in value for value in keys.values())
        if patterns and re.search(EASTERN, foreign):
            for charset in (one for one in each if "2022" in one):
                yield {key: loosened(key, value, charset) for key, value in keys.items()}, LATIN

    def _asked(self, keys: dict[str, str], charset: str, most: int) -> list[Answer]:
        while True:
            try:
                exact = [keys[key] for key in EXACT if key in keys and not re.search(r"[*?]", keys[key])]
                if most or "StudyInstanceUID" in keys or any("\\" in value for value in exact):
                    return list(self._at_study_level(keys, charset, most))
                return self._whole.answers(keys, charset, narrow=bool(exact))
            except HasMore:
                raise
            except Misconfigured:
                optional = next((key for key in OPTIONAL if key in keys), None)
                if optional is None:
                    raise
                self._refused.add(optional)
                keys = {key: value for key, value in keys.items() if key != optional}

    def _at_study_level(self, keys: Mapping[str, str], charset: str, most: int = 0) -> Iterator[Answer]:
        patient_id = keys.get("PatientID", "")
        if self.finder.root != PATIENT_ROOT_FIND or re.fullmatch(r"[^*?]+", patient_id):
            for study in self.finder.ask_for("STUDY", keys, STUDY_FIELDS, charset, most):
                if not patient_id.isascii():
                    self._charsets[patient_id] = charset
                yield study
            return
        # Patient Root has studies below a patient only (PS3.4 section C.4.1.2.2.1).
        patient = {key: value for key, value in keys.items() if key in ("PatientID", "PatientName")}
        rest = {key: value for key, value in keys.items() if key not in patient}
        for patient_id in self._below.ids(patient, charset):
            below = rest | {"PatientID": patient_id}
            # In which character set a peer reads an ID that it has given, nothing shows.
            foreign = "".join(value for value in below.values() if not value.isascii())
            failed: DispatchError | None = None
            answered = False
            for one in [charset] if patient_id.isascii() else encodings(foreign):
                try:
                    found = list(self.finder.ask_for("STUDY", below, STUDY_FIELDS, one))
                except Misconfigured as exc:
                    failed = failed or exc
                    continue
                answered = True
                if found:
                    self._charsets[patient_id] = one
                    yield from ({"PatientID": patient_id} | study for study in found)
                    break
            if failed and not answered:
                raise failed

    def _has_series(self, study: Answer, tests: dict[str, Any], query: Query) -> bool:
        """Return True if one series of a study passes all tests that a query has for series."""
        if not tests:
            return True
        modalities = study.get("ModalitiesInStudy")
        if set(tests) == {"Modality"} and modalities:
            every = [modalities] if isinstance(modalities, str) else modalities
            return any(tests["Modality"](str(one)) for one in every)
        return any(True for _ in self.series(study, query))


def _untrusted(tests: Mapping[str, Test], study: Answer, sent: Mapping[str, str]) -> dict[str, Test]:
    """Return the tests that a study must pass: what it lacks, though the peer was asked to match it, is trusted."""
    return {keyword: test for keyword, test in tests.items() if keyword in study or keyword not in sent}
