"""Messages as e-mail, by SMTP with TLS and login."""

from __future__ import annotations

import asyncio
import base64
import re
import smtplib
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from email.message import EmailMessage
from email.policy import default
from email.utils import formatdate
from typing import Any

from blocks.rule import PORTS, EmailRule, MailSecurity
from protocols.net.tls import Tls
from talaria.notify.errors import NotSent
from talaria.notify.words import Letter
from transfer.errors import DispatchError

SEVEN_BIT = default.clone(cte_type="7bit")  # of text beyond ASCII: a server need not take eight (RFC 6152)
# For the answer to a whole message: servers look through it meanwhile, and who hangs up too soon makes it come again
# (RFC 5321 section 4.5.3.2.6). Less than one try may take.
TAKEN_S = 80.0
END = b"\r\n.\r\n"
QUIT_S = 5.0  # for the answer to QUIT, which changes nothing (RFC 5321 section 4.1.1.10)
FULL_NAME = re.compile(r"([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z]([A-Za-z0-9-]*[A-Za-z0-9])?")


async def send(rule: EmailRule, one: Letter) -> None:
    """Send a message to its recipient; return when the mail server has taken it.

    Raises:
        NotSent: it can't be reached, is not trusted, or refuses login, sender, recipient or message.
    """
    sender = _Sender(rule, one)
    try:
        await asyncio.to_thread(sender.send)
    except asyncio.CancelledError:  # our time is up: nothing may go out any more
        sender.stop()
        if not sender.taken:
            raise


class _Client(smtplib.SMTP):
    """Says what it is connected by before anything is read from it; waits longer for the answer to a whole message."""

    connected: Callable[[socket.socket], None]
    whole = False  # whether a message has been sent to its end

    def send(self, s: Any) -> None:
        super().send(s)
        if isinstance(s, bytes) and s.endswith(END) and self.sock:
            self.sock.settimeout(TAKEN_S)
            self.whole = True

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        sock: socket.socket = super()._get_socket(host, port, timeout)  # type: ignore[misc]
        self.connected(sock)
        return sock


class _TlsClient(smtplib.SMTP_SSL, _Client):
    """So does one with TLS from the first byte: before its handshake."""


