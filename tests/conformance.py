"""The conformance suite over every type that is installed here; one without a harness fails.

    pytest tests/conformance.py            all of it
    pytest tests/conformance.py -k folder  one type; `-k dicom-storescp` one server

The harnesses of a type are in `tests/targets/<type>.py`, `HARNESSES`, or in the package that adds it; `SOURCES` names
those whose servers can be queried.
"""

from __future__ import annotations

import traceback
from importlib import import_module

import pytest

from blocks import EXTENSIONS
from talaria.testing.conformance import *  # noqa: F403
from talaria.testing.harness import Factory, of_extension, sources_of_extension
from tasks import DRIVERS


def _collected() -> tuple[dict[str, Factory], dict[str, dict[str, Factory]], dict[str, str]]:
    """Return all harnesses by name, by type those that can be queried, and by type why it has none."""
    found: dict[str, Factory] = {}
    sources: dict[str, dict[str, Factory]] = {}
    missing: dict[str, str] = {}
    for type_name in DRIVERS:
        module = f"tests.targets.{type_name.replace('-', '_')}"
        try:
            own = type_name not in EXTENSIONS
            harnesses: dict[str, Factory] = import_module(module).HARNESSES if own else of_extension(type_name)
            names = getattr(import_module(module), "SOURCES", ()) if own else sources_of_extension(type_name)
            sources[type_name] = {name: harnesses[name] for name in names}
        except Exception:
            missing[type_name] = traceback.format_exc()
        else:
            found |= harnesses
            if not harnesses:
                missing[type_name] = f"{module}.HARNESSES is empty"
    return found, sources, missing


HARNESSES, OF_TYPE, MISSING = _collected()
SOURCES = [name for each in OF_TYPE.values() for name in each]


@pytest.mark.parametrize("type_name", list(DRIVERS))
def test_type_has_a_harness(type_name: str) -> None:
    if why := MISSING.get(type_name):
        pytest.fail(f"targets of type {type_name} are not tested: {why}")
    able = DRIVERS[type_name].find is not None
    assert bool(OF_TYPE[type_name]) == able, "name a harness that can be queried in SOURCES" if able else ""
