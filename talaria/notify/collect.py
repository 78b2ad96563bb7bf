"""Makes messages of what has happened: one for each rule and recipient, with a count of what is alike."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from blocks.rule import EmailRule, Rule
from transfer.happenings import Happening
from transfer.ledger import Ledger

SUMS = ("delivered", "warnings", "already", "rejected", "skipped", "unsent", "bytes")
LAST = (
    "failures",
    "since",
    "days",
    "percent",
    "free",
    "size",
    "late_s",
    "whose",
    "units",
    "node",
)  # of what is alike, the last counts
SHOWN = 5  # dispatches that an entry names
SHOWN_PATHS = 20
MOST_ENTRIES = 200  # of one message; what is beyond is counted in the last one
OTHERS = "others"
TAKEN = 500  # happenings at once
logger = logging.getLogger("talaria.notify")


def collect(ledger: Ledger, rules: Iterable[Rule], contacts: Mapping[str, str], broken: Collection[str] = ()) -> int:
    """Take what has happened and put it into messages, all in one transaction; return how much was taken.

    Args:
        contacts: e-mail addresses of contacts, by `target/NAME` and `source/NAME`.
        broken: names of rules that can't be loaded: what has happened is kept for them, up to a number.

    Raises:
        Overtaken: another process has collected meanwhile; nothing is taken then.
    """
    rules, found, kept = list(rules), ledger.happenings.waiting(TAKEN), ledger.messages.keeping()
    known = {rule.name for rule in rules}
    gone = kept - known - set(broken)  # removed while they could not be loaded
    if not found and not kept & known and not gone:
        return 0
    with ledger.together():
        for name in gone:
            ledger.messages.drop(name)
        mine = ledger.happenings.take(found)
        lost = {name: ledger.messages.keep(name, mine) for name in broken}
        groups: dict[tuple[str, str], tuple[Rule, list[Happening]]] = {}
        for rule in rules:
            earlier = ledger.messages.take_up(rule.name) if rule.name in kept else ()
            for one in (*earlier, *mine):
                for recipient in recipients(rule, one, contacts) if rule.hears(one.event, one.about) else ():
                    groups.setdefault((rule.name, recipient), (rule, []))[1].append(one)
        for (name, recipient), (rule, happened) in groups.items():
            message = ledger.messages.collecting(name, recipient, rule.every_s, rule.group_s)
            for one in happened:
                add(message.body, one, paths=rule.paths)
            ledger.messages.save(message)
    for name, count in lost.items():
        if count:
            logger.warning(
                "rule %s can't be loaded: %d happenings more than are kept for it are forgotten", name, count
            )
    return len(found)


def recipients(rule: Rule, one: Happening, contacts: Mapping[str, str]) -> Iterator[str]:
    """Yield who hears of something by a rule: addresses of an e-mail rule, "" for what has one destination."""
    if not isinstance(rule, EmailRule):
        yield ""
        return
    kind = "target" if one.about.get("target") else "source"
    contact = contacts.get(f"{kind}/{one.about.get(kind)}", "")
    yield from dict.fromkeys([*rule.to, *([contact] if rule.contact and contact else [])])


def add(body: dict[str, Any], one: Happening, *, paths: bool) -> None:
    """Add something that has happened to what a message says.

    Args:
        paths: whether it may name paths, and quote sentences that do.
    """
    about, entries = one.about, body.setdefault("entries", {})
    kind = next((key for key in ("target", "source", "of") if about.get(key)), "of")
    name, cause = str(about.get(kind) or ""), str(about.get("cause") or "")
    key = f"{one.event}|{kind}|{name}|{cause}|{about.get('whose') or about.get('node', '')}"
    if key not in entries and len(entries) >= MOST_ENTRIES:
        key, name, cause = f"{one.event}|{OTHERS}", OTHERS, ""
    entry: dict[str, Any] = entries.setdefault(
        key, {"event": one.event, kind: name, "cause": cause, "count": 0, "first": one.time, "last": one.time}
    )
    entry["count"] += 1
    entry["first"], entry["last"] = min(entry["first"], one.time), max(entry["last"], one.time)
    for sum_ in SUMS:
        if sum_ in about:
            entry[sum_] = entry.get(sum_, 0) + about[sum_]
    entry |= {fact: about[fact] for fact in LAST if about.get(fact) is not None}
    if about.get("run"):
        runs = entry.setdefault("dispatches", [])
        if len(runs) < SHOWN:
            runs.append({"run": about["run"], "dispatch": about.get("dispatch", "")})
    words = str(about.get("words") or "")
    if words and "words" not in entry and (paths or about.get("plain")):
        entry["words"] = words
    if paths and about.get("paths"):
        known = entry.setdefault("paths", [])
        known += [path for path in about["paths"] if path not in known][: SHOWN_PATHS - len(known)]
