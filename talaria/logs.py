"""What processes write to their logs: text as ever, or one JSON object per line where TALARIA_LOG_JSON is set.

Our own loggers get a handler of ours, which says what they say whether Prefect has set up its own or not. A change of a
run's or a target's state is one line of `talaria.state`, with the ids of run and dispatch.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from datetime import UTC, datetime
from typing import Any

SETTING = "TALARIA_LOG_JSON"
# Roots of loggers whose modules are ours.
OURS = ("talaria", "tasks", "blocks", "protocols", "transfer", "imaging")
DATES = "%Y-%m-%d %H:%M:%S"  # logs are kept for months
# Where Prefect's handler for the console reads it.
DATES_SETTING = "PREFECT_LOGGING_FORMATTERS_STANDARD_DATEFMT"
TEXT = "%(asctime)s.%(msecs)03d | %(levelname)-7s | %(name)s - %(message)s"
# Of Prefect's records of runs, and what they are called here.
IDS = {"flow_run_id": "run", "task_run_id": "task", "flow_run_name": "run_name", "task_run_name": "task_name"}


def as_json() -> bool:
    """Return True if logs are to be JSON."""
    return os.environ.get(SETTING, "").lower() in ("1", "true", "yes", "on")


class JsonLine(logging.Formatter):
    """Formats a record as one line of JSON: time (UTC), level, logger, message; ids and facts where it has any."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        for name, shown in IDS.items():
            if value := getattr(record, name, None):
                line[shown] = str(value)
        state = getattr(record, "state", None)
        line |= state if isinstance(state, dict) else {}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Handler(logging.StreamHandler[Any]):
    """Writes to what is standard error now."""


def set_up() -> None:
    """Let this process's loggers write to standard error; may be called again, when Prefect has set up its own."""
    formatter = JsonLine() if as_json() else logging.Formatter(TEXT, DATES)
    for name in OURS:
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Handler) for one in logger.handlers):
            handler = _Handler(sys.stderr)
            handler.setFormatter(formatter)
            logger.addHandler(handler)
            logger.propagate = False  # to the root, whose handler is Prefect's
            logger.setLevel(logging.INFO)
    if as_json():
        known = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
        for logger in (logging.root, *known):
            for old in [one for one in logger.handlers if _prints(one)]:
                handler = _Handler(sys.stderr)
                handler.setLevel(old.level)
                handler.setFormatter(formatter)
                for one in old.filters:
                    handler.addFilter(one)
                logger.removeHandler(old)
                logger.addHandler(handler)
        _take_the_rest(formatter)


def _take_the_rest(formatter: logging.Formatter) -> None:
    """Log what would be written beside the logs: warnings, records that nobody handles, errors that nobody caught."""
    if not logging.root.handlers:
        handler = _Handler(sys.stderr)
        handler.setLevel(logging.WARNING)
        handler.setFormatter(formatter)
        logging.root.addHandler(handler)
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: _uncaught("this process ends", (kind, error, trace))
    threading.excepthook = lambda args: _uncaught(
        f"the thread {args.thread.name if args.thread else ''} ends",
        (args.exc_type, args.exc_value, args.exc_traceback),
    )


def _uncaught(what: str, error: Any) -> None:
    if not issubclass(error[0], SystemExit):
        logging.getLogger("talaria").critical("%s: %s", what, error[0].__name__, exc_info=error)


def _prints(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, _Handler | logging.FileHandler)


def changed(event: str, words: str, **about: Any) -> None:
    """Write one line about a change of a run's state."""
    known = {key: value for key, value in about.items() if value not in (None, "")}
    logging.getLogger("talaria.state").info("%s: %s", event, words, extra={"state": {"event": event, **known}})
