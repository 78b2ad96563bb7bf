"""Targets that a worker knows are asked for again as soon as one is changed, and not before."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from blocks.folder import FolderTarget
from tasks.dispatch import lately


class Server(lately.Hearing):
    """A client that hears what a test says."""

    def __init__(self, saved: str) -> None:
        self.saved = saved


def test_a_target_is_read_again_when_one_was_changed_meanwhile_or_while_it_was_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[list[str]] = []
    while_it_reads = ""
    monkeypatch.setattr(lately, "_known", {})

    async def load(client: Any, names: list[str]) -> list[FolderTarget]:
        reads.append(names)
        client.saved = while_it_reads or client.saved
        return [FolderTarget(folder=f"/{len(reads)}").named(name) for name in names]

    monkeypatch.setattr(lately, "load", load)

    def read(saved: str, *names: str) -> int:
        """How often targets had been read when these, which are returned now, were read."""
        found = asyncio.run(lately.loaded(Server(saved), list(names)))
        assert [one.name for one in found] == list(names)
        folders = {str(one.model_dump()["folder"]) for one in found}
        found[0].max_dispatches = 99  # whoever gets one may change it
        (folder,) = folders
        return int(folder.strip("/"))

    assert [read("a", "pacs"), read("a", "pacs"), read("a", "pacs", "other"), read("a", "pacs")] == [1, 1, 2, 1]
    assert asyncio.run(lately.loaded(Server("a"), ["pacs"]))[0].max_dispatches != 99
    assert [read("b", "pacs"), read("b", "pacs"), read("b", "pacs", "other")] == [3, 3, 4]
    while_it_reads = "d"
    assert read("c", "pacs") == 5
    while_it_reads = ""
    assert [read("d", "pacs"), read("d", "pacs")] == [6, 6]  # what was read before may be older than that
    assert [read("", "pacs"), read("", "pacs")] == [7, 8]  # a server that doesn't say
    assert lately._mark(object()) == ""  # type: ignore[arg-type]
