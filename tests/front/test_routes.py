"""Every route of the whole application, Prefect's included, for whoever may not ask and for each role.

The routes are read from the applications themselves: one that a later Prefect adds is walked as well.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Mount

from talaria.front import pages
from talaria.front.access import Role, role_of
from talaria.front.api import routes as api_routes
from talaria.front.api import shared
from talaria.front.api.asking import Reach
from tests.front.door import Echo, FrontDoor, handshake
from transfer.home import Home


def words(text: str) -> list[str]:
    return text.split()


# What a viewer may call, one by one, as Prefect 3.9 has them: the list that the rules are held against.
READS = words(
    """
    flows/count flows/filter flows/paginate flow_runs/count flow_runs/lateness flow_runs/history flow_runs/filter
    flow_runs/paginate flow_runs/{id}/input/filter task_runs/count task_runs/history task_runs/filter task_runs/paginate
    deployments/filter deployments/paginate deployments/count saved_searches/filter logs/filter
    concurrency_limits/filter v2/concurrency_limits/filter block_types/filter block_documents/filter
    block_documents/count work_pools/filter work_pools/count work_pools/{name}/concurrency_status
    work_pools/{work_pool_name}/queues/filter work_pools/{work_pool_name}/workers/filter task_workers/filter
    work_queues/filter work_queues/{id}/concurrency_status artifacts/filter artifacts/latest/filter artifacts/count
    artifacts/latest/count block_schemas/filter variables/filter variables/count events/filter
    events/count-by/{countable} automations/filter automations/count templates/validate automations/templates/validate
    ui/flows/count-deployments ui/flows/next-runs ui/flow_runs/history ui/flow_runs/count-task-runs ui/schemas/validate
    ui/task_runs/dashboard/counts ui/task_runs/count
    """
)
OPERATES = words(
    """
    flow_runs/{id}/resume flow_runs/{id}/set_state flow_runs/bulk_set_state deployments/{id}/create_flow_run
    deployments/{id}/create_flow_run/bulk
    """
)
WORKS = words(
    """
    logs events concurrency_limits/increment concurrency_limits/decrement v2/concurrency_limits/increment
    v2/concurrency_limits/increment-with-lease v2/concurrency_limits/decrement
    v2/concurrency_limits/decrement-with-lease v2/concurrency_limits/leases/{lease_id}/renew
    work_pools/{name}/get_scheduled_flow_runs deployments/get_scheduled_flow_runs work_queues/{id}/get_runs
    work_pools/{work_pool_name}/workers/heartbeat
    """
)
OPEN = {"/api/health", "/api/ready"}

# Every page of ours, and every button on it (POST), by the role that it needs.
LOOK_AT = words(
    """
    GET: / dispatches dispatches/{id} dispatches/{id}/receipt dispatches/{id}/receipt.csv notifications
    notifications/{name} settings sources sources/{name} targets targets/{name}
    POST: settings/password
    """
)
WORK_ON = words(
    """
    GET: checks/{id} query query/{id} query/{id}/csv retrievals/{id} retrievals/{id}/csv send upload uploads/{id}
    uploads/{id}/plan
    POST: dispatches dispatches/{id}/send dispatches/{id}/{action} query query/{id} retrievals/{id}/{action} send
    notifications/{name}/test sources/{name}/retry sources/{name}/sweep sources/{name}/test targets/{name}/test upload
    uploads uploads/{id}/plan uploads/{id}/send uploads/{id}/{number}
    """
)
CHANGE = words(
    """
    GET: add-rule add-rule/{type} add-source add-source/{type} add-target add-target/{type} import
    notifications/{name}/duplicate notifications/{name}/edit settings/audit settings/tokens settings/users
    sources/{name}/duplicate sources/{name}/edit targets/{name}/duplicate targets/{name}/edit
    POST: add-rule/{type} add-source/{type} add-target/{type} import import/{id} notifications/{name}/edit
    notifications/{name}/enable notifications/{name}/remove settings/audit settings/tokens
    settings/users sources/{name}/edit sources/{name}/enable sources/{name}/remove targets/{name}/delete
    targets/{name}/edit targets/{name}/enable targets/{name}/rename
    """
)


def walk(routes: list[Any], before: str = "") -> Iterator[tuple[str, list[str], str]]:
    """Yield kind (`http`, `websocket`), methods and path of every route, whatever holds it."""
    for route in routes:
        included = getattr(route, "original_router", None)  # FastAPI 0.137 and later keep an included router whole
        if included is not None:
            yield from walk(included.routes, before + str(getattr(route, "prefix", "") or ""))
        elif isinstance(route, Mount):
            yield from walk(route.routes, before + route.path)
        elif getattr(route, "methods", None):
            yield "http", sorted(route.methods - {"HEAD"}), before + re.sub(r":\w+}", "}", route.path)
        elif hasattr(route, "path"):
            yield "websocket", [], before + re.sub(r":\w+}", "}", route.path)


@pytest.fixture(scope="module")
def prefects() -> list[tuple[str, list[str], str]]:
    from prefect.server.api.server import create_app

    return list(walk(create_app().routes))


def expected(method: str, path: str) -> Role:
    short = path.removeprefix("/api/").rstrip("/")
    if method == "GET":
        return Role.NOBODY if path in OPEN else Role.VIEWER
    if method == "POST" and short in READS:
        return Role.VIEWER
    if method == "POST" and short in OPERATES:
        return Role.OPERATOR
    if method == "POST" and short in WORKS:
        return Role.WORKER
    return Role.ADMIN


def test_the_walk_reaches_all_of_prefect(prefects: list[tuple[str, list[str], str]]) -> None:
    http = {(method, path) for kind, methods, path in prefects for method in methods if kind == "http"}
    assert len(http) > 180 and len([1 for kind, _, _ in prefects if kind == "websocket"]) == 5
    posts = {path.removeprefix("/api/").rstrip("/") for method, path in http if method == "POST"}
    assert posts >= {*READS, *OPERATES, *WORKS}
    assert {("GET", "/ui-settings"), ("GET", "/api/health"), ("PUT", "/api/admin/storage")} <= http


def test_every_route_for_no_login_viewer_operator_wrong_host_and_foreign_origin(
    prefects: list[tuple[str, list[str], str]], tmp_path: Path
) -> None:
    door = FrontDoor(tmp_path / "home")
    own = [(method, path) for _, methods, path in walk(list(door.gate.routes)) for method in methods]
    asked = [(method, path) for kind, methods, path in prefects if kind == "http" for method in methods]
    viewer, operator, admin = (door.token(role) for role in (Role.VIEWER, Role.OPERATOR, Role.ADMIN))
    wrong: list[Any] = []

    async def case() -> None:
        async with door.browser() as client:

            async def status(method: str, path: str, headers: dict[str, str]) -> int:
                return (await client.request(method, path, headers=headers)).status_code

            for method, pattern in asked:
                path = re.sub(r"{[^}]*}", "00000000-0000-0000-0000-000000000001", pattern)
                need = expected(method, pattern)
                got = [
                    await status(method, path, {}),
                    *[await status(method, path, one) for one in (viewer, operator, admin, door.worker)],
                    await status(method, path, {**door.worker, "Host": "evil.example"}),
                    await status(method, path, {**door.worker, "Origin": "http://evil.example"}),
                ]
                right = [200 if need is Role.NOBODY else 401]
                right += [
                    200 if role >= need else 403 for role in (Role.VIEWER, Role.OPERATOR, Role.ADMIN, Role.WORKER)
                ]
                if got != [*right, 421, 403]:
                    wrong.append((method, pattern, got))
            for method, path in own:
                assert await status(method, path, {"Host": "evil.example"}) == 421
                assert await status(method, path, {"Origin": "http://evil.example"}) == 403

    asyncio.run(case())
    assert wrong == []


def test_every_websocket(prefects: list[tuple[str, list[str], str]], tmp_path: Path) -> None:
    door = FrontDoor(tmp_path / "home")
    words = {
        role: {"type": "auth", "token": door.token(role)["Authorization"].split()[1]}
        for role in (Role.VIEWER, Role.OPERATOR, Role.ADMIN)
    }
    worker = {"type": "auth", "token": (door.home.root / "worker.auth").read_text().strip()}

    async def case() -> None:
        for pattern in [path for kind, _, path in prefects if kind == "websocket"]:
            path = re.sub(r"{[^}]*}", "x", pattern)
            reads = path in ("/api/events/out", "/api/logs/out")
            for word in words.values():
                assert (await handshake(door, path, word))[0] == ("open" if reads else "closed"), path
            assert (await handshake(door, path, worker))[0] == "open"
            assert (await handshake(door, path, {"type": "auth", "token": ""}))[0] == "closed"
            assert (await handshake(door, path, worker, Host="evil.example"))[0] == "refused"
            assert (await handshake(door, path, worker, Origin="http://evil.example"))[0] == "refused"

    asyncio.run(case())


def test_every_route_of_our_own_api(tmp_path: Path) -> None:
    """What a role lacks is refused by the gate, before anything of the API runs; each route declares what it needs."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    reach = Reach(shared(Echo()), Home(home), embedded=True, url="")  # type: ignore[arg-type]
    door = FrontDoor(home, [*pages.routes(reach), *api_routes(reach)])
    tokens = {role: door.token(role) for role in (Role.VIEWER, Role.OPERATOR)}
    seen: list[Role] = []

    async def case() -> None:
        async with door.browser() as client:

            async def status(method: str, path: str, headers: dict[str, str]) -> int:
                return (await client.request(method, path, headers=headers)).status_code

            for method, pattern, need in declared(list(door.gate.routes)):
                path = re.sub(r"{[^}]*}", "x", pattern)
                seen.append(need)
                assert await status(method, path, {**door.worker, "Host": "evil.example"}) == 421, path
                assert await status(method, path, {**door.worker, "Origin": "http://evil.example"}) == 403, path
                if need > Role.NOBODY:
                    assert await status(method, path, {}) == 401, path
                for role, headers in tokens.items():
                    if role < need:
                        assert await status(method, path, headers) == 403, (method, path)

    asyncio.run(case())
    assert {Role.VIEWER, Role.OPERATOR, Role.ADMIN} <= set(seen) and len(seen) > 20


def declared(routes: list[Any], before: str = "") -> Iterator[tuple[str, str, Role]]:
    """Yield method, path and needed role of each route of ours."""
    for route in routes:
        if isinstance(route, Mount):
            yield from declared(list(route.routes), before + route.path)
        else:
            for method in sorted(route.methods - {"HEAD"}):
                yield method, before + re.sub(r":\w+}", "}", route.path), role_of(route)


def test_every_page_and_button_stands_in_the_table_of_roles(tmp_path: Path) -> None:
    """And the gate refuses them to whoever has less: the test above walks the same routes."""
    table: dict[tuple[str, str], Role] = {("GET", "/talaria"): Role.VIEWER}
    for role, listed in ((Role.VIEWER, LOOK_AT), (Role.OPERATOR, WORK_ON), (Role.ADMIN, CHANGE)):
        method = ""
        for word in listed:
            if word.endswith(":"):
                method = word.removesuffix(":")
            else:
                table[method, f"/talaria/{word.removeprefix('/')}"] = role
    reach = Reach(shared(Echo()), Home(tmp_path), embedded=True, url="")  # type: ignore[arg-type]
    assert {(method, path): role for method, path, role in declared(pages.routes(reach))} == table
