"""The relay ends in silence, whatever passes through it just then."""

from __future__ import annotations

import logging
import socket
import time
from typing import Any

import pytest

from tests.servers.relay import relay


@pytest.mark.parametrize("wait_s", [0.0, 0.05])
@pytest.mark.parametrize("settings", [{}, {"stall_after": 10}, {"cut_after": 10}, {"delay_s": 5}], ids=str)
def test_its_end_says_nothing(settings: dict[str, Any], wait_s: float, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with socket.create_server(("127.0.0.1", 0)) as upstream:
        with relay(upstream.getsockname()[1], **settings) as link:
            clients = [socket.create_connection(("127.0.0.1", link.port)) for _ in range(20)]
            for client in clients[::2]:
                client.send(b"x" * 5000)
            time.sleep(wait_s)
        for client in clients:
            client.close()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
