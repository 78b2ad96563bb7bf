"""Servers, proxies and connections that misbehave before XNAT."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pydicom
import pytest

from talaria.testing import studies
from talaria.testing.harness import Sent, attempt
from talaria.testing.process import as_loaded
from talaria.testing.relay import relay
from tests.servers.xnat import Fault, Reply, Xnat, error
from tests.targets.xnat import xnat_target
from tests.targets.xnat_push.pushing import _sop, all_of, fails
from transfer.errors import (
    Busy,
    Denied,
    DispatchError,
    Interrupted,
    Misconfigured,
    TimedOut,
)
from transfer.outcome import Kind
from transfer.plan import scan

PAGE = Reply("<!DOCTYPE html><html><head><title>Please log in</title></head><body></body></html>", kind="text/html")


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/data/JSESSION", Misconfigured), ("/data/projects", Interrupted), ("/data/prearchive/.*", Interrupted)],
)
def test_a_page_is_no_answer(server: Xnat, study: Path, path: str, expected: type[DispatchError]) -> None:
    studies.ct(study, 1)
    server.faults.append(Fault("GET", path, PAGE))
    assert "Please log in" in str(fails(attempt(xnat_target(server.url), study), expected))


def test_a_page_after_the_upload_is_no_success(server: Xnat, study: Path) -> None:
    studies.ct(study, 1)
    server.faults.append(Fault("POST", "/data/services/import", PAGE))
    fails(attempt(xnat_target(server.url), study), Interrupted)


@pytest.mark.parametrize("where", ["https://sso.example.org/login?next=secret", "/app/template/Login.vm"])
def test_redirects_are_not_followed(server: Xnat, study: Path, where: str) -> None:
    studies.ct(study, 1)
    away = Reply("", 302, "text/html", {"Location": where})
    server.faults.append(Fault("GET", "/data/JSESSION", away))
    problem = fails(attempt(xnat_target(server.url), study), Misconfigured)
    assert "set host" in str(problem)
    assert "secret" not in str(problem)
    server.faults.append(Fault("POST", "/data/services/import", away))  # the session has expired in the meantime
    fails(attempt(xnat_target(server.url), study), Interrupted)


@pytest.mark.parametrize("read_body", [True, False])
def test_proxy_that_answers_502(server: Xnat, study: Path, read_body: bool) -> None:
    studies.multiframe(study / "large.dcm", 16)  # 8 MB: the answer comes while it is being sent
    reply = Reply("<html><head><title>502 Bad Gateway</title></head></html>", 502, "text/html", {"Retry-After": "17"})
    server.faults.append(Fault("POST", "/data/services/import", reply, read_body=read_body))
    problem = fails(attempt(xnat_target(server.url), study), Busy)
    assert isinstance(problem, Busy)
    assert problem.retry_after == 17
    assert "502 Bad Gateway" in str(problem)


def test_proxy_that_limits_bodies(server: Xnat, study: Path) -> None:
    studies.multiframe(study / "large.dcm", 16)
    studies.ct(study / "small", 2)
    reply = Reply("<html><head><title>413 Request Entity Too Large</title></head></html>", 413, "text/html")
    server.faults.append(Fault("POST", "/data/services/import", reply, read_body=False))
    sent = attempt(xnat_target(server.url, concurrency=1), study)
    assert len(sent.rejected) in (1, 2), "the others go on"
    assert "413 Request Entity Too Large" in next(iter(sent.rejected.values()))


@pytest.mark.parametrize(
    ("status", "words", "expected"),
    [
        (403, "Forbidden", Denied),
        (404, "Unknown importer implementation specified: DICOM-zip", Misconfigured),
        (400, "Parameter dest format error", Misconfigured),
        (400, "unable to read data from file", Interrupted),
        (423, "Duplicate archive attempt. Prearchive session already archiving.", Busy),
        (409, "Session processing may already be in progress: Transfer.", Busy),
        (500, "java.lang.NullPointerException", Busy),
        (503, "down for maintenance", Busy),
    ],
)
def test_refusals(server: Xnat, study: Path, status: int, words: str, expected: type[DispatchError]) -> None:
    studies.ct(study, 1)
    server.faults.append(Fault("POST", "/data/services/import", error(status, words)))
    assert words[:20] in str(fails(attempt(xnat_target(server.url), study), expected))


def test_files_of_a_broken_import_still_being_written(server: Xnat, study: Path) -> None:
    studies.ct(study, 2)
    words = "Concurrent file sends of the same data is not supported."
    server.faults.append(Fault("POST", "/data/services/import", error(400, words)))
    assert all_of(attempt(xnat_target(server.url), study), Kind.DELIVERED)
    assert len(server.imports) == 2
    server.faults.append(Fault("POST", "/data/services/import", error(400, words), times=9))
    server.store.experiments.clear()
    fails(attempt(xnat_target(server.url, idle_timeout_s=1), study), Busy)
    server.faults.clear()


def test_stalled_link_is_TimedOut(server: Xnat, study: Path) -> None:
    studies.multiframe(study / "large.dcm", 16)
    with relay(server.port, stall_after=1 << 20) as link:
        begun = time.monotonic()
        fails(attempt(xnat_target(f"http://127.0.0.1:{link.port}", idle_timeout_s=1), study), TimedOut)
        assert time.monotonic() - begun < as_loaded(8)
    server.store.logins.clear()  # nothing could be said any more


def test_changed_file_stops_its_study_only_for_a_moment(server: Xnat, study: Path) -> None:
    """Nothing of the import with the changed file is archived; the study goes again without it."""
    uid = studies.uid(56)
    studies.ct(study, 3, study=uid)
    victim = studies.multiframe(study / "large.dcm", 8, study=uid)
    plan = scan([study])
    archived: list[int] = []

    def moved(sent: Sent, count: int) -> None:
        archived.append(len(server.store.experiments))
        if sent.moved > 500_000 and len(server.imports) == 1:
            with victim.open("r+b") as file:
                file.write(b"changed")

    sent = attempt(xnat_target(server.url, bandwidth_limit=8 << 20), plan, moved=moved)
    assert set(sent.rejected) == {"large.dcm"}
    assert "changed" in sent.rejected["large.dcm"]
    assert len(sent.arrived) == len(server.instances()) == 3
    assert len(server.imports) == 2
    assert max(archived) == 0


def test_vanished_file(server: Xnat, study: Path) -> None:
    studies.ct(study, 3)
    studies.multiframe(study / "large.dcm", 4)
    plan = scan([study])
    (study / "CT0002.dcm").unlink()
    (study / "large.dcm").unlink()
    sent = attempt(xnat_target(server.url), plan)
    assert set(sent.rejected) == {"CT0002.dcm", "large.dcm"}
    assert len(sent.arrived) == 2


@pytest.mark.parametrize("large", [False, True])
def test_a_data_set_without_its_beginning_arrives_as_a_file(server: Xnat, study: Path, large: bool) -> None:
    """XNAT reads files as PS3.10 has them."""
    uid = studies.uid(56)
    whole = studies.multiframe(study / "large.dcm", 5, study=uid) if large else studies.ct(study, 1, study=uid)[0]
    header = scan([whole]).items[0].header
    assert header
    data = whole.read_bytes()
    whole.with_name("bare.dcm").write_bytes(data[header.dataset_offset :])
    whole.unlink()
    sent = attempt(xnat_target(server.url), study)
    assert all_of(sent, Kind.DELIVERED), sent.rejected or sent.refused
    [got] = server.instances().values()
    ds = pydicom.dcmread(io.BytesIO(got))
    assert ds.file_meta.TransferSyntaxUID == header.TransferSyntaxUID
    assert ds.file_meta.MediaStorageSOPInstanceUID == header.SOPInstanceUID
    assert got.endswith(data[header.dataset_offset :])


def test_large_and_small_files_arrive_whole(server: Xnat, study: Path) -> None:
    uid = studies.uid(56)
    studies.ct(study, 40, side=100, study=uid)
    for frames in (4, 9, 2, 5):
        studies.multiframe(study / f"m{frames}.dcm", frames, study=uid)
    sent = attempt(xnat_target(server.url), study)
    assert all_of(sent, Kind.DELIVERED)
    got = server.instances()
    assert got == {_sop(sent, item.path): sent.plan.file(item).read_bytes() for item in sent.plan.items}
    assert len(server.imports) == 1


def test_bandwidth_limit(server: Xnat, study: Path) -> None:
    for name in "ab":
        studies.multiframe(study / f"{name}.dcm", 2)  # 1 MB each
    sent = attempt(xnat_target(server.url, bandwidth_limit=1 << 20), study)
    assert all_of(sent, Kind.DELIVERED)
    assert 1.5 < sent.seconds < as_loaded(4), "both studies share one limit"


def test_environment_has_no_say(server: Xnat, study: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    studies.ct(study, 1)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login other password other\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere")
    assert all_of(attempt(xnat_target(server.url), study), Kind.DELIVERED)
