"""An S3 store of our own, in this process and in memory, that refuses what real stores refuse, and misbehaves.

It checks what no server that can be had for tests does: signatures, checksums of every kind, the smallest size of a
part. What it does wrong is told to it by `fault`, a function that sees each request before it is carried out.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import socket
import ssl
import struct
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from awscrt import checksums as crt  # type: ignore[import-untyped]

ACCESS_KEY, SECRET_KEY = "AKIASTUB", "Stub/Secret+0815"
REGION = "eu-test-1"
MIN_PART = 5 << 20  # bytes; of all parts but the last
PIECE = 1 << 16

SUMS: dict[str, Callable[[bytes], bytes]] = {
    "crc64nvme": lambda data: int(crt.crc64nvme(data)).to_bytes(8, "big"),
    "crc32": lambda data: zlib.crc32(data).to_bytes(4, "big"),
    "sha256": lambda data: hashlib.sha256(data).digest(),
}
KEPT = ("content-type", "x-amz-server-side-encryption", "x-amz-server-side-encryption-aws-kms-key-id",
        "x-amz-storage-class")  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What a fault may look at."""

    method: str
    bucket: str
    key: str
    query: Mapping[str, str]
    headers: Mapping[str, str]  # names in lower case

    @property
    def operation(self) -> str:
        """What it asks for, in S3's words, as far as this stub knows it."""
        query = self.query
        if not self.key:
            if "object-lock" in query:
                return "GetLock"
            if self.method == "HEAD":
                return "HeadBucket"
            return "ListMultipartUploads" if "uploads" in query else "ListObjects"
        if "uploadId" in query:
            return {"PUT": "UploadPart", "POST": "Complete", "DELETE": "Abort", "GET": "ListParts"}[self.method]
        if self.method == "POST":
            return "Create"
        return self.method.capitalize()


@dataclass(frozen=True)
class Refusal(Exception):
    """An answer that is an error."""

    status: int
    code: str
    words: str = "as the test wants it"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Misdeed:
    """What is done wrong with a request that is carried out, or not even answered.

    Attributes:
        reset_after: bytes of the body that are read before the connection is reset.
        hang_after: bytes of the body that are read before nothing happens any more.
        change: what becomes of the bytes that are stored.
        answer: fields put into the answer, in place of the right ones.
        silent: the request is carried out, and the connection reset in place of the answer.
        pause_s: before it is carried out.
    """

    reset_after: int | None = None
    hang_after: int | None = None
    change: Callable[[bytes], bytes] | None = None
    answer: Mapping[str, str] = field(default_factory=dict)
    silent: bool = False
    pause_s: float = 0.0


@dataclass
class Object:
    data: bytes
    etag: str
    headers: dict[str, str]
    sums: dict[str, str]  # encoded, by algorithm
    sum_type: str = "FULL_OBJECT"
    version: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class Upload:
    bucket: str
    key: str
    headers: dict[str, str]
    algorithm: str
    sum_type: str
    parts: dict[int, Object] = field(default_factory=dict)
    initiated: float = field(default_factory=time.time)


