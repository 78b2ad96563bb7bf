"""One instance never stops a study: peers that refuse, abort, close or fall silent at some instances, or after some.

Whatever a peer does: what is reported as delivered is what it has, nothing that it confirmed is sent again, and every
instance that it would take is delivered, in the first attempt.
"""

from __future__ import annotations

import functools
import random
import time
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from talaria.testing import studies
from talaria.testing.harness import Sent, attempt, sending
from talaria.testing.process import as_loaded
from tests.servers.scp import Association, Scp, scp
from tests.servers.steps import Abort, Answer, Close, Partly, Raw, Reject, Reset, Script, Silence, Store, Wait
from tests.servers.wire import Proposal
from tests.targets.dicom import dicom_target
from transfer.errors import Busy, Denied, DispatchError, Retryable
from transfer.outcome import Kind
from transfer.plan import Plan, scan
from transfer.receipt import State

IDLE_S = 1.0
SLACK_S = 8.0  # for a busy machine, pauses before what is tried again, and new associations
COUNT = 30
PLACES: dict[str, tuple[int, ...]] = {
    "first": (0, 1, 2, 3, 4, 5),
    "last": (24, 25, 26, 27, 28, 29),
    "spread": (0, 5, 11, 17, 23, 29),
    "pairs": (3, 4, 14, 15, 28, 29),
}
BAD: dict[str, Script] = {"A700": 0xA700, "abort": Abort(), "close": Close(), "reset": Reset(), "silence": Silence()}
SAID = {
    "A700": "A700",
    "abort": "aborted the association",
    "close": "the connection",
    "reset": "the peer",
    "silence": "no answer to C-STORE",
}


