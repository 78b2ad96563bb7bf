"""The index of a folder: what it reads, what it keeps, and what becomes of it when things go wrong."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pydicom
import pytest

from imaging.query import Query
from protocols.dicomfolder import folder as dicomfolder
from protocols.dicomfolder import scan as dicomscan
from protocols.dicomfolder.folder import DicomFolder, IndexReport, clear_indexes
from protocols.dicomfolder.index import NAME, Index
from talaria.testing import studies
from talaria.testing.process import as_loaded
from transfer.beneath import open_beneath

NOBODY = 65534  # a user without rights; root may do everything and can't test what others may not


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Record every regular file that is opened below the folder: that is how headers are read."""
    seen: list[str] = []

    def recording(folder: int, path: str, *args: Any) -> int:
        fd = open_beneath(folder, path, *args)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            seen.append(os.readlink(f"/proc/self/fd/{fd}"))
        return fd

    with mock.patch("protocols.files.tree.open_beneath", recording):
        yield seen


def look(root: Path, state: Path | None = None) -> IndexReport:
    """Open a folder as another process would, and look at it once."""
    with DicomFolder(root, state) as folder:
        return folder.refresh()


def names(root: Path, **keys: Any) -> list[str]:
    with DicomFolder(root) as folder:
        return sorted(str(match.attributes["PatientName"]) for match in folder.find(Query(**keys)))


def series(root: Path, count: int, **changes: Any) -> list[Path]:
    """Write instances of one series."""
    study, uid = studies.uid(), studies.uid()
    return [studies.dicom(root / f"{number}.dcm", study=study, series=uid, **changes) for number in range(count)]


# ---- what is read


def test_first_look_reads_everything_and_the_next_nothing(tmp_path: Path) -> None:
    series(tmp_path / "a", 5)
    series(tmp_path / "b" / "c", 3)
    studies.note(tmp_path / "note.json")
    report = look(tmp_path)
    assert (report.read, report.unchanged, report.not_dicom, report.damaged) == (9, 0, 1, 0)
    assert report.saved
    with opened_files() as opened:
        again = look(tmp_path)
        assert len(names(tmp_path)) == 2
    assert not opened, "a file was opened although nothing has changed"
    assert (again.read, again.removed, again.unchanged, again.not_dicom) == (0, 0, 9, 1)


def test_reads_only_what_is_new_or_changed_and_forgets_what_is_gone(tmp_path: Path) -> None:
    old = [series(tmp_path / str(number), 4, PatientName=f"Old^{number}") for number in range(10)]
    assert look(tmp_path).read == 40
    changed = [old[0][0], old[1][0], old[2][0]]
    for path in changed:
        studies.dicom(path, PatientName="Changed")
    added = [studies.dicom(tmp_path / "new" / f"{number}.dcm", PatientName="New") for number in range(3)]
    for path in (old[3][0], *old[4]):
        path.unlink()
    shutil.rmtree(tmp_path / "5")
    with opened_files() as opened:
        report = look(tmp_path)
    assert {Path(name) for name in opened} == {*changed, *added}
    assert (report.read, report.removed, report.unchanged) == (6, 9, 28)
    assert names(tmp_path).count("Changed") == 3
    assert names(tmp_path).count("New") == 3
    assert "Old^4" not in names(tmp_path)
    assert "Old^5" not in names(tmp_path)
    with DicomFolder(tmp_path) as folder:
        counts = {m.attributes["PatientName"]: m.instances for m in folder.find(Query(PatientName="Old*"))}
    assert (counts["Old^3"], counts["Old^0"], counts["Old^6"]) == (3, 3, 4)


def test_change_of_the_same_length_and_time_is_noticed(tmp_path: Path) -> None:
    path = studies.dicom(tmp_path / "a.dcm", PatientName="Before^X")
    assert names(tmp_path) == ["Before^X"]
    info = path.stat()
    path.write_bytes(path.read_bytes().replace(b"Before^X", b"Behind^Y"))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert path.stat().st_mtime_ns == info.st_mtime_ns
    assert names(tmp_path) == ["Behind^Y"]


