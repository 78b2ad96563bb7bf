"""Targets as people edit them in a form: checked field by field, and never with another's change or secret lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefect.client.schemas.objects import BlockDocument
from pydantic import ValidationError

from blocks import TYPES, Target
from blocks.base import MOVED
from blocks.named import check_name
from talaria.service import Office, recorded
from talaria.targetfile import differing, field_names
from tasks import targets as saved
from tasks.documents import Broken
from tasks.names import pick, split, type_of
from transfer.errors import Misconfigured, NotFound
from transfer.validation import what_is_wrong

UNSEEN = ("enabled",)  # a button changes it


class NotValid(Exception):
    """A draft can't be a target. `errors` are pydantic's, with what each says in a sentence."""

    def __init__(self, errors: list[tuple[dict[str, Any], str]]) -> None:
        super().__init__("; ".join(words for _, words in errors))
        self.errors = errors


class Outdated(Exception):
    """Somebody else has saved the target since the form was shown. `theirs` is what is saved now."""

    def __init__(self, theirs: Target | Broken, version: str) -> None:
        super().__init__(f"{theirs.name} was changed meanwhile")
        self.theirs, self.version = theirs, version


@dataclass(frozen=True)
class Draft:
    """A target as a form describes it.

    Attributes:
        values: by field, all but the secrets.
        secrets: those that are replaced, or removed (None); others stay as they are stored.
        base: name of the saved target that is changed, or whose secrets are taken; "" for none.
        version: of `base`, as the form has shown it; "" to save whatever it has become.
        new: whether it is to be another target than `base`.
    """

    name: str
    type_name: str
    values: Mapping[str, Any]
    secrets: Mapping[str, str | None]
    base: str = ""
    version: str = ""
    new: bool = False


@dataclass(frozen=True)
class SavedTarget:
    """A saved target as a form begins with it.

    Attributes:
        values: by field, as JSON; of one that is broken, as they were saved.
        secrets: the names of those that are set.
    """

    name: str
    type_name: str
    values: dict[str, Any]
    secrets: list[str]
    version: str


async def stored(office: Office, name: str) -> SavedTarget:
    """Return what is saved of a target, valid or not, without its secrets.

    Raises:
        NotFound: there is none.
        Misconfigured: the name means several.
    """
    document = await _document(office, name)
    type_name = type_of(document)
    if type_name not in TYPES:
        raise Misconfigured(f"targets of type {type_name} can't be edited here", str(document.name))
    cls = TYPES[type_name]
    data = {name: value for name, value in document.data.items() if name in field_names(cls)}
    hidden = cls.secret_fields()
    values = {name: value for name, value in data.items() if name not in hidden}
    secrets = sorted(name for name in hidden if data.get(name))
    return SavedTarget(str(document.name), type_name, values, secrets, _version(document))


async def drafted(office: Office, draft: Draft, *, named: bool = True) -> Target:
    """Return the target that a draft describes, with the stored secrets that it keeps.

    Args:
        named: whether it needs a name: a test does not.

    Raises:
        NotValid: fields are not valid, or a stored secret would go to another place than it was given for.
        NotFound: there is no target `base`.
    """
    errors: list[tuple[dict[str, Any], str]] = []
    cls = TYPES[draft.type_name]
    try:
        if named:
            check_name(draft.name)
    except ValueError as exc:
        errors.append(({"loc": ("name",)}, str(exc)))
    before, kept = dict[str, Any](), dict[str, Any]()
    if draft.base:
        document = await _document(office, draft.base, secrets=True)
        before = document.data if type_of(document) == draft.type_name else {}
        kept = {name: value for name, value in before.items() if name in cls.secret_fields() and value}
    kept = {name: value for name, value in kept.items() if name not in draft.secrets}
    given = {name: value for name, value in draft.secrets.items() if value is not None}
    # What no form shows stays as it is: a target that takes no part is not let in by a change of something else.
    unseen = {} if draft.new else {name: before[name] for name in UNSEEN if before.get(name) is not None}
    try:
        target = cls(**{**unseen, **kept, **draft.values, **given})
    except ValidationError as exc:
        found = exc.errors(include_input=False, include_url=False)
        raise NotValid(errors + [(dict(one), what_is_wrong([one], cls.model_fields)) for one in found]) from None
    if cls.leads_elsewhere(before, dict(target)):
        errors += [({"loc": (name,)}, MOVED) for name in kept]
    if errors:
        raise NotValid(errors)
    return target.named(draft.name) if named else target


async def save_draft(office: Office, draft: Draft) -> list[str]:
    """Save a draft: a new target, or the change of one; return the fields that differ from before.

    Raises:
        NotValid: as of `drafted`, or the name is taken.
        Outdated: somebody else has saved the target since the form was shown.
    """
    target = await drafted(office, draft)
    if draft.new:
        if await saved.documents(office.client, [draft.name]):
            raise NotValid([({"loc": ("name",)}, f"a target named {draft.name} is there already")])
        await saved.save(office.client, target, draft.name)
        fields = differing(target, None)
        await recorded.target_changed(office, draft.name, "created", fields)
        return fields
    version = _version(await _document(office, draft.base))
    there = await saved.all_targets(office.client, [draft.name])
    before = next(one for one in there if (one.type_name, one.name) == (draft.type_name, draft.name))
    if draft.version and version != draft.version:
        raise Outdated(before, version)
    fields = differing(target, before if isinstance(before, Target) else None)
    if fields:
        await saved.save(office.client, target, draft.name)
        await recorded.target_changed(office, draft.name, "updated", fields)
    return fields


async def _document(office: Office, name: str, *, secrets: bool = False) -> BlockDocument:
    document = pick(name, await saved.documents(office.client, {split(name)[1]}, secrets=secrets))
    if document is None:
        raise NotFound(f"no target named {name}")
    return document


def _version(document: BlockDocument) -> str:
    """Return what changes whenever a target is saved."""
    return document.updated.isoformat() if document.updated else str(document.id)
