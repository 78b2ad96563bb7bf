"""Requests of STOW: batches, connections, and files that change."""

from __future__ import annotations

import errno
import io
import os
import threading
from pathlib import Path
from typing import Any

import pydicom
import pytest

from talaria.testing import studies
from talaria.testing.harness import Sent, attempt
from talaria.testing.process import as_loaded
from tests.servers.dicomweb import Request, Scripted, uid_of
from tests.targets.dicomweb import dicomweb_target
from tests.targets.stow.pushing import all_delivered, kinds, push, uids
from transfer.outcome import Kind
from transfer.plan import Item, Plan, scan
from transfer.receipt import State

# ---- what goes out


def test_request(server: Scripted, plan: Plan) -> None:
    sent = push(server, plan)
    all_delivered(sent, server)
    (request,) = server.of("POST")
    assert request.path == "/rs/studies"
    assert request.headers["content-type"].startswith('multipart/related; type="application/dicom"; boundary=')
    assert "transfer-encoding" not in request.headers
    assert request.parts == [plan.file(item).read_bytes() for item in plan.items]
    assert server.stored == {uid_of(part): part for part in request.parts}


def test_batches_by_items_and_bytes(server: Scripted, tmp_path: Path) -> None:
    studies.ct(tmp_path, 30)
    plan = scan([tmp_path])
    all_delivered(push(server, plan, batch_items=7), server)
    assert [len(request.parts) for request in server.of("POST")] == [7, 7, 7, 7, 2]
    server.requests.clear()
    size = plan.items[0].size
    all_delivered(push(server, plan, batch_bytes=4 * size), server)
    assert all(request.length <= 4 * size for request in server.of("POST"))
    assert {len(request.parts) for request in server.of("POST")} == {3}
    server.requests.clear()
    all_delivered(push(server, plan, batch_bytes=1), server)  # nothing fits: each goes alone
    assert [len(request.parts) for request in server.of("POST")] == [1] * 30


def test_several_requests_at_once(server: Scripted, tmp_path: Path) -> None:
    studies.ct(tmp_path, 24)
    together = threading.Barrier(4, timeout=60)

    def wait(request: Request) -> None:
        together.wait()

    server.script = [wait] * 4
    all_delivered(push(server, scan([tmp_path]), batch_items=6, concurrency=4), server)


def test_connections_are_used_again(server: Scripted, plan: Plan) -> None:
    all_delivered(push(server, plan, batch_items=1), server)
    assert server.connections == 1


def test_same_instance_twice_in_a_plan(server: Scripted, tmp_path: Path) -> None:
    data = studies.ct_bytes()
    for name in ("a.dcm", "b.dcm"):
        studies.write(tmp_path / name, data)
    sent = push(server, tmp_path)
    assert kinds(sent) == [Kind.DELIVERED, Kind.ALREADY]
    assert [len(request.parts) for request in server.of("POST")] == [1]


def test_other_content_under_the_same_uid_is_rejected(server: Scripted, tmp_path: Path) -> None:
    uid = studies.uid()
    for name in ("a", "b"):
        studies.dicom(tmp_path / f"{name}.dcm", SOPInstanceUID=uid, PatientComments=name)
    sent = push(server, tmp_path)
    assert kinds(sent) == [Kind.DELIVERED, Kind.REJECTED]
    assert "a.dcm" in sent.rejected["b.dcm"]
    assert server.stored[uid] == (tmp_path / "a.dcm").read_bytes()
    assert len(server.of("POST")) == 1


def test_data_set_without_meta_header(server: Scripted, tmp_path: Path) -> None:
    """What is sent is a file as PS3.10 has it, and the same data set."""
    whole = studies.encoded(studies.dataset())
    bare = whole[scan([studies.write(tmp_path / "w" / "w.dcm", whole)]).items[0].header.dataset_offset :]  # type: ignore[union-attr]
    studies.write(tmp_path / "in" / "bare.dcm", bare)
    assert push(server, tmp_path / "in").require().state is State.DELIVERED
    (stored,) = server.stored.values()
    assert stored[128:132] == b"DICM"
    assert stored.endswith(bare)
    assert pydicom.dcmread(io.BytesIO(stored)).file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"


# ---- files


def test_file_that_is_gone_or_changed(server: Scripted, plan: Plan) -> None:
    plan.file(plan.items[1]).unlink()
    plan.file(plan.items[3]).write_bytes(b"other")
    sent = push(server, plan)
    assert sent.require().state is State.PARTIAL
    assert set(sent.rejected) == {plan.items[1].path, plan.items[3].path}
    assert set(server.stored) == set(uids(plan)) - {uids(plan)[1], uids(plan)[3]}


def test_file_that_can_not_be_read_to_its_end(server: Scripted, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv
    bad = plan.file(plan.items[3]).stat().st_ino

    def broken(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        if os.fstat(fd).st_ino == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", broken)
    sent = push(server, plan)
    assert list(sent.rejected) == [plan.items[3].path]
    assert "can't be read" in sent.rejected[plan.items[3].path]
    assert len(sent.arrived) == 7


def test_changed_while_it_is_sent(server: Scripted, tmp_path: Path) -> None:
    """Its last bytes never go out, so no server can have it; the rest of its batch is sent again."""
    studies.ct(tmp_path / "s", 3)
    victim = studies.multiframe(tmp_path / "s" / "DX.dcm", 20)  # 10 MB
    plan = scan([tmp_path / "s"])
    changed = threading.Event()

    def moved(sent: Sent, count: int) -> None:
        if sent.moved > 1_000_000 and not changed.is_set():
            changed.set()
            with victim.open("r+b") as file:
                file.seek(5_000_000)
                file.write(b"x" * 1000)

    target = dicomweb_target(server.url, concurrency=1, bandwidth_limit=30_000_000)
    sent = attempt(target, plan, moved=moved)
    assert list(sent.rejected) == ["DX.dcm"]
    assert "chang" in sent.rejected["DX.dcm"]
    assert len(server.stored) == 3
    assert len(sent.arrived) == 3


def test_bandwidth_limit(server: Scripted, tmp_path: Path) -> None:
    studies.ct(tmp_path, 20, side=128)  # 0.8 MB
    plan = scan([tmp_path])
    sent = push(server, plan, bandwidth_limit=400_000, concurrency=3)
    all_delivered(sent, server)
    assert 1.5 < sent.seconds < as_loaded(4)


def test_told_from_several_threads_once_each(server: Scripted, tmp_path: Path) -> None:
    studies.ct(tmp_path, 60)
    plan = scan([tmp_path])
    told: list[str] = []

    def tell(sent: Sent, item: Item, outcome: Any) -> None:
        told.append(item.path)

    sent = attempt(dicomweb_target(server.url, batch_items=4, concurrency=8), plan, told=tell)
    all_delivered(sent, server)
    assert sorted(told) == [item.path for item in plan.items]
