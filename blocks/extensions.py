"""Types of target that other packages add: entry points in the group `talaria.targets` (docs/ninth-target.md)."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from prefect.blocks.core import Block
from prefect.utilities.dispatch import get_registry_for_type

from blocks.base import Target
from blocks.named import NAME

GROUP = "talaria.targets"


@dataclass(frozen=True)
class Extension:
    """A type of target that another package adds. Its entry point has the type's name and refers to one of these.

    Attributes:
        block: what a target of this type is; its `type_name` is the name of the entry point.
        driver: the module that holds `driver`, a `tasks.driver.Driver`; imported when it is first used.
        harness: the module that holds `HARNESSES` for the conformance suite; imported by tests only.
    """

    block: type[Target]
    driver: str
    harness: str = ""


def load(
    own: Mapping[str, type[Target]], found: Iterable[EntryPoint] | None = None
) -> tuple[dict[str, Extension], dict[str, str]]:
    """Return the types that other packages add, by name, and for each refused one a line that says why.

    Whatever is wrong with one package's type, the other types work.

    Args:
        own: our own types, which no other package may replace.
        found: the entry points; those of this installation by default.
    """
    points = sorted(entry_points(group=GROUP) if found is None else found, key=lambda one: (one.name, one.value))
    names = [point.name for point in points]
    blocks = dict(own)
    loaded: dict[str, Extension] = {}
    refused: dict[str, str] = {}
    for point in points:
        try:
            if names.count(point.name) > 1:
                packages = " and ".join(_package(one) for one in points if one.name == point.name)
                raise ValueError(f"there are several of that name, from {packages}: uninstall all but one")  # noqa: TRY301
            extension = _load(point, blocks)
        except (Exception, SystemExit) as exc:  # anything may be wrong with it, and nothing of it is ours
            lines = str(exc).strip().splitlines() or [""]
            kind = "" if isinstance(exc, ValueError) else f"{type(exc).__name__}: "
            why = f"{kind}{lines[0]}" if names.count(point.name) > 1 else f"{_package(point)}: {kind}{lines[0]}"
            refused[point.name] = why.rstrip(": ")
            continue
        loaded[point.name] = extension
        blocks[point.name] = extension.block
    _keep_registered(blocks.values())
    return loaded, refused


def _load(point: EntryPoint, blocks: Mapping[str, type[Target]]) -> Extension:
    """Return the extension that an entry point refers to.

    Raises:
        ValueError: it is not a valid extension, or would replace another type.
        Exception: whatever its import raises.
    """
    if not NAME.fullmatch(point.name):
        raise ValueError(f"{point.name!r} is not valid as the name of a type: use lower-case letters, digits, dashes")
    if point.name in blocks:
        raise ValueError(f"there is a type {point.name} already")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two block types of one slug, which is found below
        extension = point.load()
    if not isinstance(extension, Extension):
        raise ValueError(f"{point.value} is not a blocks.Extension")  # noqa: TRY004 - of another package's making
    block = extension.block
    if not (inspect.isclass(block) and issubclass(block, Target)):
        raise ValueError(f"{point.value}: its block is not a subclass of blocks.Target")
    if block.type_name != point.name:
        raise ValueError(f"{block.__name__}.type_name is {block.type_name!r}, the entry point's name {point.name!r}")
    for name, other in blocks.items():
        if other.get_block_type_slug() == block.get_block_type_slug() or other.get_block_type_name() == (
            block.get_block_type_name()
        ):
            raise ValueError(f"{block.__name__} has the block type {block.get_block_type_slug()!r} of type {name}")
    return extension


def _keep_registered(blocks: Iterable[type[Target]]) -> None:
    """Make Prefect find these classes by their slugs, even if a refused package has replaced them."""
    registry = get_registry_for_type(Block)
    for cls in blocks:
        if registry is not None:
            registry[cls.get_block_type_slug()] = cls


def _package(point: EntryPoint) -> str:
    return f"package {point.dist.name} {point.dist.version}" if point.dist else point.value
