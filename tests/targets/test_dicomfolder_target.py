"""A folder as a DICOMweb target: the same answers as the server, and what only a folder can go through."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote

import pytest

from blocks.dicomweb import DicomWebTarget
from imaging.query import Query
from protocols.dicomfolder import scan as scan_module
from protocols.files import partial
from protocols.files.tree import Tree
from talaria.testing import studies
from talaria.testing.harness import attempt
from tasks import DRIVERS
from tasks.retrieve.fetch import Fetcher
from tasks.retrieve.job import Job, Stage
from tasks.retrieve.report import document, state_of
from tasks.retrieve.search import found_at
from tests.protocols.dicomfolder.mixture import mixed, upload
from tests.servers.orthanc import shared_orthanc
from tests.targets.dicomweb_file import held, seen, target
from transfer.beneath import open_beneath
from transfer.errors import Busy, Cancelled, Denied, DiskFull, Interrupted, Misconfigured, NotFound, Unreachable, Unread
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import Level, PushReport, Receipt, State

driver = DRIVERS["dicomweb"]


def retrieve(source: DicomWebTarget, into: Path, told: PushReport | None = None, **keys: Any) -> Receipt:
    assert driver.retrieve
    return driver.retrieve(source, Query(**keys), into, told or PushReport())


def find(source: DicomWebTarget, **keys: Any) -> list[dict[str, Any]]:
    assert driver.find
    return [match.attributes for match in driver.find(source, Query(**keys))]


def series(root: Path, count: int, **changes: Any) -> list[Path]:
    study, uid = studies.uid(), studies.uid()
    return [studies.dicom(root / f"{number}.dcm", study=study, series=uid, **changes) for number in range(count)]


# ---- the same as a server


def test_server_and_folder_answer_the_same(tmp_path: Path) -> None:
    mixed(tmp_path, seed=7)
    server = shared_orthanc()
    upload(server, tmp_path)
    there = DicomWebTarget(
        url=server.dicomweb_url, http_user=server.user, http_password=server.password, direction="both"
    )
    here = target(tmp_path)
    # Orthanc's plug-in doesn't decode what a URL must encode, so no blanks and carets.
    for keys in (
        {},
        {"PatientName": "q*"},
        {"PatientID": "p3"},
        {"Modality": "CT"},
        {"StudyDescription": ("thorax", "Knee*left")},
        {"SeriesDescription": ("t1 axial",), "Modality": "M*"},
        {"AccessionNumber": ("ACC003", "acc005", "ACC*")},
        {"StudyDate": "20130101-20161231"},
    ):
        for level in ("study", "series"):
            order = ("StudyInstanceUID", "SeriesInstanceUID")
            wanted, got = (
                sorted(find(one, level=level, **keys), key=lambda found: [found.get(uid, "") for uid in order])
                for one in (there, here)
            )
            for attributes in wanted:
                attributes.pop("RetrieveURL")
            # Where a study's files disagree, Orthanc looks for one of them and answers with another.
            if not keys:
                assert got == wanted
            assert [one[order[level == "series"]] for one in got] == [
                one[order[level == "series"]] for one in wanted
            ], keys


# ---- check


def test_check_of_a_folder_that_can_only_be_read(tmp_path: Path) -> None:
    source = target(tmp_path)
    source.direction = "query"
    studies.dicom(tmp_path / "a.dcm")
    really = Tree.open

    def closed(tree: Tree, path: str, flags: int = os.O_RDONLY, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system")
        return really(tree, path, flags, *mode)

    with mock.patch.object(Tree, "open", closed):
        assert driver.check(source).ok
        source.direction = "both"
        health = driver.check(source)
    assert [(probe.name, probe.result) for probe in health.probes] == [
        ("folder", "ok"), ("authorize", "failed"), ("qido", "ok"),
    ]  # fmt: skip
    assert isinstance(health.error, Denied)
    assert "Read-only" in health.probes[1].detail


@pytest.mark.parametrize("name", [b"caf\xe9", "fö 100%+;[x]?#".encode(), b"%41", b"a\\b"])
def test_folder_of_any_name(tmp_path: Path, name: bytes) -> None:
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    there = target(tmp_path).model_copy(update={"url": f"file://{quote(os.fsencode(folder))}"})
    assert attempt(there, series(tmp_path / "study", 2)[0].parent).require().state is State.DELIVERED
    assert len(list(folder.rglob("*.dcm"))) == 2
    assert len(find(there)) == 1
    health = driver.check(there)
    assert health.ok
    assert all(probe.detail.encode() for probe in health.probes)  # can be printed


def test_check_of_a_file(tmp_path: Path) -> None:
    health = driver.check(target(studies.write(tmp_path / "file", b"")))
    assert isinstance(health.error, Misconfigured)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ESTALE, Interrupted),
        (errno.EACCES, Denied),
        (errno.ENOTCONN, Unreachable),
        (errno.EHOSTDOWN, Unreachable),
        (errno.EMFILE, Busy),
    ],
)
def test_errors_of_the_file_system_are_told_apart(tmp_path: Path, number: int, kind: type[Exception]) -> None:
    source = target(tmp_path)
    error = OSError(number, os.strerror(number), f"{tmp_path}/{studies.PATIENT_NAME}")
    with mock.patch.object(os, "scandir", side_effect=error), pytest.raises(kind, match=os.strerror(number)) as caught:
        find(source)
    assert studies.PATIENT_NAME not in str(caught.value) + repr(caught.value.__cause__)
    assert source.name in str(caught.value)


# ---- push


def test_pushed_instances_can_be_queried_at_once(tmp_path: Path) -> None:
    root, study = tmp_path / "root", tmp_path / "study"
    root.mkdir()
    series(study, 3, PatientName="Quell^A")
    assert find(target(root)) == []
    assert attempt(target(root), study).require().state is State.DELIVERED
    (found,) = find(target(root), PatientName="quell*")
    assert found["NumberOfStudyRelatedInstances"] == 3
    uids = {item.header.SOPInstanceUID for item in scan([study]).items if item.header}
    parts = {tuple(path.relative_to(root).parts) for path in root.rglob("*.dcm")}
    assert parts == {
        (found["StudyInstanceUID"], series_uid, f"{uid}.dcm") for uid in uids for _, series_uid, _ in parts
    }


def test_another_version_of_an_instance_takes_its_place_with_a_warning(tmp_path: Path) -> None:
    root, study = tmp_path / "root", tmp_path / "study"
    root.mkdir()
    (path,) = series(study, 1, PatientName="Before^X")
    attempt(target(root), study).require()
    path.write_bytes(path.read_bytes().replace(b"Before^X", b"Behind^Y"))
    sent = attempt(target(root), study)
    assert [outcome.kind for outcome in sent.outcomes.values()] == [Kind.WARNING]
    assert list(held(root).values()) == [path.read_bytes()]
    assert find(target(root))[0]["PatientName"] == "Behind^Y"


@pytest.mark.parametrize("verify", list(Level))
def test_plan_that_holds_an_instance_twice(tmp_path: Path, verify: Level) -> None:
    root, study = tmp_path / "root", tmp_path / "study"
    root.mkdir()
    (path,) = series(study, 1, PatientName="Before^X")
    studies.write(study / "copy.dcm", path.read_bytes())
    studies.write(study / "other.dcm", path.read_bytes().replace(b"Before^X", b"Behind^Y"))
    chosen = target(root)
    chosen.verify = verify
    sent = attempt(chosen, study)
    assert sent.require().state is State.PARTIAL
    assert {p: outcome.kind for p, outcome in sent.outcomes.items()} == {
        "0.dcm": Kind.DELIVERED, "copy.dcm": Kind.ALREADY, "other.dcm": Kind.REJECTED,
    }  # fmt: skip
    assert "0.dcm" in sent.rejected["other.dcm"]
    assert list(held(root).values()) == [path.read_bytes()]
    assert not [name for name in seen(root) if ".incoming" in name]


def test_instance_without_a_series_is_rejected(tmp_path: Path) -> None:
    root, study = tmp_path / "root", tmp_path / "study"
    root.mkdir()
    series(study, 1)
    ds = studies.dataset()
    del ds.SeriesInstanceUID
    studies.write(study / "none.dcm", studies.encoded(ds))
    sent = attempt(target(root), study)
    assert set(sent.rejected) == {"none.dcm"}
    assert len(held(root)) == 1


def test_uids_can_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    root, study = tmp_path / "root", tmp_path / "study"
    root.mkdir()
    ds = studies.dataset()
    with studies.quiet():
        ds.StudyInstanceUID, ds.SeriesInstanceUID = "../../out", "../x"
        studies.write(study / "a.dcm", studies.encoded(ds))
    attempt(target(root), study)
    assert {path.name for path in tmp_path.iterdir()} == {"root", "study"}
    assert len(held(root)) == 1


def test_links_can_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    root, study, outside = tmp_path / "root", tmp_path / "study", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    series(study, 1)
    header = scan([study]).items[0].header
    assert header
    (root / header.StudyInstanceUID).symlink_to(outside)
    sent = attempt(target(root), study)
    assert isinstance(sent.error, Denied)
    assert not list(outside.iterdir())


# ---- retrieve


def test_retrieve_brings_what_matches_and_then_nothing_more(tmp_path: Path) -> None:
    root, into = tmp_path / "root", tmp_path / "into"
    ct = series(root / "ct", 3, Modality="CT")
    series(root / "mr", 2, Modality="MR")
    receipt = retrieve(target(root), into, Modality="CT")
    assert (receipt.state, receipt.verified) == (State.DELIVERED, Level.LISTED)
    assert receipt.counts[Kind.DELIVERED] == 3
    assert sorted(path.read_bytes() for path in into.iterdir()) == sorted(path.read_bytes() for path in ct)
    assert receipt.bytes == sum(path.stat().st_size for path in ct)
    again = retrieve(target(root), into, Modality="CT")
    assert again.counts[Kind.ALREADY] == 3
    next(into.iterdir()).write_bytes(b"half")
    assert retrieve(target(root), into, Modality="CT").counts[Kind.DELIVERED] == 1
    assert all(path.stat().st_nlink == 1 for path in into.iterdir()), "what is retrieved must not share its bytes"


def test_retrieve_brings_a_correction_of_the_same_length(tmp_path: Path) -> None:
    root, into = tmp_path / "root", tmp_path / "into"
    (file,) = series(root, 1, Modality="CT")
    retrieve(target(root), into)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert retrieve(target(root), into).counts[Kind.DELIVERED] == 1
    assert next(into.iterdir()).read_bytes() == data


def test_retrieve_of_nothing_is_NotFound(tmp_path: Path) -> None:
    series(tmp_path / "root", 1)
    with pytest.raises(NotFound):
        retrieve(target(tmp_path / "root"), tmp_path / "into", AccessionNumber=("nothing",))


def test_retrieve_into_a_folder_that_can_not_be_written_to(tmp_path: Path) -> None:
    series(tmp_path / "root", 1)
    studies.write(tmp_path / "into", b"a file")
    with pytest.raises(Misconfigured, match="into"):
        retrieve(target(tmp_path / "root"), tmp_path / "into")


def test_file_that_changes_between_look_and_copy_is_rejected_for_now(tmp_path: Path) -> None:
    root = tmp_path / "root"
    paths = series(root, 3)

    def meddling(folder: int, path: str, *args: Any) -> int:
        if path.endswith(paths[1].name) and threading.current_thread() is not threading.main_thread():
            paths[1].write_bytes(paths[2].read_bytes())
        return open_beneath(folder, path, *args)

    with mock.patch("protocols.files.tree.open_beneath", meddling):
        receipt = retrieve(target(root), tmp_path / "into")
    assert receipt.state is State.PARTIAL
    assert receipt.counts[Kind.REJECTED] == 1
    assert len(list((tmp_path / "into").iterdir())) == 2


def test_retrieve_takes_nothing_from_others(tmp_path: Path) -> None:
    """Into a folder that another process is retrieving into, that has an index, and that rsync writes to."""
    series(tmp_path / "root", 2)
    into = tmp_path / "into"
    series(into, 1)
    assert len(find(target(into))) == 1
    (into / ".talaria-temp").mkdir()
    (into / ".talaria-0123456789abcdef").write_bytes(b"of a process that was killed")
    other, fd = partial.create(into)
    assert retrieve(target(tmp_path / "root"), into).state is State.DELIVERED
    assert {path.name for path in into.glob(".talaria-*")} == {other.name, ".talaria-index.sqlite", ".talaria-temp"}
    os.close(fd)
    retrieve(target(tmp_path / "root"), into)
    assert not other.exists()


def test_retrieve_can_be_cancelled(tmp_path: Path) -> None:
    root, into = tmp_path / "root", tmp_path / "into"
    series(root, 30)
    cancelled = threading.Event()
    told = PushReport(lambda item, outcome: cancelled.set(), cancelled)
    with pytest.raises(Cancelled):
        retrieve(target(root), into, told)
    assert 0 < len(told.outcomes) < 30
    assert not [path for path in into.iterdir() if path.name.startswith(".")]


def test_a_file_on_a_bad_sector_stops_no_other(tmp_path: Path) -> None:
    root = tmp_path / "root"
    bad, *_ = series(root, 4)
    really = os.copy_file_range

    def copied(reader: int, writer: int, *args: Any) -> int:
        if os.readlink(f"/proc/self/fd/{reader}") == str(bad):
            raise OSError(errno.EIO, "Input/output error")
        return really(reader, writer, *args)

    with (
        mock.patch.object(os, "copy_file_range", side_effect=copied),
        mock.patch("protocols.files.filesystem.readable", return_value=False),
    ):
        receipt = retrieve(target(root), tmp_path / "into")
    assert (receipt.state, receipt.counts[Kind.DELIVERED]) == (State.PARTIAL, 3)
    [item] = [item for item in receipt.items if item.outcome is Kind.REJECTED]
    assert item.detail == "can't be read: Input/output error"
    with mock.patch.object(os, "copy_file_range", side_effect=copied), pytest.raises(Interrupted):
        retrieve(target(root), tmp_path / "other")  # it is the other side that can't be written to


def test_a_full_disk_at_the_destination_says_so(tmp_path: Path) -> None:
    series(tmp_path / "root", 2)
    with (
        mock.patch.object(os, "copy_file_range", side_effect=OSError(errno.ENOSPC, "No space left on device")),
        pytest.raises(DiskFull, match=r"into.*make room"),
    ):
        retrieve(target(tmp_path / "root"), tmp_path / "into")
    assert not list((tmp_path / "into").iterdir())


@pytest.mark.parametrize("alike", [True, False], ids=["copied", "other"])
def test_of_files_of_one_uid_the_last_is_taken_and_what_differs_is_said(tmp_path: Path, alike: bool) -> None:
    one = studies.dataset()
    studies.write(tmp_path / "root" / "b.dcm", studies.encoded(one))
    if not alike:
        one.PixelData = bytes(len(one.PixelData))
    last = studies.write(tmp_path / "root" / "a.dcm", studies.encoded(one))
    source = target(tmp_path / "root")
    for _ in range(2):
        receipt = retrieve(source, tmp_path / "into")
        assert receipt.state is State.DELIVERED
        assert [path.read_bytes() for path in (tmp_path / "into").glob("*.dcm")] == [last.read_bytes()]
        assert any("1 files were not taken: each holds another" in note for note in receipt.notes) is not alike


@contextmanager
def closed(*paths: str) -> Iterator[None]:
    """Let nobody read some files and folders, whose paths are relative to the root."""
    really = scan_module._list

    def listed(tree: Tree, path: bytes) -> Any:
        if os.fsdecode(path) in paths:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return really(tree, path)

    def opened(folder: int, path: str, *args: Any) -> int:
        if path in paths:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open_beneath(folder, path, *args)

    with mock.patch.object(scan_module, "_list", listed), mock.patch("protocols.files.tree.open_beneath", opened):
        yield


def test_a_study_of_which_something_can_not_be_read_is_partial(tmp_path: Path) -> None:
    root = tmp_path / "root"
    series(root, 3)
    with closed("0.dcm"):
        receipt = retrieve(target(root), tmp_path / "into")
        (match,) = found_at(target(root), Query()).matches
    assert (receipt.state, receipt.counts[Kind.DELIVERED], receipt.missing) == (State.PARTIAL, 2, 1)
    words = "1 files or folders beside it can't be read by user"
    assert any(words in note for note in receipt.notes) and words in match.note
    assert retrieve(target(root), tmp_path / "into").state is State.DELIVERED


@pytest.mark.parametrize(
    ("shut", "partial_studies"),
    [
        ("a/ct/0.dcm", "a"),  # beside others of it
        ("a/mr", "a"),  # a series of it, as far as anybody knows
        ("a/mr/sr", "a"),
        ("flat/0.dcm", "bc"),  # of one of both
        ("flat/more", ""),
        ("d", ""),  # a study of its own
        ("lost+found", ""),
    ],
)
def test_which_study_is_partial_shows_by_where_it_can_not_be_read(
    tmp_path: Path, shut: str, partial_studies: str
) -> None:
    uids = {name: studies.uid() for name in "abcd"}
    for name, path in (
        ("a", "a/ct/0"), ("a", "a/ct/1"), ("a", "a/mr/0"), ("a", "a/mr/sr/0"),
        ("b", "flat/0"), ("b", "flat/1"), ("c", "flat/2"), ("d", "d/0"),
    ):  # fmt: skip
        studies.dicom(tmp_path / f"{path}.dcm", study=uids[name])
    (tmp_path / "flat/more").mkdir()
    (tmp_path / "lost+found").mkdir()
    source = target(tmp_path)
    with closed(shut):
        notes = {match.StudyInstanceUID: match.note for match in found_at(source, Query()).matches}
    assert {name for name, uid in uids.items() if notes.get(uid)} == set(partial_studies)


def test_a_file_that_says_nothing_fails_none_of_the_many_studies_beside_it_and_is_no_success(tmp_path: Path) -> None:
    root, home = tmp_path / "root", tmp_path / "job"
    uids = [studies.uid() for _ in range(4)]
    for uid in uids:
        for number in range(2):
            studies.dicom(root / f"{uid}.{number}.dcm", study=uid)
    (root / "IM000042").touch()
    source = target(root)

    def fetched(job: Job) -> None:
        job.again()
        fetcher = Fetcher(source, Query(), job, threading.Event(), threading.Event())
        if not job.searched:
            fetcher.search()
        for one in job.studies.values():
            if one.stage is not Stage.DELIVERED:
                fetcher.fetch(one, home / one.study)
                assert (one.stage, one.instances, one.missing) == (Stage.WHOLE, 2, 0)
                one.stage = Stage.DELIVERED
        job.ended = True

    job = Job(home)
    fetched(job)
    shown = document(job, "", "", state_of(job))
    assert (shown["state"], shown["delivered"], shown["partial"], shown["failed"]) == ("partial", 4, [], [])
    doubt = "of the files beside it 1 are damaged, and may be of any of the 4 studies in that folder"
    assert shown["error"] == f"4 studies may lack something: {doubt}"
    assert {one["reason"] for one in shown["studies"]} == {doubt}
    shutil.rmtree(home)
    job.again()
    assert {one.stage for one in job.studies.values()} == {Stage.FOUND}  # a retry looks at each again
    (root / "IM_shut").touch()
    with closed("IM_shut"):
        receipt = retrieve(source, tmp_path / "into", StudyInstanceUID=uids[1])
        assert receipt.state is State.DELIVERED and "1 are damaged and 1 can't be read by user" in receipt.doubt
    for number in range(4):  # as many as studies: each may well lack one
        (root / f"IM{number}").touch()
    assert retrieve(source, tmp_path / "into", StudyInstanceUID=uids[1]).missing == 5
    for path in root.glob("IM*"):
        path.unlink()
    job.ended = True
    fetched(job)
    shown = document(job, "", "", state_of(job))
    assert (shown["state"], shown["delivered"], shown["error"]) == ("delivered", 4, None)
    assert {one["reason"] for one in shown["studies"]} == {""}


def test_what_may_be_where_nothing_can_be_read_is_not_called_missing(tmp_path: Path) -> None:
    series(tmp_path / "source", 1, AccessionNumber="SEEN")
    series(tmp_path / "source" / "shut", 1, AccessionNumber="UNSEEN")
    really = scan_module._list

    def listed(tree: Tree, path: bytes) -> Any:
        if path == b"shut":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return really(tree, path)

    source = target(tmp_path / "source")
    job = Job(tmp_path / "job", pending=["SEEN", "unseen", "NONE"])
    with mock.patch.object(scan_module, "_list", listed):
        fetcher = Fetcher(source, Query(), job, threading.Event(), threading.Event())
        fetcher.find_pending()
        assert [one.accession for one in job.studies.values()] == ["SEEN"] and not job.missing and not job.pending
        assert job.failed.keys() == {"unseen", "NONE"}
        assert all("can't be read" in why and "it may be there" in why for why in job.failed.values())
        by_date = Fetcher(source, Query(StudyDate="19000101-"), Job(tmp_path / "other"), *[threading.Event()] * 2)
        by_date.search()
        assert "can't be read" in by_date.job.error and len(by_date.job.studies) == 1
        found = found_at(source, Query(AccessionNumber=("SEEN", "UNSEEN")))
        assert len(found.matches) == 1 and "can't be read" in found.unread and "it may be there" in found.unread
        with pytest.raises(Unread):
            found_at(source, Query(AccessionNumber=("UNSEEN",)))
        assert not found_at(source, Query(AccessionNumber=("SEEN",))).unread
    assert [one["AccessionNumber"] for one in find(source, AccessionNumber=("UNSEEN",))] == ["UNSEEN"]


def damaged(whole: Path, way: str) -> bytes:
    """Return the bytes of a file with a damage of some kind."""
    data = whole.read_bytes()
    return {
        "empty": b"",
        "preamble": bytes(100),
        "meta": data[:200],
        "header": data[: data.index(b"\x20\x00\x0d\x00UI")],
        "blank": bytes(len(data)),
        "garbled": data.replace(b"\x08\x00\x20\x00DA", b"\xf5" * 6),
        "pixels": data[:-100],
    }[way]


@pytest.mark.parametrize("way", ["empty", "preamble", "meta", "header", "blank", "garbled", "pixels"])
@pytest.mark.parametrize("name", ["half.dcm", "IM000042", "1.2.840.42"])
def test_a_study_beside_which_a_file_is_damaged_is_partial(tmp_path: Path, way: str, name: str) -> None:
    root = tmp_path / "root"
    whole = series(root, 2)
    other = studies.dicom(root / name)  # of another study, as far as it says
    other.write_bytes(damaged(other, way))
    receipt = retrieve(target(root), tmp_path / "into")
    (match,) = found_at(target(root), Query()).matches
    names_its_study = way == "pixels"
    assert (receipt.state, receipt.counts[Kind.DELIVERED]) == (
        State.DELIVERED if names_its_study else State.PARTIAL,
        len(whole),
    )
    assert receipt.missing == (0 if names_its_study else 1)
    words = "1 files beside it are damaged, and may be of it"
    assert any(words in note for note in receipt.notes) is not names_its_study
    assert (words in match.note) is not names_its_study
    other.unlink()
    assert retrieve(target(root), tmp_path / "into").state is State.DELIVERED


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.txt", b"All images of today."),
        ("Thumbs.db", bytes.fromhex("d0cf11e0a1b11ae1") + bytes(600)),
        ("DONE", b""),
        ("IM1.lock", b""),
        ("._0.dcm", bytes.fromhex("00051607") + bytes(600)),  # macOS writes one beside each file
        ("report2", b"%PDF-1.7"),
        ("disk0.iso", bytes(4096)),
        (".hidden", bytes(300)),
    ],
)
def test_what_is_no_dicom_leaves_a_study_whole(tmp_path: Path, name: str, content: bytes) -> None:
    series(tmp_path / "root", 1)
    (tmp_path / "root" / name).write_bytes(content)
    receipt = retrieve(target(tmp_path / "root"), tmp_path / "into")
    assert receipt.state is State.DELIVERED and not receipt.missing
    (match,) = found_at(target(tmp_path / "root"), Query()).matches
    assert not match.note


def test_a_damaged_file_counts_for_the_study_and_series_that_it_names_wherever_it_lies(tmp_path: Path) -> None:
    root, uids = tmp_path / "root", [studies.uid(), studies.uid()]
    for study in uids:
        for number in range(2):
            studies.dicom(root / study / f"{number}.dcm", study=study, series=f"{study}.{number}")
    half = studies.dicom(root / uids[1] / "half.dcm", study=uids[0], series=f"{uids[0]}.1")
    shutil.copy(half, root / "whole.dcm")
    half.write_bytes(half.read_bytes()[:-100])
    source = target(root)

    def missing(**keys: Any) -> int:
        return retrieve(source, tmp_path / "into", **keys).missing

    assert [missing(StudyInstanceUID=uid) for uid in uids] == [0, 0]  # a whole copy is there
    (root / "whole.dcm").unlink()
    shutil.copy(half, root / "copy.dcm")
    assert [missing(StudyInstanceUID=uid) for uid in uids] == [1, 0]
    assert [missing(SeriesInstanceUID=f"{uids[0]}.{number}") for number in range(2)] == [0, 1]
    notes = {match.SeriesInstanceUID: match.note for match in found_at(source, Query(level="series")).matches}
    assert {uid for uid, note in notes.items() if "1 files of it are damaged" in note} == {f"{uids[0]}.1"}


@pytest.mark.parametrize("lacks", ["series", "study", "both"])
def test_an_instance_that_names_no_series_makes_its_study_partial_and_what_is_none_of_a_study_does_not(
    tmp_path: Path, lacks: str
) -> None:
    root, study = tmp_path / "root", studies.uid()
    studies.dicom(root / "0.dcm", study=study)
    one = studies.dataset(study=study)
    if lacks != "series":
        del one.StudyInstanceUID
    if lacks != "study":
        del one.SeriesInstanceUID
    studies.write(root / "1.dcm", studies.encoded(one))
    assert retrieve(target(root), tmp_path / "into").missing == 1
    for keyword in ("Modality", "PatientID", "StudyInstanceUID", "SeriesInstanceUID"):
        one.pop(keyword, None)
    studies.write(root / "1.dcm", studies.encoded(one))  # as a color palette or a hanging protocol is
    assert retrieve(target(root), tmp_path / "into").missing == 0


def test_a_number_of_which_all_is_damaged_is_not_called_missing_and_others_are(tmp_path: Path) -> None:
    root = tmp_path / "root"
    series(root, 1, AccessionNumber="WHOLE")
    for name, end in (("a", -100), ("b", -200)):
        (path,) = series(root / name, 1, AccessionNumber=f"Half {name}")
        path.write_bytes(path.read_bytes()[:end])
    source = target(root)
    job = Job(tmp_path / "job", pending=["WHOLE", "HALF A", "half b", "NONE"])
    fetcher = Fetcher(source, Query(), job, threading.Event(), threading.Event())
    fetcher.find_pending()
    assert [one.accession for one in job.studies.values()] == ["WHOLE"] and job.missing == ["NONE"]
    assert job.failed == dict.fromkeys(["HALF A", "half b"], "all that there is of it is damaged")
    with pytest.raises(Unread, match="damaged"):
        found_at(source, Query(AccessionNumber=("Half a",)))
    assert not found_at(source, Query(AccessionNumber=("NONE", "WHOLE"))).unread
    assert not found_at(source, Query(AccessionNumber=("WHOLE",), StudyDate="18000101")).matches  # filtered out


def test_what_is_passed_over_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "root"
    whole = series(root, 3)
    (root / "half.dcm").write_bytes(whole[0].read_bytes()[:-100])
    for name in ("a.txt", "b.txt"):
        (root / name).write_text("no image")
    (root / "elsewhere").symlink_to(tmp_path)
    caplog.set_level("INFO")
    assert [found["NumberOfStudyRelatedInstances"] for found in find(target(root))] == [3]
    notes = retrieve(target(root), tmp_path / "into").notes
    for text in ("2 files are not DICOM", "1 files are damaged", "1 symbolic links are not"):
        assert text in caplog.text
        assert any(text in note for note in notes)


def test_index_and_copies_are_private_to_their_user(tmp_path: Path) -> None:
    root = tmp_path / "root"
    series(root, 1)
    root.chmod(0o755)
    find(target(root))
    (index,) = root.glob(".talaria-*")
    assert not stat.S_IMODE(index.stat().st_mode) & 0o007


@pytest.mark.parametrize("alike", [True, False], ids=["copied", "other"])
def test_one_uid_in_two_series_comes_once_and_what_differs_is_not_taken_for_it(tmp_path: Path, alike: bool) -> None:
    root, into, study = tmp_path / "root", tmp_path / "into", studies.uid()
    uids = [studies.uid() for _ in range(2)]
    for number, uid in enumerate(uids):
        studies.dicom(root / "a" / f"{number}.dcm", study=study, series="1.2.1", SOPInstanceUID=uid)
        other = {} if alike or number else {"PixelData": bytes(128 * 128 * 2)}
        studies.dicom(root / "b" / f"{number}.dcm", study=study, series="1.2.2", SOPInstanceUID=uid, **other)
    for _ in range(2):
        receipt = retrieve(target(root), into)
        assert receipt.state is (State.DELIVERED if alike else State.PARTIAL)
        assert {path.stem for path in into.iterdir()} == set(uids) and receipt.unsent == (0 if alike else 1)
        said = "; ".join(receipt.notes)
        assert f"series 1.2.2: {2 if alike else 1} instances are in another series as well, and come once" in said
        assert ("1 instances were not taken: another instance of the same UID is in series 1.2.1" in said) is not alike


def test_a_pause_ends_after_the_running_series_and_the_rest_is_fetched_later(tmp_path: Path) -> None:
    root, into, study = tmp_path / "root", tmp_path / "into", studies.uid()
    for number in range(9):
        studies.dicom(root / f"{number}.dcm", study=study, series=f"1.2.{number // 3 + 1}")
    pausing = threading.Event()
    told = PushReport(lambda item, outcome: pausing.set(), pausing=pausing)
    receipt = retrieve(target(root), into, told)
    assert receipt.state is State.PARTIAL
    assert (receipt.counts[Kind.DELIVERED], receipt.counts[Kind.UNSENT]) == (3, 6)
    assert len(list(into.iterdir())) == 3
    again = retrieve(target(root), into)
    assert again.state is State.DELIVERED
    assert (again.counts[Kind.ALREADY], again.counts[Kind.DELIVERED]) == (3, 6)
