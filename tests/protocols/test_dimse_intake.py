"""The listener for modalities: what it answers 0000 is on disk, whole and as sent, whoever sends it and however."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pydicom
import pytest
from pydicom._uid_dict import UID_dictionary
from pydicom.dataset import Dataset
from pydicom.uid import UID

from imaging.header import read_header
from protocols.dimse import acceptance, keeping, senders
from protocols.dimse.commitment import PUSH_MODEL
from protocols.dimse.keeping import LOOK_BYTES
from protocols.dimse.scp import CALLING_UNKNOWN, CONGESTED, MOST_NEW_OF_ONE, StorageScp, _choose
from protocols.dimse.senders import KnownSender
from protocols.dimse.served import Caller
from protocols.files import durable, filesystem
from protocols.net.tls import Tls
from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import program, until
from talaria.testing.relay import relay
from tests.protocols.intake import AET, Listening, PlainSender, listening, lying, refusal, store_until_cut_off, stray
from tests.servers.scu import AE
from tests.targets.dicom import dicom_target
from tests.targets.dicom_tls import KEY_PASSWORD, certificates, tls_target
from transfer.errors import Busy, DispatchError
from transfer.receipt import State
from transfer.spool import ReceivedUnit, Spool

CT = "1.2.840.10008.5.1.4.1.1.2"
VERIFICATION = "1.2.840.10008.1.1"


def sent(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of DCMTK's clients."""
    return subprocess.run([program(str(argv[0])), *map(str, argv[1:])], capture_output=True, text=True, timeout=120)


def data_set(path: Path) -> bytes:
    """The bytes of a file after its file meta information."""
    with path.open("rb") as file:
        return path.read_bytes()[read_header(file.fileno(), path.stat().st_size).dataset_offset :]


def instance_of(path: Path) -> str:
    return str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID)


def associated(port: int, *, calling: str = "CT1", called: str = AET, classes: tuple[str, ...] = (CT,)) -> Any:
    ae = AE(calling)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 60
    for each in classes:
        ae.add_requested_context(UID(each))
    return ae.associate("127.0.0.1", port, ae_title=called)


def stored(assoc: Any, ds: Dataset) -> int:
    with studies.quiet():
        return int(assoc.send_c_store(ds).Status)


# ---- as sent, by real senders


def test_what_modalities_send_lies_as_they_sent_it(tmp_path: Path) -> None:
    files = studies.ct(tmp_path / "study", 12)
    with listening(tmp_path / "home") as there:
        assert sent("echoscu", "-aet", "CT1", "-aec", AET, "127.0.0.1", str(there.port)).returncode == 0
        done = sent("storescu", "-aet", "CT1", "-aec", AET, "127.0.0.1", str(there.port), "+sd", tmp_path / "study")
        assert done.returncode == 0, done.stderr
        [(unit, folder, _)] = Spool(there.folder).units()
        study = str(pydicom.dcmread(files[0]).StudyInstanceUID)
        assert unit == ReceivedUnit("CT1", AET, "127.0.0.1", study)
        assert unit.origin.sender_aet == "CT1" and unit.origin.sender_host == "127.0.0.1"
        assert {path.name for path in folder.iterdir()} == {f"{instance_of(path)}.dcm" for path in files}
        assert lying(there.folder) == {instance_of(path): [data_set(path)] for path in files}
        # The same again, from another sender: it is another unit, of another origin.
        assert sent("dcmsend", "-aet", "CT2", "-aec", AET, "127.0.0.1", str(there.port), *files).returncode == 0
        assert {unit.calling for unit, _, _ in Spool(there.folder).units()} == {"CT1", "CT2"}
        counts = there.reception.counts
        until(lambda: there.reception.associations == 0)
        assert (counts.instances, counts.duplicates, counts.associations) == (24, 0, 3)
        assert counts.bytes == sum(path.stat().st_size for path in there.folder.rglob("*.dcm"))