def test_file_that_takes_the_place_of_another_is_noticed(tmp_path: Path) -> None:
    one = studies.dicom(tmp_path / "a.dcm", PatientName="Before^X")
    other = studies.write(tmp_path / "outside" / "b.dcm", one.read_bytes().replace(b"Before^X", b"Behind^Y"))
    for path in (one, other):
        os.utime(path, ns=(10**18, 10**18))
    assert names(tmp_path) == ["Before^X"]
    other.replace(one)
    assert names(tmp_path) == ["Behind^Y"]


def test_changes_as_quick_as_they_can_be_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    data = studies.encoded(studies.dataset(PatientName="N^0000"))
    with DicomFolder(tmp_path) as folder:
        for number in range(30):
            path.write_bytes(data.replace(b"N^0000", b"N^%04d" % number))
            assert [m.attributes["PatientName"] for m in folder.find(Query())] == [f"N^{number:04}"]


def test_renamed_folder(tmp_path: Path) -> None:
    series(tmp_path / "old", 3)
    look(tmp_path)
    (tmp_path / "old").rename(tmp_path / "new")
    report = look(tmp_path)
    assert (report.read, report.removed) == (3, 3)
    with DicomFolder(tmp_path) as folder:
        assert {held.path.parent.name for held in folder.instances(Query())} == {"new"}


def test_folder_becomes_a_file_and_a_file_a_folder(tmp_path: Path) -> None:
    series(tmp_path / "a", 2)
    studies.dicom(tmp_path / "b", PatientName="B")
    look(tmp_path)
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "b").unlink()
    studies.dicom(tmp_path / "a", PatientName="A")
    studies.dicom(tmp_path / "b" / "1", PatientName="B1")
    assert names(tmp_path) == ["A", "B1"]


def test_file_that_is_written_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    path = studies.dicom(tmp_path / "a.dcm", PatientName="First^X")
    really, written = dicomscan.read_elements, threading.Event()

    def read(fd: int, size: int, tags: Any) -> Any:
        found = really(fd, size, tags)
        if not written.is_set():
            written.set()
            path.write_bytes(path.read_bytes().replace(b"First^X", b"Other^Y"))
        return found

    with mock.patch.object(dicomscan, "read_elements", read):
        look(tmp_path)
    assert look(tmp_path).read == 1
    assert names(tmp_path) == ["Other^Y"]


def test_what_is_not_dicom_and_what_is_damaged_is_passed_over_and_counted(tmp_path: Path) -> None:
    studies.sample(tmp_path)
    broken = studies.damaged(tmp_path / "broken")
    no_series = studies.dataset()
    del no_series.SeriesInstanceUID
    studies.write(tmp_path / "no-series.dcm", studies.encoded(no_series))
    report = look(tmp_path)
    assert report.damaged == len(broken) + 1
    assert report.not_dicom >= 2
    assert look(tmp_path).damaged == report.damaged
    with DicomFolder(tmp_path) as folder:
        assert len(list(folder.instances(Query()))) == len(studies.SAMPLE)


def test_directory_of_a_medium_is_no_instance(tmp_path: Path) -> None:
    shutil.copy(Path(pydicom.__file__).parent / "data" / "test_files" / "dicomdirtests" / "DICOMDIR", tmp_path)
    report = look(tmp_path)
    assert (report.not_dicom, report.damaged) == (1, 0)


def test_own_files_and_half_files_are_no_data(tmp_path: Path) -> None:
    series(tmp_path / "a", 2)
    for name in (".incoming-0123/x/files/a.dcm", ".talaria-part", "a/.talaria-0815", "a/.complete"):
        studies.dicom(tmp_path / name)
    report = look(tmp_path)
    assert (report.read, report.not_dicom) == (2, 0)
    assert look(tmp_path).unchanged == 2


def test_links_are_not_followed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    series(outside, 2, PatientName="Outside")
    paths = series(inside / "a", 2, PatientName="Inside")
    (inside / "file.dcm").symlink_to(outside / "0.dcm")
    (inside / "folder").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    (inside / "same.dcm").symlink_to(paths[0])
    (inside / "nowhere").symlink_to(tmp_path / "missing")
    os.mkfifo(inside / "pipe")
    assert look(inside).read == 2
    assert names(inside) == ["Inside"]
    (tmp_path / "link").symlink_to(inside)
    assert names(tmp_path / "link") == ["Inside"]  # the folder itself is what its user named


