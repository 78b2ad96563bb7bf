"""What goes to our own server goes there directly: a proxy of the environment sees none of it, no password either."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from talaria.testing import studies
from tests.servers.up import talaria

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


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


def test_a_proxy_of_the_environment_sees_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with eavesdropper() as (port, heard):
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        studies.sample(tmp_path / "study")
        (tmp_path / "archive").mkdir()
        with talaria(tmp_path) as up:
            up.apply(archive={"type": "folder", "folder": str(tmp_path / "archive")})
            sent = up("send", str(tmp_path / "study"), "--to", "archive")
            assert sent.returncode == 0, sent.stderr
        assert heard == []
