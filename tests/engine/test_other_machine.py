"""Commands on a machine that is not the worker's: what they say comes from the server."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import pytest

from talaria.testing import studies
from tests.servers.up import Talaria

COUNT = 2500
pytestmark = pytest.mark.timeout(600)


def elsewhere(up: Talaria, home: Path, *arguments: str, code: int = 0, alone: bool = False) -> Any:
    """Run a command with another state directory, at the same server; `alone`: as a process of its own."""
    auth = (up.home / "worker.auth").read_text().strip()
    env = {"TALARIA_HOME": str(home), "PREFECT_API_URL": up.url, "PREFECT_API_AUTH_STRING": auth}
    ran = (up if alone else up.here)(*arguments, "--json", env=env)
    assert ran.returncode == code, ran
    return json.loads(ran.stdout)


def test_receipts_and_checks_are_read_where_the_worker_is_not(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 3)
    (tmp_path / "archive").mkdir()
    (tmp_path / "closed").write_text("no folder")
    up.apply(
        archive={"type": "folder", "folder": str(tmp_path / "archive")},
        closed={"type": "folder", "folder": str(tmp_path / "closed"), "max_attempts": 1},
    )
    there = tmp_path / "other home"
    sent = elsewhere(up, there, "send", str(tmp_path / "study"), "--to", "archive", "--all-items", alone=True)
    assert sent["state"] == "delivered" and sent["targets"]["archive"]["delivered"] == 3
    assert len(sent["targets"]["archive"]["items"]) == 3
    assert not (there / "receipts").exists()
    shown = elsewhere(up, there, "jobs", "show", sent["flow_run_id"], "--all-items")
    assert shown["targets"] == sent["targets"]
    failed = elsewhere(up, there, "send", str(tmp_path / "study"), "--to", "closed", code=1)
    assert failed["targets"]["closed"]["state"] == "failed" and failed["targets"]["closed"]["error"]
    tested = elsewhere(up, there, "target", "test", "archive")
    assert tested["ok"] and len(tested["probes"]) > 1
    bad = elsewhere(up, there, "target", "test", "closed", code=1)
    assert [probe for probe in bad["probes"] if probe["result"] == "failed" and probe["detail"]]
    listed = {one["name"]: one["last_check"] for one in elsewhere(up, there, "target", "list")["targets"]}
    assert listed["archive"]["ok"] is True and listed["closed"]["ok"] is False
    found = {one["name"]: one["last_check"] for one in elsewhere(up, there, "status")["targets"]}
    assert found["archive"]["ok"] is True and found["closed"]["ok"] is False
    # The worker keeps a copy; the server's is the one that is read.
    copy = up.home / "receipts" / f"{sent['flow_run_id']}.json"
    assert json.loads(copy.read_text())["targets"] == sent["targets"]
    copy.write_text("{}")
    assert up.told("jobs", "show", sent["flow_run_id"], "--all-items")["targets"] == sent["targets"]


def test_a_receipt_of_any_size_is_kept_whole(up: Talaria, tmp_path: Path) -> None:
    """Thousands of items whose names can't be compressed, and a retry after which only the new receipt is left."""
    study = tmp_path / "study"
    study.mkdir()
    for _ in range(COUNT):
        (study / secrets.token_hex(120)).write_bytes(b"x")
    (tmp_path / "archive").mkdir()
    up.apply(archive={"type": "folder", "folder": str(tmp_path / "archive")})
    sent = up.told("send", str(study), "--to", "archive", "--all-items")
    assert len(sent["targets"]["archive"]["items"]) == COUNT

    def parts() -> list[dict[str, Any]]:
        found = up.api(
            "POST",
            "/artifacts/filter",
            artifacts={"flow_run_id": {"any_": [sent["flow_run_id"]]}, "type": {"any_": ["result"]}},
        )
        return [one["metadata_"] for one in found]

    first = parts()
    assert len(first) > 1
    assert {int(one["part"]) for one in first} == set(range(int(first[0]["parts"])))
    again = up.told("jobs", "retry", sent["flow_run_id"])
    assert again["targets"]["archive"]["already"] == COUNT
    assert {one["set"] for one in parts()}.isdisjoint({one["set"] for one in first})
