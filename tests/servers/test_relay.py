"""The relay keeps the order of what passes through it, and ends in silence, whatever passes just then."""

from __future__ import annotations

import logging
import socket
import time
from contextlib import suppress
from typing import Any

import pytest

from talaria.testing.relay import relay


@pytest.mark.parametrize("wait_s", [0.0, 0.05])
@pytest.mark.parametrize("settings", [{}, {"stall_after": 10}, {"cut_after": 10}, {"delay_s": 5}], ids=str)
def test_its_end_says_nothing(settings: dict[str, Any], wait_s: float, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with socket.create_server(("127.0.0.1", 0)) as upstream:
        with relay(upstream.getsockname()[1], **settings) as link:
            clients = [socket.create_connection(("127.0.0.1", link.port)) for _ in range(20)]
            for client in clients[::2]:
                with suppress(ConnectionError):  # cut already
                    client.send(b"x" * 5000)
            time.sleep(wait_s)
        for client in clients:
            client.close()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_came_before_a_cut_passes_first_and_in_order() -> None:
    """A server that sees the last piece alone would take a body for a request."""
    with (
        socket.create_server(("127.0.0.1", 0)) as upstream,
        relay(upstream.getsockname()[1], delay_s=0.1, cut_after=8) as link,
        socket.create_connection(("127.0.0.1", link.port)) as client,
    ):
        server, _ = upstream.accept()
        client.send(b"head:")
        time.sleep(0.05)
        client.send(b"body, too long")
        server.settimeout(60)
        got = b""
        with server, pytest.raises(ConnectionResetError):
            while piece := server.recv(100):
                got += piece
        assert b"head:bod".startswith(got), "a reset may throw away what was not read yet"
        assert (link.cuts, link.sent) == (1, 8)
