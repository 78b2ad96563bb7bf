"""What is old is forgotten at once, as an administrator wants it."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from talaria.engine.leftovers import forget
from talaria.engine.retention import DAY_S, unfinished
from talaria.service import Office
from talaria.settings import load_settings


async def prune(office: Office, older_than_s: float) -> dict[str, Any]:
    """Forget what is older than so many seconds, but nothing that runs need which have not ended.

    Of a ledger that several hosts share, what other hosts may still need stays as long as files of what was given up.
    """
    shared = load_settings().keep_failed_days * DAY_S
    runs = await unfinished(office.client)
    return asdict(await asyncio.to_thread(forget, office.home, older_than_s, runs, older_than_s, shared))
