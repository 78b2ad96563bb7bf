"""A real syslog server: Debian's rsyslog with TLS, which writes what it gets into a file."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from talaria.testing.process import free_port
from tests.servers.certificates import Authority, Leaf

CONFIGURATION = """
global(workDirectory="{folder}" defaultNetstreamDriver="ossl" maxMessageSize="64k"
       defaultNetstreamDriverCAFile="{ca}"
       defaultNetstreamDriverCertFile="{cert}" defaultNetstreamDriverKeyFile="{key}")
module(load="imtcp" StreamDriver.Name="ossl" StreamDriver.Mode="1" StreamDriver.AuthMode="{mode}")
template(name="raw" type="string" string="%pri% %timestamp:::date-rfc3339% %hostname% %app-name% %msgid% %msg%\\n")
input(type="imtcp" port="{port}" address="127.0.0.1" ruleset="all")
ruleset(name="all") {{ action(type="omfile" file="{out}" template="raw" fileCreateMode="0600") }}
"""


@dataclass
class Rsyslog:
    """The server and what it has written."""

    port: int
    out: Path
    authority: Authority
    leaf: Leaf
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    wants_certificate: bool = False

    @property
    def lines(self) -> list[str]:
        return self.out.read_text(encoding="utf-8").splitlines() if self.out.exists() else []

    def start(self) -> None:
        """Start it; who sends to it tries until it listens."""
        config = self.folder / "rsyslog.conf"
        config.write_text(
            CONFIGURATION.format(
                folder=self.folder,
                ca=self.authority.ca,
                cert=self.leaf.cert,
                key=self.leaf.key,
                port=self.port,
                out=self.out,
                mode="x509/certvalid" if self.wants_certificate else "anon",
            )
        )
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["rsyslogd", "-n", "-iNONE", "-f", str(config)], stdout=log, stderr=subprocess.STDOUT
            )

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(30)


@contextmanager
def rsyslog(folder: Path, *, wants_certificate: bool = False) -> Iterator[Rsyslog]:
    """Run a server in a folder of its own."""
    folder.mkdir()
    authority = Authority(folder / "ca")
    server = Rsyslog(free_port(), folder / "messages", authority, authority.leaf("syslog"), folder)
    server.wants_certificate = wants_certificate
    server.start()
    try:
        yield server
    finally:
        server.stop()


LINE = re.compile(r"(?P<pri>\d+) (?P<time>\S+) (?P<host>\S+) (?P<app>\S+) (?P<id>\S+) ?\ufeff?(?P<message>.*)")
