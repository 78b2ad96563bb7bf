"""A state directory as it is after a month of work: what `benchmarks.pages` asks the pages of.

A few targets, sources, rules and dispatches are made by Talaria itself. What Prefect, the ledger and the audit trail
hold of them is then copied, row by row, under other ids, names and times: so each dispatch has its states, tasks, logs,
artifacts, and events of the last week, as a real one has.
"""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from transfer.audit import Trail, hash_of
from transfer.home import Home
from transfer.ledger import Ledger

PASSWORD = "benchmark-of-pages"
NAME = "target-007"  # of which pages are asked
DAYS, EVENTS_DAYS = 30, 7  # how far back dispatches go, and events, which are kept no longer
ITEMS = 5000  # of the one large dispatch
UNITS = 2000  # that each source has dispatched
WAITING = 200
SOURCES = 10
IDS = ("id", "flow_run_id", "task_run_id", "state_id", "event_id", "follows")  # columns that hold them
# Of each table, which rows belong to the one run, ?1, and which of these (t) a copy (c) has: scheduled ones have begun
# nothing yet, and events are of the last days only.
BEGUN, RECENT = "c.kind<>'SCHEDULED'", "c.recent"
OF_RUN = {
    "flow_run": ("id=?1", "1"),
    "flow_run_state": ("flow_run_id=?1", f"({BEGUN} OR t.type='SCHEDULED')"),
    "task_run": ("flow_run_id=?1", BEGUN),
    "task_run_state": ("task_run_id IN (SELECT id FROM task_run WHERE flow_run_id=?1)", BEGUN),
    "artifact": ("flow_run_id=?1", BEGUN),
    "log": ("flow_run_id=?1", BEGUN),
    "events": ("id IN (SELECT event_id FROM event_resources WHERE resource_id='prefect.flow-run.'||?1)", RECENT),
    "event_resources": (
        "event_id IN (SELECT event_id FROM event_resources WHERE resource_id='prefect.flow-run.'||?1)", RECENT
    ),
}  # fmt: skip
# What a copy has that is its own.
OWN = {
    "flow_run": {
        "name": "c.name", "state_type": "c.kind", "state_name": "c.word", "idempotency_key": "NULL",
        "parameters": "json_set(t.parameters, '$.targets', json_array(c.target))",
        "state_id": "made(c.n, CASE c.kind WHEN 'SCHEDULED' THEN c.first ELSE t.state_id END)",
        "start_time": "CASE c.kind WHEN 'SCHEDULED' THEN NULL ELSE moved(t.start_time, c.ahead) END",
        "end_time": "CASE c.kind WHEN 'SCHEDULED' THEN NULL ELSE moved(t.end_time, c.ahead) END",
        "run_count": "c.kind<>'SCHEDULED'",
        "next_scheduled_start_time":
            "CASE c.kind WHEN 'SCHEDULED' THEN moved(t.expected_start_time, c.ahead) ELSE NULL END",
    },
    "flow_run_state": {
        "type": "CASE t.type WHEN 'COMPLETED' THEN c.kind ELSE t.type END",
        "name": "CASE t.name WHEN 'Completed' THEN c.word ELSE t.name END",
        "message": "CASE WHEN t.type='COMPLETED' AND c.kind='FAILED' THEN c.why ELSE t.message END",
    },
}  # fmt: skip


class Copy(NamedTuple):
    """What a copy of a dispatch is.

    Attributes:
        kind, word: its state's type and name.
        ahead: seconds that it begins after the one that is copied.
        recent: 1 if there are events of it still.
        why: it failed, if it did.
    """

    number: int
    target: str
    name: str
    kind: str
    word: str
    ahead: float
    recent: int
    why: str


LAST = {"COMPLETED": "Completed", "FAILED": "Failed", "SCHEDULED": "Scheduled"}


