"""Processes that receive beside the listener: whoever is killed or stuck, what was answered 0000 is there and known."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from unittest import mock

import psutil
import pynetdicom
import pytest

from protocols.dimse import message, receivers
from protocols.dimse.commitment import PUSH_MODEL
from protocols.dimse.receivers import Receivers
from talaria.testing import studies
from talaria.testing.process import until
from tests.protocols.intake import PlainSender, listening, lying, refusal, store_until_cut_off, stray
from tests.protocols.test_dimse_intake import CHILD, CT, associated, stored
from transfer.spool import Spool


@pytest.fixture(scope="module")
def others() -> Iterator[Receivers]:
    made = Receivers(2)
    try:
        yield made
    finally:
        made.close()


def of(others: Receivers) -> list[int]:
    """The processes that receive."""
    return children(others._forker.pid) if others._forker is not None else []


def is_there(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def test_associations_that_are_open_at_once_are_spread(
    others: Receivers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with listening(tmp_path / "home", receivers=others, most=6, settle_s=3600) as there, ExitStack() as stack:
        senders = [stack.enter_context(closing(PlainSender(there.port, f"CT{n}"))) for n in range(6)]
        assert refusal(there.port) == (2, 3, 2)  # a limit of all processes
        sent = [studies.dataset() for _ in range(18)]
        assert {senders[at % 6].store(ds) for at, ds in enumerate(sent)} == {0}
        assert senders[5].ask(0x0030) == (0x8030, 0)  # C-ECHO
        assert senders[5].store(sent[5]) == 0  # a second copy
        senders[5].begin(studies.dataset(), "1.x")
        assert senders[5].end(bytes(8)) == 0x0117
        assert len(of(others)) == 2 and there.reception.associations == 6
        senders[5].close()
        until(lambda: there.reception.associations == 5)
        assert set(lying(there.folder)) == {str(ds.SOPInstanceUID) for ds in sent} and stray(there.folder) == []
        stack.close()
        until(lambda: there.scp.connections == 0)
        counts = there.reception.counts
        said = [one.getMessage() for one in caplog.records if one.name == "protocols.dimse.receiver"]
        assert said and all(one.startswith("association from 127.0.0.1 ended: CT") for one in said)
        assert (counts.instances, counts.duplicates, counts.failed, counts.associations) == (18, 1, 1, 6)
        assert counts.bytes == sum(path.stat().st_size for path in there.folder.rglob("*.dcm"))
        assert there.reception.settled() == []
        there.change(settle_s=0)
        assert {unit.calling for unit in there.reception.settled()} == {f"CT{n}" for n in range(6)}


def test_a_paused_source_takes_nothing_from_anybody(others: Receivers, tmp_path: Path) -> None:
    with listening(tmp_path / "home", receivers=others) as there, ExitStack() as stack:
        senders = [stack.enter_context(closing(PlainSender(there.port))) for _ in range(3)]
        assert {one.store(studies.dataset()) for one in senders} == {0}
        there.change(open=False)
        others.inform(there.reception)
        assert {one.store(studies.dataset()) for one in senders} == {0xA700}
        until(lambda: there.scp.connections == 0)
        assert len(lying(there.folder)) == 3 and there.reception.counts.failed == 3
        there.change(open=True)
        others.inform(there.reception)
        with closing(PlainSender(there.port)) as sender:
            assert sender.store(studies.dataset()) == 0


def test_who_is_stuck_goes_on_with_nothing_after_a_pause(tmp_path: Path) -> None:
    """A process that reads no longer what it is told is given up, and its associations are broken."""
    others = Receivers(1)
    try:
        with listening(tmp_path / "home", receivers=others) as there, ExitStack() as stack:
            senders = [stack.enter_context(closing(PlainSender(there.port))) for _ in range(2)]
            assert {one.store(studies.dataset()) for one in senders} == {0}
            [stuck] = of(others)
            os.kill(stuck, signal.SIGSTOP)
            try:
                until(lambda: psutil.Process(stuck).status() == psutil.STATUS_STOPPED)
                for room in range(1, 10_000):
                    there.change(keep_free=room)
                    others.inform(there.reception)
                    if not others._receivers:
                        break
                until(lambda: there.reception.associations == 1)
                assert senders[0].store(studies.dataset()) == 0
            finally:
                os.kill(stuck, signal.SIGCONT)
            until(lambda: not is_there(stuck))
    finally:
        others.close()


def test_what_is_being_received_elsewhere_is_not_complete(others: Receivers, tmp_path: Path) -> None:
    with listening(tmp_path / "home", receivers=others, settle_s=3600) as there, ExitStack() as stack:
        _, sender = (stack.enter_context(closing(PlainSender(there.port))) for _ in range(2))
        study = studies.uid(56)
        assert sender.store(studies.dataset(study=study)) == 0
        until(lambda: there.reception.receiving == 1)
        sender.begin(studies.dataset(study=study))  # a long instance of the same study
        sender.more(bytes(64))
        [(unit, path, _)] = Spool(there.folder).units()
        os.utime(path, (1, 1))
        heard = there.reception._heard[unit]
        until(lambda: there.reception._heard[unit] > heard and path.stat().st_mtime > 1)
        there.folder.rename(tmp_path / "away")
        there.folder.write_bytes(b"")  # so that nothing can be marked there any more
        stack.close()
        until(lambda: there.scp.connections == 0)


def test_commitment_is_asked_of_the_listener_itself(others: Receivers, tmp_path: Path) -> None:
    with listening(tmp_path / "home", receivers=others) as there, closing(PlainSender(there.port)):
        assoc = associated(there.port, classes=(CT, PUSH_MODEL))
        assert stored(assoc, studies.dataset()) == 0
        assert [visit.instances for visit in there.reception._visits if visit.caller.calling == "CT1"].count(1) == 1
        assert not any(receiver.lent for receiver in others._receivers.values())
        assoc.release()


def test_versions_have_one_order_over_all_processes(others: Receivers, tmp_path: Path) -> None:
    """Also where the first was delivered and removed, so that only whoever made the second knows of it."""
    ds = studies.dataset(InstanceNumber=1)
    with listening(tmp_path / "home", receivers=others) as there, ExitStack() as stack:
        senders = [stack.enter_context(closing(PlainSender(there.port))) for _ in range(3)]
        for number in (1, 2):
            ds.InstanceNumber = number
            assert senders[number].store(ds) == 0
        for number in range(3, 9):
            shutil.rmtree(min(Spool(there.folder).units(), key=lambda one: one[0].version)[1])
            ds.InstanceNumber = number
            assert senders[number % 3].store(ds) == 0
            assert sorted(unit.version for unit, _, _ in Spool(there.folder).units()) == [number - 1, number]
        until(lambda: there.reception.counts.versions == 7)


def test_who_receives_is_killed_and_the_others_go_on(others: Receivers, tmp_path: Path) -> None:
    confirmed, later = set[str](), set[str]()
    with listening(tmp_path / "home", receivers=others, settle_s=3600) as there, ThreadPoolExecutor(5) as pool:
        with closing(PlainSender(there.port, "HERE")) as here:
            ended = [pool.submit(store_until_cut_off, there.port, confirmed, f"CT{n}") for n in range(4)]
            until(lambda: len(confirmed) >= 20 and len(of(others)) == 2)
            first, second = of(others)
            os.kill(first, signal.SIGKILL)
            until(lambda: sum(one.done() for one in ended) == 2)
            before = len(confirmed)
            until(lambda: len(confirmed) > before)
            again = pool.submit(store_until_cut_off, there.port, later, "CT4")  # by one that was begun for it
            until(lambda: len(of(others)) == 2 and first not in of(others))
            assert second in of(others) and here.store(studies.dataset()) == 0
            until(lambda: later)
            assert there.reception.associations == 4 and not again.done()
            for pid in of(others):
                os.kill(pid, signal.SIGKILL)
        until(lambda: all(one.done() for one in (*ended, again)) and there.reception.associations == 0)
        assert confirmed | later <= set(lying(there.folder)) and stray(there.folder) == []
        there.change(settle_s=0)
        assert {one.calling for one in there.reception.settled()} == {"HERE", *(f"CT{n}" for n in range(5))}


def test_who_receives_is_killed_while_nothing_can_be_looked_for_on_disk(
    others: Receivers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its associations are over for the listener, too, which has their connections open."""
    with listening(tmp_path / "home", receivers=others) as there, ExitStack() as stack:
        first, second = (stack.enter_context(closing(PlainSender(there.port))) for _ in range(2))
        assert {one.store(studies.dataset()) for one in (first, second)} == {0}
        monkeypatch.setattr(there.reception, "look", mock.Mock(side_effect=OSError(errno.EIO, "an error of the disk")))
        for pid in of(others):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(OSError):
            second.store(studies.dataset())
        until(lambda: there.reception.associations == 1)
        assert first.store(studies.dataset()) == 0


