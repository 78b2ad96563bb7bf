"""The embedded server's application: Prefect's own, with unique names of targets, queues by priority, an index for
lists of runs, and SQLite's writers in turn.

Prefect begins nearly every transaction DEFERRED. One that reads and then writes while another has written meanwhile
ends at once, whatever the time-out (SQLITE_BUSY_SNAPSHOT), and the server answers 503. One that begins IMMEDIATE waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from prefect.server.database.configurations import SQLITE_BEGIN_MODE, AioSqliteConfiguration

from talaria.engine import leaner
from talaria.engine.asgi import Application
from talaria.engine.database import (
    add_search,
    ask_connections_seldom,
    let_types_name_their_operators,
    make_index_at_start,
    pass_times_on_plainly,
    set_sqlite_up,
)
from talaria.engine.onestep import make_statements_one_step
from talaria.engine.priority import QueueOfPriority, put_scheduled_right
from talaria.engine.unique import UniqueNames

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

FOLLOWED = 5000  # events that wait for one follower; all followers have the same objects
TURN_S = 10  # longest wait for one's turn; SQLite's own lock decides after that
_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


def create_app() -> tuple[Application, Any]:
    """Return Prefect's application behind what we add, which the front door mounts, and Prefect's alone."""
    from prefect.server.api.server import create_app as prefects_own

    let_writers_wait()
    let_followers_hear_bursts()
    let_types_name_their_operators()
    pass_times_on_plainly()
    set_sqlite_up()
    ask_connections_seldom()
    make_statements_one_step()
    leaner.look_up_the_database_once()
    leaner.check_schemas_once()
    leaner.write_events_alike()
    leaner.look_for_due_tasks_seldom()
    prefect = prefects_own()
    leaner.look_at_requests_plainly(prefect)
    leaner.note_polls_seldom(prefect)
    leaner.ask_dependencies_here()
    make_index_at_start(prefect)
    add_search(prefect)
    put_scheduled_right()
    behind: list[Any] = [one.cls for one in prefect.user_middleware]
    if QueueOfPriority not in behind:
        prefect.add_middleware(QueueOfPriority)  # within it, since its own automations come to it from there
    return UniqueNames(prefect), prefect


def let_writers_wait() -> None:
    """Make every transaction of this process that may write wait for those before it, first come, first served."""
    # A private name of Prefect's: tests/engine/test_api.py fails when it changes.
    AioSqliteConfiguration.begin_transaction = _begin_transaction  # type: ignore[method-assign]


def let_followers_hear_bursts() -> None:
    """Let more events wait for each of those who follow them; beyond, Prefect drops them without a word.

    Of its 256, a follower loses most when a thousand runs are made or cancelled: our workers, pages and scripts.
    """
    from prefect.server.events import stream

    stream.SUBSCRIPTION_BACKLOG = FOLLOWED  # it is read for each subscription


@asynccontextmanager
async def _begin_transaction(
    self: AioSqliteConfiguration, session: AsyncSession, with_for_update: bool = False
) -> AsyncIterator[AsyncSessionTransaction]:
    """Begin IMMEDIATE, in turn: SQLite itself lets waiting writers in at random, some of them after many seconds.

    At once: what Prefect reads meanwhile, in another session, begins as it would, or it would wait for this one's end.
    """
    turn = _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())
    token: Any = SQLITE_BEGIN_MODE.set("IMMEDIATE")
    mine = await _taken(turn)
    try:
        async with session.begin() as transaction:
            await session.connection()
            SQLITE_BEGIN_MODE.set("DEFERRED")
            yield transaction
    finally:
        if mine:
            turn.release()
        SQLITE_BEGIN_MODE.reset(token)


async def _taken(turn: asyncio.Lock) -> bool:
    """Wait for the turn; return False if it doesn't come in time: its holder may be waiting for us."""
    try:
        await asyncio.wait_for(turn.acquire(), TURN_S)
    except TimeoutError:
        return False
    return True
