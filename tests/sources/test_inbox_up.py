"""Inboxes beside a running `talaria up`: noticed, dispatched, settled, and what becomes of their files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from talaria.testing import studies as material
from tests.engine.material import source, study
from tests.servers.qr import archive
from tests.servers.up import Talaria

UIDS = [material.uid(56) for _ in range(3)]


class Inboxes:
    """Sources and folder targets below one folder of the test's."""

    def __init__(self, up: Talaria, folder: Path) -> None:
        self.up, self.folder = up, folder
        self.names: list[str] = []

    def make(self, *names: str) -> list[Path]:
        found = [self.folder / name for name in names]
        for one in found:
            one.mkdir()
        return found

    def apply(self, code: int = 0, **sources: dict[str, Any]) -> str:
        path = self.folder / "sources.yaml"
        path.write_text(yaml.safe_dump({"sources": {key.replace("_", "-"): one for key, one in sources.items()}}))
        ran = self.up.here("source", "apply", str(path))
        assert ran.returncode == code, ran.stderr
        self.names += [key.replace("_", "-") for key in sources] if not code else []
        return ran.stderr

    def state(self, name: str) -> dict[str, int]:
        counts: dict[str, int] = self.up.told("source", "show", name)["units"]
        return {state: count for state, count in counts.items() if count}

    def until(self, name: str, **counts: int) -> None:
        """Wait until so many units of a source are in each state."""
        self.up.until(lambda: self.state(name) == counts)

    def runs_of(self, name: str) -> list[Any]:
        body = {"flow_runs": {"tags": {"all_": [f"source:{name}"]}}}
        found: list[Any] = self.up.api("POST", "/flow_runs/filter", **body)
        return found


@pytest.fixture
def inboxes(up: Talaria, tmp_path: Path) -> Any:
    one = Inboxes(up, tmp_path)
    yield one
    for name in one.names:
        up.here("source", "remove", name)


def put(make: Callable[[Path], Any], where: Path) -> None:
    """Put a study there as a whole, as a sender does who moves it in."""
    part = where.parent.parent / f"part-{where.name}"
    make(part)
    (part / ".complete").touch()
    part.rename(where)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".complete"}


def test_studies_of_an_inbox_are_delivered_and_deleted(inboxes: Inboxes) -> None:
    box, shelf, more = inboxes.make("box", "shelf", "more")
    inboxes.up.apply(
        shelf={"type": "folder", "folder": str(shelf), "layout": "{StudyInstanceUID}", "verify": "listed"},
        more={"type": "folder", "folder": str(more)},
    )
    inboxes.apply(
        box={"type": "inbox", "folder": str(box), "targets": ["shelf", "more"], "after": "delete", "settle_s": 3600}
    )
    for number in range(3):
        put(lambda folder: material.ct(folder, 2), box / f"s{number}")
    material.ct(box / "settling", 1)  # has no marker, and may still be written to
    inboxes.until("box", done=3)
    assert files(box) == {f"settling/{path.name}" for path in (box / "settling").iterdir()}
    assert [one.name for one in box.iterdir()] == ["settling"], "their folders are gone as well"
    assert len(files(shelf)) == 6 == len(files(more))
    runs = inboxes.runs_of("box")
    assert runs and all(run["parameters"]["each"] == "unit" and run["state_type"] == "COMPLETED" for run in runs)
    shown = inboxes.up.told("source", "show", "box")
    assert shown["waiting"] == 1 and not shown["attention"]
    (listed,) = [one for one in inboxes.up.told("source", "list")["sources"] if one["name"] == "box"]
    assert listed["units"]["done"] == 3 and listed["enabled"]
    shutil.rmtree(box / "settling")
    assert os.listdir(box) == []


