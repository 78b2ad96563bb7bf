"""What a rule is, by which people hear of what happens: by webhook, e-mail or a command. No input or output here."""

from __future__ import annotations

import re
from abc import ABC
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, ClassVar
from urllib.parse import urlsplit

from pydantic import Field, HttpUrl, SecretStr, field_validator, model_validator

from blocks.base import CONTROL, ICONS, MASK, check_host, is_masked
from blocks.credentials import checked_token
from blocks.fields import SECONDS, Group, about
from blocks.named import NamedBlock, check_email
from blocks.proxied import checked_proxy, proxy_field

LOGO = f"{ICONS}/rule.svg"
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
MOST_RECIPIENTS = 50
_PATTERN = re.compile(r"[*?\[]")  # what fnmatch takes for more than itself


class RuleEvent(StrEnum):
    """What a rule may hear of."""

    FAILED = "dispatch.failed"
    PARTIAL = "dispatch.partial"
    DELIVERED = "dispatch.delivered"
    LATE = "dispatch.late"
    DOWN = "target.down"
    UP = "target.up"
    STUCK = "source.stuck"
    CERTIFICATE = "certificate.expires"
    DISK = "disk.low"


class Rule(NamedBlock, ABC):
    """Who is written to, and when.

    Every field has a default where old documents must still load; the name of a rule is the name of its block
    document, unique over all types.
    """

    word: ClassVar[str] = "rule"
    seen_to_by: ClassVar[str] = "notify"
    _block_schema_capabilities: ClassVar[list[str]] = ["talaria-rule"]

    on: list[RuleEvent] = Field(
        default=[one for one in RuleEvent if one is not RuleEvent.DELIVERED],
        min_length=1,
        description="What it hears of, as in dispatch.failed; all but dispatch.delivered where nothing is chosen.",
        title="Events",
        json_schema_extra=about(Group.HEARD),
    )
    targets: list[str] = Field(
        default=[],
        description="Names of targets, with * for any letters; where there are some, it hears of nothing about others.",
        title="Targets",
        json_schema_extra=about(Group.HEARD, placeholder="pacs, archive-*", names="target"),
    )
    sources: list[str] = Field(
        default=[],
        description="Names of sources, with * for any letters; where there are some, it hears of no stuck others.",
        title="Sources",
        json_schema_extra=about(Group.HEARD, advanced=True, names="source"),
    )
    late_s: int = Field(
        default=3600,
        ge=1,
        le=31_536_000,
        description="Seconds after its planned beginning when a dispatch that has not ended is late.",
        title="Late after",
        json_schema_extra=about(Group.HEARD, advanced=True, unit=SECONDS),
    )
    free_percent: float = Field(
        default=10,
        gt=0,
        lt=100,
        description="Percent of a disk's space; with less free, it is low.",
        title="Disk is low below",
        json_schema_extra=about(Group.HEARD, advanced=True),
    )
    group_s: float = Field(
        default=30,
        ge=0,
        le=86_400,
        description="For how many seconds what happens is collected into one message.",
        title="Collect for",
        json_schema_extra=about(Group.MESSAGES, advanced=True, unit=SECONDS),
    )
    every_s: float = Field(
        default=600,
        ge=0,
        le=604_800,
        description="Seconds between two messages to the same recipient, at least.",
        title="At most one in",
        json_schema_extra=about(Group.MESSAGES, advanced=True, unit=SECONDS),
    )
    paths: bool = Field(
        default=False,
        description="Whether messages name paths of files and quote sentences with them; names of folders may be "
        "patients' names.",
        title="Name paths",
        json_schema_extra=about(Group.MESSAGES, advanced=True),
    )
    timeout_s: float = Field(
        default=20,
        gt=0,
        le=60,
        description="Seconds of waiting for the other side after which a message is tried again later.",
        title="Give up on silence after",
        json_schema_extra=about(Group.MESSAGES, advanced=True, unit=SECONDS),
    )
    enabled: bool = Field(
        default=True,
        description="Whether the rule is at work; what happens meanwhile is told to nobody by it.",
        title="Enabled",
        json_schema_extra=about(Group.USE),
    )
    description: str = Field(
        default="",
        description="What people should know about this rule.",
        title="Description",
        json_schema_extra=about(Group.INFORMATION, lines=True),
    )

    @property
    def leads_to(self) -> str:
        """Where messages go, for lists: without secrets."""
        return ""

    def writes_to(self, recipient: str) -> bool:
        """Return True if a recipient may hear of something by this rule; "" is the one destination of most types."""
        return not recipient

    def named_plainly(self, kind: str) -> set[str]:
        """Return the targets, or sources, that it is to hear of by their own names; patterns fit what may yet come."""
        named = self.targets if kind == "target" else self.sources
        return {one for one in named if not _PATTERN.search(one)}

    def hears(self, event: str, about: dict[str, Any]) -> bool:
        """Return True if the rule hears of something that has happened."""
        if not self.enabled or event not in self.on:
            return False
        target, source = str(about.get("target") or ""), str(about.get("source") or "")
        if event == RuleEvent.LATE and about.get("late_s") != self.late_s:
            return False
        if event == RuleEvent.DISK and about.get("free_percent") != self.free_percent:
            return False
        if self.targets and event != RuleEvent.STUCK:
            # Of what is about no target (our own disk, our own certificate) a rule for some hears nothing.
            return any(fnmatchcase(target, one) for one in self.targets)
        return not (self.sources and event == RuleEvent.STUCK) or any(fnmatchcase(source, one) for one in self.sources)


