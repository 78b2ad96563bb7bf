"""Messages in words, and as JSON. Nothing is in them but what was collected: names, counts, times, ids."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from transfer.messages import StoredMessage

TIMES = ("first", "last", "since")  # of an entry, in seconds since the epoch
WHOSE = {
    "peer": "shown by it",
    "own": "shown to it by us",
    "server": "of our front door",
    "listener": "shown by its listener",
    "authority": "of the authority that is trusted to vouch for it (ca_cert)",
    "senders": "of the authority that is trusted to vouch for its senders (ca_cert)",
}
CAUSES = {
    "outage": "it does not answer, breaks off, or is busy: this may pass by itself",
    "refused": "settings, a password, a certificate or a place are not accepted: somebody must change something",
    "rejected": "single items were rejected; the others are not held up",
    "script": "everything arrived, but the target's script failed",
    "unexpected": "an unexpected error: the run's log has it",
}
# By event: what happened to one, to several.
HAPPENED = {
    "dispatch.failed": ("a dispatch failed", "dispatches failed"),
    "dispatch.partial": ("a dispatch arrived in part", "dispatches arrived in part"),
    "dispatch.delivered": ("a dispatch was delivered", "dispatches were delivered"),
    "dispatch.late": ("a dispatch is late", "dispatches are late"),
    "target.down": ("does not answer", "does not answer, again and again"),
    "target.up": ("answers again", "answers again"),
    "source.stuck": ("is stuck", "is stuck"),
    "certificate.expires": ("a certificate expires", "a certificate expires"),
    "disk.low": ("the disk is low", "the disk is low"),
}
ORDER = ("disk.low", "source.stuck", "target.down", "dispatch.failed", "dispatch.partial", "dispatch.late",
         "certificate.expires", "target.up", "dispatch.delivered")  # fmt: skip
ID_CHARS = 10
TEST = "This is a test of the rule {rule}: nothing has happened."


@dataclass(frozen=True)
class Letter:
    """A message as it is sent.

    Attributes:
        id: the same in every try, so that a receiver can drop what it has already.
        recipient: as in `StoredMessage`.
        document: for programs.
    """

    id: str
    rule: str
    recipient: str
    subject: str
    text: str
    document: dict[str, Any]


def letter(one: StoredMessage, home: str, host: str, *, test: bool = False) -> Letter:
    """Return a message in words.

    Args:
        home: the name of the state directory, or of the ledger that several hosts share.
        host: this machine's name.
    """
    entries = sorted(
        one.body.get("entries", {}).values(), key=lambda entry: (_place(entry), -entry["count"], name_of(entry))
    )
    # Each recipient is numbered from 1, and again once a rule was removed; what is told is new, and stays after a try.
    told = hashlib.sha256(json.dumps(one.body, sort_keys=True).encode()).hexdigest()[:ID_CHARS]
    number = f"test-{one.made:.3f}" if test else f"{one.number}-{told}"
    lines = [_line(entry) for entry in entries] or [TEST.format(rule=one.rule)]
    subject = _subject(entries) if entries else f"test of the rule {one.rule}"
    text = "\n\n".join([*lines, f"Rule {one.rule} of Talaria on {host}. `talaria notify show {one.rule}` shows it."])
    document = {
        "type": "talaria.message",
        "id": f"{home}-{one.rule}-{number}",
        "rule": one.rule,
        "host": host,
        "time": _time(one.made),
        "test": test,
        "text": f"Talaria on {host}: {subject}",
        "events": [_document(entry) for entry in entries],
    }
    return Letter(str(document["id"]), one.rule, one.recipient, f"[Talaria {host}] {subject}", text + "\n", document)


def name_of(entry: dict[str, Any]) -> str:
    """Return the name of what an entry is about: a target, a source, or a part of this machine."""
    return str(entry.get("target") or entry.get("source") or entry.get("of") or "")


def _subject(entries: list[dict[str, Any]]) -> str:
    first = entries[0]
    cause = f" ({first['cause']})" if first["cause"] else ""
    more = f", and {len(entries) - 1} more" if len(entries) > 1 else ""
    return f"{name_of(first)}: {_what(first)}{cause}{more}"


def _what(entry: dict[str, Any]) -> str:
    event = str(entry["event"])
    one, several = HAPPENED.get(event, (event, event))
    if event.startswith("dispatch."):
        return one if entry["count"] == 1 else f"{entry['count']} {several}"
    if "days" in entry:  # of one that is known only since it has expired, 0 as well
        days = entry["days"]
        return f"{one} in {days} day{'s' if days > 1 else ''}" if days else f"{one} today, or has expired"
    if "percent" in entry:
        return f"{one}: {entry['percent']} % is free"
    return one if entry["count"] == 1 else several


def _line(entry: dict[str, Any]) -> str:
    when = _time(entry["first"])
    if entry["last"] - entry["first"] >= 1:
        when = f"{when} to {_time(entry['last'])}"
    parts = [f"{name_of(entry)}: {_what(entry)} ({when})."]
    if entry["cause"]:
        parts.append(f"Cause: {entry['cause']}: {CAUSES.get(entry['cause'], '')}.")
    counts = [
        f"{entry[key]} {key}" for key in ("delivered", "warnings", "already", "rejected", "unsent") if entry.get(key)
    ]
    if counts:
        parts.append(f"Items: {', '.join(counts)}.")
    if entry.get("late_s"):
        parts.append(f"Late is what has not ended {entry['late_s']} s after it was to begin, or was asked for again.")
    if entry.get("node"):
        parts.append(f"It is its node {entry['node']}.")
    if entry.get("whose"):
        parts.append(f"The certificate is {WHOSE.get(entry['whose'], entry['whose'])}.")
    if entry.get("words"):
        parts.append(f"It says: {entry['words']}")
    if entry.get("paths"):
        parts.append("Paths: " + ", ".join(entry["paths"]))
    runs = [one["run"] for one in entry.get("dispatches", ())]
    if runs:
        rest = entry["count"] - len(runs)
        parts.append(f"Runs: {', '.join(runs)}{f' and {rest} more' if rest > 0 else ''} (`talaria jobs show RUN`).")
    return "\n  ".join(parts)


def _document(entry: dict[str, Any]) -> dict[str, Any]:
    return entry | {key: _time(entry[key]) for key in TIMES if entry.get(key)}


def _place(entry: dict[str, Any]) -> int:
    return ORDER.index(entry["event"]) if entry["event"] in ORDER else len(ORDER)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
