"""How a command gets its work done: by the API of the running `talaria up`, or by itself where none runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from talaria.cli import remote
from talaria.console import say
from talaria.errors import ServerError

if TYPE_CHECKING:
    from talaria.cli.local import Local


class Access(Protocol):
    """Operations of `talaria.service`, by name.

    Attributes:
        own: whether no worker runs, so that this command executes the runs that it creates.
    """

    own: bool

    def call(self, operation: str, **given: Any) -> dict[str, Any]:
        """Do an operation and return its document."""

    def stream(self, operation: str, **given: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Do an operation and yield its events."""

    def link(self, run_id: str) -> str:
        """Return where the UI shows a run, "" if it doesn't."""


def say_queued(access: Access) -> None:
    """Say of what has just been queued that nobody does it yet, if no worker runs."""
    if access.own:
        say("queued: it runs as soon as `talaria up` does")


@contextmanager
def api(*, saved: bool = True) -> Iterator[Access]:
    """Yield access by the server's API, or without it where there is none.

    Args:
        saved: whether the command needs what the server keeps; else none is started for it.
    """
    there = remote.found()
    if there is not None:
        with there:
            if _answers(there):
                yield there
                return
    with alone(saved=saved) as access:
        yield access


def _answers(there: remote.ApiClient) -> bool:
    """Return True if a server has the API; False if the one that runs here is too old for it.

    Raises:
        ServerError: it does not answer, or is one that was named and has none.
    """
    try:
        there.call("health")
    except remote.NoApi as exc:
        if there.local:
            return False
        raise ServerError(f"{there.url} is no Talaria server that this command knows: is it older?") from exc
    return True


@contextmanager
def alone(*, saved: bool = True) -> Iterator[Local]:
    """Yield access without the API, by a client of the Prefect server, which is started for the block if none runs."""
    from talaria.cli.local import Local, local

    if not saved:
        yield Local.without_server()
        return
    with local() as access:
        yield access
