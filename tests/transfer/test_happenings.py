"""What happened is kept once, counted once, and taken by one; in SQLite and in PostgreSQL."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from transfer.happenings import BYTES, DISPATCHES, ITEMS, SECONDS_WITHIN, Happening
from transfer.ledger import Ledger
from transfer.messages import FAILED, OPEN, SENT, Overtaken


def ended(ledger: Ledger, run: str, state: str = "failed", host: str = "") -> bool:
    items = {"delivered": 3, "rejected": 2, "skipped": 0}
    return ledger.happenings.ended(host, run, "pacs", state, items, 1000, 7.0, f"dispatch.{state}", {"run": run})


def sums(ledger: Ledger, host: str = "") -> dict[tuple[str, str], float]:
    return {(one.name, one.label): one.value for one in ledger.happenings.totals(host)}


def test_an_end_is_counted_and_kept_once_also_if_its_run_is_killed_and_goes_on(where: Path | str) -> None:
    with Ledger(where) as ledger:
        ledger.runs.begins("r1", "one")
        assert ended(ledger, "r1")
        ledger.runs.ends("r1", goes_on=True)  # as recovery does
        ledger.runs.begins("r1", "two")
        assert not ended(ledger, "r1")
        assert sums(ledger) == {
            (DISPATCHES, "failed"): 1, (BYTES, "failed"): 1000, ("seconds", "failed"): 7.0,
            (SECONDS_WITHIN, "failed/15"): 1, (ITEMS, "delivered"): 3, (ITEMS, "rejected"): 2,
        }  # fmt: skip
        assert [one.about for one in ledger.happenings.waiting(9)] == [{"run": "r1"}]
        assert ended(ledger, "r1", "delivered")  # taken up, it ended otherwise
        ledger.runs.ends("r1", "another")  # not its owner
        assert not ended(ledger, "r1", "delivered")


def test_an_end_counts_again_when_its_run_was_over_and_is_retried(where: Path | str) -> None:
    with Ledger(where) as ledger:
        for _ in range(2):
            ledger.runs.begins("r1", "one")
            assert ended(ledger, "r1")
            ledger.runs.ends("r1", "one")
        assert sums(ledger)[DISPATCHES, "failed"] == 2
        assert len(ledger.happenings.waiting(9)) == 2


def test_each_host_has_its_totals(where: Path | str) -> None:
    with Ledger(where) as ledger:
        ended(ledger, "r1", host="a")
        ended(ledger, "r2", host="b")
        assert sums(ledger, "a")[DISPATCHES, "failed"] == 1
        assert sums(ledger) == {}


def test_what_has_a_key_happens_once_and_is_taken_once(where: Path | str) -> None:
    with Ledger(where) as ledger:
        happenings = ledger.happenings
        assert happenings.happened("disk.low", {"of": "state"}, key="disk:state")
        assert not happenings.happened("disk.low", {"of": "state"}, key="disk:state")
        assert happenings.happened("dispatch.late", {}) and happenings.happened("dispatch.late", {})
        found = happenings.waiting(9)
        with ledger.together():
            assert len(happenings.take(found)) == 3
        with ledger.together():
            assert happenings.take(found) == []
        assert happenings.waiting(9) == []
        assert not happenings.happened("disk.low", {"of": "state"}, key="disk:state")


def test_of_many_who_take_at_once_each_happening_goes_to_one(where: Path | str) -> None:
    with Ledger(where) as ledger:
        for number in range(50):
            ledger.happenings.happened("target.down", {"n": number})
        found = ledger.happenings.waiting(100)

    def take(_: int) -> list[Happening]:
        with Ledger(where) as mine, mine.together():
            return mine.happenings.take(found)

    with ThreadPoolExecutor(4) as pool:
        taken = [one.id for mine in pool.map(take, range(4)) for one in mine]
    assert sorted(taken) == sorted(one.id for one in found)


def test_a_change_of_state_is_noticed_by_the_first(where: Path | str) -> None:
    with Ledger(where) as ledger:
        assert not ledger.happenings.stands("target/pacs", "up", at_first=False)
        assert ledger.happenings.stands("target/pacs", "down")
        assert not ledger.happenings.stands("target/pacs", "down")
        assert ledger.happenings.stands("target/pacs", "up")


# ---- messages


def collect(ledger: Ledger, count: int, every_s: float = 0.0, group_s: float = 0.0) -> int:
    with ledger.together():
        one = ledger.messages.collecting("ops", "a@b", every_s, group_s)
        one.body["count"] = one.body.get("count", 0) + count
        ledger.messages.save(one)
    return one.number


def test_a_message_collects_until_it_is_tried(where: Path | str) -> None:
    with Ledger(where) as ledger:
        assert (collect(ledger, 1), collect(ledger, 2)) == (1, 1)
        (one,) = ledger.messages.claimed("me", 60, 9)
        assert one.body == {"count": 3} and one.tries == 1
        assert ledger.messages.claimed("other", 60, 9) == []
        assert collect(ledger, 5) == 2
        assert ledger.messages.claimed("me", 60, 9) == []  # the earlier one has not ended
        ledger.messages.settle(one, SENT)
        (two,) = ledger.messages.claimed("me", 60, 9)
        assert two.body == {"count": 5}


def test_a_message_that_failed_is_due_again_and_then_given_up(where: Path | str) -> None:
    with Ledger(where) as ledger:
        collect(ledger, 1)
        (one,) = ledger.messages.claimed("me", 60, 9)
        ledger.messages.settle(one, OPEN, "refused", again=ledger.now() + 3600)
        assert ledger.messages.claimed("me", 60, 9) == []
        assert ledger.messages.counts() == {("ops", "late"): 1}
        ledger.messages.hurry("ops", 600, 30)
        (one,) = ledger.messages.claimed("me", 60, 9)
        assert one.tries == 2
        ledger.messages.settle(one, FAILED, "refused")
        (last,) = ledger.messages.newest("ops", 5)
        assert (last.state, last.error, last.tries) == (FAILED, "refused", 2)


def test_a_message_that_waits_is_due_as_a_changed_rule_says(where: Path | str) -> None:
    with Ledger(where) as ledger:
        collect(ledger, 1, group_s=86_400)
        ledger.messages.hurry("ops", 600, 3600)
        assert ledger.messages.claimed("me", 60, 9) == []
        assert ledger.messages.newest("ops", 1)[0].due <= ledger.now() + 3600
        ledger.messages.hurry("ops", 600, 0)
        (one,) = ledger.messages.claimed("me", 60, 9)
        ledger.messages.settle(one, SENT)
        collect(ledger, 1, every_s=86_400)
        ledger.messages.hurry("ops", 600, 0)
        assert ledger.messages.claimed("me", 60, 9) == []
        ledger.messages.hurry("ops", 0, 0)
        assert len(ledger.messages.claimed("me", 60, 9)) == 1


def test_messages_go_on_when_a_clock_that_was_ahead_is_set_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        with monkeypatch.context() as ahead:
            ahead.setattr(ledger.messages._db, "time", lambda: time.time() + 86_400 * 365)
            collect(ledger, 1)
            (one,) = ledger.messages.claimed("me", 60, 9)
            ledger.messages.settle(one, SENT)
            collect(ledger, 1, every_s=600)
        (two,) = ledger.messages.claimed("me", 60, 9)
        assert two.made <= ledger.now()
        ledger.messages.settle(two, OPEN, "refused", again=ledger.now() + 60)
        assert not ledger.messages.due()
        ledger.messages.hurry("ops", 0, 0)
        (two,) = ledger.messages.claimed("me", 60, 9)
        ledger.messages.settle(two, SENT)
        collect(ledger, 1, every_s=0)
        assert len(ledger.messages.claimed("me", 60, 9)) == 1


def test_a_message_waits_for_its_group_and_for_its_rate(where: Path | str) -> None:
    with Ledger(where) as ledger:
        collect(ledger, 1, group_s=3600)
        assert ledger.messages.claimed("me", 60, 9) == []
        collect(ledger, 1)  # a shorter group opens no second one
        assert len(ledger.messages.newest("ops", 9)) == 1
        ledger.messages.drop("ops")
        collect(ledger, 1)
        (one,) = ledger.messages.claimed("me", 60, 9)
        ledger.messages.settle(one, SENT)
        collect(ledger, 1, every_s=3600)
        assert ledger.messages.claimed("me", 60, 9) == []
        assert ledger.messages.newest("ops", 1)[0].due >= ledger.now() + 3500


def test_a_claim_of_a_killed_process_ends_by_time_or_by_its_successor(where: Path | str) -> None:
    with Ledger(where) as ledger:
        collect(ledger, 1)
        (stale,) = ledger.messages.claimed("killed", 3600, 9)
        assert ledger.messages.claimed("other", 60, 9) == []
        ledger.messages.release("killed")
        (fresh,) = ledger.messages.claimed("other", -1, 9)
        (again,) = ledger.messages.claimed("third", 60, 9)  # the time of that claim is over
        ledger.messages.settle(stale, FAILED, "late word")
        ledger.messages.settle(fresh, FAILED, "late word")
        assert ledger.messages.newest("ops", 1)[0].state == OPEN
        ledger.messages.settle(again, SENT)
        assert ledger.messages.newest("ops", 1)[0].state == SENT


def test_two_who_collect_at_once_lose_nothing(where: Path | str) -> None:
    with Ledger(where) as ledger:
        collect(ledger, 1)
        one = ledger.messages.collecting("ops", "a@b", 0, 0)
        collect(ledger, 1)
        with pytest.raises(Overtaken), ledger.together():
            ledger.messages.save(one)
        assert ledger.messages.newest("ops", 1)[0].body == {"count": 2}


def test_old_messages_and_happenings_are_forgotten_but_the_last_message(where: Path | str) -> None:
    with Ledger(where) as ledger:
        for _ in range(2):
            collect(ledger, 1)
            (one,) = ledger.messages.claimed("me", 60, 9)
            ledger.messages.settle(one, SENT)
        ledger.happenings.happened("disk.low", {}, key="k")
        ledger.prune(ledger.now() + 60)
        assert [one.number for one in ledger.messages.newest("ops", 9)] == [2]
        assert ledger.happenings.waiting(9) == []


def test_a_ledger_of_the_version_before_gets_the_tables(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        for table in ("totals", "ends", "standing", "happenings", "messages"):
            ledger._db.execute(f"DROP TABLE {table}")
        ledger._db.execute("INSERT INTO runs VALUES ('r1','d1','me',1,2)")
        ledger._db.execute("PRAGMA user_version=1")
    with Ledger(path) as ledger:
        assert ended(ledger, "r1")
        assert ledger._db.execute("SELECT count(*) FROM runs").fetchone() == (1,)


def test_what_ended_is_summed_up_by_hours_and_days(where: Path | str) -> None:
    with Ledger(where) as ledger:
        for run, state in (("r1", "failed"), ("r2", "delivered"), ("r3", "delivered")):
            ledger.runs.begins(run, "one")
            assert ended(ledger, run, state)
            assert not ended(ledger, run, state)
        now = time.time()
        sums_of = {(one.target, one.state): (one.dispatches, one.bytes) for one in ledger.happenings.days(now - 7200)}
        assert sums_of == {("pacs", "failed"): (1, 1000), ("pacs", "delivered"): (2, 2000)}
        hours = ledger.happenings.hours(now - 7200, "pacs")
        assert sum(one.dispatches for one in hours) == 3 and all(abs(one.last - now) < 600 for one in hours)
        assert ledger.happenings.hours(now - 7200, "other") == [] and ledger.happenings.days(now + 7200) == []
        ledger.happenings.prune(now + 7200)
        assert ledger.happenings.days(0) == []
