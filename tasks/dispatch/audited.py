"""What the audit trail records of deliveries, queries and retrievals: UIDs and counts, and who asked for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from blocks.base import Target
from tasks.dispatch.delivery import Delivery
from transfer import live
from transfer.audit import AuditResult, Event, pseudonym, record
from transfer.plan import Plan
from transfer.receipt import Receipt, State

MOST = 50  # UIDs of one entry
_behalf: ContextVar[str] = ContextVar("on_behalf_of", default="")
RESULTS = {State.DELIVERED: AuditResult.SUCCESS, State.PARTIAL: AuditResult.MINOR, State.WAITING: AuditResult.MINOR}


@contextmanager
def on_behalf_of(who: str) -> Iterator[None]:
    """Record what runs within the block begin as asked for by somebody, where nothing else says by whom."""
    token = _behalf.set(who)
    try:
        yield
    finally:
        _behalf.reset(token)


def requester(flow_run: Any) -> str:
    """Return who asked for a flow run; "" if that is not known, and then this process's user is recorded.

    The front door sets the label, and nobody can set it past that; `created_by` is empty at a Prefect server elsewhere.
    """
    by = getattr(flow_run, "labels", {}).get(live.BY) or getattr(flow_run, "created_by", None)
    return str(getattr(by, "display_value", by) or _behalf.get())


def delivery_begins(delivery: Delivery, run: str, who: str) -> None:
    """Record that a delivery begins (PS3.15: Begin Transferring DICOM Instances)."""
    record(Event.DELIVERY_BEGUN, who, **_about(delivery.target, run), **_content(delivery.plan))


def delivery_ends(delivery: Delivery, receipt: Receipt, run: str, who: str) -> None:
    """Record how a delivery ended (PS3.15: DICOM Instances Transferred)."""
    record(
        Event.DELIVERY,
        who,
        RESULTS.get(receipt.state, AuditResult.SERIOUS),
        state=str(receipt.state),
        **_about(delivery.target, run),
        **_content(delivery.plan),
        outcomes={str(kind): count for kind, count in receipt.counts.items() if count},
        bytes=receipt.bytes,
        reason=receipt.error,
    )


def refused(reason: str, run: str, who: str, **about: Any) -> None:
    """Record that a run was refused before it did anything."""
    record(Event.REFUSED, who, AuditResult.SERIOUS, reason=reason, run=run, **about)


def queried(source: Target, keys: list[str], found: int | None, run: str, who: str) -> None:
    """Record a query; `keys` are the names of its keys, `found` is None if it failed."""
    result = AuditResult.SERIOUS if found is None else AuditResult.SUCCESS
    record(Event.QUERY, who, result, **_about(source, run), keys=keys, found=found)


def retrieval_ends(source: Target, state: str, studies: list[str], into: str, run: str, who: str) -> None:
    """Record how a retrieval ended, and what it brought."""
    result = AuditResult.SUCCESS if state == "delivered" else AuditResult.MINOR if studies else AuditResult.SERIOUS
    record(
        Event.RETRIEVAL, who, result, state=state, **_about(source, run, "source"), studies=studies[:MOST], into=into
    )


def _about(target: Target, run: str, role: str = "target") -> dict[str, Any]:
    return {role: target.name, "type": target.type_name, "node": target.node, "run": run}


def _content(plan: Plan) -> dict[str, Any]:
    shared = Counter(item.shared for item in plan.items if item.shared)  # a few for thousands of items
    studies = sorted({one.StudyInstanceUID for one in shared} - {""})
    patients = sorted({one.PatientID for one in shared} - {""})
    classes = Counter[str]()
    for one, count in shared.items():
        classes[one.SOPClassUID] += count
    return {
        "dispatch": plan.dispatch_id,
        "items": len(plan.items),
        "studies": studies[:MOST],
        "sop_classes": dict(classes.most_common(MOST)),
        "patients": [pseudonym(patient) for patient in patients[:MOST]],
    }
