"""An S3 bucket: at AWS, or at any store that speaks S3 (MinIO, Ceph, and many more)."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any, ClassVar

from pydantic import Field, HttpUrl, SecretStr, ValidationInfo, field_validator, model_validator

from blocks.base import CONTROL, ICONS, LAYOUT, check_argument, check_layout
from blocks.fields import BYTES, Group, about
from blocks.proxied import Proxied
from blocks.urls import check_url

MIB = 1 << 20
MIN_PART = 5 * MIB  # S3 refuses smaller parts, but for the last one
MAX_PART = 5 << 30  # S3's limit
BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")  # what stores other than AWS take, too
ACCESS_POINT = re.compile(r"arn:[a-z-]+:s3[a-z-]*:[a-z0-9-]+:\d+:accesspoint[:/][A-Za-z0-9-]+")


class Checksum(StrEnum):
    """The checksum that is sent with every object, for the store to compare."""

    AUTO = "auto"
    CRC64NVME = "crc64nvme"
    CRC32 = "crc32"
    SHA256 = "sha256"
    OFF = "off"


class Addressing(StrEnum):
    """Where in a URL the bucket's name stands."""

    AUTO = "auto"
    PATH = "path"
    VIRTUAL = "virtual"


class Encryption(StrEnum):
    """How the store encrypts what it keeps; the values are those of S3's own header field."""

    AES256 = "AES256"
    KMS = "aws:kms"
    KMS_DSSE = "aws:kms:dsse"


