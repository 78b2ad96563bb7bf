"""pydicom's own test files, which have every fault that files have, to real receivers; and two files with one UID.

What `dcmsend` gets in, one file at a time, is in by the first attempt; everything else has a reason; and what the
receipt says is what is there.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pydicom
import pytest

from imaging.header import EXPLICIT_LITTLE
from talaria.testing import process, studies
from talaria.testing.harness import Sent, attempt
from tests.bad_sector import bad_from
from tests.imaging.encoded import element, part10
from tests.servers.dcmtk import storescp
from tests.servers.orthanc import shared_orthanc
from tests.servers.scp import scp
from tests.targets.dicom import dicom_target
from transfer.outcome import Kind
from transfer.plan import Item, Plan, scan
from transfer.receipt import State

CT = b"1.2.840.10008.5.1.4.1.1.2\0"
UNCOMPRESSED = ("LittleEndianExplicit", "LittleEndianImplicit")
# Of the files that dcmsend gets in: those whose UID another file has had before, which a receiver keeps one of.
STORED = re.compile(r"with status (?:SUCCESS|WARNING) *: ([1-9])")


def data_folders() -> list[Path]:
    """pydicom's test files, and those of pydicom-data where it is installed."""
    folders = [Path(pydicom.__file__).parent / "data" / name for name in ("test_files", "charset_files", "palettes")]
    try:
        import data_store
    except ImportError:
        return folders
    return [*folders, Path(data_store.__file__).parent / "data"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """All files below one folder; links keep them where they are."""
    root = tmp_path_factory.mktemp("files")
    for number, folder in enumerate(data_folders()):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                studies.write(root / str(number) / path.relative_to(folder), path.read_bytes())
    return scan([root])


def uids(plan: Plan, paths: set[str]) -> set[str]:
    return {item.header.SOPInstanceUID for item in plan.items if item.header and item.path in paths}


@contextmanager
def receiver(kind: str, folder: Path) -> Iterator[tuple[int, str, object]]:
    """Run one; yields its port, its AE title, and what returns its files by UID."""
    if kind == "orthanc":
        server = shared_orthanc()
        yield server.dicom_port, server.aet, server.files
        return
    with storescp(folder, syntaxes=UNCOMPRESSED if kind == "uncompressed" else None) as scp:
        yield scp.port, scp.aet, scp.files


def with_dcmsend(plan: Plan, port: int) -> set[str]:
    """Send each file by itself; return the paths of those that were stored."""

    def stored(item: Item) -> bool:
        argv = [process.program("dcmsend"), "-v", "127.0.0.1", str(port), str(plan.file(item))]
        ran = subprocess.run(argv, capture_output=True, env={"TCP_NODELAY": "1", "PATH": "/usr/bin:/bin"}, check=False)
        return STORED.search((ran.stdout + ran.stderr).decode(errors="replace")) is not None

    with ThreadPoolExecutor(4) as pool:  # most of its time is waiting
        return {item.path for item, came in zip(plan.items, pool.map(stored, plan.items), strict=True) if came}


@pytest.mark.timeout(600)
# storescp takes all that Orthanc does; where it takes what is not compressed alone, there is more to do.
@pytest.mark.parametrize("kind", [pytest.param("storescp", marks=pytest.mark.slow), "uncompressed", "orthanc"])
def test_pydicoms_files(kind: str, plan: Plan, tmp_path: Path) -> None:
    with receiver(kind, tmp_path / "dcmsend") as (port, _, _files):
        theirs = with_dcmsend(plan, port)
    assert len(theirs) > 150
    with receiver(kind, tmp_path / "ours") as (port, aet, files):
        sent = attempt(dicom_target(port, aet_target=aet, idle_timeout_s=5), plan)
        assert sent.require().state is State.PARTIAL
        held = files()  # type: ignore[operator]
    assert_whole(sent, held)
    assert uids(plan, theirs) - set(held) == set(), "dcmsend gets in what we don't"
    for item in sent.plan.items:
        if item.path not in sent.arrived:
            assert sent.rejected[item.path]
    for name in ("image_dfl.dcm", "no_meta.dcm", "ExplVR_BigEndNoMeta.dcm", "ExplVR_LitEndNoMeta.dcm", "rtstruct.dcm"):
        [path] = [item.path for item in plan.items if item.path.endswith(f"/{name}")]
        if "accepted: none" not in sent.rejected.get(path, ""):  # some receivers know few SOP classes
            assert uids(plan, {path}) <= set(held), f"{name}: {sent.outcomes.get(path)}"


def assert_whole(sent: Sent, held: dict[str, bytes]) -> None:
    """Assert that what arrived is what is there, and that of one UID there is one content."""
    assert uids(sent.plan, sent.arrived) <= set(held)
    # storescp keeps explicit_VR-UN.dcm, and answers that it can't understand it.
    refused = {path for path, detail in sent.rejected.items() if detail.startswith("status C")}
    assert set(held) - uids(sent.plan, sent.arrived) <= uids(sent.plan, refused)
    by_uid = Counter(
        item.header.SOPInstanceUID
        for item in sent.plan.items
        if item.header and sent.outcomes[item.path].kind in (Kind.DELIVERED, Kind.WARNING)
    )
    assert max(by_uid.values()) == 1, "two files of one UID are reported as delivered"


@pytest.mark.parametrize(("odd", "offset"), [(False, 0), (False, 5_000_000), (True, 0)])
def test_a_file_that_can_not_be_read_to_its_end_is_rejected_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: bool, offset: int
) -> None:
    studies.ct(tmp_path, 4)
    bad = tmp_path / "CT0001.bad.dcm"
    if odd:  # it is not sent as it is
        uids = ((0x08, 0x16, CT), (0x08, 0x18, b"1.2.3.4\0"), (0x20, 0x0D, b"1.2.3\0"), (0x20, 0x0E, b"1.2.4\0"))
        data = b"".join(element(group, number, b"UI", uid) for group, number, uid in sorted(uids))
        bad.write_bytes(part10(EXPLICIT_LITTLE, data + element(0x20, 0x10, b"SH", b"odd")))
    else:
        studies.multiframe(bad, 20)  # 10 MB
    plan = scan([tmp_path])
    assert any(item.header and item.header.odd for item in plan.items) is odd
    bad_from(monkeypatch, bad, offset)
    with scp() as peer:
        sent = attempt(dicom_target(peer.port, aet_target=peer.aet), plan)
        assert sent.require().state is State.PARTIAL
        assert sent.rejected == {bad.name: "can't be read: Input/output error"}
        assert len(sent.arrived) == len(peer.kept) == 4


