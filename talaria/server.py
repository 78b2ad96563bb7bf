"""The server process: the front door, with the embedded Prefect server on SQLite, or one elsewhere, behind it.

The process that starts it holds `server.lock`. Processes that use a server which a command started for its own duration
share `users.lock`, and the owner waits for them before it stops. The kernel releases both locks, and ends the server,
when their holder is killed.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import certifi
import httpx

from talaria import listener
from talaria.entrance import Entrance
from talaria.errors import ServerError, prefect_away
from talaria.logs import DATES, DATES_SETTING
from talaria.settings import client_environment, server_environment
from transfer.home import Home, locked

READY_S = 600  # the first start migrates the database: 8 s on an idle machine, minutes on a very busy one
YES = ("1", "true", "t", "yes", "y", "on")  # as Prefect reads a setting that is on
STOP_S = 15
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True)
class Address:
    """Where a running server is.

    Attributes:
        url: of Prefect's API, for processes of this machine.
        front: of the front door, for people.
        auth: whether it asks for a login.
        workers: whether workers run beside it; none do for a server that a command started.
    """

    url: str
    front: str
    auth: bool
    workers: bool = True

    @property
    def ui(self) -> str:
        """Prefect's UI."""
        return self.front + "/v2"


def child(
    argv: list[str], env: Mapping[str, str], log: Path, *, umask: int = -1, sockets: Sequence[socket.socket] = ()
) -> subprocess.Popen[bytes]:
    """Start a process that ends with us, also if we are killed; its output goes to the end of `log` (mode 0600).

    Args:
        umask: of the process; -1 for ours, as whatever delivers files to folders needs it.
        sockets: that it gets, under the same numbers.
    """
    parent = os.getpid()

    def die_with_parent() -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o600), "ab") as out:
        os.fchmod(out.fileno(), 0o600)
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={DATES_SETTING: DATES, **os.environ, **env},
            start_new_session=True,  # Ctrl-C in the terminal is for us; we stop our children in order
            preexec_fn=die_with_parent,
            umask=umask,
            pass_fds=[one.fileno() for one in sockets],
        )


def stop_child(process: subprocess.Popen[bytes], wait_s: float = STOP_S) -> None:
    """Stop a child: politely, then by force; one that the kernel does not let go is left to it."""
    for ask in (process.terminate, process.kill):
        ask()
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
            return


def running(home: Home) -> Address | None:
    """Return where the embedded server of this state directory runs; None if it doesn't.

    Raises:
        ServerError: it is being started, and does not become ready; or what listens there is not ours.
    """
    end = time.monotonic() + READY_S
    while True:
        with locked(home.root / "server.lock", fcntl.LOCK_EX | fcntl.LOCK_NB) as free:
            if free:
                return None
        try:
            known = json.loads((home.root / "server.json").read_text(encoding="utf-8"))
            address = Address(known["url"], known["front"], known["auth"], known["workers"])
            if not listener.is_ours(known["port"], known["inode"], known["pid"]):
                raise ServerError(f"what listens at {address.url} is not our server: it gets no password")
            if ready(address.url):
                return address
        except (OSError, ValueError, KeyError):
            pass
        if time.monotonic() > end:
            raise ServerError(f"the server of {home.root} does not answer; see {home.root}/logs/server.log")
        time.sleep(0.2)


def healthy(url: str) -> bool:
    """Return True if a Prefect API answers."""
    try:
        return answers(url)
    except ServerError:
        return False


def answers(url: str) -> bool:
    """Return True if a Prefect API answers; False if nobody does, or a proxy for one that is away.

    Raises:
        ServerError: something else answers there, or its certificate is not trusted.
    """
    try:
        verify = trusted() if url.startswith("https:") else False
        code = httpx.get(f"{url}/health", timeout=5, trust_env=False, verify=verify).status_code
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as exc:
        raise ServerError(f"PREFECT_API_URL={url}: {exc}") from exc
    except httpx.HTTPError as exc:
        if wrong := _untrusted(exc):
            raise ServerError(
                f"the certificate of PREFECT_API_URL={url} is not trusted: {wrong}; PREFECT_API_SSL_CERT_FILE names the"
                " file of the authorities that are"
            ) from exc
        return False
    if code != 200 and code < 500:
        raise ServerError(f"what answers at PREFECT_API_URL={url} is no Prefect API ({code}): it ends with /api")
    return code == 200


