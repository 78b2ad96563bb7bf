"""Several hosts: two Prefect servers on PostgreSQL, four workers on two hosts, one ledger."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest

from talaria.engine.recovery import CRASHES
from talaria.testing import studies
from talaria.testing.process import as_loaded
from talaria.testing.relay import relay
from tasks.dispatch.breaker import LIMIT as LIMIT_OF_BREAKER
from tests.servers.dcmtk import storescp
from tests.servers.prefect_servers import Servers, prefect_servers
from tests.servers.scp import scp
from tests.servers.up import Talaria

DISPATCHES = int(os.environ.get("TALARIA_TEST_DISPATCHES", "1000"))
LEASE_S = 20
LIMIT = 4  # dispatches at once in a worker
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def deployment(servers: Servers, number: int) -> str:
    found = servers.api("GET", "/deployments/name/dispatch/talaria", number)
    return str(found["id"])


def states(servers: Servers, number: int) -> Counter[str]:
    """How many runs are in which state."""
    found = Counter[str]()
    for kind in ("SCHEDULED", "PENDING", "RUNNING", "COMPLETED", "FAILED", "CRASHED", "CANCELLED", "CANCELLING"):
        count = servers.api(
            "POST",
            "/flow_runs/count",
            number,
            {"flow_runs": {"state": {"type": {"any_": [kind]}}}, "flows": {"name": {"any_": ["dispatch"]}}},
        )
        found[kind] = int(count)
    return found


def until_all(servers: Servers, number: int, count: int, seconds: float) -> None:
    """Wait until so many runs are Completed."""
    end = time.monotonic() + as_loaded(seconds)
    while (now := states(servers, number))["COMPLETED"] < count:
        assert time.monotonic() < end, f"waited in vain: {now}"
        time.sleep(1)


def begun_again(servers: Servers, number: int) -> list[Any]:
    """The dispatches that were begun more than once, though nobody who ran one of them had died."""
    found, flows = list[Any](), {"name": {"any_": ["dispatch"]}}
    while page := servers.api(
        "POST", "/flow_runs/filter", number, {"flows": flows, "limit": 200, "offset": len(found), "sort": "ID_DESC"}
    ):
        found += page
    return [one for one in found if one["run_count"] > 1 and not one["labels"].get(CRASHES)]


def unfinished(servers: Servers) -> list[Any]:
    with psycopg.connect(servers.ledger, options="-c search_path=talaria") as ledger:
        return ledger.execute("SELECT flow_run_id, owner FROM runs WHERE ended IS NULL").fetchall()


def known(servers: Servers) -> set[str]:
    with psycopg.connect(servers.ledger, options="-c search_path=talaria") as ledger:
        return {str(uid) for (uid,) in ledger.execute("SELECT sop_instance_uid FROM items").fetchall()}


def test_a_server_and_a_host_die_and_nothing_is_lost_or_sent_twice(tmp_path: Path) -> None:
    """Two workers and their server are killed in the middle; the other host's clock is a minute ahead."""
    sources = tmp_path / "sources"
    for number in range(DISPATCHES):
        studies.ct(sources / f"{number:04}", 1)
    settings = {
        "TALARIA_SHARED_SOURCES": str(sources),
        "TALARIA_LEASE": str(LEASE_S),
        "TALARIA_LIMIT": str(LIMIT),
    }
    with (
        scp(keep_data=False) as sink,
        prefect_servers(tmp_path) as servers,
        servers.host("first", 0, "--workers", "2", **settings) as first,
        servers.host("second", 1, "--workers", "2", ahead_s=60, **settings) as second,
    ):
        target = {"type": "dicom", "host": "127.0.0.1", "port": sink.port, "aet_target": sink.aet}
        second.apply(pacs=target | {"max_attempts": 8, "idle_timeout_s": 60, "max_dispatches": 64})
        dispatch = deployment(servers, 1)

        def create(number: int) -> None:
            parameters = {"paths": [str(sources / f"{number:04}")], "targets": ["pacs"]}
            body = {"parameters": parameters, "name": f"to pacs {number}"}
            servers.api("POST", f"/deployments/{dispatch}/create_flow_run", 1, body)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(create, range(DISPATCHES)))
        end = time.monotonic() + as_loaded(600)
        while len(sink.kept) < DISPATCHES // 3:
            assert time.monotonic() < end, (len(sink.kept), states(servers, 1))
            time.sleep(0.2)
        servers.processes[0].kill()
        first.kill()
        arrived = set(sink.kept)
        unheard = arrived - known(servers)  # confirmed to who was killed before the ledger had it
        until_all(servers, 1, DISPATCHES, 3 * DISPATCHES + 300)
        assert len(sink.kept) == DISPATCHES and known(servers) == set(sink.kept)
        assert set(sink.repeated) <= unheard and len(sink.repeated) <= 2 * LIMIT
        assert unfinished(servers) == [] and begun_again(servers, 1) == []
        assert states(servers, 1) == Counter({"COMPLETED": DISPATCHES})


