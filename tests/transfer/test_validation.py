"""Wrong values are refused in one sentence: the field, what is wrong, what is allowed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from blocks import RULES, TYPES
from talaria import targetfile
from talaria.settings import Settings, load_settings, misspelt
from tests.targets.fields import NEEDED
from transfer import uploads
from transfer.errors import Misconfigured
from transfer.validation import is_text, what_is_wrong

NO_HOST = "is not a host name or an IP address"
SETTING = re.compile(r"`TALARIA_(\w+)`")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("port", 99999, "port: must be a number, at least 1 and at most 65535"),
        ("host", "127.0.0.1:104", f"host: '127.0.0.1:104' {NO_HOST}: a port is given in a field of its own"),
        (
            "host",
            "pacs.example.org:104",
            f"host: 'pacs.example.org:104' {NO_HOST}: a port is given in a field of its own",
        ),
        ("host", "[::1]:104", f"host: '[::1]:104' {NO_HOST}: a port is given in a field of its own"),
        ("host", "dead:beef", f"host: 'dead:beef' {NO_HOST}"),
        ("port", "x", "port: must be a whole number, at least 1 and at most 65535"),
        ("port", None, "port: must be a whole number, at least 1 and at most 65535"),
        ("bandwidth_limit", 1, "bandwidth_limit: must be a number, at least 1024"),
        ("connect_timeout_s", 0, "connect_timeout_s: must be a number, more than 0 and at most 3600"),
        ("verify", "hoped", "verify: must be 'accepted', 'listed' or 'proven'"),
        ("enabled", "perhaps", "enabled: must be true or false"),
        ("aet_target", 1234, "aet_target: must be text: put it in quotes, or leave the field out"),
        ("window", "whenever", "window 'whenever': expected HH:MM-HH:MM [Mon-Fri] [Europe/Berlin]"),
        ("contact", "me", "contact: 'me' is not an e-mail address: write it as in pacs-team@example.org"),
        ("direction", "sideways", "direction: must be 'store', 'query' or 'both'"),
    ],
)
def test_a_wrong_value_is_told_with_what_is_allowed(field: str, value: Any, words: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        targetfile.make("pacs", {"type": "dicom", **NEEDED["dicom"], field: value})
    assert str(caught.value) == f"target pacs: {words}"


@pytest.mark.parametrize("name", NEEDED)
def test_no_message_is_pydantic_s_own(name: str) -> None:
    for field in targetfile.field_names(TYPES[name]):
        for value in (None, True, -1, 10**9, 1.5, "", "zzz", "a\nb", [1], {"a": 1}):
            try:
                targetfile.make("x", {"type": name, **NEEDED[name], field: value})
            except Misconfigured as exc:
                text = str(exc)
                assert text.startswith("target x: ") and "\n" not in text, text
                assert "Value error" not in text and "Input should" not in text and "None" not in text, text
    for field in [field for field in NEEDED[name] if TYPES[name].model_fields[field].is_required()]:
        with pytest.raises(Misconfigured, match=f"{field}: is required"):
            targetfile.make("x", {"type": name, **{k: v for k, v in NEEDED[name].items() if k != field}})


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("TALARIA_PORT", "x", "setting port: must be a whole number, at least 1 and at most 65535"),
        ("TALARIA_WORKERS", "0", "setting workers: must be a number, at least 1 and at most 64"),
        ("TALARIA_OFF_PEAK", "night", "setting off_peak: window 'night': expected HH:MM-HH:MM"),
        ("TALARIA_SCP_AET", " ", "setting scp_aet: AE title '': must have 1 to 16 characters"),
        ("TALARIA_SCP_AET", "KLINIKUM_MÜNCHEN", "setting scp_aet: AE title 'KLINIKUM_MÜNCHEN': use ASCII letters"),
        ("TALARIA_HOST_NAME", "two words", "setting host_name: must match ^[A-Za-z0-9._-]*$"),
    ],
)
def test_a_wrong_setting_is_told_by_name(
    variable: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match="setting") as caught:
        load_settings()
    assert words in str(caught.value) and "TALARIA_" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("command", {"command": "../page"}, "command: must match ^[A-Za-z0-9_]"),
        ("command", {"command": "page", "arguments": ["-x"] * 101}, "arguments: must be at most 100, and are 101"),
        ("command", {"command": "page", "on": []}, "on: must not be empty"),
    ],
)
def test_lengths_and_patterns_are_told_in_our_words(kind: str, values: dict[str, Any], words: str) -> None:
    """They were pydantic's: `String should match pattern`, `List should have at most 100 items after validation`."""
    with pytest.raises(ValidationError) as caught:
        RULES[kind](**values)
    assert what_is_wrong(caught.value.errors(), RULES[kind].model_fields).startswith(words)


