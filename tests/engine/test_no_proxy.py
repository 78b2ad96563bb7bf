"""What goes to our own server goes there directly: a proxy of the environment sees none of it, no password either."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

import pytest

from talaria.settings import client_environment
from talaria.testing import studies
from tests.engine.material import files, folder
from tests.servers.up import Talaria
from transfer.home import Home

pytestmark = pytest.mark.timeout(600)


@contextmanager
def eavesdropper() -> Iterator[tuple[int, list[bytes]]]:
    """Listen as a proxy would; yields the port, and what was said to it."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    heard.append(peer.recv(65_536))

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield listener.getsockname()[1], heard
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_send_without_a_server_starts_one_for_its_own_duration_and_a_proxy_sees_nothing(tmp_path: Path) -> None:
    with eavesdropper() as (port, heard):
        up = Talaria(tmp_path)
        up.begin_with_a_database()
        # In what is started alone: here, other tests' clients may still look for their servers.
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            up.more[name] = f"http://127.0.0.1:{port}"
        studies.ct(tmp_path / "study", 2)
        up.apply(archive=folder(tmp_path / "archive"))
        sent = up.json("send", str(tmp_path / "study"), "--to", "archive")
        assert sent["state"] == "delivered" and len(files(tmp_path / "archive")) == 3
        assert heard == []
    assert up("status").returncode == 3
    assert not (up.home / "server.json").exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
@pytest.mark.parametrize(
    "named",
    [
        {},
        {"NO_PROXY": "pacs.example"},
        {"no_proxy": "pacs.example"},
        {"NO_PROXY": "pacs.example", "no_proxy": ""},
        {"NO_PROXY": "*, pacs.example"},
        {"NO_PROXY": "other.example , 127.0.0.1", "no_proxy": "pacs.example"},
    ],
)
def test_our_server_is_excepted_and_what_the_user_excepts_stays_so(
    host: str, named: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both spellings are read: by urllib, and so by websockets and httpx, the small one first, elsewhere the other."""
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    ours = client_environment(Home(tmp_path), f"http://{host}:4200/api")
    for excepted in (ours["NO_PROXY"], ours["no_proxy"]):
        proxies = {"http": "http://127.0.0.1:1", "no": excepted}
        for other in (f"{host.strip('[]')}:4200", *(["pacs.example:80"] if named else [])):
            assert proxy_bypass_environment(other, proxies), (other, excepted)
        for other in () if excepted == "*" else ("proxied.example:80",):
            assert not proxy_bypass_environment(other, proxies), (other, excepted)
