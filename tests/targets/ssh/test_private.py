"""A layout may make folders of a patient's data: nothing that is told of them tells it."""

from __future__ import annotations

import shutil
import traceback
from pathlib import Path
from unittest import mock

import pytest

from blocks.ssh import SshTarget
from protocols.ssh.login import Login, LoginFacts
from protocols.ssh.memfiles import tail
from protocols.ssh.rsync import Result
from protocols.ssh.shell import _last
from protocols.ssh.words import FIRST_CHARS, WORDS_CHARS, Said
from talaria.testing import studies
from talaria.testing.harness import attempt
from tasks import DRIVERS
from tasks.rsync import _said
from tasks.ssh import hiding
from tests.servers.openssh import install, shared
from tests.targets.remote_folder import ssh_target
from transfer.errors import DispatchError
from transfer.plan import scan
from transfer.receipt import Level, PushReport, State

LAYOUT = "{PatientID}/acc-{AccessionNumber}/{Modality}"


@pytest.fixture
def target(kind: type[SshTarget], tmp_path: Path) -> SshTarget:
    (tmp_path / "in").mkdir()
    return ssh_target(kind, shared(), tmp_path / "in", layout=LAYOUT)


def told(error: BaseException | None) -> str:
    """All that Prefect's log may show of an error: it prints its repr, and in the end its traceback."""
    return f"{error} {error!r} {error.args} {''.join(traceback.format_exception(error))}" if error else ""


def test_messages_notes_and_details_hold_nothing_of_the_patient(target: SshTarget, tmp_path: Path) -> None:
    study, texts = tmp_path / "study", []
    for modality in ("CT", "MR"):
        studies.dicom(study / f"{modality}.dcm", Modality=modality)
    folder = Path(target.folder)
    there = folder / studies.PATIENT_ID / f"acc-{studies.ACCESSION}"
    plan = scan([study])

    # A folder where a file should be, and a file where a folder should be.
    (there / "CT" / "CT.dcm").mkdir(parents=True)
    sent = attempt(target, plan)
    assert set(sent.rejected) == {"CT.dcm"}
    texts += [repr(sent.receipt), *sent.rejected.values()]
    for obstacle in (there / "CT", there, there.parent):
        shutil.rmtree(folder)
        obstacle.parent.mkdir(parents=True)
        obstacle.write_text("in the way")
        sent = attempt(target, plan)
        assert sent.error or sent.rejected
        texts += [told(sent.error), repr(sent.receipt), *sent.rejected.values()]
    shutil.rmtree(folder)
    folder.mkdir()

    # What has been taken away.
    sent = attempt(target, plan)
    assert sent.require().state is State.DELIVERED
    shutil.rmtree(folder / studies.PATIENT_ID)
    for level in Level:
        target.verify = level
        again = attempt(target, plan, done=sent.arrived)
        texts += [told(again.error), repr(again.receipt), *again.rejected.values()]

    # The script at the end names the folders that it was run for.
    install(folder, 'echo "said of $1"')
    hook = DRIVERS.of(target).hook
    assert hook
    result = hook(target, plan, PushReport(), set())
    assert result.output.count("said of") == 2
    assert "/CT: said" in result.output
    texts.append(result.output)
    target.hook_script = "other.sh"
    with pytest.raises(DispatchError) as caught:
        hook(target, plan, PushReport(), set())
    texts.append(told(caught.value))
    for text in texts:
        assert studies.PATIENT_ID not in text, text
        assert studies.ACCESSION not in text, text
    assert any("***" in text for text in texts)


def test_a_patients_data_is_found_before_words_are_cut(target: SshTarget, tmp_path: Path) -> None:
    """What is left of an identifier that was cut in two is not recognised."""
    studies.dicom(tmp_path / "study" / "1.dcm")
    hide = hiding(target, scan([tmp_path / "study"]))
    said = Said(Login("host"), hide, "", "")
    words = mock.PropertyMock()
    with mock.patch.multiple(Said, words=words, facts=LoginFacts()):
        for length in (*range(FIRST_CHARS - 60, FIRST_CHARS), *range(WORDS_CHARS - 60, WORDS_CHARS)):
            after = "it went wrong " + "." * (WORDS_CHARS - FIRST_CHARS)
            words.return_value = text = f"{'.' * length}/{studies.PATIENT_ID}/CT: {after[: 2 * length]}"
            for error in (
                said.failure(255),
                Result(23, text, "", b"", said).failure(),
                _said(text.encode(), target, hide),  # type: ignore[arg-type]
            ):
                assert f"./{studies.PATIENT_ID[0]}" not in error.message


def test_the_end_of_a_long_output_does_not_begin_with_half_an_identifier(target: SshTarget, tmp_path: Path) -> None:
    studies.dicom(tmp_path / "study" / "1.dcm")
    hide = hiding(target, scan([tmp_path / "study"]))
    for more in range(20):
        output = f"/in/{studies.PATIENT_ID}/CT ".encode() * 4000 + b"." * more
        told = _last(bytearray(output), hide)
        assert len(told) > 20_000
        assert not any(studies.PATIENT_ID[at:] in told for at in range(len(studies.PATIENT_ID) - 4))


def test_the_end_of_a_log_begins_with_a_whole_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("mkdir /in/4711-XQ\nmkdir /in/0815-XQ\n")
    assert tail(str(log), 25) == b"mkdir /in/0815-XQ\n"
    assert tail(str(log), 100) == log.read_bytes()


def test_what_is_hidden_is_no_more_than_that(target: SshTarget, tmp_path: Path) -> None:
    studies.dicom(tmp_path / "study" / "1.dcm", PatientID="12")
    plan = scan([tmp_path / "study"])
    target.layout = "{PatientID}/{Modality}"
    hide = hiding(target, plan)
    assert hide("mv: can't move '/in/12/CT': 12 bytes of 512") == "mv: can't move '/in/***/CT': 12 bytes of 512"
    assert hiding(target, plan.narrowed(()))("/in/12/") == "/in/12/"
    target.layout = "{dispatch_id}/{StudyInstanceUID}"
    assert hiding(target, plan)(f"/in/{plan.dispatch_id}/1.2") == f"/in/{plan.dispatch_id}/1.2"
