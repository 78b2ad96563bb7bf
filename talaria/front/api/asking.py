"""What every route needs: the client's identity, whether it has the role, and the office that does the work."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, Header, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, model_validator
from starlette.types import Receive, Scope, Send

from talaria import __version__
from talaria.front.access import ACTING, SCOPE_KEY, Identity, Role, role_of
from talaria.front.api.answers import ProblemAnswer
from talaria.front.api.errors import Forbidden, answer_to
from talaria.front.changes import ChangeCount
from talaria.front.lasting import LOOK_S, STILL, STREAMS, gone
from talaria.front.subscription import Ended
from talaria.service import Office
from transfer.home import Home
from transfer.validation import is_text, numbers_only

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

    from talaria.front.upstream import Upstream

BEAT_S = 15.0  # between two signs of life in a stream that has nothing to say: proxies close silent ones
KEY_CHARS = 200
NAMES = "paths"  # the field that may hold names that are not UTF-8: what becomes of them is said where they are used
Event = tuple[str, dict[str, Any]] | tuple[str, dict[str, Any], str]  # its name, its data and perhaps its id


@dataclass(frozen=True)
class Reach:
    """How the API reaches what it needs; `app.state.reach`.

    Attributes:
        certificate: file of the front door's certificate, "" for none.
        changes, run_changes: of saved targets and of runs, that go through this process.
    """

    client: Callable[[], Awaitable[PrefectClient]]
    home: Home
    embedded: bool
    url: str
    upstream: Upstream | None = None
    certificate: str = ""
    changes: ChangeCount = field(default_factory=ChangeCount)
    run_changes: ChangeCount = field(default_factory=ChangeCount)

    @property
    def prefect(self) -> Upstream:
        """The Prefect server that subscriptions are made at."""
        if self.upstream is None:
            raise Ended("there is no Prefect server to hear events of")
        return self.upstream

    async def office(self, request: Request, who: Identity) -> Office:
        """Return the office of whoever asks; waits until Prefect answers."""
        return await self._office(who, request.client.host if request.client else "")

    async def office_in(self, scope: MutableMapping[str, Any]) -> Office:
        """Return the office of whoever sends a request that the gate has let in."""
        return await self._office(scope[SCOPE_KEY], (scope.get("client") or ("",))[0])

    async def _office(self, who: Identity, address: str) -> Office:
        return Office(await self.client(), self.home, user=who.name, address=address, embedded=self.embedded)


class RequestBody(BaseModel):
    """The body of a request; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _values(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            if name != NAMES and not is_text(value):
                raise ValueError(
                    f"{name}: holds half of a character (a lone surrogate), as names that are not UTF-8 do"
                )
        return numbers_only(values, cls.model_fields)


def _asked(request: Request) -> Callable[[], Awaitable[Office]]:
    """Return a function that makes the client's Office; it is called only when the request is known to be valid."""
    reach: Reach = request.app.state.reach
    who = asker(request)

    async def service() -> Office:
        return replace(await reach.office(request, who), gone=functools.partial(gone, request))

    return service


def asker(request: Request) -> Identity:
    """Return the client's identity.

    Raises:
        Forbidden: the client has not logged in, or lacks the role. The gate has checked that already; a route that it
            missed is closed all the same.
    """
    who: Identity | None = request.scope.get(SCOPE_KEY)
    needed = role_of(request.scope["route"])
    if who is None or (needed > Role.NOBODY and who.role == Role.NOBODY):
        raise Forbidden("log in first", 401)
    if who.role < needed:
        raise Forbidden(f"this needs the role {needed.label}: {who.name or 'you'} may not do it", 403)
    return who


Asked = Annotated[Callable[[], Awaitable[Office]], Depends(_asked)]
Who = Annotated[Identity, Depends(asker)]
Key = Annotated[
    str,
    Header(
        alias="Idempotency-Key",
        max_length=KEY_CHARS,
        description="Of your choice. The same key again gives the same job, not a second one.",
    ),
]


def add(
    app: FastAPI,
    method: str,
    path: str,
    endpoint: Callable[..., Any],
    *,
    name: str = "",
    answer: Any = None,
    **more: Any,
) -> None:
    """Add a route; its operation is named as its function.

    Args:
        answer: model that describes the JSON of the answer; none for a stream.
    """
    status = 201 if (name or endpoint.__name__).startswith(("create_", "send_")) else 200
    stream = {"description": "Server-sent events.", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
    described: dict[int | str, dict[str, Any]] = {status: stream if answer is None else {"model": answer}}
    app.add_api_route(
        path,
        endpoint,
        methods=[method],
        operation_id=name or endpoint.__name__,
        status_code=status,
        response_model=None,  # documents go out as they are
        responses={
            **described,
            "4XX": {"model": ProblemAnswer, "description": '`{"error": "…"}`: one line that says what to change.'},
            "5XX": {
                "model": ProblemAnswer,
                "description": 'The target (502), a server behind it (503) or Talaria (500) failed: `{"error": "…"}`.',
            },
        },
        **more,
    )


class _Stream(StreamingResponse):
    """A stream that is counted while it is open."""

    def __init__(self, who: str, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._who = who

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            STREAMS.leave(self._who)


async def streamed(events: AsyncIterator[Event]) -> StreamingResponse:
    """Return events as server-sent events; an error before the first of them becomes an ordinary error answer.

    Raises:
        TooMany: its reader, or all together, have as many streams open as they may.
    """
    who = ACTING.get().name
    STREAMS.enter(who)
    try:
        first = await anext(events, None)
    except BaseException:
        STREAMS.leave(who)
        raise
    return _Stream(
        who,
        _lines(first, events, STILL.get()),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", "Talaria-Version": __version__},
    )


async def _lines(first: Event | None, events: AsyncIterator[Event], still: Callable[[], bool]) -> AsyncIterator[str]:
    """Yield events as text, and a comment after a while without any; an error ends the stream as the event `error`.

    Args:
        still: returns whether its reader would be let in now; if not, that is such an error.
    """
    loop = asyncio.get_running_loop()
    event, coming, looked = first, None, loop.time()
    try:
        while event is not None:
            number = f"id: {event[2]}\n" if len(event) > 2 else ""
            yield f"{number}event: {event[0]}\ndata: {json.dumps(event[1])}\n\n"
            coming, said = asyncio.ensure_future(anext(events, None)), loop.time()
            there = False
            while not there:
                there = bool((await asyncio.wait([coming], timeout=max(0.0, looked + LOOK_S - loop.time())))[0])
                if loop.time() - looked >= LOOK_S:
                    looked = loop.time()
                    _check(still)
                if not there and loop.time() - said >= BEAT_S:
                    said = loop.time()
                    yield ": still here\n\n"
            event = coming.result()
    except Exception as exc:
        status, words = answer_to(exc)
        yield f"event: error\ndata: {json.dumps({'error': words, 'status': status})}\n\n"
    finally:
        if coming is not None:
            coming.cancel()


def _check(still: Callable[[], bool]) -> None:
    if not still():
        raise Forbidden("log in again, or send another token: this login is not valid any more", 401)
