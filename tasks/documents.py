"""Targets and sources as Prefect keeps them: block documents, of which blocks are made.

Secrets are asked for only of what is about to be used; others are made of what the server answers without.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from http.client import CONFLICT
from typing import Any, Generic, TypeVar
from uuid import UUID

from httpx import HTTPStatusError
from prefect.blocks.core import Block
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import BlockDocumentCreate
from prefect.client.schemas.objects import BlockDocument
from prefect.exceptions import ObjectNotFound
from pydantic import ValidationError

from blocks.base import MASK, masked_secrets
from blocks.named import NamedBlock
from tasks.names import ambiguous, pick, split, type_of
from transfer.errors import Misconfigured, NotFound
from transfer.validation import what_is_wrong

B = TypeVar("B", bound=NamedBlock)
PAGE = 100  # documents a request; meanwhile a server answers nobody else, so not as many as it would give
REPLACES = "Talaria-Replaces"  # header: ids of the documents in whose place another type's is saved under their name
REPLACED_S = 0.5  # between the saving of a block and the removal of the one that it replaces: one request
TURN = 25  # blocks that are made before others in this process have a turn


@dataclass(frozen=True)
class Broken:
    """A saved target or source whose settings are no longer valid: it takes no part until it is applied again."""

    name: str
    type_name: str
    reason: str
    made: datetime | None = None  # when it was saved first


class Documents(Generic[B]):
    """The saved blocks of one kind.

    Args:
        kind: their common class.
        types: the classes by the names of their types.
        refused: types that can't be used, each with the reason.
    """

    def __init__(self, kind: type[B], types: Mapping[str, type[B]], refused: Mapping[str, str] | None = None) -> None:
        self.kind, self.types, self._refused = kind, types, refused or {}

    async def documents(
        self, client: PrefectClient, names: Iterable[str] | None = None, *, secrets: bool = False
    ) -> list[BlockDocument]:
        """Return the block documents, all or those with these names; secrets masked unless they are wanted."""
        body: dict[str, Any] = {
            # Of every type, also one whose package is gone: what has it is listed as broken, not left out.
            "block_schemas": {"block_capabilities": {"all_": self.kind._block_schema_capabilities}},
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

    async def all(self, client: PrefectClient, used: Iterable[str] | None = ()) -> list[B | Broken]:
        """Return every saved block by name, the newest of a name last; a Broken for one that can't be loaded.

        Args:
            used: the names of those that are loaded with their secrets, None for all; of others, secrets that are set
                are masked.
        """
        there = {document.id: document for document in await self.documents(client, secrets=used is None)}
        names = {str(document.name) for document in there.values()}
        if used is not None and (names := names & set(used)):
            there |= {document.id: document for document in await self.documents(client, names, secrets=True)}
        found: list[B | Broken] = []
        for number, document in enumerate(sorted(there.values(), key=lambda one: (str(one.name), _made_at(one)))):
            if number % TURN == 0:
                await asyncio.sleep(0)
            try:
                found.append(await self._made(client, document, known=document.name in names))
            except Misconfigured as exc:
                found.append(Broken(str(document.name), type_of(document), exc.message, document.created))
        return found

    async def load(self, client: PrefectClient, names: Iterable[str], *, secrets: bool = True) -> list[B]:
        """Load blocks by name, or by `type/name`, in that order, each once.

        Args:
            secrets: whether they are about to be used; else the secrets that are set are masked.

        Raises:
            NotFound: there is no such one; the message lists the existing ones.
            Misconfigured: its settings are not valid, or a name means several.
        """
        wanted = list(dict.fromkeys(names))
        there = await self.documents(client, {split(name)[1] for name in wanted}, secrets=secrets)
        if len({one.name for one in there}.intersection(wanted)) < sum(one.name in wanted for one in there):
            await asyncio.sleep(REPLACED_S)  # one may be about to be replaced by another type's
            there = await self.documents(client, {split(name)[1] for name in wanted}, secrets=secrets)
        found = {name: pick(name, there) for name in wanted}
        missing = [name for name, document in found.items() if document is None]
        if missing:
            raise await self._none(client, missing)
        chosen = {document.id: document for document in found.values() if document}
        for document in chosen.values():
            alike = [one for one in chosen.values() if one.name == document.name]
            if len(alike) > 1:  # the ledger and the receipts know them by their names
                raise ambiguous(str(document.name), alike)
        return [await self._made(client, document, known=secrets) for document in chosen.values()]

    async def save(self, client: PrefectClient, block: B, name: str, others: Iterable[BlockDocument] = ()) -> None:
        """Save a block; remove those of other types that had its name.

        They are removed once it is saved: a kill, or a refusal, between the two leaves both, never none. Saving it
        once more removes them.
        """
        others = [*others]
        if not others or not await _created(client, block, name, others):
            await block.asave(name, overwrite=True, client=client)
        for one in others:
            with suppress(ObjectNotFound):
                await client.delete_block_document(one.id)

    async def remove(self, client: PrefectClient, name: str) -> str:
        """Remove one block; return its name.

        Raises:
            NotFound: there is none with that name; the message lists the existing ones.
            Misconfigured: the name means several.
        """
        document = pick(name, await self.documents(client, [split(name)[1]]))
        if document is None:
            raise await self._none(client, [name])
        await client.delete_block_document(document.id)
        return str(document.name)

    async def _none(self, client: PrefectClient, names: Iterable[str]) -> NotFound:
        known, word = sorted(str(document.name) for document in await self.documents(client)), self.kind.word
        command = f"`talaria {self.kind.seen_to_by or word} apply FILE.yaml`"
        there = f"there are: {', '.join(known)}" if known else f"there are none yet: {command}"
        asked = ", ".join(name for name in names if name.strip())
        return NotFound(f"no {word} named {asked}; {there}" if asked else f"no {word} is named; {there}")

    async def _made(self, client: PrefectClient, document: BlockDocument, *, known: bool) -> B:
        """Return the block that a document holds, which may be one without secrets (`known` false).

        Raises:
            Misconfigured: as of `made_of`.
        """
        if known:
            return self.made_of(document)
        try:
            with masked_secrets():
                return self.made_of(document)
        except Misconfigured as exc:
            if not _may_be_the_mask(document, exc.__cause__):
                raise
        whole = await self.documents(client, [str(document.name)], secrets=True)
        return self.made_of(next((one for one in whole if one.id == document.id), document))

    def made_of(self, document: BlockDocument) -> B:
        """Return the block that a document holds.

        Raises:
            Misconfigured: its values are not valid for the type, or the type's package is not installed.
        """
        slug = document.block_type.slug if document.block_type else ""
        cls = next((one for one in self.types.values() if one.get_block_type_slug() == slug), None)
        if cls is None:
            why = "; ".join(f"{name}: {reason}" for name, reason in self._refused.items())
            raise Misconfigured(
                f"no type that works here has the block type {slug}: {why or 'install the package that adds it'}",
                str(document.name),
            )
        try:
            made = Block._from_block_document(document)
        except (ValidationError, RuntimeError, TypeError, ValueError) as exc:
            # Without its values: they may be secrets.
            why = what_is_wrong(exc.errors(), cls.model_fields) if isinstance(exc, ValidationError) else ""
            raise Misconfigured(
                f"its settings are not valid ({why or type(exc).__name__}): apply it again", str(document.name)
            ) from exc
        if not isinstance(made, self.kind):
            raise Misconfigured(f"is not a {self.kind.word}", str(document.name))
        return made


async def _created(client: PrefectClient, block: Block, name: str, replaced: Iterable[BlockDocument]) -> bool:
    """Save a block under a name that those have which it replaces; return False if its type has one of this name."""
    await block.aregister_type_and_schema(client=client)
    document = block._to_block_document(name=name, include_secrets=True)
    body = document.model_dump(
        mode="json", include=set(BlockDocumentCreate.model_fields), exclude_unset=True,
        context={"include_secrets": True}, serialize_as_any=True,
    )  # fmt: skip
    headers = {REPLACES: " ".join(str(one.id) for one in replaced)}
    try:
        made = (await client.request("POST", "/block_documents/", json=body, headers=headers)).json()
    except HTTPStatusError as exc:
        if exc.response.status_code != CONFLICT:
            raise
        return False
    block._block_document_name, block._block_document_id = name, UUID(made["id"])
    return True


def _made_at(document: BlockDocument) -> float:
    return document.created.timestamp() if document.created else 0.0


def _may_be_the_mask(document: BlockDocument, exc: BaseException | None) -> bool:
    """Return True if settings may be valid once the secrets are known: a type judges these, too."""
    masked = {name for name, value in document.data.items() if value == MASK}
    if not masked or not isinstance(exc, ValidationError):
        return bool(masked) and exc is not None
    places = [error["loc"] for error in exc.errors(include_input=False, include_context=False)]
    return all(not place or place[0] in masked for place in places)
