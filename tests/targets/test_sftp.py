"""SFTP targets: servers that lack this or that, folders, rooms, levels, speed of many small files."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from pydantic import SecretStr

from blocks.rsync import RsyncTarget
from blocks.sftp import Rename, SftpTarget
from protocols.ssh import packets as wire
from protocols.ssh.sftp import Sftp
from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import as_loaded
from talaria.testing.relay import relay
from tasks import DRIVERS
from tests.bad_sector import bad_from
from tests.servers.openssh import IS_ROOT, PASSWORD, Server, inside, openssh, shared, small_disk, temporary_user
from tests.servers.sftp_odd import Odd, odd
from tests.targets.remote_folder import RemoteFolder, content, ssh_target
from tests.targets.sftp import odd_target
from tests.watching import watched
from transfer.errors import Busy, Cancelled, DispatchError, Misconfigured, Retryable
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import Level, PushReport, State


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return tmp_path / "study"


@contextmanager
def strange(tmp_path: Path, *without: str) -> Iterator[tuple[Odd, RemoteFolder]]:
    """A server of its own kind, and a target that sends into its folder `in`."""
    with odd(tmp_path / "odd", tmp_path / "root", without=without) as server:
        yield server, RemoteFolder(tmp_path / "root" / "in", odd_target(server, "/in"))


def target(folder: Path | str, server: Server | None = None, **more: object) -> SftpTarget:
    return ssh_target(SftpTarget, server or shared(), folder, **more)


def probes(target: SftpTarget) -> dict[str, str]:
    return {probe.name: probe.result for probe in DRIVERS.of(target).check(target).probes}


# ---- servers that lack something


def test_without_posix_rename_a_second_push_replaces_what_is_there(tmp_path: Path, study: Path) -> None:
    studies.ct(study, 3)
    with strange(tmp_path, "posix-rename", "limits") as (_, remote):
        assert probes(remote.target)["rename"] == "ok"  # type: ignore[arg-type]
        for _ in range(2):
            sent = attempt(remote.target, study)
            assert sent.require().state is State.DELIVERED
            assert not sent.require().notes
            assert remote.read_back(sent.plan) == content(sent)
            assert not remote.leftovers()


@pytest.mark.parametrize("setting", Rename)
def test_without_any_rename_files_go_under_their_final_names(tmp_path: Path, study: Path, setting: Rename) -> None:
    studies.ct(study, 3)
    with strange(tmp_path, "rename") as (server, remote):
        remote.target.rename = setting  # type: ignore[attr-defined]
        assert probes(remote.target)["rename"] == ("failed" if setting is Rename.AUTO else "ok")  # type: ignore[arg-type]
        for _ in range(2):
            sent = attempt(remote.target, study)
            receipt = sent.require()
            assert receipt.state is State.DELIVERED
            assert any("can't rename" in note for note in receipt.notes)
            assert remote.read_back(sent.plan) == content(sent)
            assert not remote.leftovers()
            assert ".complete" in {name.rsplit("/", 1)[-1] for name in remote.names()}
        # What goes wrong does not stay under a final name.
        studies.ct(study / "more", 2)
        with server.doing("shorten"):
            sent = attempt(remote.target, study)
        assert sent.rejected
        assert remote.read_back(sent.plan) == {}
        assert ".complete" not in {name.rsplit("/", 1)[-1] for name in remote.names() if sent.plan.dispatch_id in name}


def test_a_server_that_can_not_rename_is_told_so_by_the_check(tmp_path: Path) -> None:
    with strange(tmp_path, "rename") as (_, remote):
        health = DRIVERS.of(remote.target).check(remote.target)
        assert isinstance(health.error, Misconfigured)
        assert "set rename to never" in health.error.message
        assert not list((tmp_path / "root").rglob("*"))


@pytest.mark.parametrize("level", Level)
def test_a_hidden_stat_makes_listed_unverifiable_and_no_failure(tmp_path: Path, study: Path, level: Level) -> None:
    studies.ct(study / "a", 3)
    studies.ct(study / "b", 3)
    with strange(tmp_path, "stat") as (_, remote):
        remote.target.verify = level
        for _ in range(2):
            sent = attempt(remote.target, study)
            receipt = sent.require()
            assert receipt.state is State.DELIVERED
            assert remote.read_back(sent.plan) == content(sent)
            # Reading back proves it all the same.
            assert receipt.verified is (Level.PROVEN if level is Level.PROVEN else Level.ACCEPTED)
            assert any("length" in note for note in receipt.notes)
            assert any("not listed" in note for note in receipt.notes) == (level is not Level.ACCEPTED)


@pytest.mark.parametrize("without", [("sizes",), ("stat", "remove"), ("stat", "remove", "folders")], ids="+".join)
def test_a_server_that_hides_what_it_has_keeps_it_and_gets_no_probe_files(
    tmp_path: Path, study: Path, without: tuple[str, ...]
) -> None:
    studies.ct(study, 2)
    with strange(tmp_path, *without) as (_, remote):
        remote.target.verify = Level.LISTED
        sent = attempt(remote.target, study)
        assert sent.require().state is State.DELIVERED
        later = attempt(remote.target, sent.plan, done=sent.arrived)
        assert not later.rejected
        assert later.require().verified is Level.ACCEPTED
        assert any("not listed" in note for note in later.require().notes)
        folder = tmp_path / "root" / "in" / sent.plan.dispatch_id
        assert {path.name for path in folder.iterdir()} == {*content(sent), ".complete"}


def test_a_listing_ends_with_an_answer_that_names_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers shall say EOF (draft section 6.7); some say that there are no more."""
    name = wire.string(b"one") + wire.string(b"-rw-r--r-- one") + bytes(4)
    answers = [wire.string(b"handle"), b"\0\0\0\1" + name, bytes(4), b""]
    session = Sftp.__new__(Sftp)
    monkeypatch.setattr(session, "_ask", mock.AsyncMock(side_effect=answers))
    assert asyncio.run(session.listdir(b"/in")) == [b"one"]


