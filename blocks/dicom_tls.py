"""A DICOM node behind TLS."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from pydantic import Field, HttpUrl, SecretStr

from blocks.base import ICONS
from blocks.credentials import ShowsCertificate, authorities, certificate, key_password, private_key
from blocks.dicom import DicomTarget
from blocks.fields import Group, about


class TlsProfile(StrEnum):
    """Secure connection profiles of PS3.15 Annex B, and one for nodes that know none of them."""

    BCP195 = "bcp195"
    NONDOWNGRADING = "bcp195-nondowngrading"
    LEGACY = "legacy"


class DicomTlsTarget(DicomTarget, ShowsCertificate):
    """A PACS, a modality or any other DICOM node that is reached over TLS, by the BCP 195 profiles of PS3.15.

    The node's certificate is verified against `ca_cert`, or the system's trust store; a certificate of our own is
    shown if one is set. Everything else is as for a DICOM target, queries
    and pulls too.
    """

    _block_type_name = "DICOM TLS Target"
    _block_type_slug = "dicom-tls-target"
    _documentation_url = HttpUrl("https://dicom.nema.org/medical/dicom/current/output/html/part15.html#chapter_B")
    _logo_url = HttpUrl(f"{ICONS}/dicom-tls.svg")
    _code_example = """```python
from blocks.dicom_tls import DicomTlsTarget

pacs = DicomTlsTarget.load("BLOCK_NAME")
```"""

    type_name: ClassVar[str] = "dicom-tls"

    port: int = Field(
        default=2762,
        ge=1,
        le=65_535,
        description="TCP port of the node.",
        title="Port",
        json_schema_extra=about(Group.CONNECTION, placeholder="2762"),
    )
    tls_key: SecretStr = private_key()
    tls_cert: str = certificate(", if the node asks for one")
    tls_key_password: SecretStr = key_password()
    ca_cert: str = authorities("the node")
    tls_profile: TlsProfile = Field(
        default=TlsProfile.BCP195,
        description="Secure connection profile: bcp195, bcp195-nondowngrading for the strictest suites only, or legacy "
        "for old nodes: TLS 1.0 and later, RSA key exchange and CBC suites too.",
        title="Profile",
        json_schema_extra=about(Group.SECURITY, advanced=True),
    )
    verify_hostname: bool = Field(
        default=True,
        description="Whether the node's certificate must be for the host that the connection goes to.",
        title="Check the name in the certificate",
        json_schema_extra=about(Group.SECURITY, advanced=True),
    )
