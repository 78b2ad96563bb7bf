"""A folder on a server, filled by rsync over SSH."""

from __future__ import annotations

import re
from typing import ClassVar

from pydantic import Field, HttpUrl, field_validator

from blocks.base import ICONS
from blocks.fields import Group, about
from blocks.ssh import SshTarget, check_folder

WILD = re.compile(r"[*?\[\]\\]")


class RsyncTarget(SshTarget):
    """A folder on a Linux server that is filled by rsync over SSH.

    A dispatch becomes visible at once when it is whole; an interrupted one is continued. Can run a script on the server
    when everything is there.
    """

    _block_type_name = "rsync Target"
    _block_type_slug = "rsync-target"
    _documentation_url = HttpUrl("https://download.samba.org/pub/rsync/rsync.1")
    _logo_url = HttpUrl(f"{ICONS}/rsync.svg")
    _code_example = """```python
from blocks.rsync import RsyncTarget

server = RsyncTarget.load("BLOCK_NAME")
```"""

    type_name: ClassVar[str] = "rsync"

    concurrency: int = Field(
        default=1,
        ge=1,
        le=1,
        description="Connections used at once; rsync uses one.",
        title="Connections per dispatch",
        json_schema_extra=about(Group.LIMITS, advanced=True),
    )
    compress: bool = Field(
        default=False,
        description="Whether rsync compresses; pays only on slow links with uncompressed images.",
        title="Compress on the way",
        json_schema_extra=about(Group.SENT, advanced=True),
    )

    @field_validator("folder")
    @classmethod
    def _folder(cls, value: str) -> str:
        value = check_folder(value)
        if WILD.search(value):
            raise ValueError(f"{value!r}: rsync would take *, ?, brackets and backslashes for a pattern")
        return value
