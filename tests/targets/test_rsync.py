"""rsync targets: merging into folders that are there, lost answers, rooms, rights, old and strange servers."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import tasks.rsync
from blocks.rsync import RsyncTarget
from protocols.ssh import rsync as protocol
from protocols.ssh.shell import Shell
from talaria.testing import studies
from talaria.testing.harness import Sent, attempt
from talaria.testing.process import as_loaded
from talaria.testing.relay import relay
from tasks import DRIVERS
from tests.servers.openssh import IS_ROOT, Server, inside, openssh, ordinary, shared, small_disk
from tests.targets.remote_folder import RemoteFolder, content, ssh_target
from tests.watching import watched
from transfer.errors import Busy, Cancelled, Denied, Interrupted, Misconfigured, TimedOut
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import Level, State

MEGABYTE = 1 << 20


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return tmp_path / "study"


def target(folder: Path | str, server: Server | None = None, **more: object) -> RsyncTarget:
    return ssh_target(RsyncTarget, server or shared(), folder, **more)


def below(folder: Path) -> set[str]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ---- one rename, or a merge


def test_another_dispatch_into_the_same_folder_is_merged_file_by_file(tmp_path: Path, study: Path) -> None:
    uid = studies.uid(56)
    studies.ct(study / "a", 3, study=uid)
    studies.odd_names(tmp_path / "more" / "a", studies.UNICODE_NAMES + studies.SHELL_NAMES)
    changed = studies.ct(tmp_path / "more" / "a", 1, study=uid)[0]  # the same name as before, other bytes
    one = target(tmp_path / "in", layout="{StudyInstanceUID}")
    attempt(one, study).require()
    folder = tmp_path / "in" / uid
    plan = scan([tmp_path / "more" / "a"])
    with mock.patch.object(tasks.rsync.ssh, "by_folder", lambda target, plan: {uid: list(plan.items)}):
        sent = attempt(one, plan)
    assert sent.require().state is State.DELIVERED
    assert below(folder) == {"a/CT0001.dcm", "a/CT0002.dcm", "a/CT0003.dcm", ".complete"} | set(sent.arrived)
    assert (folder / "CT0001.dcm").read_bytes() == changed.read_bytes()
    assert not [name for name in os.listdir(tmp_path / "in") if name.startswith(".")]


def test_a_merge_never_shows_half_a_file_nor_the_marker_too_early(tmp_path: Path, study: Path) -> None:
    studies.ct(study, 200, side=64)
    one = target(tmp_path / "in")
    plan = scan([study])
    attempt(one, plan).require()
    # The ledger is lost: everything again, over what is there.
    with watched(tmp_path / "in", study, [item.path for item in plan.items], plan.dispatch_id) as seen:
        assert attempt(one, plan).require().counts[Kind.DELIVERED] == 200
    assert not [text for text in seen.wrong if "marked" not in text]
    assert seen.looks > 1
    assert below(tmp_path / "in") == {f"{plan.dispatch_id}/{name}" for name in [*sent_names(plan), ".complete"]}


def sent_names(plan: object) -> list[str]:
    return [item.path for item in plan.items]  # type: ignore[attr-defined]


def test_what_is_in_the_way_of_a_file_or_a_folder_costs_these_alone(tmp_path: Path, study: Path) -> None:
    for name in ("a", "b", "c"):
        studies.ct(study / name, 2)
    plan = scan([study])
    folder = tmp_path / "in" / plan.dispatch_id
    (folder / "a" / "CT0001.dcm").mkdir(parents=True)
    (folder / "b").write_text("a file")
    sent = attempt(target(tmp_path / "in"), plan)
    assert set(sent.rejected) == {"a/CT0001.dcm", "b/CT0001.dcm", "b/CT0002.dcm"}
    assert sent.rejected["a/CT0001.dcm"] == "a folder of this name is in the way"
    assert sent.rejected["b/CT0001.dcm"] == "a file is in the way of its folder"
    assert len(sent.arrived) == 3
    assert below(folder) == {"a/CT0002.dcm", "b", "c/CT0001.dcm", "c/CT0002.dcm"}
    assert not [name for name in os.listdir(tmp_path / "in") if name.startswith(".")]


def test_a_layout_of_several_folders_marks_each(tmp_path: Path, study: Path) -> None:
    for modality in ("CT", "MR", "US"):
        studies.dicom(study / "all" / f"{modality}.dcm", Modality=modality)
        studies.dicom(study / f"{modality} only" / "1.dcm", Modality=modality)
    studies.note(study / "MR only" / "result.json")
    one = target(tmp_path / "in", layout="{PatientID}/{Modality}", verify=Level.PROVEN)
    sent = attempt(one, study)
    assert sent.require().verified is Level.PROVEN
    assert below(tmp_path / "in" / studies.PATIENT_ID) == {
        "CT/all/CT.dcm", "CT/CT only/1.dcm", "CT/.complete", "MR/all/MR.dcm", "MR/MR only/1.dcm",
        "MR/MR only/result.json", "MR/.complete", "US/US only/1.dcm", "US/all/US.dcm", "US/.complete",
    }  # fmt: skip
    assert os.listdir(tmp_path / "in") == [studies.PATIENT_ID]


@pytest.mark.parametrize("value", ["$(touch owned)", "-rf", "@FOLDER@", "a'b\"c", "*", "né 影", "@INCOMING@/../x"])
def test_values_of_a_layout_reach_no_shell(tmp_path: Path, study: Path, value: str) -> None:
    studies.dicom(study / "1.dcm", PatientID=value, SpecificCharacterSet="ISO_IR 192")
    sent = attempt(target(tmp_path / "in", layout="x/{PatientID}"), study)
    assert sent.require().state is State.DELIVERED
    (folder,) = os.listdir(tmp_path / "in" / "x")
    assert folder.startswith(value.replace("/", "_"))
    assert below(tmp_path / "in" / "x" / folder) == {"1.dcm", ".complete"}
    assert not list(tmp_path.rglob("owned"))


# ---- what gets lost on the way


def test_the_lost_answer_of_the_rename_sends_nothing_again(tmp_path: Path, study: Path) -> None:
    """The link breaks when everything has its final name, and we have not been told."""
    with open(studies.ct(study, 1)[0].with_name("large.bin"), "wb") as file:
        file.write(os.urandom(16 * MEGABYTE))
    real, calls = Shell.run, []

    def run(self: Shell, script: str, **more: object) -> tuple[int, bytes]:
        answer = real(self, script, **more)  # type: ignore[arg-type]
        if "place() {" in script and not calls:
            calls.append(script)
            raise Interrupted("the link broke")
        return answer

    with relay(shared().port) as link:
        one = target(tmp_path / "in", port=link.port)
        with mock.patch.object(Shell, "run", run):
            first = attempt(one, study)
            assert isinstance(first.error, Interrupted)
            assert not first.outcomes
            before = link.sent
            second = attempt(one, first.plan)
        assert second.require().state is State.DELIVERED
        assert link.sent - before < MEGABYTE
    assert below(tmp_path / "in") == {
        f"{first.plan.dispatch_id}/{name}" for name in ("CT0001.dcm", "large.bin", ".complete")
    }


def test_what_rsync_leaves_out_without_a_word_is_noticed(tmp_path: Path, study: Path) -> None:
    studies.ct(study, 3)
    real = protocol.Rsync.send

    def send(self: protocol.Rsync, source: Path, paths: list[str], folder: str, **more: Any) -> protocol.Result:
        return real(self, source, paths[1:], folder, **more)

    one = target(tmp_path / "in")
    with mock.patch.object(protocol.Rsync, "send", send):
        sent = attempt(one, study)
    assert isinstance(sent.error, Interrupted)
    assert "2 of 3 files" in sent.error.message
    assert not sent.outcomes
    assert not below(tmp_path / "in")
    assert attempt(one, study).require().state is State.DELIVERED


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_vanishes_while_it_is_written_is_neither_delivered_nor_given_up(
    tmp_path: Path, study: Path, when: str
) -> None:
    """As when the same dispatch is sent from two machines at once, and the other one has just ended."""
    studies.ct(study, 3)
    real = protocol.Rsync.send

    def send(self: protocol.Rsync, *arguments: Any, **more: Any) -> protocol.Result:
        if when == "before":
            clear()
        result = real(self, *arguments, **more)
        clear()
        return result

    def clear() -> None:
        for path in (tmp_path / "in").glob(".incoming-*"):
            shutil.rmtree(path)

    one = target(tmp_path / "in")
    with mock.patch.object(protocol.Rsync, "send", send):
        sent = attempt(one, study)
    assert isinstance(sent.error, Interrupted), repr(sent.error)
    assert not sent.outcomes
    assert attempt(one, study).require().state is State.DELIVERED


def test_what_an_earlier_attempt_at_more_files_has_left_does_not_become_visible(tmp_path: Path, study: Path) -> None:
    studies.ct(study, 4)
    plan = scan([study])
    one = target(tmp_path / "in")
    with mock.patch.object(tasks.rsync, "PLACE", "exit 1\n@DROP@ @PLACES@"):
        assert attempt(one, plan).error
    one.exclude = "CT0003.dcm"
    sent = attempt(one, plan)
    if sent.error:  # it begins anew
        assert isinstance(sent.error, Interrupted)
        sent = attempt(one, plan)
    assert sent.require().state is State.DELIVERED
    assert "CT0003.dcm" not in {name.rsplit("/", 1)[-1] for name in below(tmp_path / "in")}


def test_a_file_that_vanishes_or_changes_is_rejected_and_gone(tmp_path: Path, study: Path) -> None:
    studies.ct(study, 4)
    plan = scan([study])
    (study / "CT0001.dcm").unlink()
    real = protocol.Rsync.send

    def send(self: protocol.Rsync, source: Path, paths: list[str], folder: str, **more: Any) -> protocol.Result:
        (study / "CT0002.dcm").unlink()
        result = real(self, source, paths, folder, **more)
        (study / "CT0003.dcm").write_bytes(b"other")
        return result

    with mock.patch.object(protocol.Rsync, "send", send):
        sent = attempt(target(tmp_path / "in"), plan)
    assert set(sent.rejected) == {"CT0001.dcm", "CT0002.dcm", "CT0003.dcm"}
    assert below(tmp_path / "in") == {f"{plan.dispatch_id}/CT0004.dcm"}


def test_a_server_that_falls_silent_is_timed_out(tmp_path: Path, study: Path) -> None:
    studies.multiframe(study / "large.dcm", 40)
    with relay(shared().port, stall_after=6_000_000) as link:
        sent = attempt(target(tmp_path / "in", port=link.port, idle_timeout_s=2), study)
        assert isinstance(sent.error, (TimedOut, Interrupted)), repr(sent.error)
        assert sent.seconds < as_loaded(20)


def test_a_cancelled_push_stops_rsync_and_goes_on_later(tmp_path: Path, study: Path) -> None:
    (study / "a").mkdir(parents=True)
    (study / "a" / "large.bin").write_bytes(os.urandom(24 * MEGABYTE))
    cancelled = threading.Event()
    with relay(shared().port) as link:
        one = target(tmp_path / "in", port=link.port, bandwidth_limit=6 * MEGABYTE)

        def moved(sent: Sent, _: int) -> None:
            if sent.moved > 10 * MEGABYTE:
                cancelled.set()

        first = attempt(one, study, moved=moved, cancelled=cancelled)
        assert isinstance(first.error, Cancelled)
        assert not [name for name in below(tmp_path / "in") if ".incoming-" not in name]
        one.bandwidth_limit = None
        before = link.sent
        assert attempt(one, study).require().state is State.DELIVERED
        assert link.sent - before < 18 * MEGABYTE


# ---- levels


@pytest.mark.parametrize("level", [Level.LISTED, Level.PROVEN])
def test_what_is_not_there_any_more_is_taken_back(tmp_path: Path, study: Path, level: Level) -> None:
    studies.odd_names(study, studies.UNICODE_NAMES + studies.SHELL_NAMES + studies.RAW_NAMES)
    one = target(tmp_path / "in", verify=level)
    first = attempt(one, study)
    assert first.require().verified is level
    folder = tmp_path / "in" / first.plan.dispatch_id
    gone, wrong = "new\nline.dcm", "back\\slash.dcm"
    (folder / gone).unlink()
    data = (folder / wrong).read_bytes()
    (folder / wrong).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    again = attempt(one, first.plan, done=[item.path for item in first.plan.items])
    assert set(again.rejected) == ({gone, wrong} if level is Level.PROVEN else {gone})
    if level is Level.PROVEN:
        assert not (folder / wrong).exists()
        rest = attempt(one, first.plan, done={item.path for item in first.plan.items} - {gone, wrong})
        assert rest.require().state is State.DELIVERED
        assert (folder / wrong).read_bytes() == data


# ---- rooms and rights


def test_a_full_disk_is_busy_and_fine_after_room_is_made(tmp_path: Path, study: Path) -> None:
    for number in range(4):
        studies.multiframe(study / f"{number}.dcm", 8)  # 4 MB each
    with small_disk(tmp_path, "size=20m") as server:
        one = target("/mnt/in", server)
        inside(server, "head -c 12000000 /dev/zero >/mnt/ballast")
        sent = attempt(one, study)
        assert isinstance(sent.error, Busy), repr(sent.error)
        assert "No space left" in sent.error.message
        assert len(sent.arrived) < 4 and not sent.rejected
        names = inside(server, f"ls -A /mnt/in/{sent.plan.dispatch_id} || true").split()
        assert set(names) == sent.arrived
        inside(server, "rm /mnt/ballast")
        assert attempt(one, study, done=sent.arrived).require().state is State.DELIVERED
        names = inside(server, f"ls -A /mnt/in /mnt/in/{sent.plan.dispatch_id}").split()
        assert names[-5:] == [".complete", "0.dcm", "1.dcm", "2.dcm", "3.dcm"]


def test_folders_stay_enterable_for_the_group_whatever_the_umask_and_modes_here(tmp_path: Path, study: Path) -> None:
    for path in studies.ct(study / "a" / "b", 2):
        path.chmod(0o600)
    for path in (study, study / "a", study / "a" / "b"):
        path.chmod(0o700)
    for umask, file_mode, folder_mode in ((0o077, 0o600, 0o750), (0o022, 0o644, 0o755)):
        with openssh(tmp_path / f"sshd{umask}", umask=umask) as server:
            place = tmp_path / f"in{umask}"
            place.mkdir()
            place.chmod(0o2775)
            sent = attempt(target(place, server), study)
            sent.require()
            for path in (place / sent.plan.dispatch_id).rglob("*"):
                mode = path.stat().st_mode
                if path.is_dir():
                    assert mode & 0o777 == folder_mode
                    assert mode & 0o2000, "the group of the folder is not passed on"
                elif path.name != ".complete":
                    assert mode & 0o777 == file_mode
                    assert path.stat().st_mtime_ns == (study / "a" / "b" / path.name).stat().st_mtime_ns


def test_missing_parents_are_made_and_a_relative_folder_begins_at_home(tmp_path: Path, study: Path) -> None:
    studies.ct(study, 1)
    assert attempt(target(tmp_path / "x" / "y z" / "it's"), study).require().state is State.DELIVERED
    with ordinary(tmp_path) as (server, home):
        for folder in ("~/of mine/deep", ".", ":module"):  # the last one is no daemon's
            one = target(folder, server, verify=Level.LISTED)
            assert DRIVERS.of(one).check(one).ok
            sent = attempt(one, study)
            assert sent.require().state is State.DELIVERED
            assert attempt(one, sent.plan, done=sent.arrived).require().verified is Level.LISTED
            place = home / one.folder if IS_ROOT else Path.home() / one.folder
            assert RemoteFolder(place, one).read_back(sent.plan) == content(sent)


# ---- strange servers


def test_a_login_that_prints_text_is_no_obstacle(tmp_path: Path, study: Path) -> None:
    """Nor to rsync, which has no login of its own."""
    studies.ct(study, 1)
    with openssh(tmp_path / "sshd", more='ForceCommand echo "Welcome!"; sh -c "$SSH_ORIGINAL_COMMAND"') as server:
        one = target(tmp_path / "in", server, verify="proven")
        attempt(one, study).require()
        assert DRIVERS.of(one).check(one).ok


def test_a_server_without_rsync_is_misconfigured(tmp_path: Path, study: Path) -> None:
    studies.ct(study, 1)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "mkdir", "chmod", "rm", "find", "mv", "head", "wc", "cat"):
        (tools / name).symlink_to(
            subprocess.run(["which", name], check=True, capture_output=True, text=True).stdout.strip()
        )
    with openssh(tmp_path / "sshd", more=f'ForceCommand PATH={tools} sh -c "$SSH_ORIGINAL_COMMAND"') as server:
        one = target(tmp_path / "in", server)
        error = attempt(one, study).error
        assert isinstance(error, Misconfigured), repr(error)
        assert "not installed on the server" in error.message
        health = DRIVERS.of(one).check(one)
        assert isinstance(health.error, Misconfigured)
        assert next(probe for probe in health.probes if probe.result == "failed").name == "rsync"


def test_check_rehearses_the_connection_that_rsync_makes_itself(tmp_path: Path) -> None:
    """The shell's login says nothing of rsync's."""
    refuses = 'case "$SSH_ORIGINAL_COMMAND" in *--server*) echo "no rsync for you" >&2; exit 5 ;; esac'
    with openssh(tmp_path / "sshd", more=f'ForceCommand {refuses}; sh -c "$SSH_ORIGINAL_COMMAND"') as server:
        one = target(tmp_path / "in", server)
        health = DRIVERS.of(one).check(one)
    assert next(probe for probe in health.probes if probe.result == "failed").name == "rsync"
    assert "no rsync for you" in str(health.error)


def test_an_account_that_rrsync_restricts_is_named(tmp_path: Path, study: Path) -> None:
    studies.ct(study, 1)
    (tmp_path / "in").mkdir()
    rrsync = shutil.which("rrsync") or "/usr/share/doc/rsync/scripts/rrsync"
    with openssh(tmp_path / "sshd", more=f"ForceCommand {rrsync} {tmp_path}/in") as server:
        one = target(tmp_path / "in", server)
        error = attempt(one, study).error
        assert isinstance(error, Misconfigured), repr(error)
        assert "restricted by rrsync" in error.message
        health = DRIVERS.of(one).check(one)
        assert next(probe for probe in health.probes if probe.result == "failed").name == "shell"
        assert "restricted by rrsync" in str(health.error)


def test_rsync_that_is_missing_here_is_named(tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies.ct(study, 1)
    one = target(tmp_path / "in")  # which may start the server, with programs of its own
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "ssh").symlink_to("/usr/bin/ssh")
    monkeypatch.setenv("PATH", str(tools))
    error = attempt(one, study).error
    assert isinstance(error, Misconfigured)
    assert "package rsync" in error.message


@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/dash"])
def test_a_server_that_lets_one_session_on_a_connection(tmp_path: Path, study: Path, shell: str) -> None:
    """Sharing a connection is then refused, and rsync logs in on its own."""
    studies.ct(study, 2)
    with openssh(tmp_path / "sshd", more="MaxSessions 1") as server:
        assert attempt(target(tmp_path / "in", server), study).require().state is State.DELIVERED


def test_compression_is_an_option(tmp_path: Path, study: Path) -> None:
    study.mkdir()
    (study / "zeros.bin").write_bytes(bytes(8 * MEGABYTE))
    for compress in (True, False):
        with relay(shared().port) as link:
            one = target(tmp_path / f"in {compress}", port=link.port, compress=compress)
            assert attempt(one, study).require().state is State.DELIVERED
            assert (link.sent < MEGABYTE) == compress


@contextmanager
def arguments() -> Iterator[list[str]]:
    seen: list[str] = []
    real = subprocess.Popen.__init__

    def popen(self: object, args: list[str], *more: object, **named: object) -> None:
        seen.append(" ".join(map(str, args)))
        real(self, args, *more, **named)  # type: ignore[arg-type]

    with mock.patch.object(subprocess.Popen, "__init__", popen):
        yield seen


def test_nothing_of_the_users_ssh_configuration_or_of_rsyncs_environment_counts(
    tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies.ct(study, 1)
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("Host *\n  ProxyCommand touch owned\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RSYNC_RSH", "false")
    monkeypatch.setenv("RSYNC_PARTIAL_DIR", "elsewhere")
    monkeypatch.setenv("RSYNC_PROXY", "localhost:1")
    with arguments() as seen:
        assert attempt(target(tmp_path / "in"), study).require().state is State.DELIVERED
    assert all("-F /dev/null" in argv for argv in seen if "/ssh " in argv)
    assert any("rsync" in argv for argv in seen)


# ---- what exit codes mean


@pytest.mark.parametrize(
    ("code", "words", "kind"),
    [
        (11, "rsync: write failed: No space left on device (28)", Busy),
        (23, "rsync: mkstemp failed: Disk quota exceeded (122)", Busy),
        (11, "rsync: mkdir failed: Permission denied (13)", Denied),
        (12, "rsync: connection unexpectedly closed", Interrupted),
        (30, "io timeout after 10 seconds", TimedOut),
        (2, "protocol version mismatch -- is your shell clean?", Misconfigured),
        (1, "unknown option", Misconfigured),
        (127, "sh: 1: rsync: not found", Misconfigured),
        (99, "what is this", Interrupted),
    ],
)
def test_exit_codes_and_words(code: int, words: str, kind: type[Exception]) -> None:
    said = mock.Mock(hide=str, words="")
    assert type(protocol.Result(code, words, "", b"", said).failure()) is kind
    assert type(protocol.Result(code, "", words, b"", said).failure()) is kind
