"""Dispatches that wait hold up nobody: they end their part, say for what and until when, and come back."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from talaria.testing import studies
from talaria.testing.relay import relay
from tasks.dispatch.breaker import LIMIT
from tests.engine.material import later
from tests.servers.dcmtk import storescp
from tests.servers.dicomweb import Reply, scripted
from tests.servers.scp import scp
from tests.servers.steps import Silence, Store
from tests.servers.up import Talaria
from transfer.ledger import Ledger

pytestmark = pytest.mark.timeout(600)
DEAD = 10  # dispatches; a worker runs eight at once


def folder(path: Path, **fields: Any) -> dict[str, Any]:
    path.mkdir(parents=True, exist_ok=True)
    return {"type": "folder", "folder": str(path), **fields}


def dead(port: int, **fields: Any) -> dict[str, Any]:
    waits = {"max_attempts": 9, "retry_delay_s": 3600, "retry_max_delay_s": 86_400}
    return {"type": "dicom", "host": "127.0.0.1", "port": port, "aet_target": "PACS", **waits, **fields}


def files(path: Path) -> set[str]:
    found = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return {os.path.relpath(name, path) for name in found if name.endswith(".dcm")}


def send(up: Talaria, study: Path, to: str, *options: str) -> str:
    return str(up.told("send", str(study), "--to", to, "--no-wait", *options)["flow_run_id"])


def rests(up: Talaria, run_id: str, times: int) -> bool:
    """Whether a run waits, after so many parts; one that waits for a slot comes back by itself now and then."""
    run = up.run(run_id)
    return bool(run["state"]["type"] == "SCHEDULED" and run["run_count"] >= times)


def go_on(up: Talaria, run_id: str) -> None:
    """Let the time come for which a run waits."""
    with Ledger(up.home / "ledger.sqlite") as ledger:
        home, kept = cast(tuple[str, str], ledger.rests.of(run_id))
        document = json.loads(kept)
        for left in document["left"].values():
            left["again"] = 0
        ledger.rests.keep(run_id, home, json.dumps(document))
    soon = {"scheduled_time": datetime.now(UTC).isoformat()}
    state = {"type": "SCHEDULED", "name": "AwaitingRetry", "state_details": soon}
    up.api("POST", f"/flow_runs/{run_id}/set_state", state=state, force=True)


def staged(up: Talaria, run_id: str) -> list[Path]:
    return [*(up.home / "staging").glob(f"{run_id}*")]


def artifacts(up: Talaria, run_id: str) -> int:
    return len(up.api("POST", "/artifacts/filter", flow_runs={"id": {"any_": [run_id]}}))


def test_dispatches_to_dead_targets_hold_up_no_other(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    up.apply(dead=dead(1), live=folder(tmp_path / "live"))
    waiting = [send(up, tmp_path / "study", "dead") for _ in range(DEAD)]
    assert up.told("send", str(tmp_path / "study"), "--to", "live")["state"] == "delivered"
    up.until(lambda: all(rests(up, run, 1) for run in waiting), 180)
    for run in waiting:
        state = up.run(run)["state"]
        assert state["name"] == "AwaitingRetry"
        assert re.match(r"tries again at [-0-9: ]+ UTC: (the next attempt at dead|dead to answer)", state["message"])
        assert not staged(up, run)
    shown = up.told("jobs", "show", waiting[0])["targets"]["dead"]
    assert (shown["state"], shown["attempts"], shown["unsent"]) == ("waiting", 1, 2) and shown["error"]


def create(up: Talaria, paths: list[Path], to: str) -> str:
    """Create a dispatch as any client of Prefect's does, which waits for no plan."""
    deployment = up.api("GET", "/deployments/name/dispatch/talaria")["id"]
    asked = {"paths": [str(one) for one in paths], "targets": to.split(",")}
    return str(up.api("POST", f"/deployments/{deployment}/create_flow_run", parameters=asked)["id"])


def states(up: Talaria, run_id: str) -> list[str]:
    found = up.api("GET", f"/flow_run_states/?flow_run_id={run_id}")
    return [one["name"] for one in sorted(found, key=lambda one: str(one["timestamp"]))]


def down(up: Talaria, study: Path, **target: dict[str, Any]) -> None:
    """Save a target that does not answer, and let dispatches find that out."""
    (name,) = target
    up.apply(**target)
    for _ in range(LIMIT):
        create(up, [study], name)
    up.until(lambda: breaker(up, name)["state"] == "open")


