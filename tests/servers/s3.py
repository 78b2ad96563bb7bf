"""Runs S3 servers for tests: moto, s3rver, and one that discards what it gets for benchmarks.

The store that refuses and misbehaves is `tests.servers.s3_stub`.
"""

from __future__ import annotations

import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config

from talaria.testing.process import free_port, program, server
from tests.servers.certificates import Leaf

S3RVER = Path(__file__).with_name("s3rver") / "node_modules" / ".bin" / "s3rver"


@dataclass(frozen=True)
class S3Server:
    """A server that runs."""

    url: str
    access_key: str
    secret_key: str
    ca: str = ""

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    def client(self) -> Any:
        """boto3 as anybody uses it, so that what a push left is looked at by others' eyes."""
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            verify=self.ca or None,
            config=Config(
                s3={"addressing_style": "path"}, request_checksum_calculation="when_required",
                response_checksum_validation="when_required", retries={"total_max_attempts": 2},
            ),
        )  # fmt: skip


def accepting(leaf: Leaf) -> ssl.SSLContext:
    """What a server in this process needs to speak TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf.cert, leaf.key)
    return context


@contextmanager
def moto(folder: Path, leaf: Leaf | None = None, ca: Path | None = None) -> Iterator[S3Server]:
    """Run moto's server, which keeps everything in memory and takes every signature."""
    port = free_port()
    argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    if leaf:
        argv += ["-c", str(leaf.cert), "-k", str(leaf.key)]
    with server(argv, port, folder / "moto.log", cwd=folder):
        yield S3Server(f"http{'s' if leaf else ''}://127.0.0.1:{port}", "moto", "moto-secret-0815", str(ca or ""))


@contextmanager
def s3rver(folder: Path, leaf: Leaf | None = None, ca: Path | None = None) -> Iterator[S3Server]:
    """Run s3rver, which keeps the framing of trailing checksums in the object, and knows no unfinished uploads."""
    if not S3RVER.exists():
        raise RuntimeError("s3rver is not installed: run `make servers`")
    port = free_port()
    argv = [program("node"), str(S3RVER), "-d", str(folder), "-a", "127.0.0.1", "-p", str(port), "-s"]
    argv += ["--configure-bucket", "lab"]
    if leaf:
        argv += ["--key", str(leaf.key), "--cert", str(leaf.cert)]
    with server(argv, port, folder / "s3rver.log"):
        yield S3Server(f"http{'s' if leaf else ''}://127.0.0.1:{port}", "S3RVER", "S3RVER", str(ca or ""))


@contextmanager
def discarding(folder: Path) -> Iterator[S3Server]:
    """Run a server that takes everything, keeps nothing, and is fast enough to measure clients."""
    port = free_port()
    argv = [sys.executable, "-m", "tests.servers.s3_discard", str(port)]
    with server(argv, port, folder / "discard.log", cwd=Path(__file__).parents[2]):
        yield S3Server(f"http://127.0.0.1:{port}", "discard", "discard-secret")
