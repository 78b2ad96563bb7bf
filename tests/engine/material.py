"""What the tests of this folder send to and fetch from, as `target apply` takes it, and what has come."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from talaria.testing import studies
from tasks.dispatch import running
from tasks.retrieve.report import RetrievalProgress
from tasks.retrieve.run import Retrieval
from tests.servers.qr import Archive
from tests.servers.up import Talaria
from transfer.ledger import Ledger

FAST = {"max_attempts": 3, "retry_delay_s": 0.2, "retry_max_delay_s": 0.5, "idle_timeout_s": 10}


def dicom(port: int, **fields: Any) -> dict[str, Any]:
    return {"type": "dicom", "host": "127.0.0.1", "port": port, "aet_target": "STORESCP", **FAST, **fields}


def folder(path: Path, **fields: Any) -> dict[str, Any]:
    path.mkdir(parents=True, exist_ok=True)
    return {"type": "folder", "folder": str(path), **FAST, **fields}


def files(path: Path) -> dict[str, bytes]:
    # os.walk passes over folders that are renamed while it looks.
    names = [os.path.join(folder, name) for folder, _, found in os.walk(path) for name in found]
    there = {}
    for name in names:
        with suppress(FileNotFoundError):  # what is written gets its name when it is whole
            there[os.path.relpath(name, path)] = Path(name).read_bytes()
    return there


def study(accession: str, series: int = 2, each: int = 2, **changes: Any) -> list[bytes]:
    uid, uids = studies.uid(), [studies.uid() for _ in range(series)]
    return [
        studies.encoded(studies.dataset(study=uid, series=one, AccessionNumber=accession, **changes))
        for one in uids
        for _ in range(each)
    ]


def source(peer: Archive, **fields: Any) -> dict[str, Any]:
    return {
        "type": "dicom", "host": "127.0.0.1", "port": peer.port, "aet_target": "ARCHIVE", "direction": "query", **FAST,
        **fields,
    }  # fmt: skip


def placed(into: Path) -> dict[str, set[str]]:
    """Names of the files in a folder by that of the first folder."""
    found: dict[str, set[str]] = {}
    for inside, _, names in os.walk(into):  # which passes over folders that go while it looks
        for path in (Path(inside, name) for name in names):
            found.setdefault(path.relative_to(into).parts[0], set()).add(path.stem)
    return found


def later(hours: int) -> str:
    """A window that opens after so many hours."""
    begin, end = (datetime.now(UTC) + timedelta(hours=h) for h in (hours, hours + 1))
    return f"{begin:%H:%M}-{end:%H:%M}"


def go_on(up: Talaria, run_id: str) -> None:
    """Let the time come for which a run waits."""
    soon = {"scheduled_time": datetime.now(UTC).isoformat()}
    state = {"type": "SCHEDULED", "name": "AwaitingRetry", "state_details": soon}
    up.api("POST", f"/flow_runs/{run_id}/set_state", state=state, force=True)


def totals(up: Talaria, target: str) -> dict[tuple[str, str], float]:
    """What was counted of a target, by name and label."""
    with Ledger(up.home / "ledger.sqlite") as ledger:
        return {(one.name, one.label): one.value for one in ledger.happenings.totals("") if one.target == target}


def alone_with(run_id: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a retrieval run without a server: nobody looks at progress, and the source's slots are free."""

    async def in_a_slot(self: Retrieval, work: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(work)

    async def show(self: Any, job: Any) -> None:
        pass

    monkeypatch.setattr(Retrieval, "_in_a_slot", in_a_slot)
    monkeypatch.setattr(RetrievalProgress, "show", show)
    monkeypatch.setenv("TALARIA_HOME", str(home))
    running.forget(run_id)  # each test's is another one
    running.regained(run_id)
