"""Messages to people, in the ledger's database: collected, due at a time, sent once, by whichever host is first.

A message collects what happens until it is due, and does not change any more once it was tried. Of one rule and
recipient, a later message waits until the earlier one has ended. Who sends one claims it for a while; a claim of a
process that was killed ends by itself, or when that process's successor begins.

A rule that can't be loaded has one row more, number 0: what has happened meanwhile, until the rule can say what it
hears of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transfer.database import Database
from transfer.happenings import Happening

TABLES = """
CREATE TABLE IF NOT EXISTS messages (
  rule TEXT NOT NULL, recipient TEXT NOT NULL, number BIGINT NOT NULL, state TEXT NOT NULL, body TEXT NOT NULL,
  version BIGINT NOT NULL, made DOUBLE PRECISION NOT NULL, due DOUBLE PRECISION NOT NULL, tries BIGINT NOT NULL,
  ended DOUBLE PRECISION NOT NULL, error TEXT NOT NULL, claimant TEXT NOT NULL, claimed DOUBLE PRECISION NOT NULL,
  PRIMARY KEY (rule, recipient, number)) WITHOUT ROWID;
"""
OPEN, SENT, FAILED = "open", "sent", "failed"  # states
PAUSED = "the rule is paused"  # the error of a message that waits for that alone: people have asked for it
KEPT = "kept"  # of the row with what has happened while a rule could not be loaded
MOST_KEPT = 1000  # happenings of one such rule, the newest
_KEY = "rule=? AND recipient=? AND number=?"
STEP_S = 1.0  # by which a clock may be set back without a word
_DUE = "(due<=? OR made>?) AND claimed<=?"  # one that is yet to be made is of a clock that was ahead
_COLUMNS = "rule, recipient, number, state, body, version, made, due, tries, ended, error"


class Overtaken(Exception):
    """Another process has changed a message meanwhile: try the whole transaction again."""


@dataclass
class StoredMessage:
    """A message as it is kept.

    Attributes:
        recipient: e-mail address; "" for a rule that has one destination.
        number: of this rule and recipient, from 1.
        body: what it says.
        made: when it began to collect; once it is tried, when that was first.
        due: when it is tried next, in seconds since the epoch.
        ended: when it was sent or given up; 0 before.
        error: why the last try failed.
    """

    rule: str
    recipient: str
    number: int
    state: str = OPEN
    body: dict[str, Any] = field(default_factory=dict)
    version: int = 0
    made: float = 0.0
    due: float = 0.0
    tries: int = 0
    ended: float = 0.0
    error: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        return self.rule, self.recipient, self.number


class Messages:
    """The table of a ledger that is open; as safe to share as that is."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def collecting(self, rule: str, recipient: str, every_s: float, group_s: float) -> StoredMessage:
        """Return the message that collects what happens now; a new one is not saved yet.

        Args:
            every_s: at least between two messages.
            group_s: for how long a new one collects.
        """
        newest = self._newest(rule, recipient)
        if newest is not None and newest.state == OPEN and newest.tries == 0:
            return newest
        now = self._db.time()
        # A time that is yet to come is one of a clock that was ahead, and has been set right since.
        last = (min(newest.ended, now) or newest.due) if newest else 0.0
        due = max(now + group_s, last + every_s) if newest else now + group_s
        return StoredMessage(rule, recipient, newest.number + 1 if newest else 1, made=now, due=due)

    def save(self, one: StoredMessage) -> None:
        """Save what a message has collected, within a block of `writing`.

        Raises:
            Overtaken: another process has saved or tried it meanwhile.
        """
        body = json.dumps(one.body)
        if one.version:
            saved = self._db.execute(
                f"UPDATE messages SET body=?, version=version+1 WHERE {_KEY} AND version=? AND tries=0",  # noqa: S608 - ours
                (body, *one.key, one.version),
            )
        else:
            saved = self._db.execute(
                "INSERT INTO messages VALUES (?,?,?,'open',?,1,?,?,0,0,'','',0) ON CONFLICT DO NOTHING",
                (*one.key, body, one.made, one.due),
            )
        if saved.rowcount != 1:
            raise Overtaken

    def keep(self, rule: str, happened: Iterable[Happening]) -> int:
        """Keep what has happened for a rule that can't be loaded, within a block of `writing`.

        Returns:
            How many happenings were dropped, the oldest, as there is room for `MOST_KEPT` only.

        Raises:
            Overtaken: another process has kept something meanwhile.
        """
        row = self._kept(rule)
        new = [[one.id, one.time, one.event, one.about] for one in happened]
        if not new:
            return 0
        all_ = [*(json.loads(row[0]) if row else ()), *new]
        body = json.dumps(all_[-MOST_KEPT:])
        if row:
            saved = self._db.execute(
                f"UPDATE messages SET body=?, version=version+1 WHERE {_KEY} AND version=?",  # noqa: S608 - ours
                (body, rule, "", 0, row[1]),
            )
        else:
            saved = self._db.execute(
                "INSERT INTO messages VALUES (?,'',0,?,?,1,?,0,0,0,'','',0) ON CONFLICT DO NOTHING",
                (rule, KEPT, body, self._db.time()),
            )
        if saved.rowcount != 1:
            raise Overtaken
        return max(0, len(all_) - MOST_KEPT)

    def keeping(self) -> set[str]:
        """Return the names of the rules for which something is kept."""
        with self._db.reading():
            return {row[0] for row in self._db.execute("SELECT rule FROM messages WHERE state=?", (KEPT,))}

    def take_up(self, rule: str) -> list[Happening]:
        """Return what was kept for a rule, and keep it no longer; within a block of `writing`.

        Raises:
            Overtaken: another process has kept something meanwhile.
        """
        row = self._kept(rule)
        if row is None:
            return []
        gone = self._db.execute(f"DELETE FROM messages WHERE {_KEY} AND version=?", (rule, "", 0, row[1]))  # noqa: S608
        if gone.rowcount != 1:
            raise Overtaken
        return [Happening(*one) for one in json.loads(row[0])]

    def _kept(self, rule: str) -> Any:
        with self._db.reading():
            return self._db.execute(
                f"SELECT body, version FROM messages WHERE {_KEY}",  # noqa: S608 - ours
                (rule, "", 0),
            ).fetchone()

    def claimed(self, claimant: str, seconds: float, limit: int) -> list[StoredMessage]:
        """Claim messages that are due; the first of each rule and recipient.

        Args:
            claimant: who sends them: nobody else tries them within these seconds.
        """
        now = self._db.time()
        with self._db.reading():
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM messages WHERE state='open' AND {_DUE}"  # noqa: S608 - ours
                " AND NOT EXISTS (SELECT 1 FROM messages AS earlier WHERE earlier.rule=messages.rule"
                " AND earlier.recipient=messages.recipient AND earlier.state='open'"
                " AND earlier.number<messages.number) ORDER BY due LIMIT ?",
                (now, now + STEP_S, now, limit),
            ).fetchall()
        mine = []
        for one in map(_message, rows):
            made = min(one.made, now) if one.tries else now
            claim = self._db.execute(
                f"UPDATE messages SET claimant=?, claimed=?, made=?, tries=tries+1, version=version+1 WHERE {_KEY}"  # noqa: S608
                " AND state='open' AND version=?",
                (claimant, now + seconds, made, *one.key, one.version),
            )
            if claim.rowcount == 1:
                one.made = made
                one.tries, one.version = one.tries + 1, one.version + 1
                mine.append(one)
        return mine

    def due(self) -> bool:
        """Return True if a message may have to be sent now."""
        now = self._db.time()
        with self._db.reading():
            row = self._db.execute(
                f"SELECT 1 FROM messages WHERE state='open' AND {_DUE} LIMIT 1",  # noqa: S608 - ours
                (now, now + STEP_S, now),
            ).fetchone()
        return row is not None

    def settle(self, one: StoredMessage, state: str, error: str = "", again: float = 0.0) -> None:
        """Note how a try of a message ended, unless somebody else has claimed it since.

        Args:
            again: when it is tried next, for one that stays open.
        """
        ended = 0.0 if state == OPEN else self._db.time()
        self._db.execute(
            f"UPDATE messages SET state=?, error=?, due=?, ended=?, claimed=0, claimant='', version=version+1"  # noqa: S608
            f" WHERE {_KEY} AND version=?",
            (state, error, again or one.due, ended, *one.key, one.version),
        )

    def release(self, claimant: str) -> None:
        """End the claims of a process that is no more, whose successor we are."""
        self._db.execute("UPDATE messages SET claimed=0, claimant='' WHERE claimant=? AND state='open'", (claimant,))

    def hurry(self, rule: str, every_s: float, group_s: float) -> None:
        """Let what could not be sent be tried at once, and what collects when it may: the rule has changed.

        Args:
            every_s, group_s: of the rule as it is now, as of `collecting`.
        """
        now = self._db.time()
        self._db.execute("UPDATE messages SET due=? WHERE rule=? AND state='open' AND tries>0", (now, rule))
        with self._db.reading():
            rows = self._db.execute(
                "SELECT recipient, number, made, coalesce((SELECT max(earlier.ended) FROM messages AS earlier"
                " WHERE earlier.rule=messages.rule AND earlier.recipient=messages.recipient"
                " AND earlier.number<messages.number), 0) FROM messages WHERE rule=? AND state='open' AND tries=0",
                (rule,),
            ).fetchall()
        for recipient, number, made, last in rows:
            due = max(made + group_s, min(last, now) + every_s if last else 0.0)
            self._db.execute(
                f"UPDATE messages SET due=? WHERE {_KEY} AND tries=0 AND due>?",  # noqa: S608 - ours
                (due, rule, recipient, number, due),
            )

    def drop(self, rule: str) -> None:
        """Forget the messages of a rule that was removed."""
        self._db.execute("DELETE FROM messages WHERE rule=?", (rule,))

    def newest(self, rule: str, limit: int) -> list[StoredMessage]:
        """Return the newest messages of a rule, the last one first."""
        with self._db.reading():
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM messages WHERE rule=? AND number>0 ORDER BY made DESC, number DESC LIMIT ?",  # noqa: S608
                (rule, limit),
            ).fetchall()
        return [_message(row) for row in rows]

    def counts(self) -> dict[tuple[str, str], int]:
        """Return how many messages there are, by rule and state; those that are tried again have the state "late"."""
        late = f"CASE WHEN state='open' AND error NOT IN ('', '{PAUSED}') THEN 'late' ELSE state END"
        with self._db.reading():
            rows = self._db.execute(
                f"SELECT rule, {late}, count(*) FROM messages WHERE number>0 GROUP BY rule, {late}"  # noqa: S608 - ours
            ).fetchall()
        return {(rule, state): int(count) for rule, state, count in rows}

    def prune(self, before: float) -> int:
        """Forget messages that ended before a time (seconds since the epoch), but not the last; return how many."""
        return self._db.execute(
            "DELETE FROM messages WHERE number>0 AND state<>'open' AND ended<?"
            " AND EXISTS (SELECT 1 FROM messages AS later WHERE later.rule=messages.rule"
            " AND later.recipient=messages.recipient AND later.number>messages.number)",
            (before,),
        ).rowcount

    def _newest(self, rule: str, recipient: str) -> StoredMessage | None:
        with self._db.reading():
            row = self._db.execute(
                f"SELECT {_COLUMNS} FROM messages WHERE rule=? AND recipient=? AND number>0"  # noqa: S608 - ours
                " ORDER BY number DESC LIMIT 1",
                (rule, recipient),
            ).fetchone()
        return _message(row) if row else None


def _message(row: Any) -> StoredMessage:
    rule, recipient, number, state, body, *rest = row
    return StoredMessage(rule, recipient, number, state, json.loads(body), *rest)
