"""The notifier: collects what happens into messages, and sends those that are due, in the server process.

It looks into the ledger once a second, and asks Prefect for rules only when there is something to do. Several hosts
that share a ledger each have one: who takes a happening, or claims a message, is alone with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx

from transfer.database import LOST
from transfer.home import Home, host_name
from transfer.ledger import Ledger
from transfer.messages import FAILED, OPEN, PAUSED, SENT, Overtaken, StoredMessage

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

    from blocks.rule import Rule

LOOK_S = 1.0  # between two looks into the ledger
WATCH_S = 60.0  # between two looks for what nobody reports
CONTACTS_S = 30.0  # how long contacts are known, where nothing says that they have changed
CLAIM_S = 180.0  # of a message: longer than one try may take
AT_ONCE = 8  # messages that are being sent
FIRST_S, LONGEST_S = 15.0, 3600.0  # before a second try, doubled with each one, and at most
GIVE_UP_S = 3 * 86_400.0  # after the first try of a message, which may have collected, or lain there, for longer
TRIES = 5  # at a transaction that others overtake
STOP_S = 5.0  # for messages that are on their way, at the end
RULES_FILTER = {"block_schemas": {"block_capabilities": {"all_": ["talaria-rule"]}}, "limit": 1}
logger = logging.getLogger("talaria.notify")


class Notifier:
    """Writes to people until it is cancelled.

    Args:
        raw: a client of Prefect's API that needs no import of Prefect's own.
        client: returns the client that does.
        ready: returns whether Prefect's server answers.
        certificate: file of the front door's certificate, "" for none.
        saved: returns another number when something saved was changed through this process.
    """

    def __init__(
        self,
        home: Home,
        raw: httpx.AsyncClient,
        client: Callable[[], Awaitable[PrefectClient]],
        ready: Callable[[], bool],
        certificate: str = "",
        saved: Callable[[], int] = int,
    ) -> None:
        self.home, self.raw, self.client, self.ready, self.certificate = home, raw, client, ready, certificate
        self.saved, self._contacts_of = saved, 0
        self._sending: set[asyncio.Task[None]] = set()  # and the step that is under way
        self._watching: asyncio.Task[None] | None = None
        self._ledger: Ledger | None = None
        self._contacts: dict[str, str] = {}
        self._broken: dict[str, str] = {}  # rules whose settings are not valid, by name
        self._contacts_at = self._watched_at = -WATCH_S
        self._said = ""

    async def run(self) -> None:
        """Collect and send, for ever; whatever goes wrong is tried again."""
        while not self.ready():  # noqa: ASYNC110 - it may be another process's
            await asyncio.sleep(LOOK_S)
        try:
            while True:
                try:
                    step = asyncio.create_task(self._step())
                    self._sending.add(step)  # whoever stops us waits for it: it may be at the ledger
                    step.add_done_callback(self._sending.discard)
                    await asyncio.shield(step)
                    self._said = ""
                except (*LOST, httpx.HTTPError) as exc:
                    self._say(f"{type(exc).__name__}: {exc}")
                except Exception:  # whatever it is, the next look must come
                    logger.exception("messages wait: an unexpected error")
                    await asyncio.sleep(LONGEST_S / 60)
                await asyncio.sleep(LOOK_S)
        finally:
            left = self._sending | ({self._watching} if self._watching else set())
            if left:
                await asyncio.wait(left, timeout=STOP_S)
            if self._ledger is not None:
                self._ledger.close()

    def _opened(self) -> Ledger:
        ledger = Ledger(self.home.ledger)
        ledger.messages.release(self.home.identity())  # of one that was killed: there is one of this state directory
        return ledger

    def _say(self, words: str) -> None:
        if words != self._said:
            logger.warning("messages wait: %s", words)
        self._said = words

    async def _step(self) -> None:
        """Look once."""
        if self._ledger is None:
            self._ledger = await asyncio.to_thread(self._opened)
        ledger = self._ledger
        happened = await asyncio.to_thread(ledger.happenings.waiting, 1)
        due = len(self._sending) <= AT_ONCE and await asyncio.to_thread(ledger.messages.due)
        watches = time.monotonic() - self._watched_at >= WATCH_S
        if not (happened or due or watches):
            return
        rules = await self._rules()
        if watches:
            self._watched_at = time.monotonic()
            if rules and (self._watching is None or self._watching.done()):
                self._watching = asyncio.create_task(self._watch(ledger, rules))
        if happened or watches:
            await self._collect(ledger, rules)
        room = AT_ONCE + 1 - len(self._sending)  # this step is among them
        for one in await asyncio.to_thread(ledger.messages.claimed, self.home.identity(), CLAIM_S, room):
            task = asyncio.create_task(self._send(ledger, one, rules))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _rules(self) -> list[Rule]:
        """Return the saved rules, with their secrets; Prefect's client and our types are loaded if there are any."""
        answer = await self.raw.post("/block_documents/filter", json=RULES_FILTER)
        if not answer.raise_for_status().json():
            self._broken = {}
            return []
        client = await self.client()
        from blocks.rule import Rule
        from tasks.rules import SAVED_RULES

        said = set(self._broken)
        # While one is replaced by one of another type, there are two: what happens then is told once, by the newer.
        found = [*{one.name: one for one in await SAVED_RULES.all(client, used=None)}.values()]
        self._broken = {one.name: one.reason for one in found if not isinstance(one, Rule)}
        for name in self._broken.keys() - said:
            logger.warning("rule %s: %s", name, self._broken[name])
        return [one for one in found if isinstance(one, Rule)]

    async def _watch(self, ledger: Ledger, rules: list[Rule]) -> None:
        """Look for what nobody reports, beside the messages: what is silent, or an error, holds up none of them."""
        from talaria.notify.lookout import look

        try:
            await look(await self.client(), self.home, ledger, rules, self.certificate)
        except (*LOST, httpx.HTTPError) as exc:
            logger.warning("what nobody reports can't be looked for now: %s: %s", type(exc).__name__, exc)
        except Exception:
            logger.exception("what nobody reports can't be looked for: an unexpected error")

    async def _collect(self, ledger: Ledger, rules: list[Rule]) -> None:
        from talaria.notify.collect import collect

        contacts = await self._known_contacts() if any(getattr(rule, "contact", False) for rule in rules) else {}
        taken, overtaken = True, 0
        while taken and overtaken < TRIES:
            try:
                taken = bool(await asyncio.to_thread(collect, ledger, rules, contacts, self._broken))
            except Overtaken:
                overtaken += 1

    async def _known_contacts(self) -> dict[str, str]:
        """Return the contacts of targets and sources, by `target/NAME` and `source/NAME`."""
        saved = self.saved()
        if saved != self._contacts_of or time.monotonic() - self._contacts_at >= CONTACTS_S:
            from blocks import Source, Target
            from tasks.sources.saved import KEPT
            from tasks.targets import TARGETS

            client = await self.client()
            found = [*await TARGETS.all(client), *await KEPT.all(client)]
            known = [one for one in found if isinstance(one, Source | Target) and one.contact]
            self._contacts = {f"{one.word}/{one.name}": one.contact for one in known}
            self._contacts_at, self._contacts_of = time.monotonic(), saved
        return self._contacts

    async def _send(self, ledger: Ledger, one: StoredMessage, rules: list[Rule]) -> None:
        """Send a message that is claimed, and note how that ended."""
        from talaria.notify.errors import NotSent
        from talaria.notify.sending import send
        from talaria.notify.words import letter

        state, error, after = SENT, "", 0.0
        rule = next((rule for rule in rules if rule.name == one.rule), None)
        if rule is None and one.rule not in self._broken:
            await asyncio.to_thread(ledger.messages.drop, one.rule)  # it was removed
            return
        try:
            if rule is None or not rule.enabled:
                state, error = OPEN, self._broken.get(one.rule, PAUSED)
            elif not rule.writes_to(one.recipient):
                state, error = FAILED, "the rule does not write to this recipient any more"
            else:
                await send(rule, letter(one, self.home.identity()[:8], host_name()))
        except NotSent as exc:
            state, error, after = OPEN, str(exc), exc.after_s
        except Exception as exc:
            logger.exception("message %d of rule %s: an unexpected error", one.number, one.rule)
            state, error = OPEN, f"unexpected {type(exc).__name__}"
        again = time.time() + max(after, min(LONGEST_S, FIRST_S * 2 ** min(one.tries - 1, 20)))
        if state == OPEN and time.time() - one.made > GIVE_UP_S:
            state = FAILED
        if error:
            what = (
                "is given up"
                if state == FAILED
                else f"is tried again at {time.strftime('%H:%M:%S', time.gmtime(again))} UTC"
            )
            logger.warning("message %d of rule %s %s: %s", one.number, one.rule, what, error)
        with suppress(*LOST):  # then the claim ends by itself, and it is sent again
            await asyncio.to_thread(ledger.messages.settle, one, state, error, again)
