"""What every source has: targets, people, exclusion, priority, origin, schedule. No input or output here."""

from __future__ import annotations

import functools
from abc import ABC
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Self
from zoneinfo import ZoneInfo

from pydantic import Field, field_validator, model_validator

from blocks.base import CONTROL, ICONS, check_host
from blocks.fields import SECONDS, Group, about
from blocks.named import NamedBlock
from transfer.globs import patterns
from transfer.plan import Origin
from transfer.validation import check_aet

LOGO = f"{ICONS}/folder.svg"
NAME_CHARS = 60  # of a source, whose name is also that of a folder, and part of a deployment's


class SourcePriority(StrEnum):
    """Whose turn comes first, and what keeps to the hours of targets."""

    URGENT = "urgent"
    NORMAL = "normal"
    OFFPEAK = "offpeak"


class After(StrEnum):
    """What becomes of files that every target has confirmed."""

    LEAVE = "leave"
    MOVE = "move"
    DELETE = "delete"


@dataclass(frozen=True)
class Leaving:
    """How files leave a source: whether at all, to which folder, and under which names there ("" for their own)."""

    after: After = After.LEAVE
    move_to: str = ""
    move_layout: str = ""


class Source(NamedBlock, ABC):
    """Where studies come from by themselves, to be dispatched without anybody's asking.

    Every field has a default where old documents must still load; the name of a source is the name of its block
    document, unique over all types.
    """

    word: ClassVar[str] = "source"
    # Whether studies come all the time, so that somebody looks also where no schedule is given.
    watched: ClassVar[bool] = False
    _block_schema_capabilities: ClassVar[list[str]] = ["talaria-source"]

    targets: list[str] = Field(
        default=[],
        description="Names of the targets that each study is sent to.",
        title="Targets",
        json_schema_extra=about(Group.USE, names="target"),
    )
    enabled: bool = Field(
        default=True,
        description="Whether the source takes part; of a paused one nothing is dispatched, moved or deleted.",
        title="Enabled",
        json_schema_extra=about(Group.USE, at=1),
    )
    priority: SourcePriority = Field(
        default=SourcePriority.NORMAL,
        description="urgent ignores the windows of targets, offpeak waits for the off-peak hours.",
        title="Priority",
        json_schema_extra=about(Group.SENT),
    )
    exclude: str = Field(
        default="",
        description="Comma-separated globs of names of files and folders that are not sent, as in *.png,*.json.",
        title="Leave out",
        json_schema_extra=about(Group.SENT, advanced=True, placeholder="*.png, *.json"),
    )
    contact: str = Field(
        default="",
        description="E-mail address of the person to ask when studies of this source fail.",
        title="Contact",
        json_schema_extra=about(Group.INFORMATION, placeholder="pacs-team@example.org", at=1),
    )
    description: str = Field(
        default="",
        description="What people should know about this source.",
        title="Description",
        json_schema_extra=about(Group.INFORMATION, lines=True),
    )
    cron: str = Field(
        default="",
        description="When it is looked through, in the five fields of cron, as in 0 2 * * *.",
        title="Cron",
        json_schema_extra=about(Group.SCHEDULE, advanced=True, placeholder="0 2 * * *"),
    )
    interval_s: int | None = Field(
        default=None,
        ge=10,
        le=31_536_000,
        description="Every how many seconds it is looked through.",
        title="Every",
        json_schema_extra=about(Group.SCHEDULE, advanced=True, unit=SECONDS, placeholder="300"),
    )
    rrule: str = Field(
        default="",
        description="When it is looked through, as a recurrence rule of iCalendar, as in FREQ=WEEKLY;BYDAY=SA.",
        title="Recurrence rule",
        json_schema_extra=about(Group.SCHEDULE, advanced=True, placeholder="FREQ=WEEKLY;BYDAY=SA;BYHOUR=3"),
    )
    timezone: str = Field(
        default="UTC",
        description="Time zone of cron and of the recurrence rule, as in Europe/Berlin.",
        title="Time zone",
        json_schema_extra=about(Group.SCHEDULE, advanced=True, placeholder="Europe/Berlin"),
    )

    @classmethod
    @functools.cache
    def leads_secrets_to(cls) -> frozenset[str]:
        """Return nothing: what is secret of a source is the key of its own port, which is sent to nobody."""
        return frozenset()

    @property
    def globs(self) -> tuple[str, ...]:
        """The exclusion patterns."""
        return patterns(self.exclude)

    @property
    def reaches(self) -> tuple[str, ...]:
        """The names of all targets that something of this source may be sent to."""
        return tuple(dict.fromkeys(self.targets))

    @property
    def origin(self) -> Origin:
        """Where its studies come from, as far as the source itself says so."""
        return Origin()

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders that it takes studies from; no two sources, and no folder target, may share any of it."""
        return ()

    @property
    def leaving(self) -> Leaving:
        """What becomes of files that every target has confirmed."""
        return Leaving()

    @property
    def scheduled(self) -> bool:
        """Whether it has a schedule of its own."""
        return bool(self.cron or self.interval_s or self.rrule)

    def named(self, name: str) -> Self:
        """Give it a name without saving it."""
        if len(name) > NAME_CHARS:
            raise ValueError(f"name {name!r}: use at most {NAME_CHARS} characters")
        return super().named(name)

    @field_validator("targets")
    @classmethod
    def _targets(cls, value: list[str]) -> list[str]:
        return checked_names(value)

    @field_validator("cron")
    @classmethod
    def _cron(cls, value: str) -> str:
        from prefect.client.schemas.schedules import CronSchedule

        value = " ".join(value.split())
        if value:
            try:
                CronSchedule(cron=value)
            except ValueError as exc:
                raise ValueError(f"{value!r} is not in the form of cron: write it as in 0 2 * * *") from exc
        return value

    @field_validator("rrule")
    @classmethod
    def _rrule(cls, value: str) -> str:
        from prefect.client.schemas.schedules import RRuleSchedule

        if value:
            try:
                RRuleSchedule(rrule=value)
            except ValueError as exc:
                raise ValueError(
                    f"{value!r} is not a recurrence rule: write it as in FREQ=WEEKLY;BYDAY=SA;BYHOUR=3"
                ) from exc
        return value

    @field_validator("timezone")
    @classmethod
    def _timezone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ValueError, OSError, KeyError) as exc:  # ZoneInfoNotFoundError is a KeyError
            raise ValueError(f"{value!r} is not a time zone: write it as in Europe/Berlin") from exc
        return value

    @model_validator(mode="after")
    def _one_schedule(self) -> Self:
        if sum((bool(self.cron), self.interval_s is not None, bool(self.rrule))) > 1:
            raise ValueError("cron, interval_s and rrule: a source has one schedule at most")
        return self


class FileSource(Source, ABC):
    """A source of files that somebody puts there, and of which only he can say where they come from."""

    copy_first: bool = Field(
        default=False,
        description="Whether files are copied before they are sent, so that they may be written to meanwhile.",
        title="Copy first",
        json_schema_extra=about(Group.SENT, advanced=True),
    )
    sender_aet: str = Field(
        default="",
        description="AE title of whom the studies come from, for targets that pass it on.",
        title="Sender's AE title",
        json_schema_extra=about(Group.ORIGIN, advanced=True, placeholder="MODALITY"),
    )
    receiver_aet: str = Field(
        default="",
        description="AE title that the sender called, for targets that pass it on.",
        title="Called AE title",
        json_schema_extra=about(Group.ORIGIN, advanced=True, placeholder="ROUTER"),
    )
    sender_host: str = Field(
        default="",
        description="Host of whom the studies come from, for targets that send back.",
        title="Sender's host",
        json_schema_extra=about(Group.ORIGIN, advanced=True, placeholder="192.0.2.1"),
    )

    @property
    def origin(self) -> Origin:
        return Origin(self.sender_aet, self.receiver_aet, self.sender_host)

    @field_validator("sender_aet", "receiver_aet")
    @classmethod
    def _title(cls, value: str) -> str:
        return check_aet(value) if value.strip() else ""

    @field_validator("sender_host")
    @classmethod
    def _host(cls, value: str) -> str:
        return check_host(value) if value.strip() else ""

    @model_validator(mode="after")
    def _to_somebody(self) -> Self:
        if not self.targets:
            raise ValueError("targets: must name one target at least")
        return self


def checked_names(value: Iterable[str]) -> list[str]:
    """Return names of targets, each once; raise ValueError for one that is none."""
    names = [one.strip() for one in value]
    if not all(names):
        raise ValueError("holds an empty name: leave it out")
    return list(dict.fromkeys(names))


def check_path(value: str) -> str:
    """Return an absolute path, or raise ValueError."""
    if not value.startswith("/"):
        raise ValueError(f"{value!r} is not an absolute path: begin it with /")
    if CONTROL.search(value):
        raise ValueError("must not hold control characters")
    return value