def trusted() -> ssl.SSLContext:
    """Return how to verify a Prefect server, as its own clients do: by their variables, or the authorities of certifi.

    They don't know those of the system: a server that only these vouch for would be found here, and not by them.

    Raises:
        ServerError: the file that the variable names can't be used.
    """
    name = next((one for one in ("PREFECT_API_SSL_CERT_FILE", "SSL_CERT_FILE") if os.environ.get(one)), "")
    try:
        context = ssl.create_default_context(cafile=os.environ[name] if name else certifi.where())
    except OSError as exc:  # of ssl, too
        raise ServerError(f"{name}={os.environ.get(name)} can't be used: {exc.strerror or exc}") from exc
    if os.environ.get("PREFECT_API_TLS_INSECURE_SKIP_VERIFY", "").lower() in YES:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _untrusted(exc: BaseException | None) -> str:
    """Return what is wrong with a certificate, "" if an error says nothing of one."""
    while exc is not None:
        if isinstance(exc, ssl.SSLCertVerificationError):
            return exc.verify_message
        exc = exc.__cause__ or exc.__context__
    return ""


def ready(url: str) -> bool:
    """Return True if our own server answers, and the Prefect server behind it.

    Asked often while it starts, so without httpx, which makes a TLS context for each question: 25 ms of CPU.
    """
    there = urlsplit(url)
    connection = HTTPConnection(there.hostname or "", there.port, timeout=5)
    try:
        connection.request("GET", "/talaria/health")
        answer = connection.getresponse()
        return answer.status == 200 and json.loads(answer.read())["prefect"] == "ready"
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return False
    finally:
        connection.close()


