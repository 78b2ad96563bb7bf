"""Repeated pushes: after one that succeeded, broke off, or left something rejected."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.cases.compare import assert_delivered, assert_equal, expected, key, markers, send
from talaria.testing.harness import Harness, Sent, attempt, sending
from transfer.errors import Retryable
from transfer.outcome import Kind
from transfer.plan import Item, scan
from transfer.receipt import Level, State


def test_push_twice_is_idempotent(harness: Harness, study: Path) -> None:
    studies.sample(study)
    first = send(harness, study)
    names = harness.names()
    again = attempt(harness.target, first.plan)  # as after the loss of the ledger
    assert_delivered(harness, again)
    assert harness.names() == names, "a second copy, or a trace"
    # And with the ledger's knowledge: nothing to send, what comes last is completed.
    idle = attempt(harness.target, first.plan, done=[item.path for item in first.plan.items])
    receipt = idle.require()
    assert not idle.outcomes
    assert idle.moved == 0
    assert receipt.counts[Kind.ALREADY] == len(first.plan.items)
    assert receipt.state is State.DELIVERED
    assert harness.names() == names
    assert_equal(harness, first)


def test_push_link_cut_midway_is_Retryable_then_resumes(harness: Harness, study: Path) -> None:
    studies.ct(study, 24, side=64)  # 15 kB each
    plan = scan([study])
    with harness.cut(plan.size // 2) as target:
        first = attempt(target, plan)
        if harness.driver.facts.reconnects and first.error is None:
            assert_delivered(harness, first)
            assert first.moved <= plan.size * 1.3 + 65_536, "more was sent again than what was outstanding"
            return
        assert isinstance(first.error, Retryable), f"{first.error!r}, {len(first.outcomes)} outcomes"
        assert not first.rejected, "a lost link rejects nothing"
        assert len(first.arrived) < len(plan.items)
        got = harness.read_back(first.plan)
        confirmed = {key(harness, item) for item in first.plan.items if item.path in first.arrived}
        assert confirmed <= set(got), "confirmed, but not there"
        if harness.driver.facts.keeps_names:
            assert got.items() <= expected(harness, first).items(), "something half is visible under a final name"
            assert not markers(harness), "marked as complete, but it is not"
        second = attempt(target, plan, done=first.arrived)
    assert_delivered(harness, second)
    assert not set(second.outcomes) & first.arrived, "what was confirmed was sent again"
    pending = sum(item.size for item in second.plan.pending)
    assert second.moved <= pending * 1.3 + 65_536, "more was sent than what was missing"
    assert not {name for name in harness.names() if not harness.final(name)}, "traces of the first attempt stay"


@pytest.mark.parametrize("level", [Level.ACCEPTED, Level.PROVEN])
def test_one_rejected_link_cut_retry(harness: Harness, study: Path, level: Level) -> None:
    """What one attempt rejects stays rejected, for its first reason, through all that follow; no marker is set."""
    studies.ct(study, 24, side=64)
    plan = scan([study])
    victim = plan.items[0]
    plan.file(victim).unlink()
    with harness.cut(plan.size // 2) as target:
        target.verify = level
        with sending(target, plan) as sender:
            first = sender.attempt()
            mended = harness.driver.facts.reconnects and first.error is None
            assert mended or isinstance(first.error, Retryable), f"{first.error!r}, {len(first.outcomes)} outcomes"
            if harness.driver.facts.keeps_names:
                assert not markers(harness)
            second = sender.attempt()
    second.require()
    assert_one_rejected(harness, [first, second], victim)


def test_one_refused_by_the_peer_then_pushed_again(harness: Harness, study: Path) -> None:
    """The same where the peer refuses the item, if this type's can, and the connection breaks at the last answer."""
    studies.ct(study, 6, side=64)
    plan = scan([study])
    victim = plan.items[0]
    with ExitStack() as stack:
        if harness.reject:
            target = stack.enter_context(harness.reject(plan, victim))
        else:
            plan.file(victim).unlink()
            target = harness.target
        target.verify = Level.LISTED
        with sending(target, plan) as sender:
            sent = [sender.attempt(), sender.attempt()]
    assert sent[1].moved == 0, "what was settled is sent again"
    assert not sent[1].arrived
    assert_one_rejected(harness, sent, victim)


def test_only_what_the_place_has_not_confirmed_is_sent(harness: Harness, study: Path, tmp_path: Path) -> None:
    """A folder that grows, then the same study in another folder: two dispatches of their own, one place."""
    files, state, grown = studies.ct(tmp_path / "all", 7), tmp_path / "state", tmp_path / "grown"
    state.mkdir()
    target, one_place = harness.target, True
    if harness.driver.facts.keeps_names:
        one_place = "layout" in type(target).model_fields
        if one_place:
            target = target.model_copy(update={"layout": "{StudyInstanceUID}"}).named(target.name)
    for file in files[:5]:
        shutil.copy2(file, study)
    with sending(target, study, folder=state) as sender:
        assert sender.attempt().require().counts[Kind.DELIVERED] == 5
    shutil.copytree(tmp_path / "all", grown, copy_function=shutil.copy)  # with times of their own
    with sending(target, grown, folder=state) as sender:
        sent = sender.attempt()
        receipt = sent.require()
        assert receipt.state is State.DELIVERED
        assert len(sent.outcomes) == (2 if one_place else 7)
        assert receipt.counts[Kind.DELIVERED] == len(sent.outcomes)
        assert receipt.counts[Kind.ALREADY] == 7 - len(sent.outcomes)
    if harness.driver.facts.keeps_names:
        assert markers(harness)
    else:
        assert len(harness.read_back(sent.plan)) == 7
    with sending(target, study, folder=state) as sender:
        again = sender.attempt()
        assert not again.outcomes
        assert again.require().counts[Kind.ALREADY] == 5


def assert_one_rejected(harness: Harness, sent: list[Sent], victim: Item) -> None:
    """Assert that all but one item arrived, in several attempts, and that the first reason given is kept."""
    receipt = sent[-1].require()
    reasons = [one.rejected[victim.path] for one in sent if victim.path in one.rejected]
    assert receipt.state is State.PARTIAL
    assert receipt.attempts == len(sent)
    rejected = {item.path: item.detail for item in receipt.items if item.outcome is Kind.REJECTED}
    assert rejected == {victim.shown: reasons[0]}
    others = {key(harness, item) for item in sent[-1].plan.items if item != victim}
    assert set(harness.read_back(sent[-1].plan)) == others
    if harness.driver.facts.keeps_names:
        assert not markers(harness), "marked as complete, but a file is missing"
