"""What is said of a target that is down: once, by whichever host sees it, and until one sees that it answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blocks.folder import FolderTarget
from tasks.dispatch import breaker
from tests.servers.postgresql import postgresql
from transfer.errors import Unreachable
from transfer.home import Home
from transfer.ledger import Ledger


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with postgresql() as server:
        found = server.new()
        monkeypatch.setenv("TALARIA_LEDGER", found)
        yield found


def said(url: str) -> list[str]:
    with Ledger(url) as ledger:
        return [one.event for one in ledger.happenings.waiting(100)]


def test_another_host_s_answer_ends_what_a_host_that_is_gone_has_said(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.happened.emit_event", lambda *_, **__: None)
    monkeypatch.setattr(breaker.line, "wake", lambda *_: None)
    target = FolderTarget(folder=str(tmp_path)).named("shelf")
    one, other = Home(tmp_path / "one"), Home(tmp_path / "other")
    for home in (one, other):
        home.root.mkdir()
    for _ in range(breaker.LIMIT):
        breaker.failed(one, target, Unreachable("no route"), "no route")
    assert said(url) == ["target.down"]
    monkeypatch.setattr(breaker, "_up", {})  # the other host's process
    for _ in range(3):
        breaker.answered(other, target)
    assert said(url) == ["target.down", "target.up"]
    for _ in range(breaker.LIMIT):
        breaker.failed(other, target, Unreachable("no route"), "no route")
    assert said(url) == ["target.down", "target.up", "target.down"]
