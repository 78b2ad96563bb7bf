"""S3 stores: moto with and without TLS, and a store of our own that checks what moto does not."""

from __future__ import annotations

import atexit
import functools
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from blocks.base import Target
from blocks.s3 import S3Target
from protocols.s3.keys import keys
from talaria.testing.harness import Harness
from talaria.testing.process import free_port, patient
from talaria.testing.relay import relay
from tasks.s3.support import forget
from tests.servers.certificates import Authority, Leaf
from tests.servers.s3 import S3Server, accepting, moto
from tests.servers.s3_stub import ACCESS_KEY, SECRET_KEY, Misdeed, Refusal, Request, Stub, stub
from transfer.layout import names as folders_of
from transfer.plan import Item, Plan

PREFIX = "in/box"
HEAD_BYTES = 700  # of a PUT, beside the file: what a relay counts, too


@functools.cache
def certificates() -> tuple[Authority, Leaf]:
    """An authority and a server's certificate, made once in a process."""
    folder = tempfile.TemporaryDirectory(prefix="talaria-s3-ca-")
    atexit.register(folder.cleanup)
    authority = Authority(Path(folder.name))
    return authority, authority.leaf("s3")


@functools.cache
def shared_moto(tls: bool) -> tuple[S3Server, Any]:
    """One server with a bucket `lab` for all tests of a process, and a client to look at it; prefixes are fresh."""
    stack = ExitStack()
    atexit.register(stack.close)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="talaria-moto-")))
    authority, leaf = certificates()
    server = stack.enter_context(moto(folder, leaf, authority.ca) if tls else moto(folder))
    client = server.client()
    stack.callback(client.close)
    client.create_bucket(Bucket="lab")
    return server, client


def target(url: str, access_key: str, secret_key: str, **settings: Any) -> S3Target:
    """A target on loopback with timeouts that fit a test."""
    defaults: dict[str, Any] = {
        "bucket": "lab",
        "prefix": PREFIX,
        "endpoint_url": url,
        "access_key_id": access_key,
        "secret_access_key": secret_key,
        "connect_timeout_s": 5,
        "idle_timeout_s": 10,
        "retry_delay_s": 0,
        "retry_max_delay_s": 0,
    }
    made = S3Target(**patient(defaults | settings))
    made.named("s3-test")
    return made


def stub_target(store: Stub, *, tls: bool = False, port: int | None = None, **settings: Any) -> S3Target:
    """A target at a stub."""
    url = f"http{'s' if tls else ''}://127.0.0.1:{port or store.port}"
    if tls:
        settings.setdefault("ca_cert", str(certificates()[0].ca))
    return target(url, ACCESS_KEY, SECRET_KEY, **settings)


def files_of(objects: Mapping[str, bytes], plan: Plan, prefix: str = PREFIX) -> dict[str, bytes]:
    """What a bucket holds of a plan, by path; whatever else is below the dispatch's prefix by its key."""
    folders = folders_of(plan, "{dispatch_id}")
    paths = {key: path for path, key in keys(prefix, folders, (item.path for item in plan.items)).items()}
    own = f"{prefix}/{plan.dispatch_id}/"
    return {
        paths.get(key, key): data
        for key, data in objects.items()
        if key.startswith(own) and not key.rsplit("/", 1)[-1].startswith((".complete", ".talaria-"))
    }


def final(key: str) -> bool:
    """Whether a key is one that stays; the manifest is."""
    return not key.rsplit("/", 1)[-1].startswith(".talaria-probe")


@contextmanager
def through_relay(usual: S3Target, count: int) -> Iterator[Target]:
    """Break the connections to a target's server once, after so many bytes of files."""
    url = usual.endpoint_url or ""
    port = int(url.rsplit(":", 1)[1])
    with relay(port) as link:
        cut = usual.model_copy(update={"endpoint_url": url.replace(str(port), str(link.port))})
        cut.named("s3-test")
        link.cut_after = count
        yield cut


@contextmanager
def harness_of_moto(folder: Path, *, tls: bool) -> Iterator[Harness]:
    """A fresh prefix at the shared server, looked at with boto3."""
    server, client = shared_moto(tls)
    prefix = f"in/{uuid.uuid4().hex[:12]}"

    def objects() -> dict[str, bytes]:
        return {key: client.get_object(Bucket="lab", Key=key)["Body"].read() for key in seen()}

    def seen() -> set[str]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="lab", Prefix=prefix)
        return {row["Key"] for page in pages for row in page.get("Contents", ())}

    def uploads() -> set[str]:
        return {row["UploadId"] for row in client.list_multipart_uploads(Bucket="lab").get("Uploads", ())}

    usual = target(server.url, server.access_key, server.secret_key, prefix=prefix, ca_cert=server.ca or None)
    dead = usual.model_copy(update={"endpoint_url": f"http{'s' if tls else ''}://127.0.0.1:{free_port()}"})
    yield Harness(
        name=f"s3-moto{'-tls' if tls else ''}",
        target=usual,
        dead=dead.named("s3-test"),
        read_back=lambda plan: files_of(objects(), plan, prefix),
        names=seen,
        cut=partial(through_relay, usual),
        final=final,
        leftovers=uploads,
        secrets=(server.secret_key,),
    )


@contextmanager
def harness_of_stub(folder: Path, *, tls: bool = False, **settings: Any) -> Iterator[Harness]:
    """A store of our own, which compares signatures and checksums."""
    context = accepting(certificates()[1]) if tls else None
    forget()  # another store had this port before
    with stub(context, buckets={"lab": {}}, **settings) as store:
        usual = stub_target(store, tls=tls)

        @contextmanager
        def reject(plan: Plan, item: Item) -> Iterator[Target]:
            def fault(request: Request) -> Misdeed | None:
                if request.operation == "Put" and request.key.endswith(f"/{item.path}"):
                    raise Refusal(400, "InvalidObjectName", "The specified name is not valid.")
                return None

            store.fault = fault
            yield usual

        @contextmanager
        def shorten() -> Iterator[Target]:
            store.fault = lambda request: Misdeed(change=lambda data: data[:-100])
            yield usual
            store.fault = lambda request: None

        yield Harness(
            name=f"s3-stub{'-tls' if tls else ''}",
            target=usual,
            dead=stub_target(store, tls=tls, port=free_port()),
            read_back=lambda plan: files_of(store.objects("lab"), plan),
            names=lambda: set(store.objects("lab")),
            cut=partial(through_relay, usual),
            final=final,
            leftovers=lambda: set(store.uploads),
            reject=reject,
            shorten=shorten,
            secrets=(SECRET_KEY,),
        )


HARNESSES: dict[str, Callable[[Path], AbstractContextManager[Harness]]] = {
    "s3-moto": partial(harness_of_moto, tls=False),
    "s3-moto-tls": partial(harness_of_moto, tls=True),
    "s3-stub": harness_of_stub,
    "s3-stub-tls": partial(harness_of_stub, tls=True),
}
NEEDED = {"bucket": "studies"}
