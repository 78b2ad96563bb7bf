"""Checksums of S3 objects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt
from tasks.s3.support import forget
from tests.servers.s3_stub import Misdeed, Refusal, Request, Stub, stub
from tests.targets.s3 import PREFIX, files_of
from tests.targets.s3_push.pushing import PART, assert_whole, large, marked, on, target
from transfer.errors import (
    Misconfigured,
)
from transfer.outcome import Kind
from transfer.receipt import Level, State


@pytest.mark.parametrize(
    ("settings", "algorithm", "form"),
    [
        ({}, "crc64nvme", "FULL_OBJECT"),
        ({"knows": ("crc32", "sha256")}, "crc32", "FULL_OBJECT"),
        ({"knows": ("crc32", "sha256"), "unknown": "refuse"}, "crc32", "FULL_OBJECT"),
        ({"knows": ("crc32",), "full_parts": False}, "crc32", "COMPOSITE"),
        ({"knows": ()}, "md5", None),
        ({"knows": (), "unknown": "refuse"}, "md5", None),
        ({"checks": "echo"}, "md5", None),
        ({"checks": "ignore", "md5": False}, None, None),
    ],
)
@pytest.mark.parametrize("level", list(Level))
def test_checksum_is_what_the_store_supports(
    study: Path, settings: dict[str, Any], algorithm: str | None, form: str | None, level: Level
) -> None:
    studies.ct(study, 2)
    large(study / "large.bin", PART + 1000)
    with stub(buckets={"lab": {}}, **settings) as store:
        sent = attempt(target(store, verify=level), study)
        assert_whole(store, sent)
        assert sent.require().verified is level
        one = store.buckets["lab"][f"{PREFIX}/{sent.plan.dispatch_id}/large.bin"]
        puts = [request for request in store.seen if request.operation == "Put" and "CT0001" in request.key]
        assert (one.sum_type if algorithm in one.sums else None) == form
        if algorithm and algorithm != "md5":
            assert f"x-amz-checksum-{algorithm}" in puts[0].headers
        # A store that computes its checksums itself is believed; else everything is read back.
        read_back = store.count("Get", f"{PREFIX}/{sent.plan.dispatch_id}/CT0001.dcm")
        assert read_back == (1 if level is Level.PROVEN and algorithm is None else 0)


@pytest.mark.parametrize("checksum", ["crc64nvme", "crc32", "sha256", "off"])
@pytest.mark.parametrize("level", [Level.ACCEPTED, Level.PROVEN])
def test_checksum_of_ones_own_choice(store: Stub, study: Path, checksum: str, level: Level) -> None:
    studies.ct(study, 2)
    large(study / "large.bin", PART + 1000)
    sent = attempt(target(store, checksum=checksum, verify=level), study)
    assert_whole(store, sent)
    assert sent.require().verified is level
    for name in ("CT0001.dcm", "large.bin"):
        kept = store.buckets["lab"][f"{PREFIX}/{sent.plan.dispatch_id}/{name}"].sums
        assert set(kept) == ({checksum} if checksum != "off" else set())
    assert store.count("Get") > 0 or level is not Level.PROVEN


def test_checksum_that_the_store_does_not_know_is_Misconfigured(study: Path) -> None:
    studies.ct(study, 2)
    with stub(buckets={"lab": {}}, knows=("crc32",), unknown="refuse") as store:
        sent = attempt(target(store, checksum="crc64nvme"), study)
        assert isinstance(sent.error, Misconfigured)
        assert "see checksum" in str(sent.error)


def test_store_that_refuses_trailing_checksums_is_no_problem(study: Path) -> None:
    studies.ct(study, 2)
    large(study / "large.bin")
    with stub(buckets={"lab": {}}, trailers="refuse") as store:
        assert_whole(store, attempt(target(store), study))


def spoil_all(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1]) if data else data


def test_store_that_spoils_everything_is_found_out_before_anything_is_sent(store: Stub, study: Path) -> None:
    studies.ct(study, 2)
    store.fault = lambda request: Misdeed(change=spoil_all)
    sent = attempt(target(store), study)
    assert isinstance(sent.error, Misconfigured)
    assert "does not keep" in str(sent.error)
    assert not sent.outcomes
    assert not store.objects("lab"), "the probe is still there"


@pytest.mark.parametrize("checksum", ["auto", "crc32"])
def test_store_that_tells_another_checksum_is_not_believed(store: Stub, study: Path, checksum: str) -> None:
    studies.ct(study, 3)
    wrong = {"x-amz-checksum-crc64nvme": "AAAAAAAAAAA=", "x-amz-checksum-crc32": "AAAAAA=="}
    store.fault = on("Put", Misdeed(answer=wrong), key="CT0002.dcm")
    sent = attempt(target(store, checksum=checksum), study)
    assert set(sent.rejected) == {"CT0002.dcm"}
    assert "other bytes" in sent.rejected["CT0002.dcm"]
    assert set(files_of(store.objects("lab"), sent.plan)) == {"CT0001.dcm", "CT0003.dcm"}
    assert not marked(store)


def test_store_that_got_other_bytes_gets_them_once_more(store: Stub, study: Path) -> None:
    studies.ct(study, 2)
    large(study / "large.bin")
    refusal = Refusal(400, "BadDigest", "The checksum did not match.")
    one, other = on("Put", refusal, times=1, key="CT0001.dcm"), on("UploadPart", refusal, times=1, part=2)
    store.fault = lambda request: one(request) or other(request)
    assert_whole(store, attempt(target(store), study))
    store.buckets["lab"].clear()
    store.fault = on("Put", refusal, key="CT0001.dcm")
    sent = attempt(target(store), study)
    assert set(sent.rejected) == {"CT0001.dcm"}
    store.buckets["lab"].clear()
    store.fault = on("UploadPart", refusal, part=2)
    sent = attempt(target(store), study)
    assert set(sent.rejected) == {"large.bin"}
    assert not store.uploads


def spoiling(change: Callable[[bytes], bytes]) -> Callable[[Request], Misdeed | None]:
    """Spoil what is larger than a probe, and say nothing of it."""
    return lambda request: Misdeed(change=lambda data: change(data) if len(data) > 5000 else data)


@pytest.mark.parametrize("level", list(Level))
@pytest.mark.parametrize("checks", ["verify", "ignore"])
def test_store_that_spoils_behind_its_own_back(study: Path, level: Level, checks: str) -> None:
    """It compares what came and keeps something else: only what it tells or gives back later can show that."""
    studies.ct(study, 2)
    with stub(buckets={"lab": {}}, checks=checks, knows=() if checks == "ignore" else ("crc64nvme",)) as store:
        store.fault = spoiling(lambda data: data[:-7])
        sent = attempt(target(store, verify=level), study)
        if checks == "verify" and level is Level.ACCEPTED:
            return  # it says that it has the bytes
        assert set(sent.rejected) == {"CT0001.dcm", "CT0002.dcm"}
        assert not files_of(store.objects("lab"), sent.plan), "what was spoilt is still there"
        assert not marked(store)


def test_what_the_store_has_lost_is_revoked(store: Stub, study: Path) -> None:
    studies.ct(study, 3)
    original = store._head

    def head(request: Request, body: bytes) -> Any:
        if request.key.endswith("CT0002.dcm"):
            store.buckets["lab"].pop(request.key, None)
        return original(request, body)

    store._head = head  # type: ignore[method-assign]
    sent = attempt(target(store, verify="listed"), study)
    assert sent.rejected == {"CT0002.dcm": "the store does not have it"}
    assert not marked(store)


@pytest.mark.parametrize("level", ["listed", "proven"])
def test_what_the_store_has_lost_later_takes_the_marker_away(store: Stub, study: Path, level: str) -> None:
    studies.ct(study, 3)
    first = attempt(target(store, verify=level), study)
    assert marked(store)
    (lost,) = (key for key in store.buckets["lab"] if key.endswith("CT0002.dcm"))
    del store.buckets["lab"][lost]
    found = attempt(target(store, verify=level), study, done=first.arrived).require()
    assert found.counts[Kind.REJECTED] == 1
    assert not marked(store)
    again = attempt(target(store, verify=level), study, done=first.arrived - {"CT0002.dcm"}).require()
    assert again.state is State.DELIVERED
    assert marked(store)


def test_probes_are_made_once_in_a_process(store: Stub, study: Path) -> None:
    studies.ct(study, 1)
    attempt(target(store), study).require()
    store.seen.clear()
    attempt(target(store, layout="other"), study).require()
    assert not [request for request in store.seen if ".talaria-probe" in request.key]
    forget()
    attempt(target(store, layout="third"), study).require()
    assert [request for request in store.seen if ".talaria-probe" in request.key]
