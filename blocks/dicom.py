"""A DICOM node: C-STORE to it, C-FIND and C-GET or C-MOVE from it."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, Self

from pydantic import Field, HttpUrl, field_validator, model_validator

from blocks.base import ICONS, Target, check_host
from blocks.fields import BYTES, SECONDS, Group, about
from transfer.plan import Origin
from transfer.validation import check_aet

SENDER = "sender"  # as `host`: the node that the study came from
MIN_PDU = 4096  # bytes; PS3.8 Annex D.1 sets no least length, DCMTK's is 4096


class Transcode(StrEnum):
    """What may be done to an instance whose transfer syntax the peer refuses."""

    NEVER = "never"
    LOSSLESS = "lossless"
    ANY = "any"


class DicomTarget(Target):
    """A PACS, a modality or any other DICOM node that is reached over TCP without encryption.

    Instances are sent unchanged, by C-STORE over several associations; a transfer syntax that the node refuses is
    converted without loss, unless `transcode` says otherwise. Can be queried and pulled from.
    """

    _block_type_name = "DICOM Target"
    _block_type_slug = "dicom-target"
    _documentation_url = HttpUrl("https://dicom.nema.org/medical/dicom/current/output/html/part04.html#chapter_B")
    _logo_url = HttpUrl(f"{ICONS}/dicom.svg")
    _code_example = """```python
from blocks.dicom import DicomTarget

pacs = DicomTarget.load("BLOCK_NAME")
```"""

    type_name: ClassVar[str] = "dicom"
    can_query: ClassVar[bool] = True
    can_move: ClassVar[bool] = True
    where: ClassVar[tuple[str, ...]] = ("host", "port", "aet_target", "pass_receiver_aet")
    host_in: ClassVar[str] = "host"
    aims: ClassVar[tuple[str, ...]] = ("host", "port")

    host: str = Field(
        description="Host name or IP address; the word sender stands for the node that the study came from.",
        title="Host",
        json_schema_extra=about(Group.CONNECTION, placeholder="pacs.example.org or 10.1.2.3"),
    )
    port: int = Field(
        default=104,
        ge=1,
        le=65_535,
        description="TCP port of the node.",
        title="Port",
        json_schema_extra=about(Group.CONNECTION, placeholder="104"),
    )
    aet_target: str = Field(
        default="ANY-SCP",
        description="AE title of the node (the called AE title).",
        title="Their AE title",
        json_schema_extra=about(Group.CONNECTION, placeholder="ANY-SCP"),
    )
    aet_source: str = Field(
        default="TALARIA",
        description="AE title of this side (the calling AE title).",
        title="Our AE title",
        json_schema_extra=about(Group.CONNECTION, placeholder="TALARIA"),
    )
    pass_sender_aet: bool = Field(
        default=False,
        description="Whether to call with the AE title of the study's sender instead of aet_source.",
        title="Call with the sender's own title",
        json_schema_extra=about(Group.ORIGIN, advanced=True, at=1),
    )
    pass_receiver_aet: bool = Field(
        default=False,
        description="Whether to call the AE title that the study's sender called instead of aet_target.",
        title="Call the title that the sender called",
        json_schema_extra=about(Group.ORIGIN, advanced=True),
    )
    transcode: Transcode = Field(
        default=Transcode.LOSSLESS,
        description="What to do if the node refuses a file's transfer syntax: never convert, lossless, or any way.",
        title="If the node refuses a file's encoding",
        json_schema_extra=about(Group.CONVERSION, advanced=True),
    )
    max_pdu: int = Field(
        default=131_072,
        ge=0,
        le=1 << 24,
        description="Largest PDU in bytes that is sent or received; 0 leaves it to the node.",
        title="Largest PDU",
        json_schema_extra=about(Group.LIMITS, advanced=True, unit=BYTES),
    )
    storage_commitment_port: int = Field(
        default=0,
        ge=0,
        le=65_535,
        description="Port on which storage commitment reports are awaited; 0 for the same association only.",
        title="Listen on port",
        json_schema_extra=about(Group.COMMITMENT, advanced=True, placeholder="0", at=1),
    )
    storage_commitment_host: str = Field(
        default="",
        description="Address to listen on for the report; empty for all addresses of this machine.",
        title="Listen on address",
        json_schema_extra=about(Group.COMMITMENT, advanced=True, placeholder="all", at=2),
    )
    storage_commitment_aet: str = Field(
        default="",
        description="AE title of the node that answers storage commitment requests; empty for the called one.",
        title="Who confirms",
        json_schema_extra=about(Group.COMMITMENT, advanced=True, placeholder="as called"),
    )
    storage_commitment_wait_s: float = Field(
        default=60,
        gt=0,
        le=86_400,
        description="Seconds to wait for the storage commitment report.",
        title="Wait for the report",
        json_schema_extra=about(Group.COMMITMENT, advanced=True, unit=SECONDS, at=3),
    )

    @field_validator("host")
    @classmethod
    def _host(cls, value: str) -> str:
        return check_host(value)

    @field_validator("storage_commitment_host")
    @classmethod
    def _listen_on(cls, value: str) -> str:
        return check_host(value) if value.strip() else ""

    @field_validator("aet_target", "aet_source")
    @classmethod
    def _aet(cls, value: str) -> str:
        return check_aet(value)

    @field_validator("storage_commitment_aet")
    @classmethod
    def _optional_aet(cls, value: str) -> str:
        return check_aet(value) if value.strip() else ""

    @field_validator("max_pdu")
    @classmethod
    def _max_pdu(cls, value: int) -> int:
        if 0 < value < MIN_PDU:
            raise ValueError(f"max_pdu must be 0 (no limit) or at least {MIN_PDU} bytes")
        return value

    @property
    def node(self) -> str:
        """The node's host; "" if it is known only when a study has come from it."""
        return "" if self.host == SENDER else super().node

    @property
    def of_origin(self) -> dict[str, str]:
        needed = {
            "sender_host": ("host is sender", self.host == SENDER),
            "sender_aet": ("pass_sender_aet is on", self.pass_sender_aet),
            "receiver_aet": ("pass_receiver_aet is on", self.pass_receiver_aet),
        }
        return {field: why for field, (why, is_on) in needed.items() if is_on}

    def places(self, origin: Origin) -> list[str]:
        """Return the sender's address and the AE title that it called, as far as the target uses them."""
        found = [f"sender_host={origin.sender_host.strip().lower()}"] if self.host == SENDER else []
        return found + ([f"receiver_aet={origin.receiver_aet.strip()}"] if self.pass_receiver_aet else [])

    def at(self, origin: Origin) -> Self:
        if self.host != SENDER:
            return self
        try:
            found = self.model_copy(update={
                "host": check_host(origin.sender_host).lower(),
                "aet_source": check_aet(origin.sender_aet) if self.pass_sender_aet else self.aet_source,
                "aet_target": check_aet(origin.receiver_aet) if self.pass_receiver_aet else self.aet_target,
            })  # fmt: skip
        except ValueError:  # its push refuses it
            return self
        found._node_of = found.host
        return found

    @model_validator(mode="after")
    def _sender_only_stores(self) -> DicomTarget:
        if self.host == SENDER and self.queries:
            raise ValueError("host 'sender' stands for a study's origin: such a target can only store")
        return self
