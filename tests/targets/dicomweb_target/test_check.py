"""The check of a DICOMweb target."""

from __future__ import annotations

import pickle
import socket
import threading
from typing import Any

import pytest

from talaria.testing import process, studies
from talaria.testing.harness import attempt
from talaria.testing.process import as_loaded
from tasks.dicomweb import check, push
from tests.servers.dicomweb import Reply, Request, Scripted, uid_of
from tests.targets.dicomweb import dicomweb_target
from tests.targets.dicomweb_target.services import PASSWORD, names
from transfer.errors import (
    Busy,
    Cancelled,
    Denied,
    DispatchError,
    Misconfigured,
    NotFound,
    Unreachable,
)
from transfer.plan import Plan
from transfer.receipt import Level, PushReport, State


def test_check_all(server: Scripted) -> None:
    data = studies.ct_bytes()
    server.stored[uid_of(data)] = data
    before = dict(server.stored)
    health = check(dicomweb_target(server.url, direction="both"))
    assert health.ok, health
    assert names(health, "ok") == ["resolve", "tcp", "authenticate", "authorize", "qido", "stow", "wado"]
    assert server.stored == before
    assert "127.0.0.1" in health.probes[0].detail


def test_check_of_an_empty_archive(server: Scripted) -> None:
    health = check(dicomweb_target(server.url))
    assert health.ok
    assert "not there" in health.probes[-1].detail


def test_check_that_only_stores(server: Scripted) -> None:
    server._search = lambda segments, query: Reply(404)  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url, direction="store"))
    assert health.ok
    assert names(health, "failed") == ["qido"]
    assert names(health, "skipped") == ["wado"]
    health = check(dicomweb_target(server.url, direction="store", verify=Level.LISTED))
    assert not health.ok
    assert type(health.error) is NotFound


def test_check_that_only_queries(server: Scripted) -> None:
    server._store = lambda request: Reply(403)  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url, direction="query"))
    assert health.ok
    assert names(health, "skipped") == ["stow"]
    assert not server.of("POST")


@pytest.mark.parametrize(
    ("status", "probe", "error"),
    [
        (401, "authenticate", Denied),
        (403, "authorize", Denied),
        (404, "stow", NotFound),
        (405, "stow", Misconfigured),
        (500, "stow", Busy),
        (503, "stow", Busy),
    ],
)
def test_check_stow(server: Scripted, status: int, probe: str, error: type[DispatchError]) -> None:
    server._store = lambda request: Reply(status, b"<h1>why</h1>", "text/html")  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url))
    assert names(health, "failed") == [probe]
    assert type(health.error) is error
    assert "why" in health.error.message


@pytest.mark.parametrize("status", [200, 204, 400, 409, 422])
def test_check_stow_that_answers(server: Scripted, status: int) -> None:
    """What a refusal of a request without instances leaves open is said."""
    server._store = lambda request: Reply(status)  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url))
    assert health.ok
    [stow] = [probe for probe in health.probes if probe.name == "stow"]
    assert ("only a push can show whether it takes instances" in stow.detail) is (status >= 400)


def test_check_stow_that_takes_no_instances(server: Scripted, plan: Plan) -> None:
    """A web server that refuses the type of content, of whatever it gets: the check fails as the push does."""
    server._store = lambda request: Reply(415, b"<h1>Unsupported Media Type</h1>", "text/html")  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url))
    assert names(health, "failed") == ["stow"]
    assert type(health.error) is Misconfigured
    assert "415" in health.error.message and "does not take this type of content" in health.error.message
    sent = attempt(dicomweb_target(server.url), plan)
    assert not sent.arrived and len(sent.rejected) == len(plan.items)


def test_check_stow_that_looks_into_parts_before_it_takes_their_type(server: Scripted) -> None:
    def store(request: Request) -> Reply:
        dicom = [part[128:132] == b"DICM" for part in request.parts]
        return Reply(409 if dicom and all(dicom) else 415)

    server._store = store  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url))
    assert health.ok, health
    assert not server.stored


def test_check_stow_that_stumbles_over_an_empty_request(server: Scripted) -> None:
    def store(request: Request) -> Reply:
        return Reply(400 if request.body.count(b"--talaria") == 2 else 500)

    server._store = store  # type: ignore[method-assign]
    assert check(dicomweb_target(server.url)).ok


