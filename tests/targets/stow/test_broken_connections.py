"""Connections that break while instances are stored by STOW."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from talaria.testing.harness import attempt
from talaria.testing.process import as_loaded
from tests.servers.dicomweb import Reply, Request, Scripted
from tests.targets.dicomweb import dicomweb_target
from tests.targets.stow.pushing import all_delivered, big, push, uids
from transfer.errors import (
    Busy,
    Cancelled,
    Interrupted,
    TimedOut,
)
from transfer.plan import Plan
from transfer.receipt import State


@pytest.mark.parametrize("step", [Reply(resets=True, reads=20_000), Reply(resets=True), Reply(hangs=True)])
def test_link_that_breaks(server: Scripted, plan: Plan, step: Reply) -> None:
    """Once: the same attempt goes on. For good: what was confirmed stays confirmed."""
    idle_s = 1 if step.hangs else 30  # what answers may take its time
    server.script = [lambda _: None, step]
    all_delivered(push(server, plan, batch_items=4, idle_timeout_s=idle_s), server)
    server.stored.clear()
    server.requests.clear()
    server.script = [lambda _: None, *[step] * 20]
    sent = push(server, plan, batch_items=4, idle_timeout_s=idle_s)
    assert type(sent.error) is (TimedOut if step.hangs else Interrupted)
    assert len(sent.arrived) == 4
    server.script = []
    again = attempt(dicomweb_target(server.url), plan, done=sent.arrived)
    assert again.require().state is State.DELIVERED
    assert set(server.of("POST")[-1].uids) <= set(uids(plan)[4:])


def test_reset_after_half_of_the_upload(server: Scripted, tmp_path: Path) -> None:
    plan = big(tmp_path)
    server.script = [Reply(resets=True, reads=10_000_000)]
    sent = push(server, plan)
    assert type(sent.error) is Interrupted
    assert not server.stored
    all_delivered(push(server, plan), server)


def test_server_that_takes_nothing_any_more(server: Scripted, tmp_path: Path) -> None:
    server.script = [Reply(hangs=True, reads=100_000)]
    sent = push(server, big(tmp_path), idle_timeout_s=1)
    assert type(sent.error) is TimedOut
    assert sent.seconds < as_loaded(6)


def test_cancel_while_the_server_hangs(server: Scripted, plan: Plan) -> None:
    server.script = [Reply(hangs=True)]
    cancelled = threading.Event()
    timer = threading.Timer(0.5, cancelled.set)
    timer.start()
    sent = attempt(dicomweb_target(server.url, idle_timeout_s=60), plan, cancelled=cancelled)
    timer.cancel()
    assert isinstance(sent.error, Cancelled)
    assert sent.seconds < as_loaded(3)


def test_a_pause_lets_a_request_come_to_its_end(server: Scripted, plan: Plan) -> None:
    """It was cut off, and all of its instances went out again when somebody resumed the dispatch."""
    paused = threading.Event()

    def slow(request: Request) -> Reply | None:
        paused.set()
        time.sleep(0.5)  # longer than between two looks whether to stop
        return None

    server.script = [slow]
    target = dicomweb_target(server.url, batch_items=4, concurrency=1)
    sent = attempt(target, plan, paused=paused)
    assert isinstance(sent.error, Cancelled) and "paused" in sent.error.message
    assert [uid for one in server.of("POST") for uid in one.uids] == uids(plan)[:4] and len(sent.arrived) == 4
    assert attempt(target, plan, done=sent.arrived).require().state is State.DELIVERED
    assert [uid for one in server.of("POST") for uid in one.uids] == uids(plan)


def test_other_requests_are_finished_when_one_fails(server: Scripted, plan: Plan) -> None:
    other = threading.Event()

    def refuse(request: Request) -> Reply:
        assert other.wait(60)
        return Reply(503, headers={"Retry-After": "1"})

    def slow(request: Request) -> Reply:
        other.set()
        return Reply(delay_s=0.5)

    server.script = [refuse, slow]
    sent = push(server, plan, batch_items=4, concurrency=2)
    assert isinstance(sent.error, Busy)
    assert len(sent.arrived) == 4
