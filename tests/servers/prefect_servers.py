"""Prefect servers as several hosts have them: on PostgreSQL, with Redis between them, and Talaria on each host."""

from __future__ import annotations

import base64
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from talaria.testing.process import free_port, program, server
from tests.servers.postgresql import PostgreSql, postgresql
from tests.servers.up import Talaria


@dataclass
class Servers:
    """The servers; `env` is that of their clients."""

    database: PostgreSql
    redis: int
    folder: Path
    ledger: str
    _stack: ExitStack
    auth: str = field(default_factory=lambda: f"talaria:{secrets.token_hex(8)}")
    urls: list[str] = field(default_factory=list)
    processes: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        redis = f"redis://127.0.0.1:{self.redis}"
        self._env = {
            "PREFECT_API_DATABASE_CONNECTION_URL": self.database.new().replace("://", "+asyncpg://"),
            "PREFECT_SERVER_API_AUTH_STRING": self.auth,
            "PREFECT_SERVER_ENCRYPTION_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_MESSAGING_BROKER": "prefect_redis.messaging",
            "PREFECT_MESSAGING_CACHE": "prefect_redis.messaging",
            "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "prefect_redis.ordering",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect_redis.lease_storage",
            "PREFECT_SERVER_DOCKET_URL": f"{redis}/1",
            "PREFECT_REDIS_MESSAGING_URL": f"{redis}/0?retry_on_timeout=true",
            "PREFECT_REDIS_MESSAGING_PUBLISHER_BATCH_SIZE": "1",  # else an event takes ten seconds to the other server
            "PREFECT_REDIS_MESSAGING_SOCKET_TIMEOUT": "3",
            "PREFECT_REDIS_MESSAGING_SOCKET_CONNECT_TIMEOUT": "3",
        }

    def add(self) -> None:
        """Start one more; the first makes the tables."""
        number, port = len(self.urls), free_port()
        home = self.folder / f"server-{number}"
        home.mkdir()
        url = f"http://127.0.0.1:{port}/api"
        argv = [sys.executable, "-P", "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]

        def ready() -> bool:
            try:
                return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
            except httpx.HTTPError:
                return False

        env = self._env | {"PREFECT_HOME": str(home), "PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": self.auth}
        started = server(argv, port, home / "log", env=env, ready=ready)
        self.processes.append(self._stack.enter_context(started))
        self.urls.append(url)

    def api(self, method: str, path: str, number: int, body: Any = None) -> Any:
        user, _, password = self.auth.partition(":")
        answer = httpx.request(
            method, self.urls[number] + path, json=body, auth=(user, password), timeout=120, trust_env=False
        )
        answer.raise_for_status()
        return answer.json() if answer.content else None

    @contextmanager
    def host(self, name: str, number: int, *options: str, ahead_s: int = 0, **more: str) -> Iterator[Talaria]:
        """Run `talaria up` on a host of this name, for one of the servers; its clock is some seconds ahead."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        one = Talaria(folder)
        one.more = {
            "PREFECT_API_URL": self.urls[number],
            "PREFECT_API_AUTH_STRING": self.auth,
            "TALARIA_LEDGER": self.ledger,
            "TALARIA_HOST_NAME": name,
            **more,
        }
        if ahead_s:
            library = folder / "ahead.so"
            source = Path(__file__).with_name("ahead.c")
            subprocess.run([program("cc"), "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
            one.more |= {"LD_PRELOAD": str(library), "AHEAD_S": str(ahead_s)}
        try:
            yield one.run_beside(*options)
        finally:
            if one.process and one.process.poll() is None:
                one.kill()


@contextmanager
def prefect_servers(folder: Path, count: int = 2) -> Iterator[Servers]:
    """Run so many servers until the block ends."""
    with ExitStack() as stack:
        database, port = stack.enter_context(postgresql()), free_port()
        argv = [program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        stack.enter_context(server([*argv, "--appendonly", "no"], port, folder / "redis.log"))
        one = Servers(database, port, folder, database.new(), stack)
        for _ in range(count):
            one.add()
        yield one
