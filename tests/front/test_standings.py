"""What lists and pages say of runs, from what the ledger and the receipt know and from how the run ended."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.objects import State as RunState
from prefect.states import Completed, Failed

from talaria.front.pages.acting import actions
from talaria.service import Office, standings
from transfer.deliveries import Standing
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.receipt import State, overall

SOURCE, TARGETS = {"source": "pacs", "targets": ["arch"]}, {"targets": ["arch", "pacs"], "paths": ["/x"]}


def run(state: RunState[None], **parameters: object) -> FlowRun:
    """Return a run that has ended so."""
    return FlowRun(flow_id=uuid4(), parameters=parameters, state=state, state_type=state.type, end_time=state.timestamp)


def listed(home: Path, one: FlowRun, whole: str = "", *parts: Standing) -> dict[str, Any]:
    """Return what a list shows of a run of which, as a whole, `whole` was noted."""
    office = Office(cast(PrefectClient, None), Home(home))
    if whole:
        with Ledger(office.home.ledger) as ledger:
            ledger.deliveries.stand(str(one.id), whole, parts)
    (line,) = asyncio.run(standings.lines(office, [one]))
    return line


def says(home: Path, one: FlowRun, whole: str = "", *parts: Standing) -> str:
    """Return what a list says beside how a run stands."""
    return str(listed(home, one, whole, *parts)["says"])


def test_a_list_says_why_a_run_failed_where_no_target_does(tmp_path: Path) -> None:
    why = "no source named pacs"
    assert says(tmp_path, run(Failed(message=why), **SOURCE)) == why
    assert says(tmp_path, run(Failed(message=why), **SOURCE), "failed") == why
    assert says(tmp_path, run(Completed(message="1 study found"), **SOURCE), "delivered") == "1 study found"
    assert says(tmp_path, run(Failed(message=why), paths=["/x"], targets=[])) == why


def test_a_list_says_nothing_twice(tmp_path: Path) -> None:
    known = [Standing("arch", "delivered", 1, 1, ""), Standing("pacs", "failed", 1, 0, "nobody answers")]
    assert says(tmp_path, run(Failed(message="pacs failed: nobody answers"), **TARGETS), "partial", *known) == ""


@pytest.mark.parametrize(
    ("noted", "whole", "at"),
    [
        (("waiting", "partial"), "partial", ["failed", "partial"]),
        (("waiting", "waiting"), "failed", ["failed", "failed"]),
        (("delivered", "waiting"), "partial", ["delivered", "failed"]),
        (("delivered", "delivered"), "delivered", ["delivered", "delivered"]),
    ],
    ids=["one waits", "both wait", "one is there", "both are there"],
)
def test_a_run_that_somebody_sets_completed_stands_as_its_receipt_says(
    tmp_path: Path, noted: Sequence[str], whole: str, at: list[str]
) -> None:
    one, parts = run(Completed(), **TARGETS), dict(zip(("arch", "pacs"), noted, strict=True))
    stood = str(overall([State(state) for state in noted]))
    document = {"state": stood, "targets": {name: {"state": state} for name, state in parts.items()}}
    assert standings.by_receipt(one, document) == (whole, dict(zip(parts, at, strict=True)))
    line = listed(tmp_path, one, stood, *(Standing(name, state, 1, 0, "") for name, state in parts.items()))
    assert (line["standing"], [part["state"] for part in line["at"]]) == (whole, at)
    assert actions(whole, ended=True) == ([] if whole == "delivered" else ["retry"])


def test_a_retrieval_that_somebody_sets_completed_has_not_brought_everything(tmp_path: Path) -> None:
    one = run(Completed(), **SOURCE)
    for noted, whole in (("partial", "partial"), ("paused", "failed"), ("delivered", "delivered")):
        assert standings.by_receipt(one, {"state": noted}) == (whole, {})
    assert listed(tmp_path, one, "partial")["standing"] == "partial"
    assert listed(tmp_path, run(Completed(), **SOURCE))["standing"] == "delivered"  # the ledger is another's
