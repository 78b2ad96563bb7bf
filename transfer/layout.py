"""Names of folders at the target: a template filled from DICOM headers, made safe for any file system."""

from __future__ import annotations

import hashlib
import re
import string
from pathlib import PurePosixPath

from transfer.plan import Item, Plan

MAX_NAME_BYTES = 120  # of one value
MAX_COMPONENT_BYTES = 240  # of all values and text between two slashes; file systems take 255
MARK_CHARS = 12  # hexadecimal, 48 bits
UNKNOWN = "unknown"
FIELDS = (
    "dispatch_id",
    "PatientID",
    "StudyInstanceUID",
    "AccessionNumber",
    "StudyDate",
    "StudyTime",
    "SeriesInstanceUID",
    "Modality",
    "SeriesNumber",
)
PRIVATE_FIELDS = ("{PatientID}", "{AccessionNumber}")
OTHER_INSTANCE = "another instance has its name there: use a finer layout"
_UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LEADING = re.compile(r"^[\s.]+")  # a hidden name, or one of our own such as .incoming-


def fields_of(template: str) -> list[str]:
    """Return the fields that a template names.

    Raises:
        ValueError: the template is empty, absolute, climbs (`..`), or names a field that there isn't.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as exc:
        raise ValueError(f"layout {template!r}: {exc}") from exc
    names = [name for _, name, _, _ in parsed if name is not None]
    unknown = [name for name in names if name not in FIELDS]
    if unknown or any(spec or conversion for _, name, spec, conversion in parsed if name):
        raise ValueError(f"layout {template!r}: fields are {', '.join(f'{{{field}}}' for field in FIELDS)}")
    parts = template.split("/")
    if not all(part.strip() for part in parts) or any(part in (".", "..") for part in parts):
        raise ValueError(f"layout {template!r}: must be a relative path without empty parts, '.' or '..'")
    return names


def sanitised(value: str, most: int = MAX_NAME_BYTES) -> str:
    """Make one path component of a value: no separator, no control character, no leading dot, at most `most` bytes.

    What is empty, or only dots and blanks, becomes `unknown`.
    """
    value = _UNSAFE.sub("_", value)
    value = _LEADING.sub("", value)
    return value.encode()[:most].decode("utf-8", "ignore").rstrip() or UNKNOWN


def private_parts(plan: Plan, template: str) -> set[str]:
    """Return the parts between slashes of the folders' names that hold a patient's data: no message may."""
    if not any(field in template for field in PRIVATE_FIELDS):
        return set()
    forms = template.split("/")
    return {
        part
        for name in set(names(plan, template).values())
        for form, part in zip(forms, name.split("/"), strict=True)
        if any(field in form for field in PRIVATE_FIELDS)
    } - {UNKNOWN}


def names(plan: Plan, template: str) -> dict[str, str]:
    """Map each item's path to the folder (relative, POSIX) that the template gives it.

    A file without a DICOM header takes the values of the DICOM file nearest to it: same folder, else a folder
    above or below, else the first of the plan.
    """
    fields = [name for name in fields_of(template) if name != "dispatch_id"]
    nearest = _Nearest(plan) if fields else None
    made: dict[tuple[str, ...], str] = {}  # a few folders for thousands of items
    found = {}
    for item in plan.items:
        source = item if item.header or nearest is None else nearest(item)
        header = source.header if source else None
        values = tuple(str(getattr(header, name, "") or "") for name in fields)
        if values not in made:
            made[values] = _filled(template, plan.dispatch_id, dict(zip(fields, values, strict=True)))
        found[item.path] = made[values]
    return found


def _filled(template: str, dispatch_id: str, values: dict[str, str]) -> str:
    safe = {name: sanitised(value) for name, value in values.items()} | {"dispatch_id": dispatch_id}
    return "/".join(_component(part.format(**safe)) for part in template.split("/"))


def _component(text: str) -> str:
    """Make a path component of several values; one that had to be cut stays different from others cut like it."""
    whole = sanitised(text, len(text.encode()))
    if len(whole.encode()) <= MAX_COMPONENT_BYTES:
        return whole
    mark = hashlib.sha256(text.encode()).hexdigest()[:MARK_CHARS]
    return f"{sanitised(whole, MAX_COMPONENT_BYTES - MARK_CHARS - 1)}-{mark}"


class _Nearest:
    """Finds the DICOM file whose header stands for a file that has none."""

    def __init__(self, plan: Plan) -> None:
        self.first: Item | None = None
        self.by_folder: dict[PurePosixPath, Item] = {}
        for item in plan.items:
            if item.header:
                self.first = self.first or item
                for folder in PurePosixPath(item.path).parents:
                    self.by_folder.setdefault(folder, item)

    def __call__(self, item: Item) -> Item | None:
        for folder in PurePosixPath(item.path).parents:
            if folder in self.by_folder:
                return self.by_folder[folder]
        return self.first
