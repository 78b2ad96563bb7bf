"""A server that answers commands as Talaria's API does, or otherwise; in this process, with a state directory."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from talaria import __version__

SECRET = "talaria:of-this-machine"


@dataclass
class Asked:
    """A request."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Api:
    """What it answers, by method and path; each answer is a status and a document, or text for a stream of events.

    Attributes:
        answers: lists of which the last answer stays.
    """

    home: Path
    port: int
    answers: dict[tuple[str, str], list[tuple[int, Any]]]
    version: str = __version__
    asked: list[Asked] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("TALARIA_", "PREFECT_"))}
        return kept | {"TALARIA_HOME": str(self.home), "HOME": str(self.home.parent)}

    def paths(self) -> list[str]:
        return [f"{one.method} {one.path.removeprefix('/talaria/api/v1')}" for one in self.asked]


def events(*pairs: tuple[str, Any]) -> str:
    """Return a stream of events."""
    return "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in pairs)


@contextmanager
def api(
    home: Path, answers: dict[tuple[str, str], list[tuple[int, Any]]], *, record: dict[str, Any] | None = None
) -> Iterator[Api]:
    """Serve until the block ends, as `talaria up` for the state directory `home` does."""
    home.mkdir(mode=0o700, exist_ok=True)
    answers = {("GET", "/health"): [(200, {"ok": True})], **answers}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size) if size else b""
            one.asked.append(Asked(self.command, self.path, dict(self.headers), json.loads(body) if body else None))
            path = self.path.removeprefix("/talaria/api/v1").partition("?")[0]
            queue = one.answers.get((self.command, path), [(404, "<html>no such page</html>")])
            status, document = queue.pop(0) if len(queue) > 1 else queue[0]
            if document is None:  # the connection breaks
                self.close_connection = True
                return
            is_text = isinstance(document, str)
            data = document.encode() if is_text else json.dumps(document).encode()
            kind = (
                "application/json" if not is_text else "text/html" if document.startswith("<") else "text/event-stream"
            )
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Talaria-Version", one.version)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _answer

        def log_message(self, *args: object) -> None:
            """Nothing is printed."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    one = Api(home, server.server_address[1], answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    held = {"pid": os.getpid(), "port": one.port, "inode": os.fstat(server.socket.fileno()).st_ino}
    known = {"url": f"{one.url}/api", "front": one.url, "auth": True, "workers": True, **held}
    (home / "server.json").write_text(json.dumps(known | (record or {})))
    (home / "api.auth").write_text(SECRET + "\n")
    (home / "api.auth").chmod(0o600)
    with open(home / "server.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield one
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