def test_every_transfer_syntax_and_class_is_kept_as_sent(tmp_path: Path) -> None:
    files = studies.every_syntax(tmp_path / "study")
    private = studies.dataset("CT_small.dcm")
    private.SOPClassUID = private.file_meta.MediaStorageSOPClassUID = UID("1.2.3.4.5.6.7")
    files.append(studies.write(tmp_path / "study" / "private.dcm", studies.encoded(private)))
    with listening(tmp_path / "home") as there:
        receipt = attempt(dicom_target(there.port, aet_target=AET, transcode="never"), tmp_path / "study").require()
        assert receipt.state is State.DELIVERED, receipt
        assert lying(there.folder) == {instance_of(path): [data_set(path)] for path in files}
        syntaxes = {str(pydicom.dcmread(path).file_meta.TransferSyntaxUID) for path in files}
        kept = {str(pydicom.dcmread(path).file_meta.TransferSyntaxUID) for path in there.folder.rglob("*.dcm")}
        assert kept == syntaxes and len(kept) > 5


def test_series_apart(tmp_path: Path) -> None:
    study = studies.uid(56)
    for name in ("study", "other"):
        studies.ct(tmp_path / name, 2, study=study)
    with listening(tmp_path / "home", by_series=True) as there:
        for name in ("study", "other"):
            assert attempt(dicom_target(there.port, aet_target=AET), tmp_path / name).require().state is State.DELIVERED
        assert len(list(Spool(there.folder).units())) == 2


# ---- the same again, and the same with another content


def test_nothing_that_came_twice_is_lost_and_the_last_is_the_highest_version(tmp_path: Path) -> None:
    """Also where an earlier content comes again, or the first version has been delivered and removed meanwhile."""
    ds = studies.dataset(InstanceNumber=1)
    with listening(tmp_path / "home") as there:
        assoc = associated(there.port)
        for number in (1, 1, 2, 1, 2, 3):
            ds.InstanceNumber = number
            assert stored(assoc, ds) == 0
        assoc.release()
        assert len(lying(there.folder)[str(ds.SOPInstanceUID)]) == 5
        units = {unit.version: folder for unit, folder, _ in Spool(there.folder).units()}
        numbers = {one: pydicom.dcmread(next(units[one].iterdir())).InstanceNumber for one in sorted(units)}
        assert numbers == {1: 1, 2: 2, 3: 1, 4: 2, 5: 3}
        counts = there.reception.counts
        assert (counts.instances, counts.duplicates, counts.versions) == (5, 1, 4)
        shutil.rmtree(units[1])
        for _ in range(2):  # the second time by a listener that was started again
            assoc, ds.InstanceNumber = associated(there.port), ds.InstanceNumber + 1
            assert stored(assoc, ds) == 0
            assoc.release()
            there.reception._versions.clear()
            there.reception.prepare()
        assert sorted(unit.version for unit, _, _ in Spool(there.folder).units()) == [2, 3, 4, 5, 6, 7]


def test_a_folder_that_was_delivered_and_removed_is_made_again(tmp_path: Path) -> None:
    ds = studies.dataset()
    with listening(tmp_path / "home") as there:
        assoc = associated(there.port)
        assert stored(assoc, ds) == 0
        [(_, folder, _)] = Spool(there.folder).units()
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        assert stored(assoc, ds) == 0
        assoc.release()
        assert set(lying(there.folder)) == {str(ds.SOPInstanceUID)}


def test_a_folder_that_somebody_has_removed_is_made_again(tmp_path: Path) -> None:
    """The source refused everybody until the listener was restarted, as if its disk were full."""
    ds = studies.dataset()
    with listening(tmp_path / "home") as there:
        for folder in (there.folder, there.folder.parent):
            shutil.rmtree(folder)
            assoc = associated(there.port)
            assert stored(assoc, ds) == 0
            assoc.release()
            assert set(lying(there.folder)) == {str(ds.SOPInstanceUID)}
        shutil.rmtree(there.folder.parent)
        there.reception._device += 1  # another file system lies in the place of the one that was there
        assert refusal(there.port) == (2, 3, 1) and not there.folder.exists()


