"""Queries and checks that are stopped while their peer is silent."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.engine.material import folder, go_on
from tests.engine.test_states import named, put
from tests.servers.up import Talaria

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a peer that takes every connection, and never says anything."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=64)) as server:
        yield server.getsockname()[1]


def begun(up: Talaria, flow: str, **parameters: Any) -> str:
    """Begin a run, and wait until it is under way."""
    deployment = up.api("GET", f"/deployments/name/{flow}/talaria")["id"]
    run_id = str(up.api("POST", f"/deployments/{deployment}/create_flow_run", parameters=parameters)["id"])
    up.until(lambda: named(up, run_id) == "Running", 60)
    return run_id


def given(up: Talaria, run_id: str, kind: str, name: str | None = None) -> None:
    """Set a state of a run, as Prefect's UI or another client does."""
    up.api("POST", f"/flow_runs/{run_id}/set_state", state={"type": kind, "name": name}, force=True)


def test_a_query_and_a_check_that_are_stopped_end_though_their_peer_is_silent(
    up: Talaria, silent: int, tmp_path: Path
) -> None:
    peer = {"type": "dicom", "host": "127.0.0.1", "port": silent, "aet_target": "MUTE", "max_attempts": 1}
    up.apply(mute=peer | {"direction": "query", "idle_timeout_s": 600}, well=folder(tmp_path / "well"))
    cancelled, paused = (begun(up, "find", source="mute", accessions=number) for number in ("M1", "M2"))
    check, failed = (begun(up, "check", target="mute") for _ in range(2))
    given(up, cancelled, "CANCELLING")
    given(up, paused, "RUNNING", "Pausing")
    given(up, check, "CANCELLING")
    put(up, failed, "Failed")
    ends = {cancelled: "Cancelled", paused: "Paused", check: "Cancelled", failed: "Failed"}
    up.until(lambda: {one: named(up, one) for one in ends} == ends, 30)
    assert up.run(cancelled)["state"]["message"].endswith("the query was cancelled")
    # Both places of checks are free, and one that was paused goes on.
    assert up.told("target", "test", "well")["ok"]
    go_on(up, paused)
    up.until(lambda: named(up, paused) == "Running", 60)
    given(up, paused, "CANCELLING")
    up.until(lambda: named(up, paused) == "Cancelled", 30)
