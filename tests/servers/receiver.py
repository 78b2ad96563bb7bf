"""A web server that takes webhooks, and answers as it is told to."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.servers.certificates import Authority


@dataclass
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


@dataclass
class Receiver:
    """What has come, and how it is answered.

    Attributes:
        status: of the next answers.
        location: of a redirect.
        hold: while it is set, requests are taken and not answered.
        taken: those that were answered with success.
    """

    port: int = 0
    status: int = 204
    location: str = ""
    retry_after: str = ""
    scheme: str = "http"
    hold: threading.Event = field(default_factory=threading.Event)
    asked: list[Received] = field(default_factory=list)
    taken: list[Received] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/hook"


@contextmanager
def receiver(authority: Authority | None = None, port: int = 0) -> Iterator[Receiver]:
    """Run a receiver; with TLS where an authority is given."""
    one = Receiver()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            got = Received(self.path, {key.lower(): value for key, value in self.headers.items()}, body)
            one.asked.append(got)
            while one.hold.is_set() and not ended.wait(0.05):
                pass
            if ended.is_set():
                return
            if 200 <= one.status < 300:
                one.taken.append(got)
            self.send_response(one.status)
            if one.location:
                self.send_header("Location", one.location)
            if one.retry_after:
                self.send_header("Retry-After", one.retry_after)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            one.asked.append(Received(self.path, {}, b""))
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # of clients that went away

    ended = threading.Event()
    server = Server(("127.0.0.1", port), Handler)
    if authority is not None:
        leaf = authority.leaf("receiver")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(leaf.cert, leaf.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        one.scheme = "https"
    one.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield one
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