def test_the_forker_is_killed(tmp_path: Path) -> None:
    """Those that it has forked go on; the next are forked by another."""
    others = Receivers(2)
    try:
        with listening(tmp_path / "home", receivers=others) as there, ExitStack() as stack:
            senders = [stack.enter_context(closing(PlainSender(there.port))) for _ in range(2)]
            assert {one.store(studies.dataset()) for one in senders} == {0}
            assert others._forker is not None and len(of(others)) == 1
            first = others._forker
            first.kill()
            first.wait()
            senders += [stack.enter_context(closing(PlainSender(there.port))) for _ in range(2)]
            assert {one.store(studies.dataset()) for one in senders} == {0}
            assert others._forker is not first and len(of(others)) == 1 and len(others._receivers) == 2
            assert len(lying(there.folder)) == 6
    finally:
        others.close()


def test_where_no_process_can_begin_the_listener_serves_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receivers, "FORKER", "raise SystemExit({})")
    others = Receivers(2)
    try:
        with listening(tmp_path / "home", receivers=others) as there, ExitStack() as stack:
            senders = [stack.enter_context(closing(PlainSender(there.port))) for _ in range(3)]
            assert {one.store(studies.dataset()) for one in senders for _ in range(2)} == {0}
            until(lambda: there.reception.counts.instances == 6)  # they are counted once they are answered
            assert not others._receivers
    finally:
        others.close()


