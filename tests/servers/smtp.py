"""A mail server (aiosmtpd) with TLS and login, which keeps what it takes and refuses what it is told to."""

from __future__ import annotations

import asyncio
import ssl
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from aiosmtpd.controller import Controller
    from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from talaria.testing.process import free_port
from tests.servers.certificates import Authority

USER, PASSWORD = "talaria", "correct horse"
ODD_USER, ODD_PASSWORD = "tälaria", "weißes Pferd"
LOGINS = [
    LoginPassword(user.encode(), password.encode()) for user, password in ((USER, PASSWORD), (ODD_USER, ODD_PASSWORD))
]


@dataclass
class MailServer:
    """What the server has taken, and how it is to answer.

    Attributes:
        refused: recipients that it does not know.
        answer: to a message; "" to take it.
        delay_s: before the answer to a message.
        stays: whether it never answers to QUIT; `quitting` says that it was asked to.
        names: by what clients have called themselves; those without a full name are refused.
        asked: recipients that somebody has named, refused ones included.
    """

    port: int
    authority: Authority
    login: bool
    messages: list[tuple[str, EmailMessage]] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    answer: str = ""
    delay_s: float = 0.0
    stays: bool = False
    quitting: threading.Event = field(default_factory=threading.Event)
    names: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    @property
    def ca(self) -> Path:
        return self.authority.ca

    def to(self, recipient: str) -> list[EmailMessage]:
        """The messages that a recipient got."""
        return [message for name, message in self.messages if name == recipient]

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if self.login and not session.authenticated:
            return "530 5.7.0 authentication required"
        self.names.append(str(session.host_name))
        if "." not in self.names[-1] and ":" not in self.names[-1]:  # as with Postfix's reject_non_fqdn_helo_hostname
            return f"504 5.5.2 <{self.names[-1]}>: Helo command rejected: need fully-qualified hostname"
        self.asked.append(address)
        if address in self.refused:
            return "550 5.1.1 no such user here"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        await asyncio.sleep(self.delay_s)
        if self.answer:
            return self.answer
        content = envelope.content if isinstance(envelope.content, bytes) else b""
        message = message_from_bytes(content, policy=policy.default)
        assert isinstance(message, EmailMessage)
        self.messages += [(recipient, message) for recipient in envelope.rcpt_tos]
        return "250 OK"

    async def handle_QUIT(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        self.quitting.set()
        if self.stays:
            await asyncio.sleep(3600)
        return "221 Bye"


def _authenticated(server: SMTP, session: Session, envelope: Envelope, mechanism: str, given: Any) -> AuthResult:
    right = isinstance(given, LoginPassword) and given in LOGINS
    return AuthResult(success=right, handled=right)  # what is not handled is answered 535


@contextmanager
def smtp(
    folder: Path, security: str = "starttls", *, login: bool = True, without: tuple[str, ...] = ()
) -> Iterator[MailServer]:
    """Run a mail server with a certificate for localhost and 127.0.0.1.

    Args:
        security: `starttls`, `tls` or `none`, as a rule has it.
        login: whether it wants one.
        without: ways to log in that it does not offer.
    """
    authority = Authority(folder)
    leaf = authority.leaf("mail")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf.cert, leaf.key)
    server = MailServer(free_port(), authority, login)
    secured: dict[str, Any] = {"starttls": {"tls_context": context, "require_starttls": True}}.get(security, {})
    controller = Controller(
        server,
        hostname="127.0.0.1",
        port=server.port,
        ssl_context=context if security == "tls" else None,
        authenticator=_authenticated,
        auth_require_tls=security == "starttls",  # it knows of no other TLS
        auth_exclude_mechanism=without,
        ready_timeout=60,
        **secured,
    )
    controller.start()
    try:
        yield server
    finally:
        controller.stop()
