"""A command's connection to a Prefect server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from talaria.cli.output import say
from transfer.home import Home

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

    from talaria.server import Address
    from talaria.settings import Settings

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class ServerAccess:
    """A server that answers.

    Attributes:
        address: of the embedded server, None for one that PREFECT_API_URL names.
        own: whether this command, or another one, started it for its own duration; no worker runs beside it then.
    """

    settings: Settings
    home: Home
    address: Address | None
    own: bool

    def run(self, call: Callable[Concatenate[PrefectClient, P], Awaitable[R]], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a coroutine function with a client as its first argument."""
        from prefect import get_client

        async def with_client() -> R:
            async with get_client() as client:
                return await call(client, *args, **kwargs)

        return asyncio.run(with_client())


@contextmanager
def api() -> Iterator[ServerAccess]:
    """Reach the server; start the embedded one for the length of the block if there is none."""
    import os

    from talaria.server import reached, running
    from talaria.settings import load_settings

    settings = load_settings()
    home = Home.current()
    if not os.environ.get("PREFECT_API_URL") and running(home) is None:
        say("no server runs: starting one for this command (`talaria up` keeps one running)")
    with reached(home) as (address, own):
        access = ServerAccess(settings, home, address, own)
        if own:
            access.run(_prepare, home)
        yield access


async def _prepare(client: PrefectClient, home: Home) -> None:
    """Let a server that has just been started know our types and deployments, and that killed runs run no more."""
    from talaria.engine.recovery import recover
    from talaria.engine.registry import register
    from talaria.settings import POOL

    await register(client)
    await recover(client, home, POOL, alone=True)
