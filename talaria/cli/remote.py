"""Commands as clients of Talaria's API, which `talaria up` serves; by the standard library, which is quick to load.

Which server: TALARIA_URL with TALARIA_TOKEN; else the one that runs for the state directory, with the machine's token.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from talaria import __version__
from talaria.console import say
from talaria.errors import Refused, ServerError

API = "/talaria/api/v1"
CONNECT_S = 10.0
ANSWER_S = 900.0  # a query of a slow archive
RETRY_S = 120.0  # how long a server that is started again is waited for
PAUSE_S = 0.3
Event = tuple[str, dict[str, Any]]

# The operations of talaria.service as requests. What is not in the path is in the query of GET, else in the body.
ROUTES: dict[str, tuple[str, str]] = {
    "list_targets": ("GET", "/targets"),
    "show_target": ("GET", "/targets/{name}"),
    "apply_targets": ("POST", "/targets"),
    "remove_target": ("DELETE", "/targets/{name}"),
    "rename_target": ("POST", "/targets/{name}/rename"),
    "enable_target": ("POST", "/targets/{name}/enable"),
    "export_targets": ("GET", "/target-export"),
    "target_types": ("GET", "/target-types"),
    "list_sources": ("GET", "/sources"),
    "show_source": ("GET", "/sources/{name}"),
    "apply_sources": ("POST", "/sources"),
    "remove_source": ("DELETE", "/sources/{name}"),
    "enable_source": ("POST", "/sources/{name}/enable"),
    "source_types": ("GET", "/source-types"),
    "test_source": ("POST", "/sources/{name}/test"),
    "sweep_source": ("POST", "/sources/{name}/sweep"),
    "retry_source": ("POST", "/sources/{name}/retry"),
    "list_rules": ("GET", "/rules"),
    "show_rule": ("GET", "/rules/{name}"),
    "apply_rules": ("POST", "/rules"),
    "remove_rule": ("DELETE", "/rules/{name}"),
    "enable_rule": ("POST", "/rules/{name}/enable"),
    "test_rule": ("POST", "/rules/{name}/test"),
    "rule_types": ("GET", "/rule-types"),
    "create_dispatch": ("POST", "/dispatches"),
    "plan_dispatch": ("POST", "/dispatches/plan"),
    "find_matches": ("POST", "/matches"),
    "create_query": ("POST", "/queries"),
    "create_retrieval": ("POST", "/retrievals"),
    "list_jobs": ("GET", "/jobs"),
    "show_job": ("GET", "/jobs/{job}"),
    "retry_job": ("POST", "/jobs/{job}/retry"),
    "send_job": ("POST", "/jobs/{job}/send"),
    "cancel_job": ("POST", "/jobs/{job}/cancel"),
    "pause_job": ("POST", "/jobs/{job}/pause"),
    "resume_job": ("POST", "/jobs/{job}/resume"),
    "recover_jobs": ("POST", "/recover"),
    "prune": ("POST", "/prune"),
    "status": ("GET", "/status"),
    "health": ("GET", "/health"),
}
STREAMS: dict[str, tuple[str, str]] = {
    "test_targets": ("POST", "/target-tests"),
    "test_values": ("POST", "/target-tests/unsaved"),
    "follow_job": ("GET", "/jobs/{job}/events"),
}
LISTED = {"targets": "target", "sources": "source", "rules": "notify", "jobs": "jobs"}  # by which command
IN_QUERY = ("test_targets", "retry_job")  # their values are in the query although they are a POST
AGAIN = ("create_dispatch", "create_query", "create_retrieval")  # with a key, so that they can be sent again


class NoApi(Exception):
    """The server has no API of Talaria's: it is older, or something else."""


