"""Lets dispatches rest from their beginning that can't be tried now: else the worker takes each only for that.

A run whose targets all have an open breaker, or a line of others before it, is created in the state of one that rests.
To accept it is all that it costs, and who asked for it reads at once what it waits for.
"""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from talaria.engine import hosts
from talaria.engine.asgi import Application, Message, Receive, Send, again, read, with_body
from talaria.settings import POOL
from transfer import live
from transfer.errors import DispatchError
from transfer.home import Home
from transfer.ledger import Ledger

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import State

    from tasks.dispatch.waiting import UnreadRest

SOON_S = 30.0  # what looks again sooner is left to the worker: it has no event of when such a run is due
KNOWN_S = 30.0  # for which the deployment of a run is known: somebody may change it
_rests: ContextVar[bool] = ContextVar("created resting", default=False)
_CREATES = re.compile(r"/api/deployments/([0-9a-fA-F-]{32,36})/create_flow_run/?")


class Resting:
    """Prefect's application; a dispatch that can't be tried now rests when it is created.

    Where several hosts share a ledger, the workers look: what a path means is known where its files are.

    Args:
        client: returns a client of the application.
        mark: returns a mark that changes when a saved target does; "" if that is not known.
    """

    def __init__(
        self, app: Application, home: Home, client: Callable[[], Awaitable[PrefectClient]], mark: Callable[[], str]
    ) -> None:
        self.app, self._home, self._client, self._mark = app, home, client, mark
        self._known: dict[UUID, tuple[float, dict[str, Any] | None]] = {}  # parameters of deployments, until when

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        creates = _CREATES.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if creates is None or hosts.several():
            await self.app(scope, receive, send)
            return
        body = await read(receive, send, "runs")
        if body is None:
            return
        asked = _asked(body)
        rests = await self._look(creates[1], asked) if asked else None
        if asked is None or rests is None:
            await self.app(scope, again(body, receive), send)
            return
        state = rests[1].model_dump(mode="json", include={"type", "name", "message", "state_details"})
        body = json.dumps(asked | {"state": state}).encode()
        headers = [(key, value) for key, value in scope["headers"] if key != b"accept-encoding"]
        answer: list[Message] = []

        async def kept(message: Message) -> None:
            answer.append(message)

        token = _rests.set(True)
        try:
            await self.app(with_body({**scope, "headers": headers}, body), again(body, receive), kept)
        finally:
            _rests.reset(token)
        if answer and answer[0].get("status") == 201:
            await self._note(b"".join(one.get("body", b"") for one in answer[1:]), rests[0])
        for message in answer:
            await send(message)

    async def _look(self, deployment: str, asked: dict[str, Any]) -> tuple[UnreadRest, State[Any]] | None:
        """Return what lets a run rest that is asked for, and its state; None if a worker has to look at it."""
        from tasks.dispatch import waiting

        try:
            known = await asyncio.to_thread(self._untried)
            if not known or not waiting.may_rest(asked["parameters"], known):
                return None
            client = await self._client()
            given = await self._parameters(client, UUID(deployment))
            if given is None:
                return None
            with Ledger(self._home.ledger) as ledger:
                rests = await waiting.ahead(client, self._home, ledger, given | asked["parameters"], mark=self._mark)
                state = rests.state(ledger) if rests else None
        except _lost():
            return None
        until = state.state_details.scheduled_time if state else None
        soon = datetime.now(UTC) + timedelta(seconds=SOON_S)
        return (rests, state) if rests and state and until and until > soon else None

    def _untried(self) -> set[str]:
        """Return the names of the targets to which nothing is sent that comes now."""
        from tasks.dispatch import waiting

        with Ledger(self._home.ledger) as ledger:
            return waiting.untried(ledger)

    async def _parameters(self, client: PrefectClient, deployment: UUID) -> dict[str, Any] | None:
        """Return the parameters that a deployment of ours gives a dispatch; None if it is another."""
        from talaria.engine.table import FLOWS

        now = time.monotonic()
        known = self._known.get(deployment)
        if known is None or known[0] < now:
            found = await client.read_deployment(deployment)
            ours = (found.work_pool_name, found.entrypoint) == (POOL, FLOWS["dispatch"][1])
            known = now + KNOWN_S, (dict(found.parameters) if ours else None)
            self._known = {key: one for key, one in self._known.items() if one[0] >= now} | {deployment: known}
        return known[1]

    async def _note(self, created: bytes, rests: UnreadRest) -> None:
        """Let a run that has been created be called; where that can't be noted, it comes back by itself."""
        from prefect.states import AwaitingRetry

        with suppress(*_lost(), KeyError):
            run_id = UUID(json.loads(created)["id"])
            with Ledger(self._home.ledger) as ledger:
                state = await asyncio.to_thread(rests.state, ledger, str(run_id))
                over = await asyncio.to_thread(rests.is_over, ledger, str(run_id))
                if over:  # meanwhile, and it may not have been called
                    now: State[Any] = AwaitingRetry(scheduled_time=datetime.now(UTC), message=state.message)
                    await (await self._client()).set_flow_run_state(run_id, now, force=True)


def expect_what_rests_now() -> None:
    """Let what is created resting have its place in lists of runs, by time, where any other one would have it.

    Prefect takes the time of a run's first state for the one at which it is expected to start.
    """
    # A private matter of Prefect's: tests/engine/test_resting.py fails when it changes.
    from prefect.server.orchestration import global_policy

    theirs: Any = global_policy.SetExpectedStartTime.before_transition

    async def before_transition(self: Any, context: Any) -> None:
        if _rests.get() and context.run.expected_start_time is None:
            context.run.expected_start_time = datetime.now(UTC)
        await theirs(self, context)

    global_policy.SetExpectedStartTime.before_transition = before_transition  # type: ignore[method-assign]


def _asked(body: bytes) -> dict[str, Any] | None:
    """Return what is asked for; None unless it is a run that is to begin at once, and shows nobody its plan."""
    try:
        document: dict[str, Any] = json.loads(body)
        state = document.get("state") or {}
        time = (state.get("state_details") or {}).get("scheduled_time")
        at_once = not time or datetime.fromisoformat(time) <= datetime.now(UTC)
        plain = state.get("type", "SCHEDULED") == "SCHEDULED" and state.get("name") in (None, "Scheduled")
        shows = (document.get("labels") or {}).get(live.SHOW_PLAN)
        return document if plain and at_once and not shows and isinstance(document["parameters"], dict) else None
    except (ValueError, AttributeError, TypeError, KeyError):
        return None  # Prefect's to refuse


def _lost() -> tuple[type[Exception], ...]:
    """Return the errors after which a run is left to the worker, or to its time."""
    import httpx
    from prefect.exceptions import PrefectException

    return DispatchError, OSError, ValueError, sqlite3.Error, httpx.HTTPError, PrefectException
