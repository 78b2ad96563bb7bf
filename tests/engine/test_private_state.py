"""What the state directory holds is ours alone: who else could read or change it is refused, or shut out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from talaria import settings
from talaria.server import child
from transfer.home import Home


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
