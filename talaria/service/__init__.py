"""Talaria's operations, for its API and for commands where no server runs; they take and return JSON.

Nothing else may use them: the engine and the flows don't know the user who asks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transfer.errors import Misconfigured
from transfer.home import Home

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient


class Conflict(Misconfigured):
    """What there is does not allow it: an idempotency key was used for something else, a target is in use."""


@dataclass(frozen=True)
class Office:
    """What an operation works with.

    Attributes:
        client: of the Prefect server.
        home: the state directory of this machine.
        user: name of the user who asks, "" if nobody has logged in.
        address: where the request came from, "" if not over a network.
        alone: whether no worker runs, so that the process that creates a run also runs it.
        embedded: whether the Prefect server is ours, so that paths are those of this machine.
        gone: returns when nobody waits for the answer any more; None where that is not known.
    """

    client: PrefectClient
    home: Home
    user: str = ""
    address: str = ""
    alone: bool = False
    embedded: bool = True
    gone: Callable[[], Awaitable[None]] | None = None
