"""Files that XNAT leaves out or loses."""

from __future__ import annotations

from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.harness import attempt
from tests.servers.xnat import Xnat
from tests.targets.xnat import xnat_target
from tests.targets.xnat_push.pushing import _sop, all_of
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import Level


def test_filtered_without_a_word(server: Xnat, study: Path) -> None:
    studies.ct(study, 4)
    plan = scan([study])
    header = plan.items[2].header
    assert header
    server.rules.filtered = {header.SOPInstanceUID}
    sent = attempt(xnat_target(server.url), plan)
    assert set(sent.rejected) == {"CT0003.dcm"}
    assert f"3 of 4 files of series {header.SeriesInstanceUID}" in sent.rejected["CT0003.dcm"]
    assert len(sent.arrived) == 3
    server.rules.filtered = {header.SeriesInstanceUID}
    studies.ct(study / "more", 1)
    plan = scan([study])
    server.store.experiments.clear()
    sent = attempt(xnat_target(server.url), plan)
    assert set(sent.arrived) == {"more/CT0001.dcm"}
    assert "gave no reason" in sent.rejected["CT0001.dcm"]


@pytest.mark.parametrize("said", [True, False])
def test_unreadable_for_xnat(server: Xnat, study: Path, said: bool) -> None:
    studies.ct(study, 5)
    plan = scan([study])
    unreadable = {item.header.SOPInstanceUID for item in plan.items[1:3] if item.header}
    server.rules.unreadable, server.rules.commit_ignores = unreadable, not said
    sent = attempt(xnat_target(server.url), plan)
    assert set(sent.rejected) == {"CT0002.dcm", "CT0003.dcm"}
    assert len(server.instances()) == 3
    if said:
        assert sent.rejected["CT0002.dcm"].startswith("unable to read DICOM object")
    only = attempt(xnat_target(server.url), plan.narrowed(plan.items[1:2]))
    assert set(only.rejected) == {"CT0002.dcm"}


def test_listed_names_what_differs(server: Xnat, study: Path) -> None:
    studies.ct(study / "a", 3)
    studies.ct(study / "b", 2)
    plan = scan([study])
    victim = plan.items[1].header
    assert victim
    server.rules.forget = {victim.SOPInstanceUID}
    sent = attempt(xnat_target(server.url, verify="listed"), plan)
    assert set(sent.rejected) == {"a/CT0002.dcm"}
    assert f"XNAT has 2 of 3 files of series {victim.SeriesInstanceUID}" in sent.rejected["a/CT0002.dcm"]
    assert sent.require().verified is Level.LISTED


def test_listed_takes_back_what_is_gone(server: Xnat, study: Path) -> None:
    studies.ct(study, 3)
    target = xnat_target(server.url, verify="listed")
    first = attempt(target, study)
    [session] = server.store.experiments.values()
    scan_of = next(iter(session.scans.values()))
    scan_of.files.pop(_sop(first, "CT0002.dcm") + ".dcm")
    again = attempt(target, first.plan, done=first.arrived)
    assert set(again.rejected) == {"CT0002.dcm"}
    server.store.experiments.clear()
    gone = attempt(target, first.plan, done=first.arrived)
    assert len(gone.rejected) == 3


def test_proven_says_why_not(server: Xnat, study: Path) -> None:
    studies.ct(study, 1)
    receipt = attempt(xnat_target(server.url, verify="proven"), study).require()
    assert receipt.verified is Level.LISTED
    assert "checksum" in receipt.notes[0]


def test_names_of_xnats_own(server: Xnat, study: Path) -> None:
    """Some servers rename files: then counts are compared."""
    server.rules.renames = True
    studies.ct(study, 3)
    target = xnat_target(server.url, verify="listed")
    sent = attempt(target, study)
    assert all_of(sent, Kind.DELIVERED)
    assert all_of(attempt(target, study), Kind.ALREADY)
    server.rules.filtered = {_sop(sent, "CT0001.dcm")}
    server.store.experiments.clear()
    assert set(attempt(target, study).rejected) == {"CT0001.dcm", "CT0002.dcm", "CT0003.dcm"}


def test_anonymised_uids(server: Xnat, study: Path) -> None:
    """A project's script replaces UIDs; the names of files still tell whose they are."""
    server.rules.new_uids = True
    studies.ct(study, 3)
    target = xnat_target(server.url, verify="listed")
    assert all_of(attempt(target, study), Kind.DELIVERED)
    assert all_of(attempt(target, study), Kind.ALREADY)
    assert len(server.store.experiments) == 1
