"""DICOMweb: our STOW and WADO beside dicomweb-client and curl, to Orthanc and to a server that throws data away.

    python -m benchmarks.dicomweb [stow|orthanc|wado|memory|clients ...] [--pairs 5] [--ct 500] [--small 2000] [--gb 5]

stow: the CT set (0.5 MB each) and the small set (30 kB each), thrown away. curl sends bodies that were made before.
orthanc: the same to Orthanc, which takes its time: only a tenth of the small set.
wado: the CT set back from Orthanc, and as one answer from a server that has it ready.
memory: a study of `--gb` to the server that throws it away: peak of the push above what the process had before.
clients: the same body by our HTTP client, http.client, urllib3 and httpx: why we have our own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import measure
from talaria.testing import studies
from talaria.testing.process import free_port, server
from tests.servers.orthanc import orthanc

CT_SIDE, SMALL_SIDE = 512, 108  # pixels: 0.53 MB and 30 kB a file
BOUNDARY = "benchmark-" + "0" * 30
KIND = f'multipart/related; type="application/dicom"; boundary={BOUNDARY}'
BUFFER_BYTES = 1 << 20
HOOK_S = 0.005  # between two looks at the memory of curl


# ---- candidates: each runs in a process of its own


def ours(url: str, folder: str, user: str = "", password: str = "") -> None:
    """Our driver, from the plan to the receipt."""
    from tasks.dicomweb import driver
    from transfer.plan import scan
    from transfer.receipt import PushReport, State

    plan, target = scan([folder]), _target(url, user, password)
    before = measure.peak_mib()
    with measure.section():
        receipt = driver.push(target, plan, PushReport())
    assert receipt.state is State.DELIVERED, receipt.state
    Path(f"{folder}.memory").write_text(f"{measure.peak_mib() - before:.0f} MiB above the {before:.0f} MiB of before")


def _target(url: str, user: str, password: str) -> Any:
    from blocks.dicomweb import DicomWebTarget

    return DicomWebTarget.model_validate(
        {"url": url, "http_user": user, "http_password": password, "direction": "both"}
    )


def dicomweb_client(url: str, folder: str, user: str = "", password: str = "") -> None:
    """dicomweb-client as its manual shows it, in as many calls as we make requests; it can't send files unread."""
    import pydicom
    from dicomweb_client.api import DICOMwebClient
    from dicomweb_client.session_utils import create_session_from_user_pass

    client = DICOMwebClient(url, session=create_session_from_user_pass(user, password) if user else None)
    paths = sorted(Path(folder).iterdir())
    count = max(1, 20_000_000 // paths[0].stat().st_size)
    with measure.section():
        for at in range(0, len(paths), min(count, 100)):
            client.store_instances([pydicom.dcmread(path) for path in paths[at : at + min(count, 100)]])


def curl(url: str, body: str, user: str = "", password: str = "") -> None:
    """curl with bodies that are ready, one after the other over one connection."""
    argv = ["curl", "-sSf", "-H", f"Content-Type: {KIND}", "-H", "Expect:", "-X", "POST"]
    argv += ["-u", f"{user}:{password}"] if user else []
    for one in sorted(Path(body).iterdir()):
        argv += ["-T", str(one), f"{url}/studies", "-o", os.devnull]
    _measured(argv)


def _measured(argv: list[str], after: Callable[[], None] | None = None) -> None:
    """Measure another program, and what is done in this process after it."""
    own, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    process = subprocess.Popen(argv)
    peak = 0.0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        peak = max([peak, *(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))])
        time.sleep(HOOK_S)
    if process.wait():
        raise RuntimeError(f"{argv[0]}: exit code {process.returncode}")
    if after:
        after()
    wall = time.perf_counter() - begun
    used = [resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)]
    cpu = sum(one.ru_utime + one.ru_stime for one in used) - own.ru_utime - own.ru_stime
    print(json.dumps(asdict(measure.Run(wall, cpu, max(peak, measure.peak_mib() if after else 0)))), flush=True)


def retrieve(url: str, into: str, user: str = "", password: str = "") -> None:
    """Our driver: it asks what there is, fetches, checks and names each instance."""
    from imaging.query import Query
    from tasks.dicomweb import driver
    from transfer.receipt import PushReport, State

    target = _target(url, user, password)
    assert driver.retrieve
    with measure.section():
        receipt = driver.retrieve(target, Query(), Path(into), PushReport())
    assert receipt.state is State.DELIVERED, receipt.state