class FrontServer:
    """The server process and its sockets, which outlive it; made by `serving`."""

    def __init__(self, home: Home, entrance: Entrance, workers: bool, outer: socket.socket | None) -> None:
        self.home, self.entrance = home, entrance
        self.outer = outer or listener.bind(entrance.host, entrance.port)
        self.inner = listener.bind("127.0.0.1", 0) if entrance.apart else None
        host, port = self.outer.getsockname()[:2]
        scheme = "https" if entrance.certificate or entrance.peers else "http"
        shown = entrance.hosts[0] if entrance.peers else f"{_shown(host)}:{port}"
        self.port = self.inner.getsockname()[1] if self.inner else port
        own = "127.0.0.1" if self.inner else _shown(host)
        self.address = Address(f"http://{own}:{self.port}/api", f"{scheme}://{shown}", entrance.auth, workers)
        self.log = home.root / "logs" / "server.log"
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        one = self.entrance
        orders = {
            "outer": self.outer.fileno(),
            "inner": self.inner.fileno() if self.inner else -1,
            "auth": one.auth,
            "hosts": one.hosts,
            "certificate": one.certificate,
            "key": one.key,
            "peers": one.peers,
            "user_header": one.user_header,
            "proxy_role": one.proxy_role,
            "upstream": one.upstream,
        }
        environment = {} if one.upstream else server_environment(self.home, self.address.url)
        return child(
            [sys.executable, "-P", "-m", "talaria.front"],
            environment | {"TALARIA_HOME": str(self.home.root), "TALARIA_FRONT": json.dumps(orders)},
            self.log,
            umask=0o077,  # its database holds the targets' secrets
            sockets=[self.outer, *([self.inner] if self.inner else [])],
        )

    def wait(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait until it answers.

        Raises:
            ServerError: it ended, or is not ready in time; the message ends with its log.
        """
        end = time.monotonic() + READY_S
        while not ready(self.address.url):
            check()
            if self.process.poll() is not None or time.monotonic() > end:
                raise ServerError(f"the server did not start:\n{_tail(self.log)}")
            time.sleep(0.1)
        record = self.home.root / "server.json"
        part = record.with_suffix(".part")
        held = {
            "prefect": self.entrance.upstream,
            "pid": os.getpid(),
            "port": self.port,
            "inode": listener.inode(self.inner or self.outer),
        }
        part.unlink(missing_ok=True)
        with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
            json.dump(asdict(self.address) | held, file)
        part.replace(record)

    def restart(self) -> None:
        """Start it again after it died, on the same sockets."""
        self.process = self._start()

    def stop(self) -> None:
        stop_child(self.process)
        for one in (self.outer, self.inner):
            if one:
                one.close()
        (self.home.root / "server.json").unlink(missing_ok=True)


@contextmanager
def serving(
    home: Home, entrance: Entrance, *, workers: bool = True, outer: socket.socket | None = None
) -> Iterator[FrontServer]:
    """Start the server of a state directory; it is stopped when the block ends.

    Args:
        workers: whether the caller runs workers beside it; if not, its users run dispatches by themselves.
        outer: the socket that it listens on; by default, one is bound as the entrance says.

    Raises:
        ServerError: one runs already, the port is taken, or it can't be started.
    """
    with locked(home.root / "server.lock", fcntl.LOCK_EX | fcntl.LOCK_NB) as lock:
        if lock is None:
            raise ServerError(f"the server of {home.root} runs already: stop it first, or use another TALARIA_HOME")
        (home.root / "server.json").unlink(missing_ok=True)
        server = FrontServer(home, entrance, workers, outer)
        try:
            yield server
        finally:
            server.stop()


def _shown(host: str) -> str:
    """Return where a client on this machine finds a socket that is bound to an address."""
    connect = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"[{connect}]" if ":" in connect else connect


def use(environment: Mapping[str, str]) -> None:
    """Make this process a client of the server that the environment names."""
    os.environ.update(environment)
    if "prefect" in sys.modules:  # it has read its settings when it was imported
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


@contextmanager
def reached(home: Home) -> Iterator[tuple[Address | None, bool]]:
    """Make a Prefect API reachable during the block.

    PREFECT_API_URL set: that server. Else the embedded one, which is started, and stopped at the end, if it does
    not run. Yields its address (None for a server that isn't ours) and whether dispatches must be run here, for no
    worker runs beside it: it was started here, or by another command for its own duration. The environment of
    this process is set, and Prefect made to look at it again if it is imported already.

    Raises:
        ServerError: no server can be reached or started.
    """
    url = os.environ.get("PREFECT_API_URL")
    if url:
        if not answers(url.rstrip("/")):
            raise ServerError(prefect_away(url))
        yield None, False
        return
    with locked(home.root / "users.lock", fcntl.LOCK_SH) as users:
        address = running(home)
        if address:
            use(client_environment(home, address.url))
            yield address, not address.workers
            return
        try:
            with serving(home, Entrance("127.0.0.1", 0), workers=False) as server:
                use(client_environment(home, server.address.url))
                server.wait()
                try:
                    yield server.address, True
                finally:
                    send_what_is_queued()
                    # Others that came meanwhile use this server: stop it when the last of them has ended.
                    fcntl.flock(users, fcntl.LOCK_EX)  # type: ignore[arg-type]  # taken with waiting: never None
        finally:
            for name in client_environment(home, ""):
                os.environ.pop(name, None)


def send_what_is_queued() -> None:
    """Send the log lines and events that Prefect holds for a moment, before their server stops."""
    if "prefect" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        APILogWorker.drain_all(timeout=5)
        EventsWorker.drain_all(timeout=5)


def _tail(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace")[-2000:]
    except OSError:
        return ""
