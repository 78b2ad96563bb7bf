"""A folder: on the worker's own disk, or a share that is mounted there."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any, ClassVar

from pydantic import Field, HttpUrl, field_validator

from blocks.base import CONTROL, ICONS, LAYOUT, Target, check_layout
from blocks.fields import Group, about

MODE = re.compile(r"(?:0o?)?([0-7]{3,4})")


class LinkPolicy(StrEnum):
    """Whether files may share their content with the source by a hard link."""

    NEVER = "never"
    AUTO = "auto"


class FolderTarget(Target):
    """A folder on the machine that dispatches run on, or a share mounted there.

    Each dispatch gets a folder of its own, which appears only when it is whole; an empty file `.complete` is put
    into it last.
    """

    _block_type_name = "Folder Target"
    _block_type_slug = "folder-target"
    _documentation_url = HttpUrl("https://pubs.opengroup.org/onlinepubs/9799919799/functions/rename.html")
    _logo_url = HttpUrl(f"{ICONS}/folder.svg")
    _code_example = """```python
from blocks.folder import FolderTarget

archive = FolderTarget.load("BLOCK_NAME")
```"""

    type_name: ClassVar[str] = "folder"
    where: ClassVar[tuple[str, ...]] = ("folder", "layout")

    folder: str = Field(
        description="Absolute path of an existing folder; it is never made, so that nothing is written where a share "
        "is not mounted.",
        title="Folder on the worker",
        json_schema_extra=about(Group.CONNECTION, placeholder="/mnt/archive"),
    )
    layout: str = LAYOUT
    link: LinkPolicy = Field(
        default=LinkPolicy.NEVER,
        description="Whether a file may be a hard link to the source: auto where the file system allows it, never for "
        "copies (which share blocks where the file system can).",
        title="Hard links to the source",
        json_schema_extra=about(Group.FILES, advanced=True),
    )
    mode: str | None = Field(
        default=None,
        description="Octal permissions of files, as in 0640; none to leave them to the worker's umask.",
        title="File permissions",
        json_schema_extra=about(Group.FILES, advanced=True, placeholder="0640"),
    )
    dir_mode: str | None = Field(
        default=None,
        description="Octal permissions of folders, as in 0750; none to leave them to the worker's umask.",
        title="Folder permissions",
        json_schema_extra=about(Group.FILES, advanced=True, placeholder="0750"),
    )
    group: str | None = Field(
        default=None,
        description="Name or number of the group that files and folders get.",
        title="Group",
        json_schema_extra=about(Group.FILES, advanced=True),
    )

    @property
    def own_folder(self) -> str:
        return self.folder

    @field_validator("folder")
    @classmethod
    def _folder(cls, value: str) -> str:
        if not value.startswith("/"):
            raise ValueError(f"{value!r} is not an absolute path: begin it with /")
        if CONTROL.search(value):
            raise ValueError("must not hold control characters")
        return value

    @field_validator("layout")
    @classmethod
    def _layout(cls, value: str) -> str:
        return check_layout(value)

    @field_validator("mode", "dir_mode", mode="before")
    @classmethod
    def _mode(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML reads 0640 as 416, and 640 as 640: no telling what was meant
            raise ValueError('write permissions as octal text in quotes, as in "0640"')  # noqa: TRY004 - pydantic's way
        if isinstance(value, str):
            form = MODE.fullmatch(value.strip())
            if not form:
                raise ValueError(f'{value!r} is not octal permissions: write them as in "0640"')
            return form[1].rjust(4, "0")
        return value

    @field_validator("mode")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        if value is not None and not int(value, 8) & 0o400:
            raise ValueError(f"mode {value}: the owner must be able to read, or what was written can't be verified")
        return value

    @field_validator("dir_mode")
    @classmethod
    def _enterable(cls, value: str | None) -> str | None:
        if value is not None and int(value, 8) & 0o700 != 0o700:
            raise ValueError(f"dir_mode {value}: the owner must be able to read, write and enter, as in 0750")
        return value

    @field_validator("group")
    @classmethod
    def _group(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or CONTROL.search(value)):
            raise ValueError(f"{value!r} is not the name or number of a group")
        return value