def test_a_remover_and_many_senders_lose_nothing(tmp_path: Path) -> None:
    """Somebody removes each unit as soon as it is empty, while 8 associations add to it: all that was answered 0000."""
    taken: set[str] = set()
    done = threading.Event()
    study = studies.uid(56)
    with listening(tmp_path / "home") as there:

        def remove() -> None:
            while not done.is_set():
                for _, folder, _ in Spool(there.folder).units():
                    for path in folder.iterdir():
                        taken.add(path.stem)
                        path.unlink()
                    try:
                        folder.rmdir()
                    except OSError:
                        continue

        def send(number: int) -> set[str]:
            folder = tmp_path / f"s{number}"
            studies.ct(folder, 20, study=study)
            receipt = attempt(dicom_target(there.port, aet_target=AET), folder).require()
            assert receipt.state is State.DELIVERED, receipt
            return {instance_of(path) for path in folder.iterdir()}

        thread = threading.Thread(target=remove)
        thread.start()
        try:
            with ThreadPoolExecutor(8) as pool:
                every = set[str]().union(*pool.map(send, range(8)))
        finally:
            done.set()
            thread.join()
        assert len(every) == 160 and taken | set(lying(there.folder)) == every
        assert there.reception.counts.failed == 0


# ---- who may send


@pytest.mark.parametrize(
    ("rule", "taken"),
    [
        (KnownSender("CT*"), True),
        (KnownSender("ct*"), False),
        (KnownSender("", "127.0.0.0/8"), True),
        (KnownSender("CT1", "127.0.0.1"), True),
        (KnownSender("CT1", "10.0.0.0/8"), False),
        (KnownSender("CT1", "localhost"), True),
        (KnownSender("CT1", "no-such-host.invalid"), None),
        (KnownSender("MR1", "no-such-host.invalid"), False),
        (KnownSender("CT1", "::1"), False),
    ],
)
def test_who_may_send(rule: KnownSender, taken: bool | None) -> None:
    assert rule.matches(Caller(AET, "CT1", "127.0.0.1")) is taken


def test_others_are_refused_for_good(tmp_path: Path) -> None:
    with listening(tmp_path / "home", senders=(KnownSender("MR*"), KnownSender("CT*", "127.0.0.1"))) as there:
        for calling, called, source, reason in (("XA1", AET, 1, 3), ("CT1", "NOBODY", 1, 7)):
            assert refusal(there.port, calling, called) == (1, source, reason)
        assoc = associated(there.port)
        assert assoc.is_established
        assoc.release()
        assert there.reception.counts.refused == {"sender": 1} and there.desk.unknown == 1


def test_a_name_that_nobody_knows_now_is_no_refusal_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, asked = {"ct.example": "127.0.0.1"}, Counter[str]()

    def found(host: str, *args: Any, **more: Any) -> Any:
        asked[host] += 1
        if host not in there:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (there[host], 0))]

    monkeypatch.setattr(senders, "_looked", {})
    rule, caller = KnownSender("CT*", "ct.example"), Caller(AET, "CT1", "127.0.0.1")
    with listening(tmp_path / "home", senders=(rule,)) as here:
        monkeypatch.setattr(socket, "getaddrinfo", found)
        assert rule.matches(caller) and rule.matches(caller) and asked == {"ct.example": 1}
        del there["ct.example"]
        monkeypatch.setattr(senders, "AGAIN_S", 0.0)
        senders._looked["ct.example"] = replace(senders._looked["ct.example"], until=0.0)
        assert rule.matches(caller) and asked == {"ct.example": 2}  # it was there some minutes ago
        senders._looked["ct.example"] = replace(senders._looked["ct.example"], good_until=0.0)
        assert here.desk.admit(caller) == CONGESTED and here.reception.counts.refused == {"name": 1}
        there["ct.example"] = "10.1.2.3"
        assert here.desk.admit(caller) == CALLING_UNKNOWN


