"""What ends no worker: a server or a ledger that is away, and a look at a run that goes wrong."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.exceptions import PrefectException

from transfer.errors import LedgerAway

# The server, or the ledger's database, which may be busy or its disk full.
LOST = (httpx.HTTPError, PrefectException, OSError, LedgerAway, sqlite3.OperationalError)
logger = logging.getLogger("prefect.worker")


@contextmanager
def going_on(words: str = "a look of this worker failed: it goes on, and looks again") -> Iterator[None]:
    """Go on after the block, whatever it raises: it is made again later, and what is no loss of a server is logged.

    Else one run, or one file of it that is damaged, would end each worker, which finds it again as soon as it is back.

    Args:
        words: to log it with.
    """
    try:
        yield
    except LOST:
        pass
    except Exception:
        logger.exception(words)
