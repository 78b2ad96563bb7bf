"""Servers and proxies that limit bodies, answer early, or want to be asked before."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from protocols.dicomweb import stow
from talaria.testing import studies
from tests.servers.dicomweb import Reply, Request, Scripted, as_json, listing, scripted
from tests.targets.stow.pushing import PAGE, Always, all_delivered, big, kinds, push, uids
from transfer.errors import (
    Busy,
    Denied,
    Interrupted,
    NotFound,
    Unauthorized,
)
from transfer.outcome import Kind
from transfer.plan import Plan, scan

# ---- 413 and proxies that limit bodies


def test_413_halves(server: Scripted, tmp_path: Path) -> None:
    studies.ct(tmp_path, 32, side=64)  # 15 kB each
    server.body_limit = 70_000
    all_delivered(push(server, tmp_path), server)
    refused = [request for request in server.of("POST") if request.length > server.body_limit]
    assert len(refused) <= 5
    assert all(len(request.body) == 0 for request in refused)


def test_413_for_one_instance(server: Scripted, plan: Plan, tmp_path: Path) -> None:
    studies.multiframe(tmp_path / "study" / "large.dcm", 1)  # 0.5 MB
    server.body_limit = 100_000
    sent = push(server, scan([tmp_path / "study"]))
    assert list(sent.rejected) == ["large.dcm"]
    assert "larger than the server takes" in sent.rejected["large.dcm"]
    assert len(sent.arrived) == 8


def test_proxy_that_limits_bodies_to_1_MB(server: Scripted, tmp_path: Path) -> None:
    """As nginx does it: 413 when it has seen the head, and the connection closed on what still comes."""
    studies.ct(tmp_path, 40, side=256)  # 5.5 MB
    server.body_limit = 1 << 20
    server.continues = False
    all_delivered(push(server, tmp_path, concurrency=4), server)
    assert sum(request.length > server.body_limit for request in server.of("POST")) <= 8


def test_proxy_that_resets_instead_of_413(server: Scripted, tmp_path: Path) -> None:
    """Nothing shows that this is no broken link: each instance goes alone, and what follows in smaller requests."""
    studies.ct(tmp_path, 40, side=256)
    plan = scan([tmp_path])
    limit = 1 << 20
    server.script = Always([lambda request: Reply(resets=True) if request.length > limit else None])
    all_delivered(push(server, plan, batch_bytes=3 << 20), server)
    assert len([request for request in server.of("POST") if request.length > limit]) <= 2


def test_what_was_suspected_is_forgotten(server: Scripted, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stow, "SUSPICION_S", 0.05)
    server.script = Always([Reply(resets=True)])
    assert isinstance(push(server, plan).error, Interrupted)
    server.script = []
    assert stow._stumbled
    time.sleep(0.1)
    all_delivered(push(server, scan([plan.root])), server)  # another dispatch
    assert not stow._stumbled


# ---- early answers, Expect


@pytest.mark.parametrize(
    ("status", "error"), [(401, Unauthorized), (403, Denied), (404, NotFound), (429, Busy), (503, Busy)]
)
@pytest.mark.parametrize("closes", [True, False])
def test_answer_before_the_body_is_respected(
    server: Scripted, tmp_path: Path, status: int, error: type[Exception], closes: bool
) -> None:
    server.continues = False
    server.script = [Reply(status, PAGE, "text/html", reads=300_000, closes=closes)]
    sent = push(server, big(tmp_path))
    assert type(sent.error) is error
    assert sent.moved < 15_000_000


def test_early_success_counts_only_what_went_out(server: Scripted, tmp_path: Path) -> None:
    plan = big(tmp_path)
    server.continues = False
    server.script = [Reply(200, as_json(listing(dict.fromkeys(uids(plan), 0))), reads=300_000, closes=True)]
    sent = push(server, plan)
    all_delivered(sent, server)
    assert len(server.of("POST")) == 2


def test_expect_100_continue(server: Scripted, tmp_path: Path) -> None:
    sent = push(server, big(tmp_path))
    all_delivered(sent, server)
    assert server.of("POST")[0].headers["expect"] == "100-continue"


@pytest.mark.parametrize("status", [401, 413, 503])
def test_expect_refused_sends_no_body(server: Scripted, tmp_path: Path, status: int) -> None:
    server.script = [Reply(status, PAGE, "text/html", reads=0)] * 10
    sent = push(server, big(tmp_path))
    assert sent.moved == 0
    assert sent.error if status != 413 else sent.rejected


def test_expect_ignored(server: Scripted, tmp_path: Path) -> None:
    """The wait is short, and the next push does without."""
    server.continues = False
    plan = big(tmp_path)
    all_delivered(push(server, plan), server)
    all_delivered(push(server, plan), server)
    assert ["expect" in request.headers for request in server.of("POST")] == [True, False]


def test_expect_not_understood(server: Scripted, tmp_path: Path) -> None:
    server.script = [Reply(417, reads=0)]
    all_delivered(push(server, big(tmp_path)), server)
    assert "expect" not in server.of("POST")[1].headers


def test_100_continue_that_nobody_asked_for(plan: Plan) -> None:
    with scripted() as server:
        original = server._usual

        def usual(request: Request) -> Reply:
            return original(request)

        server._usual = usual  # type: ignore[method-assign]
        real = server._handle

        def handle(connection: Any, request: Request) -> bool:
            connection.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\nX: y\r\n\r\n")
            return real(connection, request)

        server._handle = handle  # type: ignore[method-assign]
        assert kinds(push(server, plan)) == [Kind.DELIVERED] * 8
