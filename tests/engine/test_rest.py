"""What a run leaves behind at a rest, where another host may have its next part: it stands in the ledger of all."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun

from tasks.dispatch import kept, rest
from tasks.dispatch.rest import Left, Rest
from transfer.home import Home
from transfer.ledger import Ledger

TARGETS = ("pacs", "archive")


class Server:
    """A run, and its receipts."""

    def __init__(self) -> None:
        self.run = FlowRun(id=uuid4(), flow_id=uuid4())
        self.id = str(self.run.id)
        self.receipts: dict[str, Any] | None = None

    async def update_flow_run_labels(self, run_id: UUID, labels: dict[str, Any]) -> None:
        self.run.labels.update(labels)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    one = Server()

    async def read(client: Any, run_id: UUID, *, packed: bool) -> dict[str, Any] | None:
        return one.receipts if run_id == one.run.id else None

    monkeypatch.setattr(kept, "read", read)
    return one


@pytest.fixture
def homes(tmp_path: Path) -> tuple[Home, Home]:
    found = Home(tmp_path / "a"), Home(tmp_path / "b")
    for home in found:
        home.receipt("").parent.mkdir(parents=True)
    return found


def begins(server: Server, home: Home, ledger: Ledger) -> Rest:
    return asyncio.run(rest.load_with(cast(PrefectClient, server), home, ledger, server.run, TARGETS))


def ends_part(server: Server, home: Home, ledger: Ledger, part: int, **left: Left) -> None:
    """As a part does: its receipts here and at the server, then what it leaves."""
    server.receipts = {"dispatch_id": "d", "part": part}
    home.receipt(server.id).write_text(json.dumps(server.receipts))
    rest.save(home, ledger, server.id, Rest(left=left))


def test_the_next_part_goes_on_wherever_it_begins(server: Server, homes: tuple[Home, Home], tmp_path: Path) -> None:
    """Each host had what it had left itself: attempts began anew, and what was over was told as it was parts ago."""
    a, b = homes
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert begins(server, a, ledger) == Rest() and not rest.rests(ledger, server.id)
        ends_part(server, a, ledger, 1, pacs=Left(ended=True), archive=Left(attempts=1))
        found = begins(server, b, ledger)
        assert found.document["part"] == 1 and found.left["pacs"].ended and found.left["archive"].attempts == 1
        ends_part(server, b, ledger, 2, pacs=Left(ended=True), archive=Left(attempts=2))
        found = begins(server, a, ledger)  # which has receipts of the first part
        assert found.document["part"] == 2 and found.left["archive"].attempts == 2
        assert rest.rests(ledger, server.id)
        server.receipts = None  # the server's are gone: those of the host that had the last part do
        assert begins(server, b, ledger).document["part"] == 2
        rest.forget(ledger, server.id)
        assert begins(server, a, ledger) == Rest() and begins(server, b, ledger) == Rest()


def test_one_target_is_tried_again_wherever_that_is_asked(
    server: Server, homes: tuple[Home, Home], tmp_path: Path
) -> None:
    """Asked at one host, another one sent to all targets, and the first one left them out when it had the run next."""
    a, b = homes
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        server.receipts = {"dispatch_id": "d", "part": 3}
        server.run.labels[rest.ONLY] = "pacs"
        found = begins(server, b, ledger)
        assert found.left == {"archive": Left(ended=True)} and found.document["part"] == 3
        # Killed now, or at its next part, it does the same; a retry of all, once that one is over, does all.
        for home in (a, b):
            assert begins(server, home, ledger).left == found.left
        rest.forget(ledger, server.id)
        assert begins(server, a, ledger).left == begins(server, b, ledger).left == {}


def test_what_cannot_be_read_counts_as_nothing(server: Server, homes: tuple[Home, Home], tmp_path: Path) -> None:
    """As where a newer version left it, or its receipts are gone: the ledger knows what arrived."""
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ends_part(server, homes[0], ledger, 1, pacs=Left(ended=True))
        for odd in ("", "[]", '{"left": {"pacs": {"later": 1}}, "artifacts": {}}', '{"left": {}}'):
            ledger.rests.keep(server.id, homes[0].identity(), odd)
            assert begins(server, homes[0], ledger) == Rest(kept=True)
        ends_part(server, homes[0], ledger, 1, pacs=Left(ended=True))
        homes[0].receipt(server.id).unlink()
        server.receipts = None
        assert begins(server, homes[0], ledger) == Rest(kept=True)
