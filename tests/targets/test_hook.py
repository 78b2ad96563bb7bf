"""The script at the end, on rsync and SFTP targets: what it is given, when it runs, and how it fails."""

from __future__ import annotations

import os
import pwd
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prefect.client.schemas.objects import State as RunState
from prefect.client.schemas.objects import StateType, TaskRun
from pydantic import SecretStr

from blocks.rsync import RsyncTarget
from blocks.sftp import SftpTarget
from blocks.ssh import SshTarget
from talaria.testing import studies
from talaria.testing.harness import Sent, attempt
from talaria.testing.process import as_loaded, until
from talaria.testing.relay import relay
from tasks import DRIVERS
from tasks.dispatch.delivery import Delivery, HookFailed
from tasks.dispatch.push import hook_delay_before, hook_task, push_task
from tasks.dispatch.rest import Left
from tests.servers.openssh import shared
from transfer.errors import Cancelled, DispatchError, Misconfigured, Permanent, Retryable, Unreachable
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import PushReport, State

SCRIPT = """#!/bin/sh
printf '%s\\0' "$@" >> "$(dirname "$0")/calls"
echo "on standard output"
echo "on standard error" >&2
"""


@pytest.fixture(params=[RsyncTarget, SftpTarget], ids=lambda kind: kind.type_name)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> SshTarget:
    server = shared()
    folder = tmp_path / "in here; $(touch owned) `x` 'q' \"d\" ünï"
    folder.mkdir()
    one: SshTarget = request.param(
        host="127.0.0.1", port=server.port, user=server.user, folder=str(folder), host_key=server.host_keys[0],
        private_key=SecretStr(str(server.key)), connect_timeout_s=5, idle_timeout_s=10, on_complete=True,
        retry_delay_s=0, hook_timeout_s=20,
    )  # fmt: skip
    one.named("the-archive")
    return one


@pytest.fixture
def study(tmp_path: Path) -> Path:
    studies.ct(tmp_path / "study", 2)
    return tmp_path / "study"


def install(target: SshTarget, text: str = SCRIPT, name: str = "mercure_complete.sh", mode: int = 0o755) -> Path:
    path = Path(target.folder) / name
    path.write_text(text)
    path.chmod(mode)
    return path


def calls(target: SshTarget) -> list[list[str]]:
    """The arguments of each run."""
    file = Path(target.folder) / "calls"
    words = file.read_text().split("\0")[:-1] if file.exists() else []
    return [words[at : at + 2] for at in range(0, len(words), 2)]


def run(
    target: SshTarget, sent: Sent, report: PushReport | None = None, ran: set[str] | None = None
) -> tuple[int | None, str]:
    hook = DRIVERS.of(target).hook
    assert hook is not None
    result = hook(target, sent.plan, report or PushReport(), set() if ran is None else ran)
    return result.exit_code, result.output


# ---- what it is given


def test_it_gets_the_folder_and_the_targets_name_and_its_output_and_exit_code_come_back(
    target: SshTarget, study: Path
) -> None:
    install(target, SCRIPT + 'test -f "$1/.complete" && test -f "$1/CT0002.dcm" && exit 3\n')
    assert DRIVERS.of(target).check(target).ok
    sent = attempt(target, study)
    assert run(target, sent) == (3, "on standard output\non standard error\n")
    assert calls(target) == [[f"{target.folder}/{sent.plan.dispatch_id}", "the-archive"]]
    assert not list(Path(target.folder).parent.rglob("owned"))


@pytest.mark.parametrize("value", ["a b", 'it\'s "so"', "$(touch owned)", "`touch owned`", "a;b", "né 影", "-rf", "*"])
def test_arguments_arrive_unchanged(target: SshTarget, tmp_path: Path, value: str) -> None:
    studies.dicom(tmp_path / "study" / "1.dcm", PatientID=value, SpecificCharacterSet="ISO_IR 192")
    target.layout = "{PatientID}"
    target.hook_script = "run $(it); 'now'.sh"
    install(target, name=target.hook_script)
    sent = attempt(target, tmp_path / "study")
    assert calls(target) == []
    assert run(target, sent)[0] == 0
    assert calls(target) == [[f"{target.folder}/{value}", "the-archive"]]
    assert not list(tmp_path.rglob("owned"))


