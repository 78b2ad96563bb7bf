"""Targets of all types, saved at the server: they come back as they went, without their secrets."""

from __future__ import annotations

import json

import pytest

from talaria import targetfile
from tests.servers.up import Talaria
from tests.targets.fields import NEEDED, SECRET, filled, secrets_of

pytestmark = pytest.mark.timeout(600)


def test_all_types_make_the_round_trip_through_the_server(up: Talaria, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = {name: filled(name) for name in NEEDED}
    documents = {
        name: targetfile.values_of(target) | {f: SECRET for f in secrets_of(type(target)) if getattr(target, f)}
        for name, target in targets.items()
    }
    up.apply(**{name.replace("-", "_"): values for name, values in documents.items()})
    shown = json.dumps(up.api("POST", "/block_documents/filter"))
    assert SECRET not in shown and "********" in shown
    exported = up.told("target", "export")["targets"]
    for name, target in targets.items():
        assert exported[name] == targetfile.values_of(target)
    # A list that `apply` reads again keeps everything but the secrets.
    assert {one["name"] for one in up.told("target", "list")["targets"]} >= set(NEEDED)
    up.told("target", "rename", "folder", "renamed")
    up.told("target", "disable", "renamed")
    assert up.told("target", "show", "renamed")["enabled"] is False
    up.told("target", "remove", "renamed")
    assert "renamed" not in up.here("target", "list", "--json").stdout
    assert up.here("target", "show", "renamed").returncode == 2
