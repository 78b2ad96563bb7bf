"""What the state directory holds is ours alone: who else could read or change it is refused, or shut out."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from talaria import settings
from talaria.home import home_of_settings
from talaria.server import child
from transfer.audit import Event, pseudonym, record
from transfer.home import Home, locked
from transfer.ledger import Ledger, write_json


def test_settings_that_others_can_change_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "talaria.toml"
    file.write_text("port = 4999\n")
    file.chmod(0o644)
    assert settings.load_settings().port == 4999
    file.chmod(0o666)
    with pytest.raises(ValueError, match=r"can be changed by other users: chmod go-w talaria\.toml"):
        settings.load_settings()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_settings_and_a_state_directory_of_another_user_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "talaria.toml"
    file.write_text("port = 4999\n")
    file.chmod(0o644)
    os.chown(file, 12345, 12345)
    with pytest.raises(ValueError, match="belongs to another user"):
        settings.load_settings()
    file.unlink()
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 12345, 12345)
    monkeypatch.setenv("TALARIA_HOME", str(home))
    with pytest.raises(PermissionError, match="belongs to another user"):
        Home.current()


def test_a_folder_that_others_use_is_no_state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen: run by root, `TALARIA_HOME= talaria user list` in /tmp shut everybody else out of it."""
    folder = tmp_path / "everybody"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setenv("TALARIA_HOME", str(folder))
    (folder / "theirs").touch()
    with pytest.raises(PermissionError, match="chmod 700"):
        Home.current()
    assert folder.stat().st_mode & 0o7777 == 0o1777
    (folder / "theirs").rename(folder / "api.auth")  # of one whose mode somebody has changed
    assert Home.current().root == folder and folder.stat().st_mode & 0o777 == 0o700
    (folder / "api.auth").rename(folder / "talaria.toml")  # of one that is to be
    (folder / ".snapshot").mkdir()
    folder.chmod(0o755)
    assert Home.current().root == folder and folder.stat().st_mode & 0o777 == 0o700


def test_an_empty_name_of_the_state_directory_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("TALARIA_HOME", "")
    monkeypatch.chdir(tmp_path)
    assert settings.load_settings().home == Path("~/.talaria") and Home.current().root == tmp_path / "me" / ".talaria"
    monkeypatch.setenv("TALARIA_HOME", "")
    (tmp_path / "talaria.toml").write_text("home = ''\n")
    assert home_of_settings() == tmp_path / "me" / ".talaria" and settings.load_settings().home == Path("~/.talaria")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link away")
def test_a_link_that_another_user_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leads to a file of ours, which was not meant for this."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.toml").write_text("port = 4999\n")
    (tmp_path / "talaria.toml").symlink_to("other.toml")
    assert settings.load_settings().port == 4999
    os.lchown(tmp_path / "talaria.toml", 12345, 12345)
    with pytest.raises(ValueError, match="belongs to another user"):
        settings.load_settings()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link away")
def test_every_link_that_leads_to_settings_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "other.toml").write_text("port = 4999\n")
    (tmp_path / "far" / "link").symlink_to("other.toml")
    (tmp_path / "talaria.toml").symlink_to(tmp_path / "far" / "link")
    assert settings.load_settings().port == 4999
    os.lchown(tmp_path / "far" / "link", 12345, 12345)
    with pytest.raises(ValueError, match="belongs to another user"):
        settings.load_settings()


