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
from tests.servers.dicomweb import Reply, Request, Scripted, as_json, as_xml, uid_of
from tests.targets.dicomweb import dicomweb_target
from tests.targets.dicomweb_query.finding import hold
from tests.targets.dicomweb_target.services import PASSWORD, names
from transfer.errors import (
    Busy,
    Cancelled,
    Denied,
    DispatchError,
    Misconfigured,
    NotFound,
    Unauthorized,
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
        (401, "authenticate", Unauthorized),
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


@pytest.mark.parametrize("status", [406, 400, 500])
@pytest.mark.parametrize("form", ["application/dicom; transfer-syntax=*", "application/dicom", "*/*"])
def test_check_asks_for_instances_in_all_forms_that_a_retrieval_asks_for(
    server: Scripted, form: str, status: int
) -> None:
    hold(server, studies.ct_bytes())
    server.gives = "single"
    usual = server._usual

    def answer(request: Request) -> Reply:
        refused = request.path.count("/") == 7 and request.headers["accept"] != form
        return Reply(status) if refused else usual(request)

    server._usual = answer  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url, direction="query"))
    assert health.ok, health
    assert health.probes[-1].detail == "gives instances"


def test_check_where_the_first_studies_can_not_be_given(server: Scripted) -> None:
    """They may be on tape, or lost; a retrieval of others works."""
    uids = hold(server, *(studies.dataset(study=f"1.2.3.{number}") for number in range(3)))
    server.withheld = set(uids[:2])
    health = check(dicomweb_target(server.url, direction="query"))
    assert health.ok and health.probes[-1].detail == "gives instances"
    server.withheld = set(uids)
    assert type(check(dicomweb_target(server.url, direction="query")).error) is NotFound


def test_check_where_instances_are_not_listed(server: Scripted) -> None:
    hold(server, studies.ct_bytes())
    usual = server._search
    server._search = lambda segments, query: (  # type: ignore[method-assign]
        Reply(404) if segments[-1] == "instances" else usual(segments, query)
    )
    health = check(dicomweb_target(server.url, direction="query"))
    assert health.ok and health.probes[-1].detail == "gives instances"


@pytest.mark.parametrize("status", [400, 413])
@pytest.mark.parametrize("refused", ["limit", "everything"])
def test_check_where_searches_are_refused_that_no_query_needs(server: Scripted, refused: str, status: int) -> None:
    hold(server, studies.ct_bytes())
    usual = server._search

    def search(segments: list[str], query: list[tuple[str, str]]) -> Reply:
        keys = {key for key, _ in query}
        wide = segments == ["studies"] and not keys - {"limit", "offset", "includefield"}
        return Reply(status) if ("limit" in keys if refused == "limit" else wide) else usual(segments, query)

    server._search = search  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url, direction="query"))
    assert health.ok, health
    [qido] = [probe for probe in health.probes if probe.name == "qido"]
    assert str(status) in qido.detail


@pytest.mark.parametrize("body", [b'{"results": []}', b"[{}, 7]"])
def test_check_of_searches_whose_answers_no_query_can_read(server: Scripted, body: bytes) -> None:
    server._search = lambda segments, query: Reply(200, body)  # type: ignore[method-assign]
    assert "qido" in names(check(dicomweb_target(server.url, direction="query")), "failed")


def test_check_of_searches_that_are_answered_in_parts_of_xml(server: Scripted) -> None:
    """As PS3.18 has it for servers without JSON."""
    row = {"0020000D": {"vr": "UI", "Value": ["1.2.3"]}}
    body = b"--b\r\nContent-Type: application/dicom+xml\r\n\r\n" + as_xml(row) + b"\r\n--b--"
    usual = server._usual

    def answer(request: Request) -> Reply:
        if request.method != "GET" or not request.path.endswith("studies"):
            return usual(request)
        xml = "multipart/related" in request.headers["accept"]
        return Reply(200, body, 'multipart/related; type="application/dicom+xml"; boundary=b') if xml else Reply(406)

    server._usual = answer  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url, direction="query"))
    assert health.ok, health


def test_check_of_a_server_that_ignores_the_limit(server: Scripted) -> None:
    """Its list of studies is as long as a query reads."""
    row = {"0020000D": {"vr": "UI", "Value": ["1.2.3"]}}
    body = as_json([row]) + b" " * (17 << 20)
    usual = server._search
    server._search = lambda segments, query: (  # type: ignore[method-assign]
        Reply(200, body) if segments == ["studies"] else usual(segments, query)
    )
    assert check(dicomweb_target(server.url, direction="query")).ok


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(406), "406 Scripted; it can't give its answer as DICOM files here"),
        (Reply(200, b"<title>Sign in</title>", "text/html"), "text/html instead of DICOM files ('Sign in')"),
        (Reply(200, as_json({"message": "offline"}), "application/json"), "json instead of DICOM files ('offline')"),
        (Reply(200), "of no type instead of DICOM files"),
    ],
)
@pytest.mark.parametrize("empty", [False, True])
def test_check_says_what_came_instead_of_instances(server: Scripted, reply: Reply, words: str, *, empty: bool) -> None:
    if not empty or reply.status == 406:  # which says nothing of what is not there
        hold(server, studies.ct_bytes())
    server._retrieve = lambda segments: reply  # type: ignore[method-assign]
    health = check(dicomweb_target(server.url, direction="query"))
    assert names(health, "failed") == ["wado"]
    assert words in str(health.error) and "JSON or XML" not in str(health.error)


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
