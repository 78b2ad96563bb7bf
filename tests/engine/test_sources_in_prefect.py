"""Sources that people save, edit and remove through Prefect's pages: judged, scheduled and forgotten as by ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from talaria.testing import studies
from talaria.testing.process import free_port
from tests.engine.test_saved_in_prefect import ask, create, there
from tests.servers.up import Talaria
from transfer.spool import ReceivedUnit

pytestmark = pytest.mark.timeout(600)


def deployment(up: Talaria, name: str) -> httpx.Response:
    return ask(up, "GET", f"/deployments/name/batch/{name}", None)


def schedules(up: Talaria, name: str) -> list[str]:
    found = deployment(up, name)
    found.raise_for_status()
    return [one["schedule"].get("cron") or one["schedule"].get("interval") for one in found.json()["schedules"]]


@pytest.fixture
def shelf(up: Talaria, tmp_path: Path) -> str:
    """A target that what is dispatched goes to."""
    (tmp_path / "shelf").mkdir()
    name = f"kept-shelf-{uuid4().hex[:8]}"
    create(up, "folder-target", name, {"folder": str(tmp_path / "shelf")}).raise_for_status()
    return name


def test_a_source_has_the_schedule_that_it_is_saved_with(up: Talaria, tmp_path: Path, shelf: str) -> None:
    (tmp_path / "in").mkdir()
    data: dict[str, Any] = {"folder": str(tmp_path / "in"), "targets": [shelf], "watch": False, "cron": "0 2 * * *"}
    create(up, "inbox-source", "kept-night", data).raise_for_status()
    assert schedules(up, "kept-night") == ["0 2 * * *"]
    assert deployment(up, "kept-night").json()["parameters"] == {"source": "kept-night"}
    (document,) = there(up, "kept-night")
    path = f"/block_documents/{document['id']}"
    edit: dict[str, Any] = {"data": {"cron": "30 3 * * *"}, "merge_existing_data": True}
    assert ask(up, "PATCH", path, edit).status_code == 204
    assert schedules(up, "kept-night") == ["30 3 * * *"]
    edit = {"data": data | {"cron": "", "interval_s": 3600, "enabled": False}, "merge_existing_data": False}
    assert ask(up, "PATCH", path, edit).status_code == 204
    assert schedules(up, "kept-night") == [3600] and deployment(up, "kept-night").json()["paused"]
    assert up.told("source", "show", "kept-night")["schedule"] == ["every 3600 s, paused"]
    up.told("source", "resume", "kept-night")
    assert up.told("source", "show", "kept-night")["schedule"] == ["every 3600 s"]
    deployed = f"/deployments/{deployment(up, 'kept-night').json()['id']}"
    assert ask(up, "POST", f"{deployed}/pause_deployment", {}).status_code == 200  # as the switch of its page does
    assert up.told("source", "show", "kept-night")["schedule"] == ["every 3600 s, paused"]
    assert ask(up, "DELETE", path, None).status_code == 204
    assert deployment(up, "kept-night").status_code == 404 and there(up, "kept-night") == []


def test_a_source_that_can_not_be_used_is_not_saved(up: Talaria, tmp_path: Path, shelf: str) -> None:
    (tmp_path / "in").mkdir()
    data = {"folder": str(tmp_path / "in"), "targets": [shelf]}
    for wrong, why in (
        ({"targets": ["nobody-at-all"]}, "no target named nobody-at-all"),
        ({"folder": str(tmp_path / "shelf")}, f"of target {shelf} overlap: what is delivered would come again"),
        ({"folder": str(tmp_path / "none")}, "no such file or folder"),
        ({"rrule": "FREQ=DAILY;COUNT=3"}, "there is no such time from now on"),
        ({"folder": "relative"}, "is not an absolute path"),
    ):
        answer = create(up, "inbox-source", "kept-wrong", data | wrong)
        assert answer.status_code == 422 and why in answer.json()["detail"], answer.text
        assert there(up, "kept-wrong") == [] and deployment(up, "kept-wrong").status_code == 404
    answer = create(up, "dicom-source", "kept-wrong", {"port": up.port, "aet": "A", "targets": [shelf]})
    assert answer.status_code == 422 and "own pages and API are served on it" in answer.json()["detail"], answer.text
    create(up, "inbox-source", "kept-right", data).raise_for_status()
    path = f"/block_documents/{there(up, 'kept-right')[0]['id']}"
    answer = ask(up, "PATCH", path, {"data": {"targets": ["nobody-at-all"]}, "merge_existing_data": True})
    assert answer.status_code == 422 and "no target named nobody-at-all" in answer.json()["detail"]
    assert there(up, "kept-right")[0]["data"]["targets"] == [shelf]
    again = create(up, "inbox-source", "kept-twice", data)
    assert "of source kept-right overlap: each file must have one source" in again.json()["detail"]
    assert ask(up, "DELETE", path, None).status_code == 204


def test_a_listener_for_which_units_wait_is_not_removed(up: Talaria, tmp_path: Path, shelf: str) -> None:
    data = {"port": free_port(), "host": "127.0.0.1", "aet": "KEPT", "targets": [shelf], "settle_s": 604_800}
    create(up, "dicom-source", "kept-ct", data).raise_for_status()
    folder = up.home / "received" / "kept-ct" / ReceivedUnit("CT1", "KEPT", "127.0.0.1", "1.2").name
    studies.dicom(folder / "1.dcm")
    (document,) = there(up, "kept-ct")
    for path in (f"/block_documents/{document['id']}", f"/block_types/{document['block_type_id']}"):
        answer = ask(up, "DELETE", path, None)
        assert answer.status_code == 409, answer.text
        assert "source kept-ct: 1 units that it received are not delivered yet" in answer.json()["detail"]
    assert there(up, "kept-ct") and deployment(up, "kept-ct").status_code == 200
    (folder / "1.dcm").unlink()
    assert ask(up, "DELETE", f"/block_documents/{document['id']}", None).status_code == 204
    assert deployment(up, "kept-ct").status_code == 404
