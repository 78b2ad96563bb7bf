"""How commands speak: results to stdout, words to stderr, errors as one line and an exit code."""

from __future__ import annotations

import json
import sqlite3
import sys
from typing import Any

import typer

from talaria.errors import ServerError
from transfer.errors import Denied, DispatchError, Misconfigured, NotFound
from transfer.validation import plain

DONE, NOT_ALL, WRONG_USE, NO_SERVER = 0, 1, 2, 3


def exit_code_of(exc: BaseException) -> int:
    """Say what went wrong on one line, and return the exit code for it; what is not known propagates."""
    if isinstance(exc, typer.Abort | KeyboardInterrupt):
        return _fail("interrupted", NOT_ALL)
    if isinstance(exc, Misconfigured | NotFound | Denied | ValueError):
        return _fail(str(exc), WRONG_USE)
    if isinstance(exc, DispatchError):
        return _fail(str(exc), NOT_ALL)
    if isinstance(exc, ServerError):
        return _fail(str(exc), NO_SERVER)
    if isinstance(exc, sqlite3.Error):
        return _fail(f"the ledger can't be used: {exc}", NO_SERVER)
    if isinstance(exc, OSError):
        return _fail(f"the state directory or the server can't be reached: {exc}", NO_SERVER)
    if _is_api_error(exc):
        return _fail(f"the Prefect server did not answer as expected: {exc}", NO_SERVER)
    raise exc


def wrong_use(message: str) -> int:
    """Say how the command line was wrong."""
    return _fail(f"{plain(message)} (`--help` shows how)", WRONG_USE)


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    if "--json" in sys.argv:  # stdout is one JSON document, also now
        print_json({"error": line})
    print(f"talaria: {line}", file=sys.stderr)
    return code


def print_json(document: dict[str, Any]) -> None:
    """Print the one JSON document of a command."""
    print(json.dumps(document, indent=2))


def say(text: str) -> None:
    """Print a line for people, to stderr."""
    print(text, file=sys.stderr, flush=True)


def table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print a table to stdout; as wide as it needs to be when stdout is not a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200)
    shown = Table(title=title or None, title_justify="left")
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(escape(str(cell)) for cell in row))
    console.print(shown)


def _is_api_error(exc: BaseException) -> bool:
    """Return True for an error of Prefect's client, without importing that before it is needed."""
    return any(cls.__module__.partition(".")[0] in ("httpx", "prefect") for cls in type(exc).__mro__)


def enabled(target: dict[str, Any]) -> str:
    """Return whether a listed target takes part, in a word."""
    return "broken" if target["broken"] else "yes" if target["enabled"] else "no"


def checked(target: dict[str, Any]) -> str:
    """Return how a listed target was when it was last checked; empty if it never was."""
    last = target["last_check"]
    return "" if last is None else f"{'ok' if last['ok'] else 'failed'} {last['time']}"
