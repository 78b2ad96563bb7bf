"""A command that needs neither targets nor a server answers at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from talaria.cli import serve

HEAVY = ("prefect", "httpx", "pydantic_settings", "pydicom", "yaml")
SCRIPT = f"""
import sys
from talaria.__main__ import main
try:
    main()
finally:
    print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["send", "--help"], 0),
        (["target", "apply", "--help"], 0),
        (["send"], 2),
        (["send", "/tmp", "--to", "a", "--priority", "foo"], 2),
        (["jobs", "frobnicate"], 2),
        (["target", "apply", "/no/such.yaml"], 2),
        (["target", "test", "--file", "/no/such.yaml"], 2),
        (["target", "test"], 2),
    ],
)
def test_help_version_and_wrong_use_load_nothing_heavy(arguments: list[str], code: int, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ran.returncode == code, ran.stderr
    assert ran.stderr.splitlines()[-1] == ""


def test_nothing_warns_at_the_first_start(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "talaria", "target", "types", "--json"],
        env={k: v for k, v in os.environ.items() if k != "PREFECT_HOME"} | {"TALARIA_HOME": str(home)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert home.stat().st_mode & 0o777 == 0o700 and set(json.loads(ran.stdout)["types"]) >= {"dicom", "folder"}


STAYING = """
import gc
from talaria.imports import staying

class Ring:
    def __init__(self):
        self.itself = self

for wrong in (False, True):
    before = gc.get_freeze_count()
    try:
        with staying():
            assert not gc.isenabled()
            kept = [Ring() for _ in range(1000)]
            assert not wrong
    except AssertionError:
        assert wrong
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + 1000
    assert not any(one is kept for one in gc.get_objects())
"""


def test_no_garbage_is_looked_for_in_what_is_imported_to_stay() -> None:
    ran = subprocess.run([sys.executable, "-P", "-c", STAYING], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_state_directory_that_can_t_be_made_is_said_in_one_line(tmp_path: Path) -> None:
    """Prefect warned, with a line of its own code, before we said it."""
    (tmp_path / "file").touch()
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "talaria", "jobs", "list"],
        env={k: v for k, v in os.environ.items() if k != "PREFECT_HOME"} | {"TALARIA_HOME": str(tmp_path / "file")},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    (line,) = ran.stderr.splitlines()
    assert ran.returncode == 2 and line.endswith("file/talaria.toml can't be read: Not a directory")


@pytest.mark.parametrize("named", ["", "http://127.0.0.1:9/api"])
def test_status_names_the_prefect_server_that_does_not_answer(
    named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    away = {"server": {"ok": False, "url": named or None}, "workers": [], "queues": {}, "targets": []}
    monkeypatch.setattr(serve, "_status", lambda: away)
    monkeypatch.setenv("PREFECT_API_URL", named)
    with pytest.raises(typer.Exit):
        serve.status()
    away = "start it, or unset that variable to use Talaria's own"
    away = f"no Prefect server answers at PREFECT_API_URL={named}: {away}"
    said = away if named else "no server runs: `talaria up` starts it"
    assert capsys.readouterr().err == f"talaria: {said}\n"
