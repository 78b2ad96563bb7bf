"""A folder answers as Orthanc does for the same files: every attribute, every key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset

from imaging.json import keyworded
from imaging.query import Match, Query
from protocols.dicomfolder.folder import DicomFolder
from talaria.testing import studies
from tests.protocols.dicomfolder.mixture import mixed, upload
from tests.servers.orthanc import Orthanc, orthanc, shared_orthanc

URL = "RetrieveURL"  # the only attribute that a folder can't have
STUDY = (
    "studies?includefield=StudyDescription,ModalitiesInStudy,NumberOfStudyRelatedSeries,NumberOfStudyRelatedInstances"
)
SERIES = "studies/{}/series?includefield=SeriesDescription,BodyPartExamined,NumberOfSeriesRelatedInstances"
CHARSETS = Path(pydicom.__file__).parent / "data" / "charset_files"
# Orthanc itself misreads these: it takes the escape sequences of the second character set for text.
MISREAD = ("chrH32.dcm", "chrJapMultiExplicitIR6.dcm")


def answers(server: Orthanc) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """What Orthanc answers of all studies and series, by what identifies them."""
    found, series = {}, {}
    for study in map(keyworded, server.get("/dicom-web/" + STUDY)):
        found[study.get("PatientID", ""), study["StudyInstanceUID"]] = study
    for patient, uid in found:
        for one in map(keyworded, server.get("/dicom-web/" + SERIES.format(uid))):
            if one.get("PatientID", "") == patient:
                series[patient, uid, one["SeriesInstanceUID"]] = {**found[patient, uid], **one}
    return found, series


def by_identity(matches: Iterator[Match], *keywords: str) -> dict[Any, dict[str, Any]]:
    found = {}
    for match in matches:
        key = tuple(match.attributes.get(keyword, "") for keyword in ("PatientID", "StudyInstanceUID", *keywords))
        assert key not in found
        found[key] = match.attributes
        counted = "NumberOfSeriesRelatedInstances" if keywords else "NumberOfStudyRelatedInstances"
        assert match.instances == match.attributes[counted]
    return found


def assert_same(server: Orthanc, folder: Path) -> None:
    """Assert that Orthanc and a folder answer the same, attribute by attribute."""
    wanted_studies, wanted_series = answers(server)
    assert wanted_studies
    with DicomFolder(folder) as ours:
        got_studies = by_identity(ours.find(Query()))
        got_series = by_identity(ours.find(Query(level="series")), "SeriesInstanceUID")
    for wanted, got in ((wanted_studies, got_studies), (wanted_series, got_series)):
        assert set(got) == set(wanted)
        for key, attributes in wanted.items():
            attributes.pop(URL)
            assert got[key] == attributes


def test_pydicoms_own_files(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    shutil.copytree(Path(pydicom.__file__).parent / "data" / "test_files", folder)
    server = shared_orthanc()
    upload(server, folder)
    # Orthanc takes files without the preamble; PS3.10 doesn't, nor do we.
    with DicomFolder(folder) as ours:
        known = {held.SOPInstanceUID for held in ours.instances(Query())}
    for uid in server.uids() - known:
        server.remove(uid)
    assert_same(server, folder)


def test_character_sets(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for path in sorted(CHARSETS.glob("*.dcm")):
        with studies.quiet():
            ds = pydicom.dcmread(path)
            if path.name in MISREAD or "StudyInstanceUID" not in ds:
                continue
            ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = (studies.uid() for _ in range(3))
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            ds.save_as(folder / path.name)
    # With its default, Latin-1, it loses all that Latin-1 doesn't have.
    with orthanc(tmp_path / "orthanc", settings={"DefaultEncoding": "Utf8"}) as server:
        upload(server, folder)
        wanted, _ = answers(server)
    with DicomFolder(folder) as ours:
        got = by_identity(ours.find(Query()))
    assert set(got) == set(wanted)
    assert len(got) > 10
    for key, attributes in wanted.items():
        del attributes[URL], attributes["SpecificCharacterSet"]
        assert {k: v for k, v in got[key].items() if k != "SpecificCharacterSet"} == attributes


def odd(folder: Path) -> None:
    """Write instances with values that programs read in different ways."""
    raw = [
        {"StudyID": b" lead ", "PatientName": b"A^B=C^D", "AccessionNumber": b"a\\b ", "SeriesDescription": b"x\\\\y"},
        {"SeriesNumber": b"+5", "PatientName": b"=Ideo^X=Ph^Y", "PatientSex": b"", "StudyDate": b""},
        {"SeriesNumber": b"abc ", "StudyDate": b"2020.01.02", "PatientSex": b"M\0", "StudyDescription": b"caf\xe9 x "},
        {"SeriesNumber": b"3\\4 ", "StudyDate": b"20200102\\20210102", "SeriesDescription": b"tab\there\r\nline"},
        {"SeriesNumber": b"7.5 ", "Modality": b"CT\\PT ", "StudyDescription": b"a\\ b\\"},
        {"SeriesDescription": b"  two  words\0", "PatientSex": b"  ", "BodyPartExamined": b"HEAD"},
        {"ReferringPhysicianName": b"One^A\\Two^B", "PerformedProcedureStepStartDate": b"20200101"},
        {"PatientID": None, "PatientName": None, "AccessionNumber": None, "StudyID": None, "Modality": None},
        {"PerformedProcedureStepStartTime": b"101010.123 ", "SeriesNumber": b" 12 ", "InstanceAvailability": b"ONLINE"},
        {"TimezoneOffsetFromUTC": b"+0100 ", "StudyTime": b"1011"},
    ]  # fmt: skip
    for number, values in enumerate(raw):
        ds = studies.dataset()
        for keyword, value in values.items():
            if value is None:
                del ds[keyword]
            else:
                put(ds, keyword, value)
        studies.write(folder / f"{number}.dcm", studies.encoded(ds))


def put(ds: Dataset, keyword: str, value: bytes) -> None:
    """Give a data set a value that pydicom would not write."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    tag = Tag(tag_for_keyword(keyword) or 0)
    ds._dict[tag] = RawDataElement(tag, dictionary_VR(tag), len(value), value, 0, False, True)


