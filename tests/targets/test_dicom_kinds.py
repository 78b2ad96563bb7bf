"""Every kind of DICOM instance to real servers: classes, transfer syntaxes, conversion; limits and cancelling."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels.utils import pixel_array
from pydicom.sequence import Sequence

from talaria.testing import studies
from talaria.testing.harness import Sent, attempt
from talaria.testing.process import as_loaded
from talaria.testing.relay import relay
from tests.clock import tick
from tests.servers.dcmtk import storescp
from tests.servers.orthanc import shared_orthanc
from tests.servers.scp import scp
from tests.servers.steps import Silence, Wait
from tests.targets.dicom import dicom_target
from transfer.errors import Busy, Cancelled, TimedOut
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import State

STOP_S = 5  # a cancelled push is over by then
IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
JPEG_2000, JPEG_LS, RLE = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.5"
LOSSY = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.91")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    folder.mkdir()
    return folder


# ---- classes


def pdf() -> Dataset:
    ds = studies.dataset("test-SR.dcm", SOPClassUID="1.2.840.10008.5.1.4.1.1.104.1", Modality="DOC")
    del ds.ContentSequence
    ds.MIMETypeOfEncapsulatedDocument = "application/pdf"
    ds.DocumentTitle = "Report"
    ds.EncapsulatedDocument = b"%PDF-1.4\n" + bytes(range(256)) * 64 + b"\n%%EOF "
    return ds


def structures() -> Dataset:
    ds = studies.dataset("rtplan.dcm", SOPClassUID="1.2.840.10008.5.1.4.1.1.481.3", Modality="RTSTRUCT")
    contour = Dataset()
    contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", 3
    contour.ContourData = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0] * 500
    roi = Dataset()
    roi.ReferencedROINumber, roi.ContourSequence = 1, Sequence([contour])
    ds.ROIContourSequence = Sequence([roi])
    return ds


def enhanced() -> Dataset:
    ds = studies.dataset("MR_small.dcm", SOPClassUID="1.2.840.10008.5.1.4.1.1.4.1", NumberOfFrames=6)
    ds.PixelData = ds.PixelData * 6
    groups = []
    for number in range(6):
        position, frame = Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, number]
        frame.PlanePositionSequence = Sequence([position])
        groups.append(frame)
    ds.PerFrameFunctionalGroupsSequence = Sequence(groups)
    return ds


KINDS: dict[str, Any] = {
    "ct": lambda: studies.dataset("CT_small.dcm"),
    "enhanced-mr": enhanced,
    "multi-frame-us": lambda: studies.dataset("examples_ybr_color.dcm"),
    "sr": lambda: studies.dataset("test-SR.dcm"),
    "pdf": pdf,
    "rtstruct": structures,
    "rtplan": lambda: studies.dataset("rtplan.dcm"),
    "rtdose": lambda: studies.dataset("rtdose.dcm"),
    "seg": lambda: studies.dataset("liver_1frame.dcm"),
    "waveform": lambda: studies.dataset("waveform_ecg.dcm"),
    "private": lambda: studies.dataset("CT_small.dcm", SOPClassUID="1.3.12.2.1107.5.9.1", Modality="OT"),
    "unknown": lambda: studies.dataset("MR_small.dcm", SOPClassUID="2.25.987654321", Modality="OT"),
    "deflated": lambda: studies.dataset("image_dfl.dcm"),
    "big-endian": lambda: studies.dataset("MR_small_bigendian.dcm"),
    "palette": lambda: studies.dataset("examples_palette.dcm"),
    "jpeg-2000": lambda: studies.dataset("MR_small_jp2klossless.dcm"),
    "jpeg-ls": lambda: studies.dataset("MR_small_jpeg_ls_lossless.dcm"),
    "jpeg-lossless": lambda: studies.dataset("SC_rgb_jpeg_gdcm.dcm"),
    "rle": lambda: studies.dataset("SC_rgb_rle_2frame.dcm"),
    "lossy": lambda: studies.dataset("SC_rgb_dcmtk_+eb+cr.dcm"),
}


def make(folder: Path, kinds: dict[str, Any] = KINDS) -> dict[str, bytes]:
    """Write an instance of each kind; return the files by their SOP instance UIDs."""
    study = studies.uid()
    made = {}
    for name, kind in kinds.items():
        ds = kind()
        ds.StudyInstanceUID = study
        data = studies.encoded(ds)
        studies.write(folder / f"{name}.dcm", data)
        made[str(ds.SOPInstanceUID)] = data
    return made


def read(data: bytes) -> Dataset:
    with studies.quiet():
        return pydicom.dcmread(io.BytesIO(data))


def assert_readable(sent: dict[str, bytes], got: dict[str, bytes]) -> None:
    """Assert that each instance can be read there, and holds what was sent."""
    assert set(got) == set(sent)
    with studies.quiet():
        for uid, data in sent.items():
            a, b = read(data), read(got[uid])
            assert a.SOPClassUID == b.SOPClassUID
            assert a.StudyInstanceUID == b.StudyInstanceUID
            assert a.PatientID == b.PatientID
            if "PixelData" in a:
                assert np.array_equal(pixel_array(a, raw=True), pixel_array(b, raw=True)), a.file_meta.TransferSyntaxUID
                assert np.array_equal(a.pixel_array, b.pixel_array), "another colour"
            if "WaveformSequence" in a:
                assert a.waveform_array(0).tobytes() == b.waveform_array(0).tobytes()
            for keyword in ("EncapsulatedDocument", "ROIContourSequence", "PerFrameFunctionalGroupsSequence"):
                assert a.get(keyword) == b.get(keyword)


def test_all_kinds_to_storescp(study: Path, tmp_path: Path) -> None:
    made = make(study)
    with storescp(tmp_path / "server") as server:
        sent = attempt(dicom_target(server.port, aet_target=server.aet), study)
        assert sent.require().state is State.DELIVERED, sent.rejected
        assert_readable(made, server.files())


def test_all_kinds_to_orthanc(study: Path) -> None:
    made = make(study)
    server = shared_orthanc()
    sent = attempt(dicom_target(server.dicom_port, aet_target=server.aet), study)
    assert sent.require().state is State.DELIVERED, sent.rejected
    assert_readable(made, server.files())


def test_all_kinds_to_a_peer_that_waits_for_the_end_of_each_association(study: Path, tmp_path: Path) -> None:
    """`storescp` without --fork: the second association stands only when the first has ended."""
    made = make(study)
    with storescp(tmp_path / "server", fork=False) as server:
        sent = attempt(dicom_target(server.port, aet_target=server.aet, concurrency=4, idle_timeout_s=3), study)
        assert sent.require().state is State.DELIVERED
        assert_readable(made, server.files())


# ---- transfer syntaxes that the peer refuses


@pytest.mark.parametrize(
    "accepted", [(IMPLICIT,), (EXPLICIT,), (IMPLICIT, EXPLICIT)], ids=["implicit", "explicit", "both"]
)
def test_lossless_to_a_peer_that_takes_only_uncompressed(accepted: tuple[str, ...], study: Path) -> None:
    made = make(study)
    with scp(accept=lambda context: next((s for s in context.offered if s in accepted), 4)) as peer:
        sent = attempt(dicom_target(peer.port, aet_target=peer.aet), study)
        assert sent.require().state is State.DELIVERED, sent.rejected
        assert_readable(made, peer.files())
        assert {store.syntax for store in peer.stores} <= set(accepted)
        if len(accepted) == 2:  # the explicit one keeps the value representations; what is implicit stays so
            syntaxes = {str(read(data).file_meta.TransferSyntaxUID): uid for uid, data in made.items()}
            assert peer.kept[syntaxes[IMPLICIT]].syntax == IMPLICIT
            assert peer.kept[syntaxes[JPEG_2000]].syntax == EXPLICIT


def test_lossless_to_storescp_with_implicit_only(study: Path, tmp_path: Path) -> None:
    kinds = {name: KINDS[name] for name in ("ct", "big-endian", "jpeg-2000", "jpeg-ls", "rle", "deflated", "rtdose")}
    made = make(study, kinds)
    with storescp(tmp_path / "server", syntaxes=["LittleEndianImplicit"]) as server:
        sent = attempt(dicom_target(server.port, aet_target=server.aet), study)
        assert sent.require().state is State.DELIVERED, sent.rejected
        assert_readable(made, server.files())


@pytest.mark.parametrize("syntax", [JPEG_2000, JPEG_LS, RLE])
def test_lossless_to_a_peer_that_takes_only_compressed(syntax: str, study: Path) -> None:
    """What can be compressed is; what was compressed with loss isn't compressed again; the rest says why not."""
    made = make(study, {name: KINDS[name] for name in ("ct", "big-endian", "jpeg-2000", "jpeg-ls", "lossy", "sr")})
    with scp(accept=lambda context: syntax if syntax in context.offered else 4) as peer:
        sent = attempt(dicom_target(peer.port, aet_target=peer.aet), study)
        assert set(sent.rejected) == {"lossy.dcm", "sr.dcm"}
        assert all(sent.rejected.values())
        assert_readable({uid: made[uid] for uid in peer.kept}, peer.files())
        again = attempt(dicom_target(peer.port, aet_target=peer.aet, transcode="any"), study, done=sent.arrived)
        assert set(again.rejected) == {"sr.dcm"}
        assert_readable({uid: made[uid] for uid in peer.kept}, peer.files())