def test_names_of_any_bytes(tmp_path: Path) -> None:
    paths = studies.odd_names(tmp_path / "Prüfung №1\n")
    with DicomFolder(tmp_path) as folder:
        assert {held.path for held in folder.instances(Query())} == set(paths)
    assert look(tmp_path).unchanged == len(paths)


def test_copies_of_an_instance_count_once_and_the_last_written_is_given(tmp_path: Path) -> None:
    path = studies.dicom(tmp_path / "a.dcm")
    time.sleep(0.05)
    copy = studies.write(tmp_path / "z" / "copy.dcm", path.read_bytes())
    os.utime(copy, ns=(0, 0))  # what its times say doesn't count: programs set them
    with DicomFolder(tmp_path) as folder:
        (match,) = folder.find(Query())
        assert match.instances == 1
        (held,) = folder.instances(Query())
        assert held.path == copy
        copy.unlink()
        (held,) = folder.instances(Query())
        assert held.path == path


def test_every_transfer_syntax(tmp_path: Path) -> None:
    paths = studies.every_syntax(tmp_path)
    with DicomFolder(tmp_path) as folder:
        held = list(folder.instances(Query(PatientName=studies.PATIENT_NAME)))
    assert len(held) == len(paths)
    assert len({one.TransferSyntaxUID for one in held}) == len(paths)


def answers(folder: DicomFolder) -> Any:
    """Everything that a folder can tell."""
    return (
        [match.attributes for match in folder.find(Query())],
        [match.attributes for match in folder.find(Query(level="series"))],
        [(held.path, held.SOPInstanceUID, held.size) for held in folder.instances(Query())],
    )


