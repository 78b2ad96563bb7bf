"""Files of one plan that share a SOP Instance UID: which is sent, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from talaria.testing import studies
from transfer.duplicates import Duplicates, same_instance
from transfer.outcome import ALREADY, DELIVERED, Kind, Outcome
from transfer.plan import Item, Plan, scan
from transfer.receipt import PushReport

NO = Outcome(Kind.REJECTED, "cannot understand")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """One instance alone, and one UID three times: the second file is a copy with another preamble."""
    uid = studies.uid()
    studies.dicom(tmp_path / "alone.dcm")
    data = studies.encoded(studies.dataset(SOPInstanceUID=uid))
    studies.write(tmp_path / "b1.dcm", data)
    studies.write(tmp_path / "b2.dcm", b"x" * 128 + data[128:])
    studies.dicom(tmp_path / "b3.dcm", SOPInstanceUID=uid, PatientComments="another")
    studies.note(tmp_path / "c.json")
    return scan([tmp_path])


def run(plan: Plan, answer: Callable[[Item], Outcome]) -> tuple[list[list[str]], dict[str, Outcome]]:
    report = PushReport()
    duplicates = Duplicates(plan, report)
    items, rounds = duplicates.begin(), []
    while items:
        rounds.append([item.path for item in items])
        for item in items:
            report(item, answer(item))
        items = duplicates.settle()
    return rounds, report.outcomes


def kinds(outcomes: dict[str, Outcome]) -> dict[str, Kind]:
    return {path: outcome.kind for path, outcome in outcomes.items()}


def test_a_copy_is_already_there_and_another_content_is_rejected(plan: Plan) -> None:
    rounds, outcomes = run(plan, lambda item: DELIVERED)
    assert rounds == [["alone.dcm", "b1.dcm", "c.json"]]
    assert kinds(outcomes) == {
        "alone.dcm": Kind.DELIVERED,
        "b1.dcm": Kind.DELIVERED,
        "b2.dcm": Kind.ALREADY,
        "b3.dcm": Kind.REJECTED,
        "c.json": Kind.DELIVERED,
    }
    assert "b1.dcm" in outcomes["b3.dcm"].detail
    assert "SOP Instance UID" in outcomes["b3.dcm"].detail


def test_the_other_content_gets_its_chance_where_the_first_is_refused(plan: Plan) -> None:
    rounds, outcomes = run(plan, lambda item: NO if item.path == "b1.dcm" else DELIVERED)
    assert rounds == [["alone.dcm", "b1.dcm", "c.json"], ["b3.dcm"]]
    assert outcomes["b3.dcm"] == DELIVERED
    assert outcomes["b2.dcm"].kind is Kind.REJECTED
    assert "cannot understand" in outcomes["b2.dcm"].detail or "other content" in outcomes["b2.dcm"].detail


def test_a_peer_that_had_it_before_has_one_of_them(plan: Plan) -> None:
    _, outcomes = run(plan, lambda item: ALREADY)
    assert kinds(outcomes)["b3.dcm"] is Kind.REJECTED


@pytest.mark.parametrize("done", ["b1.dcm", "b2.dcm", "b3.dcm"])
def test_what_an_earlier_attempt_delivered_settles_the_others(plan: Plan, done: str) -> None:
    rounds, outcomes = run(plan.narrowed(plan.items, [done]), lambda item: DELIVERED)
    assert rounds == [["alone.dcm", "c.json"]]
    expected = {"b1.dcm": Kind.ALREADY, "b2.dcm": Kind.ALREADY, "b3.dcm": Kind.REJECTED}
    if done == "b3.dcm":
        expected = {"b1.dcm": Kind.REJECTED, "b2.dcm": Kind.REJECTED}
    expected.pop(done, None)
    assert {path: kind for path, kind in kinds(outcomes).items() if path[0] == "b"} == expected


def test_what_an_earlier_attempt_saw_rejected_stays_so(plan: Plan) -> None:
    rejected = {"b1.dcm": NO}
    rounds, outcomes = run(plan.narrowed(plan.items, rejected=rejected), lambda item: DELIVERED)
    assert rounds == [["alone.dcm", "b3.dcm", "c.json"]]
    assert outcomes["b2.dcm"].kind is Kind.REJECTED
    assert "b1.dcm" not in outcomes


def test_what_has_no_outcome_yet_is_not_settled(plan: Plan) -> None:
    """A lost link: the next attempt begins anew."""
    report = PushReport()
    assert len(Duplicates(plan, report).begin()) == 3
    assert not report.outcomes


def test_another_encoding_is_another_content(tmp_path: Path) -> None:
    uid = studies.uid()
    for name in ("MR_small.dcm", "MR_small_implicit.dcm"):
        studies.dicom(tmp_path / name, name, SOPInstanceUID=uid)
    plan = scan([tmp_path])
    assert not same_instance(plan, *plan.items)


def test_a_file_that_is_gone_costs_only_itself(plan: Plan) -> None:
    (plan.root / "b2.dcm").unlink()
    _, outcomes = run(plan, lambda item: DELIVERED)
    assert outcomes["b2.dcm"].kind is Kind.REJECTED
    assert "can't be read" in outcomes["b2.dcm"].detail
