"""A DICOMweb server that answers what a test says: every answer that real ones give, and faults of all kinds.

Without a script it stores what it gets (in memory), and answers searches and retrievals from that. `script` holds
replies for the next requests; settings change how it behaves for all.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import secrets
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pydicom

from talaria.testing import studies

READ_BYTES = 65_536
JSON = "application/dicom+json"
XML = "application/dicom+xml"
TLS_HANDSHAKE = b"\x16"  # how a TLS connection begins (RFC 8446 section 5.1)
EXTRA = frozenset(("00081030", "0008103E", "00080061", "00201206", "00201208", "00201209"))  # given if asked for
IDLE_S = 20  # a connection that nobody uses ends


@dataclass
class Request:
    """What came in. `body` is as much of it as was read."""

    method: str
    path: str
    query: list[tuple[str, str]]
    headers: dict[str, str]
    connection: int
    body: bytes = b""

    @property
    def length(self) -> int:
        return int(self.headers.get("content-length", "0"))

    @property
    def parts(self) -> list[bytes]:
        """The instances of a STOW request."""
        boundary = self.headers["content-type"].split("boundary=")[1].strip('"').encode()
        pieces = (b"\r\n" + self.body).split(b"\r\n--" + boundary)
        return [piece.partition(b"\r\n\r\n")[2] for piece in pieces[1:] if not piece.startswith(b"--")]

    @property
    def uids(self) -> list[str]:
        """The SOP instance UIDs of a STOW request."""
        return [uid_of(part) for part in self.parts]


@dataclass
class Reply:
    """What goes out, and how.

    Attributes:
        reads: bytes of the request's body that are read before anything else happens; None for all of them.
        hangs: nothing is answered, the connection stays open.
        resets: the connection is reset instead of answering.
        cut: bytes of the body after which the connection is closed.
        closes: the connection is closed after the answer, without reading the rest of the request.
        chunked: the body goes out in chunks of this size.
        delay_s: before the answer.
    """

    status: int = 200
    body: bytes = b""
    type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)
    reads: int | None = None
    hangs: bool = False
    resets: bool = False
    cut: int | None = None
    closes: bool = False
    chunked: int = 0
    delay_s: float = 0.0


Step = Reply | Callable[[Request], Reply | None]


def uid_of(data: bytes) -> str:
    return str(_parsed(data).SOPInstanceUID)


@functools.lru_cache(maxsize=4096)  # a search looks at all that is stored
def _parsed(data: bytes) -> pydicom.FileDataset:
    with studies.quiet():
        return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)


# ---- STOW answers


def listing(
    accepted: dict[str, int] | None = None,
    failed: dict[str, int | None] | None = None,
    others: list[int] | None = None,
    *,
    comments: dict[str, str] | None = None,
    always: bool = True,
) -> dict[str, Any]:
    """The DICOM JSON of a STOW answer: warning reason (0 for none) and failure reason by UID; failures without UID.

    Args:
        always: lists that are empty are there all the same.
    """
    found: dict[str, Any] = {}

    def items(pairs: dict[str, Any], tag: str) -> list[dict[str, Any]]:
        made = []
        for uid, code in pairs.items():
            one: dict[str, Any] = {
                "00081150": {"vr": "UI", "Value": ["1.2.840.10008.5.1.4.1.1.2"]},
                "00081155": {"vr": "UI", "Value": [uid]},
            }
            if code:
                one[tag] = {"vr": "US", "Value": [code]}
            if comments and uid in comments:
                one["00000902"] = {"vr": "LO", "Value": [comments[uid]]}
            made.append(one)
        return made

    for tag, values in (
        ("00081199", items(accepted or {}, "00081196")),
        ("00081198", items(failed or {}, "00081197")),
        ("0008119A", [{"00081197": {"vr": "US", "Value": [code]}} for code in others or []]),
    ):
        if values:
            found[tag] = {"vr": "SQ", "Value": values}
        elif always and tag != "0008119A":
            found[tag] = {"vr": "SQ"}
    return found


def as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


def as_xml(document: dict[str, Any]) -> bytes:
    """The same data set in the Native DICOM Model."""

    def attributes(ds: dict[str, Any]) -> str:
        text = ""
        for tag, element in ds.items():
            values = "".join(
                f'<Item number="{n}">{attributes(value)}</Item>'
                if isinstance(value, dict)
                else f'<Value number="{n}">{value}</Value>'
                for n, value in enumerate(element.get("Value", []), 1)
            )
            text += f'<DicomAttribute tag="{tag}" vr="{element["vr"]}">{values}</DicomAttribute>'
        return text

    text = '<?xml version="1.0" encoding="UTF-8"?>\n<NativeDicomModel'
    text += ' xmlns="http://dicom.nema.org/PS3.19/models/NativeDICOM" xml:space="preserve">'
    return f"{text}{attributes(document)}</NativeDicomModel>".encode()


# ---- the server


@dataclass
class Scripted:
    """A running server.

    Attributes:
        script: replies for the next requests (of any kind, see `only`); a function may return None for "as usual".
        only: the script is for requests of this method.
        requests: all that came.
        stored: files by SOP instance UID; one of the same UID, in another series, by anything else.
        warns, refuses: reasons for instances that are stored with a warning, or not.
        silent: instances that are stored, or refused, without a word.
        xml: STOW answers in XML.
        body_limit: requests with larger bodies get 413, before their body is read.
        authorization: the only field that is let in; None for everybody.
        continues: answers `Expect: 100-continue` with 100.
        cap: most results of one page.
        counts: most results of one search, over all its pages.
        ignores: of `limit`, `offset`, `filters`, `includefield`.
        rejects: query parameters that get 400.
        repeats: beyond the last page comes the first one again.
        shown_in: character set in which results of searches are shown, with U+FFFD for what it lacks; "" for any.
        withheld: instances that are listed, but not given out.
        gives: how WADO answers: `multipart`, `single`, `chunked`, `closing`.
        uri: path of a WADO-URI service; then there is no WADO-RS, which is answered with `no_rs`.
        wado_cut: bytes of a WADO answer after which the connection is reset, once.
        tokens: how many tokens were given out at /token; `lifetime_s` is theirs, None is not told.
    """

    port: int = 0
    script: list[Step] = field(default_factory=list)
    only: str = ""
    requests: list[Request] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    warns: dict[str, int] = field(default_factory=dict)
    refuses: dict[str, int | None] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    xml: bool = False
    body_limit: int | None = None
    authorization: Callable[[str], bool] | None = None
    continues: bool = True
    cap: int | None = None
    counts: int | None = None
    ignores: set[str] = field(default_factory=set)
    rejects: set[str] = field(default_factory=set)
    repeats: bool = False
    shown_in: str = ""
    withheld: set[str] = field(default_factory=set)
    kept: dict[tuple[Any, ...], list[dict[str, Any]]] = field(default_factory=dict)
    gives: str = "multipart"
    uri: str = ""
    no_rs: int = 404
    wado_cut: int | None = None
    tokens: list[str] = field(default_factory=list)
    lifetime_s: float | None = 3600
    client: tuple[str, str] = ("talaria", "s3cr3t/+ id")
    client_in_body: bool = False
    on_token: Callable[[Request], Reply] | None = None
    connections: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/rs"

    def of(self, method: str) -> list[Request]:
        """The requests of one method that are about DICOM."""
        return [request for request in self.requests if request.method == method and request.path != "/token"]

    # ---- connections

    def serve(self, sock: socket.socket) -> None:
        with self.lock:
            self.connections += 1
            number = self.connections
        connection = _Connection(sock, number)
        try:
            while not self.stopped.is_set():
                request = connection.head()
                if request is None or not self._handle(connection, request):
                    break
        except OSError:
            pass
        finally:
            with suppress(OSError):
                sock.close()

    def _handle(self, connection: _Connection, request: Request) -> bool:
        """Answer one request; False if the connection ends."""
        with self.lock:
            self.requests.append(request)
            scripted = request.path != "/token" and request.method.startswith(self.only)
            step = self.script.pop(0) if self.script and scripted else None
        reply = step if isinstance(step, Reply) else None
        early = reply or self._at_the_door(request)
        expects = request.headers.get("expect", "").lower() == "100-continue"
        reads = early.reads if early else None
        if expects and self.continues and (early is None or reads is None or reads > 0):
            connection.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.body = connection.body(request.length if reads is None else min(reads, request.length))
        if callable(step):
            reply = step(request)
        reply = reply or early or self._usual(request)
        if reply.delay_s:
            time.sleep(reply.delay_s)
        if reply.hangs:
            self.stopped.wait()
            return False
        if reply.resets:
            connection.reset()
            return False
        connection.answer(reply, request.method)
        if reply.closes or reply.cut is not None:
            return False
        connection.body(request.length - len(request.body))  # what nobody wants is read all the same
        return True

    def _at_the_door(self, request: Request) -> Reply | None:
        """What is refused before the body is read."""
        given = request.headers.get("authorization", "")
        if self.authorization and request.path != "/token" and not self.authorization(given):
            header = {"WWW-Authenticate": 'Basic realm="test"'}
            return Reply(401, b"<h1>Unauthorized</h1>", "text/html", header, reads=0)
        if self.body_limit is not None and request.length > self.body_limit:
            page = b"<html><head><title>413 Request Entity Too Large</title></head><body>nginx</body></html>"
            return Reply(413, page, "text/html", reads=0, closes=True)
        return None

    def _usual(self, request: Request) -> Reply:
        if request.path == "/token":
            return self._token(request)
        if self.uri and request.path == self.uri:
            return self._by_uri(dict(request.query))
        if not request.path.startswith("/rs/"):
            return Reply(404, b"<html><title>Not here</title></html>", "text/html")
        segments = [unquote(part) for part in request.path.split("/")[2:]]
        if segments[0] not in ("studies", "series", "instances"):
            return Reply(404)
        if request.method == "POST":
            return self._store(request) if segments == ["studies"] else Reply(404)
        if segments[-1] == "metadata":
            return self._metadata(segments)
        wants_dicom = 'application/dicom"' in request.headers.get("accept", "") or len(segments) == 6
        if wants_dicom and self.uri:
            return Reply(self.no_rs)
        return self._retrieve(segments) if wants_dicom else self._search(segments, request.query)

    # ---- services

    def _store(self, request: Request) -> Reply:
        accepted: dict[str, int] = {}
        failed: dict[str, int | None] = {}
        for part in request.parts:
            uid = uid_of(part)
            if uid in self.refuses:
                if uid not in self.silent:
                    failed[uid] = self.refuses[uid]
                continue
            with self.lock:
                self.stored[uid] = part
            if uid not in self.silent:
                accepted[uid] = self.warns.get(uid, 0)
        status = 200 if not failed and not any(accepted.values()) else 202 if accepted else 409
        document = listing(accepted, failed)
        return Reply(status, as_xml(document), XML) if self.xml else Reply(status, as_json(document))

    def _search(self, segments: list[str], query: list[tuple[str, str]]) -> Reply:
        given = dict(query)
        refused = self.rejects & {key for key, _ in query}
        if refused:
            return Reply(400, as_json({"message": f"unknown parameter {sorted(refused)[0]}"}), "application/json")
        found = self._all(segments)
        if "filters" not in self.ignores:
            found = [one for one in found if _passes(one, query)]
        offset = 0 if "offset" in self.ignores else int(given.get("offset", "0"))
        limit = len(found) if "limit" in self.ignores else int(given.get("limit", str(len(found) or 1)))
        most = min(limit, self.cap or limit)
        found = found[: self.counts]
        page = found[offset : offset + most]
        if not page and self.repeats:
            page = found[:most]
        if not page:
            return Reply(204)
        if "includefield" in self.ignores | self.rejects:
            page = [{tag: element for tag, element in one.items() if tag not in EXTRA} for one in page]
        if self.shown_in:
            page = [_shown(one, self.shown_in) for one in page]
        return Reply(200, as_json([{key: value for key, value in one.items() if value} for one in page]))

    def _all(self, segments: list[str]) -> list[dict[str, Any]]:
        """All that is at a path, as it is now."""
        with self.lock:
            mark = (*segments, *map(id, self.stored.values()))
            if mark not in self.kept:
                self.kept = {mark: self._looked_up(segments)} | dict(list(self.kept.items())[-600:])
            return self.kept[mark]

    def _looked_up(self, segments: list[str]) -> list[dict[str, Any]]:
        level = segments[-1]
        with self.lock:
            files = [_parsed(data) for data in self.stored.values()]
        if len(segments) >= 3:
            files = [ds for ds in files if str(ds.StudyInstanceUID) == segments[1]]
        if len(segments) >= 5:
            files = [ds for ds in files if str(ds.SeriesInstanceUID) == segments[3]]
        key = {"studies": "StudyInstanceUID", "series": "SeriesInstanceUID", "instances": "SOPInstanceUID"}[level]
        groups: dict[str, list[Any]] = {}
        for ds in files:
            groups.setdefault(str(ds[key].value), []).append(ds)
        return [_match(level, group) for _, group in sorted(groups.items())]

    def _by_uri(self, given: dict[str, str]) -> Reply:
        uid = given.get("objectUID", "")
        if given.get("requestType") != "WADO" or "transferSyntax" in given:
            return Reply(400)
        if uid not in self.stored or uid in self.withheld:
            return Reply(404)
        return Reply(200, self.stored[uid], "application/dicom")

    def _retrieve(self, segments: list[str]) -> Reply:
        wanted = dict(zip(segments[::2], segments[1::2], strict=True))
        chosen = []
        for uid, data in sorted(self.stored.items()):
            ds = _parsed(data)
            own = {"studies": ds.StudyInstanceUID, "series": ds.SeriesInstanceUID, "instances": ds.SOPInstanceUID}
            if uid not in self.withheld and all(str(own[key]) == value for key, value in wanted.items()):
                chosen.append(data)
        if not chosen:
            return Reply(404, as_json({"Message": "no such thing"}), "application/json")
        if self.gives == "single" and len(chosen) == 1:
            return Reply(200, chosen[0], "application/dicom")
        boundary = "boundary-of-test"
        body = b"".join(
            f"\r\n--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode() + data for data in chosen
        )
        body += f"\r\n--{boundary}--".encode()
        kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
        cut, self.wado_cut = self.wado_cut, None
        return Reply(
            200, body, kind, chunked=1000 if self.gives == "chunked" else 0, closes=self.gives == "closing", cut=cut
        )

    def _metadata(self, segments: list[str]) -> Reply:
        with self.lock:
            files = [_parsed(data) for data in self.stored.values()]
        names = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
        wanted = dict(zip(names, segments[1::2], strict=False))
        found = [ds for ds in files if all(str(ds[name].value) == uid for name, uid in wanted.items())]
        return Reply(200, as_json([ds.to_json_dict() for ds in found])) if found else Reply(404)

    def _token(self, request: Request) -> Reply:
        if self.on_token:
            return self.on_token(request)
        form = dict(parse_qsl(request.body.decode()))
        given = (form.get("client_id", ""), form.get("client_secret", ""))
        if not self.client_in_body:
            text = base64.b64decode(request.headers.get("authorization", "Basic ").split(" ")[1]).decode()
            name, _, secret = text.partition(":")
            given = (unquote(name.replace("+", " ")), unquote(secret.replace("+", " ")))
        if given != self.client or form.get("grant_type") != "client_credentials":
            return Reply(
                401, as_json({"error": "invalid_client", "error_description": f"no: {given[1]}"}), "application/json"
            )
        # Of no other server's: one that is kept of a server that had this port before must not be given out again.
        self.tokens.append(f"token-{len(self.tokens) + 1}-{secrets.token_hex(4)}-xyz")
        document: dict[str, Any] = {"access_token": self.tokens[-1], "token_type": "bearer"}
        if self.lifetime_s is not None:
            document["expires_in"] = self.lifetime_s
        return Reply(200, as_json(document), "application/json")


def _match(level: str, group: list[Any]) -> dict[str, Any]:
    first = group[0]
    keywords = {
        "studies": ("StudyInstanceUID", "StudyDate", "AccessionNumber", "PatientName", "PatientID", "StudyDescription"),
        "series": ("StudyInstanceUID", "SeriesInstanceUID", "Modality", "SeriesDescription"),
        "instances": ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"),
    }[level]
    found: dict[str, Any] = {}
    for keyword in keywords:
        element = first.get_item(keyword)
        value = first.get(keyword)
        tag = f"{int(pydicom.tag.Tag(keyword)):08X}"
        if element is not None and value not in (None, ""):
            vr = pydicom.datadict.dictionary_VR(keyword)
            found[tag] = {"vr": vr, "Value": [{"Alphabetic": str(value)} if vr == "PN" else str(value)]}
        else:
            found[tag] = {"vr": pydicom.datadict.dictionary_VR(keyword)}
    if level == "studies":
        found["00080061"] = {"vr": "CS", "Value": sorted({str(ds.Modality) for ds in group})}
        found["00201208"] = {"vr": "IS", "Value": [len(group)]}
    elif level == "series":
        found["00201209"] = {"vr": "IS", "Value": [len(group)]}
    return found


def _shown(one: dict[str, Any], charset: str) -> dict[str, Any]:
    codec = pydicom.charset.convert_encodings(charset)[0]

    def lossy(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: lossy(inner) for key, inner in value.items()}
        if not isinstance(value, str):
            return value
        return "".join(letter if letter.encode(codec, "ignore") else "\ufffd" for letter in value)

    shown = {
        tag: element | ({"Value": [lossy(value) for value in element["Value"]]} if "Value" in element else {})
        for tag, element in one.items()
    }
    return {"00080005": {"vr": "CS", "Value": [charset]}, **shown}


def _passes(one: dict[str, Any], query: list[tuple[str, str]]) -> bool:
    for key, wanted in query:
        if key in ("limit", "offset", "includefield"):
            continue
        element = one.get(f"{int(pydicom.tag.Tag(key)):08X}", {})
        values = [v["Alphabetic"] if isinstance(v, dict) else str(v) for v in element.get("Value", [])] or [""]
        if key == "StudyDate" and "-" in wanted:
            first, last = wanted.split("-")
            if not any((first or "0") <= value <= (last or "9") for value in values):
                return False
        elif not any(fnmatchcase(value.lower(), wanted.lower()) for value in values):
            return False
    return True


class _Connection:
    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock, self.number = sock, number
        self.data = b""
        sock.settimeout(IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def head(self) -> Request | None:
        while b"\r\n\r\n" not in self.data:
            piece = self.sock.recv(READ_BYTES)
            if not piece:
                return None
            self.data += piece
            if self.data[:1] == TLS_HANDSHAKE:
                self.sock.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
                return None
        head, _, self.data = self.data.partition(b"\r\n\r\n")
        line, *rest = head.decode("latin-1").split("\r\n")
        method, target, _ = line.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in rest)}
        parts = urlsplit(target)
        return Request(method, parts.path, parse_qsl(parts.query), headers, self.number)

    def body(self, count: int) -> bytes:
        pieces = [self.data[:count]]
        self.data = self.data[count:]
        left = count - len(pieces[0])
        while left:
            piece = self.sock.recv(min(left, READ_BYTES * 16))
            if not piece:
                raise ConnectionResetError
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def answer(self, reply: Reply, method: str) -> None:
        headers = {"Content-Type": reply.type} if reply.body else {}
        if reply.chunked:
            headers["Transfer-Encoding"] = "chunked"
            size = reply.chunked
            pieces = [reply.body[at : at + size] for at in range(0, len(reply.body), size)]
            body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        else:
            body = reply.body
            if not reply.closes:
                headers["Content-Length"] = str(len(body))
        if reply.closes:
            headers["Connection"] = "close"
        headers |= reply.headers
        lines = [f"HTTP/1.1 {reply.status} Scripted", *(f"{name}: {value}" for name, value in headers.items())]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        self.sock.sendall(head + body[: reply.cut])

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


@contextmanager
def scripted(context: ssl.SSLContext | None = None, **settings: Any) -> Iterator[Scripted]:
    """Run a server on loopback until the block ends; with TLS if it gets a context."""
    server = Scripted(**settings)
    listener = socket.create_server(("127.0.0.1", 0))
    server.port = listener.getsockname()[1]
    threads: list[threading.Thread] = []
    open_sockets: list[socket.socket] = []

    def serve(sock: socket.socket) -> None:
        if context:
            try:
                sock.settimeout(IDLE_S)
                sock = context.wrap_socket(sock, server_side=True)
            except OSError:
                sock.close()
                return
        open_sockets.append(sock)
        server.serve(sock)

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            open_sockets.append(sock)
            thread = threading.Thread(target=serve, args=(sock,), daemon=True)
            threads.append(thread)
            thread.start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield server
    finally:
        server.stopped.set()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for sock in open_sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        acceptor.join(5)
        for thread in threads:
            thread.join(5)
        for sock in open_sockets:
            sock.close()
