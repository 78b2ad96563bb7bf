"""What people upload: names, sizes and archives that may do no harm, files that go on, and what is removed when."""

from __future__ import annotations

import io
import json
import os
import stat
import zipfile
from pathlib import Path

import pytest

from transfer import uploads
from transfer.errors import Misconfigured, NotFound, Rejected
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
    there = {str(one.relative_to(upload.content)) for one in upload.content.rglob("*") if one.is_file()}
    assert there == {"a/s/1.dcm", "a/s/2.dcm"}
    again = uploads.find(home, upload.id, "anna")
    assert again.missing() == 0
    again.unpack()


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
