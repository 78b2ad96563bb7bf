"""The ping of a check: a hint, never a verdict, and never a delay."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import SecretStr

from blocks.base import Target
from blocks.dicom import DicomTarget
from blocks.dicomweb import DicomWebTarget
from blocks.folder import FolderTarget
from blocks.rsync import RsyncTarget
from blocks.s3 import S3Target
from blocks.sftp import SftpTarget
from blocks.xnat import XnatTarget
from protocols.net import ping
from protocols.net.ping import Ping
from talaria.testing.process import as_loaded, free_port
from tasks.checking import check_target
from tests.servers.scp import scp
from tests.targets.dicom import dicom_target


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a script in the place of the system's ping; it writes its arguments into the file `called`."""

    def make(script: str) -> None:
        path = tmp_path / "ping"
        path.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return make


@pytest.mark.parametrize(
    ("script", "answered", "words"),
    [
        ("exit 0", True, "answered in"),
        ("exit 1", False, "no answer from"),
        ("echo 'ping: socket: Operation not permitted' >&2; exit 2", None, "Operation not permitted"),
        ("exit 126", None, "code 126"),
    ],
)
def test_what_the_system_s_program_says(
    script: str, answered: bool | None, words: str, program: Callable[[str], None], tmp_path: Path
) -> None:
    """It gets an address, never a name."""
    program(script)
    echo = Ping("localhost").result()
    assert echo.answered is answered
    assert words in echo.detail
    assert (tmp_path / "called").read_text().split()[-1] in ("127.0.0.1", "::1")


def test_no_answer_is_reported_in_time(monkeypatch: pytest.MonkeyPatch, program: Callable[[str], None]) -> None:
    monkeypatch.setattr(ping, "WAIT_S", 0.5)
    program("exec sleep 3")
    begun = time.monotonic()
    echo = Ping("127.0.0.1").result()
    assert time.monotonic() - begun < as_loaded(2)
    assert echo.answered is False
    assert "127.0.0.1" in echo.detail


def test_a_name_that_is_not_known(program: Callable[[str], None]) -> None:
    program("exit 0")
    echo = Ping("no-such-host.invalid").result()
    assert (echo.answered, echo.detail) == (None, "the name can't be resolved")


def test_a_name_that_takes_the_time(monkeypatch: pytest.MonkeyPatch, program: Callable[[str], None]) -> None:
    """A host that had no time to answer is not said to be silent."""
    program("exit 0")
    over = threading.Event()
    resolver = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: over.wait(20) and resolver(*args, **options))
    monkeypatch.setattr(ping, "WAIT_S", 0.2)
    echo = Ping("127.0.0.1").result()
    over.set()
    assert echo.answered is None
    assert "not resolved" in echo.detail


def test_without_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    tried = Ping("127.0.0.1")
    echo = tried.result()
    assert (echo.answered, echo.detail) == (None, "no ping program is installed here")
    assert tried.ms == 0  # nothing was waited for


# ---- as a probe of a check


@pytest.mark.parametrize(
    ("answered", "result"), [(True, "ok"), (False, "failed"), (None, "skipped")], ids=["ok", "failed", "skipped"]
)
def test_a_check_has_it_as_a_hint(
    answered: bool | None, result: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ping, "result", lambda self: ping.Echo(answered, "so it is"))
    with scp() as peer:
        health = check_target(dicom_target(peer.port, aet_target=peer.aet))
    assert health.ok
    assert health.error is None
    names = [probe.name for probe in health.probes]
    assert names[:3] == ["resolve", "ping", "tcp"]
    assert health.probes[1].result == result
    assert health.probes[1].detail == "so it is"
    assert health.probes[1].informative


def test_a_host_that_answers_pings_alone_is_not_healthy() -> None:
    health = check_target(dicom_target(free_port()))
    assert not health.ok
    assert {probe.name for probe in health.probes} >= {"ping", "tcp"}


def test_a_folder_has_no_host(tmp_path: Path) -> None:
    health = check_target(FolderTarget(folder=str(tmp_path)))
    assert "ping" not in {probe.name for probe in health.probes}


NODES: list[tuple[Target, str]] = [
    (DicomTarget(host="pacs.example.org"), "pacs.example.org"),
    (DicomTarget(host="[fe80::1]"), "fe80::1"),
    (DicomTarget(host="sender"), ""),
    (SftpTarget(host="nas", user="u", folder="/in"), "nas"),
    (RsyncTarget(host="192.0.2.1", user="u", folder="/in"), "192.0.2.1"),
    (
        XnatTarget(host="https://xnat.example.org:8443/app", project_id="P", user="u", password=SecretStr("p")),
        "xnat.example.org",
    ),
    (DicomWebTarget(url="http://[::1]:8042/dicom-web"), "::1"),
    (DicomWebTarget(url="file:///data/study"), ""),
    (DicomWebTarget(url="file://localhost/data/study"), ""),
    (S3Target(bucket="images"), ""),
    (S3Target(bucket="images", endpoint_url="https://minio.example.org:9000"), "minio.example.org"),
    (FolderTarget(folder="/data"), ""),
]


@pytest.mark.parametrize(("target", "node"), NODES, ids=lambda value: value if isinstance(value, str) else "")
def test_where_a_target_is(target: Target, node: str) -> None:
    assert target.node == node
