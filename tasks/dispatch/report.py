"""What people see of a dispatch in Prefect: progress while it runs, receipts at the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import get_client
from prefect.artifacts import (
    acreate_markdown_artifact,
    acreate_progress_artifact,
    acreate_table_artifact,
    aupdate_progress_artifact,
)
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException

from tasks.dispatch import kept
from tasks.dispatch.delivery import SHOWN_FAILURES, Delivery
from tasks.dispatch.progress import Live, Part
from transfer.home import Home
from transfer.ledger import noted, write_whole
from transfer.lines import as_json
from transfer.live import is_followed_here
from transfer.outcome import Kind
from transfer.receipt import Receipt, State
from transfer.receipt import pieces as pieces_of

PROGRESS_S = 5.0  # what takes no longer gets no progress artifact
FAR_S = 60.0  # between two updates for those who follow on other machines; each costs the server 35 ms
SHOWN_STUDIES = 1000  # lines of a flood's artifact
SHOWN_ITEMS = 100  # lines of the artifact's list; the JSON file has all

Studies = Sequence[dict[str, Any]] | None


@asynccontextmanager
async def progress_shown(
    deliveries: Sequence[Delivery], shown_live: Live, artifacts: dict[str, UUID] | None = None
) -> AsyncIterator[None]:
    """Show how far deliveries have come while the block runs: live, and of what takes long as an artifact for each.

    The artifact's description is the number of items with an outcome, then a line for each of the last failed attempts.

    Args:
        artifacts: those of earlier parts of the run, by target; new ones are added.
    """
    artifacts = {} if artifacts is None else artifacts
    shown: dict[str, Part] = {}

    async def update() -> None:
        for name, part in shown_live.parts().items():
            text, percent = "\n".join([part.words, *part.failures]), round(part.percent, 1)
            if name not in artifacts:
                artifacts[name] = await acreate_progress_artifact(percent, f"progress-{name}", text)
            elif shown.get(name) != part:
                await aupdate_progress_artifact(artifacts[name], percent, text)
            shown[name] = part

    shown_live.parts = lambda: {delivery.target.name: part_of(delivery) for delivery in deliveries}
    shown_live.phase = "sending"
    async with updated(update, known=bool(artifacts)):
        yield


def part_of(delivery: Delivery) -> Part:
    """Return how far a delivery has come."""
    progress, failures = delivery.progress, tuple(delivery.failures[-SHOWN_FAILURES:])
    done, items = progress.done, progress.items
    words = f"{done} of {items} {delivery.unit} to {delivery.target.name}"
    return Part(items, done, progress.size, progress.moved, progress.percent, words, failures)


@asynccontextmanager
async def updated(update: Callable[[], Awaitable[None]], *, known: bool = False) -> AsyncIterator[None]:
    """Update the artifact that shows how far a run is, at the end of the block if that comes late.

    While the block runs, those who follow have what is shown live on this machine (`tasks.dispatch.progress`): our
    pages, API and commands. Only where they may be on another one is the artifact updated meanwhile.

    Args:
        known: whether there is an artifact, of an earlier part, which must not stay as that has left it.
    """
    begun = False

    async def keep() -> None:
        nonlocal begun
        await asyncio.sleep(PROGRESS_S)
        begun = True
        while not is_followed_here():
            # A server that is away for a moment costs an update, not the run.
            with suppress(httpx.HTTPError, PrefectException):
                await update()
            await asyncio.sleep(FAR_S)

    keeper = asyncio.create_task(keep())
    try:
        yield
    finally:
        keeper.cancel()
        with suppress(asyncio.CancelledError):
            await keeper
        if begun or known:
            with suppress(httpx.HTTPError, PrefectException):
                await update()


def document(dispatch_id: str, flow_run_id: str, state: State, receipts: Sequence[Receipt]) -> dict[str, Any]:
    """Return the JSON of `send --json`, with all items; that of a flood has its studies, too."""
    return {
        "dispatch_id": dispatch_id,
        "flow_run_id": flow_run_id,
        "state": str(state),
        "targets": {receipt.target: receipt.to_json(all_items=True) for receipt in receipts},
    }


def pieces(
    dispatch_id: str, flow_run_id: str, state: State, receipts: Sequence[Receipt], studies: Studies = None
) -> Iterator[bytes]:
    """Yield the JSON of `document`, piece by piece."""
    head = document(dispatch_id, flow_run_id, state, ())
    if studies is not None:
        yield json.dumps(head)[: -len('"targets": {}}')].encode() + b'"studies": ['
        for number, row in enumerate(studies):
            yield (b",\n" if number else b"\n") + json.dumps(row, default=as_json).encode()
        yield b'], "targets": {'
    else:
        yield json.dumps(head)[: -len("{}}")].encode() + b"{"
    for number, receipt in enumerate(receipts):
        yield (b",\n" if number else b"\n") + json.dumps(receipt.target).encode() + b": "
        yield from pieces_of(receipt)
    yield b"}}\n"


async def report(
    home: Home,
    dispatch_id: str,
    flow_run_id: str,
    state: State,
    receipts: Sequence[Receipt],
    outputs: dict[str, str],
    *,
    brief: bool = False,
    studies: Studies = None,
) -> None:
    """Save the receipts: whole at the server, a copy as a JSON file, and artifacts for people.

    Raises:
        LedgerFull: the disk of the state directory is full.

    Args:
        outputs: how hooks ended, and what they printed, by target.
        brief: whether the run waits on: no more artifacts than it has.
        studies: of a flood, the row of each.
    """
    path, what = home.receipt(flow_run_id), (dispatch_id, flow_run_id, state, receipts, studies)
    with noted():
        await asyncio.to_thread(write_whole, path, pieces(*what))
    async with get_client() as client:
        await kept.keep(client, UUID(flow_run_id), pieces(*what), again=has_run_before())
    if brief:
        return
    rows = [_row(receipt) for receipt in receipts]
    links = _links(path, flow_run_id)
    await acreate_table_artifact(rows, "receipt", f"dispatch {dispatch_id}: {state}; {links}")
    if studies is not None:
        await acreate_table_artifact(_study_rows(studies), "receipt-studies", _of_studies(studies, links))
    if outputs or any(receipt.error or receipt.notes or any(receipt.odd) for receipt in receipts):
        await acreate_markdown_artifact(
            _markdown(dispatch_id, state, receipts, outputs, links),
            "receipt-details",
            f"dispatch {dispatch_id}: details",
        )


def has_run_before() -> bool:
    """Return True unless it is the first time that the flow run of this context runs."""
    context = FlowRunContext.get()
    return context is None or context.flow_run is None or context.flow_run.run_count != 1


def _row(receipt: Receipt) -> dict[str, Any]:
    counts = receipt.facts() | {"target": receipt.target}
    keys = ("target", "state", "delivered", "warnings", "already", "rejected", "skipped", "unsent", "bytes", "seconds")
    return {key: counts[key] for key in (*keys, "attempts", "verified", "hook")} | {"error": receipt.error or ""}


def _study_rows(studies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what people see of a flood's studies: those that were not delivered first."""
    first = (row for row in studies if row["state"] != State.DELIVERED)
    others = (row for row in studies if row["state"] == State.DELIVERED)
    return [
        {"study": row["study"], "dispatch": row["dispatch_id"], "target": name}
        | {key: one[key] for key in ("state", "delivered", "already", "rejected", "unsent", "hook")}
        | {"error": one["error"] or ""}
        for row in islice(chain(first, others), SHOWN_STUDIES)
        for name, one in row["targets"].items()
    ]


