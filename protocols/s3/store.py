"""One bucket of an S3 store.

boto3 finds credentials, region and URL, and does the operations that a push needs once; objects, parts and HEADs go
directly over our own connections, because boto3 needs 1.2 ms of CPU for a small object and this way 0.25 ms (figures in
docs/performance.md). Both use the same connections and the same trust.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.exceptions import ClientError

from protocols.http.answer import Answer
from protocols.http.exchange import Content
from protocols.http.head import Fields
from protocols.http.origin import WebOrigin
from protocols.http.session import Begun, Session
from protocols.s3.client import BucketAccount, BucketSettings, answer_of
from protocols.s3.error import StoreError
from protocols.s3.sign import EMPTY_SHA256, UNSIGNED, Credentials, Signer
from transfer.errors import TimedOut

T = TypeVar("T")

SHA256_FIELD = "x-amz-meta-sha256"  # of our own: the SHA-256 of the content, hexadecimal
TRIES = 3  # of a request that the store answers with "later"; the dispatch's own attempts come after these
PAUSE_S = 0.3  # before the second one at most; doubles, with full jitter
LONGEST_PAUSE_S = 2.0  # a store that asks for more is left to the dispatch's own back-off
SLICE_S = 0.2  # of a pause, between two looks at `check`
ERROR_BYTES = 1 << 20  # of an answer that is an error
# What boto3 puts into a request's head, and the connection says itself.
_OF_CONNECTION = frozenset(("host", "content-length", "transfer-encoding", "expect", "user-agent"))

_regions: dict[str, str] = {}  # by bucket: names of buckets at AWS are unique in the world


@dataclass(frozen=True)
class StoredObject:
    """What the store says of an object."""

    size: int
    sha256: str | None  # from the metadata, where we put it
    headers: Fields = field(repr=False)


class Payload:
    """A request's body in memory, sent in pieces.

    Args:
        piece: bytes that are sent before `pace` is called again.
        pace: called with the length of each piece before it is sent; may wait.
        moved: called with the number of bytes that were sent.
    """

    def __init__(
        self,
        data: memoryview,
        piece: int = 1 << 24,
        pace: Callable[[int], None] = lambda count: None,
        moved: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.data, self._piece, self._pace, self._moved = data, piece, pace, moved

    @property
    def length(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[memoryview]:
        for start in range(0, len(self.data), self._piece):
            piece = self.data[start : start + self._piece]
            self._pace(len(piece))
            yield piece

    def sent(self, count: int) -> None:
        self._moved(count)


class SentObject:
    """An object that was sent; the store's answer is still to be read: call `fields` or `leave`, exactly once."""

    def __init__(self, begun: Begun, refused: Callable[[Answer, bytes], StoreError]) -> None:
        self._begun, self._refused = begun, refused
        self.leave = begun.leave

    def fields(self) -> Fields:
        """Return the head of the answer; raises as `Store.call`, and is not repeated."""
        answer, body = self._begun.read(ERROR_BYTES)
        if answer.status >= 300:
            raise self._refused(answer, body)
        return answer.headers


