"""Lines for people who look on: at a terminal, or in a log of the service."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime

as_json = False  # whether lines are JSON, as the logs of `talaria up` may be


def say(text: str) -> None:
    """Print a line to stderr."""
    if as_json:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        text = json.dumps({"time": now, "level": "info", "logger": "talaria.up", "message": text})
    print(text, file=sys.stderr, flush=True)