def test_what_a_source_has_delivered_is_sent_elsewhere(inboxes: Inboxes) -> None:
    """Its list went when the units were settled, and nothing else said what had been sent."""
    box, shelf, other, third = inboxes.make("box", "shelf", "other", "third")
    layout = {"type": "folder", "layout": "{StudyInstanceUID}"}
    inboxes.up.apply(**{one.name: {**layout, "folder": str(one)} for one in (shelf, other, third)})
    made = {uid: material.ct(box, 2, study=uid, first=2 * number) for number, uid in enumerate(UIDS)}
    inboxes.apply(elsewhere={"type": "inbox", "folder": str(box), "targets": ["shelf"], "unit": "study", "settle_s": 0})
    inboxes.until("elsewhere", done=3)
    (run,) = inboxes.runs_of("elsewhere")
    inboxes.up.here("source", "sweep", "elsewhere")
    inboxes.up.until(lambda: not Path(run["parameters"]["paths"][0]).exists())
    retried = inboxes.up.here("jobs", "retry", run["id"])
    assert retried.returncode == 2 and "`talaria source show elsewhere` says what failed" in retried.stderr
    assert inboxes.up.run(run["id"])["state_type"] == "COMPLETED"
    sent = inboxes.up.told("jobs", "send", run["id"], "--to", "other")
    assert sent["state"] == "delivered" and len(sent["studies"]) == 3 and files(other) == files(shelf)
    # A unit that has gone meanwhile is failed, and said to be; the others go.
    for path in made[UIDS[0]]:
        path.unlink()
    partly = inboxes.up.told("jobs", "send", run["id"], "--to", "third", code=1)
    (gone,) = (one for one in partly["studies"] if one["study"] == UIDS[0])
    assert gone["state"] == "failed" and "no such file" in gone["targets"]["third"]["error"]
    assert partly["state"] == "partial" and len(files(third)) == 4
    shutil.rmtree(box)
    box.mkdir()
    refused = inboxes.up.here("jobs", "send", run["id"], "--to", "third")
    assert refused.returncode == 2 and "nothing of it is in the source elsewhere any more" in refused.stderr


@pytest.mark.slow
def test_a_thousand_studies_in_one_sweep_arrive(inboxes: Inboxes) -> None:
    box, shelf = inboxes.make("box", "shelf")
    inboxes.up.apply(shelf={"type": "folder", "folder": str(shelf), "layout": "{StudyInstanceUID}"})
    for number in range(1000):
        material.ct(box / f"s{number}", 1)
    inboxes.apply(
        thousand={"type": "inbox", "folder": str(box), "targets": ["shelf"], "after": "delete", "settle_s": 0}
    )
    inboxes.up.until(lambda: inboxes.state("thousand") == {"done": 1000}, 600)
    assert not files(box) and len(files(shelf)) == 1000


def test_what_can_not_be_is_refused_before_anything_is_touched(inboxes: Inboxes) -> None:
    box, shelf = inboxes.make("box", "shelf")
    inboxes.up.apply(shelf={"type": "folder", "folder": str(shelf)})
    good = {"type": "inbox", "folder": str(box), "targets": ["shelf"], "after": "delete", "settle_s": 0}
    material.ct(box / "s", 1)
    wrong = inboxes.apply(2, good=good, bad={"type": "inbox", "folder": str(box / "s"), "targets": ["nobody"]})
    assert "source good: " in wrong and "overlap" in wrong
    assert "source bad: no target named nobody; there are: " in wrong
    assert inboxes.up.told("source", "list")["sources"] == [], "all of them or none"
    inboxes.apply(good=good)
    inboxes.until("good", done=1)
    assert not files(box)
    box.rename(box.with_name("unmounted"))
    inboxes.up.here("source", "sweep", "good")
    inboxes.up.until(lambda: "no such file or folder" in inboxes.up.told("source", "show", "good")["problem"])
    tested = inboxes.up.told("source", "test", "good", code=1)
    assert not tested["ok"] and "no such file or folder" in tested["problems"][0]


