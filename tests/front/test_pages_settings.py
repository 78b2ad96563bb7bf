"""Settings as pages: passwords, users, tokens and the audit trail; no Prefect is needed for them."""

from __future__ import annotations

import asyncio
import re
from html import unescape
from pathlib import Path

import httpx
import pytest

from talaria.front.access import Role, role_of
from talaria.front.pages import settings
from tests.front.door import PASSWORD
from tests.front.house import House, run
from tests.front.people import fields, words
from transfer.audit import Event, Trail, entries, record

NEW = "another-good-password"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    return House(tmp_path / "home")


def test_one_s_own_password_is_changed_and_ends_the_sessions(house: House) -> None:
    house.add("vera", Role.VIEWER)

    async def case(client: httpx.AsyncClient) -> None:
        page = (await client.get("/talaria/settings")).text
        assert "vera (viewer)" in words(page) and "/talaria/settings/users" not in page
        for form, said in (
            ({"now": "wrong", "new": NEW, "again": NEW}, "The password now is wrong."),
            ({"now": PASSWORD, "new": NEW, "again": "else"}, "are not the same"),
            ({"now": PASSWORD, "new": "short", "again": "short"}, "a password has"),
        ):
            answer = await client.post("/talaria/settings/password", data=form)
            assert answer.status_code == 422 and said in words(answer.text)
        done = await client.post("/talaria/settings/password", data={"now": PASSWORD, "new": NEW, "again": NEW})
        assert done.status_code == 303
        assert (await client.get("/talaria/settings", headers={"Accept": "application/json"})).status_code == 401
        assert await house.log_in(client, "vera") == 401
        assert await house.log_in(client, "vera", NEW) == 303
        for _ in range(20):  # nobody who finds an open session tries passwords for long
            answer = await client.post("/talaria/settings/password", data={"now": "x", "new": NEW, "again": NEW})
            if answer.status_code == 429:
                break
        assert answer.status_code == 429

    run(house, "vera", case)
    assert [(one["who"], one["details"]["change"]) for one in house.audit()] == [("vera", "password")]
    tries = [one for one in entries(Trail(house.door.home)) if one["event"] == "refused"]
    assert len(tries) >= 3  # of the password now: before it was changed, and after
    assert {(one["who"], one["result"], one["details"]["change"]) for one in tries} == {("vera", "serious", "password")}


def test_whoever_may_not_see_a_page_or_asks_for_none_gets_a_page_that_says_so(house: House) -> None:
    house.add("vera", Role.VIEWER)

    async def case(client: httpx.AsyncClient) -> None:
        for path, status, said in (
            ("/talaria/settings/users", 403, "needs the role admin: vera has viewer"),
            ("/talaria/send", 403, "needs the role operator: vera has viewer"),
            ("/talaria/targets/a/<b>", 404, "there is no such page"),
            ("/talaria/nothing", 404, "there is no such page"),
        ):
            answer = await client.get(path)
            assert answer.status_code == status and words(answer.text).endswith(f"Talaria {said} Home page")
            assert answer.headers["content-security-policy"] and 'href="/talaria/"' in answer.text
            script = await client.get(path, headers={"Accept": "application/json"})
            assert script.status_code == status and script.json()["error"]
        of_the_api = await client.get("/talaria/api/v1/nothing")  # which answers no pages, whatever is accepted
        assert of_the_api.status_code == 404 and of_the_api.json()["error"] == "there is nothing here"

    run(house, "vera", case)


def test_an_admin_adds_changes_and_removes_users_but_not_himself(house: House) -> None:
    house.add("adam", Role.ADMIN)

    async def case(client: httpx.AsyncClient) -> None:
        async def change(status: int = 303, **form: str) -> str:
            answer = await client.post("/talaria/settings/users", data=form)
            assert answer.status_code == status, words(answer.text)
            return answer.text

        page = await change(422, do="add", name="<b>", role="operator", password=PASSWORD)
        assert "is not valid" in words(page) and "<b>" not in page and PASSWORD not in page
        assert fields(page)["name"] == "<b>"
        await change(do="add", name="olga", role="operator", password=PASSWORD)
        await change(do="add", name="paul", role="viewer", proxy="true")
        assert "a user named olga is there already" in words(
            await change(422, do="add", name="olga", role="viewer", password=PASSWORD)
        )
        await change(do="role", name="olga", role="admin")
        await change(do="password", name="olga", password=NEW)
        for form in ({"do": "role", "role": "viewer"}, {"do": "remove"}):
            assert "another admin has to do that" in words(await change(422, name="adam", **form))
        assert "with the one that you have now" in words(await change(422, name="adam", do="password", password=NEW))
        page = (await client.get("/talaria/settings/users")).text
        assert page.count('value="remove"') == page.count('value="password"') == 2
        await change(do="remove", name="paul")

    run(house, "adam", case)
    users = {one.name: one.role for one in house.door.keys.users.all()}
    assert users == {"adam": Role.ADMIN, "olga": Role.ADMIN}
    assert house.door.keys.users.verify("olga", NEW) and house.door.keys.users.verify("adam", PASSWORD)
    changes = [(one["who"], one["details"]["change"], one["details"]["name"]) for one in house.audit()]
    assert changes == [
        ("adam", "added", "olga"), ("adam", "added", "paul"), ("adam", "role", "olga"), ("adam", "password", "olga"),
        ("adam", "removed", "paul"),
    ]  # fmt: skip