def _authorities() -> Any:
    """Return the field of those that may vouch for the other side."""
    return Field(
        default="",
        description="Authorities that may vouch for the server: path of a PEM file, or its text; empty: the system's.",
        title="Trusted authorities",
        json_schema_extra=about(Group.TRUST, advanced=True, lines=True),
    )


class WebhookRule(Rule):
    """Messages as JSON to a web server, signed as Standard Webhooks has it; redirects are not followed."""

    _block_type_name = "Webhook Rule"
    _block_type_slug = "webhook-rule"
    _logo_url = HttpUrl(LOGO)
    type_name: ClassVar[str] = "webhook"
    aims: ClassVar[tuple[str, ...]] = ("url", "proxy", "ca_cert")

    url: SecretStr = Field(
        description="Where messages are posted to; kept secret, as it often holds a key.",
        title="URL",
        json_schema_extra=about(Group.CONNECTION, placeholder="https://alerts.example.org/talaria"),
    )
    secret: SecretStr = Field(
        default=SecretStr(""),
        description="Key that messages are signed with (HMAC-SHA256), as text or as whsec_…; empty for unsigned ones.",
        title="Signing key",
        json_schema_extra=about(Group.SIGN_IN),
    )
    token: SecretStr = Field(
        default=SecretStr(""),
        description="Bearer token that is sent with messages, where the server wants one.",
        title="Token",
        json_schema_extra=about(Group.SIGN_IN, advanced=True),
    )
    proxy: SecretStr = proxy_field("server")
    ca_cert: str = _authorities()

    @property
    def leads_to(self) -> str:
        text = self.url.get_secret_value()
        if text == MASK:
            return ""
        parts = urlsplit(text)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    @field_validator("url")
    @classmethod
    def _url(cls, value: SecretStr) -> SecretStr:
        text = value.get_secret_value().strip()
        if is_masked(value):
            return value
        try:
            parts = urlsplit(text)
            port, host = parts.port, parts.hostname or ""
        except ValueError as exc:
            raise ValueError("url is not a URL: write https://host/path") from exc
        if parts.scheme not in ("http", "https") or not host or port == 0 or CONTROL.search(text) or " " in text:
            raise ValueError("url is not a web address: write https://host/path")
        if parts.username or parts.password:
            raise ValueError("url must not hold a user or password: set token")
        check_host(host)
        return SecretStr(text)

    @field_validator("proxy")
    @classmethod
    def _proxy(cls, value: SecretStr) -> SecretStr:
        return checked_proxy(value)

    @field_validator("token")
    @classmethod
    def _token(cls, value: SecretStr) -> SecretStr:
        return checked_token(value)

    @model_validator(mode="after")
    def _safe(self) -> WebhookRule:
        if is_masked(self.url) or not self.token.get_secret_value():
            return self
        parts = urlsplit(self.url.get_secret_value())
        if parts.scheme == "http" and parts.hostname not in LOOPBACK:
            raise ValueError("token is sent over https only: change url, or remove token")
        return self


class MailSecurity(StrEnum):
    """How a connection to a mail server is protected."""

    STARTTLS = "starttls"
    TLS = "tls"
    NONE = "none"


PORTS = {MailSecurity.STARTTLS: 587, MailSecurity.TLS: 465, MailSecurity.NONE: 25}