def test_its_environment_is_the_accounts_own(target: SshTarget, study: Path) -> None:
    install(target, "#!/bin/sh\nenv; cat; pwd\n")  # and its standard input is empty
    code, output = run(target, attempt(target, study))
    assert code == 0
    assert "LC_ALL=C" not in output.split("\n")
    assert pwd.getpwuid(os.geteuid()).pw_dir in output


def test_it_runs_once_for_each_folder_of_a_layout(target: SshTarget, tmp_path: Path) -> None:
    for modality in ("CT", "MR", "US"):
        studies.dicom(tmp_path / "study" / f"{modality}.dcm", Modality=modality)
    target.layout = "{Modality}"
    install(target, SCRIPT + 'case "$1" in */MR) exit 4;; esac\n')
    code, output = run(target, attempt(target, tmp_path / "study"))
    assert code == 4
    assert output.count("on standard error") == 3
    assert [call[0].rsplit("/", 1)[1] for call in calls(target)] == ["CT", "MR", "US"]


def test_the_end_of_a_long_output_is_kept(target: SshTarget, study: Path) -> None:
    install(target, "#!/bin/sh\nseq 1 400000; echo the end\n")
    code, output = run(target, attempt(target, study))
    assert code == 0
    assert output.endswith("400000\nthe end\n")
    assert 60_000 < len(output) <= 65_536


def test_output_that_is_no_text(target: SshTarget, study: Path) -> None:
    install(target, "#!/bin/sh\nprintf 'a\\377\\000b'\n")
    assert run(target, attempt(target, study)) == (0, "a�\0b")


# ---- what goes wrong


@pytest.mark.parametrize("what", ["missing", "not executable", "a folder"])
def test_a_script_that_can_not_be_run_fails_the_hook_and_the_check(target: SshTarget, study: Path, what: str) -> None:
    if what == "not executable":
        install(target, mode=0o644)
    elif what == "a folder":
        (Path(target.folder) / "mercure_complete.sh").mkdir()
    health = DRIVERS.of(target).check(target)
    assert [(probe.name, probe.result) for probe in health.probes if probe.result == "failed"] == [("hook", "failed")]
    assert "mercure_complete.sh: not there, or not executable" in health.probes[-1].detail
    sent = attempt(target, study)
    sent.require()
    with pytest.raises(Permanent, match="not there, or not executable"):  # another attempt would find the same
        run(target, sent)


def test_a_script_without_its_interpreter(target: SshTarget, study: Path) -> None:
    install(target, "#!/nowhere/sh\n")
    code, output = run(target, attempt(target, study))
    assert code not in (0, None)
    assert output


def test_it_is_stopped_when_its_time_is_up_with_all_that_it_has_started(target: SshTarget, study: Path) -> None:
    target.hook_timeout_s = 1
    install(target, '#!/bin/sh\necho begun\nsleep 300 & echo $! > "$(dirname "$0")/pid"\nwait\n')
    begun = time.monotonic()
    code, output = run(target, attempt(target, study))
    assert code is None
    assert "begun" in output
    assert "stopped after 1 s" in output
    assert time.monotonic() - begun < as_loaded(15)
    assert gone(target)


def gone(target: SshTarget) -> bool:
    """Return whether the process that the script has started is there no more."""
    pid = int((Path(target.folder) / "pid").read_text())
    end = time.monotonic() + as_loaded(10)
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):  # the latter if it ends while its state is read
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_one_that_does_not_want_to_end_is_killed(target: SshTarget, study: Path) -> None:
    target.hook_timeout_s = 1
    install(target, '#!/bin/sh\ntrap "" TERM\necho $$ > "$(dirname "$0")/pid"\nwhile :; do sleep 1; done\n')
    assert run(target, attempt(target, study))[0] is None
    assert gone(target)


