"""Targets as Prefect keeps them: found by name over all types, loaded with their secrets, saved and removed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prefect.blocks.core import Block
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import BlockDocument
from pydantic import ValidationError

from blocks import TYPES, Target
from tasks import DRIVERS
from transfer.errors import Misconfigured, NotFound

PAGE = 200  # documents a request; Prefect's own limit


async def all_targets(client: PrefectClient) -> list[Target]:
    """Return every saved target, with secrets, by name.

    A document that no longer validates is left out; `documents` tells it.
    """
    found = []
    for document in await documents(client):
        try:
            found.append(from_document(document))
        except Misconfigured:
            continue
    return sorted(found, key=lambda target: target.name)


async def documents(client: PrefectClient, names: Iterable[str] | None = None) -> list[BlockDocument]:
    """Return the block documents of targets, all or those with these names."""
    body: dict[str, Any] = {
        "block_types": {"slug": {"any_": [cls.get_block_type_slug() for cls in TYPES.values()]}},
        "block_documents": {"is_anonymous": {"eq_": False}},
        "include_secrets": True,
        "limit": PAGE,
        "offset": 0,
    }
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


def from_document(document: BlockDocument) -> Target:
    """Return the target that a document holds.

    Raises:
        Misconfigured: its values don't fit the type (any more).
    """
    try:
        target = Block._from_block_document(document)
    except (ValidationError, RuntimeError, TypeError, ValueError) as exc:
        # A validation error repeats the values, which may be secrets: only the fields are told.
        fields = [".".join(map(str, e["loc"])) for e in exc.errors()] if isinstance(exc, ValidationError) else []
        raise Misconfigured(
            f"its settings are not valid: {', '.join(fields) or type(exc).__name__}", str(document.name)
        ) from exc
    if not isinstance(target, Target):
        raise Misconfigured("is not a target", str(document.name))
    return target


async def load(client: PrefectClient, names: Iterable[str]) -> list[Target]:
    """Load targets by name, or by `slug/name`, in that order, each once.

    Raises:
        NotFound: no such target; the message lists those that there are.
        Misconfigured: its settings are not valid.
    """
    wanted = list(dict.fromkeys(name.rpartition("/")[2].strip() for name in names))
    found = {document.name: document for document in await documents(client, wanted)}
    missing = [name for name in wanted if name not in found]
    if missing:
        known = sorted(str(document.name) for document in await documents(client))
        there = f"there are: {', '.join(known)}" if known else "there are none yet: `talaria target apply FILE.yaml`"
        raise NotFound(f"no target named {', '.join(missing)}; {there}")
    return [from_document(found[name]) for name in wanted]


def check_destination(target: Target) -> None:
    """Refuse a target that nothing may be sent to.

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


async def save(client: PrefectClient, target: Target, name: str) -> None:
    """Save a target under a name that is unique over all types; one of another type is replaced."""
    for document in await documents(client, [name]):
        if document.block_type and document.block_type.slug != target.get_block_type_slug():
            await client.delete_block_document(document.id)
    await target.asave(name, overwrite=True, client=client)
    await limit(client, target)


async def limit(client: PrefectClient, target: Target) -> str:
    """Make sure that the global concurrency limit of a target is there; return its name."""
    name = f"talaria-{target.name}"
    await client.upsert_global_concurrency_limit_by_name(name, target.max_dispatches)
    return name


async def remove(client: PrefectClient, name: str) -> None:
    """Remove a target.

    Raises:
        NotFound: there is none of that name.
    """
    found = await documents(client, [name])
    if not found:
        raise NotFound(f"no target named {name}")
    for document in found:
        await client.delete_block_document(document.id)
