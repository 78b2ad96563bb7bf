"""Names of folders at the target: a template filled from DICOM headers, made safe for any file system.

Two values never get the same name. A value that had to be changed gets a mark made of the value itself (`12/3` becomes
`12_3~` and eight digits). So do values that give the same text when joined, and those that differ only in case or
Unicode form, which some file systems take for the same. A value that needs no change gets none.
"""

from __future__ import annotations

import hashlib
import re
import string
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

from transfer.plan import Item, Plan

MAX_NAME_BYTES = 120  # of one value
MAX_COMPONENT_BYTES = 240  # of all values and text between two slashes; file systems take 255
MARK_CHARS = 8  # hexadecimal, 32 bits
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
_MARKED = re.compile(rf"~[0-9a-f]{{{MARK_CHARS}}}$")
# What these fields hold if they are as they should be, so that the text beside them is not taken for a part of them.
_FORMS = {
    "dispatch_id": re.compile(r"[0-9a-f]+"),
    "StudyInstanceUID": re.compile(r"[0-9.]+"),
    "SeriesInstanceUID": re.compile(r"[0-9.]+"),
    "StudyDate": re.compile(r"[0-9]{8}"),
    "StudyTime": re.compile(r"[0-9.]+"),
    "Modality": re.compile(r"[A-Z0-9]+"),
    "SeriesNumber": re.compile(r"[0-9]+"),
}
_LEADING = re.compile(r"^[\s.]+")  # a hidden name, or one of our own such as .incoming-


def fields_of(template: str) -> list[str]:
    """Return the fields that a template names.

    Raises:
        ValueError: the template is empty or absolute, climbs (`..`), or names an unknown field.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as exc:
        raise ValueError(
            f"layout {template!r}: {{ and }} must stand in pairs around a field, as in {{PatientID}}"
        ) from exc
    names = [name for _, name, _, _ in parsed if name is not None]
    unknown = [name for name in names if name not in FIELDS]
    if unknown or any(spec or conversion for _, name, spec, conversion in parsed if name):
        raise ValueError(f"layout {template!r}: fields are {', '.join(f'{{{field}}}' for field in FIELDS)}")
    parts = template.split("/")
    if not all(part.strip() for part in parts) or any(part in (".", "..") for part in parts):
        raise ValueError(f"layout {template!r}: must be a relative path without empty parts, '.' or '..'")
    return names


def sanitised(value: str) -> str:
    """Return a value as one path component: no separator, control character or leading dot, at most 120 bytes.

    Blanks around it are dropped, and an empty value becomes `unknown`. Any other change is marked, so that different
    values keep different names.
    """
    value = value.strip(" ")
    if not value:
        return UNKNOWN
    safe = _safe(value, MAX_NAME_BYTES)
    return safe if safe == value and safe != UNKNOWN and not _MARKED.search(safe) else _marked(safe, value)


def _safe(text: str, most: int) -> str:
    text = _LEADING.sub("", _UNSAFE.sub("_", unicodedata.normalize("NFC", text)))
    return _cut(text, most) or UNKNOWN


def _cut(text: str, most: int) -> str:
    """Cut a text to a number of bytes, with no half character and no blank at its end."""
    return text.encode()[:most].decode("utf-8", "ignore").rstrip()


def _marked(text: str, *values: str, most: int = MAX_NAME_BYTES) -> str:
    """Append a mark made of the values to a text, replacing one that it has."""
    mark = hashlib.sha256("\0".join(values).encode("utf-8", "surrogatepass")).hexdigest()[:MARK_CHARS]
    return f"{_cut(_MARKED.sub('', text), most - MARK_CHARS - 1)}~{mark}"


def _folded(text: str) -> str:
    """Return the form that names share which some file system takes for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).rstrip(". ")


def private_parts(plan: Plan, template: str) -> set[str]:
    """Return those path components of the folders' names that hold a patient's data, which no message may show."""
    if not any(field in template for field in PRIVATE_FIELDS):
        return set()
    forms = template.split("/")
    return {
        part
        for name in set(names(plan, template).values())
        for form, part in zip(forms, name.split("/"), strict=True)
        if any(field in form for field in PRIVATE_FIELDS)
    } - {UNKNOWN}


