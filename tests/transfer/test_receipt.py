"""Outcomes and receipts: once per item, kept before it counts, and the state follows from them."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from talaria.testing import studies
from tasks.dispatch import report
from transfer.errors import Cancelled
from transfer.outcome import ALREADY, DELIVERED, Kind, Outcome
from transfer.plan import Item, Plan, scan
from transfer.receipt import ItemResult, Level, PushReport, Receipt, State, overall, pieces

PLAN = Plan("d", Path("/x"), tuple(Item(f"{number}.dcm", 10, number) for number in range(4)))
ONE, TWO, THREE, FOUR = PLAN.items
REJECTED = Outcome(Kind.REJECTED, "no")


def receipt(*kinds: Kind, **values: object) -> Receipt:
    items = tuple(ItemResult(f"{number}.dcm", "", kind) for number, kind in enumerate(kinds))
    return Receipt("pacs", items, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kinds", "values", "state"),
    [
        ((Kind.DELIVERED, Kind.WARNING, Kind.ALREADY, Kind.SKIPPED), {}, State.DELIVERED),
        ((Kind.DELIVERED, Kind.REJECTED), {}, State.PARTIAL),
        ((Kind.REJECTED, Kind.REJECTED), {}, State.FAILED),
        ((Kind.DELIVERED, Kind.UNSENT), {}, State.PARTIAL),
        ((Kind.UNSENT,), {}, State.FAILED),
        ((Kind.SKIPPED, Kind.UNSENT), {}, State.FAILED),
        ((Kind.DELIVERED,), {"error": "link lost"}, State.PARTIAL),
        ((Kind.DELIVERED,), {"hook": "failed"}, State.PARTIAL),
        ((Kind.DELIVERED,), {"hook": "done"}, State.DELIVERED),
        ((Kind.DELIVERED, Kind.UNSENT), {"stopped": State.CANCELLED}, State.CANCELLED),
        ((), {"stopped": State.WAITING}, State.WAITING),
    ],
)
def test_state(kinds: tuple[Kind, ...], values: dict[str, object], state: State) -> None:
    assert receipt(*kinds, **values).state is state


D, P, F, C, W = State.DELIVERED, State.PARTIAL, State.FAILED, State.CANCELLED, State.WAITING


@pytest.mark.parametrize(
    ("states", "state"),
    [
        ([D], D), ([D, D], D), ([D, F], P), ([D, P], P), ([F, F], F), ([P, F], P), ([D, C], C), ([W], W), ([W, W], W),
        ([D, W], P), ([F, W], F),
    ],
)  # fmt: skip
def test_overall(states: list[State], state: State) -> None:
    assert overall(states) is state


def test_json(tmp_path: Path) -> None:
    studies.ct(tmp_path, 3)
    plan = scan([tmp_path])
    told = PushReport()
    told(plan.items[0], DELIVERED)
    told(plan.items[1], REJECTED)
    made = told.receipt("pacs", plan, Level.LISTED, ("a note",))
    document = json.loads(json.dumps(made.to_json()))
    assert (document["delivered"], document["rejected"], document["unsent"]) == (1, 1, 1)
    assert document["state"] == "partial"
    assert document["verified"] == "listed"
    assert document["notes"] == ["a note"]
    assert document["bytes"] == plan.items[0].size
    assert [item["path"] for item in document["items"]] == ["CT0002.dcm", "CT0003.dcm"], "all that isn't plain"
    rejected = document["items"][0]
    assert plan.items[1].header is not None
    assert rejected["sop_instance_uid"] == plan.items[1].header.SOPInstanceUID
    assert (rejected["outcome"], rejected["detail"]) == ("rejected", "no")
    assert len(made.to_json(all_items=True)["items"]) == 3


def test_the_json_in_pieces_is_the_same() -> None:
    many = tuple(ItemResult(f'{number}/ä"\\.dcm', f"1.2.{number}", Kind.DELIVERED) for number in range(1101))
    for items in ((), many[:1], many[:500], many):
        one = Receipt("pacs", items, 7, 1.5, notes=("a", "b"))
        found = list(pieces(one))
        assert json.loads(b"".join(found)) == one.to_json(all_items=True)
        assert max(map(len, found)) < 100_000
        other = Receipt.from_json("pacs", one.to_json(all_items=True))
        whole = json.loads(b"".join(report.pieces("d", "run", State.PARTIAL, [one, other])))
        assert whole == report.document("d", "run", State.PARTIAL, [one, other])
    assert json.loads(b"".join(report.pieces("d", "run", State.FAILED, []))) == report.document(
        "d", "run", State.FAILED, []
    )


def test_what_was_done_before_is_already_there() -> None:
    told = PushReport()
    told(TWO, DELIVERED)
    told(THREE, ALREADY)
    made = told.receipt("pacs", PLAN.narrowed(PLAN.items, done=[ONE.path]))
    assert [item.outcome for item in made.items] == [Kind.ALREADY, Kind.DELIVERED, Kind.ALREADY, Kind.UNSENT]
    assert made.bytes == TWO.size, "bytes count what was delivered now"
    assert made.unsent == 1


def test_an_item_has_one_outcome() -> None:
    told = PushReport()
    told(ONE, DELIVERED)
    with pytest.raises(RuntimeError, match="second outcome"):
        told(ONE, DELIVERED)


def test_an_outcome_counts_only_when_it_is_kept() -> None:
    def full(item: Item, outcome: Outcome) -> None:
        raise OSError("disk full")

    told = PushReport(full)
    with pytest.raises(OSError, match="disk full"):
        told(ONE, DELIVERED)
    assert not told.outcomes


def test_a_delivery_can_be_taken_back() -> None:
    kept: list[tuple[str, Kind]] = []
    told = PushReport(lambda item, outcome: kept.append((item.path, outcome.kind)))
    told(ONE, DELIVERED)
    told.revoke(ONE, "not there")
    told.revoke(TWO, "not there")  # of an earlier attempt
    assert kept == [("0.dcm", Kind.DELIVERED), ("0.dcm", Kind.REJECTED), ("1.dcm", Kind.REJECTED)]
    made = told.receipt("pacs", PLAN.narrowed(PLAN.items[:2], done=[TWO.path]))
    assert [item.outcome for item in made.items] == [Kind.REJECTED, Kind.REJECTED]


def test_cancelled() -> None:
    told = PushReport()
    told.check()
    told.cancelled.set()
    with pytest.raises(Cancelled):
        told.check()


def test_many_threads_tell() -> None:
    items = [Item(str(number), 1, 1) for number in range(800)]
    kept: list[str] = []
    told = PushReport(lambda item, outcome: kept.append(item.path))

    def work(start: int) -> None:
        for item in items[start::8]:
            told(item, DELIVERED)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(kept) == sorted(told.outcomes) == sorted(item.path for item in items)
