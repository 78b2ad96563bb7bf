"""Sources and notifications as people add, change, test, pause and delete them on pages, without scripts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml

from talaria.front.access import Role
from talaria.testing import studies
from talaria.testing.process import as_loaded, free_port, until
from tests.engine.material import dicom, folder
from tests.front.people import Person, fields, person, words
from tests.servers.receiver import Receiver, receiver
from tests.servers.up import Talaria
from transfer.home import Home
from transfer.ledger import Ledger

pytestmark = pytest.mark.timeout(600)
SECRET = "swordfish"
XSS = '<img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def place(up: Talaria, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    root = tmp_path_factory.mktemp("editing")
    up.apply(kept=folder(root / "kept"), second=folder(root / "second"))
    people = {role: person(up, role) for role in (Role.VIEWER, Role.OPERATOR, Role.ADMIN)}
    viewer, operator, admin = (next(one) for one in people.values())
    yield SimpleNamespace(up=up, root=root, viewer=viewer, operator=operator, admin=admin)
    for one in people.values():
        next(one, None)


@pytest.fixture
def admin(place: SimpleNamespace) -> Person:
    found: Person = place.admin
    return found


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as one:
        yield one


def added(admin: Person, kind: str, type_name: str, **given: Any) -> str:
    form = admin.form(f"/talaria/add-{kind}/{type_name}")
    return admin.post(f"/talaria/add-{kind}/{type_name}", {**form, **given, "do": "save"})


def inbox(place: SimpleNamespace, name: str) -> str:
    """Add a source by its page; return its address."""
    (place.root / name).mkdir()
    leads = added(place.admin, "source", "inbox", name=name, folder=str(place.root / name), targets="kept")
    assert leads == f"/talaria/sources/{name}?said=added"
    return leads.partition("?")[0]


def stored_wrongly(place: SimpleNamespace, name: str, **values: Any) -> None:
    """Change a saved document past all that judges it, as another version of the product may have left it."""
    wanted = {"block_documents": {"name": {"any_": [name]}}}
    (document,) = place.up.as_worker("POST", "/block_documents/filter", wanted)
    place.up.as_worker("PATCH", f"/block_documents/{document['id']}", {"data": values, "merge_existing_data": True})


def test_a_source_is_added_tested_changed_paused_duplicated_and_deleted(place: SimpleNamespace, admin: Person) -> None:
    assert "A folder on the machine" in words(admin.get("/talaria/add-source"))
    page = admin.get("/talaria/add-source/inbox")
    assert "There are: kept, second." in words(page) and "Ready after" in page and "Last week" not in page
    one = inbox(place, "ward")
    page = words(admin.get(f"{one}?said=added"))
    assert "It was saved." in page and str(place.root / "ward") in page and "Folder on the worker" in page
    form = admin.form(f"{one}/edit")
    assert form["targets"] == "kept" and form["settle_s"] == "1" and form["settle_s.unit"] == "min"
    changed = {**form, "targets": "kept, second", "settle_s": "5", "settle_s.unit": "s", "contact": "ward@example.org"}
    # Tested before it is saved: nothing is changed by that, and nothing that was typed is lost.
    tested = admin.post(f"{one}/edit", {**changed, "do": "test"}, 200)
    assert "It can be used." in words(tested) and fields(tested)["settle_s"] == "5"
    assert admin.form(f"{one}/edit") == form
    assert admin.post(f"{one}/edit", {**changed, "do": "save"}) == f"{one}?said=changed"
    shown = place.up.told("source", "show", "ward")["settings"]
    assert (shown["targets"], shown["settle_s"], shown["contact"]) == (["kept", "second"], 5.0, "ward@example.org")

    admin.post(f"{one}/enable", {"enabled": "false"})
    paused = admin.form(f"{one}/edit")
    admin.post(f"{one}/edit", {**paused, "description": XSS, "do": "save"})
    page = admin.get(one)
    assert "Paused" in words(page) and XSS not in page and XSS in unescape(page)  # an edit does not let it in
    admin.post(f"{one}/enable", {"enabled": "true"})
    assert "It can be used." in words(admin.post(f"{one}/test", {}, 200))

    copy = admin.get(f"{one}/duplicate")
    assert 'action="/talaria/add-source/inbox"' in copy
    page = admin.post("/talaria/add-source/inbox", {**fields(copy), "name": "again", "do": "save"}, 422)
    assert "overlap: each file must have one source" in words(page)
    (place.root / "other").mkdir()
    copied = {**fields(page), "name": "again", "folder": str(place.root / "other"), "do": "save"}
    assert admin.post("/talaria/add-source/inbox", copied).endswith("/again?said=added")
    for name in ("ward", "again"):
        assert "No file is touched" in admin.get(f"/talaria/sources/{name}")
        assert admin.post(f"/talaria/sources/{name}/remove", {}) == "/talaria/sources?said=removed"
        assert f"no source named {name}" in words(admin.get(f"/talaria/sources/{name}", 404))


def test_what_is_wrong_with_a_source_is_said_at_its_field_and_nothing_typed_is_lost(admin: Person) -> None:
    form = admin.form("/talaria/add-source/inbox")
    typed = {**form, "name": "Bad Name", "folder": "relative", "targets": "", "cron": "soon", "description": XSS}
    page = admin.post("/talaria/add-source/inbox", {**typed, "do": "save"}, 422)
    for name in ("name", "folder", "cron"):
        assert f'id="{name}-problem"' in page
    again = fields(page)
    assert {key: again[key] for key in typed} == typed and XSS not in page
    page = admin.post("/talaria/add-source/inbox", {**typed, "folder": "/nowhere", "name": "n" * 61, "do": "save"}, 422)
    assert "use at most 60 characters" in words(page)
    fixed = {**typed, "name": "sound", "folder": "/nowhere", "cron": "", "targets": "nobody"}
    page = words(admin.post("/talaria/add-source/inbox", {**fixed, "do": "save"}, 422))
    assert "no target named nobody; there are: kept, second" in page and "/nowhere" in page
    for path in ("/talaria/add-source/nothing", "/talaria/add-rule/nothing", "/talaria/sources/nobody/edit"):
        assert "no " in words(admin.get(path, 404))


def test_a_listener_s_senders_and_routes_are_rows(place: SimpleNamespace, admin: Person) -> None:
    form = admin.form("/talaria/add-source/dicom")
    port = str(free_port())
    rows = {"peers.0.aet": "CT*", "peers.0.host": "10.1.0.0/16", "routes.0.modality": "CT", "routes.0.targets": "kept"}
    new = {**form, "name": "router", "port": port, **rows}
    page = admin.post("/talaria/add-source/dicom", {**new, "do": "more"}, 200)
    more = fields(page)
    assert more["peers.0.aet"] == "CT*" and more["name"] == "router" and "routes.3.targets" in more
    more |= {"routes.3.called": "ROUTER", "routes.3.targets": "", "peers.2.host": "10.0/99"}
    page = admin.post("/talaria/add-source/dicom", {**more, "do": "save"}, 422)
    said = words(page)
    assert "Routes, line 2: Targets: a route to nobody" in said and "Who may send, line 2: Host: " in said
    assert 'id="routes.1.targets-problem"' in page and 'id="peers.1.host-problem"' in page
    good = fields(page) | {"routes.1.targets": "second, kept", "peers.1.host": ""}
    assert admin.post("/talaria/add-source/dicom", {**good, "do": "save"}).endswith("said=added")
    shown = place.up.told("source", "show", "router")["settings"]
    assert [(one["modality"], one["called"], one["targets"]) for one in shown["routes"]] == [
        ("CT", "", ["kept"]), ("", "ROUTER", ["second", "kept"])]  # fmt: skip
    assert [(one["aet"], one["host"]) for one in shown["peers"]] == [("CT*", "10.1.0.0/16")]
    assert "kept, second" in words(admin.get("/talaria/sources"))  # as `source list` has them: those of its routes, too
    page = words(admin.get("/talaria/sources/router"))
    assert "AE title CT*, Host 10.1.0.0/16" in page and "Modality CT, Targets kept; Called AE title ROUTER" in page
    before = admin.form("/talaria/sources/router/edit")
    assert before["routes.1.targets"] == "second, kept"
    admin.post(
        "/talaria/sources/router/edit", {**before, "routes.0.modality": "", "routes.0.targets": "", "do": "save"}
    )
    assert len(place.up.told("source", "show", "router")["settings"]["routes"]) == 1
    admin.post("/talaria/sources/router/remove", {})


@pytest.mark.parametrize("kind", ["source", "rule"])
def test_the_second_of_two_editors_is_asked(place: SimpleNamespace, admin: Person, kind: str, hook: Receiver) -> None:
    if kind == "source":
        one = inbox(place, "both")
    else:
        added(admin, "rule", "webhook", name="both", url=hook.url, targets="nothing-*")
        one = "/talaria/notifications/both"
    mine, theirs = admin.form(f"{one}/edit"), admin.form(f"{one}/edit")
    admin.post(f"{one}/edit", {**theirs, "description": "theirs", "do": "save"})
    page = admin.post(f"{one}/edit", {**mine, "description": "mine", "do": "save"}, 409)
    assert "changed meanwhile" in words(page) and "theirs" in page and fields(page)["description"] == "mine"
    assert admin.form(f"{one}/edit")["description"] == "theirs"
    admin.post(f"{one}/edit", {**fields(page), "do": "save"})
    assert admin.form(f"{one}/edit")["description"] == "mine"
    admin.post(f"{one}/remove", {})


def test_a_notification_is_added_tested_changed_paused_and_deleted(
    place: SimpleNamespace, admin: Person, hook: Receiver
) -> None:
    form = admin.form("/talaria/add-rule/webhook")
    assert "dispatch.failed" in form["on"] and "dispatch.delivered" not in form["on"]
    new = {**form, "name": "chat", "url": hook.url, "secret": SECRET, "on": ["target.down"], "group_s": "0"}
    tested = admin.post("/talaria/add-rule/webhook", {**new, "do": "test"}, 200)
    assert "The test message was sent." in words(tested) and len(hook.taken) == 1 and SECRET not in tested
    assert fields(tested)["on"] == "target.down" and fields(tested)["url"] == ""
    assert admin.post("/talaria/add-rule/webhook", {**new, "do": "save"}).endswith("/chat?said=added")
    one = "/talaria/notifications/chat"
    page = admin.get(one)
    assert "Ready" in words(page) and "stored, not shown" in page and SECRET not in page and hook.url not in page
    assert "Events A target does not answer any more" in words(page)
    assert "The test message was sent." in words(admin.post(f"{one}/test", {}, 200)) and len(hook.taken) == 2

    # Another URL, or another authority that vouches for it, voids the key; typed again it may go there.
    kept = admin.form(f"{one}/edit")
    assert (kept["url.do"], kept["secret.do"], kept["url"]) == ("keep", "keep", "")
    other = {**kept, "url": hook.url + "?other", "url.do": "replace"}
    for do in ("save", "test"):
        page = admin.post(f"{one}/edit", {**other, "do": do}, 422)
        assert "type it again" in words(page) and SECRET not in page and 'id="secret-problem"' in page
    page = admin.post(f"{one}/edit", {**kept, "ca_cert": "/etc/ssl/other.pem", "do": "save"}, 422)
    assert 'id="url-problem"' in page and 'id="secret-problem"' in page
    retyped = {**other, "secret": "new", "secret.do": "replace", "on": ["target.down", "target.up"]}
    assert admin.post(f"{one}/edit", {**retyped, "do": "save"}).endswith("said=changed")
    assert place.up.told("notify", "show", "chat")["on"] == ["target.down", "target.up"] and len(hook.taken) == 2
    page = admin.post(f"{one}/edit", {**admin.form(f"{one}/edit"), "on": [], "do": "save"}, 422)
    assert 'id="on-problem"' in page and "must not be empty" in words(page)

    assert admin.post(f"{one}/enable", {"enabled": "false"}).endswith("said=paused")
    assert "Paused" in words(admin.get(one)) and place.up.told("notify", "show", "chat")["enabled"] is False
    admin.post(f"{one}/edit", {**admin.form(f"{one}/edit"), "description": XSS, "do": "save"})
    assert place.up.told("notify", "show", "chat")["enabled"] is False and XSS not in admin.get(one)
    assert admin.post(f"{one}/enable", {"enabled": "true"}).endswith("said=resumed")
    changes = words(admin.get("/talaria/settings/audit?event=rule-changed"))
    assert all(word in changes for word in ("created", "updated", "paused", "resumed"))
    admin.post(f"{one}/remove", {})
    assert "no rule named chat" in words(admin.get(one, 404))


def test_a_rule_whose_message_can_t_be_sent_says_so_on_its_page(
    place: SimpleNamespace, admin: Person, hook: Receiver
) -> None:
    hook.status = 500
    added(admin, "rule", "webhook", name="mute", url=hook.url, on=["target.up"])
    page = words(admin.post("/talaria/notifications/mute/test", {}, 200))
    assert "The test message was not sent: " in page and "500" in page
    command = {"name": "page", "command": "not-allowed", "do": "save"}
    page = admin.post("/talaria/add-rule/command", {**admin.form("/talaria/add-rule/command"), **command}, 422)
    assert "TALARIA_NOTIFY_COMMANDS" in page and "data-errors" in page
    admin.post("/talaria/notifications/mute/remove", {})


def test_what_is_stored_wrongly_is_shown_mended_and_deleted(place: SimpleNamespace, admin: Person) -> None:
    one = inbox(place, "odd")
    stored_wrongly(place, "odd", folder="relative", targets=["kept", XSS])
    until(lambda: "Broken" in words(admin.get("/talaria/sources")), as_loaded(60))
    page = admin.get(one)
    assert "its settings are not valid" in words(page) and XSS not in page
    assert "odd: its settings are not valid" in words(admin.get("/talaria/"))
    # It will be mended: what it names is used.
    assert 'href="/talaria/sources/odd"' in admin.post("/talaria/targets/kept/delete", {}, 409)
    form = admin.form(f"{one}/edit")
    assert form["folder"] == "relative" and form["targets"] == f"kept\n{XSS}"
    fixed = {**form, "folder": str(place.root / "odd"), "targets": "kept", "do": "save"}
    assert admin.post(f"{one}/edit", fixed).endswith("said=changed")
    stored_wrongly(place, "odd", folder="relative")
    assert admin.post(f"{one}/remove", {}) == "/talaria/sources?said=removed"


def test_a_target_that_is_used_is_neither_deleted_nor_renamed_and_says_by_what(
    place: SimpleNamespace, admin: Person
) -> None:
    up, name = place.up, "used"
    up.apply(used=dicom(free_port(), max_attempts=9, retry_delay_s=3600, retry_max_delay_s=3600))

    def refused(*said: str) -> None:
        for path, form in (("delete", {}), ("rename", {"to": "other"})):
            page = admin.post(f"/talaria/targets/{name}/{path}", form, 409)
            assert all(one in words(page) or one in page for one in said), words(page)  # an id, in its link
        # By commands, the API and Prefect's pages it is refused with the same words.
        used = f"{name} can't be removed while it is used by "
        asked = {
            used: up.here("target", "remove", f"dicom/{name}"),
            used.replace("removed", "renamed"): up.here("target", "rename", name, "other"),
        }
        for why, ran in asked.items():
            assert ran.returncode == 2 and why in ran.stderr, ran.stderr
            assert all(one.casefold().replace("of the", "of") in ran.stderr for one in said[1:]), ran.stderr
        base, auth = f"http://127.0.0.1:{up.port}", tuple((up.home / "api.auth").read_text().strip().split(":", 1))
        (document,) = up.api("POST", "/block_documents/filter", block_documents={"name": {"any_": [name]}})
        for path, key in (
            (f"/talaria/api/v1/targets/{name}", "error"),
            (f"/api/block_documents/{document['id']}", "detail"),
            (f"/api/block_types/{document['block_type_id']}", "detail"),
            (f"/api/block_schemas/{document['block_schema_id']}", "detail"),
        ):
            answer = httpx.delete(base + path, auth=auth, trust_env=False, timeout=300)  # type: ignore[arg-type]
            assert answer.status_code == 409 and used in answer.json()[key], answer.text

    (place.root / "feeds").mkdir()
    given = {"name": "feeds", "folder": str(place.root / "feeds"), "targets": f"kept, dicom/{name}"}
    added(admin, "source", "inbox", **given)
    refused("as long as this uses it", "Source feeds")
    pruned = place.root / "pruned.yaml"
    pruned.write_text(yaml.safe_dump({"targets": {"kept": folder(place.root / "kept")}}))
    for more in ((), ("--dry-run",)):
        ran = up.here("target", "apply", str(pruned), "--prune", *more)
        assert ran.returncode == 2 and f"{name} can't be removed while it is used by source feeds" in ran.stderr
    study = place.root / "study"
    studies.ct(study, 1)
    form = admin.form("/talaria/send") | {"paths": str(study), "to": name, "do": "send"}
    run = admin.post("/talaria/send", form).rpartition("/")[2]
    flow = up.api("GET", f"/flow_runs/{run}")
    schedule = {"schedule": {"interval": 864_000}, "active": False, "parameters": {"targets": [name], "paths": ["/x"]}}
    made = up.as_worker("POST", f"/deployments/{flow['deployment_id']}/schedules", [schedule])
    refused("as long as this uses it", "Source feeds", run, "Schedule of the deployment dispatch/talaria")
    up.as_worker("DELETE", f"/deployments/{flow['deployment_id']}/schedules/{made[0]['id']}", {})
    admin.post("/talaria/sources/feeds/remove", {})
    admin.post(f"/talaria/dispatches/{run}/cancel", {})
    until(lambda: admin.client.post(f"/talaria/targets/{name}/delete", data={}).status_code == 303, as_loaded(120))
    # One that goes through Prefect's API takes with it that it was down.
    up.apply(used=folder(place.root / "used"))
    with Ledger(Home(up.home).ledger) as ledger:
        with ledger.together():
            ledger.waits.count(name, "its settings", "no route")
        (document,) = up.api("POST", "/block_documents/filter", block_documents={"name": {"any_": [name]}})
        auth = tuple((up.home / "api.auth").read_text().strip().split(":", 1))
        url = f"http://127.0.0.1:{up.port}/api/block_documents/{document['id']}"
        answer = httpx.delete(url, auth=auth, trust_env=False, timeout=300)  # type: ignore[arg-type]
        assert answer.status_code == 204, answer.text
        until(lambda: ledger.waits.breaker(name) is None, as_loaded(60))


def test_roles_see_and_may_what_is_theirs(place: SimpleNamespace, hook: Receiver) -> None:
    inbox(place, "roles")
    added(place.admin, "rule", "webhook", name="roles", url=hook.url, on=["target.up"])
    buttons = {
        (who, path): set(re.findall(rf"{path}/([a-z]+)", getattr(place, who).get(path)))
        for who in ("viewer", "operator", "admin")
        for path in ("/talaria/sources/roles", "/talaria/notifications/roles")
    }
    changes = {"edit", "duplicate", "enable", "remove"}
    assert buttons == {
        ("viewer", "/talaria/sources/roles"): set(),
        ("operator", "/talaria/sources/roles"): {"test", "sweep"},
        ("admin", "/talaria/sources/roles"): {"test", "sweep"} | changes,
        ("viewer", "/talaria/notifications/roles"): set(),
        ("operator", "/talaria/notifications/roles"): {"test"},
        ("admin", "/talaria/notifications/roles"): {"test"} | changes,
    }
    for path in ("sources", "notifications"):
        for who in ("viewer", "operator"):
            page = getattr(place, who).get(f"/talaria/{path}")
            assert "/talaria/add-" not in page
            getattr(place, who).post(f"/talaria/{path}/roles/edit", {}, 403)
    place.admin.post("/talaria/sources/roles/remove", {})
    place.admin.post("/talaria/notifications/roles/remove", {})


ODD = {
    "script": XSS,
    "quotes": "\"'><script>alert(1)</script>",
    "template": "{{ 1234567 * 3 }} {% raw %} %s {0}",
    "no-break": "a\u00a0b\u2028c",
    "right-to-left": "\u202eevil\u202c \u05d0\u05d1",
    "long": "x" * 7_000,  # a form may have 256 KiB
    "nul": "a\0b",
}


def test_a_rule_hears_on_of_a_target_that_it_names_and_says_what_is_not_there(
    place: SimpleNamespace, admin: Person, hook: Receiver
) -> None:
    """A target that got another name was heard of no more, and a name that is misspelt was never heard of."""
    up = place.up
    up.apply(heard=folder(place.root / "heard"))
    added(admin, "rule", "webhook", name="hears", url=hook.url, targets="heard, near-*", sources="")
    one = "/talaria/notifications/hears"
    assert "hears nothing" not in words(admin.get(one))
    page = admin.post("/talaria/targets/heard/rename", {"to": "other"}, 409)
    assert f'href="{one}"' in page and "can't be renamed" in words(page)
    ran = up.here("target", "rename", "heard", "other")
    assert ran.returncode == 2 and "heard can't be renamed while it is used by rule hears" in ran.stderr
    admin.post("/talaria/targets/heard/delete", {})  # of what is gone there is nothing to hear
    assert "It hears nothing of what it names: there is no target named heard." in words(admin.get(one))
    path = place.root / "rules.yaml"
    given = {"type": "webhook", "url": hook.url, "targets": ["kpet", "kept"], "sources": ["ct"]}
    path.write_text(yaml.safe_dump({"notify": {"hears": given}}))
    ran = up.here("notify", "apply", str(path))
    assert (ran.returncode, ran.stdout) == (0, "hears: updated\n")
    assert ran.stderr == "hears: there is no source named ct and no target named kpet\n"
    assert up.told("notify", "show", "hears")["note"] == "there is no source named ct and no target named kpet"
    admin.post(f"{one}/remove", {})


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
@pytest.mark.parametrize("path", ["add-source/dicom", "add-source/list", "add-rule/email", "add-rule/command"])
def test_strange_values_come_back_as_they_were_typed_and_break_nothing(admin: Person, path: str, value: str) -> None:
    """In every field at once; nothing is saved, and no field shows it as anything but text."""
    form = admin.form(f"/talaria/{path}")
    odd = {name: value for name in form if not name.endswith(".unit") and name not in ("base", "version", "stored")}
    page = admin.post(f"/talaria/{path}", {**odd, "do": "save"}, 422)
    assert "3703701" not in page and XSS not in page and "<script>alert" not in page
    assert page.count("<h1") == 1 and "data-errors" in page
    shown = fields(page)
    assert shown["name"] == value.strip()
    inside = shown["description"].replace("\r\n", "\n")
    assert inside == value or (value == ODD["nul"] and "a" in inside)
