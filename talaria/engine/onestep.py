"""SQLite's statements in one step each, for Prefect's server.

Each connection has a thread. SQLAlchemy goes there and back four times for a statement: for a cursor, to execute it,
for its rows, and to close the cursor; and once more to end a transaction that has not begun. A dispatch took 535 such
steps, a fifth of what it cost the server. Here a statement, with all its rows, is one.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from typing import Any

from sqlalchemy.dialects.sqlite.aiosqlite import AsyncAdapt_aiosqlite_connection, AsyncAdapt_aiosqlite_cursor

_INTERRUPTED = "talaria_interrupted"  # set on a connection whose thread may still execute what nobody waits for


def make_statements_one_step() -> None:
    """Let each statement of this process's SQLAlchemy on SQLite be one step to its connection's thread."""
    # Private names of SQLAlchemy's and aiosqlite's: tests/engine/test_leaner.py fails when they change.
    AsyncAdapt_aiosqlite_connection._cursor_cls = OneStepCursor  # type: ignore[assignment]
    AsyncAdapt_aiosqlite_connection.commit = _commit  # type: ignore[method-assign]
    AsyncAdapt_aiosqlite_connection.rollback = _rollback  # type: ignore[method-assign]


class _Done:
    """What is left of a cursor when it has been closed."""

    __slots__ = ("arraysize", "description", "lastrowid", "rowcount")

    def __init__(self, cursor: sqlite3.Cursor | None = None) -> None:
        self.arraysize = 1
        self.description = cursor.description if cursor else None
        self.rowcount = cursor.rowcount if cursor else -1
        self.lastrowid = cursor.lastrowid if cursor else None

    def close(self) -> None:
        """Do nothing."""


class OneStepCursor(AsyncAdapt_aiosqlite_cursor):
    """A cursor that exists at SQLite only while it executes a statement."""

    __slots__ = ()
    _awaitable_cursor_close = False

    def __init__(self, adapt_connection: AsyncAdapt_aiosqlite_connection) -> None:
        self._adapt_connection = adapt_connection
        self._connection = adapt_connection._connection
        self._cursor: Any = _Done()
        self._rows = deque()
        self._soft_closed_memoized: Any = {}

    async def _execute_async(self, operation: Any, parameters: Any) -> Any:
        return await self._step("execute", operation, parameters or ())

    async def _executemany_async(self, operation: Any, seq_of_parameters: Any) -> Any:
        return await self._step("executemany", operation, seq_of_parameters)

    async def _step(self, how: str, operation: Any, parameters: Any) -> Any:
        connection: Any = self._connection

        def step() -> tuple[_Done, list[Any]]:
            cursor: sqlite3.Cursor = connection._conn.cursor()
            try:
                getattr(cursor, how)(operation, parameters)
                rows = cursor.fetchall() if cursor.description else []
                return _Done(cursor), rows
            finally:
                cursor.close()

        async with self._adapt_connection._execute_mutex:
            try:
                self._cursor, rows = await connection._execute(step)
            except asyncio.CancelledError:
                setattr(connection, _INTERRUPTED, True)
                raise
        self._rows = deque(rows)
        return self


def _commit(self: AsyncAdapt_aiosqlite_connection) -> None:
    if _has_begun(self):
        super(AsyncAdapt_aiosqlite_connection, self).commit()


def _rollback(self: AsyncAdapt_aiosqlite_connection) -> None:
    if _has_begun(self):
        super(AsyncAdapt_aiosqlite_connection, self).rollback()


def _has_begun(adapted: AsyncAdapt_aiosqlite_connection) -> bool:
    """Return True if there is a transaction to end, or may be one as soon as the thread has done what it does."""
    connection: Any = adapted._connection
    there: sqlite3.Connection | None = connection._connection
    return there is not None and (getattr(connection, _INTERRUPTED, False) or there.in_transaction)
