"""What nobody can be quicker than: bytes from a connection on loopback into files, by a loop that does nothing else.

    .venv/bin/python -m benchmarks.bare FOLDER COUNT BYTES [--kept]

No association, no PDU, no name looked at: for each file what recv(2) brings goes to write(2), and one byte answers it.
The sender, a process of its own, has the bytes in memory and waits for each answer, as a source of C-GET does. With
`--kept` a file is one of the product's: it gets its name once it is whole, and on a disk its bytes and its name are
there before the answer.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from benchmarks.measure import section
from protocols.files.durable import way_of

BUFFER = 1 << 18  # bytes, as the product's


def send(port: int, count: int, size: int) -> None:
    data = memoryview((os.urandom(1 << 16) * (size // (1 << 16) + 1))[:size])
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            sock.sendall(data)
            sock.recv(1)


def receive(sock: socket.socket, folder: Path, count: int, size: int) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray(BUFFER))
    for number in range(count):
        fd = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        left = size
        while left:
            got = sock.recv_into(buffer[:left])
            if not got:
                raise EOFError
            os.write(fd, buffer[:got])
            left -= got
        os.close(fd)
        sock.send(b"\0")


def receive_kept(sock: socket.socket, folder: Path, count: int, size: int) -> None:
    """As `receive`, into files that are kept as the product does."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray(BUFFER))
    way = way_of(folder)
    for number in range(count):
        part, done = way(folder), 0
        while done < size:
            got = sock.recv_into(buffer[: size - done])
            if not got:
                raise EOFError
            done += os.write(part.fd, buffer[:got])
            part.wrote(done)
        part.written()
        part.keep(str(number), replace=False)
        part.named(str(folder))
        sock.send(b"\0")
        part.close()


def main() -> None:
    folder, count, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    into = receive_kept if "--kept" in sys.argv[4:] else receive
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = os.fork()
        if child == 0:
            send(listener.getsockname()[1], count, size)
            os._exit(0)
        with listener.accept()[0] as sock, section():
            into(sock, folder, count, size)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