@pytest.mark.parametrize("seed", range(4))
def test_index_that_kept_up_says_the_same_as_a_new_one(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    root = tmp_path / "data"
    root.mkdir()
    uids = {kind: [studies.uid() for _ in range(count)] for kind, count in (("study", 3), ("series", 6), ("sop", 20))}
    folders = [root, root / "a", root / "a" / "b", root / "c"]

    def write() -> None:
        path = choose.choice(folders) / f"{choose.randint(0, 12)}.dcm"
        if choose.random() < 0.2:
            studies.write(path, choose.choice([b"", b"no DICOM" * 100, studies.ct_bytes()[:-1]]))
            return
        number = choose.randrange(6)
        studies.dicom(
            path,
            study=uids["study"][number // 2],
            series=uids["series"][number],
            SOPInstanceUID=choose.choice(uids["sop"]),
            PatientID=choose.choice(["1", "1", "1", "2"]),
            PatientName=choose.choice(["A", "B"]),
            Modality=choose.choice(["CT", "MR"]),
        )

    def files() -> list[Path]:
        return [path for path in sorted(root.rglob("*.dcm")) if path.is_file()]

    def remove() -> None:
        if found := files():
            choose.choice(found).unlink()

    def move() -> None:
        if len(found := files()) > 1:
            one, other = choose.sample(found, 2)
            one.replace(other)

    def remove_folder() -> None:
        shutil.rmtree(choose.choice(folders[1:]), ignore_errors=True)

    kept = DicomFolder(root)
    for step in range(25):
        for _ in range(choose.randint(1, 4)):
            choose.choice([write, write, write, remove, move, remove_folder if step % 7 == 6 else write])()
        if choose.random() < 0.3:
            kept.close()
            kept = DicomFolder(root)  # from its file
        with (
            mock.patch.object(dicomfolder, "_place", lambda *_: (None, 0)),
            mock.patch.object(dicomfolder, "NAME", "-"),
        ):
            new = DicomFolder(root)
        with new:
            assert answers(kept) == answers(new), f"step {step}"
            assert (kept.report.damaged, kept.report.not_dicom) == (new.report.damaged, new.report.not_dicom)
    kept.close()


# ---- whose folder it is


def as_nobody(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a child process of a user without rights."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        try:
            theirs.send(work())
        except BaseException as exc:
            theirs.send(exc)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    result = ours.recv()
    process.join()
    if isinstance(result, BaseException):
        raise result
    return result


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own ones are private."""
    root = Path(tempfile.mkdtemp(prefix="talaria-test-"))
    root.chmod(0o755)
    yield root
    for folder, _, _ in os.walk(root):
        os.chmod(folder, 0o700)
    shutil.rmtree(root)


def read_only(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            os.chmod(os.path.join(folder, name), 0o444)
        os.chmod(folder, 0o555)


def test_read_only_folder_is_indexed_in_the_state_directory(public: Path) -> None:
    data, state = public / "data", public / "state"
    series(data / "a", 4, PatientName="Quell^A")
    state.mkdir()
    state.chmod(0o777)
    read_only(data)

    def work() -> list[Any]:
        first, second = look(data, state), look(data, state)
        with DicomFolder(data, state) as folder:
            found = [match.instances for match in folder.find(Query(PatientName="quell*"))]
        (kept,) = (state / "indexes").iterdir()
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (kept.parent, kept)]
        return [first.read, second.read, second.unchanged, first.saved, found, modes]

    assert as_nobody(work) == [4, 0, 4, True, [4], [0o700, 0o600]]
    assert not (data / NAME).exists()


def test_indexes_that_nobody_uses_any_more_are_removed(public: Path) -> None:
    state = public / "state"
    state.mkdir()
    state.chmod(0o777)
    for name in ("used", "unused"):
        series(public / name, 2)
        read_only(public / name)

    def work() -> list[Any]:
        folder = state / "indexes"
        look(public / "unused", state)
        (unused,) = folder.iterdir()
        look(public / "used", state)
        (used,) = set(folder.iterdir()) - {unused}
        part = unused.with_name(f"{unused.name}.0123456789ab.part")
        part.touch()
        other = folder / "notes.txt"
        other.touch()
        for path in (used, unused, part, other):
            os.utime(path, (1000, 1000))
        again = look(public / "used", state)  # nothing to save, but it counts as used
        removed = [clear_indexes(state, 500), clear_indexes(state, 2000)]
        left = set(folder.iterdir()) == {used, other}
        return [again.read, removed, left, look(public / "unused", state).read, clear_indexes(public / "none", 2000)]

    assert as_nobody(work) == [0, [0, 1], True, 2, 0]


def test_read_only_folder_without_state_directory_is_indexed_in_memory(public: Path) -> None:
    data = public / "data"
    series(data, 3)
    read_only(data)

    def work() -> list[Any]:
        with DicomFolder(data, None) as folder:
            first, second = folder.refresh(), folder.refresh()
        return [first.read, second.read, first.saved, look(data, data / "no" / "such").read]

    assert as_nobody(work) == [3, 0, False, 3]


def test_index_that_others_keep_in_a_read_only_folder_is_used(public: Path) -> None:
    data = public / "data"
    series(data, 3)
    look(data)
    (data / NAME).chmod(0o644)
    data.chmod(0o555)
    assert as_nobody(lambda: look(data).read) == 0


def test_index_of_another_user_that_is_private_is_left_alone(public: Path) -> None:
    data, state = public / "data", public / "state"
    series(data, 3)
    look(data)
    for folder in (data, state):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    if os.geteuid() != 0:  # then there is no other user: what nobody may read is as closed as what is another's
        (data / NAME).chmod(0)
    assert as_nobody(lambda: [look(data, state).read, look(data, state).read]) == [3, 0]
    (data / NAME).chmod(0o600)
    assert look(data).read == 0


def test_what_may_not_be_read_is_counted_and_read_later(public: Path) -> None:
    data = public / "data"
    paths = series(data / "a", 3)
    series(data / "closed", 2)
    paths[0].chmod(0)
    (data / "closed").chmod(0)
    if os.geteuid() == 0:
        os.chown(data, NOBODY, NOBODY)
    report = as_nobody(lambda: look(data))
    assert (report.read, report.unreadable) == (2, 2)
    paths[0].chmod(0o644)
    (data / "closed").chmod(0o755)
    report = as_nobody(lambda: look(data))
    assert (report.read, report.unreadable, report.unchanged) == (3, 0, 2)


@pytest.mark.parametrize(("mode", "expected"), [(0o700, 0o600), (0o750, 0o640), (0o777, 0o640), (0o2770, 0o640)])
def test_index_may_be_read_by_the_folders_group_at_most(tmp_path: Path, mode: int, expected: int) -> None:
    root = tmp_path / "data"
    series(root, 1)
    root.chmod(mode)
    look(root)
    assert stat.S_IMODE((root / NAME).stat().st_mode) == expected


# ---- what may become of the index


def garbage(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def holes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096 : len(data) - 4096] = bytes(len(data) - 8192)
    path.write_bytes(data)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def by_sql(path: Path, statement: str) -> None:
    """Change an index as somebody does who knows how they are kept."""
    with closing(Index(path)) as index:
        index.add_folder(b"so that something has changed")
        index.db.execute(statement)
        index.save(0o600)


def older(path: Path) -> None:
    by_sql(path, "PRAGMA user_version = 0")


def one_wrong_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"Quell^A")] ^= 0xFF
    path.write_bytes(data)


def other_text(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"Quell^A", b"Qu3ll^B"))


def with_a_trigger(path: Path) -> None:
    by_sql(path, "CREATE TRIGGER evil AFTER DELETE ON files BEGIN DELETE FROM studies; END")


DAMAGES = (garbage, cut_short, empty, holes, a_folder, one_wrong_byte, other_text, older, with_a_trigger)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_index_is_made_anew(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    series(tmp_path / "a", 5, PatientName="Quell^A")
    look(tmp_path)
    damage(tmp_path / NAME)
    assert names(tmp_path) == ["Quell^A"]
    expected = 5 if damage is a_folder else 0  # nothing of ours may take its place, and nothing is lost
    assert look(tmp_path).read == expected


def test_index_can_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    outside = studies.dicom(tmp_path / "outside.dcm")
    root = tmp_path / "root"
    series(root / "a", 1)
    look(root)
    by_sql(root / NAME, "UPDATE files SET name=CAST('../../outside.dcm' AS BLOB)")
    with closing(Index(root / NAME)) as index:
        assert index.is_saved
    with DicomFolder(root) as folder:
        assert outside not in {held.path.resolve() for held in folder.instances(Query())}


def test_index_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = studies.write(tmp_path / "victim", b"precious")
    root = tmp_path / "data"
    series(root, 2)
    (root / NAME).symlink_to(victim)
    assert look(root).read == 2
    assert victim.read_bytes() == b"precious"
    assert look(root).read == 0


def test_full_disk_changes_no_answer(tmp_path: Path) -> None:
    series(tmp_path, 2, PatientName="Quell^A")
    with mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device")):
        report = look(tmp_path)
        assert (report.read, report.saved) == (2, False)
        assert names(tmp_path) == ["Quell^A"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(NAME)]
    assert look(tmp_path).saved


def test_parts_of_an_index_that_were_left_behind_are_removed(tmp_path: Path) -> None:
    series(tmp_path, 1)
    old, new = (studies.write(tmp_path / f"{NAME}.{which}.part", b"x") for which in ("old", "new"))
    os.utime(old, (0, 0))
    look(tmp_path)
    assert not old.exists()
    assert new.exists()  # another process may be writing it


def test_stopped_look_keeps_what_it_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicomscan, "CHUNK", 16)
    series(tmp_path / "a", 60)
    stop = threading.Event()

    class Stop(Exception):
        pass

    def check() -> None:
        if stop.is_set():
            raise Stop
        if files:
            stop.set()

    with opened_files() as files, DicomFolder(tmp_path, check=check) as folder, pytest.raises(Stop):
        folder.refresh()
    read = len(files)
    assert 0 < read < 60
    assert look(tmp_path).read == 60 - read


CHILD = """
import sys
from pathlib import Path
from protocols.dicomfolder import folder as dicomfolder
from protocols.dicomfolder import scan as dicomscan
dicomfolder.SAVE_EVERY_S = 0.0
dicomscan.CHUNK = 16
really, saves = dicomfolder.DicomFolder._save, []
def save(self):
    really(self)
    saves.append(1)
    if len(saves) == 2 and "stops" in sys.argv:
        print("saved", flush=True)
        sys.stdin.read()
dicomfolder.DicomFolder._save = save
with dicomfolder.DicomFolder(Path(sys.argv[1])) as folder:
    from imaging.query import Query
    print(folder.refresh().read, sum(match.instances for match in folder.find(Query())))
"""


def child(root: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_killed_process_leaves_a_usable_index(tmp_path: Path) -> None:
    for number in range(4):
        series(tmp_path / str(number), 50)
    process = child(tmp_path, "stops")
    assert process.stdout and process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    report = look(tmp_path)
    assert 0 < report.read < 200, "what the killed process had read is lost"
    assert report.read + report.unchanged == 200
    with DicomFolder(tmp_path) as folder:
        assert [match.instances for match in folder.find(Query())] == [50] * 4
    assert look(tmp_path).unchanged == 200


def test_several_processes_at_once(tmp_path: Path) -> None:
    for number in range(4):
        series(tmp_path / str(number), 40)
    processes = [child(tmp_path) for _ in range(3)]
    with DicomFolder(tmp_path) as folder:
        while any(process.poll() is None for process in processes):
            assert sum(match.instances or 0 for match in folder.find(Query())) == 160
            time.sleep(0.05)
    results = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert [counted for _, counted in results] == ["160"] * 3
    report = look(tmp_path)
    assert (report.read, report.unchanged) == (0, 160)
    assert not list(tmp_path.glob(f"{NAME}.*"))


def test_process_that_waited_uses_what_the_other_has_read(tmp_path: Path) -> None:
    for number in range(2):
        series(tmp_path / str(number), 40)
    processes = [child(tmp_path, "slow") for _ in range(2)]
    read = sorted(int(process.communicate()[0].split()[0]) for process in processes)
    assert sum(read) < 160, "both have read everything"


def test_no_locks_no_harm(tmp_path: Path) -> None:
    series(tmp_path, 3)
    with mock.patch.object(dicomfolder.fcntl, "flock", side_effect=OSError(95, "not supported")):
        assert look(tmp_path).read == 3
    assert look(tmp_path).read == 0


def test_lock_that_is_held_for_ever_only_delays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    series(tmp_path, 3)
    monkeypatch.setattr(dicomfolder, "LOCK_S", 0.3)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert look(tmp_path).read == 3
        assert look(tmp_path).read == 0
    finally:
        os.close(fd)


def test_share_that_goes_away_is_an_error_and_takes_nothing_out_of_the_index(tmp_path: Path) -> None:
    series(tmp_path / "a", 3)
    series(tmp_path / "b", 3)
    look(tmp_path)

    def stale(folder: int, path: str, *args: Any) -> Any:
        if path == "b":
            raise OSError(116, "Stale file handle")
        return open_beneath(folder, path, *args)

    with mock.patch("protocols.files.tree.open_beneath", stale), pytest.raises(OSError, match="Stale"):
        look(tmp_path)
    assert look(tmp_path).unchanged == 6


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        look(tmp_path / "missing")
    with pytest.raises(NotADirectoryError):
        look(studies.write(tmp_path / "file", b""))


def test_nothing_is_left_of_what_is_gone(tmp_path: Path) -> None:
    series(tmp_path / "a", 3)
    look(tmp_path)
    shutil.rmtree(tmp_path / "a")
    assert look(tmp_path).removed == 3
    index = Index(tmp_path / NAME)
    for table in ("studies", "series", "headers", "files"):
        assert index.db.execute(f"SELECT COUNT(*) FROM {table}").fetchone() == (0,), table
    index.close()


# ---- size


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hundred_thousand_files(tmp_path: Path) -> None:
    from benchmarks.dicomfolder import make

    make(tmp_path / "data", 100_000)
    assert look(tmp_path / "data").read == 100_000
    begun = time.monotonic()
    with opened_files() as opened, DicomFolder(tmp_path / "data") as folder:
        found = list(folder.find(Query(StudyDescription=("Study 00007",), Modality="CT")))
    assert time.monotonic() - begun < as_loaded(2)
    assert not opened
    assert found
    shutil.rmtree(tmp_path / "data")
