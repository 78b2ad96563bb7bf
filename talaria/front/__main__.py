"""The server process: the front door on sockets that it inherits. Started by `talaria.server`, never by people."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import logging
import os
import signal
import socket
import ssl
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from talaria import logs
from talaria.front import metrics, pages
from talaria.front.access import Role
from talaria.front.api import routes, shared
from talaria.front.api.asking import Reach
from talaria.front.app import build
from talaria.front.changes import ChangeCount, WatchedUpstream
from talaria.front.embedded import EmbeddedPrefect, is_sqlite, load
from talaria.front.followed import FollowedSources
from talaria.front.gate import Application
from talaria.front.heard import AuditWriter
from talaria.front.impatient import ImpatientProtocol
from talaria.front.keys import Door, KeyRing
from talaria.front.offered import OfferedNames
from talaria.front.own_parts import OwnParts
from talaria.front.remote import RemotePrefect
from talaria.front.removed import UsedTargets
from talaria.front.upstream import Upstream
from talaria.notify.notifier import Notifier
from talaria.settings import worker_auth
from transfer import silent
from transfer.home import Home

ORDERS = "TALARIA_FRONT"  # the variable that says what is to be served
KEEP_ALIVE_S = 5
GRACE_S = 5  # for answers under way, at the end
LOADED_S = 0.5  # between two looks whether Prefect's server is loaded
GARBAGE = (20_000, 20, 20)  # gc.set_threshold: the usual (700, 10, 10) go through all that is kept at every second page
FIRST_S = 60  # before what is old is looked for
LOOK_S = 5  # between two checks whether the certificate has been renewed
_logger = logging.getLogger("talaria.front")


@dataclass(frozen=True)
class Orders:
    """What the process is to serve, as `talaria.server` orders it.

    Attributes:
        outer, inner: descriptors of the sockets; inner -1 for none.
        certificate, key: files of the outer socket's TLS, "" for none.
        upstream: the API of a Prefect server elsewhere, "" for the embedded one.
        rest: as in `Door`.
    """

    outer: int
    inner: int
    auth: bool
    hosts: list[str]
    certificate: str
    key: str
    peers: list[str]
    user_header: str
    proxy_role: str
    upstream: str


class _Server(uvicorn.Server):
    """A server that leaves signals to the process: uvicorn's own raises them again when it has stopped.

    Nothing would be done after that: what was just heard would be missing in the audit trail, and the other socket's
    answers would break off.
    """

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Do nothing."""
        yield