@pytest.mark.parametrize("read", [lambda: settings.load_settings().port, home_of_settings])
def test_the_settings_that_are_read_are_those_that_were_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[], Any]
) -> None:
    """Somebody who may write to the folder puts another file there as soon as the first one has been looked at."""
    file, foreign = tmp_path / "talaria.toml", tmp_path / "foreign"
    file.write_text(f"port = 4998\nhome = '{tmp_path}/ours'\n")
    ours = file.stat().st_ino
    foreign.write_text(f"port = 4999\nhome = '{tmp_path}/theirs'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TALARIA_HOME", "")
    swaps = []

    def swapping(look: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def looked(*args: Any, **kwargs: Any) -> os.stat_result:
            info = look(*args, **kwargs)
            if info.st_ino == ours and not swaps:
                swaps.append(info)
                os.replace(foreign, file)
            return info

        return looked

    with monkeypatch.context() as patched:
        for name in ("stat", "lstat", "fstat"):
            patched.setattr(os, name, swapping(getattr(os, name)))
        found = read()
    assert swaps and found in (4998, tmp_path / "ours")


@pytest.mark.parametrize("kind", ["fifo", "loop", "folder", "endless"])
def test_settings_that_are_no_file_of_ordinary_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "talaria.toml"
    if kind == "fifo":
        os.mkfifo(file, 0o600)
    elif kind == "loop":
        file.symlink_to("talaria.toml")
    elif kind == "folder":
        file.mkdir(0o700)
    else:
        with open(file, "wb") as opened:
            opened.truncate(1 << 40)
        file.chmod(0o600)
    with pytest.raises(ValueError, match=r"talaria\.toml can't be read"):
        settings.load_settings()


def test_settings_that_are_no_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talaria.toml").write_text("port 4999\n")
    with pytest.raises(ValueError, match=r"talaria\.toml can't be read"):
        settings.load_settings()
    (tmp_path / "talaria.toml").write_bytes(b"contact = '\xff'\n")
    with pytest.raises(ValueError, match=r"talaria\.toml can't be read"):
        settings.load_settings()


def test_roots_and_syslog_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("TALARIA_SOURCES", "TALARIA_PLACES", "TALARIA_AUDIT_SYSLOG")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "talaria.toml"
    file.write_text('sources = ["/srv/a", "/srv/b"]\nplaces = "/srv/c, /srv/d"\naudit_syslog = "host:6514"\n')
    settings.load_settings()
    assert [os.environ[name] for name in names] == ["/srv/a:/srv/b", "/srv/c:/srv/d", "host:6514"]
    for name in names:
        monkeypatch.delenv(name)
    file.write_text('sources = "relative"\n')
    with pytest.raises(ValueError, match="relative is not an absolute path"):
        settings.load_settings()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("keep_days = true", "setting keep_days: must be a whole number, at least 1"),
        ("lease = true", "setting lease: must be a number, at least 2"),
        ('audit_syslog = "log..example.org"', "setting audit_syslog: 'log..example.org' is not host:port"),
        ('audit_syslog = "tls://log.example.org"', "is not host:port"),
    ],
)
def test_a_value_that_would_mean_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: str
) -> None:
    variable = f"TALARIA_{line.partition(' ')[0].upper()}"
    monkeypatch.setenv(variable, "")
    monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talaria.toml").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=re.escape(words)):
        settings.load_settings()


def test_what_a_process_makes_in_the_state_directory_is_for_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    home = Home.current()
    before = os.umask(0)
    try:
        with home.owner(), home.exclusive("lock"), locked(home.root / "server.lock", fcntl.LOCK_EX) as held:
            assert held
            settings.auth_string(home)
            record(Event.LOGIN, "anna")
            assert pseudonym("12345")
            write_json(home.receipt("run"), {})
            with Ledger(home.ledger) as ledger:
                ledger.runs.begins("run", "owner")
                found = list(home.root.rglob("*"))
                assert len(found) > 8
                for path in found:
                    assert path.stat().st_mode & 0o077 == 0, path
    finally:
        os.umask(before)


def test_the_systemd_unit_is_confined() -> None:
    unit = (Path(__file__).parents[2] / "deployments" / "talaria.service").read_text()
    for line in (
        "UMask=0077", "NoNewPrivileges=true", "ProtectSystem=strict", "StateDirectoryMode=0700", "PrivateTmp=true",
        "CapabilityBoundingSet=", "SystemCallFilter=@system-service", "RestrictNamespaces=true",
    ):  # fmt: skip
        assert line in unit.splitlines()
    if shutil.which("systemd-analyze"):
        said = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", "deployments/talaria.service"],
            cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
        )  # fmt: skip
        lines = [line for line in said.stderr.splitlines() if "talaria.service" in line]
        assert [line for line in lines if "not executable" not in line and "is not found" not in line] == []


def test_a_secret_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            settings.secret(home, "api.auth", "talaria:first")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []
    assert settings.secret(home, "api.auth", "talaria:second") == "talaria:second"
    assert settings.secret(home, "api.auth", "talaria:third") == "talaria:second"
    assert (tmp_path / "api.auth").stat().st_mode & 0o777 == 0o600


def test_an_empty_secret_is_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "api.auth"
    file.touch(0o600)
    assert settings.secret(Home(tmp_path), "api.auth", "talaria:made") == "talaria:made"
    assert file.read_text().strip() == "talaria:made"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o622])
def test_a_secret_that_others_can_read_or_change_is_refused(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "api.auth"
    file.write_text("talaria:known\n")
    file.chmod(mode)
    with pytest.raises(PermissionError, match="others can read or change"):
        settings.secret(Home(tmp_path), "api.auth", "talaria:made")


def test_what_the_server_writes_is_for_nobody_else(tmp_path: Path) -> None:
    log, made = tmp_path / "logs" / "server.log", tmp_path / "database"
    process = child([sys.executable, "-c", f"open({str(made)!r}, 'w'); print(1)"], {}, log, umask=0o077)
    process.wait(30)
    assert log.stat().st_mode & 0o777 == 0o600 == made.stat().st_mode & 0o777
