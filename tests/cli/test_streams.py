"""Commands whose standard streams are closed, have a reader that has enough, or the encoding of an old locale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers.api import api

TALARIA = (sys.executable, "-P", "-m", "talaria")
TARGET = {"name": "pacs", "type": "dicom", "direction": "store", "enabled": True, "broken": None, "last_check": None,
          "description": "Röntgen für 山田"}  # fmt: skip
LISTED = {("GET", "/targets"): [(200, {"targets": [TARGET]})]}


def ran(script: str, *arguments: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a command by a line of a shell, which closes or leads its streams."""
    return subprocess.run(
        ["sh", "-c", script, "sh", *TALARIA, *arguments], env=env, cwd=cwd, capture_output=True, check=False
    )


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_a_command_whose_streams_are_closed_does_what_it_does(closed: str, tmp_path: Path) -> None:
    with api(tmp_path, LISTED) as one:
        done = ran(f'"$@" {closed}', "target", "list", env=one.env, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, b"")


def test_a_password_can_t_be_read_where_there_is_no_input(tmp_path: Path) -> None:
    env = os.environ | {"TALARIA_HOME": str(tmp_path / "home")}
    done = ran('"$@" <&-', "user", "add", "anna", env=env, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, b"talaria: a password has 10 to 1024 characters\n")


@pytest.mark.parametrize(
    ("arguments", "code", "errors"), [(["target", "list"], 0, subprocess.PIPE), (["x"], 2, subprocess.STDOUT)]
)
def test_a_reader_that_has_enough_makes_no_difference(
    arguments: list[str], code: int, errors: int, tmp_path: Path
) -> None:
    """Python said which of its streams had broken, and the exit code was 120, or that of a server that is away."""
    read, write = os.pipe()
    os.close(read)
    with api(tmp_path, LISTED) as one, os.fdopen(write, "wb") as out:
        done = subprocess.run([*TALARIA, *arguments], env=one.env, cwd=tmp_path, stdout=out, stderr=errors, check=False)
    assert (done.returncode, b"Broken" in (done.stderr or b"")) == (code, False)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_can_t_be_written_is_said_in_a_line(tmp_path: Path, unbuffered: str) -> None:
    with api(tmp_path, LISTED) as one:
        env = one.env | {"PYTHONUNBUFFERED": unbuffered}
        done = ran('"$@" >/dev/full', "target", "list", env=env, cwd=tmp_path)
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1 and b"No space left" in done.stderr


def test_what_is_printed_is_out_at_once_where_python_is_to_hold_nothing_back(tmp_path: Path) -> None:
    """Seen: with PYTHONUNBUFFERED, as in containers, even what was said of errors waited for the end of the process."""
    program = "import os, sys; from talaria.cli.streams import open_streams; open_streams(); print('a');"
    program += "print('b', file=sys.stderr); os._exit(0)"
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, "-P", "-c", program], env=env, cwd=tmp_path, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"a\n", b"b\n")


def test_a_locale_of_other_letters_changes_nothing(tmp_path: Path) -> None:
    """The same command in ISO 8859-1: the table could not be printed, and a path was another to the server."""
    made = subprocess.run(
        ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(tmp_path / "de_DE")], capture_output=True, check=False
    )
    if not (tmp_path / "de_DE").is_dir():
        pytest.skip(f"no such locale can be made: {made.stderr.decode()}")
    with api(tmp_path, LISTED) as one:
        plain = {name: value for name, value in one.env.items() if name not in ("LC_ALL", "PYTHONUTF8")}
        env = plain | {"LOCPATH": str(tmp_path), "LC_ALL": "de_DE"}
        done = ran('"$@"', "target", "list", env=env, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, b"") and "│ Röntgen für 山田".encode() in done.stdout
        missing = ran('"$@"', "send", "/nirgends/Müller", "--to", "pacs", env=env, cwd=tmp_path)
        assert missing.returncode == 2 and "/nirgends/Müller: no such".encode() in missing.stderr


def test_an_encoding_that_is_demanded_may_lack_what_tables_are_drawn_with(tmp_path: Path) -> None:
    with api(tmp_path, LISTED) as one:
        done = ran('"$@"', "target", "list", env=one.env | {"PYTHONIOENCODING": "latin-1"}, cwd=tmp_path)
    assert done.returncode == 0 and "Röntgen für".encode("latin-1") in done.stdout
