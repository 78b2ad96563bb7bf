"""A worker's looks: one that goes wrong ends no worker."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import httpx
import pytest
from prefect.client.orchestration import PrefectClient

from talaria.engine import worker as workers
from talaria.engine.worker import Worker
from transfer.home import Home
from transfer.lease import Lease
from transfer.ledger import Ledger


@pytest.mark.parametrize("error", [AttributeError("'str' has no pop"), httpx.ConnectError("away")])
def test_a_look_that_fails_is_made_again(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged file of one run ended each worker, as soon as it looked."""
    looks: list[str] = []
    twice = asyncio.Event()

    async def fails() -> None:
        looks.append("failed")
        if looks.count("failed") == 2:
            twice.set()
        raise error

    async def works(*about: object) -> None:
        looks.append("worked")

    monkeypatch.setattr(workers, "BLIND_S", 0.0)
    monkeypatch.setattr(workers, "NET_S", 0.0)
    monkeypatch.setattr(logging.getLogger("prefect"), "propagate", True)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        server = cast(PrefectClient, SimpleNamespace())
        worker = Worker(server, "talaria", Home(tmp_path), ledger, cast(Lease, None), limit=0)
        monkeypatch.setattr(worker, "_take_over", works)
        monkeypatch.setattr(worker, "_end_late", lambda: None)
        monkeypatch.setattr(worker, "_look", fails)
        monkeypatch.setattr(worker._looking_back, "look", works)

        async def until_twice() -> None:
            looking = asyncio.create_task(worker._look_again())
            await asyncio.wait({looking, asyncio.ensure_future(twice.wait())}, return_when=asyncio.FIRST_COMPLETED)
            assert not looking.done()
            looking.cancel()

        asyncio.run(until_twice())
    assert looks.count("worked") >= 2  # the looks behind the one that fails are made
    told = [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert bool(told) is not isinstance(error, httpx.HTTPError)