def test_never_rejects_with_the_lists(study: Path) -> None:
    make(study)
    with scp(accept=lambda context: IMPLICIT if IMPLICIT in context.offered else 4) as peer:
        sent = attempt(dicom_target(peer.port, aet_target=peer.aet, transcode="never"), study)
        receipt = sent.require()
        assert receipt.state is State.PARTIAL
        kept = {item.path for item in sent.plan.items if item.header and item.header.TransferSyntaxUID == IMPLICIT}
        assert sent.arrived == kept
        for item in sent.plan.items:
            if item.path not in kept:
                detail = sent.rejected[item.path]
                assert pydicom.uid.UID(item.header.TransferSyntaxUID).name in detail  # type: ignore[union-attr]
                assert "accepted: Implicit VR Little Endian" in detail
        assert {store.syntax for store in peer.stores} == {IMPLICIT}


@pytest.mark.parametrize("policy", ["lossless", "any"])
def test_nothing_is_recompressed_with_loss(policy: str, study: Path) -> None:
    make(study, {name: KINDS[name] for name in ("ct", "jpeg-2000", "rle")})
    with scp(accept=lambda context: LOSSY[0] if LOSSY[0] in context.offered else 4) as peer:
        sent = attempt(dicom_target(peer.port, aet_target=peer.aet, transcode=policy), study)
        assert len(sent.rejected) == 3
        assert not peer.stores


