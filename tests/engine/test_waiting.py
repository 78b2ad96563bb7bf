"""Dispatches that wait, are cancelled, killed, or lose a file under way: nothing is lost, and what is told is true."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from talaria.testing import studies
from talaria.testing.process import as_loaded
from tests.engine.material import go_on, later
from tests.servers.dicomweb import Reply, scripted
from tests.servers.up import Talaria

pytestmark = pytest.mark.timeout(600)
CANCEL_S = 5  # how long a cancellation may take, where nothing else runs
SLOW = 20_000  # bytes per second


def folder(path: Path, **fields: Any) -> dict[str, Any]:
    path.mkdir(parents=True, exist_ok=True)
    return {"type": "folder", "folder": str(path), "max_attempts": 3, "retry_delay_s": 0.2, **fields}


def files(path: Path) -> set[str]:
    # os.walk passes over folders that are renamed while it looks.
    return {os.path.relpath(os.path.join(folder, name), path) for folder, _, names in os.walk(path) for name in names}


def state_of(up: Talaria, run_id: str) -> str:
    return str(up.run(run_id)["state"]["type"])


def cancelled_in_time(up: Talaria, run_id: str) -> dict[str, Any]:
    """Cancel a run as the UI does; it must have stopped in time. Returns what `jobs show` tells then."""
    begun = time.monotonic()
    up.api("POST", f"/flow_runs/{run_id}/set_state", state={"type": "CANCELLING"})
    up.until(lambda: state_of(up, run_id) == "CANCELLED")
    assert time.monotonic() - begun < as_loaded(CANCEL_S)
    shown: dict[str, Any] = up.told("jobs", "show", run_id)
    return shown


def test_what_is_queued_is_told_with_what_is_known(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    (tmp_path / "study" / "notes.txt").write_text("no DICOM")
    (tmp_path / "study" / "empty.dcm").write_bytes(b"")
    pacs = {"type": "dicom", "host": "127.0.0.1", "port": 1, "aet_target": "PACS", "window": later(2)}
    up.apply(archive=folder(tmp_path / "archive", exclude="*.txt"), pacs=pacs)
    queued = up.told("send", str(tmp_path / "study"), "--to", "archive,pacs", "--no-wait")
    assert queued["state"] == "waiting" and up.run(queued["flow_run_id"])["name"].startswith(queued["dispatch_id"])
    archive, to_pacs = queued["targets"]["archive"], queued["targets"]["pacs"]
    assert (archive["state"], archive["unsent"], archive["skipped"], archive["attempts"]) == ("waiting", 3, 1, 0)
    assert (to_pacs["unsent"], to_pacs["skipped"], to_pacs["rejected"]) == (2, 1, 1)
    assert {i["path"]: i["outcome"] for i in archive["items"]}["notes.txt"] == "skipped"
    # It has the keys of every receipt.
    up.until(lambda: (up.home / "receipts" / f"{queued['flow_run_id']}.json").exists())
    up.until(lambda: state_of(up, queued["flow_run_id"]) == "SCHEDULED")
    shown = up.told("jobs", "show", queued["flow_run_id"])
    assert set(shown["targets"]["archive"]) == set(archive) and shown["targets"]["archive"]["state"] == "delivered"
    assert shown["targets"]["pacs"]["state"] == "waiting" and shown["targets"]["pacs"]["attempts"] == 0
    again = up.told("send", str(tmp_path / "study"), "--to", "archive,pacs", "--no-wait")
    assert again["targets"]["archive"]["already"] == 3 and again["targets"]["archive"]["unsent"] == 0
    forced = up.told("send", str(tmp_path / "study"), "--to", "archive", "--no-wait", "--force")
    assert forced["targets"]["archive"]["unsent"] == 3
    for one in (queued, again):
        up.here("jobs", "cancel", one["flow_run_id"])


def test_a_waiting_run_goes_on_when_the_window_opens_or_the_target_is_enabled(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    closed = folder(second, window=later(2))
    up.apply(first=folder(first), second=closed, third=folder(third, window=later(3)))
    run = up.told("send", str(tmp_path / "study"), "--to", "first,second,third", "--no-wait")["flow_run_id"]
    up.until(lambda: len(files(first)) == 3 and state_of(up, run) == "SCHEDULED")
    up.here("target", "disable", "third")
    up.apply(second=folder(second))
    go_on(up, run)
    up.until(lambda: len(files(second)) == 3 and state_of(up, run) == "SCHEDULED")
    state = up.run(run)["state"]
    wait = datetime.fromisoformat(state["state_details"]["scheduled_time"]) - datetime.now(UTC)
    assert timedelta(minutes=9) < wait < timedelta(minutes=11)  # it doesn't come for nothing each minute
    assert "third to be enabled" in state["message"] and not files(third)
    up.apply(third=folder(third))  # enabled, and without a window
    up.until(lambda: state_of(up, run) == "COMPLETED")
    shown = up.told("jobs", "show", run)
    assert shown["state"] == "delivered" and shown["run"]["runs"] in (3, 4)  # the window's change calls it, too
    assert [one["delivered"] for one in shown["targets"].values()] == [2, 2, 2]  # each once, by this run


@pytest.mark.slow
def test_the_clock_opens_windows_and_enabling_frees_what_waits(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    now = datetime.now(UTC)
    opening = now + timedelta(minutes=1 if now.second < 40 else 2)
    window = f"{opening:%H:%M}-{opening + timedelta(hours=1):%H:%M}"
    up.apply(by_clock=folder(tmp_path / "by-clock", window=window), by_hand=folder(tmp_path / "by-hand"))
    # Nobody can send to a disabled target; it is disabled while the run waits.
    run = up.told("send", str(tmp_path / "study"), "--to", "by-clock", "--no-wait")["flow_run_id"]
    both = up.told("send", str(tmp_path / "study"), "--to", "by-clock,by-hand", "--no-wait")["flow_run_id"]
    up.here("target", "disable", "by-hand")
    up.until(lambda: state_of(up, run) == "COMPLETED", 180)
    assert datetime.now(UTC) >= opening.replace(second=0, microsecond=0)
    up.here("target", "enable", "by-hand")
    up.until(lambda: state_of(up, both) == "COMPLETED", 180)
    assert len(files(tmp_path / "by-hand")) == 3


def test_queued_and_waiting_runs_are_cancelled_at_once(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 60)  # so slow that it is still under way when it is cancelled
    closed = folder(tmp_path / "closed", window=later(2))
    dead = {"type": "dicom", "host": "127.0.0.1", "port": 1, "aet_target": "PACS", "connect_timeout_s": 1}
    up.apply(
        closed=closed,
        dead={**dead, "max_attempts": 9, "retry_delay_s": 3600, "retry_max_delay_s": 3600},
        busy=folder(tmp_path / "busy", bandwidth_limit=1024, max_dispatches=1),
    )
    waits = up.told("send", str(tmp_path / "study"), "--to", "closed", "--no-wait")["flow_run_id"]
    backs_off = up.told("send", str(tmp_path / "study"), "--to", "dead", "--no-wait")["flow_run_id"]
    sends = up.told("send", str(tmp_path / "study"), "--to", "busy", "--no-wait")["flow_run_id"]
    studies.ct(tmp_path / "other", 2)
    queues = up.told("send", str(tmp_path / "other"), "--to", "busy", "--no-wait")["flow_run_id"]
    up.until(lambda: state_of(up, waits) == "SCHEDULED")
    up.until(lambda: files(tmp_path / "busy") and _log(up, backs_off))  # one is under way, one has failed once
    up.until(lambda: [state_of(up, one) for one in (backs_off, sends, queues)] == ["SCHEDULED", "RUNNING", "SCHEDULED"])
    begun = time.monotonic()
    told = up.told("jobs", "cancel", waits)
    assert told == {"id": waits, "action": "cancelled"} and state_of(up, waits) == "CANCELLED"
    assert time.monotonic() - begun < as_loaded(CANCEL_S)
    shown = up.told("jobs", "show", waits)
    assert shown["state"] == shown["targets"]["closed"]["state"] == "cancelled"
    for one, name in ((backs_off, "dead"), (queues, "busy"), (sends, "busy")):
        shown = cancelled_in_time(up, one)
        assert shown["state"] == shown["targets"][name]["state"] == "cancelled", shown
        assert shown["targets"][name]["unsent"] > 0
    assert not list((up.home / "staging").iterdir())
    refused = up.here("jobs", "cancel", waits)
    assert refused.returncode == 2 and "has ended" in refused.stderr
    # The place at the target is free again.
    up.apply(busy=folder(tmp_path / "busy", max_dispatches=1))
    assert up.told("jobs", "retry", sends)["state"] == "delivered"


def test_who_waits_for_a_dispatch_is_told_what_it_waits_for(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)
    with scripted(script=[Reply(503, headers={"Retry-After": "5"})]) as pacs:
        up.apply(overloaded={"type": "dicomweb", "url": pacs.url})
        ended = up.here("send", str(tmp_path / "study"), "--to", "overloaded", "--json")
    assert ended.returncode == 0 and json.loads(ended.stdout)["targets"]["overloaded"]["attempts"] == 2
    assert "overloaded: attempt 1 of 5 failed: " in ended.stderr and "503" in ended.stderr


def test_a_file_that_changes_under_way_is_rejected_and_the_rest_arrives(up: Talaria, tmp_path: Path) -> None:
    sent = studies.ct(tmp_path / "study", 10)
    up.apply(archive=folder(tmp_path / "archive", bandwidth_limit=20_000, concurrency=1))
    run = up.told("send", str(tmp_path / "study"), "--to", "archive", "--no-wait")["flow_run_id"]
    up.until(lambda: files(tmp_path / "archive"))
    with sent[-1].open("ab") as file:
        file.write(b"more")
    replaced = sent[-2].read_bytes()
    (tmp_path / "new").write_bytes(studies.ct_bytes())
    os.replace(tmp_path / "new", sent[-2])  # another file under its name: the one that was planned goes
    up.until(lambda: state_of(up, run) == "FAILED")
    result = up.told("jobs", "show", run)["targets"]["archive"]
    assert (result["state"], result["delivered"], result["rejected"]) == ("partial", 9, 1)
    (item,) = result["items"]
    assert item["path"] == sent[-1].name and item["outcome"] == "rejected" and "changed" in item["detail"]
    (arrived,) = (p for p in (tmp_path / "archive").iterdir() if not p.name.startswith("."))
    assert {p.name for p in arrived.glob("*.dcm")} == {p.name for p in sent[:-1]}
    assert (arrived / sent[-2].name).read_bytes() == replaced


@pytest.mark.slow
def test_a_worker_killed_within_a_push_to_a_folder_loses_nothing(tmp_path: Path) -> None:
    sent = studies.ct(tmp_path / "study", 12)
    one = Talaria(tmp_path)
    try:
        one.start()
        one.apply(archive=folder(tmp_path / "archive", bandwidth_limit=SLOW, concurrency=1))
        run = one.json("send", str(tmp_path / "study"), "--to", "archive", "--no-wait")
        one.until(lambda: len(files(tmp_path / "archive")) > 3)
        one.child("talaria.engine.worker").kill()
        one.until(lambda: state_of(one, run["flow_run_id"]) == "COMPLETED", 120)
        shown = one.json("jobs", "show", run["flow_run_id"])
        assert shown["state"] == "delivered" and shown["run"]["runs"] == 2
        result = shown["targets"]["archive"]
        assert result["delivered"] + result["already"] == len(sent)
        assert files(tmp_path / "archive") == {f"{run['dispatch_id']}/{p.name}" for p in sent} | {
            f"{run['dispatch_id']}/.complete"
        }
        assert not list((one.home / "staging").iterdir())
    finally:
        one.stop()


@pytest.mark.slow
def test_a_killed_send_with_a_server_of_its_own_is_taken_up(tmp_path: Path) -> None:
    sent = studies.ct(tmp_path / "study", 12)
    one = Talaria(tmp_path)
    one.apply(archive=folder(tmp_path / "archive", bandwidth_limit=SLOW, concurrency=1))
    sending = one.background("send", str(tmp_path / "study"), "--to", "archive")
    one.until(lambda: len(files(tmp_path / "archive")) > 3)
    children = psutil.Process(sending.pid).children(recursive=True)
    sending.kill()
    sending.wait()
    psutil.wait_procs(children, 10)
    assert not any(child.is_running() for child in children)  # its server went with it
    (job,) = one.json("jobs", "list")["jobs"]
    assert job["state"] == "AwaitingRetry"  # not Running: nobody runs it
    assert one.json("recover") == {"recovered": [job["id"]]}
    shown = one.json("jobs", "show", job["id"])
    assert shown["state"] == "delivered" and shown["run"]["state"] == "Completed"
    result = shown["targets"]["archive"]
    assert result["delivered"] + result["already"] == len(sent)
    assert len(files(tmp_path / "archive")) == len(sent) + 1 and not list((one.home / "staging").iterdir())
    assert one.json("recover") == {"recovered": []}


@pytest.mark.slow
def test_commands_share_the_server_that_one_of_them_started(tmp_path: Path) -> None:
    studies.ct(tmp_path / "slow", 400)  # so slow that it still runs when it is to be cancelled
    studies.ct(tmp_path / "fast", 2)
    one = Talaria(tmp_path)
    one.apply(
        archive=folder(tmp_path / "archive", bandwidth_limit=SLOW, concurrency=1), shelf=folder(tmp_path / "shelf")
    )
    first = one.background("send", str(tmp_path / "slow"), "--to", "archive")
    one.until(lambda: files(tmp_path / "archive"))
    # No worker serves the second; it runs its dispatch by itself.
    result = one.json("send", str(tmp_path / "fast"), "--to", "shelf")
    assert result["state"] == "delivered" and first.poll() is None
    # The first is running, and can be cancelled from here.
    job = next(j for j in one.json("jobs", "list")["jobs"] if j["targets"] == ["archive"])
    assert job["state"] == "Running"
    one.json("jobs", "cancel", job["id"])
    assert first.wait(CANCEL_S + 20) == 1
    receipt = json.loads((one.home / "receipts" / f"{job['id']}.json").read_text())
    assert receipt["state"] == "cancelled" and receipt["targets"]["archive"]["unsent"] > 0


@pytest.mark.slow
def test_ctrl_c_cancels_what_a_command_runs_by_itself(tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 12)
    one = Talaria(tmp_path)
    one.apply(archive=folder(tmp_path / "archive", bandwidth_limit=SLOW, concurrency=1))
    sending = one.background("send", str(tmp_path / "study"), "--to", "archive", "--json")
    one.until(lambda: len(files(tmp_path / "archive")) > 2)
    sending.send_signal(signal.SIGINT)
    assert sending.wait(CANCEL_S + 20) == 1
    (job,) = one.json("jobs", "list")["jobs"]
    assert job["state"] == "Cancelled"
    one.apply(archive=folder(tmp_path / "archive"))
    assert one.json("jobs", "retry", job["id"])["state"] == "delivered"


def test_every_attempt_is_shown_as_it_fails_and_the_log_says_it_in_one_line(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)
    pacs = {"type": "dicom", "host": "127.0.0.1", "port": 1, "aet_target": "PACS", "max_attempts": 3}
    up.apply(dead={**pacs, "retry_delay_s": 0.2, "retry_max_delay_s": 0.2})
    ended = up.here("send", str(tmp_path / "study"), "--to", "dead", "--json")
    receipt = json.loads(ended.stdout)["targets"]["dead"]
    assert ended.returncode == 1 and receipt["attempts"] == 3 and receipt["error"]
    said = [line for line in ended.stderr.splitlines() if line.startswith("dead: ")]
    assert [line.partition(" failed: ")[0] for line in said] == [f"dead: attempt {n} of 3" for n in (1, 2, 3)]
    run = json.loads(ended.stdout)["flow_run_id"]
    up.until(lambda: any("dead: attempt 3 of 3" in message for message in _log(up, run)))  # sent in batches
    log = "\n".join(_log(up, run))
    assert "Traceback" not in log
    assert log.count("dead: attempt ") == 3
    assert len(re.findall(r"the next attempt begins in \d+\.\d s\b", log)) == 2


def _log(up: Talaria, run_id: str) -> list[str]:
    found = up.api("POST", "/logs/filter", logs={"flow_run_id": {"any_": [run_id]}}, sort="TIMESTAMP_ASC")
    return [one["message"] for one in found if "failed" in one["message"] or "attempt" in one["message"]]
