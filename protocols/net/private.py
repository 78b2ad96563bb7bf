"""What identifies the patients of some files: read only to keep it out of messages that quote a peer."""

from __future__ import annotations

import os
from collections.abc import Iterable

from imaging.charset import NAME_DELIMITERS, TEXT_DELIMITERS, decoded
from imaging.header import Damaged, NotDicom, read_elements
from protocols.net.words import date_forms, forms
from transfer.plan import Item, Plan

MAX_FILES = 1024  # read at most; a batch rarely holds more than one patient
_CHARSET = 0x00080005
# Patient's name, other names, birth name, mother's birth name, responsible person.
_NAMES = (0x00100010, 0x00101001, 0x00101005, 0x00101060, 0x00102297)
# Accession number, patient ID, other IDs, address, telephone numbers.
_TEXTS = (0x00080050, 0x00100020, 0x00101000, 0x00101040, 0x00102154)
_BIRTH_DATE = 0x00100030


def identifying(plan: Plan, items: Iterable[Item]) -> set[str]:
    """Return the values, in all forms in which they may show up; a file that can't be read adds what is known of it."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    for item in items:
        if item.header is None:
            continue
        found |= {item.header.PatientID, item.header.AccessionNumber}
        key = (item.header.StudyInstanceUID, item.header.PatientID)
        if key not in seen and len(seen) < MAX_FILES:
            seen.add(key)
            found |= _read(plan, item)
    return found - {""}


def _read(plan: Plan, item: Item) -> set[str]:
    try:
        fd = os.open(plan.file(item), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return set()
    try:
        _, elements = read_elements(fd, item.size, (_CHARSET, *_NAMES, *_TEXTS, _BIRTH_DATE))
    except (OSError, NotDicom, Damaged):
        return set()
    finally:
        os.close(fd)
    charset = elements.get(_CHARSET, b"")

    def texts(tag: int, delimiters: frozenset[int]) -> list[str]:
        text = decoded(elements.get(tag, b""), charset, delimiters)
        return [value.strip("\0 ") for value in text.split("\\")]

    found = {value for tag in _TEXTS for value in texts(tag, TEXT_DELIMITERS)}
    for tag in _NAMES:
        for name in texts(tag, NAME_DELIMITERS):
            found |= forms(name)
    for date in texts(_BIRTH_DATE, TEXT_DELIMITERS):
        found |= date_forms(date)
    return found