def test_check_web_server_that_is_no_archive(server: Scripted) -> None:
    page = Reply(200, b"<html><title>It works!</title></html>", "text/html")
    server._usual = lambda request: page  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url))
    assert names(health, "failed") == ["qido", "stow", "wado"]
    assert "It works!" in str(health.probes)


@pytest.mark.parametrize("status", [400, 406, 409, 415])
@pytest.mark.parametrize("direction", ["store", "both", "query"])
@pytest.mark.parametrize("credentials", [{}, {"http_user": "lab", "http_password": PASSWORD}])
def test_check_web_server_that_says_the_same_to_everything(
    server: Scripted, status: int, direction: str, credentials: dict[str, Any]
) -> None:
    """That the credentials are accepted, or that there is a service, is said of no such answer."""
    server._usual = lambda request: Reply(status, b"no")  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url, direction=direction, **credentials))
    assert not health.ok
    assert names(health, "failed") == ["authenticate"]
    assert str(status) in str(health.error)
    assert "accepted" not in str(health.probes)


def test_check_service_that_takes_only_instances(server: Scripted) -> None:
    """It answers 400 to a request without any, and isn't taken for a web server."""
    server._store = lambda request: Reply(400)  # type: ignore[method-assign]
    server._search = lambda segments, query: Reply(404)  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url, direction="store"))
    assert health.ok, health


def test_check_nobody_there() -> None:
    health = check(dicomweb_target(f"http://127.0.0.1:{process.free_port()}/rs"))
    assert names(health, "ok") == ["resolve"]
    assert names(health, "failed") == ["tcp"]
    assert type(health.error) is Unreachable
    assert "refused" in health.error.message.lower()
    health = check(dicomweb_target("http://no-such-host.invalid/rs"))
    assert names(health, "failed") == ["resolve"]
    assert type(health.error) is Unreachable


def test_check_says_that_credentials_go_unencrypted(server: Scripted) -> None:
    health = check(dicomweb_target(server.url, http_user="lab", http_password=PASSWORD))
    assert "unencrypted" in str(health.probes)


def test_name_that_is_resolved_too_slowly(server: Scripted, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()
    resolver = socket.getaddrinfo

    def slow(host: str, *args: Any, **options: Any) -> Any:
        if host != "localhost":
            return resolver(host, *args, **options)
        asked.wait(10)
        return resolver(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    url = server.url.replace("127.0.0.1", "localhost")
    sent = attempt(dicomweb_target(url, connect_timeout_s=0.5), plan)
    assert type(sent.error) is Unreachable
    assert "not resolved within 0.5 s" in sent.error.message
    assert sent.seconds < as_loaded(3)
    cancelled = threading.Event()
    timer = threading.Timer(0.3, cancelled.set)
    timer.start()
    assert type(attempt(dicomweb_target(url, connect_timeout_s=60), plan, cancelled=cancelled).error) is Cancelled
    health = check(dicomweb_target(url, connect_timeout_s=0.5))
    assert [probe.name for probe in health.probes if probe.result == "failed"] == ["resolve"]
    asked.set()
    assert attempt(dicomweb_target(url, connect_timeout_s=5), plan).require().state is State.DELIVERED


def test_connection_that_is_never_made(plan: Plan) -> None:
    """A listener whose queue is full answers no SYN: the connect timeout ends the wait."""
    import socket

    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        try:
            sent = attempt(dicomweb_target(f"http://127.0.0.1:{port}/rs", connect_timeout_s=1, concurrency=1), plan)
            assert type(sent.error) is Unreachable
            assert "1 s" in sent.error.message
            assert sent.seconds < as_loaded(4)
        finally:
            for filler in fillers:
                filler.close()


def test_errors_survive_pickling(server: Scripted, plan: Plan) -> None:
    server.script = [Reply(503, headers={"Retry-After": "7"})]
    error = attempt(dicomweb_target(server.url), plan).error
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.retry_after) == (Busy, str(error), 7)


def test_bad_certificate_setting(plan: Plan) -> None:
    target = dicomweb_target("https://127.0.0.1:1/rs", ca_cert="/nonexistent.pem")
    assert not check(target).ok
    with pytest.raises(DispatchError):
        push(target, plan, PushReport())
