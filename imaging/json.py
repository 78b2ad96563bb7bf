"""DICOM JSON (PS3.18 Annex F) and the Native DICOM Model in XML (PS3.19 Annex A): read, and shown by keyword."""

from __future__ import annotations

import functools
import json
import xml.etree.ElementTree as ElementTree
from typing import Any

from pydicom.datadict import keyword_for_tag

Attributes = dict[str, Any]  # as PS3.18 Annex F: by tag, eight hexadecimal digits in upper case

TEXTS = ("LT", "ST", "UT", "UR")  # VRs in which a backslash is a letter (PS3.5 section 6.2)
PADDING = " \0"  # to an even length, PS3.5 section 6.2: some servers give values as they lie in the file


def parse(body: bytes) -> list[Attributes]:
    """Return the data sets of a document in DICOM JSON or, in XML, of the Native DICOM Model.

    Raises:
        ValueError: it is neither.
    """
    text = body.removeprefix(b"\xef\xbb\xbf").strip()
    try:
        if text[:1] == b"<":
            return [_native(_xml(text))]
        document = json.loads(text)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    return data_sets(document)


def data_sets(document: Any) -> list[Attributes]:
    """Return the data sets of a JSON document; one alone need not be in a list, and null (as Go writes it) is none.

    Raises:
        ValueError: it is not DICOM JSON.
    """
    document = document if isinstance(document, list) else [] if document is None else [document]
    if not all(isinstance(one, dict) for one in document):
        raise ValueError("not DICOM JSON")
    return [{str(tag).upper(): element for tag, element in one.items()} for one in document]


def _xml(text: bytes) -> ElementTree.Element:
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise ValueError("XML with a document type")
    try:
        root = ElementTree.fromstring(text)  # noqa: S314
    except ElementTree.ParseError as exc:
        raise ValueError(f"XML that is not well-formed: {exc}") from exc
    if _local(root) != "NativeDicomModel":
        found = next((one for one in root.iter() if _local(one) == "NativeDicomModel"), None)
        if found is None:
            raise ValueError("XML, but no Native DICOM Model")
        return found
    return root


def _local(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _native(parent: ElementTree.Element) -> Attributes:
    found: Attributes = {}
    for element in parent:
        if _local(element) != "DicomAttribute":
            continue
        vr = element.get("vr", "")
        values: list[Any] = []
        for child in element:
            kind = _local(child)
            if kind == "Item":
                values.append(_native(child))
            elif kind == "Value":
                values.append((child.text or "").strip())
            elif kind == "PersonName":
                values.append({_local(group): "^".join(_name(group)) for group in child})
        found[element.get("tag", "").upper()] = {"vr": vr, "Value": values}
    return found


def _name(group: ElementTree.Element) -> list[str]:
    parts = {_local(part): (part.text or "").strip() for part in group}
    names = [parts.get(name, "") for name in ("FamilyName", "GivenName", "MiddleName", "NamePrefix", "NameSuffix")]
    while names and not names[-1]:
        names.pop()
    return names


def values(attributes: Attributes, tag: str) -> list[Any]:
    """Return all values of an element; none if it is absent or empty. One alone need not be in a list."""
    element = attributes.get(tag)
    found = element.get("Value") if isinstance(element, dict) else None
    return [value for value in (found if isinstance(found, list) else [found]) if value is not None]


def text(attributes: Attributes, tag: str) -> str:
    """Return the first value of an element as text, "" if there is none."""
    found = values(attributes, tag)
    return str(found[0]).strip(PADDING) if found else ""


def number(attributes: Attributes, tag: str) -> int | None:
    """Return the first value of an element as a number; servers write codes as numbers, or as text."""
    try:
        return int(text(attributes, tag))
    except ValueError:
        return None


def keyworded(attributes: Attributes) -> dict[str, Any]:
    """Return values by DICOM keyword: one value as it is, several as a list, none as ""; sequences are left out."""
    found: dict[str, Any] = {}
    for tag, element in attributes.items():
        keyword = _keyword(tag)
        if not keyword or not isinstance(element, dict) or element.get("vr") in ("SQ", "OB", "OW", "UN"):
            continue
        several = element.get("vr") not in TEXTS  # some servers give all values in one, as they lie in a file
        plain = [
            _plain(one)
            for value in values(attributes, tag)
            for one in (value.split("\\") if several and isinstance(value, str) else [value])
        ]
        found[keyword] = plain[0] if len(plain) == 1 else plain or ""
    return found


@functools.lru_cache(maxsize=4096)  # a look into pydicom's dictionary takes longer than all the rest
def _keyword(tag: str) -> str:
    """Return the keyword of a tag, "" if it has none or is no tag."""
    try:
        return keyword_for_tag(int(tag, 16))
    except (ValueError, OverflowError):
        return ""


def _plain(value: Any) -> Any:
    """Return a value without padding, a person's name as its VR has it: up to three groups with '='."""
    if isinstance(value, str):
        return value.strip(PADDING)
    if not isinstance(value, dict):
        return value
    groups = [str(value.get(group) or "").strip(PADDING) for group in ("Alphabetic", "Ideographic", "Phonetic")]
    return "=".join(groups).rstrip("=")
