"""What Talaria works with at Prefect's server stays, whatever people remove through Prefect's pages; theirs goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.engine.material import folder, later
from tests.engine.test_saved_in_prefect import ask, create
from tests.servers.up import Talaria

pytestmark = pytest.mark.timeout(600)


def deployment(up: Talaria, name: str) -> Any:
    return up.api("GET", f"/deployments/name/{name}")


def test_what_talaria_works_with_is_not_removed(up: Talaria, tmp_path: Path) -> None:
    """With the queue, or the pool, runs that waited were never begun; with the deployment they failed as they came."""
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "a.txt").write_text("a")
    (tmp_path / "in").mkdir()
    up.apply(own_parts=folder(tmp_path / "shelf", window=later(2)))
    inbox = {"folder": str(tmp_path / "in"), "targets": ["own-parts"], "watch": False, "cron": "0 2 * * *"}
    answer = create(up, "inbox-source", "own-parts", inbox)
    assert answer.status_code == 201, answer.text
    waits = up.told("send", str(tmp_path / "study"), "--to", "own-parts", "--no-wait")["flow_run_id"]
    before = up.run(waits)
    flow, ours, sweeps = before["flow_id"], before["deployment_id"], deployment(up, "batch/own-parts")["id"]
    queue = up.api("GET", "/work_pools/talaria/queues/normal")["id"]
    every: dict[str, Any] = {"deployments": {"tags": {"all_": ["talaria"]}}}
    for method, path, body, why in (
        ("DELETE", "/work_pools/talaria", None, "stand in the work pool talaria"),
        ("DELETE", "/work_pools/talaria/queues/normal", None, "come into the queue normal"),
        ("DELETE", f"/work_queues/{queue}", None, "come into the queue normal"),
        ("DELETE", f"/deployments/{ours}", None, "dispatch/talaria is Talaria's own"),
        ("DELETE", f"/deployments/{sweeps}", None, "sweeps the source own-parts"),
        ("DELETE", f"/flows/{flow}", None, "the flow dispatch is Talaria's own"),
        ("POST", "/flows/bulk_delete", {"flows": {"id": {"any_": [flow]}}}, "the flow dispatch is Talaria's own"),
        ("POST", "/deployments/bulk_delete", every, "the deployment "),
    ):
        answer = ask(up, method, path, body)
        assert answer.status_code == 409 and why in answer.json()["detail"], f"{path}: {answer.text}"
    after = up.run(waits)
    assert {key: after[key] for key in ("work_queue_name", "deployment_id")} == {
        "work_queue_name": "normal",
        "deployment_id": ours,
    }
    up.told("source", "remove", "own-parts")
    assert ask(up, "GET", f"/deployments/{sweeps}", None).status_code == 404


def test_what_people_have_made_beside_it_goes(up: Talaria) -> None:
    ours, name = deployment(up, "dispatch/talaria"), f"theirs-{uuid4().hex[:8]}"
    theirs = {key: ours[key] for key in ("flow_id", "entrypoint", "work_pool_name", "work_queue_name")}
    made = [up.api("POST", "/deployments/", name=f"{name}-{number}", **theirs)["id"] for number in range(2)]
    assert ask(up, "DELETE", f"/deployments/{made[0]}", None).status_code == 204
    many = {"deployments": {"id": {"any_": [made[1]]}}}
    assert ask(up, "POST", "/deployments/bulk_delete", many).json()["deleted"] == [made[1]]
    for queue in (name, f"normal@{name}"):
        up.api("POST", "/work_pools/talaria/queues", name=queue)
        assert ask(up, "DELETE", f"/work_pools/talaria/queues/{queue}", None).status_code == 204
    up.api("POST", "/work_pools/", name=name, type="process")
    assert ask(up, "DELETE", f"/work_pools/{name}", None).status_code == 204
    assert ask(up, "DELETE", f"/work_queues/{uuid4()}", None).status_code == 404
    assert ask(up, "POST", "/flows/bulk_delete", {"flows": {"id": {"any_": [str(uuid4())]}}}).json()["deleted"] == []
    for odd in ({"deployments": {"id": {"any_": ["none"]}}}, {"deployments": 5}, ["deployments"]):
        assert ask(up, "POST", "/deployments/bulk_delete", odd).status_code == 422  # Prefect's own words
    assert ask(up, "DELETE", f"/flows/{'-' * 36}", None).status_code in (404, 422)
