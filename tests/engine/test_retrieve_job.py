"""A retrieval's state on the disk: what becomes of a study costs no more the more studies there are."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tasks.retrieve import job as states
from tasks.retrieve.job import Job, Stage, Study, folder_of
from transfer.errors import LedgerFull
from transfer.home import Home


@pytest.fixture
def begun() -> Job:
    job = Job(folder_of(Home.current(), "run"), pending=["A9"])
    job.studies = {uid: Study(uid, accession=f"A{uid}") for uid in "1234"}
    job.save()
    return job


def loaded() -> Job:
    return Job.load(Home.current(), "run", ("A1",))


def steps(job: Job) -> list[Path]:
    return sorted(job.folder.glob("steps.*"))


def test_what_becomes_of_a_study_is_added(begun: Job) -> None:
    before = (begun.folder / "job.json").read_bytes()
    begun.studies["2"].stage, begun.studies["2"].targets = Stage.DELIVERED, {"pacs": "delivered"}
    begun.note()
    begun.studies["3"].reason, begun.next_study = "why", 7.0
    begun.studies["4"].reason = ""  # as before
    begun.note()
    assert (begun.folder / "job.json").read_bytes() == before
    [file] = steps(begun)
    first, second = file.read_text().splitlines()
    assert "A2" in first and "A3" not in first and "A3" in second and "A4" not in first + second
    assert loaded() == begun and loaded().pending == ["A9"]
    begun.studies["5"] = Study("5")
    del begun.studies["1"]
    begun.save()
    assert loaded() == begun and [*loaded().studies] == [*"2345"]


def test_a_step_that_was_cut_short_does_no_harm_to_those_behind_it(begun: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    begun.studies["1"].reason = "first"
    begun.note()

    def full(fd: int) -> None:
        os.ftruncate(fd, os.fstat(fd).st_size - 9)
        raise OSError(errno.ENOSPC, "full")

    begun.studies["2"].reason = "second"
    with monkeypatch.context() as patch, pytest.raises(LedgerFull):
        patch.setattr(os, "fdatasync", full)
        begun.note()
    assert [one.reason for one in loaded().studies.values()] == ["first", "", "", ""]
    begun.studies["3"].reason = "third"
    begun.note()
    assert [one.reason for one in loaded().studies.values()] == ["first", "second", "third", ""]
    # As after a kill in the middle of a step.
    begun.studies["4"].reason = "fourth"
    begun.note()
    last = steps(begun)[-1]
    os.truncate(last, last.stat().st_size - 9)
    again = loaded()
    assert [one.reason for one in again.studies.values()] == ["first", "second", "third", ""]
    again.studies["4"].reason = "again"
    again.note()
    assert loaded() == again


def test_many_steps_become_part_of_the_state(begun: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "STEPS_BYTES", 2000)
    for number in range(50):
        begun.studies["1"].instances = number
        begun.note()
        assert loaded() == begun
    assert sum(file.stat().st_size for file in steps(begun)) < 6000


def test_steps_of_a_state_that_was_damaged_belong_to_no_other(begun: Job) -> None:
    begun.studies["1"].reason = "old"
    begun.note()
    (begun.folder / "job.json").write_text("{")
    again = loaded()
    again.studies["7"] = Study("7")
    again.note()
    assert [*loaded().studies] == ["7"]


def test_a_number_that_stood_for_a_study_which_is_gone_by_a_retry_is_missing(begun: Job) -> None:
    begun.studies["1"].stage, begun.studies["2"].stage = Stage.FAILED, Stage.DELIVERED
    begun.also, begun.ended = {"B1": "1", "B2": "2"}, True
    begun.again(("A1", "B1", "A2", "B2"))
    assert {"A1", "B1"} <= {*begun.pending} and begun.also == {"B2": "2"}
    begun.forget(begun.pending, {"3", "4"})  # the source has deleted it
    assert "1" not in begun.studies and begun.also == {"B2": "2"}