def receive(url: str, into: str, user: str = "", password: str = "") -> None:
    """Our reader of an answer alone, as the driver uses it."""
    from protocols.dicomweb import wado_request
    from tasks.dicomweb import connect

    with connect(_target(url, user, password)) as service, measure.section():
        count = 0
        for content in wado_request.fetch(service, ("1.2.3",), lambda count: None):
            with wado_request.spooled(content, Path(into)) as (file, header):
                file.replace(Path(into) / f"{header.SOPInstanceUID}.dcm")
                count += 1
    assert count


def curl_and_parser(url: str, into: str, user: str = "", password: str = "") -> None:
    """curl into a file, then the simplest parser: the whole answer in memory, split at its boundary."""
    folder = Path(into)
    answer, head = folder / "answer", folder / "head"
    study = "1.2.3"
    if user:
        import base64
        import urllib.request

        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        request = urllib.request.Request(f"{url}/studies", headers={"Authorization": f"Basic {token}"})
        with urllib.request.urlopen(request) as found:
            study = json.load(found)[0]["0020000D"]["Value"][0]

    def parse() -> None:
        kind = next(line for line in head.read_text().splitlines() if line.lower().startswith("content-type:"))
        boundary = kind.partition("boundary=")[2].strip().strip('"').encode()
        for number, part in enumerate((b"\r\n" + answer.read_bytes()).split(b"\r\n--" + boundary)[1:-1]):
            (folder / f"{number}.dcm").write_bytes(part.partition(b"\r\n\r\n")[2])

    argv = ["curl", "-sSf", "-D", str(head), "-o", str(answer), f"{url}/studies/{study}"]
    argv += ["-H", 'Accept: multipart/related; type="application/dicom"']
    _measured(argv + (["-u", f"{user}:{password}"] if user else []), parse)


def dicomweb_client_wado(url: str, into: str, user: str = "", password: str = "") -> None:
    """dicomweb-client, which returns data sets; they are written as files."""
    from dicomweb_client.api import DICOMwebClient
    from dicomweb_client.session_utils import create_session_from_user_pass

    client = DICOMwebClient(url, session=create_session_from_user_pass(user, password) if user else None)
    with measure.section():
        (study,) = client.search_for_studies()
        for ds in client.retrieve_study(study["0020000D"]["Value"][0]):
            ds.save_as(Path(into) / f"{ds.SOPInstanceUID}.dcm")


def body_by_ours(url: str, body: str) -> None:
    """Our HTTP client, with a prepared body read in pieces of 1 MiB, as all of the following."""
    from protocols.http.origin import WebOrigin
    from protocols.http.session import Session
    from protocols.net.tls import Tls

    path = next(Path(body).iterdir())

    class Pieces:
        length = path.stat().st_size

        def __iter__(self) -> Iterator[memoryview]:
            view = memoryview(bytearray(BUFFER_BYTES))
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(view):
                    yield view[:count]

        def sent(self, count: int) -> None:
            pass

    headers = {"Content-Type": KIND}
    with (
        Session(WebOrigin.of(url, Tls(), 10, 60)) as session,
        measure.section(),
        session.request("POST", "/rs/studies", headers, Pieces()) as answer,
    ):
        answer.read()


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while piece := file.read(BUFFER_BYTES):
            yield piece


def body_by_http_client(url: str, body: str) -> None:
    import http.client

    path = next(Path(body).iterdir())
    parts = urlsplit(url)
    with measure.section():
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, blocksize=BUFFER_BYTES)
        with path.open("rb", buffering=0) as file:
            headers = {"Content-Type": KIND, "Content-Length": str(path.stat().st_size)}
            connection.request("POST", "/rs/studies", file, headers)
            connection.getresponse().read()


def body_by_urllib3(url: str, body: str) -> None:
    import urllib3

    path = next(Path(body).iterdir())
    pool = urllib3.PoolManager()
    with measure.section():
        headers = {"Content-Type": KIND, "Content-Length": str(path.stat().st_size)}
        pool.request("POST", f"{url}/studies", body=_pieces(path), headers=headers, chunked=False)


