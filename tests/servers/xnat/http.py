"""The stand-in's HTTP: requests, logins, bodies of any size, faults on demand. What is asked for is in `rest`."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import mmap
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.servers.xnat.model import Login, Refusal, Store
from tests.servers.xnat.service import NAMES, Upload

BROWSERS = re.compile(r"Mozilla|Chrome|Safari|Opera")
PIECE = 1 << 20
ERROR_PAGE = """<html>
<head>
   <title>Status page</title>
</head>
<body>
<h3>{}</h3><p>You can get technical details <a href="http://www.w3.org/Protocols/rfc2616/rfc2616-sec10.html">here</a>.<br>
Please continue your visit at our <a href="/">home page</a>.
</p>
</body>
</html>
"""
LOGIN_PAGE = "<!DOCTYPE html><html><head><title>XNAT</title></head><body><h1>Please log in</h1></body></html>"


@dataclass
class Reply:
    body: bytes | str = b""
    status: int = 200
    kind: str = "text/plain"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """Something that goes wrong with requests that match, so many times.

    Attributes:
        method, path: of the request; the path is a regular expression.
        reply: the answer instead of XNAT's own; None for none at all.
        read_body: whether the body is read before that.
        run: whether the request is carried out before that.
        wait_s: silence before the answer.
        hang_up: close the connection instead of any answer.
        expire: the login ends while the request runs, which is answered with 401.
    """

    method: str
    path: str
    reply: Reply | None = None
    read_body: bool = True
    run: bool = False
    wait_s: float = 0.0
    hang_up: bool = False
    expire: bool = False
    times: int = 1


class Request:
    """One request: its path without the query, parameters, user, and a way to its body."""

    def __init__(self, handler: Handler) -> None:
        parts = urlsplit(handler.path)
        self.handler = handler
        self.method = handler.command
        self.path = unquote(parts.path)
        self.parts = [unquote(one) for one in parts.path.split("/") if one]
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.headers = handler.headers
        self.user = ""
        self.login = ""
        self.form: dict[str, str] = {}

    @property
    def kind(self) -> str:
        return self.headers.get("Content-Type", "").split(";")[0].strip().lower()

    def uploads(self) -> list[Upload]:
        """The files that come with the request: in the body, or as parts of a form."""
        body = self.handler.body
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "").lower()
        inbody = self.query.get("inbody") == "true"
        if self.kind.startswith("multipart/"):
            if inbody:
                raise Refusal(406, "Not Acceptable")
            return self._parts(body)
        if not inbody and self.kind not in NAMES:
            return []
        if not chunked and not body.left:
            return []
        if chunked and self.kind not in ("application/zip", "application/x-zip-compressed"):
            raise Refusal(400, "In-body file of unknown length.")
        return [Upload(NAMES.get(self.kind, "upload"), body.read)]

    def _parts(self, body: Body) -> list[Upload]:
        """Sort a form's parts into files and fields; the body goes to disk first, as XNAT does it."""
        found = re.search(r'boundary="?([^";]+)', self.headers.get("Content-Type", ""))
        if not found:
            raise Refusal(400, "Unable to identify upload format.")
        mark = b"--" + found[1].encode()
        with tempfile.TemporaryFile() as spool:
            while piece := body.read(PIECE):
                spool.write(piece)
            spool.flush()
            if not spool.tell():
                return []
            data = mmap.mmap(spool.fileno(), 0)
        uploads: list[Upload] = []
        at = data.find(mark)
        while at >= 0:
            begin = data.find(b"\r\n\r\n", at)
            after = data.find(b"\r\n" + mark, begin)
            if begin < 0 or after < 0:
                break
            head = data[at:begin].decode("utf-8", "replace")
            name = re.search(r'name="([^"]*)"', head)
            filename = re.search(r'filename="([^"]*)"', head)
            if filename:
                stream = io.BytesIO(data[begin + 4 : after])
                uploads.append(Upload(filename[1], stream.read))
            elif name:
                self.form[name[1]] = data[begin + 4 : after].decode()
            at = after + 2
        return uploads


class Body:
    """A request's body: announced by its length, or chunked."""

    def __init__(self, handler: Handler) -> None:
        self._file = handler.rfile
        self.chunked = "chunked" in handler.headers.get("Transfer-Encoding", "").lower()
        self.left = 0 if self.chunked else int(handler.headers.get("Content-Length") or 0)  # of the body, or the chunk
        self._more = self.chunked

    def read(self, count: int) -> bytes:
        if not self.left and self._more:
            self.left = int(self._file.readline().split(b";")[0], 16)
            if not self.left:
                self._more = False
                self._file.readline()
        if not self.left:
            return b""
        piece = self._file.read1(min(count, self.left))
        if not piece:
            raise ConnectionError("the client went away in the middle of its request")
        self.left -= len(piece)
        if not self.left and self._more:
            self._file.readline()
        return piece

    def drain(self) -> None:
        while self.read(PIECE):
            pass