def test_what_cannot_be_decoded_costs_only_itself(study: Path) -> None:
    studies.ct(study, 3)
    ds = studies.dataset("JPEG2000.dcm")
    ds.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(200)])
    ds["PixelData"].is_undefined_length = True
    studies.write(study / "broken.dcm", studies.encoded(ds))
    with scp(accept=lambda context: EXPLICIT if EXPLICIT in context.offered else 4) as peer:
        sent = attempt(dicom_target(peer.port, aet_target=peer.aet), study)
        assert set(sent.rejected) == {"broken.dcm"}
        assert "decoded" in sent.rejected["broken.dcm"]
        assert len(peer.kept) == 3


def test_a_file_that_changes_while_it_is_converted(study: Path) -> None:
    path = studies.multiframe(study / "large.dcm", 40)
    plan = scan([study])
    tick(study)
    changed = threading.Event()

    def moved(sent: Sent, count: int) -> None:
        if not changed.is_set():
            changed.set()
            os.utime(path)

    with scp(accept=lambda context: IMPLICIT if IMPLICIT in context.offered else 4) as peer:
        sent = attempt(dicom_target(peer.port, aet_target=peer.aet, bandwidth_limit=40 << 20), plan, moved=moved)
        if sent.arrived:  # it had been read whole before
            assert len(peer.kept) == 1
        else:
            assert set(sent.rejected) == {"large.dcm"}
            assert not peer.kept


