"""Killed at any moment, worker, server, both, or the machine: nothing is lost, nothing confirmed is sent twice."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import threading
import time
from collections import defaultdict
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pydicom
import pytest

from talaria.engine.recovery import CRASHES
from talaria.testing import studies
from talaria.testing.process import as_loaded
from tests.servers.scp import scp
from tests.servers.steps import Store
from tests.servers.up import Talaria

WORKER, SERVER = "talaria.engine.worker", "talaria.front"
# What is killed, in any order; one of the worker costs some 3 s of CPU, of the server 10, of the machine 25.
ROUND = ("server", "machine", "both") + 17 * ("worker",)
EACH, FILES = 2, 4  # dispatches before each kill, instances of each
SLOW_S = 0.1  # for an instance, at the peer: else most kills find nothing under way
WAIT_S = 300  # until the runs go on after a kill; a server starts in 10 where nothing else runs
UNDER_WAY = ("SCHEDULED", "PENDING", "RUNNING", "CANCELLING", "PAUSED")
MOST = 100  # runs that are asked for at once


class Sender:
    """Sends small studies by Prefect's API, as somebody who asks again as long as nobody answers.

    Attributes:
        sent: the instances of each run.
        stopped: the runs that were asked to end.
    """

    def __init__(self, up: Talaria) -> None:
        self.up, self.runs = up, list[str]()
        self.sent, self.stopped = dict[str, set[str]](), set[str]()
        user, _, password = (up.home / "api.auth").read_text().strip().partition(":")
        self.client = httpx.Client(auth=(user, password), timeout=30)
        self.deployment = up.api("GET", "/deployments/name/dispatch/talaria")["id"]

    def close(self) -> None:
        self.client.close()

    def ask(self, method: str, path: str, body: Any) -> Any:
        end = time.monotonic() + as_loaded(WAIT_S)
        while True:
            with suppress(httpx.HTTPError, ValueError):
                answer = self.client.request(method, self.up.url + path, json=body)
                if answer.is_success:
                    return answer.json()
            assert time.monotonic() < end, f"{method} {path}\n{self.up.log.read_text()[-3000:]}"
            time.sleep(0.1)

    def send(self, target: str) -> str:
        name = f"study{len(self.runs)}"
        paths = studies.ct(self.up.folder / name, FILES)
        asked = {"paths": [str(self.up.folder / name)], "targets": [target]}
        body = {"parameters": asked, "idempotency_key": name}
        self.runs.append(str(self.ask("POST", f"/deployments/{self.deployment}/create_flow_run", body)["id"]))
        found = (pydicom.dcmread(path, specific_tags=["SOPInstanceUID"]) for path in paths)
        self.sent[self.runs[-1]] = {str(one.SOPInstanceUID) for one in found}
        return self.runs[-1]

    def stop(self, run: str) -> None:
        self.stopped.add(run)
        self.ask("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})

    def all_runs(self) -> list[Any]:
        """The runs as the server has them."""
        found = list[Any]()
        for begin in range(0, len(self.runs), MOST):
            body = {"flow_runs": {"id": {"any_": self.runs[begin : begin + MOST]}}, "limit": MOST}
            found += self.ask("POST", "/flow_runs/filter", body)
        return found

    def count(self, *states: str) -> int:
        """How many dispatches are in one of these states."""
        body = {"flow_runs": {"state": {"type": {"any_": states}}, "id": {"any_": self.runs}}}
        return int(self.ask("POST", "/flow_runs/count", body))


def kill(up: Talaria, what: str, workers: int, chance: random.Random) -> bool:
    """Kill it, of several workers one; return False if it is not there, because it has not been started again yet."""
    if what == "machine":  # what was written then is what it starts with
        assert up.process
        every = [psutil.Process(up.process.pid), *up.children()]
        for one in every:
            one.suspend()
        shutil.copytree(up.home, up.folder / "disk")
        up.kill()
        shutil.rmtree(up.home)
        (up.folder / "disk").rename(up.home)
        up.start("--workers", str(workers))
        return True
    found: dict[str, list[psutil.Process]] = {WORKER: [], SERVER: []}
    for child in up.children():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            for mark in found:
                found[mark] += [child] if any(mark in part for part in child.cmdline()) else []
    victims = found[SERVER] if what != "worker" else []
    if found[WORKER] and what != "server":
        victims += found[WORKER] if what == "both" else [chance.choice(found[WORKER])]
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    return bool(victims)


def open_runs(up: Talaria) -> int:
    """How many runs have not ended, for the ledger."""
    with closing(sqlite3.connect(up.home / "ledger.sqlite")) as ledger:
        return int(ledger.execute("SELECT COUNT(*) FROM runs WHERE ended IS NULL").fetchone()[0])


@pytest.mark.parametrize(
    ("kills", "workers"),
    [
        (len(ROUND), 1),
        pytest.param(200, 1, marks=pytest.mark.slow),
        pytest.param(2 * len(ROUND), 2, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(7200)
def test_every_run_ends_and_nothing_is_lost_or_sent_twice(tmp_path: Path, kills: int, workers: int) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    came: defaultdict[str, list[float]] = defaultdict(list)  # when an instance reached the peer, each time

    def store(request: Store) -> int:
        came[request.SOPInstanceUID].append(time.time())
        threading.Event().wait(SLOW_S)
        return 0

    up = Talaria(tmp_path)
    with scp(on_store=store, keep_data=False) as pacs:
        try:
            up.start("--workers", str(workers))
            tries = {"max_attempts": 50, "retry_delay_s": 0.2, "retry_max_delay_s": 1, "concurrency": 1}
            # What a worker held is free when its leases have ended, after a minute, unless it was alone.
            tries |= {"max_dispatches": 2 if workers == 1 else 64}
            up.apply(pacs={"type": "dicom", "host": "127.0.0.1", "port": pacs.port, "aet_target": pacs.aet, **tries})
            with closing(Sender(up)) as sender:
                order, begun = list[str](), time.monotonic()
                for number in range(kills):
                    order = order or chance.sample(ROUND, len(ROUND))
                    for _ in range(EACH):
                        sender.send("pacs")
                    if chance.random() < 0.3:  # a run that is being stopped ends, too
                        sender.stop(chance.choice(sender.runs[-EACH:]))
                    time.sleep(chance.uniform(0, 1))  # no waiting for anything: any moment is right
                    what = order.pop()
                    up.until(lambda what=what: kill(up, what, workers, chance), WAIT_S, alive=True)  # type: ignore[misc]
                    seen = len(came)
                    print(f"{time.monotonic() - begun:.0f} s: kill {number + 1}, {what}")
                    # One goes on before the next kill, which else might hit processes that have only begun to start.
                    up.until(lambda seen=seen: len(came) > seen or not sender.count(*UNDER_WAY), WAIT_S, alive=True)  # type: ignore[misc]
                up.until(lambda: not sender.count(*UNDER_WAY), WAIT_S, alive=True)
                found = sender.all_runs()
                up.until(lambda: not list((up.home / "staging").iterdir()))
                # A worker that was killed between the two leaves it to the next one to note that the run has ended.
                up.until(lambda: not open_runs(up), WAIT_S, alive=True)
        finally:
            up.stop()
    with closing(sqlite3.connect(up.home / "ledger.sqlite")) as ledger:
        rows = ledger.execute("SELECT sop_instance_uid, outcome, attempts, time FROM items").fetchall()
    states = {one["id"]: one["state"]["type"] for one in found}
    completed = {run for run in sender.runs if states[run] == "COMPLETED"}
    others = {run: states[run] for run in sender.runs if run not in completed}
    assert set(others.values()) <= {"CANCELLED"} and others.keys() <= sender.stopped, f"{others} (seed {seed})"
    receipts = {json.loads((up.home / "receipts" / f"{run}.json").read_text())["state"] for run in completed}
    assert receipts == {"delivered"}
    assert {outcome for _, outcome, _, _ in rows} == {"delivered"} and {attempts for _, _, attempts, _ in rows} == {1}
    whole = set[str]().union(*(sender.sent[run] for run in completed))
    lost = whole - came.keys(), whole - {uid for uid, *_ in rows}
    assert lost == (set(), set()), f"not at the peer, not in the ledger: {lost} (seed {seed})"
    twice = [uid for uid, _, _, confirmed in rows if max(came[uid]) > confirmed]
    assert not twice, f"{len(twice)} of {len(rows)} were sent again after the ledger had them (seed {seed})"
    again = sum(len(times) > 1 for times in came.values())
    hit = sum(int(one["labels"].get(CRASHES, 0)) for one in found)
    print(
        f"{len(completed)} completed, {len(others)} cancelled; {hit} times a run was taken up; {again} instances again"
    )
    assert hit > kills // 10, "nearly all kills found nothing under way"