def test_what_nobody_serves_is_answered(tmp_path: Path) -> None:
    with listening(tmp_path / "home") as there, closing(PlainSender(there.port)) as sender:
        assert sender.ask(0x0020) == (0x8020, 0x0211)  # C-FIND
        assert sender.store(studies.dataset()) == 0


def test_letters_that_no_title_may_have(tmp_path: Path) -> None:
    with listening(tmp_path / "home") as there:
        for title in (b"\xc4" * 16, b"\xd6" * 16):
            with closing(PlainSender(there.port, title)) as sender:
                assert sender.store(studies.dataset(study=f"1.{'2' * 62}")) == 0
        assert {unit.calling for unit, _, _ in Spool(there.folder).units()} == {"Ä" * 16, "Ö" * 16}
        with closing(PlainSender(there.port, b"CT\n1")):
            assert "CT?1" in {visit.caller.calling for visit in there.reception._visits}


def test_an_instance_without_a_uid_keeps_no_unit_from_being_complete(tmp_path: Path) -> None:
    ds = studies.dataset()
    with listening(tmp_path / "home", settle_s=0) as there, closing(PlainSender(there.port)) as sender:
        assert sender.store(ds) == 0
        sender.begin(ds, "1.x")
        assert sender.end(bytes(8)) == 0x0117
        assert len(there.reception.settled()) == 1 and there.reception.counts.failed == 1


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("uid", ["1." + "3" * 298, "/" * 64])
def test_a_uid_that_no_folder_can_be_named_by_holds_up_nothing(tmp_path: Path, uid: str) -> None:
    with listening(tmp_path / "home") as there, closing(PlainSender(there.port)) as sender:
        odd = [studies.dataset(study=uid) for _ in range(2)] + [studies.dataset(study=uid + "4")]
        usual = studies.dataset()
        assert [sender.store(ds) for ds in (odd[0], usual, *odd[1:])] == [0, 0, 0, 0]
        units = {folder: unit for unit, folder, _ in Spool(there.folder).units()}
        lie = sorted(sorted(file.stem for file in folder.iterdir()) for folder in units)
        wanted = [odd[:2], odd[2:], [usual]]
        assert lie == sorted(sorted(str(ds.SOPInstanceUID) for ds in ones) for ones in wanted)
        assert all(ReceivedUnit.parse(folder.name) == unit for folder, unit in units.items())


def test_all_addresses_are_those_of_both_kinds(tmp_path: Path) -> None:
    with listening(tmp_path / "home") as there:
        scp = StorageScp("", 0, "", there.desk)
        try:
            for address in ("127.0.0.1", "::1"):
                with closing(PlainSender(scp.port, host=address)) as sender:
                    assert sender.store(studies.dataset()) == 0
        finally:
            scp.close()
        assert {unit.host for unit, _, _ in Spool(there.folder).units()} == {"127.0.0.1", "::1"}


def test_other_services_are_refused_by_context(tmp_path: Path) -> None:
    find = "1.2.840.10008.5.1.4.1.2.2.1"
    with listening(tmp_path / "home") as there:
        assoc = associated(there.port, classes=(CT, find, VERIFICATION))
        assert {str(one.abstract_syntax) for one in assoc.accepted_contexts} == {CT, VERIFICATION}
        assert int(assoc.send_c_echo().Status) == 0
        assoc.release()


def test_every_storage_class_of_the_standard_is_accepted() -> None:
    """All that belong to a study, by pydicom's dictionary: a scanner keeps a whole study back for one of them."""
    asked = {
        uid: name
        for uid, (name, kind, *_) in UID_dictionary.items()
        if kind == "SOP Class" and "Storage" in name and "Storage Commitment" not in name
    }
    refused = {name for uid, name in asked.items() if _choose(frozenset(), uid, (CT,)) != CT}
    assert refused == {"Hanging Protocol Storage", "Color Palette Storage"} and len(asked) > 150  # of no study
    for odd in ("", "1.2.\ufffd", "1.2 3", "jpeg", "1." * 99):  # it would be the file's
        assert _choose(frozenset(), CT, (odd,)) == acceptance.NO_SYNTAX and _choose(frozenset(), CT, (odd, CT)) == CT
    for other in (PUSH_MODEL, "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.34.6.1", "1.2.840.10008.5.1.1.9"):
        assert _choose(frozenset(), other, (CT,)) == acceptance.NO_CLASS


