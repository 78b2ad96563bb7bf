"""Tests of targets from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blocks import Target
from talaria.cli.access import ServerAccess, api
from talaria.engine.registry import workers
from talaria.engine.runs import create, result_of
from talaria.settings import load_settings
from talaria.targetfile import read
from tasks.checking import check_target, keep, result_of_run
from tasks.targets import Broken, all_targets, load
from transfer.errors import NotFound


def check_file(file: Path, name: str | None) -> list[dict[str, Any]]:
    """Check the targets of a file here, without saving them (a secret must not become a run's parameter)."""
    load_settings()
    targets = read(file)
    if name is not None and name not in targets:
        raise NotFound(f"{file} has no target named {name}; it has {', '.join(targets)}")
    chosen = [target for key, target in targets.items() if name in (None, key)]
    return [check_target(target).to_json(target.name) for target in chosen]


def check_saved(name: str | None) -> list[dict[str, Any]]:
    """Check one saved target, or all enabled ones: on the worker if one runs, else here."""
    with api() as access:
        targets = access.run(load, [name]) if name else access.run(all_targets)
        return [_test(access, one) for one in targets if name or isinstance(one, Broken) or one.enabled]


def _test(access: ServerAccess, target: Target | Broken) -> dict[str, Any]:
    if isinstance(target, Broken):
        return _failed(target.name, "settings", target.reason)
    if access.own or not access.run(workers):
        return _shown(keep(target, check_target(target)))
    flow_run = access.run(
        create, "check", {"target": f"{target.type_name}/{target.name}"}, f"check of {target.name}", "urgent"
    )
    ended = result_of(access, flow_run)
    detail = (ended.state and ended.state.message) or "the check did not finish"
    found = access.run(result_of_run, flow_run.id, target.name)
    return _shown(found or _failed(target.name, "check", detail))


def _failed(name: str, probe: str, why: str) -> dict[str, Any]:
    """Return the result for a target that could not be checked."""
    return {"name": name, "ok": False, "probes": [{"name": probe, "result": "failed", "ms": 0.0, "detail": why}]}


def _shown(document: dict[str, Any]) -> dict[str, Any]:
    return {key: document[key] for key in ("name", "ok", "probes")}