def body_by_httpx(url: str, body: str) -> None:
    import httpx

    path = next(Path(body).iterdir())
    with httpx.Client(trust_env=False, timeout=60) as client, measure.section():
        headers = {"Content-Type": KIND, "Content-Length": str(path.stat().st_size)}
        client.post(f"{url}/studies", content=_pieces(path), headers=headers)


# ---- the server that throws away


def sink(port: str, answer: str = "") -> None:
    """Read every request to its end and answer 200: without a body, or to GET with the file `answer`."""
    listener = socket.create_server(("127.0.0.1", int(port)))
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_drain, args=(connection, answer), daemon=True).start()


def _drain(connection: socket.socket, answer: str) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with connection, connection.makefile("rb", buffering=BUFFER_BYTES) as reader:

        def skip(count: int) -> None:
            while count:
                count -= reader.readinto(buffer[: min(count, BUFFER_BYTES)]) or count  # type: ignore[attr-defined]

        while line := reader.readline():
            fields = {}
            while (text := reader.readline().strip()) != b"":
                name, _, value = text.partition(b":")
                fields[name.lower()] = value.strip().lower()
            if fields.get(b"expect") == b"100-continue":
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            if fields.get(b"transfer-encoding") == b"chunked":
                while size := int(reader.readline(), 16):
                    skip(size)
                    reader.readline()
                reader.readline()
            else:
                skip(int(fields.get(b"content-length", b"0")))
            if line.startswith(b"GET") and answer:
                with open(answer, "rb") as file:
                    head = f"HTTP/1.1 200 OK\r\nContent-Type: {KIND}\r\nContent-Length: {os.stat(answer).st_size}"
                    connection.sendall(head.encode() + b"\r\n\r\n")
                    connection.sendfile(file)
            else:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


# ---- sets and comparisons


def make(folder: Path, count: int, side: int) -> int:
    """Write one series; returns its bytes."""
    return sum(path.stat().st_size for path in studies.ct(folder, count, side=side))


