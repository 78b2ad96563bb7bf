"""Fields of types, as the API describes them to whoever makes a form."""

from __future__ import annotations

from typing import Any

from blocks.fields import facts
from blocks.named import NamedBlock
from talaria.targetfile import field_names


def field_facts(cls: type[NamedBlock]) -> dict[str, Any]:
    """Return what a form must know of each field of a type, by its name."""
    aims = cls.leads_secrets_to()
    return {
        name: {
            "description": cls.model_fields[name].description,
            "required": cls.model_fields[name].is_required(),
            "secret": name in cls.secret_fields(),
            "title": shown.title,
            "group": shown.group,
            "tier": shown.tier,
            "unit": shown.unit,
            "placeholder": shown.placeholder,
            "aims": name in aims,
        }
        for name in field_names(cls)
        for shown in (facts(cls, name),)
    }
