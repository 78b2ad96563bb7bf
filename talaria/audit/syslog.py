"""Syslog over TLS: messages as RFC 5424 has them, framed by their length (RFC 5425 section 4.3)."""

from __future__ import annotations

import fcntl
import os
import socket
import ssl
import struct
import termios
import time
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

PORT = 6514  # RFC 5425 section 4.1
PRIORITY = 10 * 8 + 5  # facility authpriv, severity notice (PS3.15 section A.6)
MSGID = "DICOM+RFC3881"
TIMEOUT_S = 10.0
TAKEN_S = 5.0  # for the server's machine to take what was sent
SIOCOUTQ = termios.TIOCOUTQ  # bytes that the other machine has not confirmed yet (tcp(7))


@dataclass(frozen=True)
class SyslogTarget:
    """Where audit messages go.

    Attributes:
        ca, cert, key: paths of PEM files; empty for the system's authorities, and for no certificate of ours.
    """

    host: str
    port: int = PORT
    ca: str = ""
    cert: str = field(default="", repr=False)
    key: str = field(default="", repr=False)

    @classmethod
    def of(cls, address: str, ca: str = "", cert: str = "", key: str = "") -> SyslogTarget:
        """Read `host` or `host:port`.

        Raises:
            ValueError: it is neither.
        """
        try:
            parts = urlsplit(f"//{address}")
            host, port = parts.hostname or "", parts.port
            host.encode("idna")  # as whoever resolves it does
        except ValueError:
            host, port = "", None
        if not host or parts.netloc != address or "@" in address or port == 0 or any(map(str.isspace, address)):
            raise ValueError(f"audit_syslog: {address!r} is not host:port, as in log.example.org:6514 or [2001:db8::1]")
        return cls(host, port or PORT, ca, cert, key)


def formatted(message: str, time_iso: str, host: str, pid: int | None = None) -> bytes:
    """Return a message as bytes to send: RFC 5424, with its length in front."""
    name = "".join(c for c in host if 33 <= ord(c) <= 126)[:255] or "-"
    head = f"<{PRIORITY}>1 {time_iso} {name} talaria {pid or os.getpid()} {MSGID} - "
    data = head.encode("ascii") + b"\xef\xbb\xbf" + message.encode("utf-8", "replace")  # RFC 5424 section 6.4
    return b"%d %b" % (len(data), data)


def _context(target: SyslogTarget) -> ssl.SSLContext:
    """Return what a server is verified, and ours shown, by.

    Raises:
        OSError: a file can't be used; the message names it.
    """
    file = target.ca
    try:
        context = ssl.create_default_context(cafile=file or None)
        if target.cert:
            file = f"{target.cert} {target.key}".strip()
            # Without a function, OpenSSL asks for the password of an encrypted key on the terminal.
            context.load_cert_chain(target.cert, target.key or None, password=lambda: "")
    except (OSError, ValueError) as exc:
        raise OSError(f"{file} can't be used: {getattr(exc, 'strerror', None) or exc}") from exc
    return context


class SyslogConnection:
    """A connection to a syslog server. Every method may raise OSError; ssl.SSLError is one."""

    def __init__(self, target: SyslogTarget) -> None:
        context = _context(target)
        raw = socket.create_connection((target.host, target.port), TIMEOUT_S)
        try:
            self._sock = context.wrap_socket(raw, server_hostname=target.host)
        except BaseException:
            raw.close()
            raise

    def send(self, data: bytes) -> None:
        """Send messages, and wait until the other machine has them all; syslog itself confirms nothing.

        Raises:
            OSError: it is not known whether they arrived.
        """
        self._sock.sendall(data)
        end = time.monotonic() + TAKEN_S
        while struct.unpack("i", fcntl.ioctl(self._sock.fileno(), SIOCOUTQ, b"\0" * 4))[0]:
            if time.monotonic() > end:
                raise TimeoutError("the syslog server takes nothing")
            time.sleep(0.01)
        self._check()

    def _check(self) -> None:
        """Raise if the server has closed the connection, or answered with an alert."""
        self._sock.settimeout(0)
        try:
            if self._sock.recv(1) == b"":
                raise ConnectionResetError("closed by the syslog server")
        except (ssl.SSLWantReadError, BlockingIOError):
            pass
        finally:
            self._sock.settimeout(TIMEOUT_S)

    def close(self) -> None:
        with suppress(OSError):
            self._sock.close()
