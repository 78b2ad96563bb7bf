"""Logging in and out: users and their passwords, sessions and their end, and how often somebody may try."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from talaria.front import login
from talaria.front.access import Role
from talaria.front.login import FROM_ONE_ADDRESS, OF_ONE_NAME, WINDOW_S, Attempts
from talaria.front.sessions import LIFETIME_S
from tests.front.door import PASSWORD, FrontDoor

pytestmark = pytest.mark.usefixtures("quick_passwords")
Case = Callable[[], Coroutine[Any, Any, None]]
ORIGIN = {"Origin": "http://127.0.0.1:4200"}


@pytest.fixture
def door(tmp_path: Path) -> FrontDoor:
    one = FrontDoor(tmp_path / "home")
    one.keys.users.add("anna", Role.OPERATOR, PASSWORD)
    return one


def run(case: Case) -> None:
    asyncio.run(case())


async def log_in(client: httpx.AsyncClient, user: str, password: str, **more: str) -> httpx.Response:
    return await client.post("/talaria/login", data={"user": user, "password": password, **more}, headers=ORIGIN)


def test_a_session_is_a_cookie_that_scripts_of_pages_and_other_sites_never_see(door: FrontDoor) -> None:
    async def case() -> None:
        async with door.browser() as client:
            page = await client.get("/talaria/login?next=/v2/runs")
            assert page.status_code == 200 and 'value="/v2/runs"' in page.text
            answer = await log_in(client, "anna", PASSWORD, next="/v2/runs")
            assert (answer.status_code, answer.headers["location"]) == (303, "/v2/runs")
            cookie = answer.headers["set-cookie"].lower()
            for part in ("httponly", "samesite=strict", "path=/", f"max-age={LIFETIME_S}"):
                assert part in cookie
            assert "secure" not in cookie
            assert (await client.get("/api/flows/x")).status_code == 200
            assert (await client.post("/api/flow_runs/1/resume", headers=ORIGIN)).status_code == 200
            assert (await client.post("/api/flow_runs/1/resume")).status_code == 403  # from no page of ours
            same = {"Sec-Fetch-Site": "same-origin"}
            assert (await client.post("/api/flow_runs/1/resume", headers=same)).status_code == 200
            foreign = {"Origin": "http://evil.example"}
            assert (await client.post("/api/flow_runs/1/resume", headers=foreign)).status_code == 403

    run(case)
    assert door.heard[0] == ("login", "anna", "127.0.0.1")


def test_behind_tls_the_cookie_is_for_tls_only(tmp_path: Path) -> None:
    door = FrontDoor(tmp_path / "home", tls=True, hosts=frozenset({"talaria.example"}))
    door.keys.users.add("anna", Role.VIEWER, PASSWORD)

    async def case() -> None:
        async with door.browser("192.0.2.7", "https://talaria.example") as client:
            form = {"user": "anna", "password": PASSWORD}
            answer = await client.post("/talaria/login", data=form, headers={"Origin": "https://talaria.example"})
            cookie = answer.headers["set-cookie"]
            assert cookie.startswith("__Host-talaria_session=") and "Secure" in cookie
            assert "max-age" in answer.headers["strict-transport-security"]
            assert (await client.get("/api/flows/x")).status_code == 200
            plain = {"Cookie": cookie.split(";")[0].replace("__Host-", "")}
            client.cookies.clear()
            assert (await client.get("/api/flows/x", headers=plain)).status_code == 401

    run(case)


def test_logout_password_role_and_removal_end_every_copy_of_a_session(door: FrontDoor) -> None:
    async def copies(client: httpx.AsyncClient) -> list[int]:
        return [(await client.get("/api/flows/x", headers={"Cookie": one})).status_code for one in kept]

    kept: list[str] = []

    async def case() -> None:
        async with door.browser() as client:

            async def begin() -> None:
                kept[:] = [(await log_in(client, "anna", PASSWORD)).headers["set-cookie"].split(";")[0]]
                client.cookies.clear()
                assert await copies(client) == [200]

            await begin()
            asked = await client.get("/talaria/logout", headers={"Cookie": kept[0]})
            assert "<strong>anna</strong>" in asked.text and await copies(client) == [200]
            foreign = {"Cookie": kept[0], "Origin": "http://evil.example"}
            assert (await client.post("/talaria/logout", headers=foreign)).status_code == 403
            done = await client.post("/talaria/logout", headers={"Cookie": kept[0], **ORIGIN})
            assert done.status_code == 303 and await copies(client) == [401]
            await begin()
            door.keys.users.change("anna", role=Role.VIEWER)
            assert await copies(client) == [401]
            await begin()
            door.keys.users.change("anna", password="another password")
            assert await copies(client) == [401]
            assert (await log_in(client, "anna", PASSWORD)).status_code == 401
            door.keys.users.change("anna", password=PASSWORD)
            await begin()
            kept.append(kept[0][:-2] + ("aa" if not kept[0].endswith("aa") else "bb"))
            assert await copies(client) == [200, 401]
            kept.pop()
            door.keys.users.remove("anna")
            assert await copies(client) == [401]

    run(case)


def test_a_session_ends_with_the_day(door: FrontDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    import itsdangerous.timed

    anna = door.keys.of_login("anna", PASSWORD, local=True)
    assert anna
    cookie = door.keys.session_for(anna)
    assert cookie and door.keys.sessions.read(cookie)
    now = itsdangerous.timed.time.time()
    monkeypatch.setattr(itsdangerous.timed.time, "time", lambda: now + LIFETIME_S + 2)
    assert door.keys.sessions.read(cookie) is None


@pytest.mark.parametrize("whole", [True, False])
def test_without_users_the_machine_s_own_token_is_the_password(tmp_path: Path, whole: bool) -> None:
    door = FrontDoor(tmp_path / "home")
    line = (door.home.root / "api.auth").read_text().strip()
    user, _, password = line.partition(":")

    async def case() -> None:
        async with door.browser() as client:
            given = ("", line) if whole else (user, password)
            assert (await log_in(client, *given)).status_code == 303
            assert (await client.patch("/api/deployments/1", headers=ORIGIN)).status_code == 200
            cookie = client.cookies["talaria_session"]
        async with door.browser("192.0.2.7") as client:
            assert (await log_in(client, "", line)).status_code == 401
            assert (
                await client.get("/api/flows/x", headers={"Cookie": f"talaria_session={cookie}"})
            ).status_code == 401

    run(case)


@pytest.mark.parametrize(
    "goal",
    [
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "javascript:alert(1)",
        "/a\nb",
        "",
    ],
)
def test_a_login_leads_nowhere_else(door: FrontDoor, goal: str) -> None:
    async def case() -> None:
        async with door.browser() as client:
            answer = await log_in(client, "anna", PASSWORD, next=goal)
            assert (answer.status_code, answer.headers["location"]) == (303, "/")
            page = await client.get("/talaria/login", params={"next": '/"><script>'})
            assert "<script>" not in page.text

    run(case)


def test_logins_are_limited_by_name_and_by_address(door: FrontDoor) -> None:
    async def case() -> None:
        async with door.browser() as client:
            # Many at once don't get by.
            answers = await asyncio.gather(*(log_in(client, "anna", "wrong" * 3) for _ in range(OF_ONE_NAME + 3)))
            assert sorted(one.status_code for one in answers) == [401] * OF_ONE_NAME + [429] * 3
            refused = await log_in(client, "anna", PASSWORD)
            assert refused.status_code == 429 and 0 < int(refused.headers["retry-after"]) <= WINDOW_S + 1
            client.cookies.clear()
            for _ in range(FROM_ONE_ADDRESS - OF_ONE_NAME):
                await log_in(client, f"nobody{_}", "wrong")
            assert (await log_in(client, "ben", "wrong")).status_code == 429
        async with door.browser("192.0.2.7") as client:
            assert (await log_in(client, "ben", "wrong")).status_code == 401

    run(case)
    assert ("login refused", "anna", "127.0.0.1") in door.heard


def test_behind_a_proxy_who_fails_to_log_in_closes_the_login_for_no_other(tmp_path: Path) -> None:
    door = FrontDoor(tmp_path / "home", hosts=frozenset({"talaria.example"}), peers=("10.0.0.0/24",))
    door.keys.users.add("anna", Role.OPERATOR, PASSWORD)

    async def case() -> None:
        async with door.browser("10.0.0.9", "http://talaria.example") as client:

            async def attempt(forwarded: str, user: str, password: str = "wrong") -> int:
                headers = {"Origin": "https://talaria.example", "X-Forwarded-For": forwarded}
                form = {"user": user, "password": password}
                return (await client.post("/talaria/login", data=form, headers=headers)).status_code

            for number in range(FROM_ONE_ADDRESS):  # they may write what they like before what the proxy has seen
                assert await attempt(f"192.0.2.{number + 50}, 192.0.2.1", f"nobody{number}") == 401
            for same in ("192.0.2.1", "192.0.2.1:50123", "::ffff:192.0.2.1", "192.0.2.2,[::ffff:192.0.2.1]:5"):
                assert await attempt(same, "ben") == 429
            assert await attempt("192.0.2.1, 192.0.2.2", "anna", PASSWORD) == 303
            assert await attempt("2001:db8::7%eth0", "ben") == await attempt("[2001:db8::7]:5", "ben") == 401
            assert await attempt("unknown", "ben") == 401

    run(case)
    assert ("login refused", "nobody7", "192.0.2.1") in door.heard and ("login", "anna", "192.0.2.2") in door.heard
    assert [address for _, name, address in door.heard[-3:] if name == "ben"] == ["2001:db8::7"] * 2 + ["10.0.0.9"]


def test_without_a_proxy_nobody_says_from_where_they_come(door: FrontDoor) -> None:
    async def case() -> None:
        async with door.browser() as client:
            for number in range(FROM_ONE_ADDRESS):
                client.headers["X-Forwarded-For"] = f"192.0.2.{number}"
                assert (await log_in(client, f"nobody{number}", "wrong")).status_code == 401
            assert (await log_in(client, "ben", "wrong")).status_code == 429

    run(case)
    assert {address for _, _, address in door.heard} == {"127.0.0.1"}


def test_attempts_are_forgotten_with_time_and_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    attempts = Attempts(lambda: now[0])
    for _ in range(OF_ONE_NAME):
        assert attempts.wait_s("a", "anna") == 0
        attempts.begin("a", "anna")
        now[0] += 1
    assert attempts.wait_s("a", "anna") > 0 and attempts.wait_s("a", "ben") == 0
    now[0] += WINDOW_S
    assert attempts.wait_s("a", "anna") == 0
    monkeypatch.setattr(login, "REMEMBERED", 10)
    for number in range(50):
        attempts.begin(f"address {number}", f"name {number}")
    assert len(attempts._failed) == 10


@pytest.mark.parametrize("password", [" correct horse battery", "correct horse battery\t", "  correct  battery "])
def test_blanks_at_the_ends_of_a_password_are_of_it(door: FrontDoor, password: str) -> None:
    door.keys.users.add("ben", Role.VIEWER, password)

    async def case() -> None:
        async with door.browser() as client:
            assert (await log_in(client, "ben", password)).status_code == 303
            client.cookies.clear()
            assert (await log_in(client, "ben", password.strip())).status_code == 401

    run(case)


def test_a_login_is_no_form_of_any_size(door: FrontDoor) -> None:
    async def case() -> None:
        async with door.browser() as client:
            for body in (b"user=" + b"a" * 10_000, b"\xff\xfe", b"a" * 100, b"&".join([b"a=b"] * 50)):
                answer = await client.post("/talaria/login", content=body, headers=ORIGIN)
                assert answer.status_code == 400
            twice = b"user=anna&user=ben&password=" + PASSWORD.encode()
            assert (await client.post("/talaria/login", content=twice, headers=ORIGIN)).status_code == 400
            assert (await log_in(client, "anna", "x" * 5000)).status_code == 401

    run(case)


def test_a_token_ends_with_its_time(door: FrontDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    from talaria.front import tokens

    one, text = door.keys.tokens.create(Role.VIEWER, 60, "script")
    assert door.keys.tokens.verify(text)
    for wrong in (text[:-1], text + "a", text.replace(one.id, "00000000"), "", "tal_", text.upper()):
        assert door.keys.tokens.verify(wrong) is None
    now = tokens.time.time()
    monkeypatch.setattr(tokens.time, "time", lambda: now + 61)
    assert door.keys.tokens.verify(text) is None
    with pytest.raises(ValueError, match="no token other"):
        door.keys.tokens.revoke("other")
    assert door.keys.tokens.revoke("script").id == one.id and door.keys.tokens.all() == []
    assert tokens.seconds_of("90d") == 90 * 86400 and tokens.seconds_of("never") is None
    for wrong in ("", "90", "0d", "-1d", "1y", "99999d"):
        with pytest.raises(ValueError, match="expected a number"):
            tokens.seconds_of(wrong)