def names(plan: Plan, template: str, is_taken: Callable[[str], bool] = lambda folder: False) -> dict[str, str]:
    """Map each item's path to the folder (relative, POSIX) that the template gives it.

    A file without a DICOM header takes the values of the DICOM file nearest to it: same folder, else a folder
    above or below, else the first of the plan.

    Args:
        is_taken: returns True if the target takes a folder for another one that is there, as `ab` for `AB`.
    """
    fields = [name for name in fields_of(template) if name != "dispatch_id"]
    nearest = _Nearest(plan) if fields else None
    if nearest is None:
        [folder] = _folders(template, [{}], plan.dispatch_id, is_taken)
        return dict.fromkeys((item.path for item in plan.items), folder)
    found: dict[str, Any] = {}  # by path first the values, then the folder: a second one for 100,000 would be 3 MB
    known: dict[tuple[str, ...], tuple[str, ...]] = {}  # in memory once
    for item in plan.items:
        source = item if item.shared else nearest(item)
        header = source.shared if source else None
        one = tuple(str(getattr(header, name, "") or "") for name in fields)
        found[item.path] = known.setdefault(one, one)
    unique = sorted(known)  # a few folders for thousands of items
    made = _folders(template, [dict(zip(fields, one, strict=True)) for one in unique], plan.dispatch_id, is_taken)
    by_values = dict(zip(unique, made, strict=True))
    for path, one in found.items():
        found[path] = by_values[one]
    return found


def _folders(
    template: str, filled: Sequence[dict[str, str]], dispatch_id: str, is_taken: Callable[[str], bool]
) -> list[str]:
    """Fill a template, component by component; different values never share a component."""
    folders = [""] * len(filled)
    for part in template.split("/"):
        pieces = [(literal, field) for literal, field, _, _ in string.Formatter().parse(part)]
        used = [field for _, field in pieces if field]
        raw = [tuple((one | {"dispatch_id": dispatch_id})[field].strip(" ") for field in used) for one in filled]
        components = [_component(pieces, values) for values in raw]
        sharing: dict[tuple[str, str], set[tuple[str, ...]]] = defaultdict(set)
        for above, component, values in zip(folders, components, raw, strict=True):
            sharing[above, _folded(component)].add(values)
        for index, (above, component, values) in enumerate(zip(folders, components, raw, strict=True)):
            if len(sharing[above, _folded(component)]) > 1 or (used and is_taken(f"{above}{component}")):
                component = _marked(component, *values, most=MAX_COMPONENT_BYTES)
            folders[index] = f"{above}{component}/"
    return [folder[:-1] for folder in folders]


def _component(pieces: Sequence[tuple[str, str | None]], values: Sequence[str]) -> str:
    """Return a path component of text and values: the values can be read from it, or it ends with a mark of them."""
    safe = [sanitised(value) for value in values]
    left = iter(safe)
    text = "".join(literal + (next(left) if field else "") for literal, field in pieces)
    whole = _safe(text, MAX_COMPONENT_BYTES)
    if len(values) < 2 and len(text.encode()) <= MAX_COMPONENT_BYTES:
        return whole
    fits = whole == text and not _MARKED.search(whole) and _is_plain(pieces, safe)
    return whole if fits else _marked(whole, *values, most=MAX_COMPONENT_BYTES)


def _is_plain(pieces: Sequence[tuple[str, str | None]], values: Sequence[str]) -> bool:
    """Return True if the joined text of several values can be taken apart in one way only."""
    fields = [field for _, field in pieces if field]
    between, literal = [], ""
    for before, field in pieces:
        literal += before
        if field:
            between.append(literal)
            literal = ""
    between = between[1:]  # what stands between two fields

    def ends(index: int, literal: str) -> bool:
        """Whether the end of a value is clear: the value has its field's form, and what follows can't be part of it."""
        field, value = fields[index], values[index]
        form = _FORMS.get(field)
        if value != UNKNOWN and not (form and form.fullmatch(value)):
            return False
        return field == "StudyDate" or (bool(literal) and not set(literal) & set(value))  # a date has eight digits

    first, last = 0, len(fields) - 1
    while first < last and ends(first, between[first]):
        first += 1
    while first < last and ends(last, between[last - 1]):
        last -= 1
    return all(
        bool(literal) and not any(set(literal) & set(value) for value in values[first : last + 1])
        for literal in between[first:last]
    )


class _Nearest:
    """Finds the DICOM file whose header stands for a file that has none."""

    def __init__(self, plan: Plan) -> None:
        self.first: Item | None = None
        self.by_folder: dict[PurePosixPath, Item] = {}
        for item in plan.items:
            if item.shared:
                self.first = self.first or item
                for folder in PurePosixPath(item.path).parents:
                    self.by_folder.setdefault(folder, item)

    def __call__(self, item: Item) -> Item | None:
        for folder in PurePosixPath(item.path).parents:
            if folder in self.by_folder:
                return self.by_folder[folder]
        return self.first
