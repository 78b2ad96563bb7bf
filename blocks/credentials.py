"""Fields that several types have to show who they are, and to know whom they trust. No input or output here."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, Field, SecretStr, model_validator

from blocks.fields import Group, about

PEM = "path or -----BEGIN CERTIFICATE-----"
KEY_PEM = "path or -----BEGIN PRIVATE KEY-----"


class ShowsCertificate(BaseModel):
    """What can show a certificate of ours: it has `tls_cert`, `tls_key` and `tls_key_password`."""

    @model_validator(mode="after")
    def _key_with_cert(self) -> Self:
        if self.tls_key.get_secret_value() and not self.tls_cert:  # type: ignore[attr-defined]
            raise ValueError("tls_key is set without tls_cert: set both, or none")
        return self


def authorities(peer: str, *, advanced: bool = False) -> Any:
    """Return the field `ca_cert`.

    Args:
        peer: whom they vouch for.
    """
    return Field(
        default="",
        description=f"Certificates that are trusted to vouch for {peer}: path of a PEM file or folder, or PEM text; "
        "empty for the system's trust store.",
        title="Trust these authorities",
        json_schema_extra=about(Group.SECURITY, advanced=advanced, placeholder=PEM, lines=True),
    )


def certificate(when: str, *, advanced: bool = False, more: str = "") -> Any:
    """Return the field `tls_cert`.

    Args:
        when: it is shown, as in ", if the node asks for one".
        more: what else it does, as in "; with it, only TLS is accepted".
    """
    return Field(
        default="",
        description=f"Our certificate with its chain{when}: path of a PEM file, or its text{more}.",
        title="Our certificate",
        json_schema_extra=about(Group.SECURITY, advanced=advanced, placeholder=PEM, at=1, lines=True),
    )


def private_key(*, advanced: bool = False) -> Any:
    """Return the field `tls_key`."""
    return Field(
        default=SecretStr(""),
        description="Private key of our certificate: path of a PEM file, or its text.",
        title="Our key",
        json_schema_extra=about(Group.SECURITY, advanced=advanced, placeholder=KEY_PEM, at=2, lines=True),
    )


def key_password(*, advanced: bool = False) -> Any:
    """Return the field `tls_key_password`."""
    return Field(
        default=SecretStr(""),
        description="Password of an encrypted private key.",
        title="Password of our key",
        json_schema_extra=about(Group.SECURITY, advanced=advanced, at=3),
    )


def checked_token(value: SecretStr) -> SecretStr:
    """Return a bearer token, or raise ValueError if it can't stand in the head of a request; never with the token."""
    token = value.get_secret_value().strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("is not valid as a token: paste it without line breaks and the word Bearer")
    return SecretStr(token)
