"""What is saved under a name of its own, as a Prefect block: a target, a source or a rule. No input or output here."""

from __future__ import annotations

import functools
import re
from abc import ABC
from collections.abc import Mapping
from email.headerregistry import Address
from typing import Any, ClassVar, Self

from prefect.blocks.core import Block
from prefect.client.schemas.objects import BlockDocument
from pydantic import ConfigDict, SecretStr, field_validator, model_validator
from pydantic_core import to_jsonable_python

from blocks.fields import Group, in_order, ordered
from transfer.validation import numbers_only

NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")  # what Prefect allows for a block document
EMAIL = re.compile(r"[^@\s,;<>\x00-\x1f\x7f]+@[^@\s,;<>\x00-\x1f\x7f]+")


class NamedBlock(Block, ABC):
    """A block document whose name is unique over all types of its kind."""

    # A refused value may be a secret, or hold one (a URL with a password): errors name the field only.
    model_config = ConfigDict(extra="forbid", validate_assignment=True, hide_input_in_errors=True)

    type_name: ClassVar[str] = ""  # in a file of targets and sources
    word: ClassVar[str] = ""  # what messages call it: a target, a source
    seen_to_by: ClassVar[str] = ""  # the command of `talaria` for them; the word if there is no other
    where: ClassVar[tuple[str, ...]] = ()  # the fields that say where the data goes
    host_in: ClassVar[str] = ""  # the field that names the host, alone or in a URL
    # The fields that decide who is sent the secrets; () for `where` and all that is about the connection.
    aims: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """Its name; the type's name until it is saved under one."""
        return self._block_document_name or self.type_name

    def named(self, name: str) -> Self:
        """Give it a name without saving it."""
        check_name(name)
        self._block_document_name = name
        return self

    @classmethod
    @functools.cache
    def secret_fields(cls) -> frozenset[str]:
        """Return the names of the fields that are secret."""
        return frozenset(name for name, field in cls.model_fields.items() if "SecretStr" in str(field.annotation))

    @classmethod
    @functools.cache
    def _fields_with_secrets(cls) -> frozenset[str]:
        """Return the names of the fields that are secret, or hold something that is."""
        return frozenset(path.partition(".")[0] for path in cls.model_json_schema().get("secret_fields", []))

    def _field_has_secrets(self, field_name: str) -> bool:
        """Return True if a field is secret or holds something that is; Prefect makes the schema for each field anew."""
        return field_name in self._fields_with_secrets()

    @classmethod
    @functools.cache
    def get_block_type_slug(cls) -> str:
        """Return the mark of its type; asked for six times a block, each of which searched the disk for a module."""
        return super().get_block_type_slug()

    @classmethod
    def __dispatch_key__(cls) -> str:
        """Return the key of its class, which Prefect takes out of the whole schema whenever a class is defined."""
        return cls.get_block_type_slug()

    def _event_method_called_resources(self) -> None:
        """Let Prefect emit no event for each block that is read: a list of 500 targets would be 500 events to store."""

    @classmethod
    @functools.cache
    def leads_secrets_to(cls) -> frozenset[str]:
        """Return the fields that decide who is sent the secrets; () for a type without any.

        Stored secrets are void as soon as one of these differs from the saved one: else whoever may edit a target, or
        a rule, reads its secrets by pointing it at himself.
        """
        if not cls.secret_fields():
            return frozenset()
        connection = {one.name for one in ordered(cls) if one.group == Group.CONNECTION}
        named = set(cls.aims or (*cls.where, cls.host_in, *connection))
        return frozenset(named & cls.model_fields.keys())

    @classmethod
    def leads_elsewhere(cls, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
        """Return True if a change of values leads the secrets to another place than they were given for."""
        return any(_plain(cls, before, name) != _plain(cls, after, name) for name in cls.leads_secrets_to())

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the schema that Prefect makes a form of: fields in their order, each with a title."""
        return in_order(super().model_json_schema(*args, **kwargs), cls)

    def _to_block_document(self, *args: Any, **kwargs: Any) -> BlockDocument:
        """Save a secret that is not set as null, which the server does not mask: lists then show what is set."""
        document = super()._to_block_document(*args, **kwargs)
        for name in self.secret_fields():
            value = getattr(self, name)
            if isinstance(value, SecretStr) and not value.get_secret_value():
                document.data[name] = None
        return document

    @model_validator(mode="before")
    @classmethod
    def _unset(cls, values: Any) -> Any:
        """Take for not given: a secret that is null, as it is saved, and, of what may be null, a form's empty text.

        A truth value is no number, though pydantic takes it for one.
        """
        values = numbers_only(values, cls.model_fields)
        if not isinstance(values, dict):
            return values
        secrets = {name for name in cls.secret_fields() if cls.model_fields[name].default is not None}
        unset = {name for name in secrets if name in values and values[name] is None}
        unset |= {name for name, field in cls.model_fields.items() if field.default is None and values.get(name) == ""}
        return {name: value for name, value in values.items() if name not in unset}

    @field_validator("contact", check_fields=False)
    @classmethod
    def _contact(cls, value: str) -> str:
        return check_email(value) if value else value


def _plain(cls: type[NamedBlock], values: Mapping[str, Any], name: str) -> Any:
    """Return one of a block's values as it is saved, or its default; None for nothing, however that is written."""
    field = cls.model_fields[name]
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    value = values.get(name, default)
    return (value.get_secret_value() if isinstance(value, SecretStr) else to_jsonable_python(value)) or None


def check_email(value: str) -> str:
    """Return an e-mail address, or raise ValueError if no message could be sent to it.

    Only what the header of a message may hold reaches anybody (RFC 5322 section 3.4.1), in ASCII, as a mail server need
    not take others.
    """
    value = value.strip()
    try:
        known = value.isascii() and EMAIL.fullmatch(value) and Address(addr_spec=value).addr_spec == value
    except Exception:  # of Python's parser, for what ends in the middle
        known = False
    if not known:
        raise ValueError(f"{value!r} is not an e-mail address: write it as in pacs-team@example.org")
    return value


def check_name(name: str) -> str:
    """Return a name, or raise ValueError if Prefect would not take it."""
    if not NAME.fullmatch(name):
        raise ValueError(f"name {name!r}: use lower-case letters, digits and dashes")
    return name