def test_what_comes_for_a_dead_target_rests_without_a_thread_and_without_its_files(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    (tmp_path / "empty").mkdir()
    down(up, tmp_path / "study", away=dead(1))
    run = create(up, [tmp_path / "study"], "away")
    refused = {"no such file": tmp_path / "missing", "nothing to send": tmp_path / "empty"}
    wrong = {why: create(up, [path], "away") for why, path in refused.items()} | {
        "no target named": create(up, [tmp_path / "study"], "away,unheard-of")
    }
    up.until(lambda: up.run(run)["state"]["name"] == "AwaitingRetry")
    for why, one in wrong.items():  # said at once, as of any other target
        up.until(lambda one=one: up.run(one)["state"]["type"] == "FAILED")  # type: ignore[misc]
        assert why in up.run(one)["state"]["message"]
    known = up.run(run)
    assert states(up, run) == ["AwaitingRetry"] and known["name"] == "to away"
    message = (
        r"tries again at [-0-9: ]+ UTC: away to answer, which it hasn't since [0-9:]+ UTC; its files have not been"
    )
    assert re.match(message, known["state"]["message"])
    assert artifacts(up, run) == 0 and not staged(up, run)
    shown = up.told("jobs", "show", run)
    assert shown["state"] == shown["targets"]["away"]["state"] == "waiting"
    with storescp(tmp_path / "pacs") as pacs:
        up.apply(away=dead(pacs.port, aet_target="STORESCP"))
        go_on(up, run)
        up.until(lambda: up.run(run)["state"]["type"] == "COMPLETED")
        assert len(pacs.names()) == 2 and up.run(run)["run_count"] == 1


def test_what_rests_unread_counts_its_attempts_and_ends_with_its_files_kept(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    down(up, tmp_path / "study", mute=dead(1, max_attempts=2))
    run = create(up, [tmp_path / "study"], "mute")
    up.until(lambda: up.run(run)["state"]["name"] == "AwaitingRetry")
    for attempts in (1, 2):
        with Ledger(up.home / "ledger.sqlite") as ledger, ledger.together():
            one = ledger.waits.breaker("mute")
            assert one
            one.until = 0.0  # it is time for a test
            ledger.waits.save(one)
        go_on(up, run)
        up.until(lambda attempts=attempts: up.run(run)["run_count"] == attempts)  # type: ignore[misc]
        up.until(lambda: up.run(run)["state"]["type"] in ("SCHEDULED", "FAILED"))
    assert up.run(run)["state"]["type"] == "FAILED"
    shown = up.told("jobs", "show", run)["targets"]["mute"]
    assert (shown["state"], shown["attempts"], shown["unsent"]) == ("failed", 2, 2) and shown["error"]
    assert (up.home / "failed" / run).exists() and not staged(up, run)

    with Ledger(up.home / "ledger.sqlite") as ledger:
        known = ledger.waits.breaker("mute")
    assert known and known.until > known.tested + 100
    # Whoever has it retried knows more than the breaker, which would wait for minutes.
    headers = {"Authorization": f"Bearer {(up.home / 'api.auth').read_text().strip()}"}
    url = f"http://127.0.0.1:{up.port}/talaria/api/v1/jobs/{run}/retry"
    httpx.post(url, headers=headers, trust_env=False, timeout=60).raise_for_status()

    def is_tested() -> bool:
        with Ledger(up.home / "ledger.sqlite") as ledger:
            one = ledger.waits.breaker("mute")
        return one is not None and one.tested > known.tested

    up.until(is_tested)
    up.here("jobs", "cancel", run)


def test_a_closed_window_is_waited_for_without_reading_the_files(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    up.apply(shut=folder(tmp_path / "shut", window=later(2)), open=folder(tmp_path / "open"))
    missing = create(up, [tmp_path / "missing"], "shut")
    run = create(up, [tmp_path / "study"], "shut")
    both = create(up, [tmp_path / "study"], "shut,open")
    up.until(lambda: up.run(missing)["state"]["type"] == "FAILED")
    up.until(lambda: rests(up, run, 1) and rests(up, both, 1))
    assert len(files(tmp_path / "open")) == 2 and up.told("jobs", "show", both)["targets"]["shut"]["unsent"] == 2
    assert up.run(run)["state"]["message"].endswith("the hours of shut; its files have not been read yet")
    assert artifacts(up, run) == 0 and not (up.home / "receipts" / f"{run}.json").exists()
    up.apply(shut=folder(tmp_path / "shut"))
    for one in (run, both):
        go_on(up, one)
        up.until(lambda one=one: up.run(one)["state"]["type"] == "COMPLETED")  # type: ignore[misc]
    assert [one["delivered"] for one in up.told("jobs", "show", run)["targets"].values()] == [2]


def test_a_run_comes_back_for_the_dead_target_alone_and_reads_nothing_for_it(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    others = {name: folder(tmp_path / name) for name in ("one", "two")}
    up.apply(**others, pacs=dead(1))
    run = send(up, tmp_path / "study", "one,two,pacs")
    up.until(lambda: rests(up, run, 1))
    assert len(files(tmp_path / "one")) == len(files(tmp_path / "two")) == 2
    arrived = {name: [p.stat().st_mtime_ns for p in (tmp_path / name).rglob("*.dcm")] for name in ("one", "two")}
    left = artifacts(up, run)
    (tmp_path / "study").rename(tmp_path / "away")  # whoever looked for the files would fail
    for times in (2, 3):
        go_on(up, run)
        up.until(lambda times=times: rests(up, run, times))  # type: ignore[misc]
        shown = up.told("jobs", "show", run)["targets"]
        assert [one["state"] for one in shown.values()] == ["delivered", "delivered", "waiting"]
        assert shown["pacs"]["attempts"] == times and f"attempt {times} of 9 failed" in shown["pacs"]["notes"][-1]
    assert artifacts(up, run) == left
    (tmp_path / "away").rename(tmp_path / "study")
    with storescp(tmp_path / "pacs") as pacs:
        up.apply(**others, pacs=dead(pacs.port, aet_target="STORESCP"))
        go_on(up, run)
        up.until(lambda: up.run(run)["state"]["type"] == "COMPLETED")
        assert len(pacs.names()) == 2
    shown = up.told("jobs", "show", run)["targets"]
    assert [(one["state"], one["delivered"]) for one in shown.values()] == [("delivered", 2)] * 3
    assert shown["pacs"]["attempts"] == 4 and [shown[name]["attempts"] for name in ("one", "two")] == [1, 1]
    assert arrived == {
        name: [p.stat().st_mtime_ns for p in (tmp_path / name).rglob("*.dcm")] for name in ("one", "two")
    }
    with Ledger(up.home / "ledger.sqlite") as ledger:
        assert ledger.rests.of(run) is None


def test_what_goes_from_its_source_while_a_run_waits_is_rejected_by_name(up: Talaria, tmp_path: Path) -> None:
    """Seen: what had vanished meanwhile was in no receipt any more, and the run was Completed."""
    studies.ct(tmp_path / "study", 3)
    for name in "abc":
        studies.ct(tmp_path / "many" / name, 2)
    beside = {"beside": folder(tmp_path / "beside")}
    up.apply(**beside, pacs=dead(1))
    runs = [send(up, tmp_path / "study", "pacs,beside"), send(up, tmp_path / "many", "pacs,beside", "--each", "folder")]
    for run in runs:
        up.until(lambda run=run: rests(up, run, 1))  # type: ignore[misc]
    assert len(files(tmp_path / "beside")) == 9
    (tmp_path / "study" / "CT0002.dcm").unlink()
    shutil.rmtree(tmp_path / "many" / "b")
    with storescp(tmp_path / "pacs") as pacs:
        up.apply(**beside, pacs=dead(pacs.port, aet_target="STORESCP"))
        for run in runs:
            go_on(up, run)
            up.until(lambda run=run: up.run(run)["state"]["type"] == "FAILED")  # type: ignore[misc]
        one, many = (up.told("jobs", "show", run) for run in runs)
        assert len(pacs.names()) == 2 + 4
        (lost,) = one["targets"]["pacs"]["items"]
        assert (lost["path"], lost["outcome"]) == ("CT0002.dcm", "rejected") and "not there any more" in lost["detail"]
        assert [target["state"] for target in one["targets"].values()] == ["partial", "delivered"]
        rows = {row["study"]: row["targets"] for row in many["studies"]}
        states = {name: row["pacs"]["state"] for name, row in rows.items()}
        assert states == {"a": "delivered", "b": "failed", "c": "delivered"}
        assert "not there any more" in rows["b"]["pacs"]["error"]
        assert many["targets"]["beside"]["delivered"] == 6 and rows["b"]["beside"]["state"] == "delivered"
        up.apply(**beside, other=folder(tmp_path / "other"), pacs=dead(pacs.port, aet_target="STORESCP"))
        sent = up.told("jobs", "send", runs[1], "--to", "other", code=1)
        assert {row["study"]: row["state"] for row in sent["studies"]} == {
            "a": "delivered",
            "b": "failed",
            "c": "delivered",
        }
        again = up.told("jobs", "retry", runs[1], "--only", "dicom/pacs", code=1)  # nor does a retry pass it over
        rows = {row["study"]: row["targets"] for row in again["studies"]}
        assert rows["b"]["pacs"]["state"] == "failed" and rows["b"]["beside"]["state"] == "delivered"
        shutil.copytree(tmp_path / "many" / "a", tmp_path / "many" / "b")
        assert up.told("jobs", "retry", runs[1])["state"] == "delivered"


def test_a_target_that_stays_busy_is_asked_again_without_reading_the_files(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    later = Reply(503, headers={"Retry-After": "3600"})
    with scripted(script=[later] * 99) as pacs:
        up.apply(pacs={"type": "dicomweb", "url": pacs.url, "max_attempts": 9})
        run = send(up, tmp_path / "study", "pacs")
        up.until(lambda: rests(up, run, 1))
        (tmp_path / "study").rename(tmp_path / "away")  # whoever looked for the files would fail
        go_on(up, run)
        up.until(lambda: rests(up, run, 2))
        shown = up.told("jobs", "show", run)["targets"]["pacs"]
        assert (shown["state"], shown["attempts"]) == ("waiting", 2) and "503" in shown["error"]
        assert breaker(up, "pacs") == {"state": "closed"}
        pacs.script.clear()
        (tmp_path / "away").rename(tmp_path / "study")
        go_on(up, run)
        up.until(lambda: up.run(run)["state"]["type"] == "COMPLETED")
        assert len(pacs.stored) == 2


def test_a_sender_that_is_off_keeps_nothing_from_the_others(up: Talaria, tmp_path: Path) -> None:
    """They are one target: `host: sender`. Where one is off, the node itself is tested, and not the target."""
    studies.ct(tmp_path / "study", 1)
    with storescp(tmp_path / "pacs") as pacs:
        back = dead(pacs.port, host="sender", aet_target="STORESCP", max_attempts=50)
        up.apply(back=back | {"retry_delay_s": 1, "retry_max_delay_s": 1})
        run = send(up, tmp_path / "study", "back", "--sender-host", "::1")  # where it does not listen
        up.until(lambda: "back at ::1 to answer" in (up.run(run)["state"]["message"] or ""))
        parts = up.run(run)["run_count"]
        for number in range(2):
            sent = up.told("send", str(tmp_path / "study"), "--to", "back", "--sender-host", "127.0.0.1", "--force")
            assert sent["state"] == "delivered", number
        up.until(lambda: up.run(run)["run_count"] > parts + 1 and up.run(run)["state"]["type"] == "SCHEDULED")
        assert "back at ::1 to answer" in up.run(run)["state"]["message"]
        up.until(lambda: events(up, "talaria.target.down").count("talaria.target.back") == 1)
        assert "talaria.target.back" not in events(up, "talaria.target.up")
        up.here("jobs", "cancel", run)


def test_the_last_attempt_ends_a_run_that_comes_back(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)
    up.apply(pacs=dead(1, max_attempts=2))
    run = send(up, tmp_path / "study", "pacs")
    up.until(lambda: rests(up, run, 1))
    go_on(up, run)
    up.until(lambda: up.run(run)["state"]["type"] == "FAILED")
    shown = up.told("jobs", "show", run)["targets"]["pacs"]
    assert (shown["state"], shown["attempts"], shown["unsent"]) == ("failed", 2, 1)
    shutil.rmtree(tmp_path / "study")  # links to its files are kept, though that part of the run had none
    again = up.told("jobs", "retry", run, "--no-wait")["id"]  # begins anew
    up.until(lambda: rests(up, again, 3))
    assert up.told("jobs", "show", run)["targets"]["pacs"]["attempts"] == 1
    up.here("jobs", "cancel", run)


def test_who_waits_for_a_slot_rests_and_is_woken_in_turn(up: Talaria, tmp_path: Path) -> None:
    for number in range(4):
        studies.ct(tmp_path / f"study{number}", 40 if number == 0 else 1)
    busy = folder(tmp_path / "busy", max_dispatches=1, concurrency=1)
    up.apply(busy=busy | {"bandwidth_limit": 1024})
    runs = [send(up, tmp_path / "study0", "busy")]
    up.until(lambda: up.run(runs[0])["state"]["type"] == "RUNNING" and list((tmp_path / "busy").iterdir()))
    for number, options in ((1, ()), (2, ()), (3, ("--priority", "urgent"))):
        runs.append(send(up, tmp_path / f"study{number}", "busy", *options))
        up.until(lambda: rests(up, runs[-1], 1))
    for run in runs[1:]:
        state = up.run(run)["state"]
        assert "tries again at " in state["message"] and "a slot at busy" in state["message"]
        assert not staged(up, run)
    up.apply(busy=busy)
    up.here("jobs", "cancel", runs[0])
    up.until(lambda: all(up.run(run)["state"]["type"] == "COMPLETED" for run in runs[1:]))
    ends = [datetime.fromisoformat(up.run(run)["end_time"]) for run in runs[1:]]
    assert ends[2] < ends[0] < ends[1]  # the urgent one, then as they came


def breaker(up: Talaria, name: str = "silent") -> dict[str, Any]:
    (found,) = (one["breaker"] for one in up.told("target", "list")["targets"] if one["name"] == name)
    return dict(found)


def events(up: Talaria, name: str) -> list[str]:
    found = up.api("POST", "/events/filter", filter={"event": {"name": [name]}})["events"]
    return [one["resource"]["prefect.resource.id"] for one in found]


def test_a_target_that_does_not_answer_is_tested_by_one_run_at_a_time(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)
    with storescp(tmp_path / "pacs") as pacs, relay(pacs.port, stall_after=0) as link:
        silent = dead(link.port, aet_target="STORESCP", max_attempts=50, retry_delay_s=5, idle_timeout_s=1)
        up.apply(silent=silent | {"max_dispatches": 8})
        assert breaker(up) == {"state": "closed"}
        runs = [send(up, tmp_path / "study", "silent") for _ in range(6)]
        up.until(lambda: breaker(up)["state"] == "open")
        found = breaker(up)
        assert found["failures"] >= 5 and found["reason"] and found["next_test"] > found["since"]
        up.until(lambda: "talaria.target.silent" in events(up, "talaria.target.down"))
        last = send(up, tmp_path / "study", "silent")
        up.until(lambda: up.run(last)["state"]["type"] == "SCHEDULED" and up.run(last)["run_count"])
        assert "silent to answer, which it hasn't since" in up.run(last)["state"]["message"]
        link.stall_after = None
        up.until(lambda: all(up.run(run)["state"]["type"] == "COMPLETED" for run in [*runs, last]))
        assert breaker(up) == {"state": "closed"}
        up.until(lambda: "talaria.target.silent" in events(up, "talaria.target.up"))


def test_a_target_that_answers_tests_and_hangs_at_pushes_gets_one_at_a_time(up: Talaria, tmp_path: Path) -> None:
    """Seen: each test closed its breaker, and as many pushes as it takes hung once more; two mails for each round."""
    for number in range(7):
        studies.ct(tmp_path / f"study{number}", 1)

    def at_the_peer() -> int:
        with peer.lock:
            return len(peer.stores)

    with scp(on_store=lambda store: Silence()) as peer:
        hangs = dead(peer.port, aet_target="PARROT", max_attempts=50, retry_delay_s=1, retry_max_delay_s=1)
        up.apply(hangs=hangs | {"idle_timeout_s": 1, "max_dispatches": 8, "concurrency": 1})
        runs = [send(up, tmp_path / f"study{number}", "hangs") for number in range(7)]
        up.until(lambda: breaker(up, "hangs")["state"] == "open")
        up.until(lambda: not peer.open)  # what was under way has ended
        seen, peer.most_open = at_the_peer(), 0
        up.until(lambda: at_the_peer() >= seen + 3)
        assert breaker(up, "hangs")["state"] == "open" and peer.most_open <= 2  # a test and a push
        peer.on_store = None
        up.until(lambda: all(up.run(run)["state"]["type"] == "COMPLETED" for run in runs))
    assert breaker(up, "hangs") == {"state": "closed"}
    up.until(lambda: "talaria.target.hangs" in events(up, "talaria.target.up"))
    for name in ("talaria.target.down", "talaria.target.up"):
        assert events(up, name).count("talaria.target.hangs") == 1


def test_what_was_given_up_is_listed_retried_for_one_target_and_sent_elsewhere(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    gone = {name: folder(tmp_path / name, max_attempts=1, retry_delay_s=0) for name in ("first", "second")}
    up.apply(**gone, other=folder(tmp_path / "other"))
    for name in gone:
        (tmp_path / name).rmdir()
    run = up.told("send", str(tmp_path / "study"), "--to", "first,second", code=1)["flow_run_id"]
    (listed,) = (one for one in up.told("jobs", "list", "--failed")["jobs"] if one["id"] == run)
    assert listed["state"] == "Failed" and "first failed" in listed["message"]
    assert run in up.here("jobs", "list", "--failed").stdout
    shutil.rmtree(tmp_path / "study")  # links to its files are kept
    sent = up.told("jobs", "send", run, "--to", "other")
    assert sent["flow_run_id"] != run and sent["state"] == "delivered" and len(files(tmp_path / "other")) == 2
    for name in gone:
        (tmp_path / name).mkdir()
    again = up.told("jobs", "retry", run, "--only", "second", code=1)
    assert again["flow_run_id"] == run and again["state"] == "partial"
    assert [one["state"] for one in again["targets"].values()] == ["failed", "delivered"]
    assert not files(tmp_path / "first") and len(files(tmp_path / "second")) == 2
    refused = up.here("jobs", "retry", run, "--only", "third")
    assert refused.returncode == 2 and "not one of the targets" in refused.stderr
    assert sent["flow_run_id"] not in {one["id"] for one in up.told("jobs", "list", "--failed")["jobs"]}
    assert (up.home / "failed" / run).exists()
    up.apply(night=folder(tmp_path / "night", window=later(2)))
    waits = up.told("jobs", "send", run, "--to", "night", "--no-wait")["id"]
    assert up.told("jobs", "retry", run)["state"] == "delivered" and len(files(tmp_path / "first")) == 2
    assert not (up.home / "failed" / run).exists()
    (path,) = up.run(waits)["parameters"]["paths"]  # what waits for the night has links of its own to the last copy
    assert len(files(Path(path))) == 2 and up.told("jobs", "cancel", waits)["action"] == "cancelled"


@pytest.mark.parametrize("options", [(), ("--each", "folder")], ids=["study", "flood"])
def test_who_sends_the_same_as_another_run_waits_without_a_place_and_finds_it_sent(
    up: Talaria, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """It held a place of the worker, a slot of the target and staged files as long as the first one took."""
    studies.ct(tmp_path / "many" / "study", 2)
    got: list[str] = []
    goes_on = threading.Event()

    def keep(store: Store) -> int:
        got.append(str(store.SOPInstanceUID))
        goes_on.wait(60)
        return 0

    with scp(on_store=keep, keep_data=False) as pacs:
        up.apply(twice={"type": "dicom", "host": "127.0.0.1", "port": pacs.port, "aet_target": pacs.aet})
        first = send(up, tmp_path / "many", "twice", *options)
        up.until(lambda: got)
        second = send(up, tmp_path / "many", "twice", *options)
        up.until(lambda: "the same dispatch to twice, which another run" in (up.run(second)["state"]["message"] or ""))
        assert staged(up, first) and not staged(up, second)
        waits = up.told("jobs", "show", second)["targets"]["twice"]
        assert (waits["state"], waits["attempts"], waits["error"]) == ("waiting", 0, None)
        goes_on.set()
        up.until(lambda: all(up.run(run)["state"]["type"] == "COMPLETED" for run in (first, second)))
    found = up.told("jobs", "show", second)["targets"]["twice"]
    assert (found["already"], found["delivered"]) == (2, 0) and len(got) == 2
