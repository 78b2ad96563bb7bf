"""Talaria's pages at a server that runs, without scripts: every page, button and refusal, by forms and links alone."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest
import yaml

from talaria.front.access import Role
from talaria.front.pages.site import size
from talaria.testing.process import as_loaded, free_port, until
from tests.engine.material import dicom, study
from tests.front.people import Person, fields, person, words
from tests.servers.openssh import install, shared
from tests.servers.up import Talaria

pytestmark = pytest.mark.timeout(600)
SECRET = "swordfish"
XSS = '<img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def admin(up: Talaria) -> Iterator[Person]:
    yield from person(up, Role.ADMIN)


@pytest.fixture(scope="module")
def operator(up: Talaria) -> Iterator[Person]:
    yield from person(up, Role.OPERATOR)


@pytest.fixture(scope="module")
def viewer(up: Talaria) -> Iterator[Person]:
    yield from person(up, Role.VIEWER)


def added(admin: Person, tmp_path: Path, name: str, **more: str) -> Path:
    """Add a target of type folder by its page; return the folder."""
    folder = tmp_path / name
    folder.mkdir()
    form = admin.form("/talaria/add-target/folder")
    leads = admin.post(
        "/talaria/add-target/folder", {**form, "name": name, "folder": str(folder), **more, "do": "save"}
    )
    assert leads == f"/talaria/targets/{name}?said=added"
    return folder


def test_a_target_is_added_tested_changed_renamed_and_deleted(admin: Person, up: Talaria, tmp_path: Path) -> None:
    folder = added(admin, tmp_path, "archive", description=XSS, contact="team@example.org")
    page = admin.get("/talaria/targets/archive?said=added")
    assert "The target was saved." in page and str(folder) in page and "Not tested" in page
    assert XSS not in page and XSS in unescape(page)

    leads = admin.post("/talaria/targets/archive/test", {})
    until(lambda: over(admin.get(leads)), as_loaded(120))
    assert "All steps succeeded." in admin.get(leads)
    assert "Ready" in admin.get("/talaria/targets")

    assert "Test with a move" not in page

    form = admin.form("/talaria/targets/archive/edit")
    assert form["folder"] == str(folder) and form["description"] == XSS
    assert admin.post("/talaria/targets/archive/edit", {**form, "description": "ours", "do": "save"}).endswith(
        "changed"
    )
    saved = yaml.safe_load(up.here("target", "export").stdout)["targets"]["archive"]
    assert saved["description"] == "ours" and saved["contact"] == "team@example.org" and saved["folder"] == str(folder)

    admin.post("/talaria/targets/archive/enable", {"enabled": "false"})
    assert "Off" in words(admin.get("/talaria/targets/archive"))
    admin.post("/talaria/targets/archive/enable", {"enabled": "true"})
    assert admin.post("/talaria/targets/archive/rename", {"to": "store"}) == "/talaria/targets/store?said=renamed"
    assert "no target named archive" in words(admin.get("/talaria/targets/archive", 404))
    assert "lower-case" in words(admin.post("/talaria/targets/store/rename", {"to": "Not Valid"}, 422))
    assert admin.post("/talaria/targets/store/delete", {}).startswith("/talaria/targets?said=removed")
    assert "no target named store" in words(admin.get("/talaria/targets/store", 404))


def over(page: str) -> bool:
    return "Testing" not in words(page)


def test_what_is_wrong_is_said_at_the_field_and_nothing_typed_is_lost(admin: Person) -> None:
    form = admin.form("/talaria/add-target/dicom")
    typed = {**form, "name": "Bad Name", "host": "", "port": "http", "aet_target": "X" * 17, "description": XSS}
    page = admin.post("/talaria/add-target/dicom", {**typed, "do": "save"}, 422)
    for name in ("name", "host", "port", "aet_target"):
        assert f'id="{name}-problem"' in page
    assert page.count('aria-invalid="true"') == 4
    again = fields(page)
    assert {key: again[key] for key in ("name", "port", "aet_target", "description")} == {
        key: typed[key] for key in ("name", "port", "aet_target", "description")
    }
    assert XSS not in page
    assert "Bad Name" not in admin.get("/talaria/targets")


def test_a_name_that_is_taken_is_refused(admin: Person, tmp_path: Path) -> None:
    folder = added(admin, tmp_path, "taken")
    form = admin.form("/talaria/add-target/folder")
    page = admin.post("/talaria/add-target/folder", {**form, "name": "taken", "folder": str(folder), "do": "save"}, 422)
    assert "a target named taken is there already" in words(page)


def test_a_secret_is_never_shown_and_never_goes_to_another_place(admin: Person, up: Talaria, tmp_path: Path) -> None:
    form = admin.form("/talaria/add-target/sftp")
    new = {"name": "files", "host": "127.0.0.1", "port": "9", "user": "anna", "folder": "in", "password": SECRET}
    admin.post("/talaria/add-target/sftp", {**form, **new, "do": "save"})
    for path in ("", "/edit", "/duplicate"):
        assert SECRET not in admin.get(f"/talaria/targets/files{path}")

    kept = admin.form("/talaria/targets/files/edit")
    assert kept["password.do"] == "keep"
    assert admin.post("/talaria/targets/files/edit", {**kept, "description": "ours", "do": "save"}).endswith("changed")
    for action in ("save", "test"):
        moved = {**kept, "version": "", "host": "127.0.0.2", "do": action}
        page = admin.post("/talaria/targets/files/edit", moved, 422)
        assert "type it again" in words(page) and SECRET not in page
    copy = admin.form("/talaria/targets/files/duplicate")
    page = admin.post("/talaria/add-target/sftp", {**copy, "name": "other", "host": "127.0.0.2", "do": "save"}, 422)
    assert "type it again" in words(page)
    # At the same place the copy keeps it; a new one that is typed may go anywhere.
    admin.post("/talaria/add-target/sftp", {**copy, "name": "copied", "do": "save"})
    retyped = {**copy, "name": "other", "host": "127.0.0.2", "password": "other", "password.do": "replace"}
    admin.post("/talaria/add-target/sftp", {**retyped, "do": "save"})
    shown = up.told("target", "show", "copied")
    assert set(shown["password"]) == {"*"}


def test_what_a_form_does_not_change_stays_as_it_is(admin: Person, up: Talaria) -> None:
    """A target with everything that a browser may lose: lines, a proxy that is a secret, and that it takes no part."""
    keys = "SHA256:" + "A" * 43 + "\nSHA256:" + "B" * 43
    web = {
        "type": "dicomweb",
        "url": "http://127.0.0.1:9/rs",
        "access_token": SECRET,
        "proxy": "http://u:p@127.0.0.1:9",
    }
    sftp = {"type": "sftp", "host": "127.0.0.1", "user": "anna", "folder": "in", "password": SECRET, "host_key": keys}
    up.apply(web=web, lines=sftp | {"description": "two\nlines"})
    for name in ("web", "lines"):
        admin.post(f"/talaria/targets/{name}/enable", {"enabled": "false"})
        before = up.told("target", "show", name)
        form = admin.form(f"/talaria/targets/{name}/edit")
        assert admin.post(f"/talaria/targets/{name}/edit", {**form, "contact": "a@b.org", "do": "save"}).endswith(
            "changed"
        )
        after = up.told("target", "show", name)
        assert after == before | {"contact": "a@b.org"} and after["enabled"] is False
        copy = admin.form(f"/talaria/targets/{name}/duplicate")
        kind = "dicomweb" if name == "web" else "sftp"
        page = admin.post(f"/talaria/add-target/{kind}", {**copy, "name": name, "do": "save"}, 422)
        assert f"a target named {name} is there already" in words(page)


def test_a_secret_that_is_to_be_replaced_is_not_kept_after_an_error(admin: Person, up: Talaria) -> None:
    up.apply(keys={"type": "sftp", "host": "127.0.0.1", "user": "anna", "folder": "in", "password": SECRET})
    form = admin.form("/talaria/targets/keys/edit")
    new = {**form, "password": "new", "password.do": "replace", "port": "none", "do": "save"}
    again = fields(admin.post("/talaria/targets/keys/edit", new, 422))
    assert again["password.do"] == "replace" and again["password"] == ""
    page = admin.post("/talaria/targets/keys/edit", {**again, "port": "22", "do": "save"}, 422)
    assert "type it, or keep the stored one" in words(page)


def test_the_second_of_two_editors_is_asked(admin: Person, tmp_path: Path) -> None:
    added(admin, tmp_path, "both")
    mine = admin.form("/talaria/targets/both/edit")
    theirs = admin.form("/talaria/targets/both/edit")
    admin.post("/talaria/targets/both/edit", {**theirs, "description": "theirs", "do": "save"})
    page = admin.post("/talaria/targets/both/edit", {**mine, "description": "mine", "do": "save"}, 409)
    assert "changed meanwhile" in words(page) and "theirs" in page and fields(page)["description"] == "mine"
    assert fields(admin.get("/talaria/targets/both/edit"))["description"] == "theirs"
    admin.post("/talaria/targets/both/edit", {**fields(page), "do": "save"})
    assert fields(admin.get("/talaria/targets/both/edit"))["description"] == "mine"


def test_a_target_is_tested_before_it_is_saved(admin: Person, tmp_path: Path) -> None:
    form = admin.form("/talaria/add-target/folder")
    leads = admin.post("/talaria/add-target/folder", {**form, "folder": str(tmp_path / "nowhere"), "do": "test"})
    until(lambda: over(admin.get(leads)), as_loaded(120))
    page = words(admin.get(leads))
    assert "A step failed." in page and "nowhere" in page
    assert "nowhere" not in admin.get("/talaria/targets")


def test_a_study_is_planned_sent_and_seen(operator: Person, admin: Person, tmp_path: Path) -> None:
    name = f"kept{tmp_path.name[-1]}"  # another one in a second try
    folder, source = added(admin, tmp_path, name), tmp_path / "study"
    source.mkdir()
    for number, content in enumerate(study("A1", series=1, each=3)):
        (source / f"{number}.dcm").write_bytes(content)
    form = operator.form("/talaria/send") | {"paths": str(source), "to": name}
    planned = operator.post("/talaria/send", {**form, "do": "plan"}, 200)
    assert "3 files" in words(planned) and fields(planned)["paths"] == str(source)
    leads = operator.post("/talaria/send", {**form, "do": "send"})
    assert operator.post("/talaria/send", {**form, "do": "send"}) == leads  # a double click sends once
    until(lambda: "3 of 3 delivered" in words(operator.get(leads)), as_loaded(120))
    assert len(list(folder.rglob("*.dcm"))) == 3
    assert operator.client.get(f"{leads}/receipt").json()["targets"][name]["delivered"] == 3
    until(lambda: "Last dispatch Delivered" in words(operator.get(f"/talaria/targets/{name}")), as_loaded(120))
    page = operator.get(f"/talaria/targets/{name}")
    assert leads in operator.get("/talaria/dispatches") and leads in page
    assert page.count('class="plot"') == 2  # how many, and how much
    today = page.partition('id="days-table"')[2].partition("<tbody>")[2].partition("</tr>")[0]
    sent = sum(one.stat().st_size for one in source.iterdir())
    assert words(today).split()[1:] == ["1", "0", *size(sent).split()]
    assert "No dispatch matches. Look at any time" in words(operator.get("/talaria/dispatches?state=failed"))
    assert "nothing is missing" in operator.post(f"{leads}/retry", {}, 409)


def sent(operator: Person, source: Path, to: str, **more: str) -> str:
    """Send a folder by its page; return the address of the dispatch, which has ended."""
    form = operator.form("/talaria/send") | {"paths": str(source), "to": to, **more}
    leads = operator.post("/talaria/send", {**form, "do": "send"})
    until(lambda: 'hx-trigger="load' not in operator.get(leads), as_loaded(120))
    return leads


def written(folder: Path, accession: str, each: int = 1) -> Path:
    folder.mkdir(parents=True)
    for number, content in enumerate(study(accession, series=1, each=each)):
        (folder / f"{number}.dcm").write_bytes(content)
    return folder


def test_a_node_that_is_queried_is_tested_with_a_move_where_somebody_asks_for_it(up: Talaria, operator: Person) -> None:
    up.apply(asked=dicom(free_port(), direction="query"))
    assert "Test with a move" in operator.get("/talaria/targets/asked")
    for form, there in (({}, False), ({"move": "true"}, True)):
        leads = operator.post("/talaria/targets/asked/test", form)
        until(lambda leads=leads: over(operator.get(leads)), as_loaded(120))
        assert ("Move to here" in words(operator.get(leads))) is there


def test_what_happened_to_a_dispatch_and_to_each_item(
    up: Talaria, operator: Person, admin: Person, tmp_path: Path
) -> None:
    up.apply(dead=dicom(free_port()))
    leads = sent(operator, written(tmp_path / "one", "A2"), "dead")
    assert "attempts: 3" in words(operator.get(leads))
    for said in ("attempt 1 of 3 failed", "attempt 2 of 3 failed"):  # logs come some seconds later
        until(lambda said=said, leads=leads: said in words(operator.get(leads)), as_loaded(60))
    kept = added(admin, tmp_path, "items")
    source = written(tmp_path / "three", "A1", 3)
    (source / "=note.txt").write_text("no image")
    kept.rename(tmp_path / "away")  # until the target is repaired
    leads = sent(operator, source, "items")
    page = operator.get(leads)
    assert "Failed" in words(page) and "mount the share" in words(page)
    (tmp_path / "away").rename(kept)
    operator.post(f"{leads}/retry", {})
    until(lambda: "4 of 4 delivered" in words(operator.get(leads)), as_loaded(120))
    page = operator.get(leads)
    states = re.findall(r"<strong>([^<]+)</strong>", page.partition('class="events"')[2])
    assert states[0] == "Waits for its turn"
    assert states.index("Ended") < states.index("Waits to go on") < len(states) - 1
    assert "Items: 4" in words(page) and "Items: 1" in words(operator.get(f"{leads}?q=note"))
    assert "Items: 0" in words(operator.get(f"{leads}?outcome=rejected&q=nothing"))
    table = list(csv.DictReader(operator.get(f"{leads}/receipt.csv").splitlines()))
    assert {one["item"]: one["target"] for one in table}["'=note.txt"] == "items" and len(table) == 4


def test_what_the_script_at_the_end_said_is_in_the_time_line(up: Talaria, operator: Person, tmp_path: Path) -> None:
    server, folder = shared(), tmp_path / "in"
    folder.mkdir()
    install(folder, f"echo 'imported as no. 7 {XSS}'")
    at = {"host": "127.0.0.1", "port": server.port, "user": server.user, "folder": str(folder)}
    keys = {"host_key": server.host_keys[0], "private_key": str(server.key)}
    up.apply(scripted={"type": "sftp", "on_complete": True, **at, **keys})
    leads = sent(operator, written(tmp_path / "study", "H1"), "scripted")
    until(lambda: "it said: imported as no. 7" in words(operator.get(leads)), as_loaded(60))  # logs come seconds later
    assert XSS not in operator.get(leads)


def test_many_dispatches_are_retried_and_sent_elsewhere_at_once(
    operator: Person, admin: Person, tmp_path: Path
) -> None:
    added(admin, tmp_path, "many"), added(admin, tmp_path, "more")
    leads = [sent(operator, written(tmp_path / f"m{number}", f"M{number}"), "many") for number in range(2)]
    first, second = (one.rpartition("/")[2] for one in leads)
    page = operator.get("/talaria/dispatches?q=many&state=delivered&days=1")
    assert "Dispatches: 2" in words(page) and first in page and second in page
    form = fields(page)
    answer = operator.post("/talaria/dispatches", {**form, "pick": [first, second], "to": "more", "do": "send"}, 200)
    assert "Done: 2. Not possible: 0." in words(answer)
    until(lambda: "Dispatches: 2" in words(operator.get("/talaria/dispatches?q=more&state=delivered")), as_loaded(120))
    # All that match, as the server finds them; what has ended can't be paused, and each says so.
    answer = operator.post("/talaria/dispatches", {**form, "all": "true", "do": "pause"}, 200)
    assert "Done: 0. Not possible: 2." in words(answer) and words(answer).count("has ended") == 2
    # Nothing of these is missing: no retry is offered, and one that is asked for says so, and does nothing.
    answer = words(operator.post("/talaria/dispatches", {**form, "pick": [first, second], "do": "retry"}, 200))
    assert "Done: 0. Not possible: 0. Left out, as nothing is missing: 2." in answer
    assert answer.count("nothing is missing: all of it was delivered") == 2
    page = operator.get(leads[0])
    assert "/retry" not in page and ">Delivered<" in page.replace("</svg>", ">") and "Completed" not in page
    assert "nothing is missing" in operator.post(f"{leads[0]}/retry", {}, 409)
    assert "No dispatch matches." in words(operator.get("/talaria/dispatches?q=nothing-like-it"))


def test_a_row_says_how_a_dispatch_stands_at_each_target_and_why(
    operator: Person, admin: Person, tmp_path: Path
) -> None:
    added(admin, tmp_path, "rows"), added(admin, tmp_path, "rows-too")
    (tmp_path / "rows-too").rename(tmp_path / "away")  # until the target is repaired
    form = operator.form("/talaria/send") | {"paths": str(written(tmp_path / "r", "R1")), "to": ["rows", "rows-too"]}
    leads = operator.post("/talaria/send", {**form, "do": "send"})
    only = sent(operator, tmp_path / "r", "rows-too", key="another")

    def row(query: str, of: str = leads) -> str:
        found = [one for one in operator.get(f"/talaria/dispatches?{query}").split("<tr>") if of in one]
        return words(found[0]) if found else ""

    until(lambda: "rows Delivered" in row("target=rows"), as_loaded(120))
    until(lambda: "rows-too Failed" in row("state=partial&target=rows&days=1"), as_loaded(120))
    shown = row("state=failed&target=rows-too")
    assert "mount the share" in shown and "Partial" in shown
    page = operator.get(leads)  # its page says it in the same words
    assert "Partial · Dispatch" in page and f"{leads}/retry" in page and "/talaria/targets/rows-too" in page
    assert "rows Delivered" in words(page) and "rows-too Failed" in words(page)
    assert row("target=rows-too", only) and not row("target=rows", only) and not row("state=partial", only)
    assert not row("state=delivered") and row("state=failed&q=rows", only)
    (tmp_path / "away").rename(tmp_path / "rows-too")
    operator.post(f"{leads}/retry", {})
    until(lambda: row("state=delivered&target=rows").count("Delivered") == 3, as_loaded(120))
    assert not row("state=partial")
    # All that match are those to this target only.
    query = fields(operator.get("/talaria/dispatches?target=rows"))
    answer = operator.post("/talaria/dispatches", {**query, "all": "true", "do": "pause"}, 200)
    assert "Not possible: 1." in words(answer)


def test_folders_are_browsed_and_each_folder_is_a_study_of_its_own(
    operator: Person, admin: Person, tmp_path: Path
) -> None:
    added(admin, tmp_path, "flood")
    top = tmp_path / "day"
    written(top / "one", "F1"), written(top / "two", "F2")
    form = operator.form("/talaria/send") | {"to": "flood"}
    page = operator.post("/talaria/send", {**form, "open": str(top)}, 200)
    assert f'name="open" value="{top}/one"' in page and f'name="open" value="{tmp_path}"' in page
    assert fields(page)["to"] == "flood"
    page = operator.post("/talaria/send", {**fields(page), "add": str(top)}, 200)
    form = fields(page) | {"each": "folder", "to": "flood"}
    assert form["paths"] == str(top)
    planned = words(operator.post("/talaria/send", {**form, "do": "plan"}, 200))
    assert "Studies" in planned and "one" in planned and "2 files" in planned
    leads = operator.post("/talaria/send", {**form, "do": "send"})
    until(lambda: 'hx-trigger="load' not in operator.get(leads), as_loaded(120))
    page = words(operator.get(leads))
    assert "Studies" in page and "2 of 2 delivered" in page and "Items: 2" in page
    for path, said in ((tmp_path / "nowhere", "no such file"), (Path(operator.home), "state directory")):
        assert said in words(operator.post("/talaria/send", {**form, "open": str(path)}, 200))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"paths": "", "to": "x"}, "Name at least one file"),
        ({"paths": "/data"}, "Choose at least one target"),
        ({"paths": "data/x", "to": "x"}, "is not an absolute path"),
        ({"paths": "/data", "to": "nobody"}, "no target named nobody"),
    ],
)
def test_a_request_that_can_t_be_meant_is_refused_in_words(operator: Person, more: dict[str, str], said: str) -> None:
    page = operator.post("/talaria/send", {"do": "send", **more}, 404 if "nobody" in more.values() else 422)
    assert said in words(page)


def test_roles_see_and_may_what_is_theirs(viewer: Person, operator: Person, admin: Person, tmp_path: Path) -> None:
    added(admin, tmp_path, "roles")
    pages = {one: one.get("/talaria/targets/roles") for one in (viewer, operator, admin)}
    buttons = {one: set(re.findall(r"/talaria/targets/roles/(\w+)", page)) for one, page in pages.items()}
    assert buttons[viewer] == set() and buttons[operator] == {"test"}
    assert buttons[admin] == {"test", "edit", "duplicate", "enable", "rename", "delete"}
    assert "Send a study" not in viewer.get("/talaria/dispatches")
    for one, path in ((viewer, "/test"), (viewer, "/edit"), (operator, "/edit"), (operator, "/delete")):
        one.post(f"/talaria/targets/roles{path}", {}, 403)
    viewer.get("/talaria/add-target", 403)
    leads = operator.post("/talaria/targets/roles/test", {})
    assert "not known any more" in words(admin.get(leads, 404))  # another's test


def test_filters_stand_in_the_address(viewer: Person, admin: Person, tmp_path: Path) -> None:
    added(admin, tmp_path, "findme", contact="who@example.org")
    for query in ("q=FINDME", "q=who%40example", "type=folder&q=find", "state=unchecked&q=find", "sort=name"):
        assert "/talaria/targets/findme" in viewer.get(f"/talaria/targets?{query}")
    for query in ("q=nothing-like-it", "type=folder&q=findme&state=off", "direction=query"):
        assert "/talaria/targets/findme" not in viewer.get(f"/talaria/targets?{query}")


def test_pages_have_no_script_or_style_of_their_own_and_load_nothing_from_elsewhere(admin: Person) -> None:
    paths = ["/talaria/", "/talaria/targets", "/talaria/dispatches", "/talaria/send", "/talaria/add-target"]
    paths += [f"/talaria/add-target/{kind}" for kind in ("dicom", "dicomweb", "xnat")]
    for path in paths:
        answer = admin.client.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert answer.headers["cache-control"] == "no-store"
        assert not re.search(r"<style|style=|<script(?! src=\"/talaria/)|\son\w+=", answer.text), path
        assert not re.search(r"(src|href|action|hx-get|hx-post)=\"(?!/|#)", answer.text), path
        for linked in set(re.findall(r'(?:src|href)="(/talaria/static/[^"]+)"', answer.text)):
            assert admin.client.get(linked).status_code == 200
        assert answer.text.count("<h1") == 1 and '<html lang="en">' in answer.text


def test_an_unknown_page_or_type_is_said_in_words(admin: Person) -> None:
    assert "no type named nothing" in words(admin.get("/talaria/add-target/nothing", 404))
    assert "no target named nobody" in words(admin.get("/talaria/targets/nobody", 404))
    assert "no job" in words(admin.get("/talaria/dispatches/00000000", 404))
