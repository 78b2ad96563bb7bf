"""All of pydicom's own test files, by STOW to Orthanc and into a folder: receipts say what is there."""

from __future__ import annotations

from pathlib import Path

import pydicom
import pytest

from blocks.dicomweb import DicomWebTarget
from talaria.testing import studies
from talaria.testing.harness import Sent, attempt
from tests.servers.orthanc import shared_orthanc
from tests.targets import dicomweb_file
from tests.targets.dicomweb import dicomweb_target
from transfer.errors import Busy
from transfer.outcome import Kind
from transfer.plan import Plan, scan

ATTEMPTS = 3


@pytest.fixture(scope="module")
def plan() -> Plan:
    with studies.quiet():
        return scan([Path(pydicom.__file__).parent / "data" / "test_files"])


def delivered(target: DicomWebTarget, plan: Plan) -> tuple[set[str], dict[str, str], Sent]:
    """Push until nothing is left to try; returns paths of what arrived, and why the others didn't."""
    done: set[str] = set()
    rejected: dict[str, str] = {}
    for _ in range(ATTEMPTS):
        sent = attempt(target, plan, done=done)
        done |= sent.arrived
        rejected |= sent.rejected
        if not sent.error:
            break
        assert isinstance(sent.error, Busy), sent.error
    return done, rejected, sent


def uids(plan: Plan, paths: set[str]) -> set[str]:
    return {item.header.SOPInstanceUID for item in plan.items if item.header and item.path in paths}


def test_stow_to_orthanc(plan: Plan) -> None:
    server = shared_orthanc()
    target = dicomweb_target(
        server.dicomweb_url, http_user=server.user, http_password=server.password, idle_timeout_s=30, verify="listed"
    )
    done, rejected, sent = delivered(target, plan)
    assert uids(sent.plan, done) == server.uids()
    assert len(server.uids()) > 70
    open_ = {item.path for item in sent.plan.items} - done - rejected.keys()
    assert all(rejected.values())
    assert len(open_) <= 5
    if open_:  # Orthanc has no room, it says, for what has no patient's ID: named, each time
        assert sent.error is not None
        assert any(path in sent.error.message for path in open_)
    files = server.files()
    for item in sent.plan.items:
        outcome = sent.outcomes.get(item.path)
        if outcome and outcome.kind is Kind.DELIVERED and item.header and item.header.part10:
            assert files[item.header.SOPInstanceUID] == sent.plan.file(item).read_bytes(), item.path


def test_folder(plan: Plan, tmp_path: Path) -> None:
    done, rejected, sent = delivered(dicomweb_file.target(tmp_path), plan)
    assert sent.error is None
    assert done | rejected.keys() == {item.path for item in sent.plan.items}
    found = {item.header.SOPInstanceUID: item for item in scan([tmp_path]).items if item.header}
    assert uids(sent.plan, done) == found.keys()
    for item in sent.plan.items:
        if sent.outcomes[item.path].kind is Kind.DELIVERED and item.header:
            copy = tmp_path / found[item.header.SOPInstanceUID].path
            assert copy.read_bytes() == sent.plan.file(item).read_bytes(), item.path
