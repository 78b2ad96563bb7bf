"""Targets as Prefect keeps them: found by name over all types, loaded, saved and removed (`tasks.documents`).

A name that several targets have (Prefect's own pages allow that) is refused everywhere unless the type precedes it.
"""

from __future__ import annotations

from typing import Any

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import BlockDocument

from blocks import REFUSED, TYPES, Target
from blocks.base import check_host
from blocks.dicom import DicomTarget
from tasks import DRIVERS
from tasks.documents import Broken, Documents
from tasks.names import qualified, type_of
from transfer.errors import Misconfigured
from transfer.plan import Origin
from transfer.validation import check_aet

_CHECKS = {"sender_aet": check_aet, "receiver_aet": check_aet, "sender_host": check_host}
UNSAID = "this dispatch does not say where the study came from: give {}"
UNKNOWN = "a retrieval does not know it of what it fetches: {}"


class _Targets(Documents[Target]):
    def made_of(self, document: BlockDocument) -> Target:
        target = super().made_of(document)
        target.made_at(document.created)
        return target


TARGETS = _Targets(Target, TYPES, REFUSED)
all_targets, documents, load, remove = TARGETS.all, TARGETS.documents, TARGETS.load, TARGETS.remove


def facts(one: Target | Broken) -> dict[str, Any]:
    """Return what lists show of a saved target; direction and `enabled` of a broken one are not known."""
    if isinstance(one, Broken):
        known: dict[str, Any] = {"direction": None, "enabled": None, "broken": one.reason}
    else:
        known = {"direction": str(one.direction), "enabled": one.enabled, "broken": None}
    return {"name": one.name, "type": one.type_name, **known}


def check_destination(target: Target) -> None:
    """Raise if nothing may be sent to a target.

    Raises:
        Misconfigured: it is disabled, only for queries, or of a type that has no driver.
    """
    if not target.enabled:
        raise Misconfigured(f"is disabled: `talaria target enable {target.name}` first", target.name)
    if not target.stores:
        raise Misconfigured(
            "has direction query, so nothing is sent to it: set its direction to store or both", target.name
        )
    DRIVERS.of(target)


def check_origin(target: Target, origin: Origin, unknown: str = UNSAID) -> None:
    """Raise if a target takes something from a study's origin that nobody knows, or that can't be what it is for.

    Args:
        unknown: what to say in the first case, with a place for the name of the field.

    Raises:
        Misconfigured: it does.
    """
    for field, why in target.of_origin.items():
        value = str(getattr(origin, field))
        if not value.strip():
            raise Misconfigured(f"{why}, but {unknown.format(field)}", target.name)
        try:
            _CHECKS[field](value)
        except ValueError as exc:
            raise Misconfigured(f"{why}, but the study's origin can't be used: {exc}", target.name) from exc


def origin_of(source: Target) -> Origin:
    """Return where what is retrieved from a target comes from."""
    return Origin(source.aet_target if isinstance(source, DicomTarget) else "", "", source.node)


def check_source(target: Target) -> None:
    """Raise if a target can't or must not be queried.

    Raises:
        Misconfigured: it is disabled, only for deliveries, or of a type that can't be queried.
    """
    if not target.enabled:
        raise Misconfigured(f"is disabled: `talaria target enable {target.name}` first", target.name)
    driver = DRIVERS.of(target)
    if driver.find is None or driver.retrieve is None:
        able = ", ".join(name for name in DRIVERS if (one := DRIVERS[name]).find and one.retrieve)
        raise Misconfigured(f"targets of type {target.type_name} can't be queried; these can: {able}", target.name)
    if not target.queries:
        raise Misconfigured(
            "has direction store, so it is not queried: set its direction to query or both", target.name
        )


async def save(client: PrefectClient, target: Target, name: str, *, replace: bool = False) -> None:
    """Save a target under a name that no target of another type has.

    Args:
        replace: whether targets of other types that have the name are removed, when it is saved.

    Raises:
        Misconfigured: there are such targets, and they are not to be replaced.
    """
    there = await documents(client, [name])
    others = [one for one in there if type_of(one) != target.type_name]
    if others and not replace and len(others) == len(there):
        raise Misconfigured(f"the name is taken by {qualified(others[0])}", name)
    await TARGETS.save(client, target, name, others if replace else ())
    await limit(client, target)


async def limit(client: PrefectClient, target: Target) -> str:
    """Create a target's global concurrency limit if it doesn't exist; return its name."""
    name = limit_name(target.name)
    await client.upsert_global_concurrency_limit_by_name(name, target.max_dispatches)
    return name


def limit_name(target: str) -> str:
    """Return the name of a target's global concurrency limit."""
    return f"talaria-{target}"
