"""Retrievals that wait, for their targets or their source: each study goes on in its own run, and nothing is held."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from talaria.testing import studies
from tests.engine.material import files, folder, go_on, later, placed, source, study
from tests.servers.qr import GET, Holding, Instance, archive
from tests.servers.up import Talaria

pytestmark = pytest.mark.timeout(600)
RESTS = "AwaitingRetry"


def parts(up: Talaria, run_id: str) -> dict[str, dict[str, Any]]:
    """The dispatches of a retrieval, by the folder of their study."""
    found = up.api("POST", "/flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [run_id]}})
    assert len({one["parameters"]["paths"][0] for one in found}) == len(found), "a study has more than one run"
    return {Path(one["parameters"]["paths"][0]).name: one for one in found}


def left(up: Talaria, run_id: str) -> bool:
    """Return whether a run has left something behind for its next part."""
    return (up.home / "waiting" / f"{run_id}.json").exists()


def states(table: Path) -> dict[str, str]:
    """What a retrieval's CSV says of each accession number."""
    return {one["accession"]: one["state"] for one in csv.DictReader(table.read_text().splitlines())}


def rests(up: Talaria, run_id: str, not_as: str = "") -> str:
    """Wait until it rests; return the id of that state."""

    def at_rest() -> bool:
        run = up.run(run_id)
        return bool(run["state_name"] == RESTS and run["state"]["id"] != not_as)

    up.until(at_rest, 60)
    return str(up.run(run_id)["state"]["id"])


def test_what_waits_goes_on_in_its_own_run_and_is_paused_resumed_and_delivered(up: Talaria, tmp_path: Path) -> None:
    with archive([*study("V1", series=1), *study("V2", series=1), *study("V3", series=1)]) as peer:
        up.apply(src=source(peer), by_night=folder(tmp_path / "night", window=later(2)))
        arguments = ["retrieve", "src", "--accession", "V1 V2 V3", "--to", "by-night", "--no-wait"]
        run_id = up.told(*arguments)["flow_run_id"]
        first = rests(up, run_id)
        assert "the hours of by-night" in up.run(run_id)["state"]["message"]
        begun = parts(up, run_id)
        assert {str(one.ds.StudyInstanceUID) for one in peer.instances} == begun.keys()
        assert {one["state_name"] for one in begun.values()} == {RESTS}
        # Its second part gives its place back, too.
        up.told("jobs", "pause", run_id)
        up.told("jobs", "resume", run_id, code=None)
        second = rests(up, run_id, first)
        up.apply(by_night=folder(tmp_path / "night"))
        go_on(up, run_id)
        up.until(lambda: up.run(run_id)["state_type"] == "COMPLETED", 60)
        assert second != up.run(run_id)["state"]["id"]
        asked = {"flow_run_id": {"any_": [run_id]}, "key": {"any_": ["retrieval"]}}
        [table] = up.api("POST", "/artifacts/filter", artifacts=asked)  # not one of each part
        assert {one["state"] for one in json.loads(table["data"])} == {"delivered"}
        ended = parts(up, run_id)
        assert {uid: one["id"] for uid, one in ended.items()} == {uid: one["id"] for uid, one in begun.items()}
        assert {one["state_type"] for one in ended.values()} == {"COMPLETED"}
        sent = {name: one for name, one in files(tmp_path / "night").items() if name.endswith(".dcm")}
        assert {Path(name).stem for name in sent} == {one.uid for one in peer.instances}
        assert len(peer.asked(GET)) == 3 and not any(left(up, one["id"]) for one in ended.values())
        shown = up.told("jobs", "show", run_id)
        assert {one["targets"]["by-night"] for one in shown["studies"]} == {"delivered"}


def in_artifact(up: Talaria) -> dict[str, str]:
    """What the newest artifact of a retrieval says of each accession number."""
    [newest] = up.api("POST", "/artifacts/latest/filter", artifacts={"key": {"any_": ["retrieval"]}}, limit=1)
    return {one["accession"]: one["state"] for one in json.loads(newest["data"])}