def test_what_nobody_may_read_is_listed_but_not_proven(tmp_path: Path, study: Path) -> None:
    studies.ct(study, 3)
    studies.multiframe(study / "large.dcm", 24)  # 12 MB: one that would be continued
    with strange(tmp_path, "read") as (_, remote):
        remote.target.verify = Level.PROVEN
        sent = attempt(remote.target, study)
        receipt = sent.require()
        assert receipt.verified is Level.LISTED
        assert any("not proven" in note for note in receipt.notes)
        assert remote.read_back(sent.plan) == content(sent)


def test_a_server_of_small_requests(tmp_path: Path, study: Path) -> None:
    """Without limits@openssh.com, no request carries more than what every server takes."""
    studies.multiframe(study / "large.dcm", 20)
    with strange(tmp_path, "limits", "posix-rename") as (_, remote):
        remote.target.verify = Level.PROVEN
        sent = attempt(remote.target, study)
        assert sent.require().verified is Level.PROVEN
        assert remote.read_back(sent.plan) == content(sent)


def test_no_space_left_in_the_servers_own_words_is_busy(tmp_path: Path, study: Path) -> None:
    studies.ct(study, 3)
    with strange(tmp_path) as (server, remote):
        with server.doing("full"):
            sent = attempt(remote.target, study)
            assert isinstance(sent.error, Busy), repr(sent.error)
            assert not remote.read_back(sent.plan)
        assert attempt(remote.target, study).require().state is State.DELIVERED


@pytest.mark.parametrize("method", ["password", "keyboard-interactive"])
def test_a_server_without_a_shell_proves_by_reading_back_and_runs_no_hook(
    tmp_path: Path, study: Path, method: str
) -> None:
    studies.ct(study, 3)
    with odd(tmp_path / "odd", tmp_path / "root", login=method) as server:
        one = odd_target(server, "/in", login=method)
        one.verify, one.on_complete = Level.PROVEN, True
        sent = attempt(one, study)
        assert sent.require().verified is Level.PROVEN
        assert probes(one)["hook"] == "failed"
        with pytest.raises(Misconfigured, match="no shell"):
            DRIVERS.of(one).hook(one, sent.plan, PushReport(), set())  # type: ignore[misc]


# ---- what is found out afterwards


@pytest.mark.parametrize(("command", "words"), [("false", "exit code 1"), ("echo not today", "not today")])
def test_an_account_whose_sftp_does_not_start_is_misconfigured(
    tmp_path: Path, study: Path, command: str, words: str
) -> None:
    studies.ct(study, 1)
    with openssh(tmp_path / "sshd", more=f"ForceCommand {command}") as server:
        one = target(tmp_path / "in", server, private_key=SecretStr(str(server.key)))
        error = attempt(one, study).error
        assert isinstance(error, Misconfigured), repr(error)
        assert words in error.message
        assert probes(one)["sftp"] == "failed"