def test_two_files_of_one_uid(tmp_path: Path) -> None:
    uid = studies.uid()
    data = studies.encoded(studies.dataset(SOPInstanceUID=uid))
    studies.write(tmp_path / "a.dcm", data)
    studies.write(tmp_path / "copy.dcm", data)
    studies.dicom(tmp_path / "other.dcm", SOPInstanceUID=uid, PatientComments="another")
    studies.dicom(tmp_path / "z.dcm")
    plan = scan([tmp_path])
    with scp() as peer:
        sent = attempt(dicom_target(peer.port, aet_target=peer.aet), plan)
        kinds = {path: outcome.kind for path, outcome in sent.outcomes.items()}
        assert kinds == {
            "a.dcm": Kind.DELIVERED, "copy.dcm": Kind.ALREADY, "other.dcm": Kind.REJECTED, "z.dcm": Kind.DELIVERED,
        }  # fmt: skip
        assert "a.dcm" in sent.rejected["other.dcm"]
        again = attempt(dicom_target(peer.port, aet_target=peer.aet), plan, done={"a.dcm", "z.dcm"})
        assert {path: outcome.kind for path, outcome in again.outcomes.items()} == {
            "copy.dcm": Kind.ALREADY, "other.dcm": Kind.REJECTED,
        }  # fmt: skip
        assert len(peer.stores) == 2
