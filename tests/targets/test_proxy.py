"""Targets behind an HTTP proxy: a real one, with and without a password, to servers with and without TLS."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import SecretStr, ValidationError

from blocks.base import Target
from protocols.http.proxy import Proxy
from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import free_port
from talaria.testing.relay import relay
from tasks import DRIVERS
from tests.servers.certificates import Authority
from tests.servers.dicomweb import scripted
from tests.servers.orthanc import tls_front
from tests.servers.proxy import PASSWORD, USER, TinyProxy, tinyproxy
from tests.servers.s3_stub import stub
from tests.servers.xnat import xnat
from tests.targets.dicomweb import dicomweb_target
from tests.targets.s3 import stub_target
from tests.targets.xnat import xnat_target
from transfer.errors import Denied, DispatchError, Interrupted, Misconfigured, Retryable, TimedOut, Unreachable
from transfer.health import Health
from transfer.receipt import State

CREDENTIALS = f"{USER}:pr0xy%2Dpass_w.ord"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    studies.ct(tmp_path / "study", 3)
    studies.multiframe(tmp_path / "study" / "large.dcm", 4)
    return tmp_path / "study"


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[TinyProxy]:
    with tinyproxy(tmp_path / "proxy", password=PASSWORD) as running:
        yield running


@pytest.fixture(autouse=True)
def no_proxies_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@dataclass
class Server:
    """A server, and how a target for it is made."""

    port: int
    make: Callable[..., Target]


@contextmanager
def _s3(folder: Path, context: ssl.SSLContext | None, ca: str) -> Iterator[Server]:
    with stub(context) as store:
        store.buckets["lab"] = {}
        settings = {"ca_cert": ca, "multipart_bytes": 5 << 20} if context else {}
        yield Server(store.port, partial(stub_target, store, tls=bool(context), **settings))


@contextmanager
def _dicomweb(folder: Path, context: ssl.SSLContext | None, ca: str) -> Iterator[Server]:
    with scripted(context) as server:
        client, secret = server.client
        server.authorization = lambda given: bool(server.tokens) and given == f"Bearer {server.tokens[-1]}"
        url = f"http{'s' if context else ''}://127.0.0.1:{server.port}"
        by_token = {"token_url": f"{url}/token", "client_id": client, "client_secret": secret, "ca_cert": ca}
        yield Server(
            server.port, partial(dicomweb_target, server.url.replace("http:", url[: url.index(":") + 1]), **by_token)
        )


@contextmanager
def _xnat(folder: Path, context: ssl.SSLContext | None, ca: str) -> Iterator[Server]:
    with xnat(folder / "xnat", tls=context) as server:
        port = int(server.url.rsplit(":", 1)[1])
        yield Server(port, partial(xnat_target, server.url, user="lab", password="lab", ca_cert=ca))


SERVERS: dict[str, Callable[[Path, ssl.SSLContext | None, str], AbstractContextManager[Server]]] = {
    "s3": _s3, "dicomweb": _dicomweb, "xnat": _xnat,
}  # fmt: skip


@contextmanager
def serving(kind: str, tls: bool, authority: Authority, folder: Path) -> Iterator[Server]:
    context = None
    if tls:
        leaf = authority.leaf(f"server-{kind}")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(leaf.cert, leaf.key)
    with SERVERS[kind](folder, context, str(authority.ca)) as server:
        yield server


def check(target: Target) -> Health:
    return DRIVERS.of(target).check(target)


def probes(health: Health) -> dict[str, tuple[str, str]]:
    return {probe.name: (probe.result, probe.detail) for probe in health.probes}


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("kind", SERVERS)
def test_delivery_and_check_by_way_of_a_proxy(
    kind: str, tls: bool, authority: Authority, proxy: TinyProxy, study: Path, tmp_path: Path
) -> None:
    with serving(kind, tls, authority, tmp_path) as server:
        target = server.make(proxy=f"http://{CREDENTIALS}@127.0.0.1:{proxy.port}")
        assert attempt(target, study).require().state is State.DELIVERED
        assert proxy.seen(server.port) > 0
        health = check(target)
        assert health.ok, health
        found = probes(health)
        assert found["proxy"][0] == "ok"
        assert found["proxy"][1].startswith(f"http://127.0.0.1:{proxy.port} passes on")
        assert found["resolve"] == found["tcp"] == ("skipped", "the proxy finds the server")
        assert ("tls" in found) is tls


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("kind", SERVERS)
def test_what_is_wrong_with_a_proxy_is_said(
    kind: str, tls: bool, authority: Authority, proxy: TinyProxy, study: Path, tmp_path: Path
) -> None:
    cases: list[tuple[str, type[DispatchError], str]] = [
        (f"http://127.0.0.1:{proxy.port}", Denied, "asks for credentials: add user:password@ in proxy"),
        (f"http://{USER}:wr0ng-{PASSWORD[:4]}@127.0.0.1:{proxy.port}", Denied, "refuses these credentials"),
        (f"http://{CREDENTIALS}@127.0.0.1:{free_port()}", Unreachable, "the proxy can't be used"),
        (f"http://{CREDENTIALS}@no-such-proxy.invalid:3128", Unreachable, "can't be resolved"),
    ]
    with serving(kind, tls, authority, tmp_path) as server:
        for setting, expected, words in cases:
            target = server.make(proxy=setting)
            health = check(target)
            failed = [p.name for p in health.probes if p.result == "failed"]
            if "wr0ng" in setting and not tls:
                # tinyproxy answers 401, as the server behind it does to wrong credentials of its own.
                assert failed == ["authenticate"]
                continue
            assert failed == ["proxy"], setting
            sent = attempt(target, study)
            for error in (sent.error, health.error):
                assert type(error) is expected
                assert words in error.message
                assert "\n" not in error.message
                assert PASSWORD not in repr(error) and "wr0ng" not in repr(error) and "pr0xy" not in repr(error)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_server_that_the_proxy_does_not_reach(
    kind: str, authority: Authority, proxy: TinyProxy, study: Path, tmp_path: Path
) -> None:
    field = {"s3": "endpoint_url", "dicomweb": "url", "xnat": "host"}[kind]
    with serving(kind, True, authority, tmp_path) as server:
        target = server.make(proxy=f"http://{CREDENTIALS}@127.0.0.1:{proxy.port}")
    target = target.model_copy(update={field: f"https://127.0.0.1:{free_port()}"}).named(f"{kind}-test")
    health = check(target)
    assert [p.name for p in health.probes if p.result == "failed"] == ["proxy"]
    assert isinstance(health.error, Unreachable)
    assert "does not reach 127.0.0.1" in health.error.message


@pytest.mark.parametrize("tls", [False, True])
def test_a_proxy_that_is_spoken_to_over_tls(
    tls: bool, authority: Authority, proxy: TinyProxy, study: Path, tmp_path: Path
) -> None:
    """TLS inside TLS, for a server with TLS."""
    with ExitStack() as stack:
        port = stack.enter_context(tls_front(tmp_path / "front", authority.leaf("proxy"), proxy.port))
        server = stack.enter_context(serving("s3", tls, authority, tmp_path))
        target = server.make(proxy=f"https://{CREDENTIALS}@127.0.0.1:{port}", ca_cert=str(authority.ca))
        assert attempt(target, study).require().state is State.DELIVERED
        assert proxy.seen(server.port) > 0
        assert check(target).ok
        untrusting = server.make(proxy=f"https://{CREDENTIALS}@127.0.0.1:{port}", ca_cert=None)
        health = check(untrusting)
        assert [p.name for p in health.probes if p.result == "failed"] == ["proxy"]
        assert "unknown authority" in (health.error.message if health.error else "")


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("kind", SERVERS)
def test_the_environment_s_proxies_only_where_the_field_says_so(
    kind: str,
    tls: bool,
    authority: Authority,
    proxy: TinyProxy,
    study: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://{CREDENTIALS}@127.0.0.1:{proxy.port}")
    with serving(kind, tls, authority, tmp_path) as server:
        assert attempt(server.make(), study).require().state is State.DELIVERED
        assert "proxy" not in probes(check(server.make()))
        assert proxy.seen(server.port) == 0
        target = server.make(proxy="environment")
        monkeypatch.setenv("no_proxy", "example.org,127.0.0.1")
        assert check(target).ok
        assert proxy.seen(server.port) == 0
        monkeypatch.setenv("no_proxy", "example.org")
        assert check(target).ok
        assert proxy.seen(server.port) > 0


# Cuts and stalls after so many bytes from the client: the request for a tunnel is of some 200.
WAYS: dict[str, tuple[dict[str, Any], tuple[type[DispatchError], ...]]] = {
    "hangs before it answers": ({"stall_after": 0}, (TimedOut,)),
    "hangs after it has answered": ({"stall_after": 400}, (TimedOut,)),
    "closes before it answers": ({"cut_after": 20, "stays_cut": True}, (Interrupted, Unreachable)),
    "dies in the handshake": ({"cut_after": 400, "stays_cut": True}, (Interrupted, Unreachable)),
    "dies midway": ({"cut_after": 1_000_000, "stays_cut": True}, (Interrupted, Unreachable)),
    "hangs midway": ({"stall_after": 1_000_000}, (TimedOut,)),
}


@pytest.mark.parametrize(
    ("kind", "how"), [*(("dicomweb", how) for how in WAYS), ("s3", "dies midway"), ("xnat", "dies midway")]
)
def test_a_proxy_that_dies_or_hangs(
    kind: str, how: str, authority: Authority, proxy: TinyProxy, study: Path, tmp_path: Path
) -> None:
    """It is no fault of the settings: tried again, and nothing secret is said."""
    fault, expected = WAYS[how]
    with serving(kind, True, authority, tmp_path) as server, relay(proxy.port, **fault) as way:
        target = server.make(
            proxy=f"http://{CREDENTIALS}@127.0.0.1:{way.port}", connect_timeout_s=1, idle_timeout_s=1, concurrency=1
        )
        sent = attempt(target, study)
        assert isinstance(sent.error, expected), repr(sent.error)
        assert not sent.rejected, sent.rejected
        if "midway" not in how:
            health = check(target)
            assert isinstance(health.error, Retryable), repr(health.error)
        for text in (repr(sent.error), str(sent.error)):
            assert PASSWORD not in text and "pr0xy" not in text


ODD: dict[bytes, type[DispatchError]] = {  # what a proxy may answer to the request for a tunnel
    b"HTTP/1.1 407 give me more than {given}\r\n\r\n": Denied,
    b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n": Denied,
    b"HTTP/1.1 502 Bad Gateway\r\n\r\n": Unreachable,
    b"HTTP/1.1 504 Gateway Timeout\r\n\r\n": Unreachable,
    b"HTTP/1.1 429 Too Many Requests\r\n\r\n": Unreachable,
    b"HTTP/1.1 404 Not Found\r\n\r\n": Misconfigured,
    b"HTTP/1.1 302 Found\r\nLocation: http://login.example/\r\n\r\n": Misconfigured,
    b"HTTP/1.1 200 OK\r\n\r\n<html>": Misconfigured,
    b"SSH-2.0-OpenSSH_9.2\r\n": Misconfigured,
    b"": Interrupted,
}
SECRET = 'p@ss/w#rd:%41 s"cret'


@pytest.mark.parametrize("kind", SERVERS)
def test_odd_answers_of_a_proxy(kind: str, authority: Authority, study: Path, tmp_path: Path) -> None:
    """A password of special characters arrives as it is, and is not in a message though the proxy quotes it."""
    given: set[str] = set()
    answer = b""

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                with listener.accept()[0] as sock:
                    sock.settimeout(5)
                    head = b""
                    while b"\r\n\r\n" not in head and (piece := sock.recv(4096)):
                        head += piece
                    fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:] if line)
                    code = fields["Proxy-Authorization"].removeprefix("Basic ")
                    given.add(b64decode(code).decode())
                    sock.sendall(answer.replace(b"{given}", f"{code} {SECRET}".encode()))

    with socket.create_server(("127.0.0.1", 0)) as listener, serving(kind, True, authority, tmp_path) as server:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        target = server.make(proxy=f"http://l%40b:{quote(SECRET, safe='')}@127.0.0.1:{listener.getsockname()[1]}")
        for answer in list(ODD) if kind == "dicomweb" else list(ODD)[:1]:
            sent, health = attempt(target, study), check(target)
            for error in (sent.error, health.error):
                assert type(error) is ODD[answer], (answer, error)
                coded = b64encode(f"l@b:{SECRET}".encode()).decode()
                for secret in (SECRET, quote(SECRET), quote(SECRET, safe=""), coded, "p@ss", "p%40ss"):
                    assert secret not in repr(error) + str(error) + str(health.probes)
        listener.shutdown(socket.SHUT_RDWR)
    assert given == {f"l@b:{SECRET}"}


@pytest.mark.parametrize(
    ("host", "no_proxy", "passed_by"),
    [
        ("pacs.example.org", "example.org", True),
        ("pacs.example.org", "localhost, .example.org", True),
        ("pacs.example.org", "*.Example.ORG", True),
        ("pacs.example.org.", "example.org.", True),
        ("badexample.org", "example.org", False),
        ("example.org", ".example.org", True),
        ("pacs.example.org", "example.org:443", True),
        ("pacs.example.org", "example.org:8443", False),
        ("pacs.example.org:8443", "a.b c.d example.org:8443", True),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("110.1.2.3", "10.1.2.3", False),
        ("[2001:db8::7]", "2001:db8::7", True),
        ("[2001:db8::7]", "[2001:DB8:0::7]", True),
        ("[2001:db8::7]", "[2001:db8::7]:443", True),
        ("[2001:db8::7]", "[2001:db8::7]:8443", False),
        ("[2001:db8::7]:8443", "[2001:db8::7]:8443", True),
        ("[2001:db8::7]", "2001:db8::/32", True),
        ("anything", "*", True),
        ("anything", "", False),
        ("anything", ",, .", False),
    ],
)
def test_what_no_proxy_names(host: str, no_proxy: str, passed_by: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example.net:3128")
    monkeypatch.setenv("no_proxy", no_proxy)
    assert (Proxy.of("environment", f"https://{host}/dicom-web") is None) is passed_by


@pytest.mark.parametrize(
    "value",
    [
        "http://u:s3[cret@proxy:1",
        "http://u:s3#cret@proxy:1",
        "http://u:12/s3cret@proxy:1",
        "socks5://u:s3cret@p",
        "http://:1",
        "u:s3/cret@proxy",
    ],
)
def test_a_proxy_of_the_environment_that_is_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a password is taken for a host, or said."""
    monkeypatch.setenv("https_proxy", value)
    with pytest.raises(Misconfigured, match="not an HTTP proxy") as caught:
        Proxy.of("environment", "https://pacs.example.org")
    assert caught.value.__cause__ is None and "cret" not in str(caught.value)


