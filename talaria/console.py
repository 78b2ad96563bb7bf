"""Lines for people who look on: at a terminal, or in a log of the service."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)
