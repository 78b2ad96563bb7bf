"""Pushes to an S3 store, and what is asserted of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blocks.s3 import S3Target
from talaria.testing import studies
from talaria.testing.harness import Sent, attempt
from tests.servers.s3_stub import Misdeed, Refusal, Request, Stub
from tests.targets.s3 import PREFIX, files_of, stub_target
from transfer.errors import Busy, Interrupted
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


# Of an object, or of its answer, and of nothing else.
ALONE = (Refusal(503, "SlowDown"), Refusal(500, "InternalError"), Misdeed(reset_after=100), Misdeed(silent=True))


def assert_failures_cost_themselves_alone(
    store: Stub, study: Path, answer: Refusal | Misdeed, concurrency: int
) -> None:
    """Some of twenty objects fail, each at most twice, and all others arrive; nothing is marked."""
    studies.ct(study, 20)
    bad = {f"CT{number:04}.dcm" for number in (1, 2, 9, 20)}

    def fault(request: Request) -> Misdeed | None:
        return on("Put", answer)(request) if request.key.rsplit("/", 1)[-1] in bad else None

    store.fault = fault
    sent = attempt(target(store, concurrency=concurrency), study)
    assert isinstance(sent.error, Busy | Interrupted)
    assert sent.error.item in bad
    # What was carried out without an answer is found to be there.
    assert sent.arrived >= {item.path for item in sent.plan.items} - bad
    for item in sent.plan.items:
        assert store.count("Put", f"{PREFIX}/{sent.plan.dispatch_id}/{item.path}") <= 2
    assert not marked(store)


def contents(plan: Plan) -> dict[str, bytes]:
    return {item.path: plan.file(item).read_bytes() for item in plan.items}


def marked(store: Stub) -> bool:
    return any(key.endswith("/.complete") for key in store.objects("lab"))
