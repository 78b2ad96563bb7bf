"""Pushes to an S3 store, and what is asserted of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blocks.s3 import S3Target
from talaria.testing.harness import Sent
from tests.servers.s3_stub import Misdeed, Refusal, Request, Stub
from tests.targets.s3 import PREFIX, files_of, stub_target
from transfer.plan import Plan
from transfer.receipt import State

MIB = 1 << 20
PART = 5 * MIB  # the smallest that there is


def large(path: Path, size: int = 3 * PART + 1000) -> Path:
    """A file that goes in four parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size))
    return path


def target(store: Stub, **settings: Any) -> S3Target:
    return stub_target(store, **({"multipart_bytes": PART, "concurrency": 4} | settings))


def on(
    operation: str, answer: Refusal | Misdeed, *, times: int = 1_000_000, part: int | None = None, key: str = ""
) -> Callable[[Request], Misdeed | None]:
    """A fault that hits some requests: of this operation, for keys that end so, after the probes."""
    left = [times]

    def fault(request: Request) -> Misdeed | None:
        wanted = request.operation == operation and ".talaria-probe" not in request.key and request.key.endswith(key)
        if part is not None:
            wanted = wanted and request.query.get("partNumber") == str(part)
        if not wanted or left[0] <= 0:
            return None
        left[0] -= 1
        if isinstance(answer, Refusal):
            raise answer
        return answer

    return fault


def assert_whole(store: Stub, sent: Sent) -> None:
    """Everything is there, byte for byte, and marked; nothing is unfinished."""
    receipt = sent.require()
    assert receipt.state is State.DELIVERED, sent.rejected
    assert files_of(store.objects("lab"), sent.plan) == contents(sent.plan)
    assert f"{PREFIX}/{sent.plan.dispatch_id}/.complete" in store.objects("lab")
    assert not store.uploads


def contents(plan: Plan) -> dict[str, bytes]:
    return {item.path: plan.file(item).read_bytes() for item in plan.items}


def marked(store: Stub) -> bool:
    return any(key.endswith("/.complete") for key in store.objects("lab"))