def test_listed_takes_back_what_is_not_there(tmp_path: Path, study: Path) -> None:
    studies.ct(study, 4)
    one = target(tmp_path / "in", verify=Level.LISTED)
    first = attempt(one, study)
    folder = tmp_path / "in" / first.plan.dispatch_id
    (folder / "CT0002.dcm").unlink()
    (folder / "CT0003.dcm").write_bytes(b"short")
    (folder / ".complete").unlink()
    again = attempt(one, first.plan, done=[item.path for item in first.plan.items])
    receipt = again.require()
    assert set(again.rejected) == {"CT0002.dcm", "CT0003.dcm"}
    assert receipt.verified is Level.LISTED
    assert receipt.counts[Kind.ALREADY] == 2
    assert not (folder / ".complete").exists()


@pytest.mark.parametrize("shell", [True, False], ids=["sums", "read back"])
def test_proven_takes_back_what_is_not_the_same(tmp_path: Path, study: Path, shell: bool) -> None:
    studies.odd_names(study, studies.UNICODE_NAMES + studies.SHELL_NAMES)
    victim = "new\nline.dcm"
    with openssh(tmp_path / "sshd", more="" if shell else "ForceCommand internal-sftp") as server:
        one = target(tmp_path / "in", server, verify=Level.PROVEN)
        first = attempt(one, study)
        assert first.require().verified is Level.PROVEN
        file = tmp_path / "in" / first.plan.dispatch_id / victim
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        again = attempt(one, first.plan, done=[item.path for item in first.plan.items])
        assert set(again.rejected) == {victim}
        assert not file.exists(), "wrong bytes stay under a final name"
        # What was taken back goes again.
        done = {item.path for item in first.plan.items} - {victim}
        assert attempt(one, first.plan, done=done).require().state is State.DELIVERED
        assert file.read_bytes() == data


# ---- folders and names


def test_missing_parents_are_made_and_existing_folders_are_no_error(tmp_path: Path, study: Path) -> None:
    studies.ct(study / "a" / "b", 2)
    one = target(tmp_path / "x" / "y" / "z z")
    assert probes(one)["authorize"] == "ok"
    assert not (tmp_path / "x").exists()
    for _ in range(2):
        assert attempt(one, study).require().state is State.DELIVERED


def test_a_layout_of_several_folders_marks_each_when_it_is_whole(tmp_path: Path, study: Path) -> None:
    for modality in ("CT", "MR", "US"):
        studies.dicom(study / "all" / f"{modality}.dcm", Modality=modality)
        studies.dicom(study / f"{modality} only" / "1.dcm", Modality=modality)
    studies.note(study / "MR only" / "result.json")
    one = target(tmp_path / "in", layout="{PatientID}/{Modality}")
    plan = scan([study])
    obstacle = tmp_path / "in" / studies.PATIENT_ID / "US" / "all" / "US.dcm"
    obstacle.mkdir(parents=True)
    sent = attempt(one, plan)
    assert set(sent.rejected) == {"all/US.dcm"}
    assert "in the way" in sent.rejected["all/US.dcm"]
    got = {
        str(p.relative_to(tmp_path / "in" / studies.PATIENT_ID)) for p in (tmp_path / "in").rglob("*") if p.is_file()
    }
    assert got == {
        "CT/all/CT.dcm", "CT/CT only/1.dcm", "CT/.complete", "MR/all/MR.dcm", "MR/MR only/1.dcm",
        "MR/MR only/result.json", "MR/.complete", "US/US only/1.dcm",
    }  # fmt: skip
    obstacle.rmdir()
    rest = attempt(one, plan, done=sent.arrived)
    assert rest.require().state is State.DELIVERED
    assert (tmp_path / "in" / studies.PATIENT_ID / "US" / ".complete").exists()


