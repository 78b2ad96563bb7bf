"""The front door of a running `talaria up`: who made a run, who reads secrets, and who listens."""

from __future__ import annotations

import asyncio
import json
import os

import httpx
import pytest
from websockets.asyncio.client import connect

from talaria import listener
from talaria.server import running
from tests.servers.up import Talaria
from transfer.home import Home

pytestmark = pytest.mark.timeout(600)


def token(up: Talaria, role: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {up.told('token', 'create', '--role', role, '--name', f'a-{role}')['token']}"}


def auth(up: Talaria, name: str) -> tuple[str, str]:
    user, _, password = (up.home / name).read_text().strip().partition(":")
    return user, password


def test_runs_say_who_made_them_and_roles_hold_for_prefect_s_api(up: Talaria) -> None:
    (deployment,) = up.api("POST", "/deployments/filter", flows={"name": {"any_": ["dispatch"]}})
    far = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2099-01-01T00:00:00+00:00"}}
    body = {"parameters": {"paths": ["/x"], "targets": ["y"]}, "state": far}
    path = f"{up.url}/deployments/{deployment['id']}/create_flow_run"
    viewer, operator = token(up, "viewer"), token(up, "operator")
    assert httpx.post(path, json=body, headers=viewer, timeout=60).status_code == 403
    made = httpx.post(path, json=body, headers=operator, timeout=60)
    assert made.status_code == 201
    assert made.json()["created_by"] == {"id": None, "type": "USER", "display_value": "a-operator"}
    seen = httpx.get(f"{up.url}/flow_runs/{made.json()['id']}", headers=viewer, timeout=60)
    assert seen.status_code == 200 and seen.json()["created_by"]["display_value"] == "a-operator"
    gone = httpx.delete(f"{up.url}/flow_runs/{made.json()['id']}", headers=operator, timeout=60)
    assert gone.status_code == 403
    up.api("DELETE", f"/flow_runs/{made.json()['id']}")


def test_secrets_are_answered_to_the_worker_only(up: Talaria) -> None:
    keys = {"access_key_id": "k", "secret_access_key": "hush"}
    up.apply(store={"type": "s3", "bucket": "studies", "region": "us-east-1", **keys})
    url, body = f"{up.url}/block_documents/filter", {"include_secrets": True}
    for name, status in (("api.auth", 403), ("worker.auth", 200)):
        answer = httpx.post(url, json=body, auth=auth(up, name), timeout=60)
        assert answer.status_code == status and ("hush" in answer.text) == (status == 200)
    masked = httpx.post(url, json={}, auth=auth(up, "api.auth"), timeout=60)
    assert masked.status_code == 200 and "hush" not in masked.text
    assert up.here("target", "remove", "store").returncode == 0


def test_prefect_s_ui_asks_for_nothing_and_reaches_nobody_else(up: Talaria) -> None:
    base = up.url.removesuffix("/api")
    with httpx.Client(base_url=base, timeout=60) as browser:
        first = browser.get("/v2/dashboard", headers={"Accept": "text/html"})
        assert first.status_code == 303 and first.headers["location"].startswith("/talaria/login")
        line = (up.home / "api.auth").read_text().strip()
        origin = {"Origin": base}
        assert browser.post("/talaria/login", data={"user": "", "password": line}, headers=origin).status_code == 303
        page = browser.get("/v2/", headers={"Accept": "text/html"}, follow_redirects=True)
        assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
        assert browser.get("/ui-settings").json()["auth"] is None
        cookie = {"Cookie": f"talaria_session={browser.cookies['talaria_session']}"}

    async def case() -> None:
        url = f"ws://127.0.0.1:{up.port}/api/events/out"
        subprotocols: list = ["prefect"]  # type: ignore[type-arg]
        async with connect(
            url,
            subprotocols=subprotocols,
            additional_headers=cookie,
            origin=base,
            proxy=None,  # type: ignore[arg-type]
        ) as there:
            await there.send(json.dumps({"type": "auth", "token": ""}))
            assert json.loads(await there.recv()) == {"type": "auth_success"}

    asyncio.run(case())


def test_the_record_names_the_socket_that_the_supervisor_holds(up: Talaria) -> None:
    assert up.process
    record = json.loads((up.home / "server.json").read_text())
    assert record["pid"] == up.process.pid and listener.is_ours(up.port, record["inode"], record["pid"])
    address = running(Home(up.home))
    assert address and address.url == up.url and address.front == up.url.removesuffix("/api")
    assert (up.home / "server.json").stat().st_mode & 0o777 == 0o600 and os.path.exists(f"/proc/{record['pid']}")