def test_hosts_share_what_they_know_of_a_target_and_the_line_before_it(tmp_path: Path) -> None:
    """What one host finds dead the other doesn't try, and a slot that one gives back goes to who waits at the other.

    What one has kept of a dispatch that was given up is sent by that one, whichever is asked.
    """
    shared = {"TALARIA_SHARED_SOURCES": str(tmp_path / "shared"), "TALARIA_SHARED_PLACES": str(tmp_path / "places")}
    with (
        storescp(tmp_path / "pacs") as pacs,
        relay(pacs.port, stall_after=0) as link,
        prefect_servers(tmp_path, 1) as servers,
        servers.host("first", 0, **shared) as first,
        servers.host("second", 0, **shared) as second,
    ):
        studies.ct(tmp_path / "long", 40)
        studies.ct(tmp_path / "short", 1)
        silent = {"type": "dicom", "host": "127.0.0.1", "port": link.port, "aet_target": "STORESCP", "max_attempts": 50}
        waits = {"retry_delay_s": 5, "idle_timeout_s": 1, "max_dispatches": 8}
        (tmp_path / "busy").mkdir()
        busy = {"type": "folder", "folder": str(tmp_path / "busy"), "max_dispatches": 1, "concurrency": 1}
        first.apply(silent=silent | waits, busy=busy | {"bandwidth_limit": 1024})

        def state(run_id: str) -> Any:
            return servers.api("GET", f"/flow_runs/{run_id}", 0)["state"]

        def send(host: Talaria, study: str, to: str) -> str:
            return str(host.told("send", str(tmp_path / study), "--to", to, "--no-wait")["flow_run_id"])

        def breaker(host: Talaria) -> Any:
            return {one["name"]: one["breaker"] for one in host.told("target", "list")["targets"]}["silent"]

        holds = send(first, "long", "busy")
        runs = [send(first, "short", "silent") for _ in range(LIMIT_OF_BREAKER)]
        second.until(lambda: breaker(first)["state"] == "open", 180)
        second.until(lambda: breaker(second) == breaker(first))  # of one failure more, one of them hears before
        assert breaker(second)["failures"] >= LIMIT_OF_BREAKER
        runs.append(send(second, "short", "silent"))
        second.until(lambda: "silent to answer, which it hasn't since" in (state(runs[-1])["message"] or ""))
        second.until(lambda: state(holds)["type"] == "RUNNING" and list((tmp_path / "busy").iterdir()))
        waiting = send(second, "short", "busy")
        second.until(lambda: "a slot at busy" in (state(waiting)["message"] or ""))
        first.told("jobs", "cancel", holds)
        second.until(lambda: state(waiting)["type"] == "COMPLETED")
        names = [one["name"] for one in servers.api("GET", f"/flow_run_states/?flow_run_id={waiting}", 0)]
        assert ("AwaitingRetry", "AwaitingRetry") in pairwise(names), names  # called while it rested
        link.stall_after = None
        second.until(lambda: all(state(run)["type"] == "COMPLETED" for run in runs), 180)
        assert breaker(first) == breaker(second) == {"state": "closed"}

        studies.ct(tmp_path / "shared" / "study", 2)
        places = {name: tmp_path / "places" / name for name in ("lost", "found")}
        (tmp_path / "places" / "found").mkdir(parents=True)
        first.apply(**{name: {"type": "folder", "folder": str(path)} for name, path in places.items()})
        given_up = send(first, "shared/study", "lost")
        first.until(lambda: state(given_up)["type"] == "FAILED")
        has_files = first if (first.home / "failed" / given_up).exists() else second
        asked = second if has_files is first else first
        shutil.rmtree(tmp_path / "shared" / "study")
        sent = asked.told("jobs", "send", given_up, "--to", "found")
        assert sent["state"] == "delivered" and sent["targets"]["found"]["delivered"] == 2
        queue = f"normal@{'first' if has_files is first else 'second'}"
        assert servers.api("GET", f"/flow_runs/{sent['flow_run_id']}", 0)["work_queue_name"] == queue
        places["lost"].mkdir()
        assert asked.told("jobs", "retry", given_up)["state"] == "delivered"
        own = asked.told("jobs", "send", waiting, "--to", "found")  # of a folder of the second host's
        assert own["state"] == "delivered"
        assert servers.api("GET", f"/flow_runs/{own['flow_run_id']}", 0)["work_queue_name"] == "normal@second"