# ---- limits


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 4])
def test_bandwidth_limit_over_ten_seconds(concurrency: int, study: Path) -> None:
    """Within ten per cent, however many associations share it, and no second of it far above."""
    limit = 1 << 20
    studies.ct(study, 10, side=512)  # 5.3 MB
    studies.multiframe(study / "large.dcm", 10)  # 5.2 MB
    size = scan([study]).size
    times: list[tuple[float, int]] = []
    with scp() as upstream, relay(upstream.port) as link:
        target = dicom_target(link.port, aet_target=upstream.aet, concurrency=concurrency, bandwidth_limit=limit)
        begun = time.monotonic()
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.5):
                times.append((time.monotonic() - begun, link.sent))

        watcher = threading.Thread(target=watch)
        watcher.start()
        sent = attempt(target, study)
        seconds = time.monotonic() - begun
        done.set()
        watcher.join()
        assert sent.require().state is State.DELIVERED
        wanted = link.sent / limit
    assert link.sent >= size
    assert 0.9 * wanted < seconds < as_loaded(1.1 * wanted + 0.5), (
        f"{link.sent / seconds:.0f} bytes/s instead of {limit}"
    )
    for (before, one), (after, other) in zip(times, times[2:], strict=False):
        assert (other - one) / (after - before) < 1.5 * limit, "a burst"


@pytest.mark.parametrize("bandwidth_limit", [8 << 20, 32 << 20])
def test_bandwidth_limit_of_a_short_dispatch(bandwidth_limit: int, study: Path) -> None:
    studies.ct(study, 40, side=512)  # 21 MB
    size = scan([study]).size
    with scp() as peer:
        sent = attempt(dicom_target(peer.port, aet_target=peer.aet, bandwidth_limit=bandwidth_limit), study)
    assert sent.require().state is State.DELIVERED
    assert sent.seconds > 0.85 * size / bandwidth_limit - 0.1


MEMORY = """
import resource, sys
from pathlib import Path
from talaria.testing.harness import attempt
from tests.targets.dicom import dicom_target
small, large, port = sys.argv[1:]
target = dicom_target(int(port))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
attempt(target, Path(small)).require()
before = peak()
attempt(target, Path(large)).require()
print(peak() - before)
"""


def test_memory_is_flat(tmp_path: Path) -> None:
    """After some small files, 210 MB in one file and 40 MB in many take no more."""
    studies.ct(tmp_path / "small", 10)
    studies.ct(tmp_path / "large", 80, side=512)
    studies.multiframe(tmp_path / "large" / "multi-frame.dcm", 400)
    with storescp(tmp_path / "server", "--ignore") as server:
        argv = [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "large"), str(server.port)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        run = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 60, f"{run.stdout.strip()} MB more"


@contextmanager
def cancelling(after_s: float) -> Iterator[tuple[threading.Event, list[float]]]:
    event, at = threading.Event(), [0.0]

    def cancel() -> None:
        at[0] = time.monotonic()
        event.set()

    timer = threading.Timer(after_s, cancel)
    timer.start()
    try:
        yield event, at
    finally:
        timer.cancel()


SILENT: dict[str, dict[str, Any]] = {
    "before the association": {"on_connect": lambda number: Silence()},
    "for the association's answer": {"on_associate": lambda proposal: Silence()},
    "for a response": {"on_store": lambda store: Silence() if store.number > 2 else 0},
    "for the peer to read on": {"on_data": lambda association, size: Wait(60) if size > 2_000_000 else None},
    "for the end": {"on_release": lambda number: Silence()},
}


@pytest.mark.parametrize("when", SILENT)
def test_cancelled_while_it_waits(when: str, study: Path) -> None:
    """With an idle timeout of a minute: what ends it is the cancelling, within five seconds, by an abort or a reset."""
    studies.ct(study, 6)
    studies.multiframe(study / "large.dcm", 60)
    with scp(**SILENT[when]) as peer, cancelling(0.7) as (cancelled, at):
        sent = attempt(dicom_target(peer.port, aet_target=peer.aet, idle_timeout_s=60), study, cancelled=cancelled)
        assert time.monotonic() - at[0] < as_loaded(STOP_S)
        if when == "for the end":
            assert sent.error is None or isinstance(sent.error, Cancelled)
        else:
            assert isinstance(sent.error, Cancelled), repr(sent.error)
        peer.stopped.set()
        assert peer.wait_closed()