Route = Callable[[Request], Reply]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server
    rbufsize = PIECE
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True

    def _serve(self) -> None:
        self.body = Body(self)
        request = Request(self)
        self.server.seen.append((request.method, request.path, dict(request.query)))
        fault = self.server.fault_for(request)
        try:
            if fault and not self._go_on(fault, request):
                return
            reply = self.server.answer(request)
            self.body.drain()
        except Refusal as exc:
            reply = error(exc.status, exc.words)
            try:
                self.body.drain()
            except ConnectionError:
                self.close_connection = True
        except ConnectionError:
            self.close_connection = True
            return
        if fault and (fault.run or fault.reply is None):
            time.sleep(fault.wait_s)
            if fault.expire:
                self.server.store.logins.pop(request.login, None)
                reply = error(401, "The request requires user authentication")
            reply = fault.reply or reply
            if fault.hang_up:
                self.close_connection = True
                return
        self._send(reply)

    def _go_on(self, fault: Fault, request: Request) -> bool:
        """Do what a fault demands before the request is carried out; False if that was all."""
        if fault.run or (fault.reply is None and not fault.hang_up):
            return True
        if fault.read_body:
            self.body.drain()
        else:
            self.close_connection = True
        time.sleep(fault.wait_s)
        if fault.hang_up:
            self.close_connection = True
        elif fault.reply:
            self._send(fault.reply)
        return False

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _serve

    def _send(self, reply: Reply) -> None:
        body = reply.body.encode() if isinstance(reply.body, str) else reply.body
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """Serves one store.

    Attributes:
        faults: what shall go wrong.
        seen: method, path and parameters of every request.
        session_s: how long an unused login lasts.
        basic_renews: a request with credentials and an expired cookie gets a new login, as XNAT does it.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], store: Store, route: Route) -> None:
        super().__init__(address, Handler)
        self.store = store
        self.route = route
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.session_s = 900.0
        self.basic_renews = True
        self._lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is nothing to tell of."""

    def fault_for(self, request: Request) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.method == request.method and re.fullmatch(fault.path, request.path):
                    fault.times -= 1
                    if fault.times <= 0:
                        self.faults.remove(fault)
                    return fault
        return None

    def answer(self, request: Request) -> Reply:
        if request.path in ("/", "/index.html"):
            return Reply("<!DOCTYPE html><html><head><title>XNAT</title></head></html>", kind="text/html")
        if request.path == "/data/services/auth" and request.method == "PUT":
            return self._form_login(request)
        if request.parts[0] not in ("data", "xapi", "REST"):
            raise Refusal(404, "Not Found")
        cookie = self._authenticate(request)
        if cookie is None:
            if BROWSERS.search(request.headers.get("User-Agent", "")):
                return Reply(LOGIN_PAGE, kind="text/html")  # where the redirect to the login page ends
            reply = error(401, "The request requires user authentication")
            reply.headers["WWW-Authenticate"] = 'Basic realm="XNAT Protected Area"'
            return reply
        reply = self.route(request)
        if cookie:
            reply.headers["Set-Cookie"] = f"JSESSIONID={cookie}; Path=/; HttpOnly"
        return reply

    def _authenticate(self, request: Request) -> str | None:
        """Find out who asks; return a new cookie, "" if there is one already, None if nobody is logged in."""
        store, now = self.store, time.monotonic()
        found = re.search(r"JSESSIONID=(\w+)", request.headers.get("Cookie", ""))
        basic = request.headers.get("Authorization", "")
        with store.lock:
            if found:
                login = store.logins.get(found[1])
                if login and now - login.used <= self.session_s:
                    login.used = now
                    request.user, request.login = login.user, found[1]
                    return ""
                store.logins.pop(found[1], None)
                if not self.basic_renews:
                    return None
            if not basic.startswith("Basic "):
                return None
            name, _, password = base64.b64decode(basic[6:]).decode("utf-8", "replace").partition(":")
            user = store.who(name, password)
            if user is None:
                return None
            request.user, request.login = user, secrets.token_hex(16).upper()
            store.logins[request.login] = Login(user, now)
            return request.login

    def _form_login(self, request: Request) -> Reply:
        data = b""
        while piece := request.handler.body.read(PIECE):
            data += piece
        form = dict(parse_qsl(data.decode()))
        user = self.store.who(form.get("username", ""), form.get("password", ""))
        if user is None:
            return error(401, "Invalid Credentials")
        cookie = secrets.token_hex(16).upper()
        self.store.logins[cookie] = Login(user, time.monotonic())
        return Reply(cookie, headers={"Set-Cookie": f"JSESSIONID={cookie}; Path=/; HttpOnly"})


def error(status: int, words: str) -> Reply:
    return Reply(ERROR_PAGE.format(html.escape(words)), status, "text/html; charset=UTF-8")


def table(request: Request, rows: list[dict[str, Any]], columns: tuple[str, ...] = ()) -> Reply:
    """A result set in the form that is asked for: JSON, or CSV with everything quoted."""
    if request.query.get("format") == "csv":
        out = io.StringIO()
        names = list(rows[0]) if rows else list(columns)
        writer = csv.DictWriter(out, names, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return Reply(out.getvalue(), kind="text/csv")
    found = {
        "ResultSet": {"Result": [{k: str(v) for k, v in row.items()} for row in rows], "totalRecords": str(len(rows))}
    }
    return Reply(json.dumps(found), kind="application/json")
