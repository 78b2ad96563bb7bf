"""What is done with a target: the table of drivers, one per type; those of other packages come by their entry points.

A driver's module is imported when it is first asked for: the libraries of all protocols take seconds to load, and
an installation needs only the extras of the types that it uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from blocks import EXTENSIONS, TYPES
from blocks.base import Target
from tasks.driver import Driver
from transfer.errors import Misconfigured

_MODULES = {
    "dicom": "tasks.dicom",
    "dicom-tls": "tasks.dicom_tls",
    "dicomweb": "tasks.dicomweb",
    "folder": "tasks.folder",
    "rsync": "tasks.rsync",
    "s3": "tasks.s3",
    "sftp": "tasks.sftp",
    "xnat": "tasks.xnat",
}


class Drivers(Mapping[str, Driver[Any]]):
    """Drivers by the type name of their targets."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._modules = modules

    def __getitem__(self, type_name: str) -> Driver[Any]:
        module = self._modules[type_name]
        if type_name in EXTENSIONS:
            return _of_another_package(type_name, module)
        try:
            driver: Driver[Any] = import_module(module).driver
        except ModuleNotFoundError as exc:
            raise Misconfigured(
                f"targets of type {type_name} need the library {exc.name}: install talaria[{type_name}]"
            ) from exc
        return driver

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def of(self, target: Target) -> Driver[Any]:
        """Return the driver of a target.

        Raises:
            Misconfigured: there is none for its type; the message lists the types that work.
        """
        if target.type_name not in self._modules:
            raise Misconfigured(
                f"targets of type {target.type_name} can't be used yet; these can: {', '.join(self)}", target.name
            )
        return self[target.type_name]


def _of_another_package(type_name: str, module: str) -> Driver[Any]:
    """Return the driver of a type that another package adds.

    Raises:
        Misconfigured: its module can't be imported, or holds no driver of that type.
    """
    try:
        driver = import_module(module).driver
    except Exception as exc:  # whatever is wrong with it, the other types work
        why = (str(exc).strip().splitlines() or [""])[0]
        raise Misconfigured(
            f"the driver of targets of type {type_name} can't be loaded: {type(exc).__name__}: {why}"
        ) from exc
    if not isinstance(driver, Driver) or driver.target is not TYPES[type_name]:
        raise Misconfigured(f"{module}.driver is not a Driver of targets of type {type_name}")
    return driver


DRIVERS = Drivers(_MODULES | {name: extension.driver for name, extension in EXTENSIONS.items()})
