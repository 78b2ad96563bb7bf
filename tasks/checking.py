"""Checks of targets, and what is kept of them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect.artifacts import acreate_table_artifact

from blocks.base import Target
from protocols.net.ping import Ping
from tasks import DRIVERS
from transfer.health import FAILED, OK, SKIPPED, Health
from transfer.home import Home
from transfer.ledger import write_json


def check_target(target: Target) -> Health:
    """Run a target's staged probes; its host is pinged meanwhile, for people to know.

    Raises:
        Misconfigured: its type has no driver.
    """
    driver = DRIVERS.of(target)
    ping = Ping(target.node) if target.node else None
    health = driver.check(target)
    if ping is not None:
        echo = ping.result()
        result = SKIPPED if echo.answered is None else OK if echo.answered else FAILED
        health.hint("ping", result, ping.ms, echo.detail, after="resolve")
    return health


async def report_health(target: Target, health: Health) -> None:
    """Leave the result behind: an artifact on the run, and a file for `talaria status`."""
    document = keep(target, health)
    await acreate_table_artifact(document["probes"], f"check-{target.name}", "healthy" if health.ok else "not healthy")


def keep(target: Target, health: Health) -> dict[str, Any]:
    """Write the result of a check into the state directory and return it."""
    document = health.to_json(target.name) | {"time": datetime.now(UTC).isoformat(timespec="seconds")}
    write_json(_path(target.name), document)
    return document


def last_check(name: str) -> dict[str, Any] | None:
    """Return the last check of a target on this machine."""
    try:
        text = _path(name).read_text(encoding="utf-8")
    except OSError:
        return None
    document: dict[str, Any] = json.loads(text)
    return document


def forget_check(name: str) -> None:
    """The last check of a target says nothing any more: the target is gone, or is checked anew."""
    _path(name).unlink(missing_ok=True)


def _path(name: str) -> Path:
    return Home.current().root / "checks" / f"{name}.json"
