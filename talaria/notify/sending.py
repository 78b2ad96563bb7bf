"""Sends a message by its rule, within a time."""

from __future__ import annotations

import asyncio
import os

from blocks.rule import CommandRule, EmailRule, Rule, WebhookRule
from protocols.net.tls import is_pem
from talaria.notify import command, mail, webhook
from talaria.notify.errors import NotSent, check_answers
from talaria.notify.words import Letter

MOST_S = 90.0  # for one try, whatever the other side does; less than a claim lasts
WORDS_CHARS = 300


async def send(rule: Rule, one: Letter) -> None:
    """Send a message; return when the other side has taken it.

    Raises:
        NotSent: it has not, in time or at all.
    """
    try:
        async with asyncio.timeout(MOST_S):
            await _sent(rule, one)
    except TimeoutError as exc:
        raise NotSent(f"it took longer than {MOST_S:.0f} s") from exc
    except NotSent as exc:
        raise NotSent(_without_secrets(rule, str(exc)), exc.after_s) from exc


async def _sent(rule: Rule, one: Letter) -> None:
    if ca := _file(getattr(rule, "ca_cert", "")):
        await check_answers(ca)
    if isinstance(rule, WebhookRule):
        await webhook.post(rule, one)
    elif isinstance(rule, EmailRule):
        await mail.send(rule, one)
    elif isinstance(rule, CommandRule):
        await command.run(rule, one)
    else:
        raise NotSent(f"rules of type {rule.type_name} can't send")


def _file(cert: str) -> str:
    """Return the path of a certificate's file; "" of one that is given as text, or not at all."""
    return "" if is_pem(cert) else os.path.expanduser(cert)  # noqa: PTH111 - Path's raises


def _without_secrets(rule: Rule, words: str) -> str:
    for name in rule.secret_fields():
        if secret := getattr(rule, name).get_secret_value():
            words = words.replace(secret, "…")
    return " ".join("".join(one if one.isprintable() else " " for one in words).split())[:WORDS_CHARS]
