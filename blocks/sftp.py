"""A folder on a server, filled by SFTP."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from pydantic import Field, HttpUrl

from blocks.base import ICONS
from blocks.fields import Group, about
from blocks.ssh import SshTarget


class Rename(StrEnum):
    """How a whole file gets its final name."""

    AUTO = "auto"
    NEVER = "never"


class SftpTarget(SshTarget):
    """A folder on a server that is filled by SFTP; the server needs no shell, except for the script at the end.

    Files have a temporary name until they are whole; an interrupted one is continued.
    """

    _block_type_name = "SFTP Target"
    _block_type_slug = "sftp-target"
    _documentation_url = HttpUrl("https://datatracker.ietf.org/doc/html/draft-ietf-secsh-filexfer-02")
    _logo_url = HttpUrl(f"{ICONS}/sftp.svg")
    _code_example = """```python
from blocks.sftp import SftpTarget

server = SftpTarget.load("BLOCK_NAME")
```"""

    type_name: ClassVar[str] = "sftp"

    rename: Rename = Field(
        default=Rename.AUTO,
        description="Whether files get their final name when they are whole (auto), or are written under it (never) "
        "for servers that can't rename.",
        title="Final name when complete",
        json_schema_extra=about(Group.NAMES, advanced=True),
    )
