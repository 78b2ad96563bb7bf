"""Reads plain options without pydantic, which Typer would load for them: that takes as long as the rest of a command.

Other options, and all that are not valid, are left to Typer, whose messages they get.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

import typer.core
from typer._coercion import RuntimeParam
from typer._param_types import coerce_cli_choice, coerce_cli_path

core: Any = typer.core


class _NotPlain(Exception):
    """Typer itself must read the value."""


def install() -> None:
    """Replace private functions of Typer's by those here; tests/cli/test_light_commands.py fails if they change."""
    typers_own = core.build_runtime_param

    @dataclass(frozen=True)
    class Quick(RuntimeParam):
        """How one parameter is read."""

        descriptor: Any

        def _coerce_value(self, value: Any, param: Any, ctx: Any) -> Any:
            try:
                return _read(self.annotation, value, self.parameter_info, param, ctx)
            except _NotPlain:
                return typers_own(self.descriptor)._coerce_value(value, param=param, ctx=ctx)

    def quick(descriptor: Any) -> Any:
        info = descriptor.parameter_info
        if descriptor.file_annotation is not None or info.parser is not None:
            return typers_own(descriptor)
        return Quick(parameter_info=info, annotation=descriptor.annotation, descriptor=descriptor)

    core.build_runtime_param = quick


def _read(annotation: Any, value: Any, info: Any, param: Any, ctx: Any) -> Any:
    """Return a value as the type of its annotation.

    Raises:
        _NotPlain: it may be wrong.
    """
    if get_origin(annotation) is list and isinstance(value, list | tuple):
        return [_read(get_args(annotation)[0], one, info, param, ctx) for one in value]
    if annotation in (str, bool) and type(value) is annotation:
        return value
    if annotation is int and type(value) in (int, str):
        number = int(value) if str(value).isascii() and str(value).isdecimal() else None
        if number is not None and (info.min is None or number >= info.min) and (info.max is None or number <= info.max):
            return number
    if isinstance(annotation, type) and issubclass(annotation, Path) and isinstance(value, str | Path):
        return coerce_cli_path(Path(value), info, path_type=annotation, param=param, ctx=ctx)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        try:
            return coerce_cli_choice(value, choices=list(annotation), case_sensitive=info.case_sensitive, ctx=ctx)
        except Exception as exc:
            raise _NotPlain from exc
    raise _NotPlain