def test_the_marker_of_an_earlier_dispatch_is_gone_while_another_one_comes_into_its_folder(
    tmp_path: Path, study: Path
) -> None:
    uid = studies.uid(56)
    studies.ct(study / "first", 3, study=uid)
    one = target(tmp_path / "in", layout="{StudyInstanceUID}")
    attempt(one, study).require()
    marker = tmp_path / "in" / uid / ".complete"
    assert marker.exists()
    studies.ct(study / "second", 6, study=uid)
    seen: list[bool] = []
    sent = attempt(one, study / "second", told=lambda *_: seen.append(marker.exists()))
    sent.require()
    assert seen == [False] * 6
    assert marker.exists()


@pytest.mark.parametrize("folder", [".", "in of mine", "/"])
def test_a_relative_folder_begins_at_home_and_the_root_is_one(tmp_path: Path, study: Path, folder: str) -> None:
    studies.ct(study / "a", 2)
    with strange(tmp_path) as (server, _):
        one = odd_target(server, folder)
        sent = attempt(one, study)
        assert sent.require().state is State.DELIVERED
        remote = RemoteFolder(server.root if folder in "./" else server.root / folder, one)
        assert remote.read_back(sent.plan) == content(sent)
        assert DRIVERS.of(one).check(one).ok


def test_a_file_where_a_folder_should_be_costs_what_lies_below_it(tmp_path: Path, study: Path) -> None:
    for name in ("a", "b"):
        studies.ct(study / name / "deep", 2)
    one = target(tmp_path / "in")
    plan = scan([study])
    (tmp_path / "in" / plan.dispatch_id).mkdir(parents=True)
    (tmp_path / "in" / plan.dispatch_id / "a").write_text("in the way")
    sent = attempt(one, plan)
    assert set(sent.rejected) == {"a/deep/CT0001.dcm", "a/deep/CT0002.dcm"}
    assert len(sent.arrived) == 2


@pytest.mark.parametrize("what", ["what is above", "the folder", "all files"])
def test_listed_takes_everything_back_where_everything_has_been_taken_away(
    tmp_path: Path, study: Path, what: str
) -> None:
    studies.ct(study, 2)
    one = target(tmp_path / "in", verify=Level.LISTED, layout="deep/er/{dispatch_id}")
    sent = attempt(one, study)
    assert sent.require().verified is Level.LISTED
    folder = tmp_path / "in" / "deep" / "er" / sent.plan.dispatch_id
    for file in folder.glob("*.dcm"):
        file.unlink()
    if what != "all files":
        shutil.rmtree(folder if what == "the folder" else tmp_path / "in" / "deep")
    again = attempt(one, sent.plan, done=sent.arrived)
    assert again.require().counts[Kind.REJECTED] == 2
    assert attempt(one, sent.plan).require().state is State.DELIVERED


@pytest.mark.parametrize("below", ["", "/deep/er"])
def test_a_file_in_the_place_of_the_target_is_told_by_the_check_and_the_push(
    tmp_path: Path, study: Path, below: str
) -> None:
    (tmp_path / "in").write_text("no folder")
    studies.ct(study, 1)
    one = target(tmp_path / f"in{below}")
    error = attempt(one, study).error
    assert isinstance(error, Misconfigured), repr(error)
    assert f"{tmp_path}/in: there is a file where" in error.message
    health = DRIVERS.of(one).check(one)
    assert next(probe for probe in health.probes if probe.result == "failed").name == "authorize"
    assert isinstance(health.error, Misconfigured)


def test_a_name_that_is_too_long_there_is_rejected_alone(tmp_path: Path, study: Path) -> None:
    studies.ct(study, 3)
    with strange(tmp_path) as (server, remote), server.doing("refuse CT0002"):
        sent = attempt(remote.target, study)
        assert set(sent.rejected) == {"CT0002.dcm"}
        assert "refused" in sent.rejected["CT0002.dcm"]
        assert not remote.leftovers()


# ---- no room, no right


def test_a_full_disk_is_busy_with_the_figure_and_fine_after_room_is_made(tmp_path: Path, study: Path) -> None:
    for number in range(4):
        studies.multiframe(study / f"{number}.dcm", 8)  # 4 MB each
    with small_disk(tmp_path, "size=20m") as server:
        one = target("/mnt/in", server)
        inside(server, "head -c 12000000 /dev/zero >/mnt/ballast")
        sent = attempt(one, study)
        assert isinstance(sent.error, Busy), repr(sent.error)
        assert "bytes are free" in sent.error.message
        assert not sent.rejected
        inside(server, "rm /mnt/ballast")
        rest = attempt(one, study, done=sent.arrived)
        assert rest.require().state is State.DELIVERED
        names = inside(server, f"ls -A /mnt/in/{rest.plan.dispatch_id}").split()
        assert names == [".complete", "0.dcm", "1.dcm", "2.dcm", "3.dcm"]


