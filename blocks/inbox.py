"""An inbox: a folder on the worker into which studies are put."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, Self

from pydantic import Field, HttpUrl, field_validator, model_validator

from blocks.base import check_layout
from blocks.fields import SECONDS, Group, about
from blocks.source import LOGO, After, FileSource, Leaving, check_path


class InboxUnit(StrEnum):
    """What is dispatched as a whole."""

    FOLDER = "folder"
    STUDY = "study"
    SERIES = "series"


class Late(StrEnum):
    """What becomes of files that come to a unit which has been dispatched."""

    APPEND = "append"
    RESEND = "resend"
    HOLD = "hold"


class InboxSource(FileSource):
    """A folder on the machine that dispatches run on, or a share mounted there, into which studies are put.

    A study is dispatched when it is ready: the file `.complete` is in its folder, or nothing of it has changed for
    some time.
    """

    _block_type_name = "Inbox Source"
    _block_type_slug = "inbox-source"
    _documentation_url = HttpUrl("https://docs.prefect.io/v3/concepts/schedules")
    _logo_url = HttpUrl(LOGO)
    _code_example = """```python
from blocks.inbox import InboxSource

inbox = InboxSource.load("BLOCK_NAME")
```"""

    type_name: ClassVar[str] = "inbox"
    watched: ClassVar[bool] = True

    folder: str = Field(
        description="Absolute path of an existing folder; it is never made, so that a share that is not mounted is "
        "noticed.",
        title="Folder on the worker",
        json_schema_extra=about(Group.CONNECTION, placeholder="/data/inbox"),
    )
    unit: InboxUnit = Field(
        default=InboxUnit.FOLDER,
        description="What is dispatched as a whole: each folder directly below, or all files of one study or series, "
        "wherever they lie.",
        title="What is one study",
        json_schema_extra=about(Group.READY),
    )
    settle_s: float = Field(
        default=60,
        ge=0,
        le=604_800,
        description="Seconds without any change after which a study is ready, if it has no .complete.",
        title="Ready after",
        json_schema_extra=about(Group.READY, unit=SECONDS),
    )
    late: Late = Field(
        default=Late.APPEND,
        description="Files that come after their study was dispatched: append sends what is new, resend sends all of "
        "it again, hold waits for a person.",
        title="Files that come late",
        json_schema_extra=about(Group.READY, advanced=True),
    )
    after: After = Field(
        default=After.LEAVE,
        description="What becomes of files that every target has confirmed at its level of proof.",
        title="After delivery",
        json_schema_extra=about(Group.AFTER),
    )
    move_to: str = Field(
        default="",
        description="Absolute path of the existing folder that files are moved to.",
        title="Move to",
        json_schema_extra=about(Group.AFTER, placeholder="/data/sent"),
    )
    move_layout: str = Field(
        default="",
        description="Name of the folder that a study gets there, made of fields as a folder target's; empty to keep "
        "the paths of the inbox.",
        title="Name of each moved folder",
        json_schema_extra=about(Group.AFTER, advanced=True, placeholder="{StudyDate}/{StudyInstanceUID}"),
    )
    watch: bool = Field(
        default=True,
        description="Whether changes are noticed at once, besides the schedule; a share needs an interval as well, "
        "as what other machines write is not noticed.",
        title="Watch it",
        json_schema_extra=about(Group.SCHEDULE),
    )

    @property
    def folders(self) -> tuple[str, ...]:
        return (self.folder,)

    @property
    def leaving(self) -> Leaving:
        return Leaving(self.after, self.move_to, self.move_layout)

    @field_validator("folder")
    @classmethod
    def _folder(cls, value: str) -> str:
        return check_path(value)

    @field_validator("move_to")
    @classmethod
    def _move_to(cls, value: str) -> str:
        return check_path(value) if value else value

    @field_validator("move_layout")
    @classmethod
    def _move_layout(cls, value: str) -> str:
        return check_layout(value) if value else value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.after is After.MOVE) != bool(self.move_to):
            raise ValueError("move_to is given with after: move, and only then")
        if not self.watch and not self.scheduled:
            raise ValueError("watch: false needs a schedule: cron, interval_s or rrule")
        return self
