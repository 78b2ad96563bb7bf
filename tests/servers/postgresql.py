"""A real PostgreSQL server, from Debian's package, with a database for each who asks for one."""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from talaria.testing.process import free_port, server


@dataclass
class PostgreSql:
    """A server; its user may do everything there.

    Attributes:
        pid: of the process that started all the others.
    """

    port: int
    password: str
    pid: int = 0
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def url(self, database: str = "postgres", driver: str = "") -> str:
        return f"postgresql{driver}://lab:{self.password}@127.0.0.1:{self.port}/{database}"

    def new(self) -> str:
        """Make a database; return its URL."""
        name = f"d{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, statement: str) -> None:
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement.encode())


def _programs() -> Path:
    """Return where initdb and postgres are: Debian keeps them out of PATH, by version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda one: int(one.parts[-3]))
    if not found:
        raise RuntimeError("postgresql is not installed: run `make servers`")
    return found[-1].parent


@contextmanager
def postgresql(*, durable: bool = False) -> Iterator[PostgreSql]:
    """Run a server until the block ends; it refuses root, and runs as `postgres` then.

    Args:
        durable: whether a commit waits for the disk.
    """
    programs, one = _programs(), PostgreSql(free_port(), secrets.token_hex(8))
    folder = Path(tempfile.mkdtemp(prefix="talaria-postgresql-"))  # pytest's own may not be read by that user
    try:
        (folder / "password").write_text(one.password)
        become: list[str] = []
        if os.geteuid() == 0:
            become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
            for path in (folder, folder / "password"):
                shutil.chown(path, "postgres", "postgres")
        made = [str(programs / "initdb"), "-D", str(folder / "data"), "-U", "lab", "-A", "scram-sha-256", "-N"]
        options = [f"--pwfile={folder / 'password'}", "--encoding=UTF8", "--locale=C.UTF-8"]
        subprocess.run([*become, *made, *options], check=True, capture_output=True, cwd=folder)
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": one.port,
            "unix_socket_directories": folder,
            "fsync": "on" if durable else "off",
            "max_connections": 300,
        }
        argv = [*become, str(programs / "postgres"), "-D", str(folder / "data")]
        argv += [f"--{name}={value}" for name, value in settings.items()]

        def ready() -> bool:
            try:
                psycopg.connect(one.url(), connect_timeout=5).close()
            except psycopg.OperationalError:
                return False
            return True

        with server(argv, one.port, folder / "log", ready=ready, cwd=folder) as process:
            one.pid = process.pid
            try:
                yield one
            finally:
                process.send_signal(signal.SIGINT)  # at SIGTERM it would wait for its clients
                process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
