"""The XNAT target: which project of which server a study goes to, and under which names."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import ClassVar

from pydantic import Field, HttpUrl, SecretStr, field_validator

from blocks.base import ICONS, check_argument, check_layout
from blocks.fields import SECONDS, Group, about
from blocks.proxied import Proxied
from blocks.urls import check_url

PROJECT = re.compile(r"[A-Za-z0-9_-]+")  # what XNAT takes for the ID of a project
NAME_FIELDS = (
    "fields: PatientID, StudyInstanceUID, AccessionNumber, StudyDate, StudyTime, Modality, SeriesInstanceUID, "
    "SeriesNumber, dispatch_id, each in braces."
)


class Destination(StrEnum):
    """Where in XNAT a session is to end."""

    ARCHIVE = "archive"
    PREARCHIVE = "prearchive"


class Overwrite(StrEnum):
    """What happens to a study of which XNAT has a session already. A study never changes another one's session."""

    NONE = "none"  # nothing is sent
    APPEND = "append"  # what is missing is added
    DELETE = "delete"  # what is sent replaces what is there


class XnatTarget(Proxied):
    """Delivers whole studies to a project of an XNAT server, one session per study, and follows them to the archive."""

    _block_type_name = "XNAT Target"
    _block_type_slug = "xnat-target"
    _logo_url = HttpUrl(f"{ICONS}/xnat.svg")
    _documentation_url = HttpUrl("https://wiki.xnat.org/xnat-api/image-session-import-service-api")
    _code_example = """```python
from blocks.xnat import XnatTarget

x = XnatTarget.load("BLOCK_NAME")
```"""

    type_name: ClassVar[str] = "xnat"
    where: ClassVar[tuple[str, ...]] = ("host", "project_id", "destination")
    host_in: ClassVar[str] = "host"
    aims: ClassVar[tuple[str, ...]] = ("host", "proxy", "ca_cert")

    host: str = Field(
        description="Base URL of the XNAT server, as in https://xnat.example.org.",
        title="Server",
        json_schema_extra=about(Group.CONNECTION, placeholder="https://xnat.example.org"),
    )
    project_id: str = Field(
        description="ID of the project, which is not its title or its running title.",
        title="Project ID",
        json_schema_extra=about(Group.CONNECTION, placeholder="TRIAL7"),
    )
    user: str = Field(
        description="User name, or the alias of an alias token.",
        title="User or token alias",
        json_schema_extra=about(Group.SIGN_IN),
    )
    password: SecretStr = Field(
        description="Password of the user, or the secret of the alias token.",
        title="Password or token secret",
        json_schema_extra=about(Group.SIGN_IN),
    )
    subject: str = Field(
        default="{PatientID}",
        description=f"Label of the subject; {NAME_FIELDS}",
        title="Subject label",
        json_schema_extra=about(Group.NAMES, placeholder="{PatientID}"),
    )
    session: str = Field(
        default="{PatientID}_{StudyDate}_{StudyTime}",
        description=f"Label of the session; {NAME_FIELDS}",
        title="Session label",
        json_schema_extra=about(Group.NAMES, placeholder="{PatientID}_{StudyDate}_{StudyTime}"),
    )
    destination: Destination = Field(
        default=Destination.ARCHIVE,
        description="Where the session is to end: archive, or prearchive for a review.",
        title="Where sessions end",
        json_schema_extra=about(Group.STORED, advanced=True),
    )
    overwrite: Overwrite = Field(
        default=Overwrite.NONE,
        description="What to do if XNAT has a session of the study: none refuses, append adds what is missing, "
        "delete replaces what is sent.",
        title="If the session exists",
        json_schema_extra=about(Group.STORED, advanced=True),
    )
    ca_cert: str = Field(
        default="",
        description="Certificates that are trusted to vouch for the server: path of a PEM file or folder, or PEM text; "
        "empty for the system's trust store.",
        title="Trust these authorities",
        json_schema_extra=about(
            Group.SECURITY, advanced=True, placeholder="path or -----BEGIN CERTIFICATE-----", lines=True
        ),
    )
    archive_timeout_s: float = Field(
        default=600,
        ge=0,
        le=86_400,
        description="Seconds to wait, after the upload, for XNAT to build and archive a session.",
        title="Wait for archiving",
        json_schema_extra=about(Group.LIMITS, advanced=True, unit=SECONDS),
    )
    concurrency: int = Field(
        default=2,
        ge=1,
        le=64,
        description="Studies that are imported at once inside one dispatch.",
        title="Studies at once",
        json_schema_extra=about(Group.LIMITS, advanced=True),
    )

    @property
    def place_template(self) -> str:
        """Labels of another form make another session; and one that is replaced holds what the last dispatch sent."""
        return "{dispatch_id}" if self.overwrite is Overwrite.DELETE else f"{self.subject}/{self.session}"

    @field_validator("host")
    @classmethod
    def _host(cls, value: str) -> str:
        return check_url(value, credentials="user and password")

    @field_validator("project_id")
    @classmethod
    def _project(cls, value: str) -> str:
        value = value.strip()
        if not PROJECT.fullmatch(value):
            raise ValueError(f"{value!r} is not the ID of an XNAT project: letters, digits, '_' and '-' only")
        return value

    @field_validator("user")
    @classmethod
    def _user(cls, value: str) -> str:
        if not value or ":" in value:
            raise ValueError("user must not be empty or hold a colon")
        return check_argument(value)

    @field_validator("password")
    @classmethod
    def _password(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value():
            raise ValueError("password must not be empty")
        return value

    @field_validator("subject", "session")
    @classmethod
    def _name(cls, value: str) -> str:
        return check_layout(value)
