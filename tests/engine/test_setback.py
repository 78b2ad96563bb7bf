"""A clock that was ahead and is set right: what rests until a time of then comes at once, and waits for nothing."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import PrefectClient

from talaria.engine import setback
from talaria.engine.setback import APART_S, SetBack
from tasks.dispatch.rest import Left, unread
from transfer.ledger import Ledger

HOUR_S = 3600.0


def test_what_came_to_rest_in_the_future_comes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[UUID] = []
    looks: list[Any] = []

    async def bring_forward(client: Any, ledger: Any, run_id: UUID, has_begun: Any) -> None:
        called.append(run_id)

    def resting(ahead_s: float) -> Any:
        state = SimpleNamespace(timestamp=datetime.now(UTC) + timedelta(seconds=ahead_s))
        return SimpleNamespace(id=uuid4(), state=state)

    before, since, active = resting(-HOUR_S), resting(HOUR_S), resting(HOUR_S)

    async def read(**given: Any) -> list[Any]:
        looks.append(given)
        return [before, since, active]

    monkeypatch.setattr(setback, "bring_forward", bring_forward)
    client = cast(PrefectClient, SimpleNamespace(read_flow_runs=read))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        look, monotonic = SetBack(), time.monotonic()

        def looked() -> None:
            asyncio.run(look.look(client, ledger, "talaria", {active.id}, lambda run: False))

        looked()
        assert called == [since.id]
        looked()
        assert len(looks) == 1  # it costs the server a request
        real = time.time
        monkeypatch.setattr(setback.time, "time", lambda: real() - 2 * APART_S)
        looked()
        assert len(looks) == 2
        looked()
        assert len(looks) == 2
        monkeypatch.setattr(setback.time, "monotonic", lambda: monotonic + HOUR_S)
        looked()
        assert len(looks) == 3


def test_what_was_noted_in_the_future_is_waited_for_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for run, ahead_s in (("ahead", HOUR_S), ("now", 0.0)):
            with monkeypatch.context() as patch:
                patch.setattr(time, "time", lambda ahead_s=ahead_s: real() + ahead_s)
                now = time.time()
                left = Left(attempts=1, again=now + 60, tried=now, since=now)
                ledger.rests.keep(run, "home", json.dumps({"left": {"pacs": asdict(left)}, "unread": True}))
        found = {run: (unread(ledger, run) or {})["pacs"] for run in ("ahead", "now")}
    assert found["now"].again > real() and found["ahead"].again == 0.0
    assert max(found["ahead"].since, found["ahead"].tried) <= real()