# ---- limits


def test_too_many_associations_are_asked_to_come_again(tmp_path: Path) -> None:
    with listening(tmp_path / "home", most=2) as there:
        held = [associated(there.port) for _ in range(2)]
        assert refusal(there.port) == (2, 3, 2)
        held[0].release()
        until(lambda: there.reception.associations == 1)
        assoc = associated(there.port)
        assert assoc.is_established
        for one in (assoc, held[1]):
            one.release()


def test_a_paused_source_takes_nothing_more_and_asks_to_come_again(tmp_path: Path) -> None:
    with listening(tmp_path / "home") as there:
        assoc = associated(there.port)
        there.change(open=False)
        assert stored(assoc, studies.dataset()) == 0xA700
        until(lambda: there.reception.associations == 0)
        assert refusal(there.port) == (2, 3, 1) and lying(there.folder) == {}
        there.change(open=True)
        again = associated(there.port)
        assert again.is_established
        again.release()


def test_fifty_at_once(tmp_path: Path) -> None:
    with listening(tmp_path / "home", most=50) as there:
        ready = threading.Barrier(50, timeout=120)

        def send(number: int) -> str:
            assoc = associated(there.port, calling=f"CT{number}")
            assert assoc.is_established
            ready.wait()  # all are open now
            ds = studies.dataset()
            assert stored(assoc, ds) == 0
            assoc.release()
            return str(ds.SOPInstanceUID)

        with ThreadPoolExecutor(50) as pool:
            uids = set(pool.map(send, range(50)))
        assert set(lying(there.folder)) == uids and len(uids) == 50
        assert there.reception.counts.refused == {}


def test_half_an_instance_leaves_nothing(tmp_path: Path) -> None:
    """The connection breaks in the middle of a data set."""
    studies.multiframe(tmp_path / "study" / "1.dcm", 8)
    with listening(tmp_path / "home") as there, relay(there.port, cut_after=1_000_000) as link:
        done = sent("storescu", "-aec", AET, "127.0.0.1", str(link.port), tmp_path / "study" / "1.dcm")
        assert done.returncode != 0
        until(lambda: there.reception.associations == 0)
        assert lying(there.folder) == {} and stray(there.folder) == []


@pytest.mark.mounts
def test_a_full_disk(tmp_path: Path, disk: Callable[[str], Path]) -> None:
    """The instance that finds no room is answered A700, nothing of it is left, and nobody else gets an association."""
    home = disk("size=3m")
    files = [studies.multiframe(tmp_path / "study" / f"{number}.dcm", 2) for number in range(5)]
    with listening(home, most=8) as there:
        with pytest.raises(Busy):
            attempt(dicom_target(there.port, aet_target=AET, concurrency=1), tmp_path / "study").require()
        kept = lying(there.folder)
        assert 0 < len(kept) < 5 and stray(there.folder) == []
        assert all(kept[uid] == [data_set(path)] for path in files if (uid := instance_of(path)) in kept)
        there.change(keep_free=1 << 20)  # now there is less than that
        assert refusal(there.port) == (2, 3, 1)
        for path in there.folder.rglob("*.dcm"):
            path.unlink()
        receipt = attempt(dicom_target(there.port, aet_target=AET), tmp_path / "study" / "1.dcm").require()
        assert receipt.state is State.DELIVERED and len(lying(there.folder)) == 1