def test_cancelled_between_instances_aborts(study: Path) -> None:
    studies.ct(study, 60)
    plan = scan([study])
    with scp(on_store=lambda store: [Wait(0.1), 0]) as peer, cancelling(0.7) as (cancelled, at):
        sent = attempt(dicom_target(peer.port, aet_target=peer.aet, concurrency=3), plan, cancelled=cancelled)
        assert isinstance(sent.error, Cancelled), repr(sent.error)
        assert time.monotonic() - at[0] < as_loaded(STOP_S)
        assert peer.wait_closed()
        assert {one.ended for one in peer.associations} <= {"aborted", "closed"}
        assert "aborted" in {one.ended for one in peer.associations}
        assert 0 < len(sent.arrived) < 60
        peer.on_store = None
        rest = attempt(dicom_target(peer.port, aet_target=peer.aet), plan, done=sent.arrived)
        assert rest.require().state is State.DELIVERED
        assert len(peer.kept) == 60
        confirmed = {item.header.SOPInstanceUID for item in plan.items if item.header and item.path in sent.arrived}
        assert not confirmed & set(peer.repeated)


def test_a_stopped_server_is_TimedOut(study: Path, tmp_path: Path) -> None:
    studies.ct(study, 3)
    with storescp(tmp_path / "server") as server:
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            sent = attempt(dicom_target(server.port, aet_target=server.aet, idle_timeout_s=1.5), study)
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
    assert isinstance(sent.error, TimedOut), repr(sent.error)
    assert sent.seconds < as_loaded(5)


def test_link_that_stalls_midway_is_TimedOut_then_resumes(study: Path, tmp_path: Path) -> None:
    studies.ct(study, 12, side=64)
    plan = scan([study])
    with storescp(tmp_path / "server") as server, relay(server.port, stall_after=plan.size // 2) as link:
        target = dicom_target(link.port, aet_target=server.aet, idle_timeout_s=1.5, concurrency=2)
        sent = attempt(target, plan)
        assert isinstance(sent.error, TimedOut), repr(sent.error)
        assert 0 < len(sent.arrived) < 12
        assert not sent.rejected
        rest = attempt(dicom_target(server.port, aet_target=server.aet), plan, done=sent.arrived)
        assert rest.require().state is State.DELIVERED
        assert len(server.files()) == 12


# ---- what Orthanc says


def test_orthanc_refuses_one_for_now_each_time(study: Path) -> None:
    studies.ct(study, 12)
    plan = scan([study])
    server = shared_orthanc()
    header = plan.items[5].header
    assert header
    server.fail(header.SOPInstanceUID)
    sent = attempt(dicom_target(server.dicom_port, aet_target=server.aet), plan)
    assert sent.require().state is State.PARTIAL
    assert set(sent.rejected) == {plan.items[5].path}
    assert "A700" in sent.rejected[plan.items[5].path]
    assert len(server.uids()) == 11


def test_orthanc_out_of_resources_is_Busy_and_resumes(study: Path) -> None:
    studies.ct(study, 12)
    plan = scan([study])
    server = shared_orthanc()
    server.fail(*(item.header.SOPInstanceUID for item in plan.items if item.header))
    sent = attempt(dicom_target(server.dicom_port, aet_target=server.aet), plan)
    assert isinstance(sent.error, Busy), repr(sent.error)
    assert "A700" in str(sent.error)
    server.drop()
    rest = attempt(dicom_target(server.dicom_port, aet_target=server.aet), plan, done=sent.arrived)
    assert rest.require().state is State.DELIVERED
    assert len(server.uids()) == 12


def test_sent_again_to_orthanc_is_no_failure(study: Path) -> None:
    studies.ct(study, 5)
    server = shared_orthanc()
    target = dicom_target(server.dicom_port, aet_target=server.aet)
    for _ in range(2):
        sent = attempt(target, study)
        assert sent.require().state is State.DELIVERED
        assert {outcome.kind for outcome in sent.outcomes.values()} <= {Kind.DELIVERED, Kind.ALREADY, Kind.WARNING}
    assert len(server.uids()) == 5
