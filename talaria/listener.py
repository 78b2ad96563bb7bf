"""The listening socket: bound before anything is started, and proved to be ours before anybody sends it a credential.

Any user of this machine can bind a free port. So the record of a server, in the state directory that only we can write
to, names the socket's inode, and a client checks in the kernel's tables that this socket listens there and that a
process of ours holds it.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from pathlib import Path

from talaria.errors import ServerError

BACKLOG = 1024  # connections that wait while the server process starts
_FIRST_FD = 3  # sd_listen_fds(3)
_LISTENING = "0A"  # TCP_LISTEN in /proc/net/tcp


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ServerError: nothing can listen there.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        one = socket.socket(family, kind, number)
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)
            one.listen(BACKLOG)
        except OSError:
            one.close()
            raise
    except OSError as exc:
        raise ServerError(
            f"can't listen on {host}:{port} ({exc.strerror}): choose another with --host and --port"
        ) from exc
    return one


def from_systemd() -> socket.socket | None:
    """Return the socket that systemd's socket activation has handed to this process, None if it hasn't.

    Raises:
        ServerError: it is not one TCP socket that listens.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit() or int(count) < 1:
        return None
    if int(count) > 1:
        raise ServerError(f"systemd hands over {count} sockets: the unit must have one ListenStream")
    os.set_inheritable(_FIRST_FD, False)
    one = socket.socket(fileno=_FIRST_FD)
    if one.family not in (socket.AF_INET, socket.AF_INET6) or not one.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        raise ServerError("systemd's socket is not one that listens for TCP: ListenStream must have a port")
    return one


def inode(one: socket.socket) -> int:
    """Return the kernel's number of a socket."""
    return os.fstat(one.fileno()).st_ino


def is_ours(port: int, number: int, holder: int) -> bool:
    """Return True if the socket of this inode listens on a port, and this process holds it, which is ours.

    Args:
        holder: id of the process.
    """
    if sys.platform != "linux":
        return True  # there is no such table; the state directory is all that there is to go by
    return _listens(port, number) and _holds(holder, number)


def _listens(port: int, number: int) -> bool:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            local, _, state, *rest = line.split()[1:]
            if state == _LISTENING and int(local.rpartition(":")[2], 16) == port and int(rest[5]) == number:
                return True
    return False


def _holds(process: int, number: int) -> bool:
    folder = Path(f"/proc/{process}/fd")
    try:
        if folder.stat().st_uid != os.geteuid():
            return False
        return any(_link(one) == f"socket:[{number}]" for one in folder.iterdir())
    except OSError:
        return False


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""  # closed meanwhile


def is_loopback(host: str) -> bool:
    """Return True if nobody from elsewhere can connect to an address."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