class _Sender:
    def __init__(self, rule: EmailRule, one: Letter) -> None:
        self.rule, self.one = rule, one
        self._stopped, self._turn = False, threading.Lock()
        self._connection: socket.socket | None = None
        self._connected = self._greeted = self._whole = False
        self.taken = False  # from then on it must not go again, however the connection ends

    def stop(self) -> None:
        """Break off, also within the handshake or an answer that has no end."""
        with self._turn:
            self._stopped = True
            if self._connection:
                with suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)

    def connected(self, sock: socket.socket) -> None:
        """Take note of a connection.

        Raises:
            NotSent: it comes too late.
        """
        with self._turn:
            if self._stopped:
                sock.close()
                raise NotSent("its time was up")
            self._connection = sock.dup()  # TLS takes the socket over
            self._connected = True

    def send(self) -> None:
        where = "{}:{}".format(*self.rule.address)
        try:
            context = Tls(ca=self.rule.ca_cert).client()
            try:
                self._send(context)
            finally:
                with self._turn:
                    if self._connection:
                        self._connection.close()
                        self._connection = None
        except smtplib.SMTPAuthenticationError as exc:
            raise NotSent(f"{where} refuses the login: {_said(exc.smtp_code, exc.smtp_error)}") from exc
        except smtplib.SMTPRecipientsRefused as exc:
            answers = [_said(code, words) for code, words in exc.recipients.values()]
            raise NotSent(f"{where} refuses the recipient: {'; '.join(answers)}") from exc
        except smtplib.SMTPSenderRefused as exc:
            raise NotSent(f"{where} refuses the sender: {_said(exc.smtp_code, exc.smtp_error)}") from exc
        except smtplib.SMTPConnectError as exc:
            raise NotSent(f"{where} refuses the connection: {_said(exc.smtp_code, exc.smtp_error)}") from exc
        except smtplib.SMTPResponseException as exc:
            raise NotSent(f"{where} refuses the message: {_said(exc.smtp_code, exc.smtp_error)}") from exc
        except smtplib.SMTPNotSupportedError as exc:
            raise NotSent(f"{where}: {exc}") from exc
        except ssl.SSLCertVerificationError as exc:
            why = exc.verify_message or str(exc)
            raise NotSent(f"{where}: its certificate is not trusted: {why}: correct host or ca_cert") from exc
        except TimeoutError as exc:
            raise NotSent(f"{where}: {self._silence()}") from exc
        except (OSError, smtplib.SMTPException) as exc:
            if type(exc) is smtplib.SMTPException:  # it offers no way to log in that we know
                raise NotSent(f"{where}: {exc}") from exc
            if isinstance(exc.__context__, TimeoutError):  # smtplib has made "unexpectedly closed" of it
                raise NotSent(f"{where}: {self._silence()}") from exc
            if self.rule.security is MailSecurity.TLS and "WRONG_VERSION_NUMBER" in str(exc):
                raise NotSent(f"{where} does not begin with TLS: set security to starttls, or correct port") from exc
            raise NotSent(f"{where} can't be reached: {getattr(exc, 'strerror', None) or exc}") from exc
        except DispatchError as exc:
            raise NotSent(exc.message) from exc
        except ValueError as exc:  # a challenge that is no Base64, say
            raise NotSent(f"{where}: what it answers can't be understood: {exc}") from exc

    def _silence(self) -> str:
        """Return the words for a server that does not answer: one may wait for TLS."""
        if self._whole:
            return f"no answer to the whole message within {TAKEN_S:g} s: it may have taken it"
        words = f"no answer within {self.rule.timeout_s:g} s"
        if self._greeted or self.rule.security is MailSecurity.TLS or not self._connected:
            return words
        return f"{words}: if it begins with TLS (port {PORTS[MailSecurity.TLS]}), set security to tls"

    def _send(self, context: ssl.SSLContext) -> None:
        rule, (host, port) = self.rule, self.rule.address
        timeout, name = rule.timeout_s, socket.gethostname()  # else its constructor asks the resolver for one
        smtp: Any
        if rule.security is MailSecurity.TLS:
            smtp = _TlsClient(local_hostname=name, timeout=timeout, context=context)
        else:
            smtp = _Client(local_hostname=name, timeout=timeout)
        smtp.connected = self.connected
        smtp._host = host  # the name that its certificate must have, which only its constructor sets, and that connects
        try:
            code, said = smtp.connect(host, port)
            self._greeted = True
            if code != 220:
                raise smtplib.SMTPConnectError(code, said)
            smtp.local_hostname = _greeting(name, smtp.sock)
            if rule.security is MailSecurity.STARTTLS:
                smtp.starttls(context=context)
            if rule.user:
                _log_in(smtp, rule.user, rule.password.get_secret_value())
            smtp.send_message(self._message(), rule.sender, [self.one.recipient])
            self.taken = True
        finally:
            self._whole = smtp.whole
            with suppress(OSError, smtplib.SMTPException):
                if smtp.sock:
                    smtp.sock.settimeout(min(timeout, QUIT_S))
                smtp.quit()
            smtp.close()

    def _message(self) -> EmailMessage:
        one, message = self.one, EmailMessage(SEVEN_BIT)
        message["From"], message["To"], message["Subject"] = self.rule.sender, one.recipient, one.subject
        message["Date"] = formatdate(usegmt=True)
        message["Message-ID"] = f"<{one.id}@{self.rule.sender.rpartition('@')[2]}>"  # the same in every try
        message["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody is to answer by a program
        message.set_content(one.text)
        return message


def _greeting(name: str, sock: socket.socket) -> str:
    """Return what we call ourselves: by a full name, or else by our address (RFC 5321 section 4.1.4).

    Many servers refuse other names, as containers have them.
    """
    if FULL_NAME.fullmatch(name):
        return name
    address = str(sock.getsockname()[0]).partition("%")[0]
    return f"[IPv6:{address}]" if ":" in address else f"[{address}]"


def _log_in(smtp: smtplib.SMTP, user: str, password: str) -> None:
    """Log in, also with letters beyond ASCII, which smtplib can't send: they are UTF-8 (RFC 4616).

    Raises:
        smtplib.SMTPException: the server refuses that, or has no way for it.
    """
    if (user + password).isascii():
        smtp.login(user, password)
        return
    smtp.ehlo_or_helo_if_needed()
    ways = smtp.esmtp_features.get("auth", "").upper().split()
    if "PLAIN" in ways:
        code, said = smtp.docmd("AUTH", f"PLAIN {_coded(f'{chr(0)}{user}{chr(0)}{password}')}")
    elif "LOGIN" in ways:
        code, said = smtp.docmd("AUTH", f"LOGIN {_coded(user)}")
        if code == 334:
            code, said = smtp.docmd(_coded(password))
    else:
        raise smtplib.SMTPNotSupportedError("it offers neither AUTH PLAIN nor LOGIN, and the login is not in ASCII")
    if code not in (235, 503):
        raise smtplib.SMTPAuthenticationError(code, said)


def _coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode("ascii")


def _said(code: int, words: bytes | str) -> str:
    text = words.decode("utf-8", "replace") if isinstance(words, bytes) else words
    return f"{code} {' '.join(text.split())}"