class EmailRule(Rule):
    """Messages as e-mail, each recipient for themselves."""

    _block_type_name = "E-mail Rule"
    _block_type_slug = "email-rule"
    _logo_url = HttpUrl(LOGO)
    type_name: ClassVar[str] = "email"
    aims: ClassVar[tuple[str, ...]] = ("host", "port", "security", "ca_cert")

    host: str = Field(
        description="Name or address of the mail server.",
        title="Mail server",
        json_schema_extra=about(Group.CONNECTION, placeholder="mail.example.org"),
    )
    port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Its port; by default 587 with starttls, 465 with tls, 25 with none.",
        title="Port",
        json_schema_extra=about(Group.CONNECTION, advanced=True, placeholder="587"),
    )
    security: MailSecurity = Field(
        default=MailSecurity.STARTTLS,
        description="starttls, tls from the first byte, or none.",
        title="Protection",
        json_schema_extra=about(Group.CONNECTION),
    )
    user: str = Field(
        default="",
        description="User name at the mail server, if it wants a login.",
        title="User",
        json_schema_extra=about(Group.SIGN_IN),
    )
    password: SecretStr = Field(
        default=SecretStr(""),
        description="The user's password.",
        title="Password",
        json_schema_extra=about(Group.SIGN_IN),
    )
    ca_cert: str = _authorities()
    sender: str = Field(
        description="E-mail address that messages come from.",
        title="From",
        json_schema_extra=about(Group.MESSAGES, placeholder="talaria@example.org"),
    )
    to: list[str] = Field(
        default=[],
        max_length=MOST_RECIPIENTS,
        description="E-mail addresses that hear of everything that the rule hears of.",
        title="To",
        json_schema_extra=about(Group.MESSAGES, placeholder="pacs-team@example.org"),
    )
    contact: bool = Field(
        default=False,
        description="Whether the contact of a target or source hears of what is about that one, too.",
        title="To contacts, too",
        json_schema_extra=about(Group.MESSAGES),
    )

    @property
    def leads_to(self) -> str:
        return ", ".join([*self.to, *(["contacts"] if self.contact else [])])

    def writes_to(self, recipient: str) -> bool:
        return recipient in self.to or (self.contact and bool(recipient))

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the mail server."""
        return self.host.strip("[]"), self.port or PORTS[self.security]

    @field_validator("host")
    @classmethod
    def _host(cls, value: str) -> str:
        return check_host(value)

    @field_validator("sender")
    @classmethod
    def _sender(cls, value: str) -> str:
        return check_email(value)

    @field_validator("to")
    @classmethod
    def _to(cls, value: list[str]) -> list[str]:
        return list(dict.fromkeys(map(check_email, value)))

    @field_validator("user")
    @classmethod
    def _user(cls, value: str) -> str:
        if CONTROL.search(value):
            raise ValueError("user holds control characters")
        return value

    @field_validator("contact", mode="plain")
    @classmethod
    def _contact(cls, value: object) -> bool:  # type: ignore[override]  # that of a target is an address
        if not isinstance(value, bool):
            raise ValueError("contact must be true or false")  # noqa: TRY004 - pydantic wants a ValueError
        return value

    @model_validator(mode="after")
    def _consistent(self) -> EmailRule:
        if not self.to and not self.contact:
            raise ValueError("to names nobody: name somebody, or set contact to true")
        if self.password.get_secret_value() and not self.user:
            raise ValueError("password is set without user: set both, or none")
        if self.user and self.security is MailSecurity.NONE and self.host not in LOOPBACK:
            raise ValueError("a password is sent over TLS only: set security to starttls or tls")
        return self


class CommandRule(Rule):
    """Messages to a program on the server's machine, as JSON on its standard input."""

    _block_type_name = "Command Rule"
    _block_type_slug = "command-rule"
    _logo_url = HttpUrl(LOGO)
    type_name: ClassVar[str] = "command"

    command: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$",
        description="Name of a program in the folder TALARIA_NOTIFY_COMMANDS of the server's machine.",
        title="Program",
        json_schema_extra=about(Group.CONNECTION, placeholder="page-the-team"),
    )
    arguments: list[str] = Field(
        default=[],
        max_length=100,
        description="What is passed to it, as it is: no shell reads it. Everybody on the machine can see it.",
        title="Arguments",
        json_schema_extra=about(Group.CONNECTION, advanced=True, lines=True),
    )

    @property
    def leads_to(self) -> str:
        return self.command

    @field_validator("arguments")
    @classmethod
    def _arguments(cls, value: list[str]) -> list[str]:
        if any("\0" in one for one in value):
            raise ValueError("arguments hold a NUL character")
        return value
