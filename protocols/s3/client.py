"""boto3 as we use it: credentials, region, URLs and rare operations; `store.py` does the sending.

A client doesn't retry, because only the caller knows what may be repeated, and doesn't take endpoints, proxies or trust
from the environment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import boto3
import boto3.s3.inject  # else the first client imports it, in the middle of a push
import botocore.session
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.config import Config
from botocore.exceptions import NoCredentialsError

from protocols.http.head import Fields
from protocols.http.origin import WebOrigin
from protocols.http.proxy import Proxy
from protocols.net.tls import Tls

DEFAULT_REGION = "us-east-1"
AWS = "https://s3.amazonaws.com"
AWS_DOMAINS = (".amazonaws.com", ".amazonaws.com.cn")
_OFF = (None, None, None, None)  # a variable that is read neither from the environment nor from a file


@dataclass(frozen=True)
class BucketSettings:
    """How to reach a bucket.

    Attributes:
        region: None to find out.
        endpoint_url: None for AWS.
        addressing: `auto`, `path` or `virtual`.
        access_key: with `secret_key` and perhaps `token`; None for `profile`, or for the default chain.
        proxy: as `protocols.http.proxy.Proxy.of` takes it.
        hidden: what no message may show.
    """

    bucket: str
    region: str | None = None
    endpoint_url: str | None = None
    addressing: str = "auto"
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    profile: str | None = None
    tls: Tls = field(default=Tls(), repr=False)
    connect_timeout_s: float = 10.0
    idle_timeout_s: float = 60.0
    proxy: str = field(default="", repr=False)
    hidden: frozenset[str] = field(default=frozenset(), repr=False)

    def origin(self, url: str) -> WebOrigin:
        """Return the server that a URL names, and how to reach it."""
        return WebOrigin.of(url, self.tls, self.connect_timeout_s, self.idle_timeout_s, self.proxy)

    @property
    def at_aws(self) -> bool:
        """Whether the bucket's region can be asked for."""
        host = urlsplit(self.endpoint_url).hostname if self.endpoint_url else None
        return host is None or host.endswith(AWS_DOMAINS)


@dataclass(frozen=True)
class Aim:
    """Where the requests of a client go, and how they are signed.

    Attributes:
        base: the path before an object's key, not encoded.
    """

    url: str
    base: str
    region: str
    service: str


class _Raw:
    """An answer's body as boto3 reads it."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def stream(self, *_: Any) -> Iterator[bytes]:
        yield self._data


class BucketAccount:
    """Credentials, and the clients that use them.

    Raises:
        botocore.exceptions.BotoCoreError: there are no credentials, or there is no such profile.
    """

    def __init__(self, settings: BucketSettings) -> None:
        self._settings = settings
        variables: dict[str, Any] = {"ca_bundle": _OFF}
        if settings.access_key:
            # What a profile in the worker's files says is for others.
            variables |= dict.fromkeys(("profile", "config_file", "credentials_file"), _OFF)
        self._core: Any = botocore.session.Session(session_vars=variables, profile=settings.profile)
        self._core.register_component("data_loader", _LOADER)
        # Services that give credentials are asked by boto3 itself, which would take any proxy of the environment.
        self._core.set_default_client_config(Config(proxies=_proxies(settings)))
        if settings.access_key:
            self._core.set_credentials(settings.access_key, settings.secret_key or "", settings.token)
        self.credentials: Any = self._core.get_credentials()
        if self.credentials is None:
            raise NoCredentialsError

    @property
    def region(self) -> str:
        """The region to begin with."""
        region = self._settings.region
        if region is None and self._settings.at_aws:
            region = self._core.get_config_variable("region")
        return str(region or DEFAULT_REGION)

    def client(self, region: str, carry: Callable[[AWSPreparedRequest], AWSResponse]) -> tuple[Any, Aim]:
        """Return a client whose requests are sent by `carry`, and where they go."""
        style = self._settings.addressing
        if style == "auto" and self._settings.endpoint_url and not self._settings.at_aws:
            style = "path"  # few stores have a host name for each bucket
        options: dict[str, Any] = {
            "signature_version": "s3v4",
            "s3": {"addressing_style": style},
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            # Ours are sent where they are wanted; boto3's own break older stores.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "ignore_configured_endpoint_urls": True,
        }
        client: Any = boto3.Session(botocore_session=self._core).client(
            "s3", region_name=region, endpoint_url=self._settings.endpoint_url, config=Config(**options)
        )
        aim = _aim(client, self._settings.bucket)

        def before_send(request: AWSPreparedRequest, **_: Any) -> AWSResponse:
            return carry(request)

        client.meta.events.register("before-send.s3", before_send)
        return client, aim


def _proxies(settings: BucketSettings) -> dict[str, str]:
    """Return the proxies of a target's setting, by scheme, with credentials."""
    found = {scheme: Proxy.of(settings.proxy, f"{scheme}://{urlsplit(AWS).hostname}") for scheme in ("http", "https")}
    return {scheme: proxy.full_url for scheme, proxy in found.items() if proxy}


def _aim(client: Any, bucket: str) -> Aim:
    """Let the client make a request without sending it, and return where it would go."""
    seen: list[AWSPreparedRequest] = []

    def keep(request: AWSPreparedRequest, **_: Any) -> AWSResponse:
        seen.append(request)
        return answer_of(request, 200, Fields(), b"")

    client.meta.events.register("before-send.s3", keep)
    client.head_object(Bucket=bucket, Key="k")
    client.meta.events.unregister("before-send.s3", keep)
    authorization = seen[0].headers["Authorization"]
    text = authorization.decode() if isinstance(authorization, bytes) else authorization
    # AWS4-HMAC-SHA256 Credential=<access key>/<day>/<region>/<service>/aws4_request, ...
    region, service = text.split(",")[0].split("/")[-3:-1]
    url = str(seen[0].url)
    return Aim(url, unquote(urlsplit(url).path.removesuffix("k")), region, service)


def answer_of(request: AWSPreparedRequest, status: int, headers: Fields, body: bytes) -> AWSResponse:
    """Return an answer in the form that boto3 expects."""
    fields: Any = dict(reversed(headers.items()))  # the first of several counts
    return AWSResponse(str(request.url), status, fields, _Raw(body))


def _loaded() -> Any:
    """Load boto3's data about S3 and regions, 0.1 s, together with this module, so that no push waits for it."""
    loader = botocore.session.Session().get_component("data_loader")  # keeps what it has read
    for name in ("service-2", "endpoint-rule-set-1"):
        loader.load_service_model("s3", name)
    loader.load_data_with_path("endpoints")  # as a client loads it, which keeps it by the call
    for name in ("partitions", "sdk-default-configuration"):
        loader.load_data(name)
    return loader


_LOADER = _loaded()
