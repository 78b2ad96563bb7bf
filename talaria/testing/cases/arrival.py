"""What arrives: files of all kinds and names, and how it is verified."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from talaria.testing import studies
from talaria.testing.cases.compare import LEVELS, send
from talaria.testing.harness import Harness, attempt
from transfer.outcome import Kind
from transfer.receipt import Level


def test_push_then_read_back_equal(harness: Harness, study: Path) -> None:
    files = studies.sample(study)
    sent = send(harness, study)
    receipt = sent.require()
    assert receipt.bytes == sum(item.size for item in sent.plan.items)
    assert receipt.counts[Kind.DELIVERED] + receipt.counts[Kind.WARNING] == len(sent.plan.items)
    # Files that are no DICOM go along, or are left out with the reason: never silently.
    others = {"results/overlay.png", "results/result.json"}
    if harness.driver.facts.dicom_only:
        assert {item.path: outcome.kind for item, outcome in sent.refused.items()} == dict.fromkeys(
            others, Kind.SKIPPED
        )
    else:
        assert len(harness.read_back(sent.plan)) == len(files)


def test_push_empty_file(harness: Harness, study: Path) -> None:
    studies.ct(study, 2)
    studies.write(study / "empty.txt", b"")
    studies.write(study / "empty.dcm", b"")
    sent = send(harness, study)
    if harness.driver.facts.dicom_only:
        assert {item.path: outcome.kind for item, outcome in sent.refused.items()} == {
            "empty.txt": Kind.SKIPPED,
            "empty.dcm": Kind.REJECTED,
        }
    else:
        assert harness.read_back(sent.plan)["empty.txt"] == b""


def test_push_nested_dirs(harness: Harness, study: Path) -> None:
    folder = study
    for depth in range(8):
        studies.ct(folder, 1, first=depth)
        folder = folder / f"level {depth}"
    send(harness, study)


def test_push_same_name_in_two_dirs(harness: Harness, study: Path) -> None:
    for folder in ("a", "b", "a/a", "."):
        studies.ct(study / folder, 1)
    sent = send(harness, study)
    assert len(harness.read_back(sent.plan)) == 4


def test_push_unicode_and_spaces(harness: Harness, study: Path) -> None:
    studies.odd_names(study / "Prüfung  №1", studies.UNICODE_NAMES)
    send(harness, study)


def test_push_shell_metacharacters(harness: Harness, study: Path, tmp_path: Path) -> None:
    studies.odd_names(study, studies.SHELL_NAMES)
    studies.odd_names(study / "$(touch owned); `touch owned` 'a' \"b\"", studies.SHELL_NAMES[:4])
    send(harness, study)
    seen = {path.name for path in tmp_path.rglob("owned")} | {name for name in os.listdir() if name == "owned"}
    assert not seen, "a name was run by a shell"
    assert not any(name.rsplit("/", 1)[-1] == "owned" for name in harness.names())


def test_push_raw_names(harness: Harness, study: Path) -> None:
    """Names that are not UTF-8 arrive, under the same bytes or a printable form, or are rejected for that reason."""
    studies.odd_names(study, studies.RAW_NAMES)
    studies.ct(study, 1)
    sent = attempt(harness.target, study)
    sent.require()
    assert set(sent.outcomes) == {item.path for item in sent.plan.items}
    assert "CT0001.dcm" in sent.arrived
    got = harness.read_back(sent.plan)
    assert len(got) == len(sent.arrived)
    for item in sent.plan.items:
        data = sent.plan.file(item).read_bytes()
        if item.path in sent.rejected:
            assert sent.rejected[item.path]
        elif harness.driver.facts.keeps_names:
            assert data in (got.get(item.path), got.get(item.shown))


def test_push_excluded_files_absent(harness: Harness, study: Path) -> None:
    studies.sample(study)
    studies.ct(study / "private", 2)
    studies.ct(study / "CT", 1, first=77)
    harness.target.exclude = "*.png, *.json,, private ,CT0077.*"
    sent = send(harness, study)
    excluded = {item.path for item, outcome in sent.refused.items() if "excluded" in outcome.detail}
    assert excluded == {
        "results/overlay.png", "results/result.json", "private/CT0001.dcm", "private/CT0002.dcm", "CT/CT0077.dcm",
    }  # fmt: skip
    assert not any("CT0077" in name or "private" in name or name.endswith(".png") for name in harness.names())


@pytest.mark.parametrize("level", LEVELS)
def test_push_verify_levels(harness: Harness, study: Path, level: Level) -> None:
    """A level that driver and server can reach is reached; otherwise the receipt says which one was, and why."""
    studies.sample(study)
    harness.target.verify = level
    receipt = send(harness, study).require()
    assert set(harness.reaches or ()) <= set(harness.driver.facts.verifies_by)
    reached = harness.driver.facts.verifies_by if harness.reaches is None else harness.reaches
    best = max((one for one in reached if LEVELS.index(one) <= LEVELS.index(level)), key=LEVELS.index)
    if level in reached:
        assert receipt.verified is level
    else:
        assert receipt.verified is best
        assert receipt.notes, "a lower level than the one asked for needs its reason"