class Store:
    """A bucket, over connections that are kept; safe to use from several threads.

    Args:
        check: called several times a second during every call; may raise to stop it. May be replaced.

    Raises:
        botocore.exceptions.BotoCoreError: no credentials, no such profile, no such region.
    """

    def __init__(self, settings: BucketSettings, check: Callable[[], None] = lambda: None) -> None:
        self.check = check
        self.bucket = settings.bucket
        self._settings = settings
        self._sessions: dict[WebOrigin, Session] = {}
        self._lock = threading.Lock()
        self._account = BucketAccount(settings)
        self._use(_regions.get(settings.bucket, "") if settings.at_aws else "")

    def _use(self, region: str) -> None:
        self._client, self._aim = self._account.client(region or self._account.region, self._carry)
        self._signer = Signer(self._aim.region, self._aim.service)
        self._session = self._session_of(self._aim.url)

    @property
    def origin(self) -> WebOrigin:
        """The server that objects go to."""
        return self._session.origin

    @property
    def where(self) -> str:
        """Server and bucket, for messages."""
        return f"{self.origin.where}, bucket {self.bucket}"

    @property
    def region(self) -> str:
        return self._aim.region

    @property
    def secure(self) -> bool:
        """Whether TLS protects what is sent from being changed on its way."""
        return self.origin.scheme == "https"

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def locate(self) -> None:
        """Ask AWS for the bucket's region, once in a process, and use it.

        Raises:
            StoreError: there is no such bucket. One that may only be written to names its region nevertheless.
        """
        if not self._settings.at_aws or self.bucket in _regions:
            return
        try:
            region = self.call("head_bucket").get("BucketRegion")
        except StoreError as exc:
            if exc.status == 404 or exc.busy:
                raise
            region = exc.region
        if region:
            _regions[self.bucket] = str(region)
            if region != self.region:
                self._use(region)

    def retention(self) -> str:
        """Return how long the bucket keeps every object by default (Object Lock); "" if it doesn't, or doesn't say.

        Raises:
            StoreError: the store is busy. DispatchError: no answer.
        """
        try:
            found = self.call("get_object_lock_configuration").get("ObjectLockConfiguration", {})
        except StoreError as exc:
            if exc.busy:
                raise
            return ""
        rule = found.get("Rule", {}).get("DefaultRetention", {})
        length = f"{rule['Days']} days" if "Days" in rule else f"{rule['Years']} years" if "Years" in rule else ""
        return f"{rule['Mode'].lower()}, {length}" if length and "Mode" in rule else ""

    @contextmanager
    def grace(self, seconds: float) -> Iterator[None]:
        """Let the block run for so long, even if `check` would stop it at once; then raise TimedOut."""
        end = time.monotonic() + seconds

        def check() -> None:
            if time.monotonic() > end:
                raise TimedOut(f"{self.where}: no time left to clear up")

        before, self.check = self.check, check
        try:
            yield
        finally:
            self.check = before

    # ---- operations by boto3

    def call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """Do one operation on the bucket; repeat it a few times while the store is busy.

        Raises:
            StoreError: the store refuses. DispatchError: no answer could be had.
        """

        def once() -> dict[str, Any]:
            try:
                answer: dict[str, Any] = getattr(self._client, operation)(Bucket=self.bucket, **parameters)
            except ClientError as exc:
                raise StoreError.of_boto(exc, self._settings.hidden) from exc
            return answer

        return self._patiently(once)

    def pages(self, operation: str, again: Mapping[str, str], **parameters: Any) -> Iterator[dict[str, Any]]:
        """Yield the pages of an operation that lists; raises as `call`.

        Args:
            again: by the name of each parameter that asks for the next page, the member of a page that holds its value.
        """
        while True:
            page = self.call(operation, **parameters)
            yield page
            if not page.get("IsTruncated"):
                return
            following = {name: page[member] for name, member in again.items() if page.get(member)}
            if not following or following.items() <= parameters.items():
                return  # a store that says "more" and not where
            parameters |= following

    def _carry(self, request: AWSPreparedRequest) -> AWSResponse:
        """Send a request that boto3 has prepared."""
        url = urlsplit(str(request.url))
        headers = {
            str(name): value.decode("latin-1") if isinstance(value, bytes) else str(value)
            for name, value in request.headers.items()
            if str(name).lower() not in _OF_CONNECTION
        }
        path = url.path + (f"?{url.query}" if url.query else "")
        given: Any = request.body  # None, or text or bytes: nothing that streams goes this way
        body = given.encode() if isinstance(given, str) else bytes(given or b"")
        content = Content(body) if body or request.method in ("PUT", "POST") else None
        with self._session_of(str(request.url)).request(str(request.method), path, headers, content) as answer:
            return answer_of(request, answer.status, answer.headers, answer.read())

    def _session_of(self, url: str) -> Session:
        origin = self._settings.origin(url)
        with self._lock:
            if origin not in self._sessions:
                self._sessions[origin] = Session(origin, check=lambda: self.check())
            return self._sessions[origin]

    # ---- objects and parts, on the short way

    def put(
        self,
        key: str,
        payload: Payload,
        headers: Mapping[str, str],
        sha256: str | None = None,
        query: Mapping[str, str] | None = None,
        tries: int = TRIES,
    ) -> Fields:
        """Store an object, or with a query a part of one; return the head of the answer.

        Args:
            sha256: of the payload, hexadecimal, to be signed; None for a payload that TLS protects already.
            tries: how often it is sent at most, while the store answers that it is busy.

        Raises:
            StoreError, DispatchError: as `call`.
        """
        if sha256 is None:
            sha256 = UNSIGNED if self.secure else hashlib.sha256(payload.data).hexdigest()
        with self._request("PUT", key, query or {}, headers, sha256, payload, tries) as answer:
            answer.read(ERROR_BYTES)
            return answer.headers

    def begin(self, key: str, payload: Payload, headers: Mapping[str, str], sha256: str) -> SentObject:
        """Send an object, whose answer is read later; raises as `call`."""
        path, fields = self._signed("PUT", key, {}, headers, sha256)
        return SentObject(self._session.begin("PUT", path, fields, payload), self._refused)

    def head(self, key: str, headers: Mapping[str, str] | None = None) -> StoredObject | None:
        """Return what the store says about an object, None if there is none; raises as `call`."""
        try:
            with self._request("HEAD", key, {}, headers or {}) as answer:
                sha256 = answer.headers.get(SHA256_FIELD)
                size = int(answer.headers.get("Content-Length") or 0)
                return StoredObject(size, sha256.strip().lower() if sha256 else None, answer.headers)
        except StoreError as exc:
            if exc.status == 404 and exc.code != "NoSuchBucket":
                return None
            raise

    @contextmanager
    def get(self, key: str, headers: Mapping[str, str] | None = None) -> Iterator[Answer]:
        """Read an object; yields the answer, whose body comes in pieces. Raises as `call`."""
        with self._request("GET", key, {}, headers or {}) as answer:
            yield answer

    def delete(self, key: str, version: str | None = None) -> None:
        """Remove an object, or one version of it, if it is there. Raises as `call`."""
        with self._request("DELETE", key, {"versionId": version} if version else {}, {}):
            pass

    @contextmanager
    def _request(
        self,
        method: str,
        key: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        sha256: str = EMPTY_SHA256,
        body: Payload | None = None,
        tries: int = TRIES,
    ) -> Iterator[Answer]:
        """Send a signed request, and repeat it while the store is busy; yields an answer that is not an error."""

        def once() -> tuple[ExitStack, Answer]:
            path, fields = self._signed(method, key, query, headers, sha256)
            with ExitStack() as stack:
                answer = stack.enter_context(self._session.request(method, path, fields, body))
                if answer.status >= 300:
                    raise self._refused(answer, b"" if method == "HEAD" else answer.read(ERROR_BYTES))
                return stack.pop_all(), answer

        stack, answer = self._patiently(once, tries)
        with stack:
            yield answer

    def _signed(
        self, method: str, key: str, query: Mapping[str, str], headers: Mapping[str, str], sha256: str
    ) -> tuple[str, dict[str, str]]:
        return self._signer.signed(
            self._credentials(), method, self.origin.authority, self._aim.base + key, query, headers, sha256
        )

    def _refused(self, answer: Answer, body: bytes) -> StoreError:
        return StoreError.of_answer(answer.status, answer.headers, body, self._settings.hidden)

    def _credentials(self) -> Credentials:
        now = self._account.credentials.get_frozen_credentials()  # renewed before they expire
        return Credentials(now.access_key, now.secret_key, now.token)

    def _patiently(self, once: Callable[[], T], tries: int = TRIES) -> T:
        """Call a function; repeat it after a pause while the store is busy."""
        for tried in range(1, tries):
            try:
                return once()
            except StoreError as exc:
                if not exc.busy or (exc.retry_after or 0) > LONGEST_PAUSE_S:
                    raise
                self.pause(exc.retry_after, tried)
        return once()

    def pause(self, seconds: float | None, tried: int = 1) -> None:
        """Wait as long as the store asks for; None for a short time that grows with each try."""
        if seconds is None:
            seconds = random.uniform(0, PAUSE_S * 2 ** (tried - 1))  # noqa: S311 - spreads load, guards nothing
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, SLICE_S))