def test_a_settings_file_that_is_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path))
    (tmp_path / "talaria.toml").write_text("port: 4200\n")
    with pytest.raises(ValueError, match=r"talaria\.toml can't be read"):
        load_settings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("source = ['/data']", "unknown setting 'source': did you mean sources?"),
        ("keep-days = 30", "unknown setting 'keep-days': did you mean keep_days?"),
        ("TALARIA_PORT = 4300", "unknown setting 'TALARIA_PORT': write port"),
        ("[talaria]\nport = 4300", "unknown setting 'talaria': settings stand in no section"),
        ("zzz = 1", "unknown setting 'zzz'"),
    ],
)
@pytest.mark.parametrize("where", ["here", "home"])
def test_a_setting_that_is_misspelt_is_refused(
    where: str, text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was to set, as where may be sent from, had its default instead, and nothing said so."""
    for name in ("here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    (tmp_path / where / "talaria.toml").write_text(text + "\n")
    with pytest.raises(ValueError, match=r"talaria\.toml: unknown setting") as caught:
        load_settings()
    assert str(caught.value).endswith(words)


def test_a_variable_that_is_misspelt_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load_settings()  # which sets what it has read
    assert misspelt() == []
    for name in ("SOURCE", "KEEP_DAY", "URL", "TOKEN", "SERVICE_HOST", "SERVICE_PORT", "PORT_4200_TCP"):
        monkeypatch.setenv(f"TALARIA_{name}", "1")
    assert misspelt() == [
        "TALARIA_KEEP_DAY is no setting, and is not heeded: did you mean TALARIA_KEEP_DAYS?",
        "TALARIA_SOURCE is no setting, and is not heeded: did you mean TALARIA_SOURCES?",
    ]


def test_every_setting_may_stand_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the documents list, each in small letters; the limit of an upload was heeded as a variable alone."""
    listed = (Path(__file__).parents[2] / "docs" / "cli.md").read_text().partition("## Commands")[0]
    named = {
        one.lower() for line in listed.splitlines() if line[:3] == "| `" for one in SETTING.findall(line.split("|")[1])
    }
    assert named - {"home"} == Settings.model_fields.keys() - {"home"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path))
    monkeypatch.setenv("TALARIA_UPLOAD_LIMIT", "")  # to be as it was before this test
    monkeypatch.delenv("TALARIA_UPLOAD_LIMIT")
    (tmp_path / "talaria.toml").write_text("upload_limit = 2097152\n")
    load_settings()
    assert uploads.limit() == 2 << 20


def command(*args: str, home: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TALARIA_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-m", "talaria", *args], capture_output=True, text=True, env=env, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["send", "/tmp", "--to", "a", "--priority", "foo"], ["--priority", "'foo'", "'urgent', 'normal', 'offpeak'"]),
        (["up", "--port", "99999"], ["--port", "65535"]),
        (["jobs", "list", "--limit", "none"], ["--limit", "must be a whole number"]),
        (["prune", "--older-than", "soon"], ["--older-than", "30d"]),
        (["target", "frobnicate"], ["frobnicate"]),
    ],
)
def test_a_wrong_option_is_told_in_one_line(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    ran = command(*arguments, home=tmp_path)
    assert ran.returncode == 2 and ran.stdout == "" and len(ran.stderr.strip().splitlines()) == 1
    assert "Value error" not in ran.stderr and "Input should" not in ran.stderr
    for word in words:
        assert word in ran.stderr


@pytest.mark.parametrize(("within", "is_one"), [("a", True), ("\udcfc", False)])
def test_text_is_looked_for_however_deep_it_lies(within: str, is_one: bool) -> None:
    """Nesting that JSON may have was an error of the API's own."""
    value: Any = within
    for _ in range(sys.getrecursionlimit()):
        value = [{"key": value}]
    assert is_text(value) is is_one
    assert is_text({within: 1}) is is_one
