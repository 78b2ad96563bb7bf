"""What every target has: direction, people, exclusion, retry policy, timeouts, limits. No input or output here."""

from __future__ import annotations

import hashlib
import re
from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from ipaddress import IPv6Address
from socket import inet_aton
from typing import ClassVar, Self
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr, SecretStr, field_validator, model_validator

from blocks.fields import BYTES_PER_S, SECONDS, TIMES, Group, about
from blocks.named import NamedBlock
from transfer.globs import patterns
from transfer.layout import fields_of
from transfer.plan import Origin
from transfer.receipt import Level
from transfer.shared import host_of
from transfer.window import DispatchWindow

MOVED = "type it again: the connection leads elsewhere now, and a stored secret never goes to another place"
# An IPv4 address with a number that inet_aton(3) takes for an octal one: 192.168.010.020 would be 192.168.8.16.
OCTAL = re.compile(r"(?=.*\b0+[1-9]\d)(\d+\.){3}\d+")
HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?|\[?[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?\]?")
NUMBERS = re.compile(r"[0-9.-]+")
PORT_BEHIND = re.compile(r"[A-Za-z0-9\]]:\d+$")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
NO_ORIGIN = Origin()
MASK = "********"  # what the server answers in the place of a secret
_MASKED: ContextVar[bool] = ContextVar("masked", default=False)
# Where the front door's icons are: it answers its own address in the place of this host, which there is none of
# (RFC 2606, section 2). Nothing is loaded from elsewhere.
ICONS = "https://talaria.invalid/talaria/static/icons"
LOGO = f"{ICONS}/target.svg"


class Direction(StrEnum):
    """What a target may be used for."""

    STORE = "store"
    QUERY = "query"
    BOTH = "both"


@dataclass(frozen=True)
class Hook:
    """A target's own script, which is run at its server when everything has arrived.

    Attributes:
        wanted: whether to run it; the ledger keeps what would have to be run either way.
        layout: the script is run once for each folder that this template makes.
        attempts: how often it is tried in one run.
        retry_delay_s: seconds before the second try; doubles with each one.
    """

    wanted: bool
    layout: str
    attempts: int
    retry_delay_s: float


class QuotePeer(StrEnum):
    """How much of what a peer says stands in messages."""

    SHORT = "short"
    NONE = "none"


class Target(NamedBlock, ABC):
    """A place that studies are delivered to, or queried and pulled from.

    Every field has a default where old documents must still load; the name of a target is the name of its block
    document, unique over all types.
    """

    word: ClassVar[str] = "target"
    can_query: ClassVar[bool] = False  # whether `query` and `both` are directions of this type
    can_move: ClassVar[bool] = False  # whether a queried one sends to a third place, which must be registered there
    _made: datetime | None = PrivateAttr(None)
    _node_of: str = PrivateAttr("")
    _block_schema_capabilities: ClassVar[list[str]] = ["talaria-target"]

    direction: Direction = Field(
        default=Direction.STORE,
        description="What the target is used for: store, query, or both.",
        title="Used for",
        json_schema_extra=about(Group.USE),
    )
    contact: str = Field(
        default="",
        description="E-mail address of the person to ask when the target fails.",
        title="Contact",
        json_schema_extra=about(Group.INFORMATION, placeholder="pacs-team@example.org", at=1),
    )
    description: str = Field(
        default="",
        description="What people should know about this target.",
        title="Description",
        json_schema_extra=about(Group.INFORMATION, lines=True),
    )
    exclude: str = Field(
        default="",
        description="Comma-separated globs of names of files and folders that are not sent, as in *.png,*.json.",
        title="Leave out",
        json_schema_extra=about(Group.SENT, advanced=True, placeholder="*.png, *.json"),
    )
    enabled: bool = Field(
        default=True,
        description="Whether the target takes part; a disabled one is refused.",
        title="Enabled",
        json_schema_extra=about(Group.USE, at=1),
    )
    max_attempts: int = Field(
        default=5,
        ge=1,
        le=50,
        description="How often a push is tried in one run; attempts that got further are not counted.",
        title="Attempts",
        json_schema_extra=about(Group.RETRIES, advanced=True, unit=TIMES),
    )
    retry_delay_s: float = Field(
        default=30,
        ge=0,
        le=86_400,
        description="Most seconds before the second attempt; doubles with each one.",
        title="First wait",
        json_schema_extra=about(Group.RETRIES, advanced=True, unit=SECONDS),
    )
    retry_max_delay_s: float = Field(
        default=900,
        ge=0,
        le=86_400,
        description="Longest wait between attempts, seconds.",
        title="Longest wait",
        json_schema_extra=about(Group.RETRIES, advanced=True, unit=SECONDS),
    )
    connect_timeout_s: float = Field(
        default=10,
        gt=0,
        le=3600,
        description="Seconds to wait for a connection.",
        title="Give up connecting after",
        json_schema_extra=about(Group.RETRIES, advanced=True, unit=SECONDS),
    )
    idle_timeout_s: float = Field(
        default=60,
        gt=0,
        le=86_400,
        description="Seconds of silence after which the peer counts as hung.",
        title="Give up on silence after",
        json_schema_extra=about(Group.RETRIES, advanced=True, unit=SECONDS),
    )
    concurrency: int = Field(
        default=4,
        ge=1,
        le=64,
        description="Connections or associations used at once inside one dispatch, at most.",
        title="Connections per dispatch",
        json_schema_extra=about(Group.LIMITS, advanced=True),
    )
    max_dispatches: int = Field(
        default=2,
        ge=1,
        le=1000,
        description="Dispatches at once to this target, over all workers.",
        title="Dispatches at once",
        json_schema_extra=about(Group.LIMITS, advanced=True),
    )
    bandwidth_limit: int | None = Field(
        default=None,
        ge=1024,
        description="Most bytes per second of one dispatch; none for no limit.",
        title="Speed limit",
        json_schema_extra=about(Group.LIMITS, advanced=True, unit=BYTES_PER_S, placeholder="no limit"),
    )
    window: str | None = Field(
        default=None,
        description="When dispatches may go to it, as in 18:00-06:00 Mon-Fri Europe/Berlin (UTC where no time zone is "
        "named); urgent ones may ignore it.",
        title="Sending hours",
        json_schema_extra=about(Group.LIMITS, advanced=True, placeholder="18:00-06:00 Mon-Fri Europe/Berlin"),
    )
    verify: Level = Field(
        default=Level.ACCEPTED,
        description="How deliveries are verified: accepted by the peer, listed by it afterwards, or proven.",
        title="Proof of delivery",
        json_schema_extra=about(Group.SENT, advanced=True),
    )

    quote_peer: QuotePeer = Field(
        default=QuotePeer.SHORT,
        description="How much of a peer's own words messages quote: short, without secrets and names, or none.",
        title="Quote the other side",
        json_schema_extra=about(Group.INFORMATION, advanced=True),
    )

    @property
    def made(self) -> datetime | None:
        """When the target was first saved; None if it was not loaded from a server."""
        return self._made

    def made_at(self, time: datetime | None) -> None:
        """Set the time when the target was first saved."""
        self._made = time

    def endpoint_for(self, origin: Origin = NO_ORIGIN) -> str:
        """Return a mark of where a study from `origin` goes: the ledger's rows count as long as it stays the same."""
        parts = []
        for field in self.where:
            value = getattr(self, field)
            parts.append(value.get_secret_value() if isinstance(value, SecretStr) else str(value))
        parts += self.places(origin)
        if self.own_folder and (host := host_of(self.own_folder)):
            parts.append(host)
        return hashlib.sha256("\0".join([self.type_name, *parts]).encode()).hexdigest()[:16]

    def places(self, origin: Origin) -> list[str]:
        """Return what in a study's origin decides where its data goes; empty where the target alone decides."""
        return []

    def at(self, origin: Origin) -> Self:
        """Return the target with the node that a study from `origin` goes to; itself where that is always the same."""
        return self

    @property
    def node_of(self) -> str:
        """The node that it was given by `at`; "" for one that has always the same."""
        return self._node_of

    @property
    def own_folder(self) -> str:
        """The folder that data goes to on the machine that sends it; "" where it goes to a server."""
        return ""

    @property
    def of_origin(self) -> dict[str, str]:
        """What a study's origin must say for this target, by the fields of `Origin`; each with the reason."""
        return {}

    @property
    def place_template(self) -> str:
        """The template of the place that an item gets below the endpoint; "" where the endpoint is one place."""
        return str(getattr(self, "layout", ""))

    @property
    def hook(self) -> Hook | None:
        """The target's own script; None for types that have none."""
        return None

    @property
    def node(self) -> str:
        """Name or address of the target's host; "" if it has none, or the settings don't name it."""
        value = str(getattr(self, self.host_in) or "") if self.host_in else ""
        return (urlsplit(value).hostname or "") if "://" in value else value

    @property
    def stores(self) -> bool:
        return self.direction is not Direction.QUERY

    @property
    def queries(self) -> bool:
        return self.direction is not Direction.STORE

    @property
    def moves(self) -> bool:
        """Whether it is queried, and sends what it is asked for to whom it knows."""
        return self.queries and self.can_move

    @property
    def globs(self) -> tuple[str, ...]:
        """The exclusion patterns."""
        return patterns(self.exclude)

    @field_validator("window")
    @classmethod
    def _window(cls, value: str | None) -> str | None:
        if value is not None:
            DispatchWindow.parse(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Target:
        if self.queries and not self.can_query:
            raise ValueError(f"direction {self.direction}: a target of type {self.type_name} can only store")
        if self.retry_max_delay_s < self.retry_delay_s:
            raise ValueError("retry_max_delay_s must not be less than retry_delay_s")
        return self


@contextmanager
def masked_secrets() -> Iterator[None]:
    """Let targets be made, in the block, of documents whose secrets the server has masked."""
    token = _MASKED.set(True)
    try:
        yield
    finally:
        _MASKED.reset(token)


def is_masked(value: SecretStr) -> bool:
    """Return True if a secret is not known: only its mask was answered."""
    return _MASKED.get() and value.get_secret_value() == MASK


def check_host(value: str) -> str:
    """Return a host name, IPv4 or IPv6 address (without brackets), or raise ValueError."""
    value = value.strip()
    if not HOST.fullmatch(value) or not _may_be_host(value.strip("[]")):
        port = ": a port is given in a field of its own" if PORT_BEHIND.search(value) else ""
        raise ValueError(f"{value!r} is not a host name or an IP address{port}")
    if OCTAL.fullmatch(value):
        raise ValueError(
            f"{value!r} is another address than it looks like: write its numbers without zeros before them"
        )
    return value.strip("[]")


def _may_be_host(value: str) -> bool:
    """Return False for what looks like an address and is none, as 10.1.2.300, a range, or one with a port."""
    try:
        if ":" in value:
            IPv6Address(value.partition("%")[0])
        elif NUMBERS.fullmatch(value):
            inet_aton(value)  # as whoever resolves it reads it
    except (ValueError, OSError):
        return False
    return True


def check_argument(value: str) -> str:
    """Raise ValueError for what a program would take for an option, or that holds control characters.

    For values that become part of a command line, a URL or a path on a server.
    """
    if value.startswith("-"):
        raise ValueError(f"{value!r} must not begin with '-'")
    if CONTROL.search(value):
        raise ValueError("must not hold control characters")
    return value


def check_layout(value: str) -> str:
    """Return a layout template, or raise ValueError that lists the fields."""
    fields_of(value)
    return value


LAYOUT = Field(
    default="{dispatch_id}",
    description="Name of the folder that a dispatch gets; fields: dispatch_id, PatientID, StudyInstanceUID, "
    "AccessionNumber, StudyDate, StudyTime, SeriesInstanceUID, Modality, SeriesNumber, each in braces.",
    title="Name of each dispatch's folder",
    json_schema_extra=about(Group.NAMES, placeholder="{dispatch_id}"),
)
