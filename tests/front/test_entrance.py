"""Before anybody from elsewhere may come in, what protects the rest is set; and the listener is proved to be ours."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from talaria import listener, server
from talaria.entrance import entrance
from talaria.errors import ServerError
from talaria.front.access import Role
from talaria.front.users import Users
from talaria.settings import Settings
from tests.front.door import PASSWORD
from tests.servers.certificates import Authority
from transfer.home import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    (tmp_path / "home").mkdir(mode=0o700)
    return Home(tmp_path / "home")


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, str]:
    leaf = Authority(tmp_path / "ca").leaf("talaria.example")
    return {"tls_cert": str(leaf.cert), "tls_key": str(leaf.key)}


def way(home: Home, host: str = "192.0.2.1", auth: bool = True, **settings: Any) -> Any:
    return entrance(Settings(**settings), home, host, 4200, auth=auth)


def test_beyond_loopback_everything_that_protects_must_be_set(home: Home, pair: dict[str, str]) -> None:
    for host in ("0.0.0.0", "192.0.2.1", "::", "talaria.example", ""):
        with pytest.raises(ValueError, match=r"--tls-cert.*talaria user add.*TALARIA_SOURCES.*TALARIA_PLACES"):
            way(home, host)
    with pytest.raises(ValueError, match="needs: a user"):
        way(home, **pair, sources="/data", places="/data")
    Users(home).add("anna", Role.ADMIN, PASSWORD)
    for lacks in ("sources", "places"):
        given = {"sources": "/data", "places": "/data", **pair} | {lacks: ""}
        with pytest.raises(ValueError, match=f"needs: TALARIA_{lacks.upper()}"):
            way(home, **given)
    one = way(home, **pair, sources="/data", places="/data", hosts="a.example, B.example.")
    assert one.apart and {"a.example", "b.example", socket.gethostname().lower()} <= set(one.hosts)


def test_loopback_needs_nothing_and_no_auth_is_for_loopback(home: Home) -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2", "::ffff:127.0.0.1"):
        assert not way(home, host).apart
        assert way(home, host, auth=False).auth is False
    for host in ("0.0.0.0", "192.0.2.1", "::"):
        with pytest.raises(ValueError, match="for loopback only"):
            way(home, host, auth=False)
    with pytest.raises(ValueError, match="for loopback only, not for a proxy"):
        way(home, "127.0.0.1", auth=False, behind_proxy=True)


def test_a_proxy_is_declared_whole(home: Home) -> None:
    rest: dict[str, Any] = {"behind_proxy": True, "sources": "/data", "places": "/data"}
    with pytest.raises(ValueError, match=r"a user.*TALARIA_HOSTS"):
        way(home, "127.0.0.1", **rest)
    one = way(home, "127.0.0.1", **rest, hosts="t.example", proxy_user_header="X-Remote-User", proxy_role="viewer")
    assert one.peers == ("127.0.0.1", "::1") and one.user_header == "X-Remote-User" and one.hosts == ("t.example",)
    wrongs: list[tuple[dict[str, str], str]] = [
        ({"proxy_peers": "proxy"}, "PEERS"),
        ({"proxy_peers": " "}, "PEERS"),
        ({"proxy_role": "x"}, "role"),
        ({"proxy_user_header": "a b"}, "HEADER"),
        ({"hosts": "https://t.example"}, "HOSTS"),
    ]
    for wrong, name in wrongs:
        given = {**rest, "hosts": "t.example", "proxy_user_header": "X-Remote-User"} | wrong
        with pytest.raises(ValueError, match=name):
            way(home, "127.0.0.1", **given)


def test_a_certificate_that_can_t_be_used_is_refused_at_once(home: Home, pair: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="go together"):
        way(home, "127.0.0.1", tls_cert=pair["tls_cert"])
    (tmp_path / "broken").write_text("no certificate")
    for wrong in (str(tmp_path / "none"), str(tmp_path / "broken")):
        with pytest.raises(ValueError, match="can't be used"):
            way(home, "127.0.0.1", tls_cert=wrong, tls_key=pair["tls_key"])
    with pytest.raises(ValueError, match="leave out"):
        way(home, "127.0.0.1", behind_proxy=True, **pair)


# ---- the listener


def test_a_listener_is_ours_only_with_its_socket_and_process() -> None:
    with listener.bind("127.0.0.1", 0) as one, listener.bind("127.0.0.1", 0) as other, socket.socket() as silent:
        port, number = one.getsockname()[1], listener.inode(one)
        assert listener.is_ours(port, number, os.getpid())
        assert not listener.is_ours(other.getsockname()[1], number, os.getpid())
        assert not listener.is_ours(port, listener.inode(other), os.getpid())
        assert not listener.is_ours(port, number, os.getppid())
        silent.bind(("127.0.0.1", 0))
        assert not listener.is_ours(silent.getsockname()[1], listener.inode(silent), os.getpid())
    assert not listener.is_ours(port, number, os.getpid())
    with listener.bind("::1", 0) as six:
        assert listener.is_ours(six.getsockname()[1], listener.inode(six), os.getpid())


def test_whoever_bound_the_port_first_is_asked_nothing(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen: a local user who binds the port first gets the password."""
    import fcntl
    import json

    asked: list[str] = []
    monkeypatch.setattr(server, "ready", asked.append)
    with listener.bind("127.0.0.1", 0) as theirs, listener.bind("127.0.0.1", 0) as ours:
        port = theirs.getsockname()[1]
        record = {
            "url": f"http://127.0.0.1:{port}/api", "front": "", "auth": True, "workers": True,
            "pid": os.getpid(), "port": port, "inode": listener.inode(ours),
        }  # fmt: skip
        (home.root / "server.json").write_text(json.dumps(record))
        with open(home.root / "server.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(ServerError, match="not our server"):
                server.running(home)
    assert asked == []


def test_a_port_that_is_taken_is_named() -> None:
    with listener.bind("127.0.0.1", 0) as one:
        port = one.getsockname()[1]
        with pytest.raises(ServerError, match=rf"127\.0\.0\.1:{port} .*--port"):
            listener.bind("127.0.0.1", port)
    with pytest.raises(ServerError, match=r"192\.0\.2\.1"):
        listener.bind("192.0.2.1", 0)


ACTIVATED = """
import os, sys
os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"] = str(os.getpid() + int(sys.argv[2])), sys.argv[3]
os.dup2(int(sys.argv[1]), 3)
from talaria import listener
from talaria.errors import ServerError
try:
    one = listener.from_systemd()
    print(one.getsockname()[1] if one else "none", "LISTEN_PID" in os.environ, os.get_inheritable(3))
except ServerError as exc:
    print(exc)
"""


def test_systemd_hands_over_its_socket() -> None:
    def activated(one: socket.socket, off: int = 0, count: str = "1") -> str:
        ran = subprocess.run(
            [sys.executable, "-P", "-c", ACTIVATED, str(one.fileno()), str(off), count],
            pass_fds=[one.fileno()], capture_output=True, text=True, check=True,
        )  # fmt: skip
        return ran.stdout.strip()

    with listener.bind("127.0.0.1", 0) as one, socket.socket(socket.AF_UNIX) as unix:
        assert activated(one) == f"{one.getsockname()[1]} False False"
        assert activated(one, off=1).startswith("none")
        assert "2 sockets" in activated(one, count="2")
        assert "not one that listens" in activated(unix)
