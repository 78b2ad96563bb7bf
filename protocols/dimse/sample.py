"""Finds one instance that a peer has, by a few small queries: one of the newest, of a kind that is usually small."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from itertools import islice
from typing import Any

from imaging.header import UID
from imaging.query import count, text
from protocols.dimse.identifier import encodings
from protocols.dimse.levels import IMAGE_FIELDS, SERIES_FIELDS, STUDY_FIELDS
from protocols.dimse.query import PATIENT_ROOT_FIND, Finder
from protocols.dimse.series import PulledSeries
from transfer.errors import Busy, Misconfigured

MOST = 20  # answers to one query, after which the peer is asked to stop
STUDIES = 10  # that are looked into
DAYS = (1, 7, 31)  # what is new is sure to be at hand; without a date, an archive may have millions of answers
SMALL = ("CT", "MR", "PT", "CR")  # modalities whose instances have a few megabytes at most
LARGE = ("MG", "SM", "XA", "RF", "US", "IVUS", "OPT", "NM")

Answer = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One instance of a peer's.

    Attributes:
        series: what is to be retrieved: the one instance.
        study: what the peer answers of its study.
    """

    series: PulledSeries
    study: Answer = field(repr=False)


class Sampler:
    """Looks for an instance.

    Attributes:
        refusal: why the peer did not answer the last query that it refused; None if it refused none.
    """

    def __init__(self, finder: Finder, today: date) -> None:
        self.refusal: Busy | Misconfigured | None = None
        self._finder, self._today = finder, today
        self._charset = ""  # of the patient's ID, of peers of Patient Root

    def find(self) -> Sample | None:
        """Return an instance; None if the peer shows none.

        Raises:
            Interrupted, TimedOut, Denied: as `Finder.ask_for`.
        """
        for study in islice(self._studies(), STUDIES):
            patient = text(study.get("PatientID")) if self._finder.root == PATIENT_ROOT_FIND else ""
            above = {"StudyInstanceUID": text(study.get("StudyInstanceUID")), "PatientID": patient}
            above = {key: value for key, value in above.items() if value}
            for series in sorted(self._asked("SERIES", above, SERIES_FIELDS), key=_rank):
                below = above | {"SeriesInstanceUID": text(series.get("SeriesInstanceUID"))}
                for image in self._asked("IMAGE", below, IMAGE_FIELDS):
                    uid = text(image.get("SOPInstanceUID"))
                    if UID.fullmatch(uid):
                        return Sample(self._series(below, uid, text(image.get("SOPClassUID"))), study)
        return None

    def _series(self, keys: Mapping[str, str], uid: str, sop_class: str) -> PulledSeries:
        return PulledSeries(
            keys["StudyInstanceUID"],
            keys["SeriesInstanceUID"],
            images={uid: (sop_class, ())},
            patient=keys.get("PatientID", ""),
            charset=self._charset,
            listed=True,
            all_listed=True,
            proven=True,
            is_part=True,
        )

    def _studies(self) -> Iterator[Answer]:
        """Yield studies, the newest first where the peer can be asked for a date."""
        if self._finder.root == PATIENT_ROOT_FIND:
            for one in self._asked("PATIENT", {}, ("PatientID", "PatientName")):
                patient = text(one.get("PatientID"))
                for self._charset in encodings(patient) if patient else ():
                    if found := self._asked("STUDY", {"PatientID": patient}, STUDY_FIELDS):
                        yield from ({"PatientID": patient} | study for study in _smallest(found))
                        break
            return
        for days in DAYS:
            yield from _smallest(self._asked("STUDY", {"StudyDate": self._since(days)}, STUDY_FIELDS))
        yield from _smallest(self._asked("STUDY", {}, STUDY_FIELDS))

    def _since(self, days: int) -> str:
        return f"{self._today - timedelta(days):%Y%m%d}-"

    def _asked(self, level: str, keys: Mapping[str, str], fields: tuple[str, ...]) -> list[Answer]:
        """Return the first answers to a query that have what identifies them; those that came before a refusal."""
        found: list[Answer] = []
        try:
            for one in self._finder.ask_for(level, keys, fields, self._charset, MOST):
                if one.get(fields[0]) and all(
                    text(one.get(key)) in ("", value) for key, value in keys.items() if "UID" in key
                ):
                    found.append(one)
        except (Busy, Misconfigured) as exc:
            self.refusal = exc
        return found


def _smallest(found: Iterable[Answer]) -> list[Answer]:
    """Return studies, those with the fewest instances first, and those of which that is not known last."""
    return sorted(found, key=lambda one: count(one.get("NumberOfStudyRelatedInstances")) or MOST**4)


def _rank(series: Answer) -> int:
    modality = text(series.get("Modality"))
    return 0 if modality in SMALL else 2 if modality in LARGE else 1
