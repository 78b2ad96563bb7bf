"""Studies with names beyond Latin-1, and what searches find of them, also where answers show fewer letters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from blocks.base import Target
from imaging.query import Match, Query
from talaria.testing import studies
from tasks.retrieve.fetch import Fetcher
from tasks.retrieve.job import Job
from tests.servers.orthanc import Orthanc

NAMES = (
    "Müller^Jörg", "Yamada^Tarou=山田^太郎=やまだ^たろう", "Павлов^Иван", "Łukasz^Żółć", "山田^太郎", "ukasz^ó",
    "Doe^Jane", "山",
)  # fmt: skip
SERIES = "T1 山"
NUMBER = "Ł3"  # an accession number
FOUND = {
    **{Query(PatientName=name): {number} for number, name in enumerate(NAMES) if "山" not in name},
    Query(PatientName=NAMES[1]): {1},
    Query(PatientName="山田^太郎"): {1, 4},
    Query(PatientName="山*"): {1, 4, 7},
    Query(PatientName="*太郎", StudyDescription=("Übersicht 山 b",)): {1},
    Query(PatientName="Łuk*"): {3},
    Query(PatientName="Пав*"): {2},
    Query(PatientName="Сав*"): set(),
    Query(PatientName="田*"): set(),
    Query(PatientName="?ukasz^*"): {3},
    Query(PatientName="?uk??z*", PatientID="P??"): {3},
    Query(PatientName="Ł?kasz^?ółć"): {3},
    Query(PatientName="??ukasz*"): set(),
    Query(PatientName="ukasz^?"): {5},
    Query(PatientName="M?ller*"): {0},
    Query(PatientName="山?^太郎"): {1, 4},
    Query(PatientName="?"): {7},
    Query(PatientID="?"): set(),
    Query(PatientID="??3"): {3},
    Query(AccessionNumber=(NUMBER, "3", "0")): {0, 3},
    Query(StudyDescription=("Übersicht 山 b", "none")): {1, 3, 5, 7},
    Query(StudyDescription=("Übersicht 川 b",)): set(),
    Query(SeriesDescription=(SERIES,), StudyDate=studies.STUDY_DATE): {0, 1, 2, 3},
    Query(SeriesDescription=(SERIES,), StudyDate=studies.STUDY_DATE, level="series"): {0, 1, 2, 3},
}


def fill(server: Orthanc) -> None:
    """Store the studies in an Orthanc that answers in Latin-1, as it does unless told otherwise."""
    for number, name in enumerate(NAMES):
        made = studies.dataset(
            study=studies.uid(),
            SpecificCharacterSet="ISO_IR 192",
            PatientName=name,
            PatientID=f"P{'山' if number == 3 else ''}{number}",
            AccessionNumber=NUMBER if number == 3 else str(number),
            StudyDescription="Übersicht 山 b" if number % 2 else "Übersicht b",
            SeriesDescription=SERIES if number < 4 else "T1",
        )
        server.request("POST", "/instances", studies.encoded(made))


def wrong(find: Callable[[Query], Iterator[Match]]) -> dict[str, set[int]]:
    """Which queries find something else than they should, and what."""
    bad = {}
    for query, wanted in FOUND.items():
        found = [int(match.attributes["AccessionNumber"][-1]) for match in find(query)]
        if sorted(found) != sorted(wanted):
            bad[str({key: value for key, value in vars(query).items() if value})] = set(found)
    return bad


def searched(source: Target, folder: Path) -> Job:
    """What a retrieval keeps of a search for accession numbers, of which Latin-1 has one without its first letter."""
    job = Job(folder, pending=["0", NUMBER, "7", "x"])
    Fetcher(source, Query(), job, threading.Event(), threading.Event()).find_pending()
    return job
