"""What people save through Prefect's pages and API is judged as on ours: a target, source or rule must be valid.

Prefect itself compares a document with nothing: a wrong AE title was saved, and the target listed as broken afterwards.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import ValidationError

from blocks import RULES, SOURCES, TYPES
from blocks.base import MASK, MOVED, masked_secrets
from blocks.fields import facts, in_titles
from blocks.named import NamedBlock
from talaria.engine.asgi import Application, Message, Receive, Send, again, asking, read, refuse, saved_document
from talaria.front.access import SCOPE_KEY, Identity, Role
from transfer.validation import what_is_wrong

_NEW, _EDIT = re.compile(r"/blocks/catalog/([^/]+)/create$"), re.compile(r"/blocks/block/([0-9a-fA-F-]{32,36})/edit$")
_FORM = "/api/ui/schemas/validate"
_logger = logging.getLogger("talaria.front")
_TYPES: tuple[type[NamedBlock], ...] = (*TYPES.values(), *SOURCES.values(), *RULES.values())
_KIND = "__prefect_kind"  # of a value that is not given but referred to, or written as JSON


class ValidTargets:
    """Prefect's application; refuses what is not valid, and lets its forms say at which field."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self._slugs: dict[UUID, str] = {}  # of block types, which never change

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        who: Identity | None = scope.get(SCOPE_KEY)
        if scope["type"] != "http" or who is None or who.role >= Role.WORKER:  # ours have been validated
            await self.app(scope, receive, send)
            return
        document = saved_document(scope)
        form = (scope["method"], scope["path"].rstrip("/")) == ("POST", _FORM)
        if not form and document is None:
            await self.app(scope, receive, send)
            return
        body = await read(receive, send, "a block document")
        if body is None:
            return
        try:
            given = json.loads(body)
            if form:
                answer, wrong = await self._judged(scope, given), ""
            else:
                answer = None
                wrong = await (self._changed(scope, document, given) if document else self._created(scope, given))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            answer, wrong = None, ""  # Prefect's to refuse
        if wrong:
            await refuse(send, 422, wrong)
        elif answer is not None:
            await _say(send, answer)
        else:
            await self.app(scope, again(body, receive), send)

    async def _judged(self, scope: Message, given: Any) -> dict[str, Any] | None:
        """Return Prefect's answer about the values in a form; None if the form is none of ours.

        Prefect would compare them with the schema: it takes no null for a secret that is not set, as it is saved.
        """
        schema, values = given["schema"], given["values"]
        slug = str(schema.get("block_type_slug") or "")
        if not slug and "properties" not in schema:
            # The forms of blocks give the values once more in the schema's place (Prefect 3.9.1): the page is asked.
            slug = await self._slug_of_page(scope)
        cls = _type_of(slug)
        if cls is None or not is_given(values):
            return None
        return _judged(cls, values)

    async def _slug_of_page(self, scope: Message) -> str:
        """Return the block type of the form that a request comes from; "" if that is not known."""
        page = next((value.decode("latin-1") for key, value in scope["headers"] if key == b"referer"), "")
        path = urlsplit(page).path
        if new := _NEW.search(path):
            return new[1]
        if edit := _EDIT.search(path):
            async with asking(self.app, scope) as client:
                found = await client.get(f"/block_documents/{UUID(edit[1])}")
            return str(found.json()["block_type"]["slug"]) if found.status_code == 200 else ""
        return ""

    async def _created(self, scope: Message, given: Any) -> str:
        kind = UUID(given["block_type_id"])
        if kind not in self._slugs:
            async with asking(self.app, scope) as client:
                found = await client.get(f"/block_types/{kind}")
            if found.status_code != 200:
                return ""
            self._slugs[kind] = str(found.json()["slug"])
        cls = _type_of(self._slugs[kind])
        return "" if cls is None else _sentence(cls, given.get("data") or {})

    async def _changed(self, scope: Message, number: str, given: Any) -> str:
        if not isinstance(given.get("data"), dict):
            return ""
        async with asking(self.app, scope) as client:
            # With the secrets: a type judges them, too, and what comes back masked is the one that is there.
            found = await client.get(f"/block_documents/{UUID(number)}", params={"include_secrets": True})
        if found.status_code != 200:
            return ""
        document = found.json()
        cls = _type_of(str(document["block_type"]["slug"]))
        if cls is None:
            return ""
        before = document["data"]
        after, kept = merged(cls, before, given)
        stored = [name for name in cls.secret_fields() if before.get(name) and after.get(name) == before[name]]
        unseen = [name for name in stored if name in kept or name not in given["data"]]
        if unseen and cls.leads_elsewhere(before, after):
            return "; ".join(f'"{facts(cls, name).title}": {MOVED}' for name in sorted(unseen))
        return _sentence(cls, after)


def merged(cls: type[NamedBlock], before: dict[str, Any], given: Any) -> tuple[dict[str, Any], set[str]]:
    """Return a block's values after a change of its document, and the names of secrets that came back masked."""
    data = given["data"]
    kept = {name for name in cls.secret_fields() if data.get(name) == MASK and before.get(name) is not None}
    data = data | {name: before[name] for name in kept}
    return (before | data if given.get("merge_existing_data", True) else data), kept


def is_given(values: dict[str, Any]) -> bool:
    """Return True if all values of a block are given, and none is referred to, or written as JSON."""
    return not any(isinstance(value, dict) and {"$ref", _KIND} & value.keys() for value in values.values())


def _type_of(slug: str) -> type[NamedBlock] | None:
    return next((cls for cls in _TYPES if cls.get_block_type_slug() == slug), None)


def _errors(cls: type[NamedBlock], values: dict[str, Any]) -> list[Any]:
    """Return what is wrong with the values of a block, as pydantic gives it; references are not followed."""
    if not is_given(values):
        return []
    try:
        cls(**{name: value for name, value in values.items() if name != "block_type_slug"})
    except ValidationError as exc:
        return exc.errors(include_input=False, include_url=False)
    except Exception:  # of another package's making
        _logger.exception("%s of type %s can't be judged", cls.word, cls.type_name)
    return []


def _sentence(cls: type[NamedBlock], values: dict[str, Any]) -> str:
    errors = _errors(cls, values)
    return f"the {cls.word} is not valid: {what_is_wrong(errors, cls.model_fields)}" if errors else ""


def _judged(cls: type[NamedBlock], values: dict[str, Any]) -> dict[str, Any]:
    """Return Prefect's answer about the values in a block's form."""
    with masked_secrets():
        errors = _errors(cls, values)
    masked = {name for name in cls.secret_fields() if values.get(name) == MASK}
    found: dict[str, list[str]] = {}
    for error in errors:
        place = str(error["loc"][0]) if error["loc"] else _named(cls, str(error["msg"]))
        if place not in masked:  # a secret that stays as it is
            words = in_titles(cls, what_is_wrong([error], cls.model_fields).removeprefix(f"{place}: "), '"{}"')
            found.setdefault(place, []).append(words[:1].upper() + words[1:])
    return {"errors": [{"property": name, "errors": words} for name, words in found.items()], "valid": not found}


def _named(cls: type[NamedBlock], message: str) -> str:
    """Return the field that an error of several fields names first, or the first of all."""
    words = re.findall(r"\w+", message)
    return next((word for word in words if word in cls.model_fields), next(iter(cls.model_fields)))


async def _say(send: Send, answer: dict[str, Any]) -> None:
    body = json.dumps(answer).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
