"""How commands speak: results to stdout, words to stderr, errors as one line and an exit code."""

from __future__ import annotations

import json
import sqlite3
import sys
from typing import Any

import click
import typer
from typer.core import TyperGroup

from talaria.server import ServerError
from transfer.errors import Denied, DispatchError, Misconfigured, NotFound

DONE, NOT_ALL, WRONG_USE, NO_SERVER = 0, 1, 2, 3


class Commands(TyperGroup):
    """Turns errors into exit codes for every command below it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (Misconfigured, NotFound, Denied, ValueError) as exc:
            raise fail(str(exc), WRONG_USE) from exc
        except DispatchError as exc:
            raise fail(str(exc), NOT_ALL) from exc
        except ServerError as exc:
            raise fail(str(exc), NO_SERVER) from exc
        except sqlite3.Error as exc:
            raise fail(f"the ledger can't be used: {exc}", NO_SERVER) from exc
        except OSError as exc:
            raise fail(f"the state directory or the server can't be reached: {exc}", NO_SERVER) from exc
        except Exception as exc:
            if _is_api_error(exc):
                raise fail(f"the Prefect server did not answer as expected: {exc}", NO_SERVER) from exc
            raise


def fail(message: str, code: int) -> typer.Exit:
    """Say what is wrong, on one line, and return the exit to raise; with `--json` stdout gets a document too."""
    line = " ".join(message.split())
    if "--json" in sys.argv:
        print_json({"error": line})
    print(f"talaria: {line}", file=sys.stderr)
    return typer.Exit(code)


def print_json(document: dict[str, Any]) -> None:
    """Print the one JSON document of a command."""
    print(json.dumps(document, indent=2))


def say(text: str) -> None:
    """Tell people something, on stderr."""
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


def _is_api_error(exc: Exception) -> bool:
    """Tell errors of Prefect's client without importing it before it is needed."""
    return any(cls.__module__.partition(".")[0] in ("httpx", "prefect") for cls in type(exc).__mro__)
