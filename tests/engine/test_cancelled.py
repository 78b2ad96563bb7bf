"""A dispatch that is cancelled while it waits ends like any other: it is counted, and said, once for each target."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import Artifact, FlowRun, State
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Completed, Running, Scheduled

from talaria.engine import cancelled
from talaria.testing import studies
from tasks.dispatch.ends import UNKNOWN
from tasks.retrieve import ending
from tests.engine.material import folder, go_on, later, source, study
from tests.servers.qr import archive
from tests.servers.up import Talaria
from transfer.deliveries import WHOLE
from transfer.errors import NotFound
from transfer.happenings import CANCELLED, DISPATCHES, ITEMS
from transfer.ledger import Ledger

pytestmark = pytest.mark.timeout(600)
FAR = {"max_attempts": 9, "retry_delay_s": 3600, "retry_max_delay_s": 86_400}


def ends(up: Talaria, run_id: str) -> list[dict[str, Any]]:
    """What Prefect's events say of a run's ends."""
    about = {"event": {"prefix": ["talaria.dispatch."]}, "related": {"id": [f"prefect.flow-run.{run_id}"]}}
    return [
        {"event": one["event"], **one["payload"]} for one in up.api("POST", "/events/filter", filter=about)["events"]
    ]


def totals(up: Talaria, target: str) -> dict[tuple[str, str], float]:
    with Ledger(up.home / "ledger.sqlite") as ledger:
        found = [one for one in ledger.happenings.totals("") if one.target == target]
    return {(one.name, one.label): one.value for one in found if one.name in (DISPATCHES, ITEMS)}


def test_one_that_waits_in_the_queue_is_counted_once_each_time(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    up.apply(unbegun=folder(tmp_path / "unbegun"), unbegun_too=folder(tmp_path / "too"))
    deployment = up.api("GET", "/deployments/name/dispatch/talaria")["id"]
    asked = {"paths": [str(tmp_path / "study")], "targets": ["unbegun", "unbegun-too"]}
    later_on = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2099-01-01T00:00:00Z"}}
    body = {"parameters": asked, "state": later_on}
    run = up.api("POST", f"/deployments/{deployment}/create_flow_run", **body)["id"]
    assert up.told("jobs", "cancel", run)["action"] in ("cancelled", "cancelling")
    up.until(lambda: up.run(run)["state_type"] == "CANCELLED" and len(ends(up, run)) == 2)
    for one in ends(up, run):
        assert (one["event"], one["cause"], one["attempts"]) == ("talaria.dispatch.cancelled", "", 0)
        assert totals(up, one["target"]) == {(DISPATCHES, "cancelled"): 1}
    # Somebody lets it wait once more, and cancels it again, by Prefect's own API.
    up.api("POST", f"/flow_runs/{run}/set_state", state=later_on, force=True)
    up.api("POST", f"/flow_runs/{run}/set_state", state={"type": "CANCELLED"}, force=True)
    up.until(lambda: len(ends(up, run)) == 4)
    assert totals(up, "unbegun") == {(DISPATCHES, "cancelled"): 2}
    # At last it runs.
    up.told("jobs", "retry", run)
    up.until(lambda: len(ends(up, run)) == 6)
    assert totals(up, "unbegun") == {
        (DISPATCHES, "cancelled"): 2,
        (DISPATCHES, "delivered"): 1,
        (ITEMS, "delivered"): 2,
    }


def test_of_one_that_rests_only_the_targets_it_waits_for_have_ended_so(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    dead = {"type": "dicom", "host": "127.0.0.1", "port": 1, "aet_target": "PACS", **FAR}
    up.apply(reached=folder(tmp_path / "reached"), unreached=dead, shut=folder(tmp_path / "shut", window=later(3)))
    run = up.told("send", str(tmp_path / "study"), "--to", "reached,unreached,shut", "--no-wait")["flow_run_id"]
    up.until(lambda: up.run(run)["state_name"] == "AwaitingRetry" and ends(up, run))
    assert [(one["target"], one["event"]) for one in ends(up, run)] == [("reached", "talaria.dispatch.delivered")]
    up.told("jobs", "cancel", run)
    up.until(lambda: len(ends(up, run)) == 3)
    found = {one["target"]: one for one in ends(up, run)}
    assert {name: one["event"].rpartition(".")[2] for name, one in found.items()} == {
        "reached": "delivered", "unreached": "cancelled", "shut": "cancelled",
    }  # fmt: skip
    assert (found["unreached"]["attempts"], found["unreached"]["unsent"]) == (1, 2)
    assert totals(up, "reached") == {(DISPATCHES, "delivered"): 1, (ITEMS, "delivered"): 2}
    assert totals(up, "unreached") == {(DISPATCHES, "cancelled"): 1, (ITEMS, "unsent"): 2}
    shown = up.told("jobs", "show", run)["targets"]
    assert [one["state"] for one in shown.values()] == ["delivered", "cancelled", "cancelled"]
    with Ledger(up.home / "ledger.sqlite") as ledger:
        stand = ledger.deliveries.of([run])[run]
    assert (stand["reached"].state, stand["unreached"].state, stand[WHOLE].state) == (
        "delivered", "cancelled", "cancelled",
    )  # fmt: skip
    assert (stand[WHOLE].arrived, stand["unreached"].items) == (2, 2)
    with Ledger(up.home / "ledger.sqlite") as ledger:
        up.until(lambda: ledger.rests.of(run) is None)  # whoever retries it begins anew


def test_one_that_is_set_to_failed_while_it_waits_has_failed(up: Talaria, tmp_path: Path) -> None:
    """As Prefect does itself with what its pages have suspended for five minutes; nobody heard of it."""
    for number in range(2):
        studies.ct(tmp_path / f"study{number}", 2)
    up.apply(by_hand=folder(tmp_path / "by-hand", window=later(3)))
    runs = [
        up.told("send", str(tmp_path / f"study{number}"), "--to", "by-hand", "--no-wait")["flow_run_id"]
        for number in range(2)
    ]
    up.until(lambda: all(up.run(run)["state_name"] == "AwaitingRetry" for run in runs))
    suspended = {"type": "PAUSED", "name": "Suspended", "state_details": {"pause_reschedule": True}}
    up.api("POST", f"/flow_runs/{runs[0]}/set_state", state=suspended, force=True)
    for run in runs:
        up.api("POST", f"/flow_runs/{run}/set_state", state={"type": "FAILED", "message": "never resumed"}, force=True)
    up.until(lambda: all(ends(up, run) for run in runs))
    said = {one["run"]: one["event"] for run in runs for one in ends(up, run)}
    assert said == dict.fromkeys(runs, "talaria.dispatch.failed")
    assert totals(up, "by-hand") == {(DISPATCHES, "failed"): 2, (ITEMS, "unsent"): 4}
    with Ledger(up.home / "ledger.sqlite") as ledger:
        stand = ledger.deliveries.of(runs)
    assert {stand[run][WHOLE].state for run in runs} == {"failed"}
    assert "never resumed" in stand[runs[0]]["by-hand"].words


def test_a_retrieval_whose_end_is_set_while_it_waits_ends_with_its_dispatches(up: Talaria, tmp_path: Path) -> None:
    """Its result stayed one that waits, and its dispatches in their line for ever."""
    names = {"FAILED": "failed", "CRASHED": "failed", "COMPLETED": "cancelled"}
    with archive([one for name in names for one in study(name, series=1, each=1)]) as peer:
        up.apply(ended_src=source(peer), ended_shut=folder(tmp_path / "shut", window=later(3)))
        asked = {name: ("retrieve", "ended-src", "--accession", name, "--to", "ended-shut") for name in names}
        runs = {name: up.told(*one, "--no-wait")["flow_run_id"] for name, one in asked.items()}
        up.until(lambda: all(up.run(run)["state_name"] == "AwaitingRetry" for run in runs.values()))
    parts = {
        name: up.api("POST", "/flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [run]}})[0]["id"]
        for name, run in runs.items()
    }
    assert {up.run(one)["state_name"] for one in parts.values()} == {"AwaitingRetry"}
    for name, run in runs.items():
        up.api("POST", f"/flow_runs/{run}/set_state", state={"type": name, "message": "by hand"}, force=True)
    up.until(lambda: {up.run(one)["state_type"] for one in parts.values()} == {"CANCELLED"})
    up.until(lambda: {name: up.told("jobs", "show", run)["state"] for name, run in runs.items()} == names)
    assert {name: up.run(run)["state_type"] for name, run in runs.items()} == {name: name for name in names}
    said = up.told("jobs", "show", runs["CRASHED"])["error"]
    assert "it was set to Crashed while it waited: by hand" in said


def test_one_that_is_paused_is_counted_and_one_that_runs_not_twice(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 40)
    slow = {"bandwidth_limit": 2000, "concurrency": 1}
    up.apply(halted=folder(tmp_path / "halted", **slow), stopped=folder(tmp_path / "stopped", **slow))
    runs = {
        name: up.told("send", str(tmp_path / "study"), "--to", name, "--no-wait")["flow_run_id"]
        for name in ("halted", "stopped")
    }
    for name in runs:
        up.until(lambda name=name: list((tmp_path / name).iterdir()))  # type: ignore[misc]
    up.told("jobs", "pause", runs["halted"])
    up.until(lambda: up.run(runs["halted"])["state_name"] == "Paused")
    assert not ends(up, runs["halted"])
    for run in runs.values():
        up.told("jobs", "cancel", run)
    up.until(lambda: all(up.run(run)["state_type"] == "CANCELLED" and ends(up, run) for run in runs.values()))
    # What waits in the queue behind them is heard of after them: by then, nothing more has been said.
    go_on(up, runs["halted"])
    up.api("POST", f"/flow_runs/{runs['halted']}/set_state", state={"type": "CANCELLED"}, force=True)
    up.until(lambda: len(ends(up, runs["halted"])) >= 2)
    assert totals(up, "stopped")[DISPATCHES, "cancelled"] == len(ends(up, runs["stopped"])) == 1


class Server:
    """As far as runs go that were cancelled."""

    def __init__(self, *runs: tuple[FlowRun, list[State[Any]]]) -> None:
        self.runs = {run.id: (run, states) for run, states in runs}
        self.asked, self.results = 0, list[Any]()

    async def read_flow_runs(self, *, flow_run_filter: Any, offset: int, limit: int, **_: Any) -> list[FlowRun]:
        if flow_run_filter.parent_flow_run_id:  # nothing waits of a retrieval
            return []
        self.asked += 1
        types = flow_run_filter.state.type.any_
        return [run for run, _ in self.runs.values() if run.state and run.state.type in types][offset : offset + limit]

    async def read_flow_run_states(self, run_id: UUID) -> list[State[Any]]:
        return self.runs[run_id][1]

    async def read_artifacts(self, *, artifact_filter: Any, **_: Any) -> list[Any]:
        keys = artifact_filter.key and artifact_filter.key.any_
        return [one for one in self.results if (one.key in keys if keys else one.type == "result")]

    async def delete_artifact(self, artifact_id: UUID) -> None:
        """Take away what a newer one replaces."""
        self.results = [one for one in self.results if one.id != artifact_id]

    async def create_artifact(self, artifact: Any) -> Artifact:
        """Take the results of a retrieval that has never begun."""
        made = Artifact(**artifact.model_dump(exclude_unset=True))
        self.results.append(made)
        return made


def a_run(*states: State[Any], **parameters: Any) -> tuple[FlowRun, list[State[Any]]]:
    return FlowRun(flow_id=uuid4(), parameters=parameters, state=states[-1]), list(states)


def test_those_whose_event_was_lost_are_found_by_a_look_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def load(client: Any, names: list[str], secrets: bool) -> None:
        if names in (["gone"], ["archive"]):
            raise NotFound(f"no target {names[0]}")

    monkeypatch.setattr(cancelled, "load", load)
    monkeypatch.setattr(ending, "load", load)
    monkeypatch.setattr("tasks.happened.emit_event", lambda *_, **__: None)
    asked = {"paths": ["/study"], "targets": ["folder-target/pacs"]}
    waited = a_run(Scheduled(), Cancelling(), Cancelled(), **asked)
    server = Server(
        waited,
        a_run(Scheduled(), Running(), Cancelling(), Cancelled(), **asked),  # it has said so itself
        a_run(Scheduled(), Running(), AwaitingRetry(), Cancelled(), paths=["/study"], targets=["gone"]),
        a_run(Scheduled(), Cancelled(), source="archive", accessions="1", targets=["pacs"]),  # a retrieval
        a_run(Scheduled(), Completed(), **asked),
    )
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        back = cancelled.LookingBack()
        for look in (back, back, cancelled.LookingBack()):  # once more, too soon; and another worker
            asyncio.run(look.look(cast(PrefectClient, server), ledger, "pool"))
        found = {(one.target, one.label): one.value for one in ledger.happenings.totals("") if one.name == DISPATCHES}
        assert found == {("pacs", "cancelled"): 1, (UNKNOWN, "cancelled"): 1} and server.asked == 2
        assert [one.event for one in ledger.happenings.waiting(9)] == ["dispatch.cancelled"] * 2
        [table] = [one for one in server.results if one.key == "retrieval"]  # of the retrieval, which had not begun
        assert [row["state"] for row in json.loads(table.data)] == ["cancelled"]
        (stand,) = ledger.deliveries.of([str(waited[0].id)]).values()
        assert {name: one.state for name, one in stand.items()} == {WHOLE: "cancelled", "pacs": "cancelled"}
        # What is kept to say it once is forgotten with the rest.
        run_id, state = waited[0].id, waited[0].state
        assert ledger.happenings.standing(f"{CANCELLED}{run_id}") == str(state and state.id)
        ledger.prune(ledger.now() + 1)
        assert not ledger.happenings.standing(f"{CANCELLED}{run_id}")


def test_what_could_not_be_looked_at_when_it_was_heard_of_is_looked_back_for_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody heard of such an end for five minutes; nor of one that came while the subscription was away."""
    asked = {"paths": ["/study"], "targets": ["folder-target/pacs"]}
    run = a_run(Scheduled(), Cancelled(), **asked)
    server, back, said = Server(run), cancelled.LookingBack(), list[UUID]()

    async def read_flow_run(_: UUID) -> FlowRun:
        raise httpx.ReadTimeout("the server is busy")

    async def say(_client: Any, _ledger: Any, flow_run: FlowRun, *_: str) -> None:
        said.append(flow_run.id)

    monkeypatch.setattr(server, "read_flow_run", read_flow_run, raising=False)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        about = cast(PrefectClient, server), ledger

        async def looks() -> None:
            server.runs, hidden = {}, server.runs
            await back.look(*about, "pool")  # there is nothing yet
            server.runs = hidden
            monkeypatch.setattr(cancelled, "_say", say)
            await back.look(*about, "pool")
            assert not said  # its time has not come
            with pytest.raises(httpx.ReadTimeout):
                await back.heard(*about, run[0].id)
            await back.look(*about, "pool")
            assert said == [run[0].id]
            asked_before = server.asked
            await back.look(*about, "pool")
            assert server.asked == asked_before
            back.soon()
            await back.look(*about, "pool")
            assert server.asked == asked_before + 1

        asyncio.run(looks())
