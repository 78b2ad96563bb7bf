"""What is remembered has bounds: what is old goes, and sooner where it takes too much; what goes on stays."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import uuid
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from prefect.client.schemas.objects import TERMINAL_STATES

from talaria.engine import freed, retention
from talaria.engine.leftovers import forget
from talaria.engine.unended import ENDED, unended
from talaria.testing import studies
from tasks.retrieve.job import Job
from tests.engine.material import folder, later, source, study
from tests.servers.qr import archive
from tests.servers.up import Talaria
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.outcome import Kind, Outcome
from transfer.plan import Origin, Plan, scan

DAY_S = 86_400.0


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    for name in ("receipts", "waiting", "retrievals", "logs"):
        (home.root / name).mkdir(parents=True)
    return home


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    studies.ct(tmp_path / "study", 1)
    return scan([str(tmp_path / "study")], (), Origin())


def ended(home: Home, plan: Plan, run_id: str, days: float, monkeypatch: pytest.MonkeyPatch, size: int = 0) -> None:
    """Leave what a dispatch leaves that ended so many days ago."""
    now = time.time()
    (item,) = plan.items
    with Ledger(home.ledger) as ledger, monkeypatch.context() as past:
        past.setattr("time.time", lambda: now - days * DAY_S)
        ledger.runs.begins(run_id, "gone")
        ledger.runs.same_dispatch(run_id, replace(plan, dispatch_id=f"dispatch-{run_id}"))
        ledger.record(f"dispatch-{run_id}", "archive", "folder", item, Outcome(Kind.DELIVERED))
        ledger.runs.ends(run_id)
    for path in (home.receipt(run_id), home.root / "retrievals" / run_id / "job.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps("x" * size))
        os.utime(path, (now - days * DAY_S,) * 2)


def left(home: Home) -> set[str]:
    """The runs of which there is anything left; all of it, then."""
    receipts = {path.stem for path in home.receipt("").parent.iterdir()}
    assert {path.parent.name for path in home.root.glob("retrievals/*/job.json")} == receipts
    with Ledger(home.ledger) as ledger:
        assert {run_id for run_id in receipts if ledger.results(f"dispatch-{run_id}")} == receipts
    with closing(sqlite3.connect(home.root / "ledger.sqlite")) as db:
        assert {row[0] for row in db.execute("SELECT flow_run_id FROM runs")} == receipts
    return receipts


def test_what_is_old_goes_unless_it_goes_on(home: Home, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    for run_id, days in (("old", 91), ("waits", 91), ("young", 89)):
        ended(home, plan, run_id, days, monkeypatch)
    with Ledger(home.ledger) as ledger:
        ledger.rests.keep("waits", home.identity(), "{}")
        ledger._db.execute("UPDATE rests SET time=1")
    aged = list[float]()

    async def vacuum(age: float, keep: object) -> None:
        aged.append(age)

    kept = asyncio.run(retention.tidy(home, 90 * DAY_S, 1 << 30, {"waits"}, vacuum))
    assert left(home) == {"waits", "young"} and kept == 90 * DAY_S and aged == [kept]
    with Ledger(home.ledger) as ledger:
        assert ledger.rests.runs() == {"waits"}
    asyncio.run(retention.tidy(home, 90 * DAY_S, 1 << 30, ()))
    with Ledger(home.ledger) as ledger:
        assert left(home) == {"young"} and ledger.rests.runs() == set()


def test_what_a_retrieval_left_in_a_folder_of_the_user_s_goes_with_its_state(home: Home, tmp_path: Path) -> None:
    """And nothing else does: not what others may have put there, or what has another name."""
    into, others = tmp_path / "into", tmp_path / "others"
    others.mkdir(mode=0o777)
    others.chmod(0o777)
    spools = {
        "old": into / ".talaria-old", "open": into / ".talaria-open", "linked": into / ".talaria-linked",
        "odd": into / "odd", "writable": others / ".talaria-writable",
    }  # fmt: skip
    for run_id, spool in spools.items():
        studies.ct(into / "linked.to" if run_id == "linked" else spool / "spool" / "1.2.3", 1)
        job = Job(home.root / "retrievals" / run_id, spool=str(spool))
        job.save()
        os.utime(job.folder / "job.json", (time.time() - 3 * DAY_S,) * 2)
    spools["linked"].symlink_to(into / "linked.to")
    asyncio.run(retention.tidy(home, DAY_S, 1 << 30, {"open"}))
    assert {run_id for run_id, spool in spools.items() if not list(spool.rglob("*.dcm"))} == {"old"}
    assert not spools["old"].exists() and [path.name for path in (home.root / "retrievals").iterdir()] == ["open"]


def test_what_several_hosts_share_stays_as_long_as_files_that_another_one_may_keep(
    home: Home, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can't know of which runs: they would have been sent again whole."""
    for run_id, days in (("old", 20), ("given up", 10), ("young", 0.01)):
        ended(home, plan, run_id, days, monkeypatch)
        with Ledger(home.ledger) as ledger, monkeypatch.context() as past:
            now = time.time()
            past.setattr("time.time", lambda now=now, days=days: now - days * DAY_S)
            ledger.rests.keep(run_id, "another host", "{}")
    monkeypatch.setattr(Ledger, "shared", True)
    asyncio.run(retention.tidy(home, 5 * DAY_S, 1, (), failed_age=14 * DAY_S))
    with Ledger(home.ledger) as ledger:
        assert ledger.rests.runs() == {"given up", "young"}
        assert {one for one in ("old", "given up", "young") if ledger.results(f"dispatch-{one}")} == {
            "given up",
            "young",
        }