def test_a_disk_without_room_for_a_folder_is_busy(tmp_path: Path, study: Path) -> None:
    for name in "abcdef":
        studies.ct(study / name, 1)
    with small_disk(tmp_path, "size=20m,nr_inodes=6") as server:
        sent = attempt(target("/mnt/in", server), study)
        assert isinstance(sent.error, Busy), repr(sent.error)
        assert "no room" in sent.error.message
        assert not sent.rejected


@contextmanager
def jailed(tmp_path: Path, jail: Path) -> Iterator[SftpTarget]:
    """A user of SFTP alone: shut into `jail` by root, else only begun in it."""
    if not IS_ROOT:
        with openssh(tmp_path / "sshd", more=f"ForceCommand internal-sftp -d {jail / 'upload'}") as server:
            yield target("of mine", server)
        return
    with temporary_user(tmp_path / "home") as user:
        subprocess.run(["chown", f"{user}:", str(jail / "upload")], check=True)
        # Every folder on the way to a jail must be root's alone, which /tmp is not.
        script = f'mount --make-rprivate /; mount --bind {jail} /srv; exec "$@"'
        more = "Match all\nChrootDirectory /srv\nForceCommand internal-sftp -d /upload"
        before = ("unshare", "-m", "sh", "-c", script, "sh")
        with openssh(tmp_path / "sshd", passwords=True, user=user, more=more, before=before) as server:
            yield target("of mine", server, private_key=SecretStr(""), password=SecretStr(PASSWORD))


def test_a_user_of_sftp_only(tmp_path: Path, study: Path) -> None:
    studies.ct(study / "a", 3)
    with tempfile.TemporaryDirectory(prefix="talaria-jail-") as folder:
        jail = Path(folder)
        jail.chmod(0o755)
        (jail / "upload").mkdir()
        with jailed(tmp_path, jail) as one:
            one.verify = Level.PROVEN
            sent = attempt(one, study)
            assert sent.require().verified is Level.PROVEN
            assert RemoteFolder(jail / "upload" / "of mine", one).read_back(sent.plan) == content(sent)
            assert DRIVERS.of(one).check(one).ok
            # rsync needs a shell, and says so.
            shared = one.model_dump(
                include=set(RsyncTarget.model_fields) & set(SftpTarget.model_fields) - {"concurrency"}
            )
            other = RsyncTarget(**shared)
            error = attempt(other, study).error
            assert isinstance(error, Misconfigured), repr(error)
            assert "no shell" in error.message
            results = {probe.name: probe.result for probe in DRIVERS.of(other).check(other).probes}
            assert (results["authenticate"], results["shell"], results["authorize"]) == ("ok", "failed", "skipped")


def test_two_targets_that_lead_to_the_same_place_leave_each_other_alone(tmp_path: Path, study: Path) -> None:
    studies.ct(study, 40)
    studies.multiframe(study / "large.dcm", 16)  # 8 MB
    plan = scan([study])
    (tmp_path / "in" / "same").mkdir(parents=True)
    fast, slow = target(tmp_path / "in", layout="same"), target(tmp_path / "in", layout="same")
    fast.named("fast")
    slow.named("slow")
    slow.bandwidth_limit = plan.size // 2
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda one: attempt(one, plan), (slow, fast)))
    for sent in both:
        assert sent.require().state is State.DELIVERED, sent.rejected
    there = {path.name for path in (tmp_path / "in" / "same").iterdir()}
    assert there == {item.path for item in plan.items} | {".complete"}


# ---- several connections, long links


def test_several_connections_share_large_files(tmp_path: Path, study: Path) -> None:
    for number in range(6):
        studies.multiframe(study / f"{number}.dcm", 32)  # 16 MB each
    server = shared()
    with relay(server.port) as link:
        one = target(tmp_path / "in", port=link.port, concurrency=3)
        sent = attempt(one, study)
        assert link.connections == 3
    sent.require()
    assert RemoteFolder(tmp_path / "in", one).read_back(sent.plan) == content(sent)


