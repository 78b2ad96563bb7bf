"""`talaria up`: the front door with the embedded server, its workers, and what listens, in the foreground."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

import httpx

from talaria import __version__, console, listener
from talaria.console import say
from talaria.entrance import entrance
from talaria.errors import ServerError, prefect_away
from talaria.imports import staying
from talaria.server import FrontServer, answers, child, serving, stop_child, use
from talaria.settings import POOL, Settings, client_environment, misspelt
from transfer import roots
from transfer.audit import Event, record
from transfer.database import LOST
from transfer.errors import LedgerAway
from transfer.home import Home

LOOK_S = 0.3  # between two looks at the processes
CALM_S = 2.0  # before what died is started again
LISTENING = "from talaria.engine.listening import main\nmain()"
WORKER = "from talaria.imports import staying\nwith staying(): from talaria.engine.worker import main\nmain()"


def up(settings: Settings, home: Home, host: str, port: int, workers: int, *, auth: bool) -> None:
    """Serve until SIGINT or SIGTERM: the first drains (running dispatches are finished), the second stops at once.

    With PREFECT_API_URL set, the front door and the workers serve that server, and none is embedded; where it is away,
    as when both machines are started, it is waited for. A socket of systemd's takes the place of host and port.

    Raises:
        ServerError: the server can't be started, or there is another one where it should be.
        ValueError: an open address was asked for without what must be set for it.
    """
    console.as_json = settings.log_json
    url = os.environ.get("PREFECT_API_URL", "").rstrip("/")
    given = listener.from_systemd()
    if given:
        host, port = given.getsockname()[:2]
    way = entrance(settings, home, host, port, auth=auth, upstream=url)
    asked = _Asked()
    if url:
        _wait_for(url, asked)
    with serving(home, way, outer=given) as server:
        server.wait(asked.check)
        if not url:
            use(client_environment(home, server.address.url))
        _serve(settings, home, server, workers, asked)
    say("stopped")


def _wait_for(url: str, asked: _Asked) -> None:
    """Wait until the Prefect server elsewhere answers.

    Raises:
        ServerError: what answers is none, or somebody asks to stop.
    """
    away = False
    while not answers(url):
        if not away:
            say(f"{prefect_away(url)}; until then it is waited for")
        away = True
        asked.event.wait(CALM_S)
        asked.check()


def _serve(settings: Settings, home: Home, server: FrontServer, workers: int, asked: _Asked) -> None:
    """Work for a server, embedded or not, until somebody asks to stop."""
    embedded = not server.entrance.upstream
    taken = _prepared(server, home, asked, alone=embedded)
    crew = _Crew(server, home, settings.limit, workers, alone=embedded and workers == 1)
    ear = _Ear(home)
    try:
        record(Event.STARTED, version=__version__)
        _announce(home, server, taken)
        _watch(server, crew, ear, asked)
        ear.close()
        crew.drain(asked)
        ear.drain(asked)
    finally:
        ear.stop()
        crew.stop()
        record(Event.STOPPED)


class _Asked:
    """Counts how often somebody asked us to stop."""

    def __init__(self) -> None:
        self.times = 0
        self.event = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started us with SIGINT ignored
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.times += 1
        self.event.set()

    def check(self) -> None:
        if self.times:
            raise ServerError("stopped before the server was ready")


class _Crew:
    """The worker processes."""

    def __init__(self, server: FrontServer, home: Home, limit: int, count: int, *, alone: bool) -> None:
        self.server, self.home, self.alone = server, home, alone
        self.log = home.root / "logs" / "worker.log"
        self.env = {
            "TALARIA_LIMIT": str(limit),
            "PREFECT_LOGGING_LEVEL": "INFO",
            "PREFECT_UI_URL": server.address.ui,  # where the log says that a run can be seen
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
            # A run whose server is away for a moment must not end for that.
            "PREFECT_CLIENT_MAX_RETRIES": "8",
        }
        self.members = [self._start() for _ in range(count)]
        self._dead: list[subprocess.Popen[bytes]] = []  # those of them of which it was said that they ended
        self._again = 0.0  # when they are started again, by `time.monotonic`
        self._away = ""  # what has been said of why they are not yet

    def _start(self) -> subprocess.Popen[bytes]:
        return child([sys.executable, "-P", "-c", WORKER], self.env, self.log)

    def keep(self) -> None:
        """Start the ones again some time after they died, and put what they ran back into the queue."""
        for member in self.members:
            if member.poll() is not None and member not in self._dead:
                say(f"a worker ended with exit code {member.returncode}: starting another (log: {self.log})")
                self._dead.append(member)
                self._again = self._again or time.monotonic() + CALM_S
        if not self._dead or time.monotonic() < self._again:
            return
        away = self._recovered()
        if away and away != self._away:
            say(f"{away}: the worker is started again when it does")
        self._away, self._again = away, time.monotonic() + CALM_S if away else 0.0
        for index, member in enumerate(self.members) if not away else ():
            if member in self._dead:
                self.members[index] = self._start()
                self._dead.remove(member)

    def _recovered(self) -> str:
        """Put what workers left into the queue; return what does not answer, "" if that was done.

        They may have died together with the server or the ledger, or since these are away.
        """
        from prefect.exceptions import PrefectException

        try:
            taken = asyncio.run(
                _while(lambda: self.server.process.poll() is None, _recover(self.home, alone=self.alone))
            )
        except (httpx.HTTPError, PrefectException, ServerError) as exc:
            return f"the server does not answer ({type(exc).__name__})"
        except LOST as exc:
            return f"the ledger does not answer ({type(exc).__name__}: {exc})"
        for run_id in taken:
            say(f"taken up after a crash: {run_id}")
        return ""

    def drain(self, asked: _Asked) -> None:
        """Let the workers finish what they run; stop waiting when asked a second time."""
        for member in self.members:
            member.terminate()
        while asked.times < 2 and any(member.poll() is None for member in self.members):
            time.sleep(LOOK_S)
        if asked.times >= 2:
            for member in self.members:
                member.terminate()

    def stop(self) -> None:
        for member in self.members:
            stop_child(member)


class _Ear:
    """The process that listens for modalities (`talaria.engine.listening`)."""

    def __init__(self, home: Home) -> None:
        self.log = home.root / "logs" / "listening.log"
        self.process = self._start()
        self._again = 0.0  # when it is started again, by `time.monotonic`; 0 while it runs

    def _start(self) -> subprocess.Popen[bytes]:
        return child([sys.executable, "-P", "-c", LISTENING], {}, self.log, umask=0o077)

    def keep(self) -> None:
        """Start it again some time after it died."""
        if self.process.poll() is None:
            return
        if not self._again:
            say(f"what listens ended with exit code {self.process.returncode}: starting it again (log: {self.log})")
            self._again = time.monotonic() + CALM_S
        elif time.monotonic() >= self._again:
            self.process, self._again = self._start(), 0.0

    def close(self) -> None:
        """Let nobody begin; open associations have some seconds."""
        self.process.terminate()

    def drain(self, asked: _Asked) -> None:
        """Wait until open associations have ended, or their time is over, or somebody asks a second time."""
        while asked.times < 2 and self.process.poll() is None:
            time.sleep(LOOK_S)

    def stop(self) -> None:
        stop_child(self.process)


async def _while(alive: Callable[[], bool], call: Coroutine[Any, Any, list[str]]) -> list[str]:
    """Return what a call returns that a server answers, as long as that lives.

    Its socket outlives it: nobody would refuse a connection, and the call would wait for a server that we are to start.

    Raises:
        ServerError: it ended first.
    """
    task = asyncio.ensure_future(call)
    while not (await asyncio.wait([task], timeout=LOOK_S))[0]:
        if not alive():
            task.cancel()
            await asyncio.wait([task])
            raise ServerError("the server ended")
    return task.result()


def _watch(server: FrontServer, crew: _Crew, ear: _Ear, asked: _Asked) -> None:
    """Keep server, workers and what listens alive until somebody asks to stop."""
    while not asked.event.wait(LOOK_S):
        try:
            if server.process.poll() is not None:
                _serve_again(server, asked)
            crew.keep()
            ear.keep()
        except OSError as exc:  # no process can be started, for a while: what lives goes on
            say(f"what ended can't be started again yet: {exc}")
            asked.event.wait(CALM_S)
    say("stopping: running dispatches are finished first; ask again to stop at once")


def _serve_again(server: FrontServer, asked: _Asked) -> None:
    """Start the server again that died; if it dies again, or isn't ready in time, leave that to the next look."""
    say(f"the server ended with exit code {server.process.returncode}: starting it again (log: {server.log})")
    server.restart()
    try:
        server.wait(asked.check)
    except ServerError as exc:
        if asked.times:
            return
        say(str(exc))
        if not server.entrance.upstream:  # else it waits for that one
            stop_child(server.process)
        asked.event.wait(CALM_S)


