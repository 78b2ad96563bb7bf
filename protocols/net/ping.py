"""ICMP echo: whether a host answers at all, as a hint for people who look for what is wrong.

Needs no privileges: the kernel's own echo sockets where they are allowed, raw ones where we may have them, else the
system's `ping`. Where there is none of them the answer is that it could not be tried.

Sources: RFC 792, RFC 4443 section 4; icmp(7) (`net.ipv4.ping_group_range`).
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from dataclasses import dataclass

WAIT_S = 1.0  # for an answer: on the way round the earth it takes a third of that
ECHO_REQUEST, ECHO_REPLY = 8, 0
ECHO_REQUEST_6, ECHO_REPLY_6 = 128, 129
ICMPV6 = 58  # protocol number, which Python names on some systems only
MARK_BYTES = 16  # of the payload, by which we know the answer to our own question
RECEIVE = 1500  # bytes


@dataclass(frozen=True)
class Echo:
    """What came of it: whether the host answered (None: it could not be tried), and how or why, for people."""

    answered: bool | None
    detail: str


class Ping:
    """One echo request, under way from the start in a thread of its own, so that it takes no time of others.

    Attributes:
        ms: how long it took, milliseconds.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.ms = round(WAIT_S * 1000, 1)
        self._end = time.monotonic() + WAIT_S
        self._echo = Echo(None, "the name was not resolved in time for an answer")
        self._thread = threading.Thread(target=self._run, name="ping", daemon=True)
        self._thread.start()

    def result(self) -> Echo:
        """Return what came of it, at most `WAIT_S` after the start."""
        self._thread.join(max(0.0, self._end - time.monotonic()))
        return self._echo

    def _run(self) -> None:
        try:
            found = socket.getaddrinfo(self.host, None, type=socket.SOCK_DGRAM)
        except (OSError, UnicodeError):
            self._echo = Echo(None, "the name can't be resolved")
            return
        family, address = found[0][0], found[0][4]
        left = self._end - time.monotonic()
        if left < WAIT_S / 3:
            return
        self._echo = Echo(False, f"no answer from {address[0]} within {left:.1g} s, which many hosts never give")
        try:
            self._echo = self._ask(family, address) or self._echo
        except OSError as exc:
            self._echo = Echo(False, f"{address[0]}: {exc.strerror or exc}")

    def _ask(self, family: int, address: tuple[object, ...]) -> Echo | None:
        begun = time.monotonic()
        sock = _socket(family)
        if sock is not None:
            with sock:
                answered = _exchange(sock, family, address, self._end)
        else:
            program = shutil.which("ping")
            if program is None:
                return Echo(None, "no ICMP socket is allowed here, and there is no ping program")
            answered = _run_program(program, str(address[0]))
        self.ms = round((time.monotonic() - begun) * 1000, 1)
        return Echo(True, f"{address[0]} answered in {self.ms:.1f} ms") if answered else None


def _socket(family: int) -> socket.socket | None:
    """An ICMP socket that needs no privileges, or one that needs those that we have; None if there is neither."""
    protocol = socket.IPPROTO_ICMP if family == socket.AF_INET else ICMPV6
    for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            return socket.socket(family, kind, protocol)
        except OSError:
            continue
    return None


def _exchange(sock: socket.socket, family: int, address: tuple[object, ...], end: float) -> bool:
    """Send an echo request and wait for its answer."""
    mark = os.urandom(MARK_BYTES)
    request, reply = (ECHO_REQUEST, ECHO_REPLY) if family == socket.AF_INET else (ECHO_REQUEST_6, ECHO_REPLY_6)
    head = struct.pack(">BBHHH", request, 0, 0, os.getpid() & 0xFFFF, 1)
    # The kernel writes the checksum of ICMPv6, and of every echo socket; a raw ICMP socket leaves it to us.
    head = head[:2] + struct.pack(">H", _checksum(head + mark)) + head[4:]
    sock.sendto(head + mark, address)
    while (left := end - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            packet = sock.recv(RECEIVE)
        except TimeoutError:
            return False
        # A raw IPv4 socket gives the IP header too.
        raw = family == socket.AF_INET and sock.type == socket.SOCK_RAW
        message = packet[(packet[0] & 0x0F) * 4 :] if raw and packet else packet
        if message[:1] == bytes([reply]) and message[8:] == mark:
            return True
    return False


def _checksum(data: bytes) -> int:
    """The Internet checksum, RFC 1071; `data` has an even length."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def _run_program(program: str, address: str) -> bool:
    """Run the system's `ping` on an address, which is a number and so never an option."""
    try:
        done = subprocess.run(
            [program, "-n", "-c", "1", "-W", "1", address],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=2 * WAIT_S,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
