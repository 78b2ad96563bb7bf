"""A DICOMweb server, or a local folder that answers like one."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

from pydantic import Field, HttpUrl, SecretStr, field_validator, model_validator

from blocks.base import CONTROL, ICONS
from blocks.credentials import (
    ShowsCertificate,
    authorities,
    certificate,
    checked_token,
    key_password,
    private_key,
)
from blocks.fields import BYTES, Group, about
from blocks.proxied import Proxied
from blocks.urls import check_url

CREDENTIALS = "http_user and http_password"


class DicomWebTarget(Proxied, ShowsCertificate):
    """A DICOMweb server: STOW-RS to send, QIDO-RS to query, WADO-RS to retrieve. Or a local folder of DICOM files.

    Requests are authorized by user and password, by a fixed token, or by a token from OAuth2 client credentials.
    With a `file://` URL the folder is searched by an index that is kept up to date.
    """

    _block_type_name = "DICOMweb Target"
    _block_type_slug = "dicomweb-target"
    _documentation_url = HttpUrl("https://dicom.nema.org/medical/dicom/current/output/html/part18.html")
    _logo_url = HttpUrl(f"{ICONS}/dicomweb.svg")
    _code_example = """```python
from blocks.dicomweb import DicomWebTarget

archive = DicomWebTarget.load("BLOCK_NAME")
```"""

    type_name: ClassVar[str] = "dicomweb"
    can_query: ClassVar[bool] = True
    where: ClassVar[tuple[str, ...]] = ("url", "stow_url_prefix")
    host_in: ClassVar[str] = "url"
    aims: ClassVar[tuple[str, ...]] = ("url", "token_url", "proxy", "ca_cert")

    url: str = Field(
        description="Base URL of the services, as in https://pacs.example.org/dicom-web; or a local folder, as in "
        "file:///data/dicom.",
        title="Address",
        json_schema_extra=about(Group.CONNECTION, placeholder="https://pacs.example.org/dicom-web"),
    )
    qido_url_prefix: str = Field(
        default="",
        description="Path below url where searches are answered; empty for url.",
        title="Path for searching",
        json_schema_extra=about(Group.PATHS, placeholder="rs", at=1),
    )
    wado_url_prefix: str = Field(
        default="",
        description="Path below url where instances are retrieved; empty for url.",
        title="Path for fetching",
        json_schema_extra=about(Group.PATHS, placeholder="rs", at=2),
    )
    stow_url_prefix: str = Field(
        default="",
        description="Path below url where instances are stored; empty for url.",
        title="Path for sending",
        json_schema_extra=about(Group.PATHS, placeholder="rs"),
    )
    http_user: str = Field(
        default="",
        description="User name for basic authentication.",
        title="User",
        json_schema_extra=about(Group.SIGN_IN),
    )
    http_password: SecretStr = Field(
        default=SecretStr(""),
        description="Password of http_user.",
        title="Password",
        json_schema_extra=about(Group.SIGN_IN),
    )
    access_token: SecretStr = Field(
        default=SecretStr(""),
        description="Token that is sent as it is, as a bearer token.",
        title="Token",
        json_schema_extra=about(Group.SIGN_IN),
    )
    token_url: str = Field(
        default="",
        description="OAuth2 token endpoint that gives tokens for client credentials.",
        title="Token address",
        json_schema_extra=about(Group.SIGN_IN, placeholder="https://login.example.org/oauth2/token"),
    )
    client_id: str = Field(
        default="", description="OAuth2 client, for token_url.", title="Client", json_schema_extra=about(Group.SIGN_IN)
    )
    client_secret: SecretStr = Field(
        default=SecretStr(""),
        description="Secret of the OAuth2 client.",
        title="Client secret",
        json_schema_extra=about(Group.SIGN_IN),
    )
    scope: str = Field(
        default="",
        description="Scopes to request at token_url, separated by blanks.",
        title="Scopes",
        json_schema_extra=about(Group.SIGN_IN, placeholder="separated by blanks"),
    )
    ca_cert: str = authorities("the server", advanced=True)
    tls_cert: str = certificate(", if the server asks for one", advanced=True)
    tls_key: SecretStr = private_key(advanced=True)
    tls_key_password: SecretStr = key_password(advanced=True)
    batch_bytes: int = Field(
        default=20_000_000,
        ge=1,
        description="Most bytes of one request; a larger instance is sent alone.",
        title="Most per request",
        json_schema_extra=about(Group.SENT, advanced=True, unit=BYTES),
    )
    batch_items: int = Field(
        default=100,
        ge=1,
        le=10_000,
        description="Most instances in one request.",
        title="Most images per request",
        json_schema_extra=about(Group.SENT, advanced=True),
    )

    @property
    def folder(self) -> Path | None:
        """The folder that a `file://` URL names; None for a server."""
        parts = urlsplit(self.url)
        # Bytes that are no UTF-8 stay what they are.
        return Path(unquote(parts.path, errors="surrogateescape")) if parts.scheme == "file" else None

    @property
    def own_folder(self) -> str:
        return str(self.folder or "")

    @property
    def node(self) -> str:
        """The server's host; "" for a folder, whatever host its URL names."""
        return "" if self.folder is not None else super().node

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        value = value.strip()
        if value.lower().startswith("file:"):
            return check_folder(value)
        return check_url(value, credentials=CREDENTIALS, schemes="http://, https:// or file:///")

    @field_validator("token_url")
    @classmethod
    def _token_url(cls, value: str) -> str:
        return check_url(value, credentials="client_id and client_secret", query=True) if value.strip() else ""

    @field_validator("qido_url_prefix", "wado_url_prefix", "stow_url_prefix")
    @classmethod
    def _prefix(cls, value: str) -> str:
        value = value.strip().strip("/")
        if "://" in value or any(sign in value for sign in "?#\\ ") or CONTROL.search(value) or not value.isascii():
            raise ValueError("must be a path below url, as in rs or api/dicom-web")
        if any(part in ("", ".", "..") for part in value.split("/")) and value:
            raise ValueError("must be a path without empty parts, '.' or '..'")
        return value

    @field_validator("http_user", "client_id", "scope")
    @classmethod
    def _one_line(cls, value: str) -> str:
        if CONTROL.search(value):
            raise ValueError("must not hold control characters")
        return value

    @field_validator("access_token")
    @classmethod
    def _token(cls, value: SecretStr) -> SecretStr:
        return checked_token(value)

    @model_validator(mode="after")
    def _one_authorization(self) -> DicomWebTarget:
        used = [
            name
            for name, value in (
                ("http_user", self.http_user),
                ("access_token", self.access_token.get_secret_value()),
                ("token_url", self.token_url),
            )
            if value
        ]
        if len(used) > 1:
            raise ValueError(f"{' and '.join(used)} are set: use one way to authorize")
        if self.http_password.get_secret_value() and not self.http_user:
            raise ValueError("http_password is set without http_user: set both, or none")
        if ":" in self.http_user:
            raise ValueError("http_user must not hold a colon")
        client = bool(self.client_id), bool(self.client_secret.get_secret_value())
        if self.token_url and not all(client):
            raise ValueError("token_url needs client_id and client_secret")
        if any(client) and not self.token_url:
            raise ValueError("client_id and client_secret need token_url")
        if used and self.folder is not None:
            raise ValueError(f"{used[0]} has no meaning for a folder: remove it")
        return self


def check_folder(value: str) -> str:
    """Return a file URL, or raise ValueError that says what to change."""
    if CONTROL.search(value):  # urlsplit drops some of them
        raise ValueError("must not hold control characters")
    value = "file:" + value[len("file:") :]  # in lower case
    parts = urlsplit(value)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or not value.startswith("file://"):
        raise ValueError("a folder needs an absolute path and three slashes, as in file:///data/dicom")
    if parts.query or parts.fragment:
        raise ValueError("encode ? as %3F and # as %23 in the path of a folder")
    if CONTROL.search(unquote(parts.path)):
        raise ValueError("must not hold control characters")
    return value
