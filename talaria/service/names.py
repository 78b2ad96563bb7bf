"""The names that the parameters of our flows may be given."""

from __future__ import annotations

from talaria.service import Office
from tasks.targets import all_targets, facts

NAMED = {"dispatch": ("targets",), "retrieve": ("source", "targets"), "find": ("source",), "check": ("target",)}
_USED_FOR = {"source": ("query", "both"), "targets": ("store", "both")}


async def names_for(office: Office, flow: str) -> dict[str, list[str]]:
    """Return the names of targets that each parameter of a flow may be given; {} if none names a target."""
    if flow not in NAMED:
        return {}
    known = [facts(one) for one in await all_targets(office.client)]
    return {
        parameter: [
            one["name"] for one in known if one["direction"] in _USED_FOR.get(parameter, ("store", "query", "both"))
        ]
        for parameter in NAMED[flow]
    }