def test_a_clock_that_is_years_ahead_forgets_nothing(
    home: Home, plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for run_id, days in (("old", 91), ("young", 0.1)):
        ended(home, plan, run_id, days, monkeypatch)
    now = time.time()
    with monkeypatch.context() as ahead:
        ahead.setattr("time.time", lambda: now + 4000 * DAY_S)
        asyncio.run(retention.tidy(home, 90 * DAY_S, 1, ()))
    assert left(home) == {"old", "young"} and "the clock is wrong" in caplog.text
    asyncio.run(retention.tidy(home, 90 * DAY_S, 1 << 30, ()))
    assert left(home) == {"young"}


def test_a_clock_that_is_weeks_ahead_takes_nothing_of_what_was_given_up(
    home: Home, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be all that is left of that: a clock is ahead for an hour, and files don't come back."""
    ended(home, plan, "given up", 1, monkeypatch)
    folder = home.root / "failed" / "given up" / "files"
    folder.mkdir(parents=True)
    now = time.time()
    with monkeypatch.context() as ahead:
        ahead.setattr("time.time", lambda: now + 30 * DAY_S)
        asyncio.run(retention.tidy(home, 90 * DAY_S, 1 << 30, (), failed_age=14 * DAY_S))
    assert folder.is_dir() and left(home) == {"given up"}
    os.utime(folder.parent, (now - 20 * DAY_S,) * 2)
    asyncio.run(retention.tidy(home, 90 * DAY_S, 1 << 30, (), failed_age=14 * DAY_S))
    assert not folder.exists()


def test_the_clock_of_a_ledger_that_is_shared_decides(home: Home, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what lies beside it: this host's clock may be ahead."""
    ended(home, plan, "young", 1, monkeypatch)
    now = time.time()
    monkeypatch.setattr(Ledger, "now", lambda self: now)
    monkeypatch.setattr("time.time", lambda: now + 4000 * DAY_S)
    asyncio.run(retention.tidy(home, 90 * DAY_S, 1 << 30, ()))
    assert left(home) == {"young"}


def test_the_oldest_goes_sooner_where_all_takes_too_much(
    home: Home, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(10):
        ended(home, plan, f"run{number}", number + 0.5, monkeypatch, 100_000)
    ended(home, plan, "waits", 9, monkeypatch)
    ended(home, plan, "now", 0.01, monkeypatch, 100_000)
    limit = retention.used(home) - 550_000
    asyncio.run(retention.tidy(home, 90 * DAY_S, limit, {"waits"}))
    there = left(home)
    assert retention.used(home) <= limit and there == {f"run{n}" for n in range(len(there) - 2)} | {"waits", "now"}
    assert len(there) >= 5
    # What is hours old stays in any case.
    assert asyncio.run(retention.tidy(home, 90 * DAY_S, 1, {"waits"})) == retention.YOUNGEST_S
    assert left(home) == {"waits", "now"}


def test_the_steps_begin_where_the_last_look_ended(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each looks through all that is kept, and from 90 days to hours there are 31."""
    looks, aged = list[float](), list[list[float]]()

    async def clear(age: float, keep: object) -> None:
        if age == 90 * DAY_S:
            aged.append([])
        aged[-1].append(age)

    async def nothing_open(client: httpx.AsyncClient) -> set[str]:
        return set()

    async def tidied(*given: Any, **more: Any) -> float:
        looks.append(kept := await tidy(*given, **more))
        if len(looks) == 2:
            raise asyncio.CancelledError
        return kept

    tidy = retention.tidy
    for name, one in {"vacuum": clear, "unfinished": nothing_open, "tidy": tidied, "EVERY_S": 0.0}.items():
        monkeypatch.setattr(retention, name, one)
    monkeypatch.setattr("talaria.engine.retention.used", lambda home: 2 * 10 * 1024**3)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(retention.keep(home, cast(httpx.AsyncClient, None), embedded=True))
    assert looks == [retention.YOUNGEST_S] * 2
    assert len(aged[0]) > 20 and aged[1] == [90 * DAY_S, retention.YOUNGEST_S]


def test_the_disk_of_what_has_gone_is_given_back(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed, "PORTION", 10)

    async def vacuum(_: float, keep: object) -> None:
        with closing(sqlite3.connect(prefects)) as db, db:
            db.execute("DELETE FROM items")

    ours, prefects = home.root / "ledger.sqlite", home.root / "prefect/prefect.db"
    prefects.parent.mkdir()
    for path in (ours, prefects):
        with Ledger(path), closing(sqlite3.connect(path)) as db, db:
            rows = ((str(number), "x" * 1000) for number in range(2000))
            db.executemany("INSERT INTO items VALUES ('old',?,?,'e',1,1,'','delivered','',1,1)", rows)
    before = [path.stat().st_size for path in (ours, prefects)]
    asyncio.run(retention.tidy(home, DAY_S, 1 << 30, (), vacuum))
    for path, size in zip((ours, prefects), before, strict=True):
        assert size > 2_000_000 > 300_000 > path.stat().st_size
        assert freed.taken(path) <= path.stat().st_size <= freed.taken(path) / (1 - freed.SPARE) + 4096


def test_a_file_that_was_made_before_stays_as_long_as_it_is(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "old # 1.db")) as db:
        db.execute("CREATE TABLE many (x)")
        db.executemany("INSERT INTO many VALUES (?)", [("x" * 4000,)] * 100)
        db.execute("DELETE FROM many")
        db.commit()
    size = (tmp_path / "old # 1.db").stat().st_size
    assert freed.give_back(tmp_path / "old # 1.db") == 0 and freed.taken(tmp_path / "old # 1.db") < size / 10
    assert (tmp_path / "old # 1.db").stat().st_size == size


def test_a_long_log_begins_anew(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "LOG_BYTES", 10)
    log = home.root / "logs" / "server.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"first line\n")
        asyncio.run(retention.tidy(home, DAY_S, 1 << 30, ()))
        writer.write(b"second\n")
    assert log.read_bytes() == b"second\n" and log.with_name("server.log.1").read_bytes() == b"first line\n"


def test_where_there_is_no_room_for_a_long_log_all_the_rest_is_cleared(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, goal: Path) -> None:
        goal.write_bytes(source.read_bytes()[:4])
        raise OSError(errno.ENOSPC, "No space left on device")

    async def vacuum(age: float, keep: Any) -> None:
        cleared.append(age)

    cleared = list[float]()
    monkeypatch.setattr(retention, "LOG_BYTES", 10)
    monkeypatch.setattr(shutil, "copyfile", full)
    logs = [home.root / "logs" / f"{name}.log" for name in ("server", "worker")]
    for log in logs:
        log.write_bytes(b"a long line\n")
    asyncio.run(retention.tidy(home, DAY_S, 1 << 30, (), vacuum))
    assert cleared == [DAY_S]
    assert [(one.name, one.stat().st_size) for one in sorted((home.root / "logs").iterdir())] == [
        ("server.log", 0),
        ("worker.log", 0),
    ]


def test_runs_that_have_not_ended_are_asked_for_page_by_page() -> None:
    runs: list[dict[str, Any]] = [{"id": str(number), "parameters": {}} for number in range(2 * retention.PAGE + 1)]
    # What is kept of a run that has ended, and is to be sent by another one.
    given_up = str(uuid.uuid4())
    runs[-1]["parameters"] = {"paths": [f"/state/failed/{given_up}/files", "/data"]}
    runs[0]["parameters"] = {"paths": "odd"}

    def answer(request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        states = set(asked["flow_runs"]["state"]["type"]["any_"])
        assert {"SCHEDULED", "PAUSED", "RUNNING"} < states and not states & {"COMPLETED", "FAILED", "CANCELLED"}
        return httpx.Response(200, json=runs[asked["offset"] : asked["offset"] + asked["limit"]], request=request)

    async def ask() -> set[str]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://there/api") as client:
            return await retention.unfinished(client)

    assert asyncio.run(ask()) == {run["id"] for run in runs} | {given_up}
    assert set(ENDED) == {one.value for one in TERMINAL_STATES}


def test_old_runs_go_with_all_that_belongs_to_them(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)
    (tmp_path / "archive").mkdir()
    archive = {"type": "folder", "folder": str(tmp_path / "archive")}
    opens, closes = (datetime.now(UTC) + timedelta(hours=hours) for hours in (2, 3))
    up.apply(archive=archive, later=archive | {"window": f"{opens:%H:%M}-{closes:%H:%M}"})
    run = up.told("send", str(tmp_path / "study"), "--to", "archive")["flow_run_id"]
    kept = up.told("send", str(tmp_path / "study"), "--to", "archive")["flow_run_id"]  # as if it had been given up
    waits = up.told("send", str(tmp_path / "study"), "--to", "later", "--no-wait")["flow_run_id"]
    up.until(lambda: up.run(waits)["state"]["name"] == "AwaitingRetry")
    up.until(lambda: up.api("POST", "/logs/filter", logs={"flow_run_id": {"any_": [run]}}))  # they come in bulk
    copy = tmp_path / "prefect.db"
    copy.write_bytes(up._copy_of_the_database())
    up.here("jobs", "cancel", waits)
    of_the_run = ("log", "artifact", "flow_run_state", "task_run")
    with closing(sqlite3.connect(copy)) as db:

        def count(table: str, of: str = "", key: str = "flow_run_id") -> int:
            where, values = (f" WHERE {key}=?", [of]) if of else ("", [])
            return int(db.execute(f"SELECT COUNT(*) FROM {table}{where}", values).fetchone()[0])

        assert all(count(table, run) for table in of_the_run) and count("events")
        past = "2020-01-01 00:00:00.000000"
        db.execute("UPDATE flow_run SET end_time=? WHERE id IN (?,?,?)", (past, run, waits, kept))
        for table in ("events", "event_resources"):
            db.execute(f"UPDATE {table} SET occurred=?", (past,))
        db.commit()
        # In a process of its own, as Prefect's server leaves connections open.
        many = "[str(UUID(int=number)) for number in range(300_000)]"  # more than a statement has room for
        done = f"asyncio.run(vacuum({DAY_S}, ['{kept}', 'no id', *{many}]))"
        vacuum = f"import asyncio; from uuid import UUID; from talaria.engine.retention import vacuum; {done}"
        there = {**os.environ, "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{copy}"}
        subprocess.run([sys.executable, "-P", "-c", vacuum], env=there, check=True)
        assert not count("flow_run", run, "id") and not any(count(table, run) for table in of_the_run)
        assert all(count("flow_run", one, "id") == 1 and count("flow_run_state", one) for one in (waits, kept))
        assert not count("events") and not count("event_resources")


def test_the_command_asks_which_runs_go_on(
    up: Talaria, tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing here tells of one that is paused, or of a retrieval that rests; nor who is to read what was kept."""
    home = Home(up.home)
    lent, forgotten = (home.root / "failed" / str(uuid.uuid4()) / "files" for _ in range(2))
    for files in (lent, forgotten):
        studies.ct(files, 1)
    with archive(study("A1")) as peer:
        up.apply(src=source(peer, window=later(2)), by_night=folder(tmp_path / "archive", window=later(2)))
        rests = up.told("retrieve", "src", "--accession", "A1", "--to", "by-night", "--no-wait")["flow_run_id"]
    reads = up.told("send", str(lent), "--to", "by-night", "--no-wait")["flow_run_id"]
    for run_id in (rests, reads):
        up.until(lambda run_id=run_id: up.run(run_id)["state"]["name"] == "AwaitingRetry")
    flow = up.run(reads)["flow_id"]
    paused = up.api("POST", "/flow_runs/", flow_id=flow, state={"type": "PAUSED", "name": "Paused"})["id"]
    over = up.api("POST", "/flow_runs/", flow_id=flow, state={"type": "COMPLETED"})["id"]
    for run_id in (rests, paused, over):
        ended(home, plan, run_id, 3, monkeypatch)
    for files in (lent, forgotten):
        os.utime(files.parent, (time.time() - 3 * DAY_S,) * 2)
    without_server = unended(home)
    assert without_server is not None
    assert {rests, paused, reads, lent.parent.name} <= without_server
    assert not {over, forgotten.parent.name} & without_server
    with monkeypatch.context() as patch:
        patch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "postgresql+asyncpg://there/prefect")
        assert unended(home) is None
    done = up.told("prune", "--older-than", "2d")
    assert done["receipts"] and done["rows"]
    assert not home.receipt(over).exists() and not (home.root / "retrievals" / over).exists()
    assert lent.exists() and not forgotten.exists()
    with Ledger(home.ledger) as ledger:
        assert not ledger.results(f"dispatch-{over}")
        for run_id in (rests, paused):
            assert ledger.results(f"dispatch-{run_id}") and home.receipt(run_id).exists()
            assert (home.root / "retrievals" / run_id / "job.json").exists()
    for run_id in (rests, reads):
        up.here("jobs", "cancel", run_id)
    up.api("DELETE", f"/flow_runs/{paused}")


def test_what_is_no_receipt_keeps_nothing_from_being_forgotten(home: Home) -> None:
    strange, old = home.receipt("a-folder"), home.receipt("old")
    strange.mkdir(parents=True)
    old.write_text("{}")
    for path in (strange, old):
        os.utime(path, (time.time() - 3 * DAY_S,) * 2)
    with Ledger(home.ledger) as ledger:
        ledger.runs.begins("left", "")  # nobody has it
    (home.root / "owners").mkdir(exist_ok=True)
    assert forget(home, DAY_S, (), DAY_S, DAY_S).receipts == 1
    assert strange.is_dir() and not old.exists()


def test_what_a_killed_process_had_begun_to_write_goes(home: Home) -> None:
    """Not what may still be written: nobody is asked to wait for that."""
    folders = ("receipts", "checks", "sources/inbox/batches", "received/.reports/modalities")
    names = (".1f0.json.4711.140213", ".1f0.csv.4711.140213", "1f0.part")
    for place in folders:
        (home.root / place).mkdir(parents=True, exist_ok=True)
        for name in names:
            for path, days in ((home.root / place / name, 2), (home.root / place / name.replace("1f0", "2a1"), 0)):
                path.write_text("{")
                os.utime(path, (time.time() - days * DAY_S,) * 2)
    whole = home.root / "received/.reports/modalities/3b2.json"
    whole.write_text("{}")
    os.utime(whole, (time.time() - 2 * DAY_S,) * 2)
    forget(home, 0, (), 0, 0)
    young = {f"{place}/{name.replace('1f0', '2a1')}" for place in folders for name in names}
    left = {str(path.relative_to(home.root)) for place in folders for path in (home.root / place).iterdir()}
    assert left == young | {str(whole.relative_to(home.root))}


def test_files_of_what_was_given_up_have_a_time_of_their_own(home: Home) -> None:
    now = time.time()
    for name, days in (("old", 20), ("open", 20), ("young", 2)):
        folder = home.root / "failed" / name / "files"
        folder.mkdir(parents=True)
        os.utime(folder.parent, (now - days * DAY_S,) * 2)
    asyncio.run(retention.tidy(home, 90 * DAY_S, 1 << 30, {"open"}, failed_age=14 * DAY_S))
    assert {path.name for path in (home.root / "failed").iterdir()} == {"open", "young"}
    asyncio.run(retention.tidy(home, DAY_S, 1, {"open"}, failed_age=14 * DAY_S))
    assert {path.name for path in (home.root / "failed").iterdir()} == {"open", "young"}


def test_files_of_what_was_given_up_cost_nobody_s_history(
    home: Home, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much they take; and what is needed to try again stays with them, also where the limit is reached."""
    for run_id, days in (("delivered", 5), ("given up", 5), ("long ago", 20)):
        ended(home, plan, run_id, days, monkeypatch)
    ended(home, plan, "now", 0.01, monkeypatch)
    for run_id, days in (("given up", 5), ("long ago", 20)):
        kept = home.root / "failed" / run_id / "files"
        kept.mkdir(parents=True)
        (kept / "big").write_bytes(b"x" * (1 << 20))
        os.utime(kept.parent, (time.time() - days * DAY_S,) * 2)
    limit = retention.used(home) + (1 << 19)
    spared = list[object]()

    async def vacuum(age: float, keep: object) -> None:
        spared.append(keep)

    asyncio.run(retention.tidy(home, 90 * DAY_S, limit, (), vacuum, failed_age=14 * DAY_S))
    assert left(home) == {"delivered", "given up", "long ago", "now"}
    assert [path.name for path in (home.root / "failed").iterdir()] == ["given up"] and spared == [{"given up"}]
    asyncio.run(retention.tidy(home, 90 * DAY_S, 1, (), failed_age=14 * DAY_S))
    assert left(home) == {"given up", "now"} and (home.root / "failed" / "given up" / "files" / "big").exists()
