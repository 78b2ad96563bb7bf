"""Rules that write to people: listed, shown, applied, removed and tested."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from blocks import RULES, Rule
from blocks.named import check_email
from blocks.rule import CommandRule, EmailRule, RuleEvent
from talaria.notify.command import allowed
from talaria.notify.errors import NotSent
from talaria.notify.sending import send
from talaria.notify.words import letter
from talaria.service import Office, recorded
from talaria.service.fields import field_facts
from talaria.targetfile import action_for, all_values_of, differing, entry, made_of, values_of
from tasks.documents import Broken
from tasks.names import type_of
from tasks.rules import SAVED_RULES
from tasks.sources.saved import KEPT
from tasks.targets import TARGETS
from transfer.errors import Misconfigured
from transfer.home import Home, host_name
from transfer.ledger import Ledger
from transfer.messages import OPEN, StoredMessage

SHOWN = 20  # messages of a rule
PAUSING = ("resumed", "paused")


async def rule_types(office: Office | None = None) -> dict[str, Any]:
    """Return the types of rule with their fields, and the events that rules may hear of."""
    types = {name: {"fields": field_facts(cls)} for name, cls in RULES.items()}
    return {"types": types, "events": [str(event) for event in RuleEvent]}


async def list_rules(office: Office) -> dict[str, Any]:
    """Return all rules, each with its last message; one whose settings are not valid with the reason."""
    found = await SAVED_RULES.all(office.client, used=None)  # with secrets: of a webhook's URL its host is shown
    return {"rules": await asyncio.to_thread(_listed, office.home, found)}


def _listed(home: Home, found: list[Rule | Broken]) -> list[dict[str, Any]]:
    with Ledger(home.ledger) as ledger:
        counts = ledger.messages.counts()
        rows = []
        for one in found:
            last = ledger.messages.newest(one.name, 1)
            waiting = counts.get((one.name, OPEN), 0) + counts.get((one.name, "late"), 0)
            if isinstance(one, Broken):
                values: dict[str, Any] = {"type": one.type_name}
                known: dict[str, Any] = {"broken": one.reason, "enabled": None, "leads_to": ""}
            else:
                values = values_of(one, secrets=True)
                known = {"broken": None, "enabled": one.enabled, "leads_to": one.leads_to}
            about = {"waiting": waiting, "last": _message(last[0]) if last else None}
            rows.append({"name": one.name, **values, **known, **about})
    return rows


async def show_rule(office: Office, name: str) -> dict[str, Any]:
    """Return a rule's settings, secrets masked, and its newest messages."""
    rule = await load_rule(office, name)
    unknown = (await unknown_to(office, [rule]))[rule.name]
    values = {"name": rule.name} | all_values_of(rule)
    return values | ({"note": unknown} if unknown else {}) | {"messages": await messages_of(office, rule.name)}


async def load_rule(office: Office, name: str) -> Rule:
    """Return a rule, secrets masked."""
    (rule,) = await SAVED_RULES.load(office.client, [name], secrets=False)
    return rule


async def unknown_to(office: Office, rules: Iterable[Rule]) -> dict[str, str]:
    """Return, by the name of each rule, what it is to hear of and is not there, in words; "" for nothing."""
    rules, known = list(rules), dict[str, set[str]]()
    for kind, saved in (("target", TARGETS), ("source", KEPT)):
        wanted = {name for rule in rules for name in rule.named_plainly(kind)}
        known[kind] = {str(one.name) for one in await saved.documents(office.client, wanted)} if wanted else set()
    said = {}
    for rule in rules:
        lacks = [f"{kind} named {name}" for kind in known for name in rule.named_plainly(kind) - known[kind]]
        said[rule.name] = f"there is no {' and no '.join(sorted(lacks))}" if lacks else ""
    return said


async def messages_of(office: Office, name: str) -> list[dict[str, Any]]:
    """Return the newest messages of a rule."""

    def read() -> list[dict[str, Any]]:
        with Ledger(office.home.ledger) as ledger:
            return [_message(one) for one in ledger.messages.newest(name, SHOWN)]

    return await asyncio.to_thread(read)


def _message(one: StoredMessage) -> dict[str, Any]:
    return {
        "recipient": one.recipient,
        "number": one.number,
        "state": one.state,
        "made": _time(one.made),
        "due": _time(one.due) if one.state == OPEN else None,
        "ended": _time(one.ended),
        "tries": one.tries,
        "count": sum(entry["count"] for entry in one.body.get("entries", {}).values()),
        "error": one.error or None,
    }


def _time(seconds: float) -> str | None:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if seconds else None


