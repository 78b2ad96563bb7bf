"""The output of commands: results on stdout, messages on stderr, an error as one line and an exit code."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from talaria.console import say
from talaria.errors import Refused, ServerError, one_line
from talaria.home import home_of_settings
from transfer.errors import Denied, DispatchError, LedgerAway, Misconfigured, NotFound
from transfer.validation import plain

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
WIDE = 200  # columns of a table that goes to no terminal
NARROW = 8  # columns below which none is folded
DONE, NOT_ALL, WRONG_USE, NO_SERVER = 0, 1, 2, 3


def code_of(document: dict[str, Any]) -> int:
    """Return the exit code for the result of a dispatch or retrieval.

    A retry that could not begin leaves the result of the time before, beside the reason.
    """
    return DONE if document["state"] == "delivered" and not document.get("error") else NOT_ALL


def exit_code_of(exc: BaseException) -> int:
    """Print an error as one line, and return the exit code for it; an unexpected error is raised again."""
    if isinstance(exc, typer.Abort | KeyboardInterrupt):
        return _fail("interrupted", NOT_ALL)
    if isinstance(exc, Misconfigured | NotFound | Denied | ValueError):
        return _fail(str(exc), WRONG_USE)
    if isinstance(exc, LedgerAway):
        return _fail(str(exc), NO_SERVER)
    if isinstance(exc, DispatchError):
        return _fail(str(exc), NOT_ALL)
    if isinstance(exc, Refused):
        return _fail(str(exc), exc.code)
    if isinstance(exc, ServerError):
        return _fail(str(exc), NO_SERVER)
    if isinstance(exc, sqlite3.Error):
        return _fail(f"the ledger can't be used: {exc}", NO_SERVER)
    if isinstance(exc, OSError):
        return _fail(f"the state directory or the server can't be reached: {_said(exc)}", NO_SERVER)
    if _is_api_error(exc):
        return _fail(f"the Prefect server did not answer as expected: {_said(exc)}", NO_SERVER)
    raise exc


def _said(exc: BaseException) -> str:
    """Return what an error says; of one that says nothing, as a time-out, what it is."""
    return str(exc) or type(exc).__name__


def wrong_use(message: str) -> int:
    """Print what is wrong with the command line."""
    return _fail(f"{plain(message)} (`--help` shows how)", WRONG_USE)


def _fail(message: str, code: int) -> int:
    line = one_line(message)
    if "--json" in sys.argv:  # stdout is one JSON document, also now
        print_json({"error": line})
    print(f"talaria: {line}", file=sys.stderr)
    return code


def print_json(document: dict[str, Any]) -> None:
    """Print the one JSON document of a command."""
    print(json.dumps(document, indent=2))


def say_whose(what: str) -> None:
    """Say of what is kept on this machine alone that it is not the server's which TALARIA_URL names."""
    if os.environ.get("TALARIA_URL"):
        say(f"{what} are those of this machine, in {home_of_settings()}: TALARIA_URL is not used for them")


def table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print a table to stdout, as wide as the terminal; as it needs to be, up to WIDE, when stdout is not one.

    What has no room as a table, however its cells are folded, is printed as a line for each cell that is not empty.
    """
    import shutil

    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE
    cells = [[_shown(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(1, *(_width(row[at]) for row in cells)) for at in range(len(columns))]
    while (excess := sum(widths) + 3 * len(widths) + 1 - room) > 0 and max(widths) > NARROW:
        widest = widths.index(max(widths))
        second = max([NARROW, *(width for at, width in enumerate(widths) if at != widest)])
        widths[widest] -= max(1, min(excess, widths[widest] - second))
    if title:
        print(title)
    if excess > 0 and sys.stdout.isatty():  # wider lines would be broken anywhere
        for row in cells[1:]:
            print(*(f"{column}: {cell}" for column, cell in zip(cells[0], row, strict=True) if cell), "", sep="\n")
        return
    _line("┏┳┓━", widths)
    _row(cells[0], widths, "┃")
    _line("┡╇┩━", widths)
    for row in cells[1:]:
        _row(row, widths, "│")
    _line("└┴┘─", widths)


def _line(signs: str, widths: list[int]) -> None:
    left, middle, right, fill = (*signs,)
    print(left + middle.join(fill * (width + 2) for width in widths) + right)


def _row(cells: list[str], widths: list[int], edge: str) -> None:
    folded = [_folded(cell, width) for cell, width in zip(cells, widths, strict=True)]
    for at in range(max(len(lines) for lines in folded)):
        parts = [lines[at] if at < len(lines) else "" for lines in folded]
        filled = [part + " " * (width - _width(part)) for part, width in zip(parts, widths, strict=True)]
        print(f"{edge} " + f" {edge} ".join(filled) + f" {edge}")


def _folded(text: str, width: int) -> list[str]:
    lines, line, used = [], "", 0
    for sign in text:
        if used + _width(sign) > width and line:
            lines.append(line)
            line, used = "", 0
        line, used = line + sign, used + _width(sign)
    return [*lines, line]


def _shown(cell: Any) -> str:
    """Return a value without control sequences for a terminal: a peer's words may hold some."""
    return "".join(sign if sign.isprintable() else " " if sign == "\n" else repr(sign)[1:-1] for sign in str(cell))


def _width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    import unicodedata

    wide = sum(unicodedata.east_asian_width(sign) in "WF" for sign in text)
    return len(text) + wide - sum(unicodedata.combining(sign) > 0 for sign in text)


def _is_api_error(exc: BaseException) -> bool:
    """Return True for an error of Prefect's client, without importing that before it is needed."""
    return any(cls.__module__.partition(".")[0] in ("httpx", "prefect") for cls in type(exc).__mro__)


def enabled(target: dict[str, Any]) -> str:
    """Return whether a listed target takes part, in a word or two."""
    if target.get("breaker", {}).get("state") == "open":
        return "does not answer"
    return "broken" if target["broken"] else "yes" if target["enabled"] else "no"


def checked(target: dict[str, Any]) -> str:
    """Return the result and time of a listed target's last check; "" if there was none."""
    last = target["last_check"]
    return "" if last is None else f"{'ok' if last['ok'] else 'failed'} {last['time']}"


def given_value(what: str, text: str) -> str:
    """Return the value that somebody gave, which is not empty; without it, the command would do more.

    Args:
        what: the option or argument, for the message.
    """
    if not text.strip():
        raise ValueError(f"{what} is empty: give a value, or leave it out")
    return text


def given_path(text: str) -> Path:
    """Return the path that somebody gave, whose name is not empty.

    An empty one, as of a variable of a script that is not set, would be the current folder to `Path`.
    """
    if not text:
        raise ValueError("the name of a path is empty; the current folder is .")
    return Path(text)
