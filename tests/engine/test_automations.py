"""The automations of `deployments/automations`, at a real Prefect server: they call a webhook, and retry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.server.events.schemas.automations import AutomationCore, EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent

from talaria.testing import studies
from tests.engine.material import folder
from tests.servers.receiver import receiver
from tests.servers.up import Talaria

FOLDER = Path(__file__).parents[2] / "deployments/automations"


def automation(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return found


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_prefect_takes_each_file(path: Path) -> None:
    AutomationCore.model_validate(automation(path.name))


@pytest.mark.parametrize(
    ("deployment", "flow", "retried"), [(True, "dispatch", True), (False, "dispatch", False), (True, "retrieve", False)]
)
def test_only_what_a_worker_takes_is_retried(deployment: bool, flow: str, retried: bool) -> None:
    """A dispatch that belongs to a retrieval has no deployment: set to AwaitingRetry, it would wait for ever."""
    run = {"prefect.resource.id": "prefect.flow-run.1", "prefect.run-count": "1"}
    related = [
        {"prefect.resource.id": "prefect.flow.1", "prefect.resource.role": "flow", "prefect.resource.name": flow}
    ]
    if deployment:
        role = {"prefect.resource.role": "deployment", "prefect.resource.name": "talaria"}
        related.append({"prefect.resource.id": "prefect.deployment.1", **role})
    event = ReceivedEvent(
        occurred=datetime.now(UTC), event="prefect.flow-run.Failed", resource=run, related=related, id=uuid4()
    )
    trigger = AutomationCore.model_validate(automation("retry-failed.yaml")).trigger
    assert isinstance(trigger, EventTrigger) and trigger.covers(event) is retried


@pytest.fixture
def made(up: Talaria) -> Iterator[list[str]]:
    """The ids of automations that are removed at the end."""
    ids: list[str] = []
    yield ids
    for one in ids:
        up.api("DELETE", f"/automations/{one}")


def test_a_failure_at_a_target_calls_a_webhook_with_its_counts(up: Talaria, made: list[str], tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    up.apply(hooked_gone=folder(tmp_path / "gone", max_attempts=1, retry_delay_s=0), hooked=folder(tmp_path / "there"))
    (tmp_path / "gone").rmdir()
    (kind,) = up.api("POST", "/block_types/filter", block_types={"slug": {"any_": ["webhook"]}})
    (schema,) = up.api(
        "POST", "/block_schemas/filter", block_schemas={"block_type_id": {"any_": [kind["id"]]}}, limit=1
    )
    with receiver() as hook:
        data = {"url": hook.url, "method": "POST", "headers": {}, "allow_private_urls": True, "verify": True}
        block = {"name": "on-failure", "data": data, "block_schema_id": schema["id"], "block_type_id": kind["id"]}
        block_id = up.api("POST", "/block_documents/", **block)["id"]
        try:
            wanted = automation("webhook-on-failure.yaml")
            wanted["actions"][0]["block_document_id"] = block_id
            wanted["trigger"]["match"]["prefect.resource.id"] = "talaria.target.hooked*"
            made.append(up.api("POST", "/automations/", **wanted)["id"])
            run = up.told("send", str(tmp_path / "study"), "--to", "hooked-gone,hooked", code=1)["flow_run_id"]
            up.until(lambda: hook.taken)
            found = hook.taken[0].document
        finally:
            up.api("DELETE", f"/block_documents/{block_id}")
    assert found["text"].startswith("hooked-gone: talaria.dispatch.failed (") and found["run"] == run
    assert (found["delivered"], found["unsent"], found["bytes"]) == (0, 2, 0) and found["seconds"] >= 0
    assert str(tmp_path) not in json.dumps(found) and len(hook.taken) == 1


@pytest.mark.slow
def test_a_failed_dispatch_is_retried_a_while_later_and_sends_what_is_missing(
    up: Talaria, made: list[str], tmp_path: Path
) -> None:
    studies.ct(tmp_path / "study", 2)
    up.apply(later_there=folder(tmp_path / "later", max_attempts=1, retry_delay_s=0))
    (tmp_path / "later").rmdir()
    wanted = automation("retry-failed.yaml")
    wanted["trigger"]["within"] = 10
    made.append(up.api("POST", "/automations/", **wanted)["id"])
    run = up.told("send", str(tmp_path / "study"), "--to", "later-there", code=1)["flow_run_id"]
    (tmp_path / "later").mkdir()
    up.until(lambda: up.run(run)["state"]["type"] == "COMPLETED")
    assert up.run(run)["run_count"] == 2
