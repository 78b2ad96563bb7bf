"""Killed at any moment, worker, server, both, or the machine: nothing is lost, nothing confirmed is sent twice."""

from __future__ import annotations

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
import pytest

from talaria.testing import studies
from talaria.testing.process import as_loaded
from tests.servers.scp import scp
from tests.servers.steps import Store
from tests.servers.up import Talaria

WORKER, SERVER = "talaria.engine.worker", "talaria.front"
# What is killed, in any order; one of the worker costs some 3 s of CPU, of the server 10, of the machine 25.
ROUND = ("server", "machine", "both") + 17 * ("worker",)
EACH, FILES = 2, 4  # dispatches before each kill, instances of each
SLOW_S = 0.03  # for an instance, at the peer
WAIT_S = 300  # until the runs go on after a kill; a server starts in 10 where nothing else runs
UNDER_WAY = ("SCHEDULED", "PENDING", "RUNNING", "CANCELLING", "PAUSED")


class Sender:
    """Sends small studies by Prefect's API, as somebody who asks again as long as nobody answers."""

    def __init__(self, up: Talaria) -> None:
        self.up, self.runs = up, list[str]()
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
        studies.ct(self.up.folder / name, FILES)
        asked = {"paths": [str(self.up.folder / name)], "targets": [target]}
        body = {"parameters": asked, "idempotency_key": name}
        self.runs.append(str(self.ask("POST", f"/deployments/{self.deployment}/create_flow_run", body)["id"]))
        return self.runs[-1]

    def count(self, *states: str) -> int:
        """How many dispatches are in one of these states."""
        body = {"flow_runs": {"state": {"type": {"any_": states}}, "id": {"any_": self.runs}}}
        return int(self.ask("POST", "/flow_runs/count", body))


def kill(up: Talaria, what: str) -> None:
    if what == "machine":  # what was written then is what it starts with
        assert up.process
        every = [psutil.Process(up.process.pid), *up.children()]
        for one in every:
            one.suspend()
        shutil.copytree(up.home, up.folder / "disk")
        up.kill()
        shutil.rmtree(up.home)
        (up.folder / "disk").rename(up.home)
        up.start()
        return
    marks = {"worker": [WORKER], "server": [SERVER], "both": [WORKER, SERVER]}[what]
    for child in up.children():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if any(mark in part for part in child.cmdline() for mark in marks):
                child.kill()


def open_runs(up: Talaria) -> int:
    """How many runs have not ended, for the ledger."""
    with closing(sqlite3.connect(up.home / "ledger.sqlite")) as ledger:
        return int(ledger.execute("SELECT COUNT(*) FROM runs WHERE ended IS NULL").fetchone()[0])


@pytest.mark.parametrize("kills", [len(ROUND), pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.timeout(7200)
def test_every_run_ends_and_nothing_is_lost_or_sent_twice(tmp_path: Path, kills: int) -> None:
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
            up.start()
            again = {"max_attempts": 50, "retry_delay_s": 0.2, "retry_max_delay_s": 1}
            up.apply(pacs={"type": "dicom", "host": "127.0.0.1", "port": pacs.port, "aet_target": pacs.aet, **again})
            with closing(Sender(up)) as sender:
                order: list[str] = []
                for _ in range(kills):
                    order = order or chance.sample(ROUND, len(ROUND))
                    for _ in range(EACH):
                        sender.send("pacs")
                    if chance.random() < 0.3:  # a run that is being stopped ends, too
                        run = chance.choice(sender.runs[-EACH:])
                        sender.ask("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
                    seen = len(came)
                    time.sleep(chance.uniform(0, 1))  # no waiting for anything: any moment is right
                    kill(up, order.pop())
                    # One goes on before the next kill, which else might hit processes that have only begun to start.
                    up.until(lambda seen=seen: len(came) > seen or not sender.count(*UNDER_WAY), WAIT_S, alive=True)  # type: ignore[misc]
                up.until(lambda: not sender.count(*UNDER_WAY), WAIT_S, alive=True)
                ended = {state: sender.count(state) for state in ("COMPLETED", "CANCELLED")}
                assert sum(ended.values()) == len(sender.runs), ended
                up.until(lambda: not list((up.home / "staging").iterdir()))
                # A worker that was killed between the two leaves it to the next one to note that the run has ended.
                up.until(lambda: not open_runs(up), WAIT_S, alive=True)
        finally:
            up.stop()
    with closing(sqlite3.connect(up.home / "ledger.sqlite")) as ledger:
        rows = ledger.execute("SELECT sop_instance_uid, outcome, attempts, time FROM items").fetchall()
    assert {outcome for _, outcome, _, _ in rows} == {"delivered"} and {attempts for _, _, attempts, _ in rows} == {1}
    assert len(rows) >= ended["COMPLETED"] * FILES
    twice = [uid for uid, _, _, confirmed in rows if max(came[uid]) > confirmed]
    assert not twice, f"{len(twice)} of {len(rows)} were sent again after the ledger had them (seed {seed})"
