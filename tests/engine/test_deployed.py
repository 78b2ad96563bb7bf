"""What compose.yaml and kubernetes.yaml start, with the environments that they give, on PostgreSQL and Redis."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from talaria.testing import studies
from talaria.testing.process import free_port, program, server
from tests.deployed import GIVEN, Started, below, composed, pods
from tests.servers.postgresql import PostgreSql, postgresql

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SYSTEMS = {
    "compose": (composed(), {"front": "host-a", "worker": "host-b", "server": "server-a"}),
    "kubernetes": (pods(), {"front": "talaria", "worker": "talaria-worker", "server": "prefect"}),
}


@dataclass(frozen=True)
class Places:
    """Where on this machine is what has names of its own there."""

    folder: Path
    names: Mapping[str, str]

    def argv(self, one: Started, command: list[str] | None = None, **ports: str) -> list[str]:
        """Return the command line of a process that has its own environment, and nothing else."""
        env = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(self.folder / one.name / "home"),
            **{name: self.here(value) for name, value in one.env.items()},
        }
        Path(env["HOME"]).mkdir(parents=True, exist_ok=True)
        words = [ports.get(word, word) for word in command or one.command]
        return ["env", "-i", *(f"{name}={value}" for name, value in env.items()), *words]

    def here(self, value: str) -> str:
        if value in self.names:
            return self.names[value]
        for name, there in self.names.items():
            value = value.replace(name, there) if ":" in name else value  # others are words of anything
        return value

    def run(self, one: Started, *command: str) -> str:
        """Run a command to its end; return what it prints."""
        argv = self.argv(one, list(command) or None)
        ran = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout


@contextmanager
def started(places: Places, one: Started, port: int, ready: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Run a process until the block ends; `ready` is what it says, or else its health is asked for."""
    log = places.folder / f"{one.name}.log"

    def is_ready() -> bool:
        if ready:
            return ready in log.read_text()
        try:
            return all(
                httpx.get(f"http://127.0.0.1:{port}/api/{path}", trust_env=False, timeout=5).status_code == 200
                for path in ("health", "ready")
            )
        except httpx.HTTPError:
            return False

    argv = places.argv(one, **{"4200": str(port), "4210": str(port)})
    with server(argv, port, log, ready=is_ready) as process:
        yield process


@pytest.fixture(scope="module")
def databases() -> Iterator[tuple[PostgreSql, int]]:
    with postgresql() as database, ExitStack() as stack:
        port = free_port()
        folder = stack.enter_context(_folder())
        argv = [program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        stack.enter_context(server([*argv, "--dir", str(folder)], port, folder / "log"))
        yield database, port


@contextmanager
def _folder() -> Iterator[Path]:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize("system", SYSTEMS)
def test_all_of_it_starts_and_delivers(system: str, databases: tuple[PostgreSql, int], tmp_path: Path) -> None:
    """Migration, a server, the front door and a host that only works, which delivers what it is asked there."""
    database, redis = databases
    everything, names = SYSTEMS[system]
    front, worker, prefect = (
        below(tmp_path / one, everything[names[one]], tmp_path) for one in ("front", "worker", "server")
    )
    port, door = free_port(), free_port()
    places = Places(
        tmp_path,
        {
            "talaria:lab@postgres/prefect": database.new().partition("//")[2],
            "talaria:lab@postgres/talaria": database.new().partition("//")[2],
            "redis://redis:6379": f"redis://127.0.0.1:{redis}",
            "redis": "127.0.0.1",
            "6379": str(redis),
            **{one.env["PREFECT_API_URL"]: f"http://127.0.0.1:{port}/api" for one in (front, worker)},
            front.env["TALARIA_PROXY_PEERS"]: "127.0.0.1",
        },
    )
    for one in (prefect, front):
        for before in one.before:
            places.run(before)
    with ExitStack() as stack:
        stack.enter_context(started(places, prefect, port))
        up = stack.enter_context(started(places, front, door, "ready:"))
        login = {"user": "admin", "password": GIVEN["ADMIN_PASSWORD"]}
        there = {"host": front.env["TALARIA_HOSTS"], "origin": f"https://{front.env['TALARIA_HOSTS']}"}
        answer = httpx.post(f"http://127.0.0.1:{door}/talaria/login", data=login, headers=there, trust_env=False)
        assert answer.status_code == 303 and "__Host-talaria_session" in answer.headers["set-cookie"]
        up.terminate()
        assert up.wait() == 0
        stack.enter_context(started(places, worker, free_port(), "ready:"))
        sources, archive = worker.env["TALARIA_SOURCES"], worker.env["TALARIA_PLACES"]
        studies.ct(Path(sources) / "study", 2)
        (tmp_path / "targets.yaml").write_text(
            yaml.safe_dump({"targets": {"archive": {"type": "folder", "folder": archive}}})
        )
        places.run(worker, "talaria", "target", "apply", str(tmp_path / "targets.yaml"))
        sent = json.loads(places.run(worker, "talaria", "send", f"{sources}/study", "--to", "archive", "--json"))
        assert sent["state"] == "delivered" and list(Path(archive).rglob("*.dcm"))