def test_what_it_leaves_running_is_not_waited_for(target: SshTarget, study: Path) -> None:
    install(target, '#!/bin/sh\nsleep 30 & echo $! > "$(dirname "$0")/pid"\necho started\n')
    begun = time.monotonic()
    assert run(target, attempt(target, study)) == (0, "started\n")
    assert time.monotonic() - begun < as_loaded(20)
    pid = int((Path(target.folder) / "pid").read_text())
    os.kill(pid, 15)  # it lives on


def test_a_lost_link_is_retryable_and_ends_the_script(target: SshTarget, study: Path) -> None:
    install(target, '#!/bin/sh\necho $$ > "$(dirname "$0")/pid"\nsleep 300\n')
    sent = attempt(target, study)
    with relay(target.port) as link:
        other = target.model_copy(update={"port": link.port})

        def cut() -> None:
            until((Path(target.folder) / "pid").exists)
            link.cut_after = 0  # with the next keep-alive message

        thread = threading.Thread(target=cut)
        thread.start()
        other.idle_timeout_s = 3
        with pytest.raises(Retryable):
            run(other, sent)
        thread.join()
    assert gone(target)


def test_a_server_that_is_not_there_is_retryable(target: SshTarget, study: Path) -> None:
    sent = attempt(target, study)
    target.port = 1
    with pytest.raises(Unreachable):
        run(target, sent)


def test_a_cancelled_hook_is_stopped(target: SshTarget, study: Path) -> None:
    install(target, '#!/bin/sh\necho $$ > "$(dirname "$0")/pid"\nsleep 300\n')
    sent = attempt(target, study)
    cancelled = threading.Event()
    threading.Timer(2, cancelled.set).start()
    with pytest.raises(Cancelled):
        run(target, sent, PushReport(cancelled=cancelled))
    assert gone(target)


# ---- with the ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite") as one:
        yield one


def delivery(target: SshTarget, study: Path, ledger: Ledger, tmp_path: Path) -> Delivery:
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    return Delivery(DRIVERS.of(target), target, scan([study]), ledger, Home(home), threading.Event())


def test_a_failed_hook_is_run_again_and_the_data_not_sent_again(
    target: SshTarget, study: Path, ledger: Ledger, tmp_path: Path
) -> None:
    script = install(target, SCRIPT + "exit 5\n")
    with relay(target.port) as link:
        target.port = link.port
        one = delivery(target, study, ledger, tmp_path)
        one.push()
        assert one.wants_hook
        for attempts in (1, 2):
            with pytest.raises(DispatchError, match="exit code 5"):
                one.run_hook()
            row = ledger.hook(one.plan.dispatch_id, target.name)
            assert row is not None
            assert (row.outcome, row.exit_code, row.attempts) == ("failed", 5, attempts)
            assert "on standard error" in row.output
            assert one.hook_result == "the script ended with exit code 5: on standard error"
        script.write_text(SCRIPT)
        # Later, as another run of the same dispatch.
        before = link.sent
        again = delivery(target, study, ledger, tmp_path)
        again.push()
        assert again.wants_hook
        again.run_hook()
        assert link.sent - before < 40_000
        assert again.receipt().hook == "done"
        assert len(calls(target)) == 3
        third = delivery(target, study, ledger, tmp_path)
        third.push()
        assert not third.wants_hook
        assert third.receipt().hook == "done"


def test_no_hook_where_something_was_rejected(target: SshTarget, study: Path, ledger: Ledger, tmp_path: Path) -> None:
    install(target)
    one = delivery(target, study, ledger, tmp_path)
    (study / "CT0001.dcm").unlink()
    one.push()
    assert not one.wants_hook
    assert not (Path(target.folder) / one.plan.dispatch_id / ".complete").exists()


