"""`talaria user` and `talaria token`: on files of the state directory, whether a server runs or not."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from talaria.front.keys import KeyRing
from tests.front.door import PASSWORD
from tests.servers.up import Talaria
from transfer.home import Home

pytestmark = pytest.mark.usefixtures("quick_passwords")


@pytest.fixture
def one(tmp_path: Path) -> Talaria:
    return Talaria(tmp_path)


def typed(one: Talaria, monkeypatch: pytest.MonkeyPatch, text: str, *args: str, code: int = 0) -> Any:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    ran = one.here(*args, "--json")
    assert ran.returncode == code, ran
    return json.loads(ran.stdout)


@pytest.mark.parametrize("args", [("user", "list"), ("token", "list"), ("token", "create"), ("audit", "show")])
def test_what_is_of_this_machine_alone_says_so_where_another_s_server_is_named(
    one: Talaria, args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"are those of this machine, in {one.home}: TALARIA_URL is not used for them"
    assert said not in one.here(*args).stderr
    monkeypatch.setenv("TALARIA_URL", "https://talaria.example")
    ran = one.here(*args)
    assert ran.returncode == 0 and said in ran.stderr.splitlines()[0]


def test_users_are_added_changed_and_removed(one: Talaria, monkeypatch: pytest.MonkeyPatch) -> None:
    added = typed(one, monkeypatch, f"{PASSWORD}\n", "user", "add", "anna", "--role", "operator")
    assert added == {"name": "anna", "role": "operator", "action": "added"}
    typed(one, monkeypatch, "", "user", "add", "ben", "--no-password")
    assert one.told("user", "list")["users"] == [
        {"name": "anna", "role": "operator", "password": True},
        {"name": "ben", "role": "viewer", "password": False},
    ]
    keys = KeyRing(Home(one.home))
    assert keys.of_login("anna", PASSWORD, local=True) and not keys.of_login("ben", "", local=True)
    typed(one, monkeypatch, "another password\n", "user", "passwd", "anna")
    assert not keys.of_login("anna", PASSWORD, local=True) and keys.of_login("anna", "another password", local=False)
    assert typed(one, monkeypatch, "", "user", "role", "anna", "--role", "admin")["role"] == "admin"
    typed(one, monkeypatch, "", "user", "remove", "anna")
    assert [user["name"] for user in one.told("user", "list")["users"]] == ["ben"]
    assert PASSWORD not in (one.home / "audit" / "trail.jsonl").read_text()
    assert len((one.home / "audit" / "trail.jsonl").read_text().splitlines()) == 5


def test_a_script_that_sets_up_a_machine_adds_a_user_once(one: Talaria, monkeypatch: pytest.MonkeyPatch) -> None:
    add = ("user", "add", "admin", "--role", "admin", "--if-missing")
    assert typed(one, monkeypatch, f"{PASSWORD}\n", *add)["action"] == "added"
    typed(one, monkeypatch, "another password\n", "user", "passwd", "admin")
    again = typed(one, monkeypatch, f"{PASSWORD}\n", "user", "add", "admin", "--if-missing")
    assert again == {"name": "admin", "role": "admin", "action": "none"}
    keys = KeyRing(Home(one.home))
    assert keys.of_login("admin", "another password", local=False)
    assert not keys.of_login("admin", PASSWORD, local=False)
    assert len((one.home / "audit" / "trail.jsonl").read_text().splitlines()) == 2


def test_what_can_t_be_is_said_in_one_line(one: Talaria, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [
        ("short\n", ("user", "add", "anna"), "10 to 1024 characters"),
        ("", ("user", "add", "anna"), "10 to 1024 characters"),
        (PASSWORD, ("user", "add", "anna", "--role", "root"), "viewer, operator, admin"),
        (PASSWORD, ("user", "add", "../anna"), "not valid"),
        (PASSWORD, ("user", "passwd", "anna"), "no user named anna"),
        ("", ("user", "remove", "anna"), "no user named anna"),
        ("", ("token", "create", "--role", "worker"), "viewer, operator, admin"),
        ("", ("token", "create", "--expires", "soon"), "--expires"),
        ("", ("token", "revoke", "x"), "no token x"),
    ]
    for text, arguments, words in wrong:
        said = typed(one, monkeypatch, text, *arguments, code=2)
        assert words in said["error"], arguments
    assert one.told("user", "list")["users"] == []


def test_a_token_is_shown_once(one: Talaria) -> None:
    made = one.told("token", "create", "--role", "operator", "--expires", "90d", "--name", "night-script")
    (listed,) = one.told("token", "list")["tokens"]
    assert listed["id"] == made["id"] and listed["role"] == "operator" and not listed["expired"]
    assert "token" not in listed and made["token"] not in (one.home / "tokens.json").read_text()
    assert made["token"] not in (one.home / "audit" / "trail.jsonl").read_text()
    plain = one.here("token", "create")
    assert plain.stdout.startswith("tal_") and "valid until" in plain.stderr
    who = KeyRing(Home(one.home)).of_text(made["token"], local=False)
    assert who and (who.name, who.role.label) == ("night-script", "operator")
    assert one.told("token", "revoke", "night-script")["id"] == made["id"]
    assert KeyRing(Home(one.home)).of_text(made["token"], local=False) is None
