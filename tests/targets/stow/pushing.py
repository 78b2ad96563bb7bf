"""Pushes to a scripted STOW server, and what is asserted of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from talaria.testing import studies
from talaria.testing.harness import Sent, attempt
from tests.servers.dicomweb import Scripted, Step
from tests.targets.dicomweb import dicomweb_target
from transfer.outcome import Kind
from transfer.plan import Plan, scan
from transfer.receipt import State

PAGE = b"<html><head><title>Bad Request</title><style>x{}</style></head><body><h1>It hurts</h1></body></html>"


def uids(plan: Plan) -> list[str]:
    return [item.header.SOPInstanceUID for item in plan.items if item.header]


def push(server: Scripted, plan: Plan | Path, **settings: Any) -> Sent:
    return attempt(dicomweb_target(server.url, **({"concurrency": 1} | settings)), plan)


def kinds(sent: Sent) -> list[Kind]:
    return [sent.outcomes[item.path].kind for item in sent.plan.items if item.path in sent.outcomes]


def all_delivered(sent: Sent, server: Scripted) -> None:
    assert sent.require().state is State.DELIVERED
    assert kinds(sent) == [Kind.DELIVERED] * len(sent.plan.items)
    assert set(server.stored) == set(uids(sent.plan))


class Always(list[Step]):
    """A script that has one answer to all requests."""

    def pop(self, index: Any = -1) -> Step:
        return self[0]


def big(tmp_path: Path) -> Plan:
    studies.multiframe(tmp_path / "big" / "large.dcm", 40)  # 20 MB: more than buffers take
    return scan([tmp_path / "big"])