def test_a_token_is_shown_once_works_and_is_revoked(house: House) -> None:
    house.add("adam", Role.ADMIN)

    async def case(client: httpx.AsyncClient) -> None:
        answer = await client.post(
            "/talaria/settings/tokens", data={"do": "create", "name": "night", "role": "viewer", "expires": "30d"}
        )
        secret = re.search(r"tal_[0-9a-f]{8}_[\w-]{43}", answer.text)
        assert secret and answer.headers["cache-control"] == "no-store"
        page = (await client.get("/talaria/settings/tokens")).text
        assert "night" in page and secret[0] not in page
        headers = {"Authorization": f"Bearer {secret[0]}", "Cookie": ""}
        assert (await client.get("/talaria/settings", headers=headers)).status_code == 200
        assert (await client.get("/talaria/settings/users", headers=headers)).status_code == 403
        wrong = await client.post("/talaria/settings/tokens", data={"do": "create", "role": "root", "expires": "30d"})
        assert wrong.status_code == 422 and "is not one of" in words(wrong.text)
        assert (await client.post("/talaria/settings/tokens", data={"do": "revoke", "id": "night"})).status_code == 303

    run(house, "adam", case)
    assert house.door.keys.tokens.all() == []


def test_the_audit_trail_is_read_filtered_and_verified(house: House) -> None:
    house.add("adam", Role.ADMIN)

    async def case(client: httpx.AsyncClient) -> None:
        form = {"do": "add", "name": "olga", "role": "viewer", "password": PASSWORD}
        await client.post("/talaria/settings/users", data=form)
        page = words((await client.get("/talaria/settings/audit?event=user-changed&who=adam")).text)
        assert "change: added, name: olga" in page
        assert "No entry matches." in words((await client.get("/talaria/settings/audit?who=nobody")).text)
        assert "none was altered" in words((await client.post("/talaria/settings/audit")).text)
        await asyncio.to_thread(altered, Path(Trail(house.door.home).path))
        assert "not as it was written" in words((await client.post("/talaria/settings/audit")).text)

    run(house, "adam", case)


def test_the_audit_trail_is_read_from_its_end_page_by_page(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.add("adam", Role.ADMIN)
    monkeypatch.setattr(settings, "SHOWN", 3)
    monkeypatch.setattr(settings, "LOOKED_B", 2000)
    for number in range(20):
        record(Event.QUERY if number else Event.STARTED, "olga", number=number)

    async def case(client: httpx.AsyncClient) -> None:
        async def pages(path: str) -> list[list[str]]:
            found = []
            for _ in range(40):
                page = (await client.get(path)).text
                found.append(re.findall(r"number: (\d+)", page))
                if not (older := re.search(r'href="([^"]+before=\d+)"', page)):
                    return found
                path = unescape(older[1])
            raise AssertionError(found)

        found = await pages("/talaria/settings/audit?who=olga")
        assert [number for some in found for number in some] == [str(number) for number in range(19, -1, -1)]
        assert found[0] == ["19", "18", "17"] and len(found) >= 7
        found = await pages("/talaria/settings/audit?event=started&who=olga")
        assert found[-1] == ["0"] and len(found) > 2 and not any(found[:-1])
        for before in ("0", "99999999999", "x", "²"):
            assert (await client.get(f"/talaria/settings/audit?before={before}")).status_code == 200
        await asyncio.to_thread(added, Path(Trail(house.door.home).path))
        assert "eve" in words((await client.get("/talaria/settings/audit")).text)
        assert "not as it was written" in words((await client.post("/talaria/settings/audit")).text)

    run(house, "adam", case)


def added(trail: Path) -> None:
    strange = b'{"time": 5, "details": "x"}\n{}\n[]\n' + b"x" * 1_000_000 + b'\n{"time": "once", "who": "eve"}\n'
    trail.write_bytes(trail.read_bytes() + strange)


def altered(trail: Path) -> None:
    trail.write_bytes(trail.read_bytes().replace(b"olga", b"omar"))


def test_the_document_names_every_page_and_its_role(house: House) -> None:
    text = (ROOT / "docs/pages.md").read_text()
    told = dict(re.findall(r"^\| `(/talaria/[^`]*)` \| (\w+) \|", text, re.M))
    declared = {
        re.sub(r"{(\w+)}", lambda found: found[1].upper(), route.path): role_of(route).label
        for route in house.door.gate.routes
        if "GET" in (getattr(route, "methods", None) or ()) and route.path.startswith("/talaria/")
    }
    assert {path: role for path, role in declared.items() if path in told} == told
    assert unescape(text).count("| `/talaria/") == len(told)