class Front:
    """The server process."""

    def __init__(self, orders: Orders, home: Home) -> None:
        self.orders, self.home, self.failed, self.heard = orders, home, False, AuditWriter()
        inner = socket.socket(fileno=orders.inner) if orders.inner >= 0 else None
        self.outer, self.inner = socket.socket(fileno=orders.outer), inner
        door = Door(
            auth=orders.auth,
            hosts=frozenset(orders.hosts),
            tls=bool(orders.certificate),
            peers=tuple(orders.peers),
            user_header=orders.user_header,
            proxy_role=Role.of(orders.proxy_role) if orders.proxy_role else None,
            inner_port=inner.getsockname()[1] if inner else 0,
        )
        changes, run_changes = ChangeCount(), ChangeCount()
        self._changes = changes
        prefect: Upstream = (
            RemotePrefect(orders.upstream, os.environ.get("PREFECT_API_AUTH_STRING", ""))
            if orders.upstream
            else EmbeddedPrefect(worker_auth(home), self._load, self._fail)
        )
        self.upstream: Upstream = WatchedUpstream(
            prefect, changes, run_changes, lambda: not orders.upstream and is_sqlite()
        )
        reach = Reach(
            shared(self.upstream),
            home,
            embedded=not orders.upstream,
            url=orders.upstream,
            upstream=self.upstream,
            certificate=orders.certificate,
            changes=changes,
            run_changes=run_changes,
        )
        self._reach = reach
        own = [*pages.routes(reach), *routes(reach), *metrics.routes(reach, orders.certificate)]
        offered = OfferedNames(self.upstream, reach.office_in)
        kept = OwnParts(offered, reach.office_in)
        behind = UsedTargets(FollowedSources(kept, reach.office_in), reach.office_in)
        self.app = build(KeyRing(home), door, self.upstream, own, self.heard, behind)

    def _load(self) -> tuple[Application, Any]:
        """Return Prefect's application in this process, and the FastAPI within it; what can't be sent rests at once."""
        app, prefect = load()
        from talaria.engine.resting import Resting, expect_what_rests_now

        expect_what_rests_now()

        def mark() -> str:
            return f"{self._changes.count}" if is_sqlite() else ""

        return Resting(app, self.home, self._reach.client, mark), prefect

    async def serve(self) -> None:
        """Serve until SIGTERM."""
        tls: dict[str, Any] = {}
        if self.orders.certificate:
            tls = {"ssl_certfile": self.orders.certificate, "ssl_keyfile": self.orders.key, "ssl_keyfile_password": ""}
        self.server = _Server(_config(self.app, lifespan="on", **tls))
        self._servers = [self.server]
        tasks = [asyncio.create_task(self.server.serve([self.outer]))]
        if self.inner:
            self._servers.append(_Server(_config(self.app, lifespan="off")))
            tasks.append(asyncio.create_task(self._servers[-1].serve([self.inner])))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._stop)
        besides = [asyncio.create_task(one) for one in (self._renew(), self._keep(), self._notify())]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in besides:
                task.cancel()
            await asyncio.to_thread(self.heard.close)
            await asyncio.wait(besides)

    def _stop(self) -> None:
        """Let the servers finish the answers that are under way, and end."""
        for one in self._servers:
            one.should_exit = True

    def _fail(self) -> None:
        self.failed = True
        self._stop()

    async def _keep(self) -> None:
        """Keep what is remembered within its bounds."""
        while self.upstream.state == "starting":  # noqa: ASYNC110 - a thread loads it
            await asyncio.sleep(LOADED_S)
        _set_aside()
        await asyncio.sleep(FIRST_S)
        retention = await asyncio.to_thread(importlib.import_module, "talaria.engine.retention")  # with all of Prefect
        _set_aside()  # and what the first pages have loaded
        await retention.keep(self.home, self.upstream.client, embedded=not self.orders.upstream)

    async def _notify(self) -> None:
        """Write to people when something happens."""
        upstream, certificate = self.upstream, self.orders.certificate

        def ready() -> bool:
            if upstream.state != "ready":
                return False
            logs.set_up()  # Prefect's own handlers are there now
            return True

        client, saved = self._reach.client, self._changes
        await Notifier(self.home, upstream.client, client, ready, certificate, lambda: saved.count).run()

    async def _renew(self) -> None:
        """Load the certificate's files again when they have changed; keep the old ones if the new are not valid."""
        paths = [one for one in (self.orders.certificate, self.orders.key) if one]
        seen = {path: _mark(path) for path in paths}
        while paths:
            await asyncio.sleep(LOOK_S)
            now = await silent.looked(_mark, paths)  # one in a share whose server is away is not renewed
            context = self.server.config.ssl if self.server.config.loaded else None
            if now == seen or now.keys() != seen.keys() or context is None:
                continue
            try:
                trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                for one in (trial, context):
                    one.load_cert_chain(self.orders.certificate, self.orders.key, "")
            except (OSError, ssl.SSLError) as exc:
                _logger.warning("the renewed certificate can't be used yet: %s", exc)  # half of the pair, perhaps
                continue
            seen = now
            _logger.warning("the certificate has been renewed")


def _set_aside() -> None:
    """Let the collector of garbage never look again at what is there now.

    Modules and their classes are a million objects: to go through them took 0.1 s each time, and nobody got an answer.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE)


def _config(app: Any, *, lifespan: Any, **tls: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan=lifespan,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        proxy_headers=False,  # the gate decides which proxies are trusted
        server_header=False,
        http=ImpatientProtocol,  # of h11, which bounds the head of a request; httptools does not
        **tls,
    )


def _mark(path: str) -> tuple[int, int, int] | None:
    try:
        info = Path(path).stat()
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size


def main() -> None:
    """Serve with the orders in the environment."""
    logs.set_up()
    orders = Orders(**json.loads(os.environ.pop(ORDERS)))
    front: Front | None = None

    async def serve() -> bool:
        nonlocal front
        front = Front(orders, Home.current())
        await front.serve()
        return front.failed

    failed = asyncio.run(serve())
    logging.shutdown()
    os._exit(3 if failed else 0)  # all is done: libraries' threads, and a million objects, are not waited for


if __name__ == "__main__":
    main()
