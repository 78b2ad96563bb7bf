"""S3 targets: a prefix of a bucket, at AWS or at any store that speaks S3.

The meaning of a store's errors is in `errors.py`, one push in `push.py`, large files in `large.py`, checksums in
`support.py`, verification in `verify.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from pydantic import SecretStr

from blocks.s3 import Checksum, S3Target
from protocols.http.origin import WebOrigin
from protocols.http.proxy import Proxy
from protocols.net.hiding import hiding, quieted
from protocols.net.tls import Tls
from protocols.s3.client import AWS, BucketSettings
from protocols.s3.error import StoreError
from protocols.s3.probe import Prober
from protocols.s3.store import Store
from protocols.s3.upload import Form
from tasks.driver import Driver, Facts
from tasks.probes import reach_web
from tasks.s3.errors import CREDENTIALS, errors, of
from tasks.s3.push import S3Push
from tasks.s3.support import Supports, forget
from transfer.errors import Denied, DispatchError, Misconfigured, Permanent
from transfer.health import Health
from transfer.layout import names, private_parts
from transfer.plan import Plan
from transfer.receipt import Level, PushReport, Receipt

# What the check says of an upload in parts that was taken.
PARTS = {
    Form.FULL: "taken; the store checks the object as a whole",
    Form.COMPOSITE: "taken; the store checks each part",
    Form.PLAIN: "taken; the store gives the object no checksum",
}

# The table of errors is in `errors`: CODES and STATUS, FOREIGN for what boto3 raises.


@contextmanager
def connect(target: S3Target, check: Callable[[], None] = lambda: None, hidden: Iterable[str] = ()) -> Iterator[Store]:
    """Yield the target's bucket; make connections when they are needed, and close them at the end.

    Args:
        hidden: names of folders that no message may show; secrets never are.

    Raises:
        Misconfigured: there are no credentials, or settings contradict each other, or `endpoint_url` names no host.
            Denied: no credentials can be had.
    """
    proxy = target.proxy.get_secret_value()
    secrets = {_secret(target.secret_access_key) or "", _secret(target.session_token) or ""} - {""}
    if known := Proxy.of(proxy, target.endpoint_url or AWS):
        secrets |= known.secrets
    where = f"{target.endpoint_url or 'AWS'}, bucket {target.bucket}"
    settings = BucketSettings(
        bucket=target.bucket,
        region=target.region,
        endpoint_url=target.endpoint_url,
        addressing=target.addressing_style.value,
        access_key=target.access_key_id,
        secret_key=_secret(target.secret_access_key),
        token=_secret(target.session_token),
        profile=target.profile,
        tls=_tls(target),
        connect_timeout_s=target.connect_timeout_s,
        idle_timeout_s=target.idle_timeout_s,
        proxy=proxy,
        hidden=frozenset(secrets | set(hidden)),
    )
    with quieted(hiding(secrets, hidden), target.name):
        try:
            with errors(where):
                store = Store(settings, check)
        except ValueError as exc:  # boto3's word for a host name that is none
            raise Misconfigured(f"{where}: {exc}: correct endpoint_url") from exc
        with store:
            yield store


def _secret(value: SecretStr | None) -> str | None:
    return value.get_secret_value() if value else None


def _tls(target: S3Target) -> Tls:
    return Tls(ca=target.ca_cert or "")


# ---- check


def check(target: S3Target) -> Health:
    """Probe name, TCP, TLS, credentials and rights; write, read and remove objects; find out which checksums work."""
    health = Health()
    order = ["resolve", "tcp", "tls", "authenticate", "authorize", "write", "checksum", "multipart", "trailers"]
    if target.endpoint_url and urlsplit(target.endpoint_url).scheme == "http":
        order.remove("tls")
        order.remove("trailers")  # such checksums are sent over TLS only
    try:
        with connect(target) as store:
            reach_web(health, store.origin)
            if health.ok:
                _probe_bucket(health, target, store)
            if health.ok:
                _probe_objects(health, target, store, trailers="trailers" in order)
    except DispatchError:  # most likely no credentials: the network can be tried all the same
        if target.endpoint_url:
            proxy = target.proxy.get_secret_value()
            times = target.connect_timeout_s, target.idle_timeout_s
            reach_web(health, WebOrigin.of(target.endpoint_url, _tls(target), *times, proxy))
        else:
            health.skip("resolve", "tcp", "tls")
        with health.probe("authenticate"):
            raise
    seen = {probe.name for probe in health.probes}
    health.skip(*(name for name in order if name not in seen))
    return health


def _probe_bucket(health: Health, target: S3Target, store: Store) -> None:
    """Probe the bucket: any answer to a signed request that is not about the credentials means that these are good."""
    refused: StoreError | None = None
    with health.probe("authenticate") as probe, errors(store.where):
        try:
            store.locate()
            store.call("head_bucket")
        except StoreError as exc:
            refused = exc
        try:
            # An answer to HEAD has no body to say why; and a bucket that may be looked at may not be listed.
            store.call("list_objects_v2", Prefix=target.prefix, MaxKeys=1)
        except StoreError as exc:
            refused = exc
        if refused and (refused.code in CREDENTIALS or refused.status == 400 or refused.busy):
            raise refused
        probe.detail = f"credentials accepted, region {store.region}"
        if not store.secure:
            probe.detail += "; data goes over the network unencrypted"
    if not health.ok:
        return
    with health.probe("authorize") as probe:
        if refused:
            raise of(refused, store.where)
        probe.detail = f"bucket {target.bucket} may be listed"


def _probe_objects(health: Health, target: S3Target, store: Store, *, trailers: bool) -> None:
    supports = Supports(target, store)
    if supports.retention:
        _probe_locked(health, supports)
        return
    with health.probe("write") as probe, errors(store.where):
        prober = Prober(store, target.prefix, supports.headers)
        try:
            prober.write({})
            prober.compare()
        finally:
            prober.remove()
        probe.detail = "an object was written"
        probe.detail += ", read back" if prober.read_back else ", and may not be read"
        if not prober.removed:
            raise Denied(f"{store.where}: {prober.key} was written and can't be removed: the key must be allowed to")
        probe.detail += " and removed"
    if not health.ok:
        return
    with health.probe("checksum") as probe:
        support = supports.probe()
        probe.detail = str(support)
        if target.checksum is Checksum.OFF:
            probe.detail = "switched off; what was written came back"
    if not health.ok:
        return
    with health.probe("multipart") as probe:
        probe.detail = PARTS[supports.probe_form()]
    if trailers:
        with health.probe("trailers", informative=True) as probe, errors(store.where):
            did = Prober(store, target.prefix, supports.headers).trailing()
            probe.detail = f"{did}; this target sends none, other programs may"


def _probe_locked(health: Health, supports: Supports) -> None:
    """Write a single probe object where nothing can be removed."""
    with health.probe("write") as probe:
        support = supports.probe()
        probe.detail = "an object was written with a checksum" + (", read back" if support.read_back else "")
        if not support.removed:
            probe.detail += f"; it stays, hidden: {supports.stays}"
    if not health.ok:
        return
    with health.probe("checksum") as probe:
        probe.detail = str(support)
    health.skip("multipart", "trailers", why="what is written stays: one probe is enough")


# ---- push


def push(target: S3Target, plan: Plan, report: PushReport) -> Receipt:
    """Put what is pending, then the manifests, then the markers."""
    report.check()
    folders = names(plan, target.layout)
    # A store may quote keys.
    with connect(target, report.check, private_parts(plan, target.layout)) as store:
        job = S3Push(target, plan, report, store, folders)
        store.check = job.check
        try:
            return job.run()
        except BaseException as exc:
            job.give_up(exc)
            if isinstance(exc, Permanent):
                forget()  # it may be refused because of what the store was once found to support
            raise


driver = Driver(
    target=S3Target,
    check=check,
    push=push,
    facts=Facts(
        keeps_names=True,
        resumes=True,
        # Files appear one by one, each whole; the marker says when all are there.
        atomic_replace=False,
        reconnects=True,
        verifies_by=(Level.ACCEPTED, Level.LISTED, Level.PROVEN),
    ),
)
