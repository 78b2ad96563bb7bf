"""Targets that are dead among others that live: dispatches to these run as if those were not there."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from talaria.testing import studies
from tasks.dispatch.breaker import LIMIT
from tests.engine.material import folder
from tests.servers.up import Talaria

EACH = 20  # dispatches to each target
LIVE = [f"alive{number}" for number in range(6)]
DEAD = ["refusing", "hanging"]
AT_ONCE = 2  # dispatches to a target
# A test of a dead target comes after an hour: what is tried before, the breaker has not kept from it.
WAITS = {"max_attempts": 9, "retry_delay_s": 3600, "retry_max_delay_s": 86_400, "idle_timeout_s": 2}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@contextmanager
def silence() -> Iterator[tuple[int, list[Any]]]:
    """Accept connections and say nothing; yields the port, and all connections."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        kept: list[Any] = []

        def accept() -> None:
            with suppress(OSError):
                while True:
                    kept.append(listener.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listener.getsockname()[1], kept
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for one in kept:
                one.close()


def test_the_living_never_wait_behind_the_dead(up: Talaria, tmp_path: Path) -> None:
    order = [name for name in (*LIVE, *DEAD) for _ in range(EACH)]
    random.Random(14).shuffle(order)
    order = [name for name in DEAD for _ in range(LIMIT)] + order  # the worst of orders begins with the dead
    studies.ct(tmp_path / "study", 1)
    with silence() as (port, connections):
        dead = {"type": "dicom", "host": "127.0.0.1", "aet_target": "PACS", "max_dispatches": AT_ONCE, **WAITS}
        up.apply(
            **{name: folder(tmp_path / name, max_dispatches=AT_ONCE) for name in LIVE},
            refusing=dead | {"port": 1},
            hanging=dead | {"port": port},
        )
        deployment = up.api("GET", "/deployments/name/dispatch/talaria")["id"]
        runs: dict[str, list[str]] = {name: [] for name in (*LIVE, *DEAD)}
        for number, name in enumerate(order):
            source = tmp_path / "studies" / str(number)
            source.mkdir(parents=True)
            (source / "image.dcm").hardlink_to(next((tmp_path / "study").glob("*.dcm")))
            asked = {"paths": [str(source)], "targets": [name]}
            made = up.api("POST", f"/deployments/{deployment}/create_flow_run", parameters=asked)
            runs[name].append(str(made["id"]))
        living = [run for name in LIVE for run in runs[name]]
        waiting = [run for name in DEAD for run in runs[name]]

        def count(ids: list[str], *states: str) -> int:
            found = {"id": {"any_": ids}, "state": {"type": {"any_": states}}}
            return int(up.api("POST", "/flow_runs/count", flow_runs=found))

        up.until(lambda: count(living, "COMPLETED") == len(living), 600)
        # Each has come, and waits for its target: none of them holds a place of the worker.
        found = {"id": {"any_": waiting}, "state": {"name": {"any_": ["AwaitingRetry"]}}}
        up.until(lambda: up.api("POST", "/flow_runs/count", flow_runs=found) == len(waiting), 300)
        # Until its breaker opened, it was tried as often as it takes dispatches at once. An attempt asks twice.
        assert LIMIT <= len(connections) <= 2 * (LIMIT + AT_ONCE - 1)
        for run in waiting:
            up.api("POST", f"/flow_runs/{run}/set_state", state={"type": "CANCELLED"}, force=True)
