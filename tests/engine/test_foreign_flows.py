"""A worker runs Talaria's flows and nothing else, whatever a deployment at its server says."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.servers.up import Talaria

pytestmark = pytest.mark.timeout(600)


def test_a_deployment_that_names_foreign_code_runs_none_of_it(up: Talaria, tmp_path: Path) -> None:
    user, _, password = (up.home / "api.auth").read_text().strip().partition(":")
    made = tmp_path / "foreign"
    with httpx.Client(base_url=up.url, auth=(user, password), timeout=300, trust_env=False) as api:
        flow = api.post("/flows/", json={"name": "foreign"}).raise_for_status().json()
        deployment = {"name": "f", "flow_id": flow["id"], "work_pool_name": "talaria", "work_queue_name": "normal"}
        # Importing the module alone would already run it.
        (tmp_path / "foreign_code.py").write_text(f"open({str(made)!r}, 'w')\n")
        deployment |= {"entrypoint": "foreign_code:flow", "path": str(tmp_path)}
        found = api.post("/deployments/", json=deployment).raise_for_status().json()
        run = api.post(f"/deployments/{found['id']}/create_flow_run", json={}).raise_for_status().json()

        def state() -> dict[str, str]:
            answer: dict[str, str] = api.get(f"/flow_runs/{run['id']}").json()["state"]
            return answer

        up.until(lambda: state()["type"] in ("FAILED", "COMPLETED", "CRASHED"), 120)
        assert state()["type"] == "FAILED"
        assert "not one of Talaria's flows" in state()["message"]
    assert not made.exists()
    assert up.here("status").returncode == 0  # the worker goes on


def test_a_parameter_that_a_flow_has_not_fails_the_run_in_words(up: Talaria) -> None:
    """It crashed, twenty times: an automation, or a script, with a word that is not written right."""
    deployment = up.api("GET", "/deployments/name/dispatch/talaria")["id"]
    asked = {"paths": ["/nowhere"], "targets": ["pacs"], "exlude": "*.png"}
    run = up.api("POST", f"/deployments/{deployment}/create_flow_run", parameters=asked)["id"]
    up.until(lambda: up.run(run)["state"]["type"] in ("FAILED", "CRASHED", "COMPLETED"))
    state = up.run(run)["state"]
    assert state["type"] == "FAILED"
    assert state["message"].startswith("Not run: dispatch has no parameter exlude; it has paths, targets, exclude, ")
