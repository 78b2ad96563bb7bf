"""500 studies, more than a hundred queries, and what each of these finds among those: the truth for every search.

The matcher here shares nothing with the product's: it reads the studies' own records, not DICOM, and is written for
plainness. Whoever searches in a new way (another protocol, another server) puts `files` there and compares with
`truth`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from imaging.query import Match, Query
from talaria.testing import studies

Fold = Callable[[str], str]

COUNT = 500
NAMES = (
    "Doe^Jane", "Doe^Jane^^^", "Doe^John", "DOE^JANE", "Doe^Jane^Marie", "Doe^Janet", "Doe", "Doe^^Jane", "Müller^Jörg",
    "Muller^Jorg", "Møller^Ånna", "Yamada^Tarou=山田^太郎=やまだ^たろう", "Wang^XiaoDong=王^小東", "O'Neil^Sean",
    "de la Cruz^María José", "Smith-Jones^Al", "", "", "Adam^Robert^^Dr", "Павлов^Иван",
)  # fmt: skip
DESCRIPTIONS = ("", "Thorax", "thorax", "Kopf, nativ", "CT Abdomen/Becken", "Thorax ap", "Übersicht", "MR 50% & more")
SERIES_DESCRIPTIONS = ("", "T1, axial", "T2", "t2", "Scout", "Über*all", "T2 axial")
MODALITIES = ("CT", "CT", "CT", "MR", "US", "SR", "MG")


@dataclass(frozen=True)
class Series:
    """One series, of one instance."""

    uid: str
    modality: str
    description: str


@dataclass(frozen=True)
class Study:
    """What is known of one study."""

    uid: str
    patient_id: str
    name: str
    date: str
    accession: str
    description: str
    series: tuple[Series, ...]


@functools.cache
def archive(count: int = COUNT) -> tuple[Study, ...]:
    """The studies: the same in every run."""
    dice = random.Random(4711)
    found = []
    for n in range(count):
        series = tuple(
            Series(f"1.2.826.0.1.3680043.8.498.77.{n}.{k}", dice.choice(MODALITIES), dice.choice(SERIES_DESCRIPTIONS))
            for k in range(1 + (n % 4 == 0))
        )
        year, month, day = dice.randint(2019, 2024), dice.randint(1, 12), dice.randint(1, 28)
        found.append(
            Study(
                f"1.2.826.0.1.3680043.8.498.77.{n}",
                f"{dice.choice(('P', 'PAT ', 'p', 'X-'))}{n:04}",
                dice.choice(NAMES),
                "" if n % 25 == 7 else f"{year}{month:02}{day:02}",
                "" if n % 20 == 3 else dice.choice((f"A{n}", f"A {n}", f"A{n % 50}", f"AC/{n}", f"A*{n % 9}")),
                dice.choice(DESCRIPTIONS),
                series,
            )
        )
    return tuple(found)


def files(count: int = COUNT) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of one DICOM file for each series."""
    for study in archive(count):
        for series in study.series:
            ds = Dataset()
            ds.file_meta = FileMetaDataset()
            ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            ds.SpecificCharacterSet = "ISO_IR 192"
            ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.7")
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(f"{series.uid}.1")
            ds.StudyDate, ds.StudyTime, ds.AccessionNumber = study.date, "", study.accession
            ds.Modality, ds.StudyDescription, ds.SeriesDescription = (
                series.modality,
                study.description,
                series.description,
            )
            ds.PatientName, ds.PatientID = study.name, study.patient_id
            ds.PatientBirthDate = ds.PatientSex = ds.StudyID = ""
            ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SeriesNumber = study.uid, series.uid, "1"
            yield f"{series.uid}.dcm", studies.encoded(ds)


