"""Loads the drivers of the targets that there are while a worker has nothing to do.

The libraries of DICOM take 0.4 s to load, and those of other protocols as long: the first dispatch would wait for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prefect.client.orchestration import PrefectClient

from talaria.engine.lost import going_on
from tasks import DRIVERS
from tasks.names import type_of
from tasks.targets import documents
from transfer.errors import Misconfigured

LOOK_S = 0.5  # between two looks whether there is nothing to do
FIRST = "dicom"  # the type that is loaded even if there is no target yet


async def load_ahead(client: PrefectClient, busy: Callable[[], bool]) -> None:
    """Load the driver of each type that a saved target has, one at a time, whenever nothing runs.

    Args:
        busy: returns whether something runs.
    """
    types = [FIRST]
    await _calm(busy)
    with going_on("it can't be told which targets there are: their drivers are loaded when they are needed"):
        types += sorted({type_of(one) for one in await documents(client)})
    for type_name in dict.fromkeys(types):
        await _calm(busy)
        with going_on(f"the driver of targets of type {type_name} can't be loaded ahead"):
            await asyncio.to_thread(_load, type_name)


async def _calm(busy: Callable[[], bool]) -> None:
    while True:
        await asyncio.sleep(LOOK_S)
        if not busy():
            return


def _load(type_name: str) -> None:
    try:
        DRIVERS[type_name]
    except (KeyError, Misconfigured):
        return  # not installed, or of no known type: who uses it is told so