def test_connections_that_are_refused_are_done_without(tmp_path: Path, study: Path) -> None:
    for number in range(3):
        studies.multiframe(study / f"{number}.dcm", 40)
    with openssh(tmp_path / "sshd", more="MaxStartups 1:100:1\nPerSourceMaxStartups 1") as server:
        one = target(tmp_path / "in", server, concurrency=4)
        for _ in range(5):  # the connection that saw the server begin may still count
            sent = attempt(one, study)
            if not isinstance(sent.error, Busy):
                break
        assert sent.require().state is State.DELIVERED


def test_many_small_files_over_a_long_link(tmp_path: Path, study: Path) -> None:
    """200 files at a round trip of 50 ms: one after the other, they would take 40 s and more."""
    studies.ct(study, 200)
    with relay(shared().port, delay_s=0.025) as link:
        sent = attempt(target(tmp_path / "in", port=link.port), study)
        assert sent.require().state is State.DELIVERED
        assert sent.seconds < as_loaded(10)


def test_a_server_that_falls_silent_is_timed_out(tmp_path: Path, study: Path) -> None:
    studies.multiframe(study / "large.dcm", 40)
    with relay(shared().port, stall_after=6_000_000) as link:
        one = target(tmp_path / "in", port=link.port, idle_timeout_s=2)
        sent = attempt(one, study)
        assert isinstance(sent.error, Retryable), repr(sent.error)
        assert type(sent.error).__name__ == "TimedOut"
        assert sent.seconds < as_loaded(12)


def test_memory_does_not_grow_with_a_file(tmp_path: Path, study: Path) -> None:
    """Sent from a process of its own, whose peak is measured."""
    study.mkdir()
    with open(study / "large.bin", "wb") as file:
        file.truncate(400 << 20)
    code = f"""
import resource
from pathlib import Path
from blocks.sftp import SftpTarget
from tests.servers.openssh import Server
from tests.targets.remote_folder import ssh_target
from talaria.testing.harness import attempt
server = {shared()!r}
import os
os.environ["TALARIA_HOME"] = {os.environ["TALARIA_HOME"]!r}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attempt(ssh_target(SftpTarget, server, {str(tmp_path / "in")!r}), Path({str(study)!r})).require()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    code = code.replace("PosixPath", "Path")
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert int(done.stdout.split()[-1]) < 48 << 10  # KiB


def test_nothing_half_is_ever_seen_while_many_files_come(tmp_path: Path, study: Path) -> None:
    studies.ct(study / "small", 300, side=64)
    studies.multiframe(study / "large.dcm", 60)
    plan = scan([study])
    (tmp_path / "in").mkdir()
    with watched(tmp_path / "in", study, [item.path for item in plan.items], plan.dispatch_id) as seen:
        attempt(target(tmp_path / "in"), plan).require()
    assert not seen.wrong
    assert seen.looks > 3


def test_a_push_that_is_cancelled_while_it_logs_in(tmp_path: Path, study: Path) -> None:
    studies.ct(study, 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        cancelled = threading.Event()
        threading.Timer(0.5, cancelled.set).start()
        one = target(tmp_path / "in", port=silent.getsockname()[1], connect_timeout_s=30, idle_timeout_s=60)
        sent = attempt(one, study, cancelled=cancelled)
        assert isinstance(sent.error, Cancelled)
        assert sent.seconds < as_loaded(5)
        assert isinstance(sent.error, DispatchError)


@pytest.mark.parametrize("offset", [0, 5_000_000])
def test_a_file_that_can_not_be_read_to_its_end_is_rejected_alone(
    tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    studies.ct(study, 4)
    bad = studies.multiframe(study / "CT0001.bad.dcm", 20)  # 10 MB
    plan, one = scan([study]), target(tmp_path / "in")
    with monkeypatch.context() as broken:
        bad_from(broken, bad, offset)
        sent = attempt(one, plan)
        assert sent.require().state is State.PARTIAL
        assert list(sent.rejected) == [bad.name] and "can't be read: Input/output error" in sent.rejected[bad.name]
        assert len(sent.arrived) == 4
    assert attempt(one, plan, done=sent.arrived).require().state is State.DELIVERED  # and goes on with what is there


def test_an_error_of_who_counts_the_bytes_ends_the_push(tmp_path: Path, study: Path) -> None:
    studies.ct(study, 3)

    def moved(count: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        DRIVERS["sftp"].push(target(tmp_path / "in"), scan([study]), PushReport(moved=moved))