@dataclass
class Stub:
    """The store; its settings may be changed at any time.

    Attributes:
        knows: checksums that it knows.
        checks: `verify` refuses wrong ones, `echo` keeps whatever it is told, `ignore` keeps none.
        unknown: what it does with others: `ignore` or `refuse`.
        trailers: what it does with aws-chunked bodies: `refuse`, `decode`, or `store` as they are.
        full_parts: whether it knows checksums of whole objects that come in parts.
        md5: whether ETags are MD5 sums, and Content-MD5 is compared.
        locked: the bucket keeps every version by default (Object Lock): it wants a checksum, and nothing is removed.
        denied: operations that the key may not do.
        fault: called with each request; may raise a Refusal, or return a Misdeed.
        seen: every request.
        wasted: bytes of objects and parts that were received.
    """

    buckets: dict[str, dict[str, Object]] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    port: int = 0
    knows: tuple[str, ...] = tuple(SUMS)
    checks: str = "verify"
    unknown: str = "ignore"
    trailers: str = "decode"
    full_parts: bool = True
    md5: bool = True
    locked: bool = False
    versions: list[str] = field(default_factory=list)  # keys of what was put while it was locked
    denied: set[str] = field(default_factory=set)
    fault: Callable[[Request], Misdeed | None] = lambda request: None
    seen: list[Request] = field(default_factory=list)
    received: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    def count(self, operation: str, key: str | None = None) -> int:
        """How many requests of an operation there were, for a key if one is named."""
        return sum(1 for one in list(self.seen) if one.operation == operation and key in (None, one.key))

    def objects(self, bucket: str) -> dict[str, bytes]:
        with self.lock:
            return {key: one.data for key, one in self.buckets.get(bucket, {}).items()}

    def carry_out(self, request: Request, body: bytes, misdeed: Misdeed) -> tuple[dict[str, str], bytes]:
        """Do what a request asks for; return fields and body of the answer."""
        with self.lock:
            if request.bucket not in self.buckets:
                raise Refusal(404, "NoSuchBucket", "The specified bucket does not exist")
            if request.operation in self.denied:
                raise Refusal(403, "AccessDenied", "Access Denied")
            work: Callable[..., Any] = getattr(self, f"_{request.operation.lower()}")
            if request.operation in ("Put", "UploadPart"):
                made: tuple[dict[str, str], bytes] = work(request, self._payload(request, body), misdeed)
            else:
                made = work(request, body)
            return made

    # ---- bytes that come

    def _payload(self, request: Request, body: bytes) -> bytes:
        headers = request.headers
        self.received += len(body)
        if "x-amz-trailer" in headers:
            if self.trailers == "refuse":
                raise Refusal(411, "MissingContentLength", "You must provide the Content-Length HTTP header.")
            if self.trailers == "decode":
                body = _unchunked(body)
        hashed = headers.get("x-amz-content-sha256", "")
        if re.fullmatch("[0-9a-f]{64}", hashed) and hashed != hashlib.sha256(body).hexdigest():
            raise Refusal(400, "XAmzContentSHA256Mismatch", "The provided header does not match what was computed.")
        if self.md5 and "content-md5" in headers and base64.b64decode(headers["content-md5"]) != _md5(body):
            raise Refusal(400, "BadDigest", "The Content-MD5 you specified did not match what we received.")
        return body

    def _sums(self, headers: Mapping[str, str], body: bytes) -> dict[str, str]:
        """The checksums that are kept, after they have been compared."""
        kept = {}
        for name, value in headers.items():
            algorithm = name.removeprefix("x-amz-checksum-")
            if algorithm == name or algorithm not in SUMS:
                continue
            if algorithm not in self.knows:
                if self.unknown == "refuse":
                    raise Refusal(400, "InvalidRequest", "The algorithm type you specified is invalid.")
                continue
            right = base64.b64encode(SUMS[algorithm](body)).decode()
            if self.checks == "verify" and value != right:
                raise Refusal(400, "BadDigest", f"The {algorithm} you specified did not match the calculated checksum.")
            if self.checks != "ignore":
                kept[algorithm] = value
        return kept

    def _object(self, request: Request, body: bytes, misdeed: Misdeed) -> Object:
        sums = self._sums(request.headers, body)
        data = misdeed.change(body) if misdeed.change else body
        etag = _md5(data).hex() if self.md5 else uuid.uuid4().hex + "x"
        return Object(data, etag, _kept(request.headers), sums)

    # ---- operations

    def _put(self, request: Request, body: bytes, misdeed: Misdeed) -> tuple[dict[str, str], bytes]:
        made = self._object(request, body, misdeed)
        if self.locked:
            if not made.sums and "content-md5" not in request.headers:
                words = "Content-MD5 OR x-amz-checksum- HTTP header is required for Put requests with Object Lock"
                raise Refusal(400, "InvalidRequest", words)
            self.versions.append(request.key)
        self.buckets[request.bucket][request.key] = made
        return {"ETag": f'"{made.etag}"', "x-amz-version-id": made.version, **_told(made), **misdeed.answer}, b""

    def _uploadpart(self, request: Request, body: bytes, misdeed: Misdeed) -> tuple[dict[str, str], bytes]:
        upload = self._upload(request)
        made = self._object(request, body, misdeed)
        upload.parts[int(request.query["partNumber"])] = made
        return {"ETag": f'"{made.etag}"', **_told(made, typed=False), **misdeed.answer}, b""

    def _get(self, request: Request, body: bytes) -> tuple[dict[str, str], bytes]:
        one = self.buckets[request.bucket].get(request.key)
        if one is None:
            raise Refusal(404, "NoSuchKey", "The specified key does not exist.")
        sums = _told(one) if request.headers.get("x-amz-checksum-mode", "").upper() == "ENABLED" else {}
        return {"ETag": f'"{one.etag}"', **one.headers, **sums}, one.data

    _head = _get

    def _delete(self, request: Request, body: bytes) -> tuple[dict[str, str], bytes]:
        if self.locked and "versionId" in request.query:
            raise Refusal(403, "AccessDenied", "Access Denied because object protected by object lock.")
        self.buckets[request.bucket].pop(request.key, None)
        return {}, b""

    def _getlock(self, request: Request, body: bytes) -> tuple[dict[str, str], bytes]:
        if not self.locked:
            raise Refusal(404, "ObjectLockConfigurationNotFoundError", "There is no such configuration.")
        rule = "<Rule><DefaultRetention><Mode>COMPLIANCE</Mode><Days>30</Days></DefaultRetention></Rule>"
        return {}, _xml("ObjectLockConfiguration", f"<ObjectLockEnabled>Enabled</ObjectLockEnabled>{rule}")

    def _headbucket(self, request: Request, body: bytes) -> tuple[dict[str, str], bytes]:
        return {"x-amz-bucket-region": REGION}, b""

    def _listobjects(self, request: Request, body: bytes) -> tuple[dict[str, str], bytes]:
        query = request.query
        most, after = int(query.get("max-keys", 1000)), unquote(query.get("continuation-token", ""))
        found = sorted(
            key for key in self.buckets[request.bucket] if key.startswith(query.get("prefix", "")) and key > after
        )
        page = found[:most]
        rows = "".join(
            f"<Contents><Key>{_text(key, query)}</Key><Size>{len(self.buckets[request.bucket][key].data)}</Size>"
            f"<ETag>&quot;{self.buckets[request.bucket][key].etag}&quot;</ETag></Contents>"
            for key in page
        )
        more = f"<NextContinuationToken>{quote(page[-1])}</NextContinuationToken>" if len(found) > most else ""
        coding = "<EncodingType>url</EncodingType>" if "encoding-type" in query else ""
        return {}, _xml(
            "ListBucketResult",
            f"<Name>{request.bucket}</Name><KeyCount>{len(page)}</KeyCount>{coding}"
            f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{more}{rows}",
        )

    def _create(self, request: Request, body: bytes) -> tuple[dict[str, str], bytes]:
        algorithm = request.headers.get("x-amz-checksum-algorithm", "").lower()
        kind = request.headers.get("x-amz-checksum-type", "COMPOSITE" if algorithm != "crc64nvme" else "FULL_OBJECT")
        if algorithm and (algorithm not in self.knows or (kind == "FULL_OBJECT" and not self.full_parts)):
            if self.unknown == "refuse" or self.checks == "verify":
                raise Refusal(400, "InvalidRequest", "Checksum algorithm or type is not supported.")
            algorithm = ""
        name = uuid.uuid4().hex
        self.uploads[name] = Upload(request.bucket, request.key, _kept(request.headers), algorithm, kind)
        return {}, _xml(
            "InitiateMultipartUploadResult",
            f"<Bucket>{request.bucket}</Bucket><Key>{escape(request.key)}</Key><UploadId>{name}</UploadId>",
        )

    def _complete(self, request: Request, body: bytes) -> tuple[dict[str, str], bytes]:
        upload = self._upload(request)
        tree = ElementTree.fromstring(body)
        for element in tree.iter():
            element.tag = element.tag.rpartition("}")[2]
        asked = [(int(part.findtext("PartNumber", "0")), part) for part in tree.iter("Part")]
        parts = []
        for number, part in asked:
            held = upload.parts.get(number)
            if held is None or part.findtext("ETag", "").strip('"') != held.etag:
                raise Refusal(400, "InvalidPart", "One or more of the specified parts could not be found.")
            told = part.findtext(f"Checksum{upload.algorithm.upper()}")
            if upload.algorithm and self.checks == "verify" and upload.sum_type == "COMPOSITE" and told is None:
                raise Refusal(400, "InvalidRequest", "The complete request must include the checksum of each part.")
            if told is not None and self.checks == "verify" and told != held.sums.get(upload.algorithm):
                raise Refusal(400, "InvalidPart", "The checksum of a part is wrong.")
            parts.append(held)
        if any(len(part.data) < MIN_PART for part in parts[:-1]):
            raise Refusal(400, "EntityTooSmall", "Your proposed upload is smaller than the minimum allowed size")
        data = b"".join(part.data for part in parts)
        sums = self._sum_of_parts(request, upload, parts, data)
        etag = f"{_md5(b''.join(bytes.fromhex(p.etag) for p in parts)).hex()}-{len(parts)}" if self.md5 else "none"
        made = Object(data, etag, upload.headers, sums, upload.sum_type)
        self.buckets[request.bucket][request.key] = made
        del self.uploads[request.query["uploadId"]]
        told_sums = "".join(f"<Checksum{name.upper()}>{value}</Checksum{name.upper()}>" for name, value in sums.items())
        kind = f"<ChecksumType>{made.sum_type}</ChecksumType>" if sums else ""
        return {}, _xml(
            "CompleteMultipartUploadResult",
            f"<Bucket>{request.bucket}</Bucket><Key>{escape(request.key)}</Key><ETag>&quot;{etag}&quot;</ETag>"
            + told_sums
            + kind,
        )

    def _sum_of_parts(self, request: Request, upload: Upload, parts: list[Object], data: bytes) -> dict[str, str]:
        name = upload.algorithm
        if not name or self.checks == "ignore":
            return {}
        if upload.sum_type == "FULL_OBJECT":
            right = base64.b64encode(SUMS[name](data)).decode()
        else:
            together = b"".join(base64.b64decode(part.sums[name]) for part in parts)
            right = f"{base64.b64encode(SUMS[name](together)).decode()}-{len(parts)}"
        told = request.headers.get(f"x-amz-checksum-{name}")
        if self.checks == "verify" and told is not None and told != right:
            raise Refusal(400, "BadDigest", f"The {name} you specified did not match the calculated checksum.")
        return {name: told if told is not None and self.checks == "echo" else right}

    def _abort(self, request: Request, body: bytes) -> tuple[dict[str, str], bytes]:
        self._upload(request)
        del self.uploads[request.query["uploadId"]]
        return {}, b""

    def _listparts(self, request: Request, body: bytes) -> tuple[dict[str, str], bytes]:
        upload = self._upload(request)
        after = int(request.query.get("part-number-marker", 0))
        page = [number for number in sorted(upload.parts) if number > after][:1000]
        rows = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>&quot;{upload.parts[number].etag}&quot;</ETag>"
            f"<Size>{len(upload.parts[number].data)}</Size>"
            + "".join(f"<Checksum{n.upper()}>{v}</Checksum{n.upper()}>" for n, v in upload.parts[number].sums.items())
            + "</Part>"
            for number in page
        )
        more = bool(page) and page[-1] < max(upload.parts)
        following = f"<NextPartNumberMarker>{page[-1]}</NextPartNumberMarker>" if more else ""
        kind = (
            f"<ChecksumAlgorithm>{upload.algorithm.upper()}</ChecksumAlgorithm>"
            f"<ChecksumType>{upload.sum_type}</ChecksumType>"
            if upload.algorithm
            else ""
        )
        return {}, _xml("ListPartsResult", f"<IsTruncated>{str(more).lower()}</IsTruncated>{following}{kind}{rows}")

    def _listmultipartuploads(self, request: Request, body: bytes) -> tuple[dict[str, str], bytes]:
        rows = "".join(
            f"<Upload><Key>{_text(upload.key, request.query)}</Key><UploadId>{name}</UploadId>"
            f"<Initiated>{time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime(upload.initiated))}</Initiated></Upload>"
            for name, upload in self.uploads.items()
            if upload.bucket == request.bucket and upload.key.startswith(request.query.get("prefix", ""))
        )
        coding = "<EncodingType>url</EncodingType>" if "encoding-type" in request.query else ""
        return {}, _xml("ListMultipartUploadsResult", f"{coding}<IsTruncated>false</IsTruncated>{rows}")

    def _upload(self, request: Request) -> Upload:
        upload = self.uploads.get(request.query["uploadId"])
        if upload is None or upload.key != request.key:
            raise Refusal(404, "NoSuchUpload", "The specified upload does not exist.")
        return upload


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data).digest()