def test_a_retrieval_that_is_cancelled_takes_what_waits_with_it_and_a_retry_sends_it(
    up: Talaria, tmp_path: Path
) -> None:
    with archive([*study("X1", series=1), *study("X2", series=1)]) as peer:
        away = {"type": "dicom", "host": "127.0.0.1", "port": 1, "aet_target": "PACS"}
        away |= {"max_attempts": 9, "retry_delay_s": 3600, "retry_max_delay_s": 3600}
        up.apply(src=source(peer), shut=folder(tmp_path / "shut", window=later(2)), away=away)
        arguments = ["retrieve", "src", "--accession", "X1 X2 X3", "--to", "shut,away", "--no-wait"]
        run_id = up.told(*arguments)["flow_run_id"]
        rests(up, run_id)
        assert "the next attempt at away" in up.run(run_id)["state"]["message"]
        up.told("jobs", "cancel", run_id)
        up.until(lambda: {one["state_type"] for one in parts(up, run_id).values()} == {"CANCELLED"}, 60)
        up.until(lambda: not any(left(up, one["id"]) for one in parts(up, run_id).values()), 60)
        # What its files say is what `jobs show` does, and its first retry asks for what was missing, too.
        table = up.home / "receipts" / f"{run_id}.csv"
        ended = {"X1": "cancelled", "X2": "cancelled", "X3": "missing"}
        up.until(lambda: states(table) == ended, 60)
        up.until(lambda: in_artifact(up) == ended, 60)  # which comes after the table
        assert up.told("jobs", "show", run_id)["cancelled"] == ["X1", "X2"]
        peer.instances.extend(Instance.of(one) for one in study("X3", series=1))
        up.apply(shut=folder(tmp_path / "shut"), away=folder(tmp_path / "back"))
        assert up.told("jobs", "retry", run_id)["delivered"] == 3
        assert len(peer.asked(GET)) == 3
        assert not any(value in str(up.run(run_id)) for value in studies.PHI)


def test_a_retrieval_rests_while_another_has_its_source_and_comes_when_that_one_has_gone(
    up: Talaria, tmp_path: Path
) -> None:
    held = Holding(240)
    with archive([*study("Y1", series=1), *study("Y2", series=1)], on_get=held) as peer:
        up.apply(src=source(peer, concurrency=1, max_dispatches=1, idle_timeout_s=300))
        asked = [
            ["retrieve", "src", "--accession", number, "--into", str(tmp_path / "into")] for number in ("Y1", "Y2")
        ]
        first = up.told(*asked[0], "--no-wait")["flow_run_id"]
        assert held.asked.wait(120)
        second = up.told(*asked[1], "--no-wait")["flow_run_id"]
        rests(up, second)
        assert "a slot at src" in up.run(second)["state"]["message"]
        held.go_on.set()
        up.until(lambda: [up.run(one)["state_type"] for one in (first, second)] == ["COMPLETED"] * 2, 60)
        assert placed(tmp_path / "into").keys() == {"Y1", "Y2"}


def test_a_retrieval_waits_for_a_source_that_is_disabled(up: Talaria, tmp_path: Path) -> None:
    with archive(study("ZA1", series=1)) as peer:
        up.apply(off=source(peer, window=later(2)))
        queued = up.told("retrieve", "off", "--accession", "ZA1", "--into", str(tmp_path / "into"), "--no-wait")
        run_id = queued["flow_run_id"]
        rests(up, run_id)
        up.apply(off=source(peer, enabled=False))
        go_on(up, run_id)
        up.until(lambda: "off to be enabled" in (up.run(run_id)["state"]["message"] or ""), 60)
        assert not peer.requests
        up.apply(off=source(peer))
        go_on(up, run_id)
        up.until(lambda: up.run(run_id)["state_type"] == "COMPLETED", 60)
        assert len(placed(tmp_path / "into")["ZA1"]) == 2


def test_of_a_retrieval_that_cant_go_on_nothing_waits_and_every_retry_does_the_rest(
    up: Talaria, tmp_path: Path
) -> None:
    with archive(study("ZB1", series=1)) as peer:
        up.apply(turned=source(peer), closed=folder(tmp_path / "closed", window=later(2)))
        run_id = up.told("retrieve", "turned", "--accession", "ZB1 ZB2", "--to", "closed", "--no-wait")["flow_run_id"]
        rests(up, run_id)
        up.apply(turned=source(peer, direction="store"))
        go_on(up, run_id)
        up.until(lambda: up.run(run_id)["state_type"] == "FAILED", 60)
        assert {one["state_type"] for one in parts(up, run_id).values()} == {"CANCELLED"}
        ended = {"ZB1": "failed", "ZB2": "missing"}
        assert states(up.home / "receipts" / f"{run_id}.csv") == ended
        up.until(lambda: in_artifact(up) == ended, 60)  # which comes after the table
        shown = up.told("jobs", "show", run_id)
        assert shown["failed"] == ["ZB1"] and "so it is not queried" in shown["error"]
        # As somebody retries it in Prefect's pages.
        peer.instances.extend(Instance.of(one) for one in study("ZB2", series=1))
        up.apply(turned=source(peer), closed=folder(tmp_path / "closed"))
        up.api("POST", f"/flow_runs/{run_id}/set_state", state={"type": "SCHEDULED", "name": RESTS}, force=True)
        up.until(lambda: up.run(run_id)["state_type"] == "COMPLETED", 60)
        assert up.told("jobs", "show", run_id)["delivered"] == 2 and len(peer.asked(GET)) == 2
