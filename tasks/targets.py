"""Targets as Prefect keeps them: found by name over all types, loaded, saved and removed.

Secrets are asked for only of targets that are about to be used; others are made of what the server answers without.

A name that several targets have (Prefect's own pages allow that) is refused everywhere unless the type precedes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from prefect.blocks.core import Block
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import BlockDocument
from pydantic import ValidationError

from blocks import REFUSED, TYPES, Target
from blocks.base import MASK, masked_secrets
from tasks import DRIVERS
from tasks.names import ambiguous, pick, qualified, split, type_of
from tasks.paging import PAGE
from transfer.errors import Misconfigured, NotFound
from transfer.validation import what_is_wrong


@dataclass(frozen=True)
class Broken:
    """A saved target whose settings are no longer valid: nothing can be sent to it until it is applied again."""

    name: str
    type_name: str
    reason: str
    made: datetime | None = None  # when it was saved first


def facts(one: Target | Broken) -> dict[str, Any]:
    """Return what lists show of a saved target; direction and `enabled` of a broken one are not known."""
    if isinstance(one, Broken):
        known: dict[str, Any] = {"direction": None, "enabled": None, "broken": one.reason}
    else:
        known = {"direction": str(one.direction), "enabled": one.enabled, "broken": None}
    return {"name": one.name, "type": one.type_name, **known}


async def all_targets(client: PrefectClient, used: Iterable[str] = ()) -> list[Target | Broken]:
    """Return every saved target, by name; a Broken for one that can't be loaded.

    Args:
        used: the names of those that are loaded with their secrets; of others, secrets that are set are masked.
    """
    there = {document.id: document for document in await documents(client)}
    if names := {str(document.name) for document in there.values()} & set(used):
        there |= {document.id: document for document in await documents(client, names, secrets=True)}
    found: list[Target | Broken] = []
    for document in there.values():
        try:
            found.append(await _made(client, document, known=document.name in names))
        except Misconfigured as exc:
            found.append(Broken(str(document.name), type_of(document), exc.message, document.created))
    return sorted(found, key=lambda target: target.name)


async def documents(
    client: PrefectClient, names: Iterable[str] | None = None, *, secrets: bool = False
) -> list[BlockDocument]:
    """Return the block documents of targets, all or those with these names; secrets masked unless they are wanted."""
    body: dict[str, Any] = {
        # Of every type, also one whose package is gone: its targets are listed as broken, not left out.
        "block_schemas": {"block_capabilities": {"all_": Target._block_schema_capabilities}},
        "block_documents": {"is_anonymous": {"eq_": False}},
        "limit": PAGE,
        "offset": 0,
    }
    if secrets:
        body["include_secrets"] = True
    if names is not None:
        body["block_documents"]["name"] = {"any_": list(names)}
    found: list[BlockDocument] = []
    while True:
        response = await client.request("POST", "/block_documents/filter", json=body)
        page = [BlockDocument.model_validate(document) for document in response.json()]
        found += page
        if len(page) < PAGE:
            return found
        body["offset"] += PAGE


async def _made(client: PrefectClient, document: BlockDocument, *, known: bool) -> Target:
    """Return the target that a document holds, which may be one without secrets (`known` false).

    Raises:
        Misconfigured: as of `from_document`.
    """
    if known:
        return from_document(document)
    try:
        with masked_secrets():
            return from_document(document)
    except Misconfigured as exc:
        if not _may_be_the_mask(document, exc.__cause__):
            raise
    whole = await documents(client, [str(document.name)], secrets=True)
    return from_document(next((one for one in whole if one.id == document.id), document))


def _may_be_the_mask(document: BlockDocument, exc: BaseException | None) -> bool:
    """Return True if settings may be valid once the secrets are known: a type judges these, too."""
    masked = {name for name, value in document.data.items() if value == MASK}
    if not masked or not isinstance(exc, ValidationError):
        return bool(masked) and exc is not None
    places = [error["loc"] for error in exc.errors(include_input=False, include_context=False)]
    return all(not place or place[0] in masked for place in places)


def from_document(document: BlockDocument) -> Target:
    """Return the target that a document holds.

    Raises:
        Misconfigured: its values are not valid for the type, or the type's package is not installed.
    """
    slug = document.block_type.slug if document.block_type else ""
    if slug not in _types_by_slug():
        why = "; ".join(f"{name}: {reason}" for name, reason in REFUSED.items())
        raise Misconfigured(
            f"no type that works here has the block type {slug}: {why or 'install the package that adds it'}",
            str(document.name),
        )
    try:
        target = Block._from_block_document(document)
    except (ValidationError, RuntimeError, TypeError, ValueError) as exc:
        raise Misconfigured(
            f"its settings are not valid ({_wrong(document, exc)}): apply it again", str(document.name)
        ) from exc
    if not isinstance(target, Target):
        raise Misconfigured("is not a target", str(document.name))
    target.made_at(document.created)
    return target


def _wrong(document: BlockDocument, exc: Exception) -> str:
    """Return what is wrong with a document, without its values: they may be secrets."""
    if not isinstance(exc, ValidationError):
        return type(exc).__name__
    cls = _types_by_slug().get(document.block_type.slug if document.block_type else "")
    return what_is_wrong(exc.errors(), cls.model_fields if cls else {})


def _types_by_slug() -> dict[str, type[Target]]:
    return {cls.get_block_type_slug(): cls for cls in TYPES.values()}


async def load(client: PrefectClient, names: Iterable[str], *, secrets: bool = True) -> list[Target]:
    """Load targets by name, or by `type/name`, in that order, each once.

    Args:
        secrets: whether they are about to be used; else the secrets that are set are masked.

    Raises:
        NotFound: there is no such target; the message lists the existing ones.
        Misconfigured: its settings are not valid, or a name means several targets.
    """
    wanted = list(dict.fromkeys(names))
    there = await documents(client, {split(name)[1] for name in wanted}, secrets=secrets)
    found = {name: pick(name, there) for name in wanted}
    missing = [name for name, document in found.items() if document is None]
    if missing:
        raise await _no_target(client, missing)
    chosen = {document.id: document for document in found.values() if document}
    for document in chosen.values():
        alike = [one for one in chosen.values() if one.name == document.name]
        if len(alike) > 1:  # the ledger and the receipts know targets by their names
            raise ambiguous(str(document.name), alike)
    return [await _made(client, document, known=secrets) for document in chosen.values()]


async def _no_target(client: PrefectClient, names: Iterable[str]) -> NotFound:
    known = sorted(str(document.name) for document in await documents(client))
    there = f"there are: {', '.join(known)}" if known else "there are none yet: `talaria target apply FILE.yaml`"
    return NotFound(f"no target named {', '.join(names)}; {there}")


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
        replace: whether targets of other types that have the name are removed.

    Raises:
        Misconfigured: there are such targets, and they are not to be replaced.
    """
    there = await documents(client, [name])
    others = [one for one in there if type_of(one) != target.type_name]
    if others and not replace and len(others) == len(there):
        raise Misconfigured(f"the name is taken by {qualified(others[0])}", name)
    for document in others if replace else ():
        await client.delete_block_document(document.id)
    await target.asave(name, overwrite=True, client=client)
    await limit(client, target)


async def limit(client: PrefectClient, target: Target) -> str:
    """Create a target's global concurrency limit if it doesn't exist; return its name."""
    name = limit_name(target)
    await client.upsert_global_concurrency_limit_by_name(name, target.max_dispatches)
    return name


def limit_name(target: Target) -> str:
    """Return the name of a target's global concurrency limit."""
    return f"talaria-{target.name}"


async def remove(client: PrefectClient, name: str) -> None:
    """Remove one target.

    Raises:
        NotFound: there is none with that name; the message lists the existing ones.
        Misconfigured: the name means several.
    """
    document = pick(name, await documents(client, [split(name)[1]]))
    if document is None:
        raise await _no_target(client, [name])
    await client.delete_block_document(document.id)
