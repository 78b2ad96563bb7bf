"""The names of targets, of sources and of rules: each name means one of them, whatever its type."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prefect.client.schemas.objects import BlockDocument

from blocks import RULES, SOURCES, TYPES
from transfer.errors import Misconfigured

_CLASSES = (*TYPES.items(), *SOURCES.items(), *RULES.items())
SLUGS = {cls.get_block_type_slug(): name for name, cls in _CLASSES}
_WORDS = {cls.get_block_type_slug(): cls.word for _, cls in _CLASSES}  # what each is: a target, a source or a rule


def type_of(document: BlockDocument) -> str:
    """Return the name of a saved target's or source's type, as in `targets.yaml`."""
    slug = document.block_type.slug if document.block_type else ""
    return SLUGS.get(slug, slug)


def qualified(document: BlockDocument) -> str:
    """Return a saved name with its type in front, which no other has."""
    return f"{type_of(document)}/{document.name}"


def split(written: str) -> tuple[str | None, str]:
    """Return the type, if one is given, and the name that somebody wrote: `pacs`, `dicom/pacs`, `dicom-target/pacs`.

    The name is "" if there is none.
    """
    prefix, slash, name = written.strip().rpartition("/")
    return (SLUGS.get(prefix, prefix) if slash else None), name


def pick(written: str, documents: Iterable[BlockDocument]) -> BlockDocument | None:
    """Return the document that a written name means; None if there is none.

    Raises:
        Misconfigured: it means several; the message lists them.
    """
    type_name, name = split(written)
    found = [one for one in documents if one.name == name and type_name in (None, type_of(one))]
    if len(found) > 1:
        raise ambiguous(name, found)
    return found[0] if found else None


def ambiguous(name: str, documents: Sequence[BlockDocument]) -> Misconfigured:
    """Return the error for a name that several targets, sources or rules have."""
    candidates = " or ".join(sorted(map(qualified, documents)))
    known = (_WORDS.get(one.block_type.slug) for one in documents if one.block_type)
    kind = next(filter(None, known), "target")
    able = "rename or remove" if kind == "target" else "remove"
    return Misconfigured(f"{len(documents)} {kind}s are named {name}: write {candidates}, and {able} one")