def _of_studies(studies: Sequence[dict[str, Any]], links: str) -> str:
    delivered = sum(row["state"] == State.DELIVERED for row in studies)
    rest = f", {SHOWN_STUDIES} are shown" if len(studies) > SHOWN_STUDIES else ""
    return f"{delivered} of {len(studies)} studies delivered{rest}; {links}"


def _links(path: Path, flow_run_id: str) -> str:
    """Return where people go on from a receipt: our pages first, which can send what is missing."""
    links = {
        "this dispatch": f"/talaria/dispatches/{flow_run_id}",
        "receipt": f"/talaria/dispatches/{flow_run_id}/receipt",
        "its run": f"/v2/runs/flow-run/{flow_run_id}",
        "targets": "/talaria/targets",
        "earlier receipts": "/v2/artifacts/key/receipt",
    }
    shown = " · ".join(f"[{words}]({link})" for words, link in links.items())
    return f"all items: `{path}` on the machine that sent them; {shown}"


def _markdown(dispatch_id: str, state: State, receipts: Sequence[Receipt], outputs: dict[str, str], links: str) -> str:
    lines = [f"# Dispatch `{dispatch_id}`: {state}", "", links, ""]
    for receipt in receipts:
        lines += [
            f"## [{receipt.target}](/talaria/targets/{receipt.target}): {receipt.state}",
            "",
            f"{receipt.words or 'nothing'}; verified: {receipt.verified}.",
        ]
        lines += [f"\n**{_plain(receipt.error)}**"] if receipt.error else []
        lines += [f"\n{_plain(note)}" for note in receipt.notes]
        odd = [*islice(receipt.odd, SHOWN_ITEMS)]
        more = len(receipt.items) - receipt.counts[Kind.DELIVERED] - len(odd)
        if odd:
            lines += ["", "| item | outcome | reason |", "|---|---|---|"]
            lines += [f"| {_plain(i.path)} | {i.outcome} | {_plain(i.detail)} |" for i in odd]
        if more:
            lines += ["", f"… and {more} more: see the JSON file."]
        if outputs.get(receipt.target):
            lines += [
                "",
                "The script at the end:",
                "",
                *("    " + line for line in outputs[receipt.target].splitlines()),
            ]
        lines.append("")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Escape a value, so that it is not read as Markdown or HTML."""
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, "\\" + sign)
    return text.replace("\n", " ")