def test_odd_values(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    odd(folder)
    server = shared_orthanc()
    upload(server, folder)
    assert_same(server, folder)


def test_many_series_and_copies_and_studies_that_disagree(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    mixed(folder)
    server = shared_orthanc()
    upload(server, folder)
    assert_same(server, folder)


QUERIES = [
    # In Orthanc `?` stands for a byte, so that it doesn't match a letter such as ü.
    {"PatientName": "Quell*"},
    {"PatientName": "quell*"},
    {"PatientName": "QUELL^A"},
    {"PatientName": "MÜLLER*"},
    {"PatientName": "QUE?L*"},
    {"PatientName": "*jorg"},
    {"PatientName": "*"},
    {"PatientName": "O'Neil*"},
    {"PatientID": "P3"},
    {"PatientID": "p3"},
    {"PatientID": "P?"},
    {"PatientID": "P"},
    {"AccessionNumber": "ACC003"},
    {"AccessionNumber": "acc003"},
    {"AccessionNumber": "ACC003\\ACC004\\nothing"},
    {"StudyDate": "20130415"},
    {"StudyDate": "20130415-20160715"},
    {"StudyDate": "-20130415"},
    {"StudyDate": "20130415-"},
    {"StudyDate": "20130416-20140514"},
    {"StudyDescription": "Head routine"},
    {"StudyDescription": "Head"},
    {"StudyDescription": "Thorax\\Head routine"},
    {"StudyDate": "20130415-", "PatientName": "Q*", "StudyDescription": "head routine"},
    {"Modality": "CT"},
    {"Modality": "ct"},
    {"Modality": "?T"},
    {"Modality": "CT\\MR"},
    {"SeriesDescription": "t1 axial"},
    {"SeriesDescription": "T1 axial\\localizer"},
    {"Modality": "MR", "SeriesDescription": "localizer"},
]  # fmt: skip


def of_keys(keys: dict[str, str], level: str) -> Query:
    lists = ("AccessionNumber", "StudyDescription", "SeriesDescription")
    changed: dict[str, Any] = {k: tuple(v.split("\\")) if k in lists else v for k, v in keys.items()}
    return Query(**changed, level=level)


def test_every_key_matches_what_it_matches_at_orthanc(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    mixed(folder, seed=4)
    # Where the files of a study disagree, Orthanc looks for one and answers with another.
    for path in list(folder.rglob("*.dcm")):
        with studies.quiet():
            if pydicom.dcmread(path, stop_before_pixels=True).StudyDescription == "Disagrees":
                path.unlink()
    server = shared_orthanc()
    upload(server, folder)
    nonempty = 0
    with DicomFolder(folder) as ours:
        for keys in QUERIES:
            of_series = {"Modality", "SeriesDescription"} & set(keys)
            document = {
                "Level": "Series" if of_series else "Study",
                "Query": keys,
                "CaseSensitive": any("Description" in key for key in keys),  # ours match in the case that is given
                "Expand": True,
            }
            found = json.loads(server.request("POST", "/tools/find", json.dumps(document).encode()))
            tag = "SeriesInstanceUID" if of_series else "StudyInstanceUID"
            wanted = {one["MainDicomTags"][tag] for one in found}
            got = {match.attributes[tag] for match in ours.find(of_keys(keys, "series" if of_series else "study"))}
            assert got == wanted, keys
            nonempty += bool(wanted)
            if of_series:  # and at the level of studies, those of the series
                parents = {match.StudyInstanceUID for match in ours.find(of_keys(keys, "series"))}
                assert {match.StudyInstanceUID for match in ours.find(of_keys(keys, "study"))} == parents
    assert nonempty > 20


@pytest.mark.parametrize("text", ["*", "ACC*", "?CC003"])
def test_lists_are_exact_values(tmp_path: Path, text: str) -> None:
    """What is typed into a list of accession numbers must not fetch everything."""
    studies.dicom(tmp_path / "a.dcm", AccessionNumber="ACC003")
    with DicomFolder(tmp_path) as ours:
        assert not list(ours.find(Query(AccessionNumber=(text,))))