def test_a_disk_that_fails_while_a_data_set_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it can't begin to write is dropped to its end, and answered A700."""

    def failing(fd: int, begin: int, count: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with listening(tmp_path / "home") as there:
        there.reception.way = durable.OneCommit
        with closing(PlainSender(there.port)) as sender:
            assert sender.store(studies.dataset()) == 0  # a small one
            monkeypatch.setattr(filesystem, "begin_write_back", failing)
            ds = studies.dataset()
            ds.Rows = ds.Columns = 1024
            ds.PixelData = bytes(1 << 21)
            assert sender.store(ds) == 0xA700
            until(lambda: there.reception.associations == 0)
        assert len(lying(there.folder)) == 1 and stray(there.folder) == []


def test_the_disk_begins_later_for_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one association with pieces of what comes; over several others keep it busy, and a piece is one more call."""
    begun: list[int] = []
    monkeypatch.setattr(filesystem, "begin_write_back", lambda fd, begin, count: begun.append(count))
    large = studies.dataset(Rows=1024, Columns=1024, PixelData=bytes(1 << 21))
    with listening(tmp_path / "home") as there:
        there.reception.way = durable.OneCommit
        with closing(PlainSender(there.port)) as sender:
            assert sender.store(large) == 0
            assert begun and sum(begun) > 1 << 20
            with closing(PlainSender(there.port)):
                until(lambda: there.reception.associations == 2)
                begun.clear()
                assert sender.store(large) == 0
                assert begun == []


def test_no_room_while_an_association_is_open(tmp_path: Path) -> None:
    with listening(tmp_path / "home") as there:
        assoc = associated(there.port)
        assert stored(assoc, studies.dataset()) == 0
        there.change(keep_free=1 << 60)
        assert stored(assoc, studies.dataset()) == 0xA700
        until(lambda: not assoc.is_established)  # sources go on through A700
        assert len(lying(there.folder)) == 1 and there.reception.full


def test_room_is_looked_for_while_a_data_set_comes(tmp_path: Path) -> None:
    """Nobody knows how long a data set is: what has no end is dropped while the disk has still room for others."""
    with listening(tmp_path / "home") as there, closing(PlainSender(there.port)) as sender:
        sender.begin(studies.dataset())
        sender.more(bytes(LOOK_BYTES))
        [visit] = there.reception._visits
        until(lambda: visit.receiving)
        assert visit._depot.failure is None
        there.change(keep_free=1 << 60)
        sender.more(bytes(2 * LOOK_BYTES))
        until(lambda: visit._depot.failure is not None)
        assert sender.end(bytes(8)) == 0xA700
        until(lambda: there.reception.associations == 0)
        assert lying(there.folder) == {} and stray(there.folder) == []


def test_room_is_looked_for_after_a_while_and_after_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others write to the disk as well; but a look for each small instance takes a tenth of its time."""
    with listening(tmp_path / "home") as there:
        looks: list[bool] = []
        real = there.reception.has_room
        monkeypatch.setattr(there.reception, "has_room", lambda: bool(looks.append(True)) or real())  # type: ignore[func-returns-value]
        monkeypatch.setattr(keeping, "LOOK_S", 3600.0)
        assoc = associated(there.port)
        assert [stored(assoc, studies.dataset()) for _ in range(3)] == [0, 0, 0]
        assert len(looks) == 2  # before the association, and before its first instance
        monkeypatch.setattr(keeping, "LOOK_BYTES", 1)
        assert stored(assoc, studies.dataset()) == 0
        monkeypatch.setattr(keeping, "LOOK_BYTES", LOOK_BYTES)
        count = len(looks)
        assert count > 2
        monkeypatch.setattr(keeping, "LOOK_S", 0.0)
        there.change(keep_free=1)
        assert [stored(assoc, studies.dataset()) for _ in range(3)] == [0, 0, 0]
        assert len(looks) == count + 3
        assoc.release()


def test_the_next_file_is_made_while_its_sender_prepares_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file for each open association, which nobody sees, and which is gone with the association."""
    with listening(tmp_path / "home") as there:
        assoc = associated(there.port)
        assert nameless(there.folder) == 0
        for _ in range(2):
            assert stored(assoc, studies.dataset()) == 0
            until(lambda: nameless(there.folder) == 1)
        assert stray(there.folder) == []
        assoc.release()
        until(lambda: there.reception.associations == 0)
        assert nameless(there.folder) == 0 and len(lying(there.folder)) == 2
        monkeypatch.setattr(os, "O_TMPFILE", 0)  # so that open(2) of the folder fails as on a file system without it
        assoc = associated(there.port)
        assert [stored(assoc, studies.dataset()) for _ in range(2)] == [0, 0]
        until(lambda: stray(there.folder) == [])  # a visible one is not kept for later
        assoc.release()
        assert len(lying(there.folder)) == 4


def nameless(folder: Path) -> int:
    """How many files without a name, of those in a folder, this process has open."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            target = os.readlink(link)
            found += target.startswith(f"{folder}/") and target.endswith(" (deleted)")
    return found


# ---- threads


def test_a_listener_without_threads_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of threads costs the connections that come meanwhile, and no others."""
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == "store":
            raise RuntimeError("can't start new thread")
        start(thread)

    with listening(tmp_path / "home") as there:
        with monkeypatch.context() as limited:
            limited.setattr(threading.Thread, "start", refused)
            for _ in range(MOST_NEW_OF_ONE + 1):  # they must not count as open either
                with socket.create_connection(("127.0.0.1", there.port), 30) as sock, suppress(ConnectionResetError):
                    assert sock.recv(1) == b""
            until(lambda: there.scp.connections == 0)
        assert_works(there)


# ---- TLS


class Acknowledging(ssl.SSLSocket):
    """Notes which side acknowledges at once: a peer with Nagle's algorithm holds the rest back until then, 40 ms."""

    sides: ClassVar[list[bool]] = []

    def setsockopt(self, level: int, option: int, value: int) -> None:  # type: ignore[override]
        if option == socket.TCP_QUICKACK:
            self.sides.append(bool(self.server_side))
        super().setsockopt(level, option, value)


def test_pieces_under_tls_are_acknowledged_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = certificates()
    context = Tls(ca=str(made.ca), cert=str(made.server.cert), key=str(made.server.key)).server()
    monkeypatch.setattr(ssl.SSLContext, "sslsocket_class", Acknowledging)
    monkeypatch.setattr(Acknowledging, "sides", [])
    studies.ct(tmp_path / "study", 3)
    with listening(tmp_path / "home", scp={"tls": context, "tls_only": True}) as there:
        assert attempt(tls_target(there.port, aet_target=AET), tmp_path / "study").require().state is State.DELIVERED
    assert Acknowledging.sides.count(True) >= 3, "of what comes"
    assert Acknowledging.sides.count(False) >= 3, "of answers"


def test_tls_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = certificates()
    context = Tls(ca=str(made.ca), cert=str(made.server.cert), key=str(made.server.key)).server()
    studies.ct(tmp_path / "study", 3)
    with listening(tmp_path / "home", scp={"tls": context, "tls_only": True}) as there:
        sender = tls_target(there.port, aet_target=AET)
        assert attempt(sender, tmp_path / "study").require().state is State.DELIVERED
        client = made.client
        done = sent(
            "storescu", "-aec", AET, "+tls", client.key, client.cert, "+cf", made.ca, "+pw", KEY_PASSWORD,
            "127.0.0.1", str(there.port), "+sd", tmp_path / "study",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(lying(there.folder)) == 3
        assert sent("echoscu", "-aec", AET, "127.0.0.1", str(there.port)).returncode != 0
        with pytest.raises(DispatchError):
            attempt(tls_target(there.port, aet_target=AET, tls_cert="", tls_key=""), tmp_path / "study").require()
        expired = made.authority.leaf("expired", expired=True, password=KEY_PASSWORD)
        storing = ["storescu", "-aec", AET, "+tls", expired.key, expired.cert, "+cf", made.ca, "+pw", KEY_PASSWORD]
        assert sent(*storing, "127.0.0.1", str(there.port), "+sd", tmp_path / "study").returncode != 0
        for why in ("peer did not return a certificate", "certificate has expired"):
            words = f"no association for 127.0.0.1: its TLS handshake failed: {why}"
            until(lambda words=words: words in [one.getMessage() for one in caplog.records])
        assert there.scp.unsecured == 3  # one in clear, and two that failed


# ---- complete


def test_a_unit_is_complete_when_nothing_has_come_for_a_while(tmp_path: Path) -> None:
    with listening(tmp_path / "home", settle_s=3600) as there:
        assoc = associated(there.port)
        assert stored(assoc, studies.dataset()) == 0
        assert there.reception.settled() == []
        there.change(settle_s=0)
        [unit] = there.reception.settled()
        assert unit.calling == "CT1" and there.reception.settled() == []
        ds = studies.dataset()
        assert stored(assoc, ds) == 0
        assoc.release()
        assert [one.uid for one in there.reception.settled()] == [str(ds.StudyInstanceUID)]


def test_what_is_being_received_is_not_complete(tmp_path: Path) -> None:
    with listening(tmp_path / "home", settle_s=3600) as there:
        assoc = associated(there.port)
        assert stored(assoc, studies.dataset()) == 0
        [visit] = there.reception._visits
        visit.receiving = True  # a long instance of the same study
        os.utime(next(path for _, path, _ in Spool(there.folder).units()), (1, 1))
        there.reception._heard = dict.fromkeys(there.reception._heard, 0.0)
        assert there.reception.settled() == []
        [(_, _, changed)] = Spool(there.folder).units()
        assert changed > 1
        assoc.release()


def test_what_was_received_before_is_taken_up(tmp_path: Path) -> None:
    ds = studies.dataset()
    with listening(tmp_path / "home") as there:
        assoc = associated(there.port)
        assert stored(assoc, ds) == 0
        assoc.release()
    with listening(tmp_path / "home", settle_s=0) as there:
        assert [unit.uid for unit in there.reception.settled()] == [str(ds.StudyInstanceUID)]


# ---- killed

CHILD = """
import sys, threading
from pathlib import Path
from protocols.dimse.receivers import Receivers
from tests.protocols.intake import listening
with listening(Path(sys.argv[1]), most=64, receivers=Receivers()) as there:
    print(there.port, flush=True)
    threading.Event().wait()
"""


def test_killed_at_any_moment_what_was_answered_is_there(tmp_path: Path) -> None:
    """Four senders, and a kill in the middle of what they send, twice."""
    confirmed: set[str] = set()
    for run in range(2):
        before = len(confirmed)
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, tmp_path / "home"], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
        ) as child:
            assert child.stdout
            port = int(child.stdout.readline())
            with ThreadPoolExecutor(4) as pool:
                for number in range(4):
                    pool.submit(store_until_cut_off, port, confirmed, f"CT{number}")
                until(lambda: len(confirmed) >= before + 20 + 17 * run)  # noqa: B023
                child.send_signal(signal.SIGKILL)
        there = lying(tmp_path / "home" / "received" / "ct")
        assert confirmed <= set(there), confirmed - set(there)
        assert stray(tmp_path / "home" / "received" / "ct") == []
    assert len(confirmed) >= 57


# ---- bytes that no modality sends


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"\1\0\0\0\0\4abcd", b"\1\0\xff\xff\xff\xff", b"\4\0\0\0\0\0"]
)
def test_nonsense_ends_its_connection_only(data: bytes, tmp_path: Path) -> None:
    with listening(tmp_path / "home") as there:
        with socket.create_connection(("127.0.0.1", there.port), 30) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                while sock.recv(4096):
                    pass
        assert_works(there)


def assert_works(there: Listening) -> None:
    assoc = associated(there.port)
    assert stored(assoc, studies.dataset()) == 0
    assoc.release()
