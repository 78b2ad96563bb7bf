"""The stream of all that happens, for scripts: the states of runs, and Talaria's own events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request
from fastapi.responses import StreamingResponse

from talaria.front.access import Role, needs
from talaria.front.api.asking import Event, Reach, Who, add, streamed
from talaria.front.subscription import Events, subscribed
from talaria.front.upstream import Upstream
from talaria.settings import EVENTS_S, POOL

RUN, OURS = "prefect.flow-run.", "talaria."
HEARTBEAT = f"{RUN}heartbeat"
KEPT_S = 8.0  # after which Prefect has kept an event: it writes those of five seconds together
BOTH_S = 1.0  # how long two subscriptions are heard, so that nothing happens between them
KEPT = timedelta(seconds=EVENTS_S)
FOR_EVER = timedelta(days=3650)
SOME_S = 2.0  # servers' clocks: how long before the last event that was seen the events of a follower begin again
KINDS = {"dispatch": "dispatch", "retrieve": "retrieval", "find": "query", "check": "check", "batch": "batch"}

LastSeen = Annotated[
    str,
    Header(
        alias="Last-Event-ID",
        max_length=100,
        description="The `id` of the last event that was seen: what has happened since comes first.",
    ),
]


@needs(Role.VIEWER)
async def follow_all(request: Request, who: Who, last_event_id: LastSeen = "") -> StreamingResponse:
    """Send server-sent events of all that happens, for ever: `run` when the state of a run changes, and `talaria.*`.

    The first is `open`. Each of the others has an `id`; a follower that was cut off sends the last one as
    `Last-Event-ID`, and gets what has happened since, events of the last seconds before it perhaps once more. `missed`
    in `open` says that it was away for longer than events are looked up.
    """
    reach: Reach = request.app.state.reach
    return await streamed(_events(reach.prefect, last_event_id))


async def _events(prefect: Upstream, last: str) -> AsyncIterator[Event]:
    time, _, seen = last.partition("/")
    now = datetime.now(UTC)
    # One that is yet to come is of a clock that was ahead: nothing would be heard until then.
    since = min(max(_time(time), now - 2 * KEPT), now) if last else None
    begin = (since or now) - timedelta(seconds=SOME_S)
    about = {
        "event": {"prefix": [RUN, OURS], "exclude_name": [HEARTBEAT]},
        "occurred": {"since": begin.isoformat(), "until": (now + FOR_EVER).isoformat()},  # else it is until now
    }
    async with subscribed(prefect, about, earlier=since is not None) as events:
        yield "open", {"time": now.isoformat(), "missed": since is not None and since < now - KEPT}
        async for one in events if since is None else _also_late(events, prefect, about):
            if one["id"] == seen:
                continue
            shown = _run(one) if one["event"].startswith(RUN) else _ours(one)
            if shown is not None:
                name = "run" if one["event"].startswith(RUN) else one["event"]
                yield name, shown, f"{one['occurred']}/{one['id']}"


async def _also_late(events: Events, prefect: Upstream, about: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a subscription, and those that Prefect had not kept yet when it began."""
    known = set()
    async for one in events.within(KEPT_S):
        known.add(one["id"])
        yield one
    async with subscribed(prefect, about, earlier=True) as again:
        async for one in events.within(BOTH_S):
            known.add(one["id"])
            yield one
        events.leave()  # nobody hears it any more
        async for one in again:
            if one["id"] not in known:
                yield one


def _run(event: dict[str, Any]) -> dict[str, Any] | None:
    """Return what is shown of a change of a run's state; None for a run of others."""
    from tasks.dispatch.asked import dispatch_in  # with Prefect, which takes seconds

    of_role = {one["prefect.resource.role"]: one for one in event["related"] if "prefect.resource.role" in one}
    if of_role.get("work-pool", {}).get("prefect.resource.name") != POOL:
        return None
    run = event["resource"]
    flow = of_role.get("flow", {}).get("prefect.resource.name", "")
    name = run.get("prefect.resource.name", "")
    return {
        "id": run["prefect.resource.id"].removeprefix(RUN),
        "kind": KINDS.get(flow, flow),
        "name": name,
        "dispatch_id": dispatch_in(name),
        "state": run.get("prefect.state-name", ""),
        "message": run.get("prefect.state-message", ""),
        "time": event["occurred"],
    }


def _ours(event: dict[str, Any]) -> dict[str, Any]:
    return {"about": event["resource"].get("prefect.resource.name", ""), **event["payload"], "time": event["occurred"]}


def _time(text: str) -> datetime:
    """Return the time that an event's id names.

    Raises:
        ValueError: it names none.
    """
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("Last-Event-ID is not the id of an event of this stream") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def add_to(app: FastAPI) -> None:
    """Add the route."""
    add(app, "GET", "/events", follow_all, response_class=StreamingResponse)
