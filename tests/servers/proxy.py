"""Debian's tinyproxy: an HTTP proxy that makes tunnels and passes on requests, with a password or without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from talaria.testing.process import free_port, program, server

USER, PASSWORD = "lab", "pr0xy-pass_w.ord"


@dataclass(frozen=True)
class TinyProxy:
    """A running proxy."""

    port: int
    log: Path

    def seen(self, port: int) -> int:
        """How many requests for a port of loopback have come."""
        lines = self.log.read_text().splitlines()
        return sum("Request" in line and f"127.0.0.1:{port}" in line for line in lines)


@contextmanager
def tinyproxy(folder: Path, *, password: str = "") -> Iterator[TinyProxy]:
    """Run a proxy that wants `USER` and a password, if one is given."""
    folder.mkdir(exist_ok=True)
    port, log, settings = free_port(), folder / "requests.log", folder / "tinyproxy.conf"
    lines = [
        f"Port {port}", "Listen 127.0.0.1", f'LogFile "{log}"', "LogLevel Connect", "MaxClients 50", "Timeout 60",
        *([f'BasicAuth {USER} {password}'] if password else []),
    ]  # fmt: skip
    settings.write_text("\n".join(lines) + "\n")
    with server([program("tinyproxy"), "-d", "-c", str(settings)], port, folder / "output.log"):
        yield TinyProxy(port, log)