def test_who_is_idle_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = Receivers(1)
    try:
        with listening(tmp_path / "home", receivers=others) as there:
            with closing(PlainSender(there.port)), closing(PlainSender(there.port)) as sender:
                assert sender.store(studies.dataset()) == 0
                monkeypatch.setattr(receivers, "IDLE_S", 0.0)
                others.tidy()
                assert len(of(others)) == 1  # it serves
            until(lambda: there.reception.associations == 0)
            others.tidy()
            until(lambda: of(others) == [])
    finally:
        others.close()
        assert others._forker is None


def test_all_of_them_end_with_the_listener(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", CHILD, str(tmp_path / "home")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()) as child, ExitStack() as stack:
        assert child.stdout
        port = int(child.stdout.readline())
        senders = [stack.enter_context(closing(PlainSender(port))) for _ in range(3)]
        assert {one.store(studies.dataset()) for one in senders} == {0}
        below = children(child.pid)
        assert len(below) == 3
        child.kill()
        until(lambda: not any(map(is_there, below)))


def children(pid: int) -> list[int]:
    """The processes below a process."""
    found = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [one for each in found for one in children(each)]


def test_a_process_that_receives_imports_little() -> None:
    code = (
        "import sys, protocols.dimse.receiver\nprint({'pydicom', 'pynetdicom', 'numpy', 'prefect'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
    ours = message.IMPLEMENTATION_UID, message.IMPLEMENTATION_VERSION
    assert ours == (pynetdicom.PYNETDICOM_IMPLEMENTATION_UID, pynetdicom.PYNETDICOM_IMPLEMENTATION_VERSION)