def test_one_that_can_not_be_run_fails_for_good_and_the_data_stays_delivered(
    target: SshTarget, study: Path, ledger: Ledger, tmp_path: Path
) -> None:
    one = delivery(target, study, ledger, tmp_path)
    one.push()
    with pytest.raises(Misconfigured, match="not there, or not executable"):
        one.run_hook()
    row = ledger.hook(one.plan.dispatch_id, target.name)
    assert row is not None
    assert (row.outcome, row.exit_code) == ("failed", None)
    assert "not there, or not executable" in row.output
    assert "not there, or not executable" in one.hook_result
    assert one.hook_output == "", "it has said nothing"
    receipt = one.receipt()
    assert (receipt.hook, receipt.error, receipt.state) == ("failed", None, State.PARTIAL)
    assert receipt.counts[Kind.DELIVERED] == 2
    assert (Path(target.folder) / one.plan.dispatch_id / ".complete").exists()


def test_a_cancelled_one_is_told_as_such_and_is_run_by_the_next_run(
    target: SshTarget, study: Path, ledger: Ledger, tmp_path: Path
) -> None:
    script = install(target, SCRIPT + "sleep 300\n")
    one = delivery(target, study, ledger, tmp_path)
    one.push()
    threading.Timer(1.5, one.cancelled.set).start()
    with pytest.raises(Cancelled):
        one.run_hook()
    receipt = one.receipt()
    assert (receipt.hook, receipt.state) == ("failed", State.CANCELLED)
    script.write_text(SCRIPT)
    again = delivery(target, study, ledger, tmp_path)
    again.push()
    assert again.wants_hook
    again.run_hook()
    assert again.receipt().hook == "done"


def test_it_has_a_retry_policy_of_its_own(target: SshTarget, study: Path, ledger: Ledger, tmp_path: Path) -> None:
    """Not the push's: a script may need minutes where a transfer is tried again at once, and the other way round."""
    target.hook_attempts, target.hook_retry_delay_s = 4, 7
    target.max_attempts, target.retry_delay_s, target.retry_max_delay_s = 9, 100, 200
    one = delivery(target, study, ledger, tmp_path)
    task = hook_task(one)
    assert (task.name, task.retries) == (f"hook-{target.type_name}", 3)
    assert task.retry_condition_fn is not None
    delays = []
    for count in (1, 2, 3):
        one.hook_tries = count
        run = TaskRun(task_key="hook", dynamic_key="0", flow_run_id=None, run_count=count)
        failed = RunState(type=StateType.FAILED, data=HookFailed("the script ended with exit code 1"))
        assert task.retry_condition_fn(task, run, failed)
        delays.append(task.retry_delay_seconds)
    assert delays == [[7], [14], [28]]
    one.may_rest, one.hook_tries = True, 2  # then the run waits without the task, for the next in the line
    assert not task.retry_condition_fn(task, run, failed)
    assert one.again is not None and 13 < (one.again - datetime.now(UTC)).total_seconds() <= 14
    left = one.leave(Left())
    later = delivery(target, study, ledger, tmp_path)
    later.resume(replace(left, begun=1.0, hook_tries=4))
    assert later.hook_tries == 4 and not hook_task(later).retry_condition_fn(task, run, failed)  # type: ignore[misc]
    for final in (Misconfigured("not there"), Cancelled("stopped"), ValueError("a bug")):
        run = TaskRun(task_key="hook", dynamic_key="0", flow_run_id=None, run_count=1)
        assert not task.retry_condition_fn(task, run, RunState(type=StateType.FAILED, data=final))
    target.retry_delay_s = target.retry_max_delay_s = 0
    assert hook_delay_before(3, target) == 7, "what the push may wait at most shortens no first delay"
    assert push_task(delivery(target, study, ledger, tmp_path)).name == f"push-{target.type_name}"