def test_a_schedule_is_prefects_and_what_people_change_of_it_stays(inboxes: Inboxes) -> None:
    box, shelf = inboxes.make("box", "shelf")
    inboxes.up.apply(shelf={"type": "folder", "folder": str(shelf)})
    night = {"type": "inbox", "folder": str(box), "targets": ["shelf"], "watch": False, "timezone": "Europe/Berlin"}
    inboxes.apply(night=night | {"cron": "0 2 * * *"})
    there = inboxes.up.api("GET", "/deployments/name/batch/night")
    (schedule,) = there["schedules"]
    assert schedule["schedule"] == {"cron": "0 2 * * *", "timezone": "Europe/Berlin", "day_or": True}
    assert schedule["active"] and there["parameters"] == {"source": "night"}
    changed = {"schedule": {"cron": "30 4 * * *", "timezone": "Europe/Berlin"}, "active": True}
    inboxes.up.api("PATCH", f"/deployments/{there['id']}/schedules/{schedule['id']}", **changed)
    inboxes.apply(night=night | {"cron": "0 2 * * *", "description": "another word"})
    assert inboxes.up.told("source", "show", "night")["schedule"] == ["cron 30 4 * * * Europe/Berlin"]
    of_people: Any = [{"schedule": {"cron": f"{minute} 5 * * *"}} for minute in (0, 1)]
    inboxes.up.as_worker("POST", f"/deployments/{there['id']}/schedules", of_people)
    added = {"cron 0 5 * * * UTC", "cron 1 5 * * * UTC"}
    inboxes.apply(night=night | {"rrule": "FREQ=WEEKLY;BYDAY=SA"})
    assert {*inboxes.up.told("source", "show", "night")["schedule"]} == added | {"FREQ=WEEKLY;BYDAY=SA Europe/Berlin"}
    inboxes.apply(night=night | {"watch": True})
    assert {*inboxes.up.told("source", "show", "night")["schedule"]} == added
    inboxes.apply(night=night | {"interval_s": 10})
    assert {*inboxes.up.told("source", "show", "night")["schedule"]} == added | {"every 10 s"}
    material.ct(box / "s", 1)
    os.utime(box / "s", (1, 1))
    assert inboxes.up.told("source", "pause", "night")["action"] == "paused"
    assert inboxes.up.api("GET", "/deployments/name/batch/night")["paused"]
    assert inboxes.up.here("source", "sweep", "night").returncode == 2
    inboxes.up.told("source", "resume", "night")
    inboxes.apply(night=night | {"interval_s": 10, "settle_s": 0})
    inboxes.until("night", done=1)  # by the schedule alone
    of_schedule: Any = {"deployments": {"id": {"any_": [there["id"]]}}}
    of_schedule["flow_runs"] = {"state": {"type": {"any_": ["COMPLETED"]}}}
    assert "sweep of night" in {one["name"] for one in inboxes.up.api("POST", "/flow_runs/filter", **of_schedule)}
    inboxes.up.told("source", "remove", "night")
    inboxes.names.remove("night")
    found = inboxes.up.api("POST", "/deployments/filter", deployments={"name": {"any_": ["night"]}})
    assert not found and (box / "s").is_dir()


def test_a_list_of_accession_numbers_is_fetched_and_sent(inboxes: Inboxes) -> None:
    (shelf,) = inboxes.make("shelf")
    listed = inboxes.folder / "todo.csv"
    listed.write_text("Accession Number;remark\nA1;\nA2;\nNOPE;\n")
    with archive([one for number in ("A1", "A2") for one in study(number, 1, 2)]) as peer:
        inboxes.up.apply(shelf={"type": "folder", "folder": str(shelf)}, asked=source(peer))
        inboxes.apply(todo={"type": "list", "file": str(listed), "targets": ["shelf"], "query": "asked", "at_once": 2})
        inboxes.until("todo", done=2, failed=1)
        assert len(files(shelf)) == 4
        report = listed.with_name("todo.csv.report.csv")
        inboxes.up.until(lambda: "NOPE,failed" in report.read_text())
        assert "A1,delivered" in report.read_text() and "A2,delivered" in report.read_text()
        (shown,) = inboxes.up.told("source", "show", "todo")["attention"]
        assert "the source has no study that matches" in shown["detail"]


@pytest.mark.slow  # it takes some 20 s until a run is called whose target is enabled
def test_what_is_under_way_goes_on_when_its_source_is_removed(inboxes: Inboxes) -> None:
    box, shelf = inboxes.make("box", "shelf")
    target = {"type": "folder", "folder": str(shelf), "layout": "{StudyInstanceUID}"}
    inboxes.up.apply(shelf=target)
    assert inboxes.up.here("target", "disable", "shelf").returncode == 0  # what goes to it waits
    gone = {"type": "inbox", "folder": str(box), "targets": ["shelf"], "after": "delete", "settle_s": 0}
    material.ct(box / "s", 2)
    inboxes.apply(gone=gone)
    inboxes.until("gone", dispatched=1)
    assert inboxes.up.told("source", "remove", "gone")["action"] == "removed"
    assert inboxes.up.here("target", "enable", "shelf").returncode == 0
    inboxes.up.until(lambda: len(files(shelf)) == 2)
    assert len(files(box)) == 2, "nobody asks any more that they go"
    inboxes.apply(gone=gone)
    inboxes.until("gone", done=1)
    assert not files(box) and len(files(shelf)) == 2
