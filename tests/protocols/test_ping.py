"""The ping of a check: a hint, never a verdict, and never a delay."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path
from typing import Any

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
from tasks.checking import check_target
from tests.servers.process import free_port
from tests.servers.scp import scp
from tests.targets.dicom import dicom_target


def allowed() -> bool:
    sock = ping._socket(socket.AF_INET)
    if sock is not None:
        sock.close()
    return sock is not None


def test_loopback_answers() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        echo = Ping(host).result()
        if allowed():
            assert echo.answered is True, echo
            assert "answered in" in echo.detail
        else:
            assert echo.answered is None or echo.answered


def test_no_answer_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ping, "WAIT_S", 0.3)
    monkeypatch.setattr(ping, "_exchange", lambda *args: time.sleep(5))
    monkeypatch.setattr(ping, "_socket", lambda family: socket.socket())
    begun = time.monotonic()
    echo = Ping("127.0.0.1").result()
    assert time.monotonic() - begun < 0.6
    assert echo.answered is False
    assert "127.0.0.1" in echo.detail


def test_a_name_that_is_not_known() -> None:
    assert Ping("no-such-host.invalid").result().answered in (None,)


@pytest.mark.parametrize(("takes_s", "left"), [(0.1, r"within 0\.[3-8] s"), (0.8, "")])
def test_a_name_that_takes_the_time(takes_s: float, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that had no time to answer is not said to be silent."""
    resolver = socket.getaddrinfo

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(takes_s)
        return resolver(*args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(ping, "WAIT_S", 0.9)
    monkeypatch.setattr(
        ping, "_exchange", lambda sock, family, address, end: time.sleep(max(0, end - time.monotonic()))
    )
    monkeypatch.setattr(ping, "_socket", lambda family: socket.socket())
    asked = Ping("127.0.0.1")
    time.sleep(1)  # the check takes longer
    echo = asked.result()
    assert echo.answered is (False if left else None)
    assert re.search(left or "not resolved", echo.detail)


@pytest.mark.parametrize("code", [0, 1])
def test_by_the_program(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no socket is allowed; it gets an address, never a name."""
    program = tmp_path / "ping"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\nexit {code}\n')
    program.chmod(0o755)
    monkeypatch.setattr(ping, "_socket", lambda family: None)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert Ping("localhost").result().answered is (code == 0)
    assert (tmp_path / "called").read_text().split()[-1] in ("127.0.0.1", "::1")


def test_without_socket_and_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ping, "_socket", lambda family: None)
    monkeypatch.setenv("PATH", "/nowhere")
    echo = Ping("127.0.0.1").result()
    assert echo.answered is None
    assert echo.detail


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
