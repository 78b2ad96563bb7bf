"""An S3 server that throws objects away, for benchmarks: `python -m tests.servers.s3_discard PORT`.

One process, no threads, epoll: some 50 microseconds a request, so that a client in Python or Go is what is measured.
Objects of at most 8 kB are kept and their CRC-64/NVME is compared, which is all that a probe needs.
"""

from __future__ import annotations

import base64
import gc
import re
import select
import socket
import sys
from dataclasses import dataclass, field

from awscrt import checksums as crt  # type: ignore[import-untyped]

KEPT_BYTES = 8192
HEAD = (
    b'HTTP/1.1 200 OK\r\nServer: discard\r\nx-amz-request-id: 0123456789ABCDEF\r\nETag: "0123456789abcdef0123456789'
    b'abcdef-1"\r\nLast-Modified: Tue, 02 Jan 2024 03:04:05 GMT\r\n'
)
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
SUM = re.compile(rb"\r\nx-amz-checksum-crc64nvme: *(\S+)", re.IGNORECASE)
XML = b'<?xml version="1.0" encoding="UTF-8"?>'
CREATED = XML + b"<InitiateMultipartUploadResult><UploadId>one</UploadId></InitiateMultipartUploadResult>"
COMPLETED = (
    XML
    + b"<CompleteMultipartUploadResult><ETag>&quot;0123456789abcdef0123456789abcdef-1&quot;</ETag>"
    + b"</CompleteMultipartUploadResult>"
)
LISTED = XML + b"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>0</KeyCount></ListBucketResult>"
UPLOADS = XML + b"<ListMultipartUploadsResult><IsTruncated>false</IsTruncated></ListMultipartUploadsResult>"


@dataclass
class Connection:
    """A client, and how far its request has come."""

    sock: socket.socket
    head: bytes = b""
    left: int = 0  # of the body
    size: int = 0
    body: bytearray = field(default_factory=bytearray)  # if it is small


class Server:
    """All that is known: sizes of objects, and the small ones."""

    def __init__(self) -> None:
        self.sizes: dict[bytes, int] = {}
        self.parts: dict[bytes, int] = {}
        self.kept: dict[bytes, bytes] = {}

    def answer(self, one: Connection) -> bytes:
        line, _, _ = one.head.partition(b"\r\n")
        method, target, _ = line.split(b" ", 2)
        path, _, query = target.partition(b"?")
        body = b""
        if method == b"PUT":
            if not self._put(path, query, one):
                text = XML + b"<Error><Code>BadDigest</Code><Message>wrong</Message></Error>"
                return b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n" % len(text) + text
        elif method == b"POST" and query.startswith(b"uploads"):
            self.parts[path], body = 0, CREATED
        elif method == b"POST":
            self.sizes[path], body = self.parts.pop(path, 0), COMPLETED
        elif method == b"DELETE":
            self.sizes.pop(path, None)
            self.kept.pop(path, None)
        elif path.strip(b"/").count(b"/") == 0:  # the bucket
            body = UPLOADS if query.startswith((b"uploads", b"encoding-type=url&prefix")) else LISTED
        elif path not in self.sizes:
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        else:
            body = self.kept.get(path, b"")
            size = self.sizes[path] if method == b"HEAD" else len(body)
            told = base64.b64encode(int(crt.crc64nvme(body)).to_bytes(8, "big"))
            return (
                HEAD
                + b"x-amz-checksum-crc64nvme: %b\r\nContent-Length: %d\r\n\r\n" % (told, size)
                + (body if method == b"GET" else b"")
            )
        return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + (body if method != b"HEAD" else b"")

    def _put(self, path: bytes, query: bytes, one: Connection) -> bool:
        if one.size <= KEPT_BYTES:
            told = SUM.search(one.head)
            if told and told[1] != base64.b64encode(int(crt.crc64nvme(bytes(one.body))).to_bytes(8, "big")):
                return False
            self.kept[path] = bytes(one.body)
        if b"partNumber" in query:
            self.parts[path] = self.parts.get(path, 0) + one.size
        else:
            self.sizes[path] = one.size
        return True


def serve(port: int) -> None:
    """Serve until the process is stopped."""
    gc.disable()
    server, buffer = Server(), bytearray(1 << 20)
    view = memoryview(buffer)
    listener = socket.create_server(("127.0.0.1", port), backlog=128)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    connections: dict[int, Connection] = {}
    while True:
        for number, _ in poll.poll():
            if number == listener.fileno():
                sock, _ = listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections[sock.fileno()] = Connection(sock)
                poll.register(sock, select.EPOLLIN)
                continue
            one = connections[number]
            try:
                count = one.sock.recv_into(view)
            except OSError:
                count = 0
            if count == 0:
                poll.unregister(number)
                connections.pop(number).sock.close()
            elif one.left:
                _take(server, one, view[:count])
            else:
                _begin(server, one, bytes(view[:count]))


def _begin(server: Server, one: Connection, data: bytes) -> None:
    """Read the head of a request, and what has come of its body."""
    one.head += data
    end = one.head.find(b"\r\n\r\n")
    if end < 0:
        return
    rest, one.head = one.head[end + 4 :], one.head[: end + 2]
    length = LENGTH.search(one.head)
    one.size = one.left = int(length[1]) if length else 0
    one.body.clear()
    if b"100-continue" in one.head.lower() and not rest:
        one.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    _take(server, one, memoryview(rest))


def _take(server: Server, one: Connection, data: memoryview) -> None:
    """Throw bytes of a body away; answer after the last one."""
    if one.size <= KEPT_BYTES:
        one.body += data
    one.left -= len(data)
    if one.left == 0:
        text, one.head = server.answer(one), b""
        one.sock.sendall(text)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