@dataclass
class ApiClient:
    """A server that serves the API.

    Attributes:
        url: of the server, without a path.
        authorization: the header's value, "" for none.
        shown: the url that people use.
        check: called before anything is sent; raises if the listener is not the expected server.
    """

    url: str
    authorization: str
    shown: str
    check: Callable[[], None] = lambda: None
    own: bool = field(default=False, init=False)  # runs are the workers' there
    local: bool = True
    _version_said: bool = field(default=False, init=False)
    _answered: bool = field(default=False, init=False)  # something, so that it was named right
    _kept: http.client.HTTPConnection | None = field(default=None, init=False)

    def call(self, operation: str, **given: Any) -> dict[str, Any]:
        """Do an operation and return its document.

        Raises:
            Refused: it says no. ServerError: it can't be reached. NoApi: it has no such API.
        """
        headers = {"Idempotency-Key": uuid.uuid4().hex} if operation in AGAIN else {}
        method, path, body = _request(ROUTES[operation], given, in_query=operation in IN_QUERY)
        answer = self._ask(method, path, body, headers, again=method == "GET" or bool(headers))
        data = answer.read()
        if not (answer.getheader("Content-Type") or "").startswith("application/json"):
            raise NoApi(self.url)  # the pages of a server that has no API answer everything
        document: dict[str, Any] = json.loads(data)
        return document

    def link(self, run_id: str) -> str:
        """Return where the UI shows a run."""
        return f"{self.shown}/v2/runs/flow-run/{run_id}"

    def __enter__(self) -> ApiClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self._drop()

    def stream(self, operation: str, **given: Any) -> Iterator[Event]:
        """Do an operation and yield its events; following a job goes on after the server was away for a moment."""
        method, path, body = _request(STREAMS[operation], given, in_query=operation in IN_QUERY)
        end = time.monotonic() + RETRY_S
        while True:
            answer = self._ask(method, path, body, {}, again=method == "GET", fresh=True)
            try:
                for event in _events(answer):
                    if event[0] == "error":
                        raise _refusal(event[1].get("status", 500), event[1]["error"])
                    end = time.monotonic() + RETRY_S
                    yield event
                    if event[0] == "result" and operation == "follow_job":
                        return
                if operation != "follow_job":
                    return
                if time.monotonic() > end:
                    raise ServerError(f"the server at {self.url} reports no more of it")
            except (OSError, http.client.HTTPException) as exc:
                if method != "GET" or time.monotonic() > end:
                    raise ServerError(f"the server at {self.url} went away: {_words(exc)}") from exc
            finally:
                self._drop()
            time.sleep(PAUSE_S)

    def _ask(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], *, again: bool, fresh: bool = False
    ) -> http.client.HTTPResponse:
        end = time.monotonic() + RETRY_S
        while True:
            try:
                connection = self._connected(fresh=fresh)
                connection.request(method, API + path, body, self._headers(body) | headers)
                answer = connection.getresponse()
            except (OSError, http.client.HTTPException) as exc:
                self._drop()
                refused = isinstance(exc, ConnectionRefusedError)
                # One that was named wrong is not waited for: a host, a port or a certificate doesn't change by itself.
                in_vain = not self.local and (refused or not self._answered)
                if not (again or refused) or time.monotonic() > end or in_vain:
                    raise ServerError(_unreached(self.url, exc)) from exc
                self._still_there(exc)
                time.sleep(PAUSE_S)
                continue
            self._answered = True
            if answer.status == 503 and time.monotonic() < end and again:  # it is about to start
                answer.read()
                time.sleep(_pause_s(answer.getheader("Retry-After")))
                continue
            if answer.status >= 400:
                raise self._refused(answer)
            self._compare(answer)
            return answer

    def _still_there(self, exc: Exception) -> None:
        """Raise ServerError if the server of the state directory no longer runs."""
        if self.local and not _is_locked(_home() / "server.lock"):
            raise ServerError(f"the server at {self.url} has ended") from exc

    def _connected(self, *, fresh: bool) -> http.client.HTTPConnection:
        if self._kept is not None and not fresh:
            return self._kept
        self._drop()
        self.check()
        place = urlsplit(self.url)
        host = place.hostname or ""
        if place.scheme == "https":
            self._kept = http.client.HTTPSConnection(
                host,
                place.port,
                timeout=CONNECT_S,
                context=_trusting(os.environ.get("TALARIA_CA")),
            )
        else:
            self._kept = http.client.HTTPConnection(host, place.port, timeout=CONNECT_S)
        self._kept.connect()
        if self._kept.sock:
            self._kept.sock.settimeout(ANSWER_S)
        return self._kept

    def _drop(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def _headers(self, body: bytes | None) -> dict[str, str]:
        found = {"Accept": "application/json, text/event-stream", "User-Agent": f"talaria/{__version__}"}
        if self.authorization:
            found["Authorization"] = self.authorization
        if body is not None:
            found["Content-Type"] = "application/json"
        return found

    def _refused(self, answer: http.client.HTTPResponse) -> Exception:
        data = answer.read()
        try:
            words = str(json.loads(data)["error"])
        except (ValueError, KeyError, TypeError):
            if answer.status in (404, 405):
                return NoApi(self.url)
            words = ""
        if answer.status == 401 and not self.local:
            words = f"TALARIA_TOKEN: {words}" if self.authorization else "the server wants a token: set TALARIA_TOKEN"
        return _refusal(answer.status, words or f"the server at {self.url} answers {answer.status} {answer.reason}")

    def _compare(self, answer: http.client.HTTPResponse) -> None:
        theirs = answer.getheader("Talaria-Version") or __version__
        if theirs != __version__ and not self._version_said:
            self._version_said = True
            say(f"the server is Talaria {theirs}, this command {__version__}: update the older one")


def _pause_s(asked: str | None) -> float:
    """Return the seconds to wait for a server that is about to start; a proxy before it may name a date."""
    return min(5.0, float(asked)) if asked and asked.strip().isdecimal() else PAUSE_S


def _request(route: tuple[str, str], given: dict[str, Any], *, in_query: bool) -> tuple[str, str, bytes | None]:
    method, path = route
    for name in [name for name in given if f"{{{name}}}" in path]:
        value = str(given.pop(name)).strip()
        parts = value.split("/") if value else [" "]  # the server refuses that with the names that there are
        if not {"", ".", ".."}.isdisjoint(parts) or "\\" in value or (name == "job" and len(parts) > 1):
            command = f"`talaria {LISTED[path.split('/')[1]]} list`"
            raise ValueError(f"nothing is named {value!r}: {command} shows what there is")
        path = path.replace(f"{{{name}}}", "/".join(quote(part, safe="") for part in parts))
    if method in ("GET", "DELETE") or in_query:
        values = {name: _written(value) for name, value in given.items() if value is not None}
        return method, f"{path}?{urlencode(values)}" if values else path, b"" if method == "POST" else None
    return method, path, json.dumps(given).encode() if given else b""


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _events(answer: http.client.HTTPResponse) -> Iterator[Event]:
    """Yield the events of a stream (WHATWG HTML, 9.2): those that the API writes, each with one line of data."""
    name, data = "", ""
    for raw in answer:
        line = raw.decode("utf-8").rstrip("\r\n")
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            data = line[6:]
        elif not line and data:
            yield name, json.loads(data)
            name, data = "", ""


def _refusal(status: int, words: str) -> Exception:
    """Return the error, with its exit code, that an unexpected answer means."""
    return Refused(words, 1 if status == 502 else 3 if status >= 500 else 2)


def _trusting(authority: str | None) -> ssl.SSLContext:
    """Return what a connection is verified by: the certificate of an authority, or the system's.

    Raises:
        ValueError: that can't be used.
    """
    try:
        return ssl.create_default_context(cafile=authority or None)
    except OSError as exc:
        why = "is no certificate in PEM" if isinstance(exc, ssl.SSLError) else exc.strerror
        raise ValueError(f"TALARIA_CA={authority}: {why}") from exc


def _unreached(url: str, exc: BaseException) -> str:
    """Return why a server can't be spoken to, and what to change where that is known."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        why = exc.verify_message.rstrip(".")
        other = "mismatch" in why
        return f"the certificate of {url} is {'for another host' if other else 'not trusted'}: {why}" + (
            "" if other else "; TALARIA_CA names the certificate of a private authority"
        )
    if isinstance(exc, ssl.SSLError) and not isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return f"what listens at {url} does not speak TLS as we do ({_reason(exc)}): is it http://, or another port?"
    return f"no server answers at {url}: {_words(exc)}"


def _reason(exc: ssl.SSLError) -> str:
    return (exc.reason or str(exc)).lower().replace("_", " ")


def _words(exc: BaseException) -> str:
    return getattr(exc, "strerror", None) or str(exc) or type(exc).__name__


# ---- which server


def found() -> ApiClient | None:
    """Return the server whose API commands use; None if there is none, and a command works by itself.

    Raises:
        ValueError: TALARIA_URL is not valid.
    """
    if url := os.environ.get("TALARIA_URL"):
        return _named(url)
    record = _record()
    if record is None or "inode" not in record or _elsewhere(record):  # without it: of an older version
        return None
    secret = ""
    if record.get("auth"):
        with suppress(OSError):
            secret = (_home() / "api.auth").read_text(encoding="ascii").strip()
        if not secret:
            return None
    url = str(record["url"]).removesuffix("/api")
    return ApiClient(url, f"Bearer {secret}" if secret else "", str(record.get("front") or url), _checker(record, url))


def _named(url: str) -> ApiClient:
    place = urlsplit(url)
    try:
        named = place.scheme in ("http", "https") and bool(place.hostname) and place.port != 0
    except ValueError:  # of a port that is none
        named = False
    if not named:
        raise ValueError(f"TALARIA_URL={url}: expected http(s)://host:port")
    token = os.environ.get("TALARIA_TOKEN", "").strip()
    if token and place.scheme == "http" and place.hostname not in ("127.0.0.1", "::1", "localhost"):
        raise ValueError(f"TALARIA_URL={url}: a token is sent over https only")
    base = f"{place.scheme}://{place.netloc}"
    return ApiClient(base, f"Bearer {token}" if token else "", base, local=False)


def _elsewhere(record: dict[str, Any]) -> bool:
    """Return True if a Prefect server is named that is not the one which the running `talaria up` serves."""
    named = os.environ.get("PREFECT_API_URL", "").rstrip("/")
    return bool(named) and named not in (str(record.get("prefect", "")).rstrip("/"), str(record["url"]).rstrip("/"))


def _record() -> dict[str, Any] | None:
    """Return the record of the running `talaria up`; None if none runs for the state directory."""
    home = _home()
    if not _is_locked(home / "server.lock"):
        return None
    try:
        if home.stat().st_uid != os.geteuid():  # refused, with a word, by whoever does without
            return None
        record: dict[str, Any] = json.loads((home / "server.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("workers") and record.get("url") else None


def _home() -> Path:
    """Return the state directory, without reading the other settings; they are checked where they are used."""
    from talaria.home import home_of_settings

    return home_of_settings()


def _is_locked(path: Path) -> bool:
    import fcntl

    try:
        with open(path, encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _checker(record: dict[str, Any], url: str) -> Callable[[], None]:
    """Return the check that the listener is the server of our own `talaria up`, before it gets the token."""

    def check() -> None:
        from talaria.listener import is_ours

        if not is_ours(int(record["port"]), int(record["inode"]), int(record["pid"])):
            raise ServerError(f"what listens at {url} is not our server: it gets no token")

    return check