@functools.cache
def study() -> Plan:
    """The same files for all: each peer is a new one."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="talaria-progress-"))
    studies.ct(folder, COUNT)
    return scan([folder])


def uids(plan: Plan) -> list[str]:
    return [item.header.SOPInstanceUID for item in plan.items if item.header]


def target_of(peer: Scp, **more: Any) -> Any:
    return dicom_target(peer.port, **({"aet_target": peer.aet, "idle_timeout_s": IDLE_S} | more))


def arrived(sent: Sent) -> set[str]:
    return {item.header.SOPInstanceUID for item in sent.plan.items if item.header and item.path in sent.arrived}


WAYS = [(1, 1), (4, 1), (1, 8), (4, 8)]


def _thirty() -> Iterator[Any]:
    """Each kind at each place, sent in each way: in `make test` each place in one way, another one for each kind."""
    for (shift, kind), (row, place), (column, way) in product(enumerate(BAD), enumerate(PLACES), enumerate(WAYS)):
        slow = (row + shift) % len(WAYS) != column
        yield pytest.param(kind, place, *way, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("kind", "place", "concurrency", "window"), list(_thirty()))
def test_six_bad_ones_of_thirty(kind: str, place: str, concurrency: int, window: int) -> None:
    plan = study()
    bad = {uids(plan)[number] for number in PLACES[place]}
    with scp(
        on_store=lambda store: BAD[kind] if store.SOPInstanceUID in bad else 0,
        window=None if window == 1 else (window, 1),
    ) as peer:
        sent = attempt(target_of(peer, concurrency=concurrency), plan)
        assert arrived(sent) == set(peer.kept) == set(uids(plan)) - bad
        assert not peer.repeated
        assert sent.seconds < as_loaded(6 * IDLE_S + SLACK_S)
        if kind == "A700" and sent.error is not None:  # nothing was stored after the first refusal
            assert place == "last"
            assert "A700" in str(sent.error)
            return
        assert sent.require().state is State.PARTIAL
        assert {plan.items[number].path for number in PLACES[place]} == set(sent.rejected)
        assert all(SAID[kind] in detail and "times)" in detail for detail in sent.rejected.values()), sent.rejected


WRONG: dict[str, tuple[Script, str]] = {
    "A700": (0xA700, "A700"),
    "C000": (0xC000, "C000"),
    "abort": (Abort(), "aborted"),
    "reset": (Reset(), "the peer"),
    "partly": (Partly(), "the peer"),
    "garbage": ([Raw(b"HTTP/1.1 400 Bad Request\r\n\r\n"), Close()], "other than a response"),
    "alien": (Answer(message_id=4711, kept=False), "was not sent"),
    "bare": (Answer(status=None), "no status"),
    "silence": (Silence(), "no answer to C-STORE"),
}


@pytest.mark.parametrize(
    ("mix", "concurrency", "window"),
    [
        *[("silence", *both) for both in ((2, 16), (16, 1))],
        *[pytest.param("silence", *both, marks=pytest.mark.slow) for both in ((1, 1), (4, 1), (8, 16))],
        *[("all", *both) for both in ((1, 16), (2, 1), (4, 16), (8, 1), (16, 16))],
        *[("rest", *both) for both in ((1, 1), (4, 16), (16, 1))],
    ],
)
def test_six_bad_ones_of_several_kinds(mix: str, concurrency: int, window: int) -> None:
    """24 of 30 are delivered, in the first attempt, in the time of six silences; the others say what became of each."""
    plan = study()
    dice = random.Random(f"{mix} {concurrency} {window}")
    kinds = {"silence": ["silence"] * 6, "all": dice.sample(sorted(WRONG), 6), "rest": dice.choices(sorted(WRONG), k=6)}
    # The last one is good: a peer that refuses to the end could be full.
    bad = dict(zip(dice.sample(uids(plan)[:-1], 6), kinds[mix], strict=True))
    with scp(
        on_store=lambda store: WRONG[bad[store.SOPInstanceUID]][0] if store.SOPInstanceUID in bad else 0,
        window=None if window == 1 else (window, 1),
    ) as peer:
        sent = attempt(target_of(peer, concurrency=concurrency), plan)
        assert arrived(sent) == set(peer.kept) == set(uids(plan)) - set(bad), sent.error
        # Where it is we who end the association, a peer may store what we had sent ahead, and say so to nobody.
        assert not peer.repeated or (window > 1 and {"alien", "bare"} & set(kinds[mix]))
        assert sent.seconds < as_loaded(6 * IDLE_S + SLACK_S)
        assert sent.require().state is State.PARTIAL
        said = {item.header.SOPInstanceUID: sent.rejected.get(item.path, "") for item in plan.items if item.header}
        assert all(WRONG[kind][1] in said[uid] for uid, kind in bad.items()), {bad[uid]: said[uid] for uid in bad}


RELEASE_RQ = b"\5\0\0\0\0\4\0\0\0\0"


@pytest.mark.parametrize(("concurrency", "window"), [(1, 1), (1, 16), (4, 16)])
@pytest.mark.parametrize("after", [1, 5])
@pytest.mark.parametrize("times", [1, 99])
def test_a_release_by_the_peer_sends_nothing_again_and_blames_nobody(
    times: int, after: int, concurrency: int, window: int
) -> None:
    plan = study()
    seen: dict[int, int] = {}

    def script(store: Store) -> Script:
        seen[store.association] = seen.get(store.association, 0) + 1
        if seen[store.association] == after and store.association <= times:
            return [0, Raw(RELEASE_RQ), Silence()]
        return 0

    with scp(on_store=script, window=None if window == 1 else (window, 1)) as peer:
        sent = attempt(target_of(peer, concurrency=concurrency), plan)
        assert sent.require().state is State.DELIVERED
        assert set(peer.kept) == set(uids(plan))
        assert not peer.repeated
        counts = Counter(store.SOPInstanceUID for store in peer.stores)
        assert set(counts.values()) == {1}, "what had not been answered had not been read either"
        assert sent.seconds < as_loaded(SLACK_S)


def test_a_release_while_the_peer_reads_nothing_more(tmp_path: Path) -> None:
    """It may be said in the middle of an instance that is larger than the buffers on the way."""
    studies.multiframe(tmp_path / "9.dcm", 40)  # 21 MB
    studies.ct(tmp_path, 3)
    plan = scan([tmp_path])

    def half(association: Association, size: int) -> Script:
        return [Raw(RELEASE_RQ), Wait(4 * IDLE_S), Close()] if size > 1 << 20 and association.number == 1 else None

    with scp(on_data=half, keep_data=False) as peer:
        sent = attempt(target_of(peer, concurrency=1, idle_timeout_s=30), plan)
        assert sent.require().state is State.DELIVERED
        assert sent.seconds < as_loaded(3 + SLACK_S), "it waited for a peer that had said that it was done"


def test_an_attempt_that_a_release_ends_is_not_counted_if_it_got_further(tmp_path: Path) -> None:
    """The peer grants one association in each attempt, and releases it after one instance."""
    studies.ct(tmp_path, 3)
    plan = scan([tmp_path])
    granted: list[int] = []

    def associate(proposal: Proposal) -> Script:
        granted.append(proposal.association)
        return None if len(granted) == 1 else Reject(2, 3, 1)

    with (
        scp(on_store=lambda store: [0, Raw(RELEASE_RQ), Silence()], on_associate=associate, window=(16, 1)) as peer,
        sending(target_of(peer, concurrency=1, max_attempts=2), plan) as sender,
    ):
        while sender.receipt().state is not State.DELIVERED and sender.delivery.may_go_on:
            granted.clear()
            sender.attempt()
        assert sender.receipt().state is State.DELIVERED
        assert sender.delivery.futile == 0
        assert len(peer.stores) == len(peer.kept) == 3


def test_more_bad_ones_in_a_row_than_a_peer_is_given_are_passed_over() -> None:
    plan = study()
    bad = set(uids(plan)[2:17])
    with scp(on_store=lambda store: 0xA700 if store.SOPInstanceUID in bad else 0) as peer:
        sent = attempt(target_of(peer, concurrency=1), plan)
        assert arrived(sent) == set(uids(plan)) - bad
        assert len(sent.rejected) == 15


@pytest.mark.parametrize("files", [2, 3])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_good_one_beside_a_bad_one_at_more_associations_than_files(files: int, bad: int, tmp_path: Path) -> None:
    studies.ct(tmp_path, files)
    plan = scan([tmp_path])
    victim = uids(plan)[bad]
    with scp(on_store=lambda store: Abort() if store.SOPInstanceUID == victim else 0) as peer:
        sent = attempt(target_of(peer, concurrency=4), plan)
        assert set(sent.rejected) == {plan.items[bad].path}
        assert set(peer.kept) == set(uids(plan)) - {victim}


@pytest.mark.parametrize(("concurrency", "window"), [(1, 1), (4, 1), (1, 16)])
@pytest.mark.parametrize("lasts", [1, 3, 8])
@pytest.mark.parametrize("end", [Abort(), Close()], ids=str)
def test_a_peer_that_ends_each_association_after_some(end: Script, lasts: int, concurrency: int, window: int) -> None:
    plan = study()
    seen: dict[int, int] = {}

    def script(store: Store) -> Script:
        seen[store.association] = seen.get(store.association, 0) + 1
        return end if seen[store.association] > lasts else 0

    with scp(on_store=script, window=None if window == 1 else (window, 1)) as peer:
        sent = attempt(target_of(peer, concurrency=concurrency), plan)
        assert sent.require().state is State.DELIVERED
        assert set(peer.kept) == set(uids(plan))
        assert not peer.repeated
        ended = [one.ended for one in peer.associations]
        assert ended.count("done") <= 2 * concurrency + 1, "nothing was learnt"
        if concurrency * lasts < COUNT:  # else all may be through before any of them has ended
            assert f"after {lasts} instances" in " ".join(sent.require().notes)


@pytest.mark.parametrize(
    ("end", "takes", "concurrency", "window"),
    [(0xA700, 3, 1, 1), (0xA700, 3, 4, 1), (Silence(), 1, 4, 8), (Silence(), 8, 4, 1)],
)
def test_a_peer_that_takes_so_many_on_an_association_refuses_none_for_good(
    end: Script, takes: int, concurrency: int, window: int
) -> None:
    """What comes after others, also when it is tried again, is not to blame for what meets it there."""
    plan = study()
    seen: Counter[int] = Counter()

    def script(store: Store) -> Script:
        seen[store.association] += 1
        return end if seen[store.association] > takes else 0

    with scp(on_store=script, window=None if window == 1 else (window, 1)) as peer:
        sent = attempt(target_of(peer, concurrency=concurrency, idle_timeout_s=0.5), plan)
        assert sent.require().state is State.DELIVERED
        assert set(peer.kept) == set(uids(plan))
        assert not peer.repeated


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("bad", [(0, 1), (14,), (28, 29)], ids=str)
def test_what_we_may_not_store_costs_itself_alone(bad: tuple[int, ...], concurrency: int) -> None:
    plan = study()
    with scp(on_store=lambda store: 0x0124 if store.SOPInstanceUID in denied else 0) as peer:
        denied = {uids(plan)[number] for number in bad}
        with sending(target_of(peer, concurrency=concurrency), plan) as sender:
            sent = sender.attempt()
            rows = sender.receipt().items
        assert type(sent.error) is Denied
        assert arrived(sent) == set(peer.kept) == set(uids(plan)) - denied
    left = {row.sop_instance_uid: row.detail for row in rows if row.outcome is Kind.UNSENT}
    assert set(left) == denied
    assert all("0124" in detail for detail in left.values())


def test_a_peer_that_lets_us_store_nothing_is_asked_a_few_times_only() -> None:
    with scp(on_store=lambda store: 0x0124) as peer:
        sent = attempt(target_of(peer, concurrency=4), study())
        assert type(sent.error) is Denied
        assert len(peer.stores) <= 5


def test_what_was_outstanding_comes_last_and_after_a_pause() -> None:
    """A peer that notices late that a link is gone removes what it had half, under the same name."""
    plan = study()
    victim = uids(plan)[-1]
    times: list[float] = []

    def script(store: Store) -> Script:
        if store.SOPInstanceUID == victim:
            times.append(time.monotonic())
            return Reset() if len(times) == 1 else 0
        return 0

    with scp(on_store=script) as peer:
        assert attempt(target_of(peer, concurrency=1), plan).require().state is State.DELIVERED
    assert times[1] - times[0] >= 0.9


def test_a_peer_that_hangs_at_everything_is_given_up_in_bounded_time() -> None:
    with scp(on_store=lambda store: Silence()) as peer:
        sent = attempt(target_of(peer, concurrency=4), study())
        assert isinstance(sent.error, Retryable)
        assert not sent.outcomes
        assert sent.seconds < as_loaded(3 * IDLE_S + SLACK_S)


# ---- any peer

ENDS: dict[str, Script] = {
    "0000": 0,
    "B000": 0xB000,
    "A700": 0xA700,
    "A900": 0xA900,
    "C000": 0xC000,
    "0111": 0x0111,
    "abort": Abort(),
    "close": Close(),
    "reset": Reset(),
    "silence": Silence(),
    "slow": [Wait(0.05), 0],
}
STORES = {"0000", "B000", "slow"}
REFUSES = {"A900", "C000"}


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    behaviour=st.lists(st.sampled_from(sorted(ENDS)), min_size=1, max_size=14),
    passes=st.sampled_from([0, 1]),
    concurrency=st.integers(1, 5),
    window=st.sampled_from([None, (2, 1), (8, 1), (0, 0)]),
)
def test_any_peer(behaviour: list[str], passes: int, concurrency: int, window: tuple[int, int] | None) -> None:
    """Each instance is met as `behaviour` says; trouble passes after the first time if `passes`."""
    plan = study()
    plan = plan.narrowed(plan.items[: len(behaviour)])
    said = dict(zip(uids(plan), behaviour, strict=True))
    met: dict[str, int] = {}

    def script(store: Store) -> Script:
        uid = store.SOPInstanceUID
        met[uid] = met.get(uid, 0) + 1
        if passes and met[uid] > 1 and said[uid] not in STORES | REFUSES | {"0111"}:
            return 0
        return ENDS[said[uid]]

    silent = sum(kind == "silence" for kind in behaviour)
    with scp(on_store=script, window=window) as peer:
        done: set[str] = set()
        sent = attempt(target_of(peer, concurrency=concurrency, idle_timeout_s=0.5), plan)
        done |= sent.arrived
        assert sent.seconds < as_loaded((silent + 1) * 1.5 + 12)
        there = set(peer.kept)
        confirmed = {uid for uid in arrived(sent) if said[uid] != "0111"}
        assert confirmed == there, "what is reported as delivered is not what the peer has"
        assert not peer.repeated, "sent again although it was confirmed"
        patient = {uid for uid, kind in said.items() if kind in STORES}
        if sent.error is None:
            assert patient <= there
            if passes:
                assert {uid for uid, kind in said.items() if kind not in REFUSES | {"0111"}} == there
            for item in plan.items:
                outcome, uid = sent.outcomes[item.path], item.header.SOPInstanceUID if item.header else ""
                assert outcome.arrived == (uid in there or said[uid] == "0111")
        else:
            assert isinstance(sent.error, DispatchError)
            assert isinstance(sent.error, Retryable)
            # A peer that took nothing at all may be down: it is asked again later, and takes what it takes then.
            assert all(outcome.kind is not Kind.SKIPPED for outcome in sent.outcomes.values())
            peer.on_store = None
            second = attempt(
                target_of(peer, concurrency=concurrency),
                plan.narrowed(plan.items, rejected={k: v for k, v in sent.outcomes.items() if not v.arrived}),
                done=done,
            )
            assert second.error is None
            assert not peer.repeated


@pytest.mark.parametrize("concurrency", [1, 4, 8])
def test_a_peer_whose_disk_is_full_is_left_in_peace_though_it_stored_one_more_meanwhile(concurrency: int) -> None:
    """What went out before the first refusal, and is answered after it, is no sign that only some are refused."""
    plan = study()

    def script(store: Store) -> Script:
        if store.number == 12:
            return [Wait(0.5), 0]
        return [Wait(0.02), 0xA700 if store.number > 12 else 0]

    with scp(on_store=script) as peer:
        sent = attempt(target_of(peer, concurrency=concurrency), plan)
        assert arrived(sent) == set(peer.kept)
        assert not sent.rejected
        assert isinstance(sent.error, Busy)


def test_instances_that_end_associations_at_the_same_number_are_not_taken_for_a_habit(tmp_path: Path) -> None:
    studies.ct(tmp_path, 60)
    plan = scan([tmp_path])
    bad = {uids(plan)[number] for number in (1, 3, 5)}  # each the second on its association
    with scp(on_store=lambda store: Abort() if store.SOPInstanceUID in bad else 0) as peer:
        sent = attempt(target_of(peer, concurrency=1), plan)
        assert arrived(sent) == set(peer.kept) == set(uids(plan)) - bad
        assert len(peer.associations) < 30, "an association for each instance"
        assert not any("it gets no more" in note for note in sent.require().notes)


def test_what_is_refused_to_the_end_has_the_peers_status_in_the_receipt() -> None:
    plan = study()
    bad = set(uids(plan)[-3:])
    with (
        scp(on_store=lambda store: 0xA702 if store.SOPInstanceUID in bad else 0) as peer,
        sending(target_of(peer, concurrency=1, max_attempts=2), plan) as sender,
    ):
        while sender.delivery.may_go_on:
            assert isinstance(sender.attempt().error, Busy)
        receipt = sender.receipt()
    unsent = [row.detail for row in receipt.items if row.outcome is Kind.UNSENT]
    assert len(unsent) == 3
    assert all("A702" in detail for detail in unsent)


@pytest.mark.parametrize("end", [Abort(), Close(), Reset()], ids=str)
@pytest.mark.parametrize("name", ["0.dcm", "x.dcm"])
def test_a_class_at_which_the_peer_ends_the_request_costs_itself_alone(name: str, end: Script, tmp_path: Path) -> None:
    private = "1.2.826.0.1.3680043.8.498.4711"
    studies.ct(tmp_path, 5)
    studies.dicom(tmp_path / "M.dcm", "MR_small.dcm")
    studies.dicom(tmp_path / name, SOPClassUID=private)
    plan = scan([tmp_path])
    with scp(
        on_associate=lambda proposal: end if private in {one.abstract_syntax for one in proposal.contexts} else None
    ) as peer:
        sent = attempt(target_of(peer, concurrency=2), plan)
    assert {item.path for item in plan.items} - sent.arrived == {name}
    assert set(sent.rejected) == {name}


@pytest.mark.parametrize("end", [Abort(), Silence()], ids=str)
def test_what_this_run_brought_without_an_answer_is_delivered_and_not_already_there(
    end: Script, tmp_path: Path
) -> None:
    """The peer stores an instance, ends the association before it says so, and has it when it comes again."""
    studies.ct(tmp_path, 4)
    plan = scan([tmp_path])
    unanswered, before = uids(plan)[1], uids(plan)[2]
    met: Counter[str] = Counter()

    def script(store: Store) -> Script:
        met[store.SOPInstanceUID] += 1
        if store.SOPInstanceUID == before or met[store.SOPInstanceUID] > 1:
            return 0x0111
        return end if store.SOPInstanceUID == unanswered else 0

    with scp(on_store=script) as peer:
        receipt = attempt(target_of(peer, concurrency=1), plan).require()
    kinds = {row.sop_instance_uid: row.outcome for row in receipt.items}
    assert kinds.pop(before) is Kind.ALREADY
    assert set(kinds.values()) == {Kind.DELIVERED}
    assert receipt.bytes == plan.size - plan.items[2].size
