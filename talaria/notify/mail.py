"""Messages as e-mail, by SMTP with TLS and login."""

from __future__ import annotations

import asyncio
import smtplib
import socket
import ssl
import threading
from contextlib import suppress
from email.message import EmailMessage
from email.utils import formatdate
from typing import Any

from blocks.rule import EmailRule, MailSecurity
from protocols.net.tls import Tls
from talaria.notify.errors import NotSent
from talaria.notify.words import Letter
from transfer.errors import DispatchError


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
        raise


class _Sender:
    def __init__(self, rule: EmailRule, one: Letter) -> None:
        self.rule, self.one = rule, one
        self._stopped, self._turn = False, threading.Lock()
        self._smtp: smtplib.SMTP | None = None

    def stop(self) -> None:
        """Break off."""
        with self._turn:
            self._stopped = True
            sock = self._smtp.sock if self._smtp else None
            if sock:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def send(self) -> None:
        where = "{}:{}".format(*self.rule.address)
        try:
            context = Tls(ca=self.rule.ca_cert).client()
            self._send(context)
        except smtplib.SMTPAuthenticationError as exc:
            raise NotSent(f"{where} refuses the login: {_said(exc.smtp_code, exc.smtp_error)}") from exc
        except smtplib.SMTPRecipientsRefused as exc:
            answers = [_said(code, words) for code, words in exc.recipients.values()]
            raise NotSent(f"{where} refuses the recipient: {'; '.join(answers)}") from exc
        except smtplib.SMTPSenderRefused as exc:
            raise NotSent(f"{where} refuses the sender: {_said(exc.smtp_code, exc.smtp_error)}") from exc
        except smtplib.SMTPResponseException as exc:
            raise NotSent(f"{where} refuses the message: {_said(exc.smtp_code, exc.smtp_error)}") from exc
        except smtplib.SMTPNotSupportedError as exc:
            raise NotSent(f"{where}: {exc}") from exc
        except ssl.SSLCertVerificationError as exc:
            why = exc.verify_message or str(exc)
            raise NotSent(f"{where}: its certificate is not trusted: {why}: correct host or ca_cert") from exc
        except TimeoutError as exc:
            raise NotSent(f"{where}: no answer within {self.rule.timeout_s:g} s") from exc
        except (OSError, smtplib.SMTPException) as exc:
            if isinstance(exc.__context__, TimeoutError):  # smtplib has made "unexpectedly closed" of it
                raise NotSent(f"{where}: no answer within {self.rule.timeout_s:g} s") from exc
            raise NotSent(f"{where} can't be reached: {getattr(exc, 'strerror', None) or exc}") from exc
        except DispatchError as exc:
            raise NotSent(exc.message) from exc

    def _send(self, context: ssl.SSLContext) -> None:
        rule, (host, port) = self.rule, self.rule.address
        timeout, name = rule.timeout_s, socket.gethostname()
        smtp: Any
        if rule.security is MailSecurity.TLS:
            smtp = smtplib.SMTP_SSL(local_hostname=name, timeout=timeout, context=context)
        else:
            smtp = smtplib.SMTP(local_hostname=name, timeout=timeout)
        smtp._host = host  # the name that its certificate must have, which only its constructor sets, and that connects
        try:
            smtp.connect(host, port)
            with self._turn:
                self._smtp = smtp
                if self._stopped:
                    raise NotSent("its time was up")
            if rule.security is MailSecurity.STARTTLS:
                smtp.starttls(context=context)
            if rule.user:
                smtp.login(rule.user, rule.password.get_secret_value())
            smtp.send_message(self._message(), rule.sender, [self.one.recipient])
        finally:
            with suppress(OSError, smtplib.SMTPException):
                smtp.quit()
            smtp.close()

    def _message(self) -> EmailMessage:
        one, message = self.one, EmailMessage()
        message["From"], message["To"], message["Subject"] = self.rule.sender, one.recipient, one.subject
        message["Date"] = formatdate(usegmt=True)
        message["Message-ID"] = f"<{one.id}@{self.rule.sender.rpartition('@')[2]}>"  # the same in every try
        message["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody is to answer by a program
        message.set_content(one.text)
        return message


def _said(code: int, words: bytes | str) -> str:
    text = words.decode("utf-8", "replace") if isinstance(words, bytes) else words
    return f"{code} {' '.join(text.split())}"
