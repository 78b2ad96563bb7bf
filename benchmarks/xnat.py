"""A study to XNAT: our push, which zips while it sends, beside pyxnat's upload of a zip that was made before.

    python -m benchmarks.xnat [--gib 2] [--pairs 5] [--files ct|large]

The sink is the stand-in of `tests/servers/xnat`, in a process of its own, which reads the zip entry by entry and
throws contents away. `sendfile` is the same zip sent by the kernel: what the sink takes at most. Neither pyxnat nor
that has to make the zip; how long that takes, and that it needs the disk once more, is told beside the table.
"""

from __future__ import annotations

import argparse
import http.client
import os
import socket
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from benchmarks import measure
from talaria.testing import studies
from talaria.testing.process import free_port, server

QUERY = "import-handler=DICOM-zip&inbody=true&dest=/archive/projects/P&project=P&subject=S&session=E"
LOGIN = ("lab", "lab")
CT_SIDE = 512  # pixels: 0.5 MB a file
FRAME_BYTES = 2 * 512 * 512


def push(url: str, folder: str) -> None:
    """Our driver, from the plan to the receipt: with its login, its questions and its comparison at the end."""
    from blocks.xnat import XnatTarget
    from tasks.xnat import driver
    from transfer.plan import scan
    from transfer.receipt import PushReport, State

    target = XnatTarget(host=url, project_id="P", user=LOGIN[0], password=LOGIN[1])
    plan = scan([folder])
    driver.check(target)  # a worker has loaded pyxnat long before
    with measure.section():
        receipt = driver.push(target, plan, PushReport())
    assert receipt.state is State.DELIVERED, receipt.state
    assert len(receipt.items) == len(plan.items)


def pyxnat(url: str, archive: str) -> None:
    """pyxnat's own way, in-body; as a form it would read all of the zip into memory first."""
    from pyxnat import Interface

    client = Interface(url, user=LOGIN[0], password=LOGIN[1])
    with measure.section(), open(archive, "rb") as stream:
        client.get("/data/JSESSION")
        answer = client.post(f"/data/services/import?{QUERY}", data=stream, headers={"Content-Type": "application/zip"})
        client.delete("/data/JSESSION")
    answer.raise_for_status()


def sendfile(url: str, archive: str) -> None:
    """Bytes alone."""
    host, _, port = url.removeprefix("http://").partition(":")
    size = os.stat(archive).st_size
    with measure.section(), open(archive, "rb") as stream, socket.create_connection((host, int(port))) as link:
        head = (
            f"POST /data/services/import?{QUERY} HTTP/1.1\r\nHost: x\r\nAuthorization: Basic bGFiOmxhYg==\r\n"
            f"Content-Type: application/zip\r\nContent-Length: {size}\r\n\r\n"
        )
        link.sendall(head.encode())
        link.sendfile(stream)
        answer = http.client.HTTPResponse(link)
        answer.begin()
        answer.read()
    assert answer.status == 200, answer.status


def make(folder: Path, kind: str, size: int) -> int:
    """Write a study of about that size; return its bytes."""
    uid, series = studies.uid(56), studies.uid(56)
    if kind == "large":
        path = studies.multiframe(folder / "large.dcm", 1, study=uid)
        frame = path.read_bytes()[-FRAME_BYTES:]
        frames = min(size, 4_290_000_000) // FRAME_BYTES  # a length has 32 bits, PS3.5 section 7.1
        from pydicom import dcmread

        image = dcmread(path)
        image.NumberOfFrames = frames
        image.PixelData = b"\0" * FRAME_BYTES
        del image.DataSetTrailingPadding  # pixel data comes last
        head = studies.encoded(image)
        at = head.rindex((FRAME_BYTES).to_bytes(4, "little"))
        with path.open("wb") as out:
            out.write(head[:at] + (frames * FRAME_BYTES).to_bytes(4, "little"))
            for _ in range(frames):
                out.write(frame)
        return path.stat().st_size
    total = count = 0
    while total < size:
        [path] = studies.ct(folder, 1, side=CT_SIDE, study=uid, series=series, first=count)
        total += path.stat().st_size
        count += 1
    return total


@contextmanager
def sink(folder: Path) -> Iterator[str]:
    port = free_port()
    argv = [sys.executable, "-m", "tests.servers.xnat", "--port", str(port)]
    with server(argv, port, folder / "sink.log"):
        yield f"http://127.0.0.1:{port}"


def empty(url: str) -> None:
    """Delete what a run has left, so that the next one starts afresh."""
    found = requests.get(f"{url}/data/projects/P/experiments?format=json", auth=LOGIN, timeout=60).json()
    for row in found["ResultSet"]["Result"]:
        requests.delete(f"{url}/data/experiments/{row['ID']}", auth=LOGIN, timeout=60).raise_for_status()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2, help="size of the study")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--files", choices=["ct", "large"], default="ct", help="CT images of 0.5 MB, or one file")
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "URL", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        what, url, path = arguments.one
        {"push": push, "pyxnat": pyxnat, "sendfile": sendfile}[what](url, path)
        return
    with tempfile.TemporaryDirectory(prefix="talaria-bench-") as name:
        folder = Path(name)
        study, archive = folder / "study", folder / "study.zip"
        study.mkdir()
        size = make(study, arguments.files, int(arguments.gib * (1 << 30)))
        begun = time.perf_counter()
        with zipfile.ZipFile(archive, "w") as out:
            for path in sorted(study.iterdir()):
                out.write(path, path.name)
        zipping = time.perf_counter() - begun
        with sink(folder) as url:

            def candidate(what: str, path: Path) -> Callable[[], measure.Run]:
                argv = [sys.executable, "-m", "benchmarks.xnat", "--one", what, url, str(path)]
                return lambda: measure.run(argv)

            found = measure.in_turn(
                {
                    "Talaria": candidate("push", study),
                    "pyxnat": candidate("pyxnat", archive),
                    "sendfile": candidate("sendfile", archive),
                },
                arguments.pairs,
                lambda: empty(url),
            )
        count = len(list(study.iterdir()))
        print(f"{count} file(s), {size / 1e9:.2f} GB, {arguments.pairs} pairs; {measure.machine()}\n")
        print(measure.table(found, "pyxnat", size))
        print(f"\nMaking the zip took {zipping:.1f} s and {archive.stat().st_size / 1e9:.2f} GB of disk beforehand.")


if __name__ == "__main__":
    main()