def _prepared(server: FrontServer, home: Home, asked: _Asked, *, alone: bool) -> list[str]:
    """Register what the server must know, and take up what a crash left, as soon as server and ledger answer.

    Returns:
        The ids of the runs taken up.

    Raises:
        ServerError: somebody asks to stop. Others: something is wrong that time does not mend.
    """
    with staying():
        from tasks.dispatch.patience import is_outage

    said = ""
    while True:
        asked.check()
        if server.process.poll() is not None:
            _serve_again(server, asked)
        try:
            return asyncio.run(
                _while(lambda: not asked.times and server.process.poll() is None, _prepare(home, alone=alone))
            )
        except (httpx.HTTPError, ServerError) as exc:
            if not (is_outage(exc) or isinstance(exc, ServerError)):
                raise
            away = f"the server does not answer ({type(exc).__name__})"
        except LedgerAway as exc:
            away = f"the ledger does not answer ({exc})"
        if away != said and not asked.times:
            say(f"{away}: it is waited for")
        said = away
        asked.event.wait(CALM_S)


async def _prepare(home: Home, *, alone: bool) -> list[str]:
    """Register what the server must know, and take up what a crash left; return the runs taken up."""
    from prefect import get_client

    from talaria.engine.registry import register

    async with get_client() as client:
        await register(client)
    return await _recover(home, alone=alone)


async def _recover(home: Home, *, alone: bool) -> list[str]:
    """Take up the runs of dead workers; `alone` if no other worker than ours may live."""
    from prefect import get_client

    from talaria.engine.recovery import recover

    async with get_client() as client:
        return await recover(client, home, POOL, alone=alone)


def _announce(home: Home, server: FrontServer, taken: list[str]) -> None:
    from blocks import REFUSED
    from talaria.front.users import Users

    say(f"pages: {server.address.ui.removesuffix('/v2')}/talaria/")
    say(f"Prefect UI: {server.address.ui}")
    if server.address.auth and not Users(home).all():
        say(f"it asks for a password once: it is the line in {home.root / 'api.auth'}; no user is needed with it")
    for run_id in taken:
        say(f"taken up after a crash: {run_id}")
    for name, reason in REFUSED.items():
        say(f"targets of type {name} can't be used: {reason}")
    for line in misspelt():
        say(line)
    if unset := "; ".join(roots.meaning()):
        say(unset)
    say("ready: Ctrl-C drains and stops")