def queries() -> list[Query]:
    """What is looked for: each key in each way that it may be given, and some together."""
    some = archive()
    names = [
        "Doe^Jane", "Doe^Jane^^^", "doe^jane", "Doe*", "Doe^J*", "*Jane*", "D?e^Jane", "Doe", "*", "**", "Doe^*",
        "*^Jo?n",
        "Müller^Jörg", "müller*", "M?ller^J*", "Muller^Jorg", "Møller*", "Yamada^Tarou", "yamada*", "山田^太郎",
        "山田*",
        "やまだ^たろう", "Wang^XiaoDong=王^小東", "O'Neil*", "O'Neil^Sean", "de la Cruz*", "de la Cruz^María José",
        "*cruz*",
        "Smith-Jones^Al", "Adam^Robert^^Dr", "Adam^Robert", "Adam*Dr", "Павлов^Иван", "Павл*", "Nobody^*",
        "Nobody", "?", "Doe^Jan?",
    ]  # fmt: skip
    dates = [
        "20220101-20221231", "20220101-", "-20191231", "2021-2021", "202103-202104", "20230615", some[0].date,
        "19000101-19991231",
        "20240229", "2019-2024",
    ]  # fmt: skip
    ids = [
        "P*",
        "p0001",
        some[5].patient_id,
        some[5].patient_id.lower(),
        "PAT *",
        "PAT 00*",
        "X-0?1?",
        "*",
        "none",
        "*7",
    ]
    accessions: list[tuple[str, ...]] = [
        (some[9].accession,), tuple(study.accession for study in some[40:60] if study.accession), ("A1",), ("a1",),
        ("A*1",), ("A*",), ("A 12", "AC/13", "A14"), ("none",), ("A1", "A1", " A2 "), tuple(f"A{n}" for n in range(50)),
    ]  # fmt: skip
    found = [Query(PatientName=name) for name in names]
    found += [Query(StudyDate=date) for date in dates]
    found += [Query(PatientID=one) for one in ids]
    found += [Query(AccessionNumber=one) for one in accessions]
    found += [Query(Modality=one) for one in ("CT", "MR", "ct", "CT,MR", "US\\SR", "M*", "*", "XX")]
    found += [Query(StudyDescription=(one,)) for one in (*DESCRIPTIONS[1:], "Thor*", "none")]
    found += [Query(StudyDescription=("Thorax ap", "Kopf, nativ")), Query(StudyDescription=("Übersicht", "none"))]
    found += [Query(StudyInstanceUID=some[3].uid), Query(StudyInstanceUID=",".join(one.uid for one in some[10:14]))]
    found += [Query(SeriesInstanceUID=some[8].series[0].uid), Query(StudyInstanceUID="1.2.3"), Query()]
    for series in ("T1, axial", "T2", "Über*all", "none"):
        found.append(Query(SeriesDescription=(series,), StudyDate="20220101-20220630"))
    found += [
        Query(SeriesDescription=("T2", "Scout"), PatientName="Doe*"),
        Query(PatientName="Doe*", StudyDate="2020-2022", Modality="CT"),
        Query(PatientName="*", Modality="MR", StudyDescription=("Thorax",)),
        Query(PatientName="müller*", StudyDate="20200101-"),
        Query(Modality="CT", StudyDate="-20211231"),
        Query(Modality="SR", SeriesDescription=("T2",), StudyDate="2023-2023"),
        Query(AccessionNumber=tuple(f"A{n}" for n in range(9)), Modality="CT,US"),
        Query(PatientID="P*", PatientName="Doe^Jane"),
        Query(StudyDescription=("Thorax",), StudyDate="2024-2024"),
    ]
    narrow = (
        Query(PatientName="Doe^Jane"), Query(Modality="CT", StudyDate="2022-2022"), Query(AccessionNumber=("A1",
        "A2")),
        Query(StudyInstanceUID=some[8].uid), Query(SeriesInstanceUID=some[8].series[1].uid),
        Query(SeriesDescription=("T2",), StudyDate="202201-202203"), Query(PatientName="山田*", Modality="CT,MR"),
    )  # fmt: skip
    return found + [replace(one, level="series") for one in narrow]


def some() -> list[Query]:
    """One in five, and those that are about what servers lack."""
    every = queries()
    special = [query for query in every if query.StudyDescription or query.Modality or query.level == "series"]
    return list({id(query): query for query in [*every[::5], *special[::3]]}.values())


def truth(query: Query, count: int = COUNT, *, exact: bool = False) -> set[str]:
    """The UIDs of the studies, or series, that a query finds.

    Args:
        exact: whether upper and lower case are two things, as for a server they may be (PS3.4 section C.2.2.2.1).
    """
    fold: Fold = str if exact else str.lower
    found = set()
    for study in archive(count):
        passed = [series for series in study.series if _series_passes(series, query, fold)]
        if passed and _study_passes(study, query, fold):
            found |= {series.uid for series in passed} if query.level == "series" else {study.uid}
    return found


def uids(matches: Iterable[Match], query: Query) -> list[str]:
    """The UIDs of what was found, to be compared with the truth."""
    return [match.SeriesInstanceUID if query.level == "series" else match.StudyInstanceUID for match in matches]


def _study_passes(study: Study, query: Query, fold: Fold) -> bool:
    return (
        _is_one_of(study.accession, query.AccessionNumber, fold)
        and _is_one_of(study.description, query.StudyDescription, str)
        and _is_like(study.patient_id, query.PatientID, fold)
        and _is_named(study.name, query.PatientName, fold)
        and _is_within(study.date, query.StudyDate)
        and (not query.StudyInstanceUID or study.uid in query.StudyInstanceUID.split(","))
    )


def _series_passes(series: Series, query: Query, fold: Fold) -> bool:
    modalities = query.Modality.replace("\\", ",").split(",")
    return (
        any(_is_like(series.modality, one, fold) for one in modalities)
        and _is_one_of(series.description, query.SeriesDescription, str)
        and (not query.SeriesInstanceUID or series.uid == query.SeriesInstanceUID)
    )


def _is_one_of(value: str, wanted: tuple[str, ...], fold: Fold) -> bool:
    return not wanted or (bool(value) and fold(value) in [fold(one.strip()) for one in wanted])


def _is_like(value: str, pattern: str, fold: Fold) -> bool:
    return not pattern or fnmatchcase(fold(value.strip()), fold(pattern.strip()))


def _is_named(name: str, pattern: str, fold: Fold) -> bool:
    def bare(text: str) -> str:
        return fold("=".join(group.rstrip("^") for group in text.split("=")).rstrip("="))

    forms = {bare(name), *(bare(group) for group in name.split("="))}
    return not pattern.strip("*") or any(fnmatchcase(form, bare(pattern)) for form in forms)


def _is_within(date: str, period: str) -> bool:
    if not period:
        return True
    first, dash, last = period.partition("-")
    first, last = first.ljust(8, "0"), ((last or "9" * 8) if dash else first).ljust(8, "9")
    return bool(date) and first <= date <= last
