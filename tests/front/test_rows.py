"""What lists show is read once for many views, and again as soon as something is changed; and plots of days."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

from talaria import targetfile
from talaria.front.access import SCOPE_KEY, Identity, Role
from talaria.front.changes import ChangeCount, WatchedUpstream
from talaria.front.pages import rows
from talaria.front.pages.plot import HEIGHT, plotted
from talaria.front.pages.rows import Kept
from talaria.front.pages.site import what
from talaria.service.overview import Day, leads_to
from tests.front.door import Echo
from transfer import unitlist
from transfer.home import Home
from transfer.live import SAVED

OFFICE: Any = None


class Source:
    """Counts how often it is read, and waits in between until it may go on."""

    def __init__(self) -> None:
        self.begun, self.may, self.again = 0, asyncio.Event(), asyncio.Event()
        self.may.set()

    async def read(self, office: Any) -> int:
        self.begun += 1
        found = self.begun
        if found > 1:
            self.again.set()
        await self.may.wait()
        return found


def test_many_views_are_one_reading_and_a_change_is_never_missed() -> None:
    async def case() -> None:
        source, changes = Source(), ChangeCount()
        kept = Kept(source.read, changes)
        assert await asyncio.gather(*(kept.get(OFFICE) for _ in range(5))) == [1] * 5
        assert await kept.get(OFFICE) == 1
        changes.note()
        source.may.clear()
        slow = asyncio.create_task(kept.get(OFFICE))
        await source.again.wait()
        changes.note()  # while it is read: that reading may have missed it
        source.may.set()
        assert await slow == 3
        kept.fresh_s = 0.0
        assert await kept.get(OFFICE) == 3  # at once, and read again meanwhile
        assert kept._reading is not None
        await kept._reading
        assert await kept.get(OFFICE) == 4

    asyncio.run(case())


def test_an_error_of_a_reading_is_that_of_whoever_waits_and_the_next_one_reads_again() -> None:
    async def case() -> None:
        source = Source()

        async def read(office: Any) -> int:
            if await source.read(office) == 1:
                raise OSError("away")
            return 2

        kept = Kept(read, ChangeCount())
        with pytest.raises(OSError, match="away"):
            await kept.get(OFFICE)
        assert await kept.get(OFFICE) == 2

    asyncio.run(case())


@pytest.mark.parametrize(
    ("method", "path", "changes"),
    [
        ("POST", "/api/block_documents/", 1),
        ("PATCH", "/api/block_documents/x", 1),
        ("DELETE", "/api/block_documents/x", 1),
        ("POST", "/api/block_documents/filter", 0),
        ("GET", "/api/block_documents/x", 0),
        ("POST", "/api/flow_runs/", 0),
        ("POST", "/api/work_pools/talaria/get_scheduled_flow_runs", 0),
    ],
)
def test_changes_of_saved_blocks_are_noticed(method: str, path: str, changes: int) -> None:
    assert noticed(method, path)[0] == changes


@pytest.mark.parametrize(
    ("method", "path", "changes"),
    [
        ("POST", "/api/flow_runs/", 1),
        ("PATCH", "/api/flow_runs/x", 1),
        ("DELETE", "/api/flow_runs/x", 1),
        ("POST", "/api/flow_runs/x/set_state", 1),
        ("POST", "/api/flow_runs/bulk_delete", 1),
        ("POST", "/api/deployments/x/create_flow_run", 1),
        ("POST", "/api/flow_runs/filter", 0),
        ("POST", "/api/flow_runs/count", 0),
        ("POST", "/api/ui/flow_runs/history", 0),
        ("GET", "/api/flow_runs/x", 0),
        ("POST", "/api/work_pools/talaria/get_scheduled_flow_runs", 0),
        ("POST", "/api/block_documents/", 0),
    ],
)
def test_changes_of_runs_are_noticed(method: str, path: str, changes: int) -> None:
    assert noticed(method, path)[1] == changes


def test_what_nothing_has_changed_is_read_again_after_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async def case() -> None:
        source, ages = Source(), ChangeCount()
        kept = Kept(source.read, ChangeCount(), 0.0, ages)
        assert await kept.get(OFFICE) == 1
        assert await kept.get(OFFICE) == 1 and kept._reading is None
        ages.note()
        assert await kept.get(OFFICE) == 1 and kept._reading is not None  # at once, and read again meanwhile
        await kept._reading
        assert await kept.get(OFFICE) == 2 and kept._reading is None
        monkeypatch.setattr(rows, "QUIET_S", 0.0)
        assert await kept.get(OFFICE) == 2 and kept._reading is not None
        await kept._reading

    asyncio.run(case())


def noticed(method: str, path: str) -> tuple[int, int]:
    """The changes of blocks and of runs that a request counts for."""
    count, runs = ChangeCount(), ChangeCount()
    watched = WatchedUpstream(Echo(), count, runs)  # type: ignore[arg-type]
    scope = {"type": "http", "method": method, "path": path, "headers": []}

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        return None

    asyncio.run(watched(scope, receive, send))
    return count.count, runs.count


def test_workers_are_told_with_each_answer_whether_a_saved_block_was_changed() -> None:
    """Before its sender knows, and only where nobody else changes them."""
    who = {"worker": Identity("", Role.WORKER), "admin": Identity("", Role.ADMIN)}
    seen: list[tuple[str, int]] = []

    async def asked(watched: WatchedUpstream, method: str, path: str, role: str) -> str:
        scope = {"type": "http", "method": method, "path": path, "headers": [], SCOPE_KEY: who[role]}
        heads: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                heads.extend(message["headers"])
                seen.append((method, count.count))

        await watched(scope, receive, send)
        return next((value.decode() for key, value in heads if key == SAVED.lower().encode()), "")

    async def case() -> None:
        run, block = "/api/flow_runs/x/set_state", "/api/block_documents/x"
        alone = WatchedUpstream(Echo(), count, alone=lambda: True)  # type: ignore[arg-type]
        first = await asked(alone, "POST", run, "worker")
        assert first and await asked(alone, "GET", run, "worker") == first
        assert await asked(alone, "PATCH", block, "admin") == "" and seen[-1] == ("PATCH", 1)
        again = await asked(alone, "POST", run, "worker")
        assert again != first and await asked(alone, "POST", "/api/block_documents/filter", "worker") == again
        restarted = WatchedUpstream(Echo(), count, alone=lambda: True)  # type: ignore[arg-type]
        assert await asked(restarted, "POST", run, "worker") not in ("", first, again)
        shared = WatchedUpstream(Echo(), count)  # type: ignore[arg-type]
        assert await asked(shared, "POST", run, "worker") == ""

    count = ChangeCount()
    asyncio.run(case())


def test_a_bar_is_seen_however_small_its_part_is() -> None:
    plot = plotted([Day("2026-11-28", 0, 0, 0.0), Day("2026-11-29", 9999, 1, 5.0)])
    empty, full = plot.bars
    assert (empty.good_height, empty.bad_height) == (0, 0) and plot.most == 10_000
    assert full.bad_height >= 2 and full.good_height + full.bad_height == HEIGHT and full.bad_y == 0
    assert full.good_y == full.bad_y + full.bad_height and full.x == plot.width // 2
    assert (empty.sent_height, full.sent_height, full.sent_y, plot.most_bytes) == (0, HEIGHT, 0, 5.0)
    assert plotted([]).most == 0


def test_what_a_source_dispatched_is_named_by_the_source_not_by_a_list_of_ours(tmp_path: Path) -> None:
    ours = str(unitlist.place(Home(tmp_path), "ward-7", "a7ad"))
    assert what([ours], ", ") == 'Source <a href="/talaria/sources/ward-7">ward-7</a>'
    for paths in (["/data/<b>"], ["/data/a", ours], ["/batches/x.jsonl"], ["/data/sources/x/batches/x.txt"], []):
        assert what(paths, ", ") == ", ".join(paths) and not isinstance(what(paths, ", "), Markup)


@pytest.mark.parametrize(
    ("kind", "fields", "shown"),
    [
        ("dicomweb", {"url": "https://pacs.example.org:8443/dicom-web"}, "pacs.example.org:8443"),
        ("dicomweb", {"url": "http://[2001:db8::1]:8042/dicom-web"}, "[2001:db8::1]:8042"),
        ("dicomweb", {"url": "https://pacs.example.org/dicom-web"}, "pacs.example.org"),
        ("s3", {"bucket": "studies", "endpoint_url": "http://127.0.0.1:9000"}, "127.0.0.1:9000 studies"),
        ("dicom", {"host": "2001:db8::1", "port": 104, "aet_target": "A"}, "[2001:db8::1]:104 A"),
    ],
)
def test_where_a_target_leads_is_said_with_its_port(kind: str, fields: dict[str, Any], shown: str) -> None:
    """Two servers of one machine looked the same."""
    assert leads_to(targetfile.make("one", {"type": kind, **fields})) == shown
