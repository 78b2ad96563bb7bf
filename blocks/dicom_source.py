"""A DICOM listener: an AE title and a port that modalities send to, and where what they send goes."""

from __future__ import annotations

import ipaddress
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self
from unicodedata import normalize

from pydantic import BaseModel, ConfigDict, Field, HttpUrl, SecretStr, field_validator, model_validator

from blocks.base import ICONS, check_host
from blocks.credentials import ShowsCertificate, authorities, certificate, key_password, private_key
from blocks.dicom_tls import TlsProfile
from blocks.fields import BYTES, SECONDS, Group, about
from blocks.source import After, Leaving, Source, checked_names
from transfer.validation import AET_CHARS, check_aet, numbers_only

MOST_ASSOCIATIONS = 64  # at once, unless the source says otherwise
MAPPED_BITS = 96  # before an address of IPv4 in one of IPv6 (RFC 4291, section 2.5.5.2)
MOST_OPEN_S = 43_200  # half a day: the longest examination, and a slow line, are shorter


class DicomUnit(StrEnum):
    """What is dispatched as a whole."""

    STUDY = "study"
    SERIES = "series"


class AllowedPeer(BaseModel):
    """Who may send; what is left empty may be anything."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    aet: str = Field(default="", title="AE title", description="Pattern of its AE title, as in CT*.")
    host: str = Field(
        default="", title="Host", description="Its address, a network as in 10.1.0.0/16, or its name; empty for any."
    )
    port: int = Field(
        default=0,
        ge=0,
        le=65_535,
        title="Port for reports",
        description="Port on which it listens for reports of storage commitment; 0 if they are to come on the "
        "association that asked.",
    )

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, values: Any) -> Any:
        return numbers_only(values, cls.model_fields)

    @field_validator("aet")
    @classmethod
    def _aet(cls, value: str) -> str:
        return _pattern(value)

    @field_validator("host")
    @classmethod
    def _host(cls, value: str) -> str:
        value = value.strip()
        if "/" in value:
            try:
                return _as_seen(ipaddress.ip_network(value, strict=False))
            except ValueError as exc:
                raise ValueError(f"{value!r} is not a network: write it as in 10.1.0.0/16") from exc
        host = check_host(value) if value else ""
        mapped = ipaddress.IPv6Address(host).ipv4_mapped if ":" in host else None
        return str(mapped or host)


class Route(BaseModel):
    """Where studies go: those that all its patterns fit, to all its targets. An empty pattern fits everything."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    called: str = Field(default="", title="Called AE title", description="Pattern of the AE title that was called.")
    calling: str = Field(default="", title="Calling AE title", description="Pattern of the sender's AE title.")
    modality: str = Field(
        default="", title="Modality", description="Patterns of a series' modality, separated by commas, as in CT,MR."
    )
    study_description: str = Field(
        default="", title="Study description", description="Pattern of it, as in *thorax*, whatever its case."
    )
    series_description: str = Field(
        default="", title="Series description", description="Pattern of it, as in *lung*, whatever its case."
    )
    targets: list[str] = Field(
        title="Targets", description="Names of the targets.", json_schema_extra=about(Group.USE, names="target")
    )

    @field_validator("targets")
    @classmethod
    def _targets(cls, value: list[str]) -> list[str]:
        names = checked_names(value)
        if not names:
            raise ValueError("a route to nobody: name one target at least")
        return names

    @field_validator("called", "calling")
    @classmethod
    def _titles(cls, value: str) -> str:
        return _pattern(value)

    @property
    def reads(self) -> bool:
        """Whether it takes a look into instances to decide."""
        return bool(self.modality or self.study_description or self.series_description)

    def fits_titles(self, calling: str, called: str) -> bool:
        """Return True if it may take what this sender has sent to this AE title."""
        titles = ((calling, self.calling), (called, self.called))
        return all(not pattern or fnmatchcase(title, pattern) for title, pattern in titles)

    def fits(self, modality: str, study_description: str, series_description: str) -> bool:
        """Return True if it takes a series that says this of itself."""
        modalities = [one.strip() for one in self.modality.split(",") if one.strip()]
        if modalities and not any(fnmatchcase(modality.upper(), one.upper()) for one in modalities):
            return False
        described = ((study_description, self.study_description), (series_description, self.series_description))
        return all(not pattern or fnmatchcase(_alike(text), _alike(pattern)) for text, pattern in described)


