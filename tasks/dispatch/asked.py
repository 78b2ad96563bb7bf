"""What is asked of a run: refused in a sentence before anything is done, and said by the run's name."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import get_client
from prefect.context import FlowRunContext

from tasks.dispatch.patience import patiently
from tasks.names import split
from transfer.errors import Misconfigured
from transfer.plan import DISPATCH_ID_CHARS

NAMED_S = 1.0  # after which a run gets its name though its files are still read
UNPLANNED = "to "  # begins the name of a run whose files have not been read
# What Prefect calls a run that was given no name: its server, and the form of its newer pages (an animal follows).
_MADE_UP = re.compile(
    r"[a-z]+-[a-z]+|(Awesome|Rustic|Small|Gorgeous|Fantastic|Sleek|Intelligent|Unbranded|Refined|Licensed|Generic|"
    r"Practical|Ergonomic|Handcrafted|Tasty|Handmade|Incredible)-[A-Z][A-Za-z' -]{0,5}"
)
_NAMED = re.compile(rf"([0-9a-f]{{{DISPATCH_ID_CHARS}}}) to ")


def asked_list(parameters: Mapping[str, Any], name: str) -> list[str]:
    """Return the names or paths that a run's parameters list; whoever made it may have written anything."""
    found = parameters.get(name)
    return [str(one) for one in found] if isinstance(found, list | tuple) else []


def check_asked(paths: Sequence[str], targets: Sequence[str]) -> None:
    """Check that a dispatch names files, by absolute paths, and targets.

    Raises:
        Misconfigured: it doesn't.
    """
    if not [path for path in paths if path.strip()]:
        raise Misconfigured("no path to send is given")
    if not [name for name in targets if name.strip()]:
        raise Misconfigured("no target is named")
    for path in paths:
        if not Path(path).is_absolute():
            raise Misconfigured(f"paths: {path!r} is not an absolute path")
        if any("\ud800" <= char <= "\udfff" for char in path):
            raise Misconfigured(
                f"{path}: this name is not UTF-8, as what is asked of a run must be: send the folder above it,"
                " or a list that names it (each: line)"
            )


def unplanned(targets: Sequence[str]) -> str:
    """Return the name of a dispatch's run before its files are read: the worker puts the dispatch id in front.

    It names no file: names of folders are often patients', and runs' names stand in events.
    """
    names = list(dict.fromkeys(split(name)[1] for name in targets if name.strip(" /")))
    return f"{UNPLANNED}{', '.join(names) or 'nobody'}"


def name_of(dispatch_id: str, targets: Sequence[str]) -> str:
    """Return the name of a dispatch's run: what it sends, and where to."""
    return f"{dispatch_id} {unplanned(targets)}"


def dispatch_in(name: str) -> str:
    """Return the dispatch id in a run's name; "" if there is none."""
    found = _NAMED.match(name)
    return found[1] if found else ""


def retrieval_name(source: str, targets: Sequence[str], into: str) -> str:
    """Return the name of a retrieval's run."""
    where = ", ".join(targets) or ("a folder" if into else "")
    return f"from {source} to {where}" if where else f"from {source}"


def name_for(own: str, name: str) -> str:
    """Return the name that a run gets which says what it does; "" if its own one stays."""
    if dispatch_in(own) or own.startswith(UNPLANNED):
        return ""
    if _MADE_UP.fullmatch(own):
        return name
    return f"{name} ({own})" if name.startswith(UNPLANNED) else ""


class Naming:
    """Names a dispatch's run: with its id, when its files have been read; without, when that takes long or is never.

    So most runs are named once, and their files don't wait for it.
    """

    def __init__(self, name: str) -> None:
        context = FlowRunContext.get()
        self._run = context.flow_run if context else None
        self._name, self._turn = name_for(self._run.name, name) if self._run else "", asyncio.Lock()
        if self._run and self._name:
            self._run.name = self._name
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Naming:
        if self._name:
            self._task = asyncio.create_task(self._later())
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            await self._say("")

    async def _later(self) -> None:
        await asyncio.sleep(NAMED_S)
        await self._say("")

    async def known(self, dispatch_id: str) -> None:
        """Put the dispatch's id into the run's name, if that says what it does and has none."""
        await self._say(dispatch_id)

    async def _say(self, dispatch_id: str) -> None:
        run = self._run
        async with self._turn:
            if run is None or not run.name.startswith(UNPLANNED) or not (dispatch_id or self._name):
                return
            name = f"{dispatch_id} {run.name}" if dispatch_id else run.name
            async with get_client() as client:
                await asyncio.shield(patiently(lambda: client.update_flow_run(run.id, name=name)))
            run.name, self._name = name, ""


async def name_run(name: str) -> None:
    """Give the current run a name that says what it does, if whoever started it gave it none.

    That of a dispatch says it in any case, for lists find its id there; a name that its maker chose stands behind it.
    """
    context = FlowRunContext.get()
    flow_run = context.flow_run if context else None
    if flow_run is None:
        return
    new = name_for(flow_run.name, name)
    if not new:
        return
    flow_run.name = new
    async with get_client() as client:
        await patiently(lambda: client.update_flow_run(flow_run.id, name=flow_run.name))