def test_it_runs_once_though_the_dispatch_was_started_twice(
    target: SshTarget, study: Path, ledger: Ledger, tmp_path: Path
) -> None:
    install(target, SCRIPT + "sleep 1\n")
    both = [delivery(target, study, ledger, tmp_path) for _ in range(2)]
    for one in both:
        one.push()
        assert one.wants_hook
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Delivery.run_hook, both))
    assert [one.receipt().hook for one in both] == ["done", "done"]
    assert len(calls(target)) == 1


def test_of_several_folders_only_those_that_failed_get_another_run(
    target: SshTarget, ledger: Ledger, tmp_path: Path
) -> None:
    for modality in ("CT", "MR", "US"):
        studies.dicom(tmp_path / "study" / f"{modality}.dcm", Modality=modality)
    target.layout = "{Modality}"
    script = install(target, SCRIPT + 'case "$1" in */MR) exit 4;; esac\n')
    one = delivery(target, tmp_path / "study", ledger, tmp_path)
    one.push()
    with pytest.raises(HookFailed, match="exit code 4"):
        one.run_hook()
    script.write_text(SCRIPT)
    again = delivery(target, tmp_path / "study", ledger, tmp_path)
    again.push()
    assert again.wants_hook
    again.run_hook()
    assert again.receipt().hook == "done"
    assert [call[0].rsplit("/", 1)[1] for call in calls(target)] == ["CT", "MR", "US", "MR"]
    (tmp_path / "home").mkdir(exist_ok=True)
    forced = Delivery(
        DRIVERS.of(target), target, scan([tmp_path / "study"]), ledger, Home(tmp_path / "home"), threading.Event(),
        force=True,
    )  # fmt: skip
    forced.push()
    assert forced.wants_hook
    forced.run_hook()
    assert len(calls(target)) == 7


@pytest.mark.parametrize("failed", ["MR", "nothing"])
def test_it_is_run_again_for_a_folder_into_which_a_file_has_come_since(
    target: SshTarget, ledger: Ledger, tmp_path: Path, failed: str
) -> None:
    kinds = {
        modality: {"Modality": modality, "SOPInstanceUID": f"2.25.{ord(modality[0])}"}
        for modality in ("CT", "MR", "US")
    }
    for modality, values in kinds.items():
        studies.dicom(tmp_path / "study" / f"{modality}.dcm", **values)
    target.layout = "{Modality}"
    script = install(target, SCRIPT + f'case "$1" in */{failed}) exit 4;; esac\n')

    def retried() -> Delivery:
        one = delivery(target, tmp_path / "study", ledger, tmp_path)
        return Delivery(
            one.driver, target, ledger.runs.same_dispatch("run", one.plan), ledger, one.home, threading.Event()
        )  # as when a run is retried

    first = retried()
    first.push()
    with nullcontext() if failed == "nothing" else pytest.raises(HookFailed, match="exit code 4"):
        first.run_hook()
    script.write_text(SCRIPT)
    studies.dicom(tmp_path / "study" / "CT.dcm", **kinds["CT"], SeriesNumber="77")
    again = retried()
    assert again.plan.dispatch_id == first.plan.dispatch_id
    again.push()
    assert again.wants_hook
    again.run_hook()
    assert again.receipt().hook == "done"
    names = [call[0].rsplit("/", 1)[1] for call in calls(target)]
    assert names == ["CT", "MR", "US", "CT", *(["MR"] if failed == "MR" else [])]
    last = retried()
    last.push()
    assert not last.wants_hook


def test_one_that_is_cancelled_while_another_run_has_the_script_is_cancelled(
    target: SshTarget, study: Path, ledger: Ledger, tmp_path: Path
) -> None:
    install(target)
    one = delivery(target, study, ledger, tmp_path)
    one.push()
    with one._alone("hook", PushReport().check):
        threading.Timer(0.3, one.cancelled.set).start()
        with pytest.raises(Cancelled):
            one.run_hook()
    receipt = one.receipt()
    assert (receipt.state, receipt.hook, receipt.error) == (State.CANCELLED, "failed", None)
    assert ledger.hook(one.plan.dispatch_id, target.name) is None, "it is the other run's"
    assert not calls(target)
