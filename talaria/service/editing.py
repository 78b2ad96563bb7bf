"""Targets, sources and rules as people edit them in a form: checked by field, nobody's change or secret is lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prefect.client.schemas.objects import BlockDocument
from pydantic import ValidationError

from blocks.base import MOVED
from blocks.named import NAME, NamedBlock
from talaria.service import Office, rules, sources, targets
from talaria.targetfile import differing, field_names
from tasks.documents import Broken, Documents
from tasks.names import pick, split, type_of
from tasks.rules import SAVED_RULES
from tasks.sources.saved import KEPT
from tasks.targets import TARGETS
from transfer.errors import Misconfigured, NotFound
from transfer.validation import what_is_wrong

UNSEEN = ("enabled",)  # a button changes it


@dataclass(frozen=True)
class Editable:
    """What can be edited: targets, sources or rules.

    Attributes:
        saved: as Prefect keeps them.
        save: saves one, and has what belongs to that done: what it is now, what it was (None if that is not known or
            there was none), and `created` or `updated`.
        problems: why one can't be used though each of its fields is valid, in sentences.
    """

    saved: Documents[Any]
    save: Callable[[Office, Any, Any, str], Awaitable[None]]
    problems: Callable[[Office, Any], Awaitable[list[str]]]


async def _none(office: Office, block: NamedBlock) -> list[str]:
    return []


KINDS = {
    "target": Editable(TARGETS, targets.save_target, _none),
    "source": Editable(KEPT, sources.save_source, sources.problems_of),
    "rule": Editable(SAVED_RULES, rules.save_rule, rules.problems_of),
}


class NotValid(Exception):
    """A draft can't be saved. `errors` are pydantic's, with what each says in a sentence."""

    def __init__(self, errors: list[tuple[dict[str, Any], str]]) -> None:
        super().__init__("; ".join(words for _, words in errors))
        self.errors = errors


class Outdated(Exception):
    """Somebody else has saved it since the form was shown. `theirs` is what is saved now."""

    def __init__(self, theirs: NamedBlock | Broken, version: str) -> None:
        super().__init__(f"{theirs.name} was changed meanwhile")
        self.theirs, self.version = theirs, version


@dataclass(frozen=True)
class Draft:
    """A target, source or rule as a form describes it.

    Attributes:
        kind: of KINDS.
        values: by field, all but the secrets.
        secrets: those that are replaced, or removed (None); others stay as they are stored.
        base: name of the saved one that is changed, or whose secrets are taken; "" for none.
        version: of `base`, as the form has shown it; "" to save whatever it has become.
        new: whether it is to be another one than `base`.
    """

    kind: Editable
    name: str
    type_name: str
    values: Mapping[str, Any]
    secrets: Mapping[str, str | None]
    base: str = ""
    version: str = ""
    new: bool = False


@dataclass(frozen=True)
class StoredForm:
    """A saved target, source or rule as a form begins with it.

    Attributes:
        values: by field, as JSON; of one that is broken, as they were saved.
        secrets: the names of those that are set.
    """

    name: str
    type_name: str
    values: dict[str, Any]
    secrets: list[str]
    version: str


async def stored(office: Office, kind: Editable, name: str) -> StoredForm:
    """Return what is saved under a name, valid or not, without its secrets.

    Raises:
        NotFound: there is nothing.
        Misconfigured: the name means several.
    """
    document = await _document(office, kind, name)
    type_name = type_of(document)
    if type_name not in kind.saved.types:
        raise Misconfigured(f"{kind.saved.kind.word}s of type {type_name} can't be edited here", str(document.name))
    cls = kind.saved.types[type_name]
    data = {name: value for name, value in document.data.items() if name in field_names(cls)}
    hidden = cls.secret_fields()
    values = {name: value for name, value in data.items() if name not in hidden}
    secrets = sorted(name for name in hidden if data.get(name))
    return StoredForm(str(document.name), type_name, values, secrets, _version(document))


async def drafted(office: Office, draft: Draft, *, named: bool = True) -> Any:
    """Return what a draft describes, with the stored secrets that it keeps.

    Args:
        named: whether it needs a name: a test does not.

    Raises:
        NotValid: fields are not valid, or a stored secret would go to another place than it was given for.
        NotFound: there is no `base`.
    """
    errors: list[tuple[dict[str, Any], str]] = []
    cls: type[NamedBlock] = draft.kind.saved.types[draft.type_name]
    before, kept = dict[str, Any](), dict[str, Any]()
    if draft.base:
        document = await _document(office, draft.kind, draft.base, secrets=True)
        before = document.data if type_of(document) == draft.type_name else {}
        kept = {name: value for name, value in before.items() if name in cls.secret_fields() and value}
    kept = {name: value for name, value in kept.items() if name not in draft.secrets}
    given = {name: value for name, value in draft.secrets.items() if value is not None}
    # What no form shows stays as it is: a target that takes no part is not let in by a change of something else.
    unseen = {} if draft.new else {name: before[name] for name in UNSEEN if before.get(name) is not None}
    try:
        block = cls(**{**unseen, **kept, **draft.values, **given})
    except ValidationError as exc:
        found = exc.errors(include_input=False, include_url=False)
        errors += [(dict(one), what_is_wrong([one], cls.model_fields)) for one in found]
        block = None
    try:
        if named or NAME.fullmatch(draft.name):
            (block or cls.model_construct()).named(draft.name)
    except ValueError as exc:
        errors.append(({"loc": ("name",)}, str(exc)))
    if block is not None and cls.leads_elsewhere(before, dict(block)):
        errors += [({"loc": (name,)}, MOVED) for name in kept]
    if errors:
        raise NotValid(errors)
    return block


async def save_draft(office: Office, draft: Draft) -> list[str]:
    """Save a draft: something new, or the change of what is there; return the fields that differ from before.

    Raises:
        NotValid: as of `drafted`, or the name is taken, or it can't be used as it is.
        Outdated: somebody else has saved it since the form was shown.
    """
    kind = draft.kind
    block = await drafted(office, draft)
    if draft.new and await kind.saved.documents(office.client, [draft.name]):
        raise NotValid([({"loc": ("name",)}, f"a {kind.saved.kind.word} named {draft.name} is there already")])
    if problems := await kind.problems(office, block):
        raise NotValid([({"loc": ()}, one) for one in problems])
    if draft.new:
        await kind.save(office, block, None, "created")
        return differing(block, None)
    version = _version(await _document(office, kind, draft.base))
    there = await kind.saved.all(office.client, [draft.name])
    before = next((one for one in there if (one.type_name, one.name) == (draft.type_name, draft.name)), None)
    if before is None:
        raise NotFound(f"no {kind.saved.kind.word} named {draft.name}")
    if draft.version and version != draft.version:
        raise Outdated(before, version)
    known = None if isinstance(before, Broken) else before
    fields = differing(block, known)
    if fields:
        await kind.save(office, block, known, "updated")
    return fields


async def _document(office: Office, kind: Editable, name: str, *, secrets: bool = False) -> BlockDocument:
    document = pick(name, await kind.saved.documents(office.client, {split(name)[1]}, secrets=secrets))
    if document is None:
        raise NotFound(f"no {kind.saved.kind.word} named {name}")
    return document


def _version(document: BlockDocument) -> str:
    """Return what changes whenever it is saved."""
    return document.updated.isoformat() if document.updated else str(document.id)