def test_what_answers_is_no_proxy(authority: Authority, study: Path, tmp_path: Path) -> None:
    with serving("s3", True, authority, tmp_path) as server, scripted() as web:
        error = attempt(server.make(proxy=f"http://127.0.0.1:{web.port}"), study).error
        assert type(error) is Misconfigured
        assert "correct proxy" in error.message


def test_services_that_give_credentials_are_asked_through_the_same_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What boto3 asks by itself takes the target's proxy, and none of the environment's."""
    from protocols.s3.client import BucketAccount, BucketSettings

    monkeypatch.setenv("HTTPS_PROXY", "http://other.example:1")
    for setting, expected in (("", {}), ("http://u:p%40@proxy.example:3128", "http://u:p%40@proxy.example:3128")):
        account = BucketAccount(BucketSettings("lab", access_key="a", secret_key="b", proxy=setting))
        client = account._core.create_client("sts", region_name="us-east-1")
        proxies = client.meta.config.proxies
        assert proxies == (expected or {}) if not expected else set(proxies.values()) == {expected}
        client.close()


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize(
    "value",
    [
        "proxy.example.org", "ftp://proxy", "socks5://proxy:1080", "http://", "http://proxy/path", "http://proxy?x",
        "http://:s3cret@proxy", "http://pro xy", "http://proxy:99999", "http://u:s3cret@-x", "Environment",
    ],
)  # fmt: skip
def test_settings_that_are_not_valid(kind: str, value: str) -> None:
    fields = {
        "s3": {"bucket": "lab"},
        "dicomweb": {"url": "http://pacs"},
        "xnat": {"host": "http://x", "project_id": "P", "user": "u", "password": "p"},
    }
    with pytest.raises(ValidationError, match="proxy") as caught:
        DRIVERS[kind].target(**fields[kind], proxy=value)
    assert "s3cret" not in str(caught.value)


def test_a_proxy_s_credentials_are_never_shown() -> None:
    made: Any = DRIVERS["s3"].target(bucket="lab", proxy="http://u:s3cret@proxy:3128")
    assert isinstance(made.proxy, SecretStr)
    for text in (repr(made), str(made), made.model_dump_json()):
        assert "s3cret" not in text
