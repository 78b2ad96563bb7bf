"""Import of files by a page, and the pages of sources and notifications, at a server that runs, without scripts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import pytest
import yaml

from talaria import mercure
from talaria.front.access import Role
from talaria.front.pages import importing
from talaria.testing.process import as_loaded, free_port, until
from tests.engine.material import folder, study
from tests.front.house import House, run
from tests.front.people import Person, fields, person, words
from tests.servers.up import Talaria
from transfer.errors import Misconfigured

pytestmark = pytest.mark.timeout(600)
SECRET = "swordfish"
MERCURE: dict[str, Any] = {
    "appliance_name": "x",
    "targets": {
        "PACS Main": {
            "target_type": "dicom", "ip": "10.1.2.3", "port": "104", "aet_target": "MAIN", "aet_source": "MERC",
            "contact": "team@example.org", "comment": "ours", "direction": "both",
        },
        "tls": {"target_type": "dicomtls", "ip": "h", "port": "2762", "aet_target": "T", "tls_cert": "/c",
                "tls_key": "/k", "ca_cert": "/ca"},
        "web": {"target_type": "dicomweb", "url": "https://x.example.org", "http_user": "u", "http_password": SECRET},
        "files": {"target_type": "sftp", "host": "h", "user": "u", "password": SECRET, "folder": "in", "odd": 1},
        "shell": {"target_type": "rsync", "host": "h", "user": "u", "folder": "in", "run_on_complete": True},
        "bucket": {"target_type": "s3", "region": "eu", "bucket": "scans", "prefix": "p", "access_key_id": "A",
                   "secret_access_key": SECRET},
        "trial": {"target_type": "xnat", "host": "https://x", "user": "u", "password": SECRET, "project_id": "T7"},
        "dir": {"target_type": "folder", "folder": "/srv/images", "exclusion_filter": "*.png"},
        "none": {"target_type": "dummy"},
    },
    "rules": {"a": {}},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(up: Talaria, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    root = tmp_path_factory.mktemp("import")
    people = {role: person(up, role) for role in (Role.VIEWER, Role.OPERATOR, Role.ADMIN)}
    viewer, operator, admin = (next(one) for one in people.values())
    yield SimpleNamespace(up=up, root=root, viewer=viewer, operator=operator, admin=admin)
    for one in people.values():
        next(one, None)


def preview(admin: Person, content: Any, status: int = 200) -> str:
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    return admin.post("/talaria/import", {"content": text}, status)


def take_over(admin: Person, page: str) -> str:
    (leads,) = re.findall(r'action="(/talaria/import/[^"]+)"', page)
    return admin.post(leads, {}, 200)


def test_a_mercure_configuration_is_shown_and_taken_over(place: SimpleNamespace) -> None:
    admin, up = place.admin, place.up
    listed = {"file": ("mercure.json", json.dumps(MERCURE).encode(), "application/json")}
    page = admin.client.post("/talaria/import", data={"content": ""}, files=listed).text
    said = words(page)
    assert SECRET not in page
    assert "PACS Main is called pacs-main here" in said and "files: odd does not come along" in said
    assert "no type like mercure's dummy" in said and "rules do not come along: 1" in said
    assert said.count("created") == 8 and up.told("target", "list")["targets"] == []
    (leads,) = re.findall(r'action="(/talaria/import/[^"]+)"', page)
    for other in person(up, Role.ADMIN):
        other.post(leads, {}, 404)
    assert "It was imported." in words(take_over(admin, page))
    admin.post(leads, {}, 404)
    saved = {one["name"]: one for one in up.told("target", "list")["targets"]}
    kinds = {name.lower().replace(" ", "-"): one["target_type"] for name, one in MERCURE["targets"].items()}
    del kinds["none"]
    assert {name: one["type"].replace("-", "") for name, one in saved.items()} == kinds
    pacs = up.told("target", "show", "pacs-main")
    assert (pacs["host"], pacs["port"], pacs["aet_target"], pacs["aet_source"]) == ("10.1.2.3", 104, "MAIN", "MERC")
    assert (pacs["contact"], pacs["description"], pacs["direction"]) == ("team@example.org", "ours", "both")
    assert up.told("target", "show", "shell")["on_complete"] and up.told("target", "show", "dir")["exclude"] == "*.png"
    assert "pacs-main" in admin.get("/talaria/targets")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "nothing to import"),
        ("targets: [", "the file:"),
        ("x: {}", "unknown key 'x'"),
        ({"targets": {"a": {"type": "folder", "folder": "${HOME}"}}}, "only `talaria target apply` fills in"),
        ({"targets": {"a": {"type": "sftp", "host": "h", "password": "file:/etc/passwd"}}}, "a: password: only"),
        ({"targets": {"a": {"type": "folder", "folder": "relative"}}}, "a: folder"),
        ({"targets": {"a": 7}}, "a: expected fields"),
        ({"sources": {"s": {"type": "inbox", "folder": "/tmp", "targets": ["nobody"]}}}, "nobody"),
        # What is wrong in one section is said before another is saved, and all of it at once.
        (
            {
                "targets": {"half": {"type": "folder", "folder": "/srv/half"}},
                "sources": {"s": {"type": "inbox", "folder": "/tmp", "targets": ["half", "nobody"]}},
                "notify": {"chat": {"type": "webhook"}},
            },
            "nobody",
        ),
    ],
)
def test_a_file_that_can_t_be_meant_is_refused_and_stays_in_the_form(
    place: SimpleNamespace, content: Any, said: str
) -> None:
    page = preview(place.admin, content, 422)
    assert said in words(page), words(page)
    assert fields(page)["content"].strip() == (content if isinstance(content, str) else yaml.safe_dump(content)).strip()
    if isinstance(content, dict) and "notify" in content:
        assert "chat" in words(page)
        place.admin.get("/talaria/targets/half", 404)
    for one in (place.viewer, place.operator):
        one.get("/talaria/import", 403)


def test_a_source_is_imported_tested_paused_edited_swept_and_deleted(place: SimpleNamespace) -> None:
    up: Talaria = place.up
    admin, operator, viewer = place.admin, place.operator, place.viewer
    name = f"day-{uuid4().hex[:8]}"  # another one if the test is run again
    inbox = place.root / name
    (inbox / "one").mkdir(parents=True)
    (inbox / "one" / "1.dcm").write_bytes(study("S1", series=1, each=1)[0])
    new = {
        "targets": {name: folder(place.root / "arch" / name)},
        "sources": {name: {"type": "inbox", "folder": str(inbox), "targets": [name], "settle_s": 0, "enabled": False}},
    }
    page = preview(admin, new)
    assert words(page).count("created") == 2 and "nothing is saved yet" in words(page)
    assert f"{name} inbox created" in words(take_over(admin, page))
    assert name in viewer.get("/talaria/sources") and "Paused" in words(viewer.get("/talaria/sources"))
    page = viewer.get(f"/talaria/sources/{name}")
    assert str(inbox) in page and "/test" not in page
    viewer.post(f"/talaria/sources/{name}/test", {}, 403)
    operator.post(f"/talaria/sources/{name}/enable", {"enabled": "true"}, 403)
    assert "It can be used." in words(operator.post(f"/talaria/sources/{name}/test", {}, 200))
    assert "is paused" in words(operator.post(f"/talaria/sources/{name}/sweep", {}, 409))
    text = fields(admin.get(f"/talaria/import?source={name}"))["content"]
    edited = yaml.safe_load(text)
    edited["sources"][name] |= {"enabled": True, "description": "of the day"}
    assert "updated" in words(take_over(admin, preview(admin, edited)))
    assert up.told("source", "show", name)["settings"]["description"] == "of the day"
    assert operator.post(f"/talaria/sources/{name}/sweep", {}).endswith("said=swept")
    there = place.root / "arch" / name
    # os.walk passes over folders that are renamed while it looks.
    until(lambda: [one for _, _, found in os.walk(there) for one in found if ".dcm" in one], as_loaded(120))
    assert admin.post(f"/talaria/sources/{name}/enable", {"enabled": "false"}).endswith("said=paused")
    assert admin.post(f"/talaria/sources/{name}/remove", {}).endswith("said=removed")
    assert name not in viewer.get("/talaria/sources")


def test_an_import_that_was_possible_and_is_not_any_more_saves_nothing(place: SimpleNamespace) -> None:
    admin, name = place.admin, f"late-{uuid4().hex[:8]}"
    for part in ("in", "out"):
        (place.root / name / part).mkdir(parents=True)
    up: Talaria = place.up
    up.apply(**{name: folder(place.root / name / "out")})
    new = {
        "targets": {f"{name}-new": folder(place.root / name / "out")},
        "sources": {name: {"type": "inbox", "folder": str(place.root / name / "in"), "targets": [name]}},
    }
    page = preview(admin, new)
    up.told("target", "rename", name, f"{name}-other")
    (leads,) = re.findall(r'action="(/talaria/import/[^"]+)"', page)
    page = admin.post(leads, {}, 422)
    assert "Nothing was imported" in words(page) and words(page).count("Not saved") == 2 and name in words(page)
    admin.get(f"/talaria/targets/{name}-new", 404)
    up.told("target", "rename", f"{name}-other", name)
    assert "It was imported." in words(take_over(admin, page))  # as it was kept


def test_of_an_import_that_breaks_off_is_said_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    house = House(tmp_path / "home")
    house.add("anna", Role.ADMIN)
    saved, broken = set[str](), [True]

    async def apply(section: str, office: Any, entries: dict[str, Any], dry_run: bool = False, **_: Any) -> Any:
        if not dry_run and section == "sources" and broken:
            raise Misconfigured(f"{broken.pop()}: its folder is gone")
        rows = [{"name": one, "action": "unchanged" if one in saved else "created"} for one in entries]
        saved.update(() if dry_run else entries)
        return {"rules" if section == "notify" else section: rows}

    monkeypatch.setattr(importing, "calls", lambda: {one: partial(apply, one) for one in importing.SECTIONS})
    new = {
        "targets": {"nas": folder(tmp_path)},
        "sources": {"inbox": {"type": "inbox", "folder": "/x", "targets": ["nas"]}},
        "notify": {"chat": {"type": "webhook"}},
    }

    async def case(client: httpx.AsyncClient) -> None:
        page = (await client.post("/talaria/import", data={"content": yaml.safe_dump(new)})).text
        (leads,) = re.findall(r'action="(/talaria/import/[^"]+)"', page)
        page = words((await client.post(leads)).text)
        assert "Not all of it was imported" in page and "its folder is gone" in page
        assert "nas folder created Saved" in page and "inbox inbox created Not saved" in page
        assert "chat webhook created Not saved" in page and saved == {"nas"}
        assert "It was imported." in words((await client.post(leads)).text) and saved == {"nas", "inbox", "chat"}

    run(house, "anna", case)


def test_a_rule_is_imported_tested_and_deleted(place: SimpleNamespace) -> None:
    rule = {"type": "webhook", "url": f"http://127.0.0.1:{free_port()}/{SECRET}", "on": ["dispatch.failed"]}
    take_over(place.admin, preview(place.admin, {"notify": {"chat": rule}}))
    for path in ("", "/chat"):
        page = place.viewer.get(f"/talaria/notifications{path}")
        assert "chat" in page and SECRET not in page
    place.viewer.post("/talaria/notifications/chat/test", {}, 403)
    tested = place.operator.post("/talaria/notifications/chat/test", {}, 200)
    assert "can't be reached" in words(tested) and SECRET not in tested
    assert place.admin.post("/talaria/notifications/chat/remove", {}).endswith("said=removed")
    assert "There are no rules." in words(place.viewer.get("/talaria/notifications"))


def test_only_a_mercure_configuration_is_taken_for_one() -> None:
    assert mercure.is_mercure(MERCURE)
    for other in (None, [], {}, {"targets": []}, {"targets": {"a": 1}}, {"targets": {"a": {"type": "folder"}}}):
        assert not mercure.is_mercure(other)


def test_the_command_does_what_the_page_does(up: Talaria, tmp_path: Path) -> None:
    file = tmp_path / "mercure.json"
    one = {"target_type": "folder", "folder": str(tmp_path / "out"), "exclusion_filter": "*.png"}
    file.write_text(json.dumps({"targets": {"By Command": one, "none": {"target_type": "dummy"}}, "rules": {"a": {}}}))
    ran = up.here("target", "import-mercure", str(file), "--dry-run")
    assert (ran.returncode, ran.stdout) == (0, "by-command: would be created\n")
    assert ran.stderr.splitlines() == [
        "By Command is called by-command here",
        "none: there is no type like mercure's dummy",
        "rules do not come along: 1",
    ]
    (done,) = up.told("target", "import-mercure", str(file))["targets"]
    assert (done["name"], done["action"]) == ("by-command", "created")
    assert up.told("target", "show", "by-command")["exclude"] == "*.png"
    up.told("target", "remove", "by-command")


@pytest.mark.parametrize(
    "text", ["targets: {a: {type: folder}}", '{"targets": {}}', '{"targets": {"a": {}}}', "\xff", "[]"]
)
def test_what_is_no_configuration_of_mercure_s_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "mercure.json").write_text(text, "latin-1")
    with pytest.raises(Misconfigured, match=r"mercure\.json is no configuration of mercure's"):
        mercure.read(tmp_path / "mercure.json")
