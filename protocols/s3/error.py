"""What an S3 store says about a request that it refuses ("List of error codes", Amazon S3 API reference)."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from botocore.exceptions import ClientError

from protocols.http.head import BUSY_STATUS, Fields, retry_after
from protocols.net.words import clean

# 509: some stores answer so above their bandwidth.
S3_BUSY_STATUS = BUSY_STATUS | {509}
# Codes that mean "later", whatever their status is; the X ones are MinIO's.
BUSY_CODES = frozenset((
    "SlowDown", "SlowDownRead", "SlowDownWrite", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling",
    "ThrottlingException", "RequestLimitExceeded", "RequestThrottled", "BandwidthLimitExceeded", "TooManyRequests",
    "OperationAborted", "QuotaExceeded", "XMinioServerNotInitialized", "XMinioStorageFull",
    "XMinioAdminBucketQuotaExceeded",
))  # fmt: skip
# The bytes that came are not those whose checksum was announced.
MISMATCH_CODES = frozenset(("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody"))
# What a status means where the answer has no body, as that to HEAD.
_BY_STATUS = {
    301: "PermanentRedirect", 400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound",
    405: "MethodNotAllowed", 411: "MissingContentLength", 412: "PreconditionFailed", 501: "NotImplemented",
    503: "ServiceUnavailable",
}  # fmt: skip
_ELEMENT = re.compile(r"<(Code|Message)>([^<]*)</\1>")


class StoreError(Exception):
    """A store's refusal, in its own words.

    Attributes:
        status: of HTTP.
        code: S3's, e.g. `NoSuchBucket`.
        words: what it says, one line.
        retry_after: seconds that it asks to wait, None if it names none.
        region: where the bucket is, if it says so.
    """

    def __init__(
        self, status: int, code: str, words: str = "", retry_after: float | None = None, region: str | None = None
    ) -> None:
        code = code or _BY_STATUS.get(status, "no code")
        super().__init__(f"{code} ({status}): {words}" if words else f"{code} ({status})")
        self.status, self.code, self.words, self.retry_after, self.region = status, code, words, retry_after, region

    @property
    def busy(self) -> bool:
        """Whether the same request may succeed later."""
        return (self.status in S3_BUSY_STATUS and self.code != "NotImplemented") or self.code in BUSY_CODES

    @property
    def mismatch(self) -> bool:
        """Whether the store received something else than was announced."""
        return self.code in MISMATCH_CODES

    @classmethod
    def of_answer(cls, status: int, headers: Fields, body: bytes, hidden: Iterable[str]) -> StoreError:
        """Return the error in an answer."""
        text = body.decode("utf-8", "replace")
        found = {name: html.unescape(value).strip() for name, value in _ELEMENT.findall(text)}
        return cls(
            status,
            clean(found.get("Code", ""), hidden),
            clean(found.get("Message", ""), hidden),
            retry_after(headers.get("Retry-After")),
            headers.get("x-amz-bucket-region"),
        )

    @classmethod
    def of_boto(cls, exc: ClientError, hidden: Iterable[str]) -> StoreError:
        """Return the error in what boto3 raises."""
        facts = exc.response.get("ResponseMetadata", {})
        headers = facts.get("HTTPHeaders", {})
        error = exc.response.get("Error", {})
        code = str(error.get("Code", ""))
        return cls(
            int(facts.get("HTTPStatusCode", 0)),
            "" if code.isdecimal() else clean(code, hidden),  # boto3 makes one of the status if there is none
            "" if code.isdecimal() else clean(str(error.get("Message", "")), hidden),
            retry_after(headers.get("retry-after")),
            headers.get("x-amz-bucket-region"),
        )
