"""Talaria as people run it: `talaria up` in a state directory of its own, and the commands beside it."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import psutil
import yaml
from prefect.context import refresh_global_settings_context

from talaria.__main__ import main
from talaria.server import send_what_is_queued
from talaria.testing.process import as_loaded, free_port, pause, stop

READY_S = 300  # the first start migrates the database
COMMAND_S = 300
# One for all calls: to make a client that could speak TLS takes ten times as long as the call.
_client = httpx.Client(verify=False, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
MIGRATED = "migrated.db"  # the database of a server that has just begun, for all processes of one run of the tests


class Talaria:
    """One state directory; its server and worker run between `start` and `stop`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "talaria"
        self.port = free_port()
        self.ports = {"TALARIA_SCP_PORT": str(free_port()), "TALARIA_SCP_HOST": "127.0.0.1"}  # of C-MOVE
        self.log = folder / "up.log"
        self.process: subprocess.Popen[bytes] | None = None
        # Variables of the environment of all that is started. Runs of schedules are made once a minute else.
        self.more = {"PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "3"}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "TALARIA_HOME": str(self.home), "HOME": str(self.folder), **self.ports, **self.more}

    def start(self, *options: str) -> Talaria:
        """Run `talaria up`; returns when it says that it is ready."""
        if self.database.exists():
            return self._start(options)
        with self._turn():
            if not self._migrated.exists():
                self._start(options)
                if "PYTHONPATH" in self.env:  # it has types that are not ours
                    return self
                made = self._migrated.with_name(f"{MIGRATED}-{os.getpid()}")
                made.write_bytes(self._copy_of_the_database())
                made.replace(self._migrated)
                return self
        self.begin_with_a_database()
        return self._start(options)

    def run_beside(self, *options: str) -> Talaria:
        """Run `talaria up` for a Prefect server of one's own, which the environment names."""
        return self._start(options)

    def _start(self, options: Sequence[str]) -> Talaria:
        seen = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "talaria", "up", "--port", str(self.port), *options],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.env,
                start_new_session=True,
            )
        self.until(lambda: b"ready:" in self.log.read_bytes()[seen:], READY_S, alive=True)
        return self

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Let one process of this run make the database, while the others wait for it."""
        with self._migrated.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @property
    def _migrated(self) -> Path:
        own = next((one for one in self.folder.parents if one.name.startswith("popen-gw")), None)
        return (own or self.folder).parent / MIGRATED  # pytest's folder of this run, which it removes at some time

    @property
    def database(self) -> Path:
        return self.home / "prefect" / "prefect.db"

    def begin_with_a_database(self) -> None:
        """Put there what the first server of this run has made: half of a first start is migrations.

        Prefect's own blocks are registered in it, too, which takes a sixth of what is left.
        """
        if self._migrated.exists():
            self.more["PREFECT_API_BLOCKS_REGISTER_ON_START"] = "false"
            self.database.parent.mkdir(parents=True)
            for path in (self.home, self.database.parent):
                path.chmod(0o700)
            self.database.touch(0o600)
            self.database.write_bytes(self._migrated.read_bytes())

    def _copy_of_the_database(self) -> bytes:
        with (
            closing(sqlite3.connect(self.database, timeout=300)) as there,
            closing(sqlite3.connect(":memory:")) as copy,
        ):
            there.backup(copy)
            copy.execute("DELETE FROM worker")  # it is not the one that will serve
            copy.commit()
            return copy.serialize()

    def stop(self) -> None:
        """Stop it as Ctrl-C does."""
        if self.process:
            stop(self.process, wait_s=60)
            self.process = None

    def kill(self) -> None:
        """Kill it with everything that it started: a power cut."""
        assert self.process
        for child in self.children():
            child.kill()
        self.process.kill()
        self.process.wait()
        self.process = None

    def children(self) -> list[psutil.Process]:
        assert self.process
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, mark: str) -> psutil.Process:
        """The child whose command line holds `mark`: `talaria.front` (server), `talaria.engine.worker` (worker)."""
        (found,) = [child for child in self.children() if any(mark in part for part in child.cmdline())]
        return found

    def until(self, condition: Callable[[], object], seconds: float = 120, *, alive: bool = False) -> None:
        """Wait for a condition, so many seconds where nothing else runs."""
        end = time.monotonic() + as_loaded(seconds)
        while True:
            asked = time.monotonic()
            if condition():
                return
            now = time.monotonic()
            if alive and self.process and self.process.poll() is not None:
                raise AssertionError(f"talaria up ended:\n{self.log.read_text()}")
            if now > end:
                raise AssertionError(f"waited {seconds} s in vain:\n{self.log.read_text()[-3000:]}")
            time.sleep(pause(now - asked))

    def __call__(self, *args: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [sys.executable, "-P", "-m", "talaria", *args],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**self.env, **(env or {})},
            timeout=COMMAND_S,
            cwd=self.folder,
            check=False,
        )

    def json(self, *args: str, code: int = 0) -> Any:
        """Run a command with `--json`; its stdout must be one document and its exit code the expected one."""
        ran = self(*args, "--json")
        assert ran.returncode == code, f"{args}: exit code {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
        return json.loads(ran.stdout)

    def here(self, *args: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command beside a running `talaria up`, within this process: it takes a tenth of the time.

        What is the same in any process may be tested so; Prefect is imported once.
        """
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, {**self.env, **(env or {})}),
            mock.patch.object(sys, "argv", ["talaria", *args]),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            refresh_global_settings_context()
            try:
                main()
            except SystemExit as exc:
                code = int(exc.code or 0)
            send_what_is_queued()  # as at the end of a process; later it would go to another server, or a proxy
        refresh_global_settings_context()
        return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())

    def told(self, *args: str, code: int | None = 0) -> Any:
        """As `json`, with `here`; `code` None for any."""
        ran = self.here(*args, "--json")
        assert code is None or ran.returncode == code, f"{args}: exit code {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
        return json.loads(ran.stdout)

    def background(self, *args: str) -> subprocess.Popen[bytes]:
        """Start a command and leave it running."""
        with (self.folder / "background.log").open("ab") as out:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "talaria", *args],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.env,
                cwd=self.folder,
                start_new_session=True,
            )

    def apply(self, **targets: dict[str, Any]) -> None:
        """Save targets; underscores of their names stand for dashes. Those of other tests, of other types, give way."""
        path = self.folder / "targets.yaml"
        path.write_text(yaml.safe_dump({"targets": {name.replace("_", "-"): one for name, one in targets.items()}}))
        ran = (self.here if self.process else self)("target", "apply", str(path), "--replace")
        assert ran.returncode == 0, ran.stderr

    def api(self, method: str, path: str, **body: Any) -> Any:
        """Call the Prefect API as any client with the password may."""
        user, _, password = (self.home / "api.auth").read_text().strip().partition(":")
        for _ in range(50):
            answer = _client.request(method, self.url + path, json=body or None, auth=(user, password), timeout=300)
            if answer.status_code != 503:
                break
            time.sleep(0.2)  # on SQLite, so answers a server that another client writes to; Prefect's client asks again
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def as_worker(self, method: str, path: str, body: Any) -> Any:
        """Call the Prefect API as our own processes do: what they save has been validated, and is not looked at."""
        user, _, password = (self.home / "worker.auth").read_text().strip().partition(":")
        answer = _client.request(method, self.url + path, json=body, auth=(user, password), timeout=300)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def run(self, run_id: str) -> Any:
        """A flow run as the API tells it."""
        return self.api("GET", f"/flow_runs/{run_id}")


@contextmanager
def talaria(folder: Path, *options: str) -> Iterator[Talaria]:
    """Run `talaria up` until the block ends."""
    one = Talaria(folder)
    try:
        yield one.start(*options)
    finally:
        if one.process and one.process.poll() is None:
            one.process.send_signal(signal.SIGTERM)
        one.stop()
