"""What people upload: names, sizes and archives that may do no harm, files that go on, and what is removed when."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from transfer import uploads
from transfer.errors import Busy, Misconfigured, NotFound, Rejected
from transfer.home import Home
from transfer.uploads import BrowserUpload


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def archived(**files: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return made.getvalue()


def archived_many(count: int) -> bytes:
    return archived(**{str(number): b"" for number in range(count)})


def there(upload: BrowserUpload) -> dict[str, bytes]:
    found = (one for one in upload.content.rglob("*") if one.is_file())
    return {str(one.relative_to(upload.content)): one.read_bytes() for one in found}


def put(upload: BrowserUpload, content: bytes, number: int = 0, offset: int = 0) -> int:
    file = upload.append(number, offset)
    try:
        file.write(content)
    finally:
        file.close()
    return file.offset


def zipped(home: Home, content: bytes) -> BrowserUpload:
    upload = uploads.begin(home, "anna", [("a.zip", len(content))], {})
    put(upload, content)
    return upload


def test_a_file_that_broke_off_goes_on_and_is_not_longer_than_announced(home: Home) -> None:
    upload = uploads.begin(home, "anna", [("day/one.dcm", 6), ("day/two.dcm", 0)], {"to": ["x"]})
    assert put(upload, b"abc") == 3
    again = uploads.find(home, upload.id, "anna")
    assert again.sizes() == [3, 0] and again.missing() == 1 and again.asked == {"to": ["x"]}
    with pytest.raises(Misconfigured, match="3 bytes of this file are there"):
        put(again, b"abc")
    with pytest.raises(Misconfigured, match="longer than was announced"):
        put(again, b"defg", offset=3)
    assert put(again, b"def", offset=3) == 6
    assert (upload.content / "day/one.dcm").read_bytes() == b"abcdef" and again.missing() == 0
    assert upload.top().name == "day"
    assert stat.S_IMODE((upload.content / "day").stat().st_mode) == 0o700
    for key, by in ((upload.id, "ben"), ("../x", "anna"), ("0" * 16, "anna")):
        with pytest.raises(NotFound, match="not known any more"):
            uploads.find(home, key, by)
    with pytest.raises(NotFound):
        upload.append(2, 0)


def test_only_one_connection_at_a_time_brings_a_file(home: Home) -> None:
    """The old one, which is thought to be dead, has something left that it writes when it ends."""
    content = os.urandom(9000)
    upload = uploads.begin(home, "anna", [("one.dcm", len(content)), ("two.dcm", 1)], {})
    old = upload.append(0, 0)
    old.write(content[:3000])
    again = uploads.find(home, upload.id, "anna")
    with pytest.raises(Busy, match="another connection"):
        again.append(0, 3000)
    put(again, b"x", number=1)
    old.write(content[3000:4000])
    old.close()
    with pytest.raises(Misconfigured, match="4000 bytes of this file are there"):
        again.append(0, 3000)
    assert put(again, content[4000:], offset=4000) == 9000
    assert (upload.content / "one.dcm").read_bytes() == content


def test_nobody_brings_pieces_of_what_is_sent_or_has_gone(home: Home) -> None:
    upload = uploads.begin(home, "anna", [("one.dcm", 1)], {})
    with upload.held(), pytest.raises(Busy, match="another request"):
        uploads.find(home, upload.id, "anna").append(0, 0)
    file = upload.append(0, 0)
    with pytest.raises(Busy, match="another request"), upload.held():
        pass
    file.close()
    (upload.folder / "upload.json").unlink()  # as it is removed
    with pytest.raises(NotFound, match="not known any more"):
        upload.append(0, 0)


def test_no_piece_takes_the_room_that_stays_free(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = uploads.begin(home, "anna", [("one.dcm", 6)], {})
    file = upload.append(0, 0)
    file.write(b"abc")
    monkeypatch.setattr(uploads, "RESERVE_B", 1 << 60)
    with pytest.raises(Rejected, match="not enough free space"):
        file.write(b"def")
    file.close()
    assert upload.sizes() == [3]


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../b", "a//b", "", "a/./b", "a\\b", "a\0b", "n" * 256, "d/" * 40 + "x", "a\n", "\ud800"]
)
def test_a_name_that_leads_away_or_that_no_file_can_have_is_refused(home: Home, name: str) -> None:
    with pytest.raises(Misconfigured, match="name that can't be used"):
        uploads.begin(home, "anna", [(name, 1)], {})


def test_too_much_or_the_same_twice_is_refused(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for files in ([("a", 1), ("a", 1)], [("a", 1), ("a/b", 1)]):
        with pytest.raises(Misconfigured, match="the same name"):
            uploads.begin(home, "anna", files, {})
    monkeypatch.setenv("TALARIA_UPLOAD_LIMIT", str(1 << 20))
    with pytest.raises(Misconfigured, match="at most 1 MiB"):
        uploads.begin(home, "anna", [("a", 1 << 19), ("b", (1 << 19) + 1)], {})
    monkeypatch.setenv("TALARIA_UPLOAD_LIMIT", str(1 << 60))
    with pytest.raises(Rejected, match="not enough free space"):
        uploads.begin(home, "anna", [("a", 1 << 59)], {})
    monkeypatch.setattr(uploads, "MOST_FILES", 1)
    with pytest.raises(Misconfigured, match="at most 1 files"):
        uploads.begin(home, "anna", [("a", 1), ("b", 1)], {})


def test_an_archive_is_unpacked_once(home: Home) -> None:
    upload = zipped(home, archived(**{"s/1.dcm": b"one", "s/2.dcm": b"two"}))
    upload.unpack()
    assert set(there(upload)) == {"a/s/1.dcm", "a/s/2.dcm"}
    again = uploads.find(home, upload.id, "anna")
    assert again.missing() == 0
    again.unpack()
    with pytest.raises(Misconfigured, match="are there"):
        put(again, b"x")


def test_names_that_an_archive_unpacks_to_are_nobody_else_s(home: Home) -> None:
    own = {"a.zip.unpacked/x": b"own", "a/y": b"own", "d/b.ZIP": archived(x=b"1"), "d/b.zip": archived(x=b"2")}
    contents = own | {"a.zip": archived(x=b"3"), "empty.zip": archived()}
    upload = uploads.begin(home, "anna", [(path, len(content)) for path, content in contents.items()], {})
    for number, content in enumerate(contents.values()):
        put(upload, content, number)
    upload.unpack()
    assert {path: content for path, content in there(upload).items() if content != b"own"} == {
        "a.zip.unpacked_/x": b"3", "d/b/x": b"1", "d/b.zip.unpacked/x": b"2",
    }  # fmt: skip
    assert there(upload)["a.zip.unpacked/x"] == there(upload)["a/y"] == b"own"


@pytest.mark.parametrize("at", ["_extract", "rename", "save", "unlink"])
def test_what_a_kill_left_half_unpacked_is_unpacked_anew(home: Home, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """Wherever it was killed: what is sent is whole, and there once."""

    class Killed(BaseException):
        pass

    upload = uploads.begin(home, "anna", [(f"{name}.zip", len(archived(x=b"1", y=b"2"))) for name in "ab"], {})
    for number in range(2):
        put(upload, archived(x=b"1", y=b"2"), number)
    where, calls = (uploads if at == "_extract" else BrowserUpload if at == "save" else Path), list[str]()
    real = getattr(where, at)

    def killed(*args: object, **more: object) -> object:
        calls.append(at)
        if len(calls) == (1 if at == "save" else 2):
            raise Killed
        return real(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(where, at, killed)
        patch.setattr(uploads.shutil, "rmtree", lambda *args, **more: None)  # nobody clears up
        with pytest.raises(Killed):
            upload.unpack()
    uploads.find(home, upload.id, "anna").unpack()
    assert there(upload) == {"a/x": b"1", "a/y": b"2", "b/x": b"1", "b/y": b"2"}
    assert {one.name for one in upload.folder.iterdir()} - {"lock"} == {"files", "upload.json"}


def test_a_disk_that_is_full_is_no_damaged_archive(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = zipped(home, archived(x=b"1"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/secret/path")

    with monkeypatch.context() as patch:
        patch.setattr(uploads, "_extract", full)
        with pytest.raises(Busy, match=r"it can't be kept on .*No space left on device: make room"):
            upload.unpack()
    assert there(upload).keys() == {"a.zip"}
    upload.unpack()
    assert there(upload) == {"a/x": b"1"}


def test_archives_together_hold_no_more_files_than_an_upload_may(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MOST_FILES", 3)
    two = archived(x=b"", y=b"")
    upload = uploads.begin(home, "anna", [("a.zip", len(two)), ("b.zip", len(two))], {})
    put(upload, two)
    put(upload, two, number=1)
    with pytest.raises(Rejected, match=r"b\.zip: with it, the upload has more than 3 files"):
        upload.unpack()
    assert set(there(upload)) == {"a.zip", "b.zip"}


def test_an_archive_s_list_of_files_does_not_fill_the_memory(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MOST_FILES", 3)
    many = archived_many(7)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        one = zipfile.ZipInfo("x")
        one.comment = b"x" * 60_000
        archive.writestr(one, b"")
    monkeypatch.setattr(zipfile, "ZipFile", None)  # which reads them all
    for content in (many, many.replace(struct.pack("<HH", 7, 7), struct.pack("<HH", 1, 1)), made.getvalue()):
        upload = zipped(home, content)
        with pytest.raises(Rejected, match="more than 3 files"):
            upload.unpack()


def linked() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        one = zipfile.ZipInfo("link")
        one.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(one, "/etc/passwd")
    return made.getvalue()


def lying() -> bytes:
    """An archive that says of its file that it is shorter than it is."""
    whole = archived(x=b"0" * 100_000)
    size = (100_000).to_bytes(4, "little")
    return whole.replace(size, (10).to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (archived(**{"../x": b"1"}), "name that can't be used"),
        (archived(**{"/etc/x": b"1"}), "name that can't be used"),
        (archived(big=b"0" * (2 << 20)), "at most 1 MiB"),
        (archived(big=b"0" * ((1 << 20) - 10)), "more than is left"),
        (linked(), "holds links"),
        (lying(), "can't be unpacked"),
        (archived(x=b"1")[:-10], "can't be unpacked"),
        (b"no archive", "can't be unpacked"),
    ],
    ids=["above", "absolute", "large", "no room", "link", "lying", "cut off", "none"],  # an archive holds the time
)
def test_an_archive_that_could_do_harm_is_refused_and_leaves_nothing(
    home: Home, monkeypatch: pytest.MonkeyPatch, content: bytes, said: str
) -> None:
    monkeypatch.setenv("TALARIA_UPLOAD_LIMIT", str(1 << 20))
    upload = zipped(home, content)
    with pytest.raises(Rejected, match=said):
        upload.unpack()
    assert [one.name for one in upload.content.rglob("*")] == ["a.zip"]


def test_what_was_delivered_goes_after_a_day_and_what_was_not_stays(home: Home) -> None:
    made = {run: uploads.begin(home, "anna", [], {}) for run in ("", "delivered", "failed", "runs", "fresh")}
    home.receipt("").parent.mkdir()
    for run, upload in made.items():
        upload.run = "" if run == "" else f"run-{run}"
        upload.save()
        home.receipt(upload.run).write_text(json.dumps({"state": "failed" if run == "failed" else "delivered"}))
        for path in (upload.folder / "upload.json", upload.content):
            os.utime(path, (0, 0) if run != "fresh" else None)
    assert uploads.tidy(home, before=-1.0, keep={"run-runs"}) == 2
    assert {run for run, upload in made.items() if upload.folder.exists()} == {"failed", "runs", "fresh"}
    assert uploads.tidy(home, before=1.0, keep={"run-runs"}) == 1
    assert not made["failed"].folder.exists()


def test_an_upload_that_moves_or_that_a_run_may_need_is_not_removed(home: Home) -> None:
    def old(upload: BrowserUpload) -> BrowserUpload:
        for path in (upload.folder / "upload.json", upload.content, upload.folder):
            os.utime(path, (0, 0))
        return upload

    slow, moved, asked = (old(uploads.begin(home, "anna", [("d/a", 2)], {})) for _ in range(3))
    file = slow.append(0, 0)
    put(old(moved), b"x")
    asked.sending = True  # and the server is killed before the run is known
    asked.save()
    old(asked)
    left = home.root / "uploads" / "left"  # by a server that was killed while it removed it
    left.mkdir()
    os.utime(left, (0, 0))
    assert uploads.tidy(home, before=0.0) == 0
    assert not left.exists()
    assert slow.folder.exists() and moved.folder.exists() and asked.folder.exists()
    file.close()
    assert uploads.tidy(home, before=0.0) == 0
    old(slow)
    assert uploads.tidy(home, before=0.0) == 1 and not slow.folder.exists()
    assert uploads.tidy(home, before=1.0) == 1 and not asked.folder.exists()