def prepared(root: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Make what is to be copied, at a server that runs; return the ids of two dispatches: `run`, and `large`."""
    for folder in ("archive", "study", "inbox"):
        (root / folder).mkdir()
    # The first three are copied for all others.
    folder = {"type": "folder", "folder": str(root / "archive"), "contact": "team@example.org"}
    dicom = {"type": "dicom", "host": "pacs.example.org", "aet_target": "ARCHIVE", "contact": "pacs@example.org"}
    sftp = {"type": "sftp", "host": "files.example.org", "user": "talaria", "password": "benchmark", "folder": "in"}
    second = folder | {"folder": str(root / "archive" / "second")}
    targets = {f"target-{number:03}": one for number, one in enumerate((folder, dicom, sftp, second))}
    sources = {
        f"source-{number:02}": {"type": "inbox", "folder": str(root / "inbox" / str(number)), "targets": ["target-000"]}
        for number in range(SOURCES)
    }
    for one in (*sources.values(), second):
        Path(str(one["folder"])).mkdir(exist_ok=True)
    rule = {"type": "webhook", "url": "http://127.0.0.1:9/", "on": ["target.down"]}
    rules = {f"rule-{number}": rule for number in range(3)}
    (root / "all.yaml").write_text(json.dumps({"targets": targets, "sources": sources, "notify": rules}))
    (root / "note.txt").write_text("a study")
    for number in range(ITEMS):
        (root / "study" / f"{number:05}.txt").write_text(str(number))

    def talaria(*arguments: str, given: str = "") -> str:
        command = [sys.executable, "-m", "talaria", *arguments]
        done = subprocess.run(command, env=environment, check=False, input=given, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"talaria {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-800:]}")
        return done.stdout

    for kind in ("target", "source", "notify"):
        talaria(kind, "apply", str(root / "all.yaml"))
    talaria("user", "add", "anna", "--role", "admin", given=PASSWORD)
    talaria("target", "test", "target-000")
    one = json.loads(talaria("send", str(root / "note.txt"), "--to", "target-000", "--json"))
    large = json.loads(talaria("send", str(root / "study"), "--to", "target-000,target-003", "--json"))
    return {"run": str(one["flow_run_id"]), "large": str(large["flow_run_id"])}


def filled(home: Path, targets: int, dispatches: int, run: str) -> None:
    """Copy what was made, at a server that has stopped, until there are so many targets and dispatches."""
    copies = sorted(_copies(dispatches), key=lambda one: one.ahead)  # as they came: what is old lies together
    with closing(sqlite3.connect(home / "prefect" / "prefect.db")) as db, db:
        db.create_function("made", 2, _made, deterministic=True)
        db.create_function("moved", 2, _moved, deterministic=True)
        _copy_targets(db, targets)
        _copy_runs(db, copies, run)
    _fill_ledger(home, copies, run)
    _fill_trail(Trail(Home(home)), copies)


def _copies(dispatches: int) -> Iterator[Copy]:
    """Yield what each copy is, the same ones each time."""
    chance = random.Random(7)
    for number in range(dispatches):
        kind = "SCHEDULED" if number < WAITING else "FAILED" if number % 10 == 0 else "COMPLETED"
        ahead = 86_400.0 if kind == "SCHEDULED" else -chance.random() * DAYS * 86_400
        target = f"target-{chance.randrange(500):03}"
        why = f"{target} failed: connection refused by pacs.example.org:104 (3 of 120 items are missing)"
        name = f"{chance.getrandbits(80):020x} to {target}"
        recent = int(-EVENTS_DAYS * 86_400 < ahead < 0)
        yield Copy(number, target, name, kind, LAST[kind], ahead, recent, why)


def _made(number: int, old: str | None) -> str | None:
    """Return the id that a copy has in the place of one."""
    if old is None:
        return None
    text = hashlib.md5(f"{number} {old}".encode(), usedforsecurity=False).hexdigest()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _moved(time: str | None, ahead: float) -> str | None:
    """Return a time as Prefect keeps it, so many seconds later."""
    if time is None:
        return None
    return (datetime.fromisoformat(time) + timedelta(seconds=ahead)).strftime("%Y-%m-%d %H:%M:%S.%f")


def _copy_targets(db: sqlite3.Connection, targets: int) -> None:
    """Copy the first targets, their limits, and the last check of one of them."""
    for number in range(4, targets):
        one, name = f"target-{number % 3:03}", f"target-{number:03}"
        _copied(db, "block_document", "name", one, name, number)
        _copied(db, "concurrency_limit_v2", "name", f"talaria-{one}", f"talaria-{name}", number)
    for number in range(1, targets):
        for table in ("artifact", "artifact_collection"):
            _copied(db, table, "key", "check-target-000", f"check-target-{number:03}", number)


def _copied(db: sqlite3.Connection, table: str, column: str, old: str, new: str, number: int) -> None:
    """Copy a row that a column names, under another name and ids."""
    names = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    values = ("?1" if name == column else f'made(?2, "{name}")' if name in ("id", "latest_id") else f'"{name}"'
              for name in names)  # fmt: skip
    listed = ", ".join(f'"{name}"' for name in names)
    db.execute(
        f'INSERT INTO {table} ({listed}) SELECT {", ".join(values)} FROM {table} WHERE "{column}"=?3',
        (new, number, old),
    )


def _copy_runs(db: sqlite3.Connection, copies: list[Copy], run: str) -> None:
    """Copy a run and all that belongs to it, once for each copy."""
    db.execute(
        "CREATE TEMP TABLE copies (n INTEGER PRIMARY KEY, target, name, kind, word, ahead, recent, why, run, first)"
    )
    (first,) = db.execute("SELECT id FROM flow_run_state WHERE flow_run_id=? AND type='SCHEDULED'", (run,)).fetchone()
    rows = [(*one, _made(one.number, run), first) for one in copies]
    db.executemany("INSERT INTO copies VALUES (?,?,?,?,?,?,?,?,?,?)", rows)
    for table, (mine, wanted) in OF_RUN.items():
        there = [(row[1], row[2]) for row in db.execute(f"PRAGMA table_info({table})")]
        shown = ", ".join(_of_copy(table, name, kind) for name, kind in there)
        listed = ", ".join(f'"{name}"' for name, _ in there)
        db.execute(f"CREATE TEMP TABLE one AS SELECT * FROM {table} WHERE {mine}", (run,))
        db.execute(
            f"INSERT INTO {table} ({listed}) SELECT {shown} FROM temp.one t, copies c WHERE {wanted} AND ?1<>''", (run,)
        )
        db.execute("DROP TABLE temp.one")


def _of_copy(table: str, name: str, kind: str) -> str:
    """Return the expression of a column's value in a copy."""
    if own := OWN.get(table, {}).get(name):
        return own
    if name in IDS:
        return f'made(c.n, t."{name}")'
    if kind == "DATETIME" and name != "total_run_time":
        return f'moved(t."{name}", c.ahead)'
    if kind in ("JSON", "TEXT") and table in ("events", "event_resources", "log"):
        return f"""replace(replace(t."{name}", ?1, c.run), 'target-000', c.target)"""
    return f't."{name}"'


def _fill_ledger(home: Path, copies: list[Copy], run: str) -> None:
    """Add how each copy stood, what ended at each hour, and units of the sources."""
    with Ledger(home / "ledger.sqlite"):
        pass
    now = datetime.now(UTC).timestamp()
    with closing(sqlite3.connect(home / "ledger.sqlite")) as db, db:
        for one in copies:
            if one.kind == "SCHEDULED":
                continue
            bad = "partial" if one.number % 20 else "failed"
            state, words = ("delivered", "") if one.kind == "COMPLETED" else (bad, one.why)
            at, key, dispatch = now + one.ahead, _made(one.number, run), f"{one.number:020x}"
            for name, said in ((one.target, words), ("", "")):
                db.execute("INSERT INTO deliveries VALUES (?,?,?,120,117,?,?)", (key, name, state, said, at))
            db.execute("INSERT INTO runs VALUES (?,?,?,?,?)", (key, dispatch, "0" * 32, at, at))
            db.execute(
                "INSERT INTO hours VALUES (?,?,?,1,6e7,?) ON CONFLICT (hour, target, state) DO UPDATE SET"
                " dispatches=dispatches+1, bytes=bytes+6e7, last=max(last, excluded.last)",
                (int(at // 3600), one.target, state, at),
            )
            for item in range(2):
                values = (dispatch, one.target, f"{item:05}.dcm", f"1.2.3.{one.number}.{item}", at)
                db.execute("INSERT INTO items VALUES (?,?,?,'endpoint',1000,1,?,'delivered','',1,?)", values)
        for source in range(SOURCES):
            for unit in range(UNITS):
                state = "failed" if unit % 100 == 0 else "done"
                words = "connection refused" if state == "failed" else ""
                values = (f"source-{source:02}", f"study-{unit}", f"study-{unit}", state, words, now - unit * 60)
                db.execute("INSERT INTO units VALUES (?,?,?,?,'',120,'','',?,?)", values)


def _fill_trail(trail: Trail, copies: list[Copy]) -> None:
    """Add an entry for each copy's delivery, chained as Talaria does it."""
    with open(trail.path, "rb") as file:
        last = json.loads(file.readlines()[-1])
    number, before = int(last["n"]), str(last["hash"])
    with open(trail.path, "ab") as file:
        for one in sorted(copies, key=lambda one: one.ahead):
            number += 1
            time = (datetime.now(UTC) + timedelta(seconds=one.ahead)).isoformat(timespec="milliseconds")
            about = {"state": "delivered", "target": one.target, "dispatch": f"{one.number:020x}", "items": 120}
            result = "success" if one.kind == "COMPLETED" else "serious"
            entry = {"n": number, "time": time, "event": "delivery", "who": "anna", "result": result}
            entry |= {"details": about, "prev": before}
            before = entry["hash"] = hash_of(entry)
            file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
    Path(trail.head_path).write_bytes(b"%020d %b\n" % (number, str(before).encode()))
