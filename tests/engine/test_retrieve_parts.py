"""What others make of the dispatches of a retrieval: it does what it says, and no other one minds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.dispatch import rest, running
from tests.engine.material import files, folder, go_on, later, source, study
from tests.engine.test_retrieve_waits import RESTS, parts, rests
from tests.engine.test_states import is_at_rest, put
from tests.servers.qr import GET, Instance, archive
from tests.servers.up import Talaria

pytestmark = pytest.mark.timeout(600)
EACH, SLOW = 20, 20_000  # files of 40 kB to a study, and bytes per second: forty seconds
# What the state is then; "" for a run that is deleted, which is looked for each twenty seconds only, so it comes first.
ENDS = {"": "", "Cancelling": "Cancelled", "Failed": "Failed", "Completed": "Completed"}
HOLDS = {"Paused": "Paused", "Suspended": "Suspended", "Pausing": "Paused", "Scheduled": "Scheduled"}


def came(path: Path, uids: set[str]) -> int:
    return sum(1 for name in files(path) if Path(name).stem in uids)


def sending(up: Talaria, run_id: str) -> bool:
    return any(one["state_type"] in ("RUNNING", "PENDING") for one in parts(up, run_id).values())


def made_of(up: Talaria, part: str, name: str) -> None:
    """Let somebody set a state on a dispatch of a retrieval."""
    command = {"Cancelling": "cancel", "Pausing": "pause"}.get(name)
    if command:
        up.told("jobs", command, part)
    else:
        put(up, part, name)


def test_a_state_that_is_set_on_one_while_it_sends_stops_it_alone(up: Talaria, tmp_path: Path) -> None:
    names = [*ENDS, *HOLDS, "neighbour"]
    data = {f"P{number}": study(f"P{number}", series=1, each=EACH) for number in range(len(names))}
    uids = {number: {Instance.of(one).uid for one in each} for number, each in data.items()}
    with archive([one for each in data.values() for one in each]) as peer:
        by_uid = {str(one.ds.StudyInstanceUID): str(one.ds.AccessionNumber) for one in peer.instances}
        slow = folder(tmp_path / "slow", bandwidth_limit=SLOW, concurrency=1)
        up.apply(src=source(peer), parts_slow=slow)
        arguments = ["retrieve", "src", "--accession", " ".join(data), "--to", "parts-slow", "--no-wait"]
        run_id = up.told(*arguments)["flow_run_id"]
        chosen: dict[str, str] = {}  # by the state that is set: the study

        def sending() -> str:
            found = (uid for uid, one in parts(up, run_id).items() if one["state_name"] == "Running")
            return next(
                (uid for uid in found if uid not in chosen.values() and came(tmp_path / "slow", uids[by_uid[uid]])), ""
            )

        for name in [*ENDS, *HOLDS]:
            up.until(sending, 60)
            chosen[name] = sending()
            part = parts(up, run_id)[chosen[name]]["id"]
            made_of(up, part, name)
            if name:
                up.until(lambda part=part: is_at_rest(up, part), 60)  # type: ignore[misc]
        up.apply(parts_slow=slow | {"bandwidth_limit": None})
        rests(up, run_id)
        found = parts(up, run_id)
        now = {name: found[uid]["state_name"] for name, uid in chosen.items() if name}
        assert now == {name: state for name, state in (ENDS | HOLDS).items() if name} and chosen[""] not in found
        assert all(came(tmp_path / "slow", uids[by_uid[uid]]) < EACH for uid in chosen.values())
        assert sum(one["state_name"] == "Completed" for one in found.values()) == 2  # with the neighbour's
        assert "to be resumed" in up.run(run_id)["state"]["message"]
        shown = up.told("jobs", "show", run_id)
        assert {by_uid[chosen[name]] for name in ENDS} == {*shown["failed"]}
        assert {by_uid[chosen[name]] for name in HOLDS} == {*shown["waiting"]}
        # What was stopped to go on does, when it is let; no other one does, and nothing is sent again.
        again = go_on_with(up, run_id, found, chosen)
        assert again == {*HOLDS}
        up.until(lambda: up.run(run_id)["state_type"] == "FAILED", 120)
        ended = parts(up, run_id)
        assert {name: ended[chosen[name]]["state_name"] for name in HOLDS} == dict.fromkeys(HOLDS, "Completed")
        assert all(came(tmp_path / "slow", uids[by_uid[chosen[name]]]) == EACH for name in HOLDS)
        assert "a part of" in up.here("jobs", "retry", ended[chosen["Failed"]]["id"]).stderr
        result = up.told("jobs", "retry", run_id)
        assert result["delivered"] == len(names)
    kinds = up.api("POST", "/flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [run_id]}})
    assert not {one["state_type"] for one in kinds} & {"RUNNING", "PENDING", "CANCELLING", "SCHEDULED", "PAUSED"}


def go_on_with(up: Talaria, run_id: str, found: dict[str, dict[str, Any]], chosen: dict[str, str]) -> set[str]:
    """Let those go on that were stopped for that, one after another; return which of them did."""
    went = set()
    for name in HOLDS:
        part = found[chosen[name]]["id"]
        if name == "Paused":
            up.api("POST", f"/flow_runs/{part}/resume", run_input=None)
        elif name in ("Suspended", "Pausing"):  # Prefect itself resumes no run of this kind that is suspended
            up.told("jobs", "resume", part, "--no-wait")
        else:
            go_on(up, part)
        up.until(lambda part=part: up.run(part)["state_name"] == "Completed", 60)  # type: ignore[misc]
        waiting = [one for one in HOLDS if up.run(found[chosen[one]]["id"])["state_name"] != "Completed"]
        went = {*HOLDS} - {*waiting}
        assert went == {*list(HOLDS)[: list(HOLDS).index(name) + 1]}
    return went


def test_a_state_that_is_set_on_one_while_it_waits_stays(up: Talaria, tmp_path: Path) -> None:
    names = [*ENDS, "Pausing", "Scheduled", "neighbour"]
    with archive([one for number in range(len(names)) for one in study(f"Q{number}", series=1)]) as peer:
        up.apply(src=source(peer), parts_shut=folder(tmp_path / "shut", window=later(2)))
        asked = " ".join(f"Q{number}" for number in range(len(names)))
        run_id = up.told("retrieve", "src", "--accession", asked, "--to", "parts-shut", "--no-wait")["flow_run_id"]
        rests(up, run_id)
        chosen = dict(zip(names, parts(up, run_id).items(), strict=True))
        for name in names[:-1]:
            made_of(up, chosen[name][1]["id"], name)
        up.apply(parts_shut=folder(tmp_path / "shut"))
        go_on(up, run_id)
        up.until(lambda: up.run(chosen["neighbour"][1]["id"])["state_name"] == "Completed", 60)
        rests(up, run_id)
        now = {one["id"]: one["state_name"] for one in parts(up, run_id).values()}
        assert {name: now.get(chosen[name][1]["id"], "") for name in names[:-1]} == {
            name: {**ENDS, **HOLDS}[name] for name in names[:-1]
        }
        assert len([name for name in files(tmp_path / "shut") if name.endswith(".dcm")]) == 2  # the neighbour's
        shown = up.told("jobs", "show", run_id)
        assert len(shown["failed"]) == len(ENDS) and len(shown["waiting"]) == 2
        up.told("jobs", "cancel", run_id)
        up.until(
            lambda: {one["state_type"] for one in parts(up, run_id).values()} <= {"CANCELLED", "FAILED", "COMPLETED"},
            60,
        )


def test_a_pause_of_a_run_is_one_of_its_parts_and_not_the_other_way_round() -> None:
    try:
        whole = running.pause("whole")
        with running.part_of("whole"):
            first = running.pause("first")
            assert not running.pauses_with_its_whole()
            first.set()
            assert not whole.is_set()
            whole.set()
            assert running.pause("second").is_set() and running.pauses_with_its_whole()
            assert rest.paused("").name == RESTS
        assert not running.pause("neighbour").is_set() and rest.paused("").name == running.PAUSED
    finally:
        for name in ("whole", "first", "second", "neighbour"):
            running.forget(name)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["Pausing", "Suspended", "Paused"])
def test_what_is_being_sent_is_paused_with_its_retrieval_and_goes_on_with_it(
    up: Talaria, tmp_path: Path, by: str
) -> None:
    """It was sent to its end, which for a large study to a slow target takes hours."""
    data = {number: study(f"{by}{number}", series=1, each=EACH) for number in range(3)}
    with archive([one for each in data.values() for one in each]) as peer:
        slow = folder(tmp_path / "slow", bandwidth_limit=SLOW, concurrency=1)
        up.apply(src=source(peer), paused_slow=slow)
        numbers = " ".join(f"{by}{number}" for number in data)
        run_id = up.told("retrieve", "src", "--accession", numbers, "--to", "paused-slow", "--no-wait")["flow_run_id"]
        everything = {one.uid for one in peer.instances}
        up.until(lambda: came(tmp_path / "slow", everything) and len(peer.asked(GET)) == len(data), 60)
        made_of(up, run_id, by)
        up.until(
            lambda: up.run(run_id)["state_name"] == {"Pausing": "Paused"}.get(by, by) and not sending(up, run_id), 60
        )
        before = came(tmp_path / "slow", everything)
        assert 0 < before < len(everything)
        begun = parts(up, run_id)
        assert begun and {one["state_name"] for one in begun.values()} == {RESTS}
        assert "its retrieval to be resumed" in next(iter(begun.values()))["state"]["message"]
        shown = up.told("jobs", "show", run_id)
        assert shown["state"] == "paused" and not shown["failed"]
        up.apply(paused_slow=slow | {"bandwidth_limit": None})
        if by == "Paused":
            up.api("POST", f"/flow_runs/{run_id}/resume", run_input=None)
        else:
            up.told("jobs", "resume", run_id, "--no-wait")
        up.until(lambda: up.run(run_id)["state_type"] == "COMPLETED", 60)
        ended = parts(up, run_id)
        assert {one["id"] for one in begun.values()} <= {one["id"] for one in ended.values()}
        assert came(tmp_path / "slow", everything) == len(everything) and len(peer.asked(GET)) == len(data)
