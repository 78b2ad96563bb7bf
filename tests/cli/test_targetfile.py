"""`targets.yaml`: what is wrong with it is said in our words, and never with what stands in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from blocks import RULES, SOURCES, TYPES, Rule, Source, Target
from blocks.dicomweb import DicomWebTarget
from talaria import configfile, targetfile
from transfer.errors import Misconfigured

SECRET = "hunter2"


def refused(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(Misconfigured) as caught:
        configfile.read_filled(path)
    words = str(caught.value)
    assert words.startswith(f"{path}: ") and "\n" not in words
    return words.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("value", "where", "words"),
    [
        (f"*{SECRET}", "line 4, column 15: ", "text that begins with * must stand in quotes"),
        (f"&{SECRET} &{SECRET}", "line 4, column 24: ", "text that begins with &"),
        (f"!{SECRET} x", "line 4, column 15: ", "text that begins with ! must stand in quotes"),
        (f"%{SECRET}", "line 4, column 15: ", "text that begins with this character"),
        (f"@{SECRET}", "line 4, column 15: ", "text that begins with this character"),
        (f"`{SECRET}", "line 4, column 15: ", "text that begins with this character"),
        (f"a: {SECRET}", "line 4, column 16: ", "a colon is not expected here"),
        (f'"\\q{SECRET}"', "line 4, column 17: ", "backslash"),
        (f'"{SECRET}', "line ", "a quote is not closed"),
        (f"[{SECRET}", "line ", "not valid YAML"),
        (f"{{{SECRET}: [x}}", "line ", "not valid YAML"),
        (f'"{SECRET}" {SECRET}', "line 4, ", "not valid YAML"),
        (f"\t{SECRET}\n\tx: {SECRET}", "line ", "not valid YAML"),
        (f"\n\tuser: {SECRET}", "line 5, column 1: ", "indent with blanks, not with a tab"),
        (f"x\n      user: {SECRET}", "line 5, ", "not valid YAML"),
        (f"x\n    password: {SECRET}", "line ", "stands twice"),
        (f"\x07{SECRET}", "", "a character that YAML does not allow"),
        (f"{SECRET}\n    date: 2026-13-45", "", "a date or number is not valid"),
    ],
)
def test_yaml_that_is_not_valid(tmp_path: Path, value: str, where: str, words: str) -> None:
    text = f"targets:\n  files:\n    type: sftp\n    password: {value}\n"
    said = refused(tmp_path / "targets.yaml", text)
    assert said.startswith(where) and words in said
    assert SECRET not in said and len(said) < 150


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "targets.yaml"
    path.write_bytes(b"targets: \xff\xfe")
    with pytest.raises(Misconfigured, match="is not UTF-8 text"):
        configfile.read_filled(path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("DICOM", "unknown type 'DICOM': did you mean dicom?"),
        ("dicom+tls", "unknown type 'dicom+tls': did you mean dicom-tls?"),
        ("Dicom TLS", "unknown type 'Dicom TLS': did you mean dicom-tls?"),
        ("dicom_tls", "unknown type 'dicom_tls': did you mean dicom-tls?"),
        ("DICOMweb", "unknown type 'DICOMweb': did you mean dicomweb?"),
        ("ftps", "unknown type 'ftps': did you mean sftp?"),
        ("floppy", "unknown type 'floppy': it is not one of dicom, dicom-tls,"),
        (["dicom"], "unknown type \"['dicom']\": did you mean dicom?"),
        (None, "unknown type 'None': it is not one of"),
    ],
)
def test_a_type_that_is_not_known(kind: object, words: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        targetfile.make("a", {"type": kind})
    assert str(caught.value).startswith(f"target a: {words}")


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("hots", "did you mean host?"),
        ("Host", "did you mean host?"),
        ("aet-target", "did you mean aet_target?"),
        ("aettarget", "did you mean aet_target?"),
        ("timeout", "did you mean idle_timeout_s?"),
        ("colour", "`talaria target types` lists the fields"),
        (7, "`talaria target types` lists the fields"),
    ],
)
def test_a_field_that_is_not_known(field: object, words: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        targetfile.make("a", {"type": "dicom", "host": "h", "aet_target": "A", field: SECRET})
    assert str(caught.value) == f"target a: unknown field '{field}' of type dicom: {words}"


@pytest.mark.parametrize("value", ["${NAME", "${", "a${B}${C", "${1A}", "${A-B}", "${ HOME }"])
def test_a_variable_that_is_not_closed_or_not_named(
    tmp_path: Path, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("B", SECRET)
    text = f"targets:\n  files: {{type: sftp, host: h, user: u, folder: /x, password: '{value}'}}\n"
    (tmp_path / "targets.yaml").write_text(text)
    with pytest.raises(Misconfigured, match=r"target files: password: .*as in \$\{NAME\}") as caught:
        configfile.read_filled(tmp_path / "targets.yaml")
    assert SECRET not in str(caught.value)


def test_targets_may_take_in_what_others_have(tmp_path: Path) -> None:
    path = tmp_path / "targets.yaml"
    path.write_text(
        "targets:\n  a: &a {type: folder, folder: /x, enabled: no}\n  b:\n    <<: *a\n    folder: /y\n"
        "notify:\n  c: &c {type: command, command: page, on: [disk.low]}\n  d: {command: mail, <<: [*c]}\n"
    )
    assert configfile.read_filled(path)["b"] == {"type": "folder", "folder": "/y", "enabled": False}
    assert configfile.read_filled(path, "notify")["d"] == {"type": "command", "command": "mail", "on": ["disk.low"]}


def test_every_target_that_is_wrong_is_named(tmp_path: Path) -> None:
    path = tmp_path / "targets.yaml"
    path.write_text(
        "targets:\n  one: {type: folder}\n  two: {type: folder, folder: /x}\n  three: {type: nothing}\n"
        "  four: {type: dicom, hots: h}\n"
    )
    with pytest.raises(Misconfigured) as caught:
        targetfile.made_of(configfile.read_filled(path), targetfile.make, "target")
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["target one", "target three", "target four"]


def test_what_is_shown_of_a_target_are_its_own_values() -> None:
    one = DicomWebTarget(url="https://h/dicom-web", access_token="secret").named("web")
    shown = targetfile.all_values_of(one)
    assert shown.keys() <= {"type", *targetfile.field_names(DicomWebTarget)} and shown["max_attempts"]
    assert set(shown["access_token"]) == {"*"} and shown["type"] == "dicomweb"


@pytest.mark.parametrize(
    ("kind", "types", "values", "words"),
    [
        (Target, TYPES, "{type: folder, folder: /x, max_attempts: yes}", "max_attempts: must be a whole number, at le"),
        (Target, TYPES, "{type: folder, folder: /x, retry_delay_s: on}", "retry_delay_s: must be a number, at least 0"),
        (Target, TYPES, "{type: folder, folder: /x, bandwidth_limit: true}", "bandwidth_limit: must be a whole number"),
        (Source, SOURCES, "{type: inbox, folder: /in, targets: [a], settle_s: yes}", "settle_s: must be a number"),
        (Source, SOURCES, "{type: dicom, aet: A, targets: [a], peers: [{port: yes}]}", "peers.0.port: must be a whole"),
        (Rule, RULES, "{type: webhook, url: 'http://h/', late_s: no}", "late_s: must be a whole number, at least 1"),
        (Rule, RULES, "{type: email, host: h, sender: a@b, to: [a@b], port: yes}", "port: must be a whole number"),
    ],
)
def test_yes_is_no_number(kind: Any, types: Any, values: str, words: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        targetfile.entry(kind, types, "a", yaml.safe_load(values))
    assert words in str(caught.value) and ";" not in str(caught.value)


def test_mercure_s_configuration_is_said_to_be_one(tmp_path: Path) -> None:
    """It was `unknown key 'rules'`, or nothing that said what to do."""
    path = tmp_path / "mercure.json"
    path.write_text('{"rules": {}, "targets": {"pacs": {"target_type": "dicom", "ip": "10.1.2.3"}}}')
    with pytest.raises(Misconfigured, match="`talaria target import-mercure` takes it"):
        configfile.read_filled(path)