class S3Target(Proxied):
    """A bucket at AWS or at any other store that speaks S3.

    Each dispatch gets a prefix of its own; a manifest with names, sizes and checksums comes after the files, and an
    empty object `.complete` last.
    """

    _block_type_name = "S3 Target"
    _block_type_slug = "s3-target"
    _documentation_url = HttpUrl("https://docs.aws.amazon.com/AmazonS3/latest/API/Welcome.html")
    _logo_url = HttpUrl(f"{ICONS}/s3.svg")
    _code_example = """```python
from blocks.s3 import S3Target

cloud = S3Target.load("BLOCK_NAME")
```"""

    type_name: ClassVar[str] = "s3"
    where: ClassVar[tuple[str, ...]] = ("endpoint_url", "bucket", "prefix", "layout")
    host_in: ClassVar[str] = "endpoint_url"
    aims: ClassVar[tuple[str, ...]] = ("endpoint_url", "region", "proxy", "ca_cert")

    bucket: str = Field(
        description="Name of the bucket, which must exist, or the ARN of an access point.",
        title="Bucket",
        json_schema_extra=about(Group.CONNECTION, placeholder="scans or an access point's ARN", at=1),
    )
    prefix: str = Field(
        default="",
        description="Beginning of the keys of all objects, without slashes around it.",
        title="Prefix",
        json_schema_extra=about(Group.CONNECTION, placeholder="trial-7/incoming", at=2),
    )
    layout: str = LAYOUT
    region: str | None = Field(
        default=None,
        description="Region of the bucket; none to ask AWS, or for us-east-1 at other stores.",
        title="Region",
        json_schema_extra=about(Group.CONNECTION, placeholder="asked from AWS; us-east-1 elsewhere", at=3),
    )
    endpoint_url: str | None = Field(
        default=None,
        description="URL of a store that is not AWS, as in https://minio.example.org:9000.",
        title="Store address",
        json_schema_extra=about(Group.CONNECTION, placeholder="https://minio.example.org:9000"),
    )
    addressing_style: Addressing = Field(
        default=Addressing.AUTO,
        description="Where the bucket's name goes in URLs: path, virtual (in the host name), or auto: virtual at AWS, "
        "path elsewhere.",
        title="Bucket in address",
        json_schema_extra=about(Group.STORED, advanced=True, at=5),
    )
    access_key_id: str | None = Field(
        default=None,
        description="Access key; none for the profile or what the worker's environment provides.",
        title="Access key",
        json_schema_extra=about(Group.SIGN_IN),
    )
    secret_access_key: SecretStr | None = Field(
        default=None,
        description="Secret of the access key.",
        title="Secret of the access key",
        json_schema_extra=about(Group.SIGN_IN),
    )
    session_token: SecretStr | None = Field(
        default=None,
        description="Token of temporary credentials.",
        title="Session token",
        json_schema_extra=about(Group.SIGN_IN, advanced=True),
    )
    profile: str | None = Field(
        default=None,
        description="Profile of the worker's AWS configuration files that holds the credentials.",
        title="Profile",
        json_schema_extra=about(Group.SIGN_IN),
    )
    ca_cert: str | None = Field(
        default=None,
        description="Path or PEM text of the authorities that may vouch for the store; none for the system's.",
        title="Trust these authorities",
        json_schema_extra=about(
            Group.SECURITY, advanced=True, placeholder="path or -----BEGIN CERTIFICATE-----", lines=True
        ),
    )
    sse: Encryption | None = Field(
        default=None,
        description="Encryption at the store: AES256, aws:kms or aws:kms:dsse; none for the bucket's own.",
        title="Encryption",
        json_schema_extra=about(Group.STORED, advanced=True),
    )
    kms_key_id: str | None = Field(
        default=None,
        description="Key for aws:kms; none for the account's default key.",
        title="Encryption key",
        json_schema_extra=about(Group.STORED, advanced=True),
    )
    storage_class: str | None = Field(
        default=None,
        description="Storage class of the objects, as in STANDARD_IA; none for the bucket's own.",
        title="Storage class",
        json_schema_extra=about(Group.STORED, advanced=True, placeholder="STANDARD_IA"),
    )
    checksum: Checksum = Field(
        default=Checksum.AUTO,
        description="Checksum that the store compares: auto finds out what it supports, crc64nvme, crc32, sha256, or "
        "off.",
        title="Checksum",
        json_schema_extra=about(Group.SENT, advanced=True),
    )
    multipart_bytes: int = Field(
        default=8 * MIB,
        ge=MIN_PART,
        le=MAX_PART,
        description="Size in bytes of the parts in which larger files are sent; each connection holds one in memory.",
        title="Part size",
        json_schema_extra=about(Group.SENT, advanced=True, unit=BYTES),
    )
    concurrency: int = Field(
        default=8,
        ge=1,
        le=64,
        description="Connections used at once inside one dispatch.",
        title="Connections per dispatch",
        json_schema_extra=about(Group.LIMITS, advanced=True),
    )

    @field_validator(
        "region", "endpoint_url", "access_key_id", "secret_access_key", "session_token", "profile", "ca_cert", "sse",
        "kms_key_id", "storage_class", mode="before",
    )  # fmt: skip
    @classmethod
    def _none(cls, value: Any) -> Any:
        """Take empty text, which a form sends for an empty field, as no value."""
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        return None if isinstance(text, str) and not text.strip() else value

    @field_validator("bucket")
    @classmethod
    def _bucket(cls, value: str) -> str:
        value = value.strip()
        if value.endswith("--x-s3"):
            raise ValueError(f"{value!r} is a directory bucket (S3 Express), which can't be used: name another bucket")
        if not BUCKET.fullmatch(value) and not ACCESS_POINT.fullmatch(value):
            raise ValueError(f"{value!r} is not the name of a bucket: letters, digits, dots and dashes, 3 to 255")
        return value

    @field_validator("prefix")
    @classmethod
    def _prefix(cls, value: str) -> str:
        value = value.strip().strip("/")
        if CONTROL.search(value):
            raise ValueError("prefix must not hold control characters")
        if value and any(part in ("", ".", "..") for part in value.split("/")):
            raise ValueError(f"prefix {value!r}: must not hold empty parts, '.' or '..'")
        return value

    @field_validator("layout")
    @classmethod
    def _layout(cls, value: str) -> str:
        return check_layout(value)

    @field_validator("endpoint_url")
    @classmethod
    def _endpoint_url(cls, value: str | None) -> str | None:
        return None if value is None else check_url(value, credentials="access_key_id and secret_access_key")

    @field_validator("region", "access_key_id", "profile", "kms_key_id", "storage_class")
    @classmethod
    def _one_word(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        value = check_argument(value.strip())
        if info.field_name != "profile" and " " in value:
            raise ValueError(f"{value!r} must not hold blanks")
        return value

    @model_validator(mode="after")
    def _together(self) -> S3Target:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError("access_key_id and secret_access_key belong together: set both, or none")
        if self.session_token is not None and self.access_key_id is None:
            raise ValueError("session_token belongs to access_key_id and secret_access_key: set these too")
        if self.access_key_id is not None and self.profile is not None:
            raise ValueError("credentials come from access_key_id or from profile: set one of them")
        if self.kms_key_id is not None and self.sse not in (Encryption.KMS, Encryption.KMS_DSSE):
            raise ValueError("kms_key_id belongs to sse aws:kms or aws:kms:dsse: set sse too")
        return self