async def apply_rules(
    office: Office, rules: dict[str, Any], dry_run: bool = False, replace: bool = False, prune: bool = False
) -> dict[str, Any]:
    """Create or update rules; all of them or, if one is wrong, none. Arguments as of `apply_targets`."""
    wanted = made_of(rules, _made, "rule")
    there = await SAVED_RULES.all(office.client, used=wanted)
    actions = {name: action_for(rule, there, replace=replace) for name, rule in wanted.items()}
    old = [one for one in there if prune and one.name not in wanted]
    for name, action in actions.items() if not dry_run else ():
        if action != "unchanged":
            before = next((one for one in there if one.name == name and isinstance(one, Rule)), None)
            await save_rule(office, wanted[name], before, action)
    for one in old if not dry_run else ():
        await _remove(office, f"{one.type_name}/{one.name}")
    actions |= {one.name: "removed" for one in old}
    notes = await unknown_to(office, wanted.values())
    done = [{"name": name, "action": action, "note": notes.get(name, "")} for name, action in actions.items()]
    return {"dry_run": dry_run, "rules": done}


async def save_rule(office: Office, rule: Rule, before: Rule | None, action: str) -> None:
    """Save a rule; those of other types that have its name are removed, unless it is only paused or resumed.

    It is saved before they are removed: at every moment there is a rule of this name, so that what happens meanwhile
    is told. As long as there are two, the newer one counts (`talaria.notify.notifier`).

    Args:
        before: what it was.
        action: `created`, `updated`, `replaced`, `paused` or `resumed`.
    """
    await rule.asave(rule.name, overwrite=True, client=office.client)
    for document in await SAVED_RULES.documents(office.client, [rule.name]):
        if type_of(document) != rule.type_name and action not in PAUSING:
            await office.client.delete_block_document(document.id)
            await recorded.rule_changed(office, rule.name, "removed", [])
    await _hurry(office, rule)
    await recorded.rule_changed(office, rule.name, action, differing(rule, before))


async def enable_rule(office: Office, name: str, enabled: bool = True) -> dict[str, Any]:
    """Let a rule write again, or pause it: what happens meanwhile is told to nobody by it."""
    (rule,) = await SAVED_RULES.load(office.client, [name])
    before = rule.model_copy()
    rule.enabled = enabled
    action = PAUSING[not enabled]
    await save_rule(office, rule, before, action)
    return {"name": rule.name, "action": action}


async def problems_of(office: Office, rule: Rule) -> list[str]:
    """Return why a rule that is about to be saved can't be used, each reason a sentence."""
    try:
        _check(rule)
    except Misconfigured as exc:
        return [exc.message.removeprefix(f"rule {rule.name}: ")]
    return []


def _made(name: str, values: Any) -> Rule:
    rule = entry(Rule, RULES, name, values)
    _check(rule)
    return rule


def _check(rule: Rule) -> None:
    """Raise Misconfigured if a rule would run what this machine does not allow."""
    if isinstance(rule, CommandRule):
        try:
            allowed(rule.command)
        except NotSent as exc:
            raise Misconfigured(f"rule {rule.name}: {exc}") from exc


async def _hurry(office: Office, rule: Rule) -> None:
    """Let messages that wait go out as the rule is now: those that could not be sent, at once."""

    def hurry() -> None:
        with Ledger(office.home.ledger) as ledger:
            ledger.messages.hurry(rule.name, rule.every_s, rule.group_s)

    await asyncio.to_thread(hurry)


async def remove_rule(office: Office, name: str) -> dict[str, Any]:
    """Remove a rule, and what it has not sent yet."""
    return {"name": await _remove(office, name), "action": "removed"}


async def _remove(office: Office, name: str) -> str:
    removed = await SAVED_RULES.remove(office.client, name)

    def drop() -> None:
        with Ledger(office.home.ledger) as ledger:
            ledger.messages.drop(removed)

    await asyncio.to_thread(drop)
    await recorded.rule_changed(office, removed, "removed", [])
    return removed


async def test_rule(office: Office, name: str, to: str = "") -> dict[str, Any]:
    """Send a test message by a saved rule, from the server's machine, at once; it is tried once.

    Args:
        to: of an e-mail rule, the address that gets it instead of those of the rule.
    """
    (rule,) = await SAVED_RULES.load(office.client, [name])
    return await test_unsaved(office, rule, to)


async def test_unsaved(office: Office, rule: Rule, to: str = "") -> dict[str, Any]:
    """Send a test message by a rule that need not be saved. Arguments and answer as of `test_rule`."""
    recipients = [""]
    if isinstance(rule, EmailRule):
        recipients = [check_email(to)] if to else rule.to
        if not recipients:
            raise Misconfigured(f"rule {rule.name} writes to contacts only: say to whom the test goes")
    elif to:
        raise ValueError(f"rule {rule.name} is no e-mail rule: it has one destination")
    tries = [_tried(office, rule, recipient) for recipient in recipients]
    found = await asyncio.gather(*tries)
    return {"name": rule.name, "ok": all(one["ok"] for one in found), "recipients": list(found)}


async def _tried(office: Office, rule: Rule, recipient: str) -> dict[str, Any]:
    message = StoredMessage(rule.name, recipient, 0, made=time.time())
    detail = ""
    try:
        await send(rule, letter(message, office.home.identity()[:8], host_name(), test=True))
    except NotSent as exc:
        detail = str(exc)
    return {"recipient": recipient, "ok": not detail, "detail": detail}
