"""A form of files as it comes in: what it may have at most, and a disk that becomes full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from talaria.front.pages.incoming import FormOfFiles
from transfer import uploads
from transfer.errors import Busy, Misconfigured, Rejected

KIND = "multipart/form-data; boundary=b"


def part(name: str, content: bytes = b"x") -> bytes:
    head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n"


def test_no_form_takes_the_room_that_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FormOfFiles(KIND, tmp_path)
    form.write(part("a.dcm"))
    monkeypatch.setattr(uploads, "RESERVE_B", 1 << 60)
    with pytest.raises(Rejected, match="not enough free space"):
        form.write(part("b.dcm"))
    form.close()
    assert (tmp_path / "b.dcm").read_bytes() == b""


def test_a_full_disk_is_said_without_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FormOfFiles(KIND, tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(Busy) as caught:
        form.write(part("a.dcm"))
    assert "make room" in caught.value.message and str(tmp_path) not in caught.value.message


def test_a_form_ends_also_where_no_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALARIA_UPLOAD_LIMIT", "1000")
    monkeypatch.setattr(uploads, "MOST_FILES", 2)
    form = FormOfFiles(KIND, tmp_path)
    nothing = b"--b\r\n\r\n\r\n" * 100
    with pytest.raises(Misconfigured, match="at most"):
        for _ in range(20):
            form.write(nothing)
