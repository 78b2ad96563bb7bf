"""AWS Signature Version 4 for S3 requests.

Our own, because botocore's signer needs 0.15 ms a request, more than sending a small object takes (figures in
docs/performance.md); tests compare both. Source: "Signature Calculations for the Authorization Header", Amazon S3
API reference.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import quote

UNSIGNED = "UNSIGNED-PAYLOAD"  # in place of the body's SHA-256
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
UNRESERVED = "-._~"  # what is not percent-encoded beside letters and digits, RFC 3986 section 2.3


@dataclass(frozen=True, slots=True)
class Credentials:
    """The keys to sign with; `token` belongs to temporary credentials."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(default=None, repr=False)


@lru_cache(maxsize=4)
def _stamp(seconds: int) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(seconds))


class Signer:
    """Signs requests to one region of one service; safe to use from several threads."""

    def __init__(self, region: str, service: str = "s3") -> None:
        self.region, self.service = region, service
        self._key: tuple[tuple[str, str], bytes] = (("", ""), b"")

    def signed(
        self,
        credentials: Credentials,
        method: str,
        host: str,
        path: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        sha256: str,
        now: float | None = None,
    ) -> tuple[str, dict[str, str]]:
        """Return the path with its query, encoded, and all header fields, signed.

        Args:
            path: not encoded, from its leading slash on.
            headers: with lower-case names and single blanks at most; every one is signed.
            sha256: of the body, hexadecimal, or UNSIGNED.
            now: seconds since the epoch, if not the present.
        """
        stamp = _stamp(int(time.time() if now is None else now))
        fields = {**headers, "host": host, "x-amz-content-sha256": sha256, "x-amz-date": stamp}
        if credentials.token:
            fields["x-amz-security-token"] = credentials.token
        names = sorted(fields)
        encoded = quote(path, safe="/" + UNRESERVED)
        arguments = ""
        if query:
            arguments = "&".join(
                f"{quote(k, safe=UNRESERVED)}={quote(query[k], safe=UNRESERVED)}" for k in sorted(query)
            )
        listed = ";".join(names)
        lines = [f"{name}:{fields[name].strip()}" for name in names]
        canonical = "\n".join((method, encoded, arguments, *lines, "", listed, sha256))
        scope = f"{stamp[:8]}/{self.region}/{self.service}/aws4_request"
        text = "\n".join(("AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()))
        signature = hmac.digest(self._key_of(credentials.secret_key, stamp[:8]), text.encode(), "sha256").hex()
        del fields["host"]  # the connection adds it
        fields["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, "
            f"SignedHeaders={listed}, Signature={signature}"
        )
        return encoded + (f"?{arguments}" if arguments else ""), fields

    def _key_of(self, secret: str, day: str) -> bytes:
        """Return the signing key of one day."""
        known, key = self._key
        if known != (secret, day):
            key = b"AWS4" + secret.encode()
            for part in (day, self.region, self.service, "aws4_request"):
                key = hmac.digest(key, part.encode(), "sha256")
            self._key = ((secret, day), key)
        return key
