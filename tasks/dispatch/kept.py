"""Receipts at the server, whole and with all items, so that they can be read from any machine.

A document is compressed and cut into parts, one artifact each, of the type that Prefect's pages don't list.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import zlib
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from uuid import UUID, uuid4

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterType,
)
from prefect.client.schemas.objects import Artifact
from prefect.client.schemas.sorting import ArtifactSort

from transfer import lines
from transfer.home import Home

PART_CHARS = 1 << 18  # of one artifact's data: some 6,000 items, of which its request takes several copies
PAGE = 20  # artifacts a request
KIND = "talaria-receipt"  # marks the artifacts that are such parts, in their metadata
HIDDEN = "result"  # the type of artifacts that Prefect's pages leave out


async def keep(client: PrefectClient, flow_run_id: UUID, pieces: Iterable[bytes], *, again: bool = True) -> None:
    """Save the receipts of a run at the server, and remove its earlier ones.

    Args:
        pieces: the document in JSON; only compressed it is held as a whole.
        again: whether there may be earlier ones.
    """
    text, digest = await asyncio.to_thread(_compressed, pieces)
    starts = range(0, len(text), PART_CHARS)
    mark = {"kind": KIND, "set": uuid4().hex, "parts": str(len(starts)), "sha256": digest}
    for number, at in enumerate(starts):
        data, own = text[at : at + PART_CHARS], mark | {"part": str(number)}
        await client.create_artifact(ArtifactCreate(type=HIDDEN, data=data, metadata_=own, flow_run_id=flow_run_id))
    for old in await _parts(client, flow_run_id) if again else ():
        if old.metadata_ and old.metadata_["set"] != mark["set"]:
            await client.delete_artifact(old.id)


def here(home: Home, run_id: str, *, packed: bool = False) -> dict[str, Any] | None:
    """Return the receipts of a run that this machine has; None if it has none, or only damaged ones.

    Args:
        packed: whether their lines are to be packed (`transfer.lines`), as for a run that goes on.
    """
    with (
        suppress(OSError, ValueError, LookupError, TypeError, AttributeError),
        open(home.receipt(run_id), "rb") as file,
    ):
        document = lines.document(file) if packed else json.load(file)
        return document if isinstance(document, dict) else None
    return None


def _compressed(pieces: Iterable[bytes]) -> tuple[str, str]:
    """Return a document compressed, in base 64, and its SHA-256."""
    compressor, digest, packed = zlib.compressobj(), hashlib.sha256(), bytearray()
    for piece in pieces:
        digest.update(piece)
        packed += compressor.compress(piece)
    packed += compressor.flush()
    encoded = base64.b64encode(packed)
    packed.clear()  # of 100,000 items, each copy is four megabytes
    return encoded.decode("ascii"), digest.hexdigest()


async def read(client: PrefectClient, flow_run_id: UUID, *, packed: bool = False) -> dict[str, Any] | None:
    """Return the last complete receipts of a run, packed or not; None if the server has none."""
    sets: dict[str, dict[int, Artifact]] = {}
    for part in await _parts(client, flow_run_id):  # the newest first
        mark = part.metadata_ or {}
        sets.setdefault(mark["set"], {})[int(mark["part"])] = part
    for parts in sets.values():
        mark = parts[min(parts)].metadata_ or {}
        if len(parts) < int(mark["parts"]):
            continue  # its writer was killed
        texts = [str(parts[number].data) for number in sorted(parts)]
        document = await asyncio.to_thread(_document, texts, str(mark["sha256"]), packed)
        if document is not None:
            return document
    return None


def _document(texts: list[str], digest: str, packed: bool) -> dict[str, Any] | None:
    """Return the document that parts hold together; None if it is another."""
    data = zlib.decompress(base64.b64decode("".join(texts)))
    if hashlib.sha256(data).hexdigest() != digest:
        return None
    document: dict[str, Any] = lines.document(io.BytesIO(data)) if packed else json.loads(data)
    return document


async def _parts(client: PrefectClient, flow_run_id: UUID) -> list[Artifact]:
    found: list[Artifact] = []
    while True:
        page = await client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]), type=ArtifactFilterType(any_=[HIDDEN])
            ),
            sort=ArtifactSort.CREATED_DESC,
            limit=PAGE,
            offset=len(found),
        )
        found += page
        if len(page) < PAGE:
            return [one for one in found if (one.metadata_ or {}).get("kind") == KIND]