def _kept(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name in KEPT or name.startswith("x-amz-meta-")}


def _told(one: Object, *, typed: bool = True) -> dict[str, str]:
    sums = {f"x-amz-checksum-{name}": value for name, value in one.sums.items()}
    return sums | ({"x-amz-checksum-type": one.sum_type} if sums and typed else {})


def _text(key: str, query: Mapping[str, str]) -> str:
    return quote(key) if "encoding-type" in query else escape(key)


def _xml(name: str, inner: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<{name} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{inner}</{name}>'.encode()


def _unchunked(body: bytes) -> bytes:
    """Take the framing of aws-chunked away."""
    data = b""
    while body:
        line, _, body = body.partition(b"\r\n")
        size = int(line.split(b";")[0], 16)
        if size == 0:
            break
        data, body = data + body[:size], body[size + 2 :]
    return data


# ---- HTTP


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    stub: Stub
    reset = False  # whether the connection ends with a reset

    def finish(self) -> None:
        with suppress(OSError):
            if self.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            super().finish()
        self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        bucket, _, key = unquote(url.path).removeprefix("/").partition("/")
        request = Request(self.command, bucket, key, dict(parse_qsl(url.query, keep_blank_values=True)), headers)
        self.stub.seen.append(request)
        length = int(headers.get("content-length", 0))
        try:
            try:
                misdeed = self.stub.fault(request) or Misdeed()
                body = self._body(length, misdeed)
            except Refusal:
                self._body(length, Misdeed())
                raise
            _authenticate(self.command, url.path, url.query, headers)
            time.sleep(misdeed.pause_s)
            fields, answer = self.stub.carry_out(request, body, misdeed)
        except Refusal as refusal:
            text = f"<Code>{refusal.code}</Code><Message>{escape(refusal.words)}</Message><Key>{escape(key)}</Key>"
            self._answer(refusal.status, dict(refusal.headers), f"<Error>{text}</Error>".encode())
            return
        if misdeed.silent:
            self.reset = True
            raise ConnectionAbortedError
        self._answer(204 if self.command == "DELETE" else 200, fields, answer)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _body(self, length: int, misdeed: Misdeed) -> bytes:
        stops = [stop for stop in (misdeed.reset_after, misdeed.hang_after) if stop is not None]
        body = self.rfile.read(min([length, *stops]))
        if misdeed.hang_after is not None:
            self._until_closed()
        if stops:
            self.reset = True
            raise ConnectionAbortedError
        if len(body) < length:
            raise ConnectionResetError
        return body

    def _until_closed(self) -> None:
        """Take nothing and say nothing until the client is gone."""
        sock = self.connection
        while True:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
            if info[0] != 1:  # TCP_ESTABLISHED
                return
            time.sleep(0.05)

    def _answer(self, status: int, fields: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and status != 204:
            self.wfile.write(body)
        self.wfile.flush()


def _authenticate(method: str, path: str, query: str, headers: Mapping[str, str]) -> None:
    """Compare the signature ("Authenticating Requests: Using the Authorization Header", Amazon S3 API reference)."""
    form = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/s3/aws4_request, ?SignedHeaders=([^,]+), ?"
        r"Signature=([0-9a-f]{64})",
        headers.get("authorization", ""),
    )
    if not form:
        raise Refusal(403, "AccessDenied", "Access Denied")
    access, day, region, names, signature = form.groups()
    if access != ACCESS_KEY:
        raise Refusal(403, "InvalidAccessKeyId", "The AWS access key Id you provided does not exist in our records.")
    arguments = sorted(
        (quote(k, safe="-._~"), quote(v, safe="-._~")) for k, v in parse_qsl(query, keep_blank_values=True)
    )
    canonical = "\n".join((
        method, path, "&".join(f"{k}={v}" for k, v in arguments),
        "".join(f"{name}:{' '.join(headers.get(name, '').split())}\n" for name in names.split(";")),
        names, headers.get("x-amz-content-sha256", ""),
    ))  # fmt: skip
    scope = f"{day}/{region}/s3/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{headers.get('x-amz-date', '')}\n{scope}\n{digest}"
    key = ("AWS4" + SECRET_KEY).encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    must = [name for name in headers if name.startswith("x-amz-")]
    if hmac.new(key, text.encode(), hashlib.sha256).hexdigest() != signature or not set(must) <= set(names.split(";")):
        raise Refusal(403, "SignatureDoesNotMatch", "The request signature we calculated does not match.")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or a connection that a fault breaks: no word about it."""


@contextmanager
def stub(context: ssl.SSLContext | None = None, **settings: Any) -> Iterator[Stub]:
    """Run the store until the block ends, with TLS if there is a context for it."""
    made = Stub(**settings)

    class Handler(_Handler):
        stub = made

        def setup(self) -> None:
            if context:
                self.request.settimeout(10)
                self.request = context.wrap_socket(self.request, server_side=True)
                self.request.settimeout(None)
            try:
                super().setup()
            except OSError:  # the client is gone already
                self.request.close()
                raise

    server = _Server(("127.0.0.1", 0), Handler)
    made.port = server.server_address[1]
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.05), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
