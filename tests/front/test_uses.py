"""Which targets may go where several types have a name, as at a Prefect server elsewhere."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prefect.client.orchestration import PrefectClient

from talaria.service import uses
from talaria.service.uses import InUse, check_unused

SLUGS = {"dicom": "dicom-target", "folder": "folder-target"}


def used(monkeypatch: pytest.MonkeyPatch, written: list[str], there: list[str], going: list[str]) -> bool:
    """Return whether targets must stay that a source names so."""
    found = [kind_name.split("/") for kind_name in there]

    async def documents(client: Any, names: set[str]) -> list[Any]:
        kinds = [(SimpleNamespace(slug=SLUGS[kind]), name) for kind, name in found if name in names]
        return [SimpleNamespace(name=name, block_type=kind) for kind, name in kinds]

    async def sources(client: Any) -> list[tuple[str, list[str]]]:
        return [("feeds", written)]

    async def nothing(*_: Any, **__: Any) -> list[Any]:
        return []

    for name, one in {"documents": documents, "_sources": sources, "jobs": nothing, "every": nothing}.items():
        monkeypatch.setattr(uses, name, one)
    nowhere = cast(PrefectClient, SimpleNamespace(read_flows=None, read_deployments=None))
    try:
        asyncio.run(check_unused(nowhere, going, "removed"))
    except InUse as exc:
        assert exc.uses.sources == ["feeds"] and "source feeds" in exc.message
        return True
    return False


def test_a_target_whose_type_is_written_stays_where_another_type_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ["dicom/pacs", "folder/pacs"]
    assert used(monkeypatch, ["dicom/pacs"], both, ["dicom/pacs"])
    assert used(monkeypatch, ["dicom-target/pacs"], both, ["dicom/pacs"])
    assert not used(monkeypatch, ["dicom/pacs"], both, ["folder/pacs"])
    assert not used(monkeypatch, ["pacs"], both, ["dicom/pacs"])  # the other one is meant then


def test_all_targets_of_a_name_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ["dicom/pacs", "folder/pacs"]
    for written in ("pacs", "dicom/pacs", "folder/pacs"):
        assert used(monkeypatch, [written], both, both)
    assert not used(monkeypatch, ["nas"], both, both)


def test_the_only_target_of_a_name_stays_however_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for written in ("pacs", "dicom/pacs", " dicom-target/pacs "):
        for going in ("pacs", "dicom/pacs"):
            assert used(monkeypatch, [written], ["dicom/pacs"], [going])
    assert not used(monkeypatch, ["", "/"], ["dicom/pacs"], ["pacs"])
    assert not used(monkeypatch, ["pacs"], [], ["pacs"])