def bodies(folder: Path, into: Path) -> None:
    """Write the same files as STOW bodies of 20 MB or 100 instances, for who can't make them."""
    into.mkdir()
    paths = sorted(folder.iterdir())
    each = min(100, max(1, 20_000_000 // paths[0].stat().st_size))
    for at in range(0, len(paths), each):
        with (into / f"{at:06}").open("wb") as writer:
            write_body(paths[at : at + each], writer)


def write_body(paths: list[Path], writer: Any) -> None:
    for path in paths:
        writer.write(f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode())
        writer.write(path.read_bytes())
        writer.write(b"\r\n")
    writer.write(f"--{BOUNDARY}--\r\n".encode())


def candidate(what: Callable[..., None], *arguments: str) -> Callable[[], measure.Run]:
    argv = [sys.executable, "-m", "benchmarks.dicomweb", "--run", what.__name__, *arguments]
    return lambda: measure.run(argv)


@contextmanager
def discarding(folder: Path, answer: Path | None = None) -> Iterator[str]:
    port = free_port()
    argv = [sys.executable, "-m", "benchmarks.dicomweb", "--run", "sink", str(port), *([str(answer)] if answer else [])]
    with server(argv, port, folder / f"sink-{port}.log"):
        yield f"http://127.0.0.1:{port}/rs"


def report(title: str, found: dict[str, list[measure.Run]], reference: str, size: int) -> None:
    print(f"\n{title}\n\n{measure.table(found, reference, size)}", flush=True)


def stow(folder: Path, options: argparse.Namespace) -> None:
    for name, count, side in (("CT", options.ct, CT_SIDE), ("small", options.small, SMALL_SIDE)):
        size = make(folder / name, count, side)
        bodies(folder / name, folder / f"{name}-bodies")
        title = f"STOW, {name} set: {count} files, {size / measure.MB:.0f} MB"
        with discarding(folder) as url:
            found = measure.in_turn(
                {
                    "ours": candidate(ours, url, str(folder / name)),
                    "dicomweb-client": candidate(dicomweb_client, url, str(folder / name)),
                    "curl": candidate(curl, url, str(folder / f"{name}-bodies")),
                },
                options.pairs,
            )
        report(f"{title}, thrown away", found, "dicomweb-client", size)


def stow_orthanc(folder: Path, options: argparse.Namespace) -> None:
    for name, count, side in (("CT", options.ct, CT_SIDE), ("small", options.small // 10, SMALL_SIDE)):
        size = make(folder / name, count, side)
        bodies(folder / name, folder / f"{name}-bodies")
        with orthanc(folder / f"orthanc-{name}") as archive:
            access = (archive.user, archive.password)
            found = measure.in_turn(
                {
                    "ours": candidate(ours, archive.dicomweb_url, str(folder / f"{name}"), *access),
                    "dicomweb-client": candidate(
                        dicomweb_client, archive.dicomweb_url, str(folder / f"{name}"), *access
                    ),
                    "curl": candidate(curl, archive.dicomweb_url, str(folder / f"{name}-bodies"), *access),
                },
                options.pairs,
                archive.clear,
            )
        title = f"STOW, {name} set: {count} files, {size / measure.MB:.0f} MB"
        report(f"{title}, Orthanc", found, "dicomweb-client", size)


def wado(folder: Path, options: argparse.Namespace) -> None:
    source = folder / "given"
    size = make(source, options.ct, CT_SIDE)
    title = f"WADO, CT set: {options.ct} files, {size / measure.MB:.0f} MB"
    into = folder / "into"

    def emptied() -> None:
        subprocess.run(["rm", "-rf", str(into)], check=True)
        into.mkdir()

    with (folder / "answer").open("wb") as writer:
        write_body(sorted(source.iterdir()), writer)
    with discarding(folder, folder / "answer") as url:
        found = measure.in_turn(
            {
                "ours": candidate(receive, url, str(into)),
                "curl, then a parser": candidate(curl_and_parser, url, str(into)),
            },
            options.pairs,
            emptied,
        )
    report(f"{title}, one answer that is ready", found, "curl, then a parser", size)
    with orthanc(folder / "orthanc-wado") as archive:
        access = (archive.dicomweb_url, str(into), archive.user, archive.password)
        candidate(ours, access[0], str(source), *access[2:])()
        found = measure.in_turn(
            {
                "ours": candidate(retrieve, *access),
                "curl, then a parser": candidate(curl_and_parser, *access),
                "dicomweb-client": candidate(dicomweb_client_wado, *access),
            },
            options.pairs,
            emptied,
        )
    report(f"{title}, Orthanc", found, "curl, then a parser", size)


def memory(folder: Path, options: argparse.Namespace) -> None:
    count = int(options.gb * 1e9 / (2 * CT_SIDE * CT_SIDE + 6600))
    size = make(folder / "large", count, CT_SIDE)
    with discarding(folder) as url:
        one = candidate(ours, url, str(folder / "large"))()
    told = (folder / "large.memory").read_text()
    print(f"\nA study of {size / 1e9:.1f} GB, {count} files: {size / measure.MB / one.wall_s:.0f} MB/s, {told}")


def clients(folder: Path, options: argparse.Namespace) -> None:
    source = folder / "one"
    make(source, options.ct, CT_SIDE)
    prepared = folder / "one-body"
    prepared.mkdir()
    with (prepared / "body").open("wb") as writer:
        write_body(sorted(source.iterdir()), writer)
    with discarding(folder) as url:
        found = measure.in_turn(
            {
                "ours": candidate(body_by_ours, url, str(prepared)),
                "http.client": candidate(body_by_http_client, url, str(prepared)),
                "urllib3": candidate(body_by_urllib3, url, str(prepared)),
                "httpx": candidate(body_by_httpx, url, str(prepared)),
            },
            options.pairs,
        )
    report("One body, prepared, thrown away", found, "http.client", (prepared / "body").stat().st_size)


PARTS = {"stow": stow, "orthanc": stow_orthanc, "wado": wado, "memory": memory, "clients": clients}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[], help="all, if none is named")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ct", type=int, default=500)
    parser.add_argument("--small", type=int, default=2000)
    parser.add_argument("--gb", type=float, default=5)
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        globals()[options.run[0]](*options.run[1:])
        return
    print(measure.machine())
    for part in options.parts or PARTS:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="talaria-benchmark-"))
            PARTS[part](Path(folder), options)


if __name__ == "__main__":
    main()
