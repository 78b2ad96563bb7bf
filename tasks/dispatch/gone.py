"""What a run was to send, and is there no more when it comes back or is retried: rejected by name, never passed over.

A run that waits holds no files, and plans them anew. What its receipts say is unsent must not vanish from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tasks.dispatch.delivery import Delivery, lacking
from transfer import lines
from transfer.item import Item, path_of
from transfer.outcome import Kind, Outcome
from transfer.receipt import State
from transfer.studies import FloodStudy

GONE = "was to be sent, and is not there any more"


def reject_gone(delivery: Delivery, before: Mapping[str, Any] | None) -> None:
    """Reject what was unsent by a target's earlier receipt, and what the delivery's plan has not.

    Args:
        before: that receipt, with all items; None if there is none.
    """
    unsent = [one.path for one in lines.of(lines.read(before.get("items", ())), [Kind.UNSENT])] if before else []
    if not unsent:
        return
    there = {item.shown for item in (*delivery.plan.items, *delivery.refused)}
    gone = [Item(path_of(shown), 0, 0, problem=GONE) for shown in unsent if shown not in there]
    if gone:
        delivery.refused |= {item: Outcome(Kind.REJECTED, GONE) for item in gone}
        delivery.plan = delivery.plan.narrowed(delivery.plan.items, lacks=lacking(delivery.refused))


def gone_studies(found: Iterable[FloodStudy], before: Iterable[Mapping[str, Any]]) -> dict[str, None]:
    """Return the names of a flood's studies that are there no more.

    Args:
        found: its studies, as they are listed now.
        before: the rows of its earlier receipts.
    """
    there = {study.name for study in found}
    return {str(row["study"]): None for row in before if row["study"] not in there}


def arrived_rows(before: Iterable[dict[str, Any]], target: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the rows of some studies that have arrived at a target, which nothing is to be said of there."""
    wanted = {*names}
    return [row for row in before if row["study"] in wanted and _arrived(row, target)]


def _arrived(row: Mapping[str, Any], target: str) -> bool:
    return bool(row["targets"].get(target, {}).get("state") == State.DELIVERED)