class DicomSource(Source, ShowsCertificate):
    """A DICOM listener: modalities send to it by C-STORE, and may ask it for storage commitment.

    Instances are kept as sent, in any transfer syntax and of any SOP class, and are on disk before they are confirmed.
    A study is dispatched when nothing has come for it for some time, with the sender's AE titles and address; what
    every target has confirmed is removed. Several sources may share a port, each with an AE title of its own.
    """

    _block_type_name = "DICOM Source"
    _block_type_slug = "dicom-source"
    _documentation_url = HttpUrl("https://dicom.nema.org/medical/dicom/current/output/html/part04.html#chapter_B")
    _logo_url = HttpUrl(f"{ICONS}/dicom.svg")
    _code_example = """```python
from blocks.dicom_source import DicomSource

router = DicomSource.load("BLOCK_NAME")
```"""

    type_name: ClassVar[str] = "dicom"
    watched: ClassVar[bool] = True

    port: int = Field(
        default=11_112,
        ge=1,
        le=65_535,
        description="TCP port that is listened on.",
        title="Port",
        json_schema_extra=about(Group.CONNECTION, placeholder="11112"),
    )
    host: str = Field(
        default="",
        description="Address to listen on; empty for all addresses of this machine.",
        title="Listen on address",
        json_schema_extra=about(Group.CONNECTION, advanced=True, placeholder="all"),
    )
    aet: str = Field(
        default="TALARIA",
        description="AE title by which senders call it.",
        title="Our AE title",
        json_schema_extra=about(Group.CONNECTION, placeholder="TALARIA"),
    )
    peers: list[AllowedPeer] = Field(
        default=[],
        description="Who may send, by AE title and address; empty for everybody who knows our AE title.",
        title="Who may send",
        json_schema_extra=about(Group.TRUST),
    )
    routes: list[Route] = Field(
        default=[],
        description="Where studies go besides the targets: each route takes what its patterns fit. A study goes as a "
        "whole, also where only one of its series fits.",
        title="Routes",
        json_schema_extra=about(Group.USE, at=2),
    )
    unit: DicomUnit = Field(
        default=DicomUnit.STUDY,
        description="What is dispatched as a whole: what one sender has sent of a study, or of a series.",
        title="What is one study",
        json_schema_extra=about(Group.READY),
    )
    settle_s: float = Field(
        default=60,
        ge=0,
        le=604_800,
        description="Seconds without a new instance after which a study is complete.",
        title="Complete after",
        json_schema_extra=about(Group.READY, unit=SECONDS),
    )
    max_open_s: float = Field(
        default=MOST_OPEN_S,
        ge=60,
        le=2_592_000,
        description="Seconds after its first instance when a study is dispatched though more still comes for it, which "
        "is dispatched later; not before settle_s.",
        title="Wait no longer than",
        json_schema_extra=about(Group.READY, advanced=True, unit=SECONDS),
    )
    max_associations: int = Field(
        default=MOST_ASSOCIATIONS,
        ge=1,
        le=1000,
        description="Associations at once; more are asked to come again later.",
        title="Associations at once",
        json_schema_extra=about(Group.LIMITS, advanced=True),
    )
    idle_timeout_s: float = Field(
        default=60,
        gt=0,
        le=86_400,
        description="Seconds of silence after which an association is ended.",
        title="Give up on silence after",
        json_schema_extra=about(Group.LIMITS, advanced=True, unit=SECONDS),
    )
    keep_free: int = Field(
        default=1 << 30,
        ge=0,
        description="Bytes that must stay free on the disk: with less, nothing is accepted.",
        title="Keep free",
        json_schema_extra=about(Group.LIMITS, advanced=True, unit=BYTES),
    )
    tls_cert: str = certificate("", more="; with it, only TLS is accepted")
    tls_key: SecretStr = private_key()
    tls_key_password: SecretStr = key_password()
    ca_cert: str = authorities("senders")
    tls_profile: TlsProfile = Field(
        default=TlsProfile.BCP195,
        description="Secure connection profile: bcp195, bcp195-nondowngrading for the strictest suites only, or legacy "
        "for old senders: TLS 1.0 and later, RSA key exchange and CBC suites too.",
        title="Profile",
        json_schema_extra=about(Group.SECURITY, advanced=True),
    )

    @property
    def reaches(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.targets, *(name for route in self.routes for name in route.targets))))

    @property
    def leaving(self) -> Leaving:
        return Leaving(After.DELETE)

    @property
    def longest_s(self) -> float:
        """Seconds after its first instance when a study goes, whether it is complete or not."""
        return max(self.max_open_s, self.settle_s)

    @property
    def place(self) -> tuple[str, int]:
        """Address and port that are listened on; sources that share them have one listener."""
        return self.host, self.port

    @property
    def security(self) -> tuple[str, ...]:
        """The settings of TLS, which sources on one port must have in common; () for plain connections."""
        if not self.tls_cert:
            return ()
        key, password = self.tls_key.get_secret_value(), self.tls_key_password.get_secret_value()
        return self.tls_cert, key, password, self.ca_cert, str(self.tls_profile)

    @field_validator("host")
    @classmethod
    def _listen_on(cls, value: str) -> str:
        return check_host(value) if value.strip() else ""

    @field_validator("aet")
    @classmethod
    def _aet(cls, value: str) -> str:
        return check_aet(value)

    @model_validator(mode="after")
    def _to_somebody(self) -> Self:
        if not self.reaches:
            raise ValueError("targets or routes: must name one target at least")
        return self

    @model_validator(mode="after")
    def _authorities_with_cert(self) -> Self:
        if self.ca_cert and not self.tls_cert:
            raise ValueError("ca_cert is set without tls_cert: only TLS has certificates to check")
        return self


def _as_seen(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> str:
    """Return a network as senders are seen in it: those of IPv4 as such, also where it is written as one of IPv6."""
    first = network.network_address
    mapped = first.ipv4_mapped if isinstance(first, ipaddress.IPv6Address) else None
    if mapped is None or network.prefixlen < MAPPED_BITS:
        return str(network)
    return f"{mapped}/{network.prefixlen - MAPPED_BITS}"


def _alike(text: str) -> str:
    """Return what texts have in common that differ in their case, and in how letters with marks are composed."""
    return normalize("NFC", normalize("NFC", text).casefold())


def _pattern(value: str) -> str:
    """Return a pattern of AE titles, or raise ValueError if it can fit none."""
    value = value.strip(" ")
    if not value:
        return ""
    if "\\" in value or not value.isascii() or not value.isprintable():
        raise ValueError(f"{value!r} is not a pattern of AE titles: they have ASCII characters without backslash")
    if len(value) > AET_CHARS and not set(value) & set("*?["):
        raise ValueError(f"{value!r}: AE titles have at most {AET_CHARS} characters")
    return value
