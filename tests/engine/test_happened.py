"""What is said of a dispatch's end: in the ledger, as an event of Prefect's, with neither patients' data nor paths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from talaria.testing import studies
from tasks.dispatch.ends import UNKNOWN
from tests.engine.material import folder, go_on, later, totals
from tests.servers.up import Talaria
from transfer.happenings import BYTES, DISPATCHES, ITEMS


def events(up: Talaria, run_id: str) -> dict[str, Any]:
    """The events about a run's targets, by target."""
    about = {"event": {"prefix": ["talaria.dispatch."]}, "related": {"id": [f"prefect.flow-run.{run_id}"]}}
    found = up.api("POST", "/events/filter", filter=about)["events"]
    assert len(found) == len({one["payload"]["target"] for one in found})
    return {one["payload"]["target"]: one for one in found}


def test_each_target_has_an_event_of_its_own_with_counts_and_a_cause(up: Talaria, tmp_path: Path) -> None:
    source = tmp_path / studies.PATIENT_NAME.replace("^", "_")
    studies.ct(source, 3)
    up.apply(good=folder(tmp_path / "good"), lost=folder(tmp_path / "lost", max_attempts=1, retry_delay_s=0))
    (tmp_path / "lost").rmdir()
    sent = up.told("send", str(source), "--to", "good,lost", code=1)
    run = sent["flow_run_id"]
    up.until(lambda: len(events(up, run)) == 2)
    found = events(up, run)
    good, lost = found["good"], found["lost"]
    assert good["event"] == "talaria.dispatch.delivered" and lost["event"] == "talaria.dispatch.failed"
    assert good["resource"]["prefect.resource.id"] == "talaria.target.good"
    paid = good["payload"]
    assert (paid["delivered"], paid["rejected"], paid["attempts"], paid["cause"]) == (3, 0, 1, "")
    assert paid["bytes"] == sent["targets"]["good"]["bytes"] and paid["seconds"] == sent["targets"]["good"]["seconds"]
    assert (paid["run"], paid["dispatch"]) == (run, sent["dispatch_id"])
    assert lost["payload"]["cause"] in ("outage", "refused") and lost["payload"]["unsent"] == 3
    assert source.name not in json.dumps(found) and str(tmp_path) not in json.dumps(found)
    assert totals(up, "good") == totals(up, "good") | {
        (DISPATCHES, "delivered"): 1, (BYTES, "delivered"): paid["bytes"], (ITEMS, "delivered"): 3,
    }  # fmt: skip
    assert totals(up, "lost")[DISPATCHES, "failed"] == 1
    up.told("jobs", "retry", run, code=1)
    up.until(lambda: totals(up, "lost")[DISPATCHES, "failed"] == 2)


def test_a_dispatch_that_could_not_begin_is_said_to_have_failed(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)
    up.apply(never=folder(tmp_path / "never"))
    deployment = up.api("GET", "/deployments/name/dispatch/talaria")
    asked = {"paths": [str(tmp_path / "missing")], "targets": ["never"]}
    run = up.api("POST", f"/deployments/{deployment['id']}/create_flow_run", parameters=asked)["id"]
    up.until(lambda: events(up, run))
    assert events(up, run)["never"]["event"] == "talaria.dispatch.failed"
    assert events(up, run)["never"]["payload"]["cause"] == "refused"
    assert totals(up, "never")[DISPATCHES, "failed"] == 1


def test_what_was_delivered_before_the_run_came_to_grief_is_not_said_to_have_failed(
    up: Talaria, tmp_path: Path
) -> None:
    studies.ct(tmp_path / "study", 1)
    up.apply(soon=folder(tmp_path / "soon"), late=folder(tmp_path / "late", window=later(3)))
    run = up.told("send", str(tmp_path / "study"), "--to", "soon,late", "--no-wait")["flow_run_id"]
    up.until(lambda: up.run(run)["state_name"] == "AwaitingRetry" and "soon" in events(up, run))
    shutil.rmtree(tmp_path / "study")
    up.apply(late=folder(tmp_path / "late"))
    go_on(up, run)
    up.until(lambda: up.run(run)["state_type"] == "FAILED" and len(events(up, run)) == 2)
    found = events(up, run)
    assert {name: one["event"] for name, one in found.items()} == {
        "soon": "talaria.dispatch.delivered",
        "late": "talaria.dispatch.failed",
    }
    assert totals(up, "soon")[DISPATCHES, "delivered"] == 1 and (DISPATCHES, "failed") not in totals(up, "soon")


def test_names_of_targets_that_are_not_there_are_counted_together(up: Talaria, tmp_path: Path) -> None:
    deployment = up.api("GET", "/deployments/name/dispatch/talaria")
    asked = {"paths": [str(tmp_path)], "targets": [studies.PATIENT_NAME]}
    run = up.api("POST", f"/deployments/{deployment['id']}/create_flow_run", parameters=asked)["id"]
    up.until(lambda: events(up, run))
    assert list(events(up, run)) == [UNKNOWN]
    assert totals(up, UNKNOWN)[DISPATCHES, "failed"] >= 1 and not totals(up, studies.PATIENT_NAME)
