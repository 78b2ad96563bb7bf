"""Entry point of the `talaria` command."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import typer

from talaria.cli import app
from talaria.cli.output import exit_code_of, wrong_use
from talaria.cli.streams import flushed, open_streams, speak_utf8
from talaria.ending import end_soon

# What Typer raises for a wrong command line; it has no public name.
UsageError: Any = typer.BadParameter.__mro__[1]


class _HomeFirst(MetaPathFinder):
    """Makes the state directory before the import of Prefect, which makes its own folder in it or warns that it can't.

    A command that needs neither makes none.
    """

    def __init__(self, home: Path) -> None:
        self.home = home

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "prefect":
            sys.meta_path.remove(self)
            try:
                self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError:  # said by whoever needs it, in a line
                warnings.filterwarnings("ignore", "Failed to create the Prefect home", UserWarning)


def main() -> None:
    """Run the command line and exit with the code that its help names."""
    speak_utf8()
    open_streams()
    # The command itself says what happens; Prefect's own lines are on the run. Read when it is imported.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    # Prefect's own files belong to our state directory, not to the user's home.
    home = Path(os.environ.get("TALARIA_HOME") or "~/.talaria").expanduser()
    os.environ.setdefault("PREFECT_HOME", str(home / "prefect"))
    sys.meta_path.insert(0, _HomeFirst(home))
    try:
        code = app(standalone_mode=False)
        flushed()
    except UsageError as exc:
        help_text = getattr(exc, "ctx", None) and len(sys.argv) == 1
        code = 2 if help_text else wrong_use(exc.format_message())
    except Exception as exc:
        code = exit_code_of(exc)
        with suppress(OSError):
            flushed()
    except KeyboardInterrupt as exc:
        code = exit_code_of(exc)
    sys.exit(code if isinstance(code, int) else 0)


def command() -> None:
    """Be the process of a command: end it with the code, whatever hangs in it."""
    try:
        main()
    except SystemExit as exc:
        end_soon(exc.code if isinstance(exc.code, int) else 0)
        raise


if __name__ == "__main__":
    command()
