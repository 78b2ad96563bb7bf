"""What lists and pages say of runs, from what the ledger and the receipt know and from how the run ended."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast
from uuid import uuid4

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.objects import State as RunState
from prefect.states import Completed, Failed

from talaria.service import Office, standings
from transfer.deliveries import Standing
from transfer.home import Home
from transfer.ledger import Ledger

SOURCE, TARGETS = {"source": "pacs", "targets": ["arch"]}, {"targets": ["arch", "pacs"], "paths": ["/x"]}


def run(state: RunState[None], **parameters: object) -> FlowRun:
    """Return a run that has ended so."""
    return FlowRun(flow_id=uuid4(), parameters=parameters, state=state, state_type=state.type, end_time=state.timestamp)


def says(home: Path, one: FlowRun, whole: str = "", *parts: Standing) -> str:
    """Return what a list says beside how a run stands, and the run as a whole as `whole` was noted."""
    office = Office(cast(PrefectClient, None), Home(home))
    if whole:
        with Ledger(office.home.ledger) as ledger:
            ledger.deliveries.stand(str(one.id), whole, parts)
    (line,) = asyncio.run(standings.lines(office, [one]))
    return str(line["says"])


def test_a_list_says_why_a_run_failed_where_no_target_does(tmp_path: Path) -> None:
    why = "no source named pacs"
    assert says(tmp_path, run(Failed(message=why), **SOURCE)) == why
    assert says(tmp_path, run(Failed(message=why), **SOURCE), "failed") == why
    assert says(tmp_path, run(Completed(message="1 studies found"), **SOURCE), "delivered") == "1 studies found"
    assert says(tmp_path, run(Failed(message=why), paths=["/x"], targets=[])) == why


def test_a_list_says_nothing_twice(tmp_path: Path) -> None:
    known = [Standing("arch", "delivered", 1, 1, ""), Standing("pacs", "failed", 1, 0, "nobody answers")]
    assert says(tmp_path, run(Failed(message="pacs failed: nobody answers"), **TARGETS), "partial", *known) == ""
