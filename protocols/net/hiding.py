"""Takes secrets, and what identifies patients, out of every text that people will read.

The one place for it: what a value looks like when a peer quotes it, which values of a plan's files are private, and
how an error loses them before anybody logs it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from imaging.charset import NAME_DELIMITERS, TEXT_DELIMITERS, decoded
from imaging.header import Damaged, NotDicom, read_elements
from transfer.errors import DispatchError
from transfer.plan import Item, Plan

BLOT = "***"
MIN_PRIVATE_CHARS = 3  # shorter values would blot out parts of ordinary words: of those, only whole words are meant
MAX_FILES = 1024  # read at most; a batch rarely holds more than one patient
_CHARSET = 0x00080005
# Patient's name, other names, birth name, mother's birth name, responsible person.
_NAMES = (0x00100010, 0x00101001, 0x00101005, 0x00101060, 0x00102297)
# Accession number, patient ID, other IDs, address, telephone numbers.
_TEXTS = (0x00080050, 0x00100020, 0x00101000, 0x00101040, 0x00102154)
_BIRTH_DATE = 0x00100030

Hide = Callable[[str], str]


def hiding(values: Iterable[str] = (), parts: Iterable[str] = ()) -> Hide:
    """Return a function that replaces values in a text, in any form in which a peer may quote them.

    Args:
        values: secrets, and what identifies a patient; those of one or two characters are meant as whole words.
        parts: names of folders or files; short ones are meant only as a whole part of a path.
    """
    values, parts = set(values), set(parts)
    patterns = [
        *((value, _in_words(value)) for value in values if _is_private(value)),
        *((part, _in_paths(part)) for part in parts - values if part),
    ]
    if not patterns:
        return str
    patterns.sort(key=lambda one: len(one[0]), reverse=True)
    found = re.compile("|".join(pattern for _, pattern in patterns), re.IGNORECASE)
    return lambda text: found.sub(BLOT, text)


@contextmanager
def quieted(hide: Hide, target: str = "") -> Iterator[None]:
    """Take what must not show out of every error of ours that passes, and put the target's name on it.

    What it came from goes as well: an error's repr and its traceback are logged.
    """
    try:
        yield
    except DispatchError as exc:
        exc.target = exc.target or target
        exc.message = hide(exc.message)
        exc.args = (exc.message,)
        raise exc from None


def _is_private(value: str) -> bool:
    """Return True if a value is long enough to mean somebody: in Chinese, one character is a name."""
    return len(value) > 1 or not value.isascii()


def _is_short(value: str) -> bool:
    return value.isascii() and len(value) < MIN_PRIVATE_CHARS


def _in_words(value: str) -> str:
    pattern = _in_any_form(value)
    return rf"(?<![A-Za-z0-9]){pattern}(?![A-Za-z0-9])" if _is_short(value) else pattern


def _in_paths(value: str) -> str:
    pattern = _in_any_form(value)
    return rf"(?<=/){pattern}(?=$|[/'\":;\s])" if _is_short(value) else pattern


def _in_any_form(value: str) -> str:
    """Return a pattern for a value as it is, or with any of its characters encoded as in a URL or a form."""
    encoded = ("".join(f"%{byte:02X}" for byte in c.encode("utf-8", "surrogatepass")) for c in value)
    return "".join(
        f"(?:{re.escape(c)}|{code}{'|[+]' if c == ' ' else ''})" for c, code in zip(value, encoded, strict=True)
    )


def forms(name: str) -> set[str]:
    """Return the forms in which a person's name may show up, part by part (PS3.5 section 6.2.1)."""
    return {part for part in re.split(r"[\^=\s,*?]+", name) if _is_private(part)} | {name}


def date_forms(date: str) -> set[str]:
    """Return the forms in which a date of VR DA may show up."""
    if len(date) != 8:
        return {date}
    y, m, d = date[:4], date[4:6], date[6:]
    return {date, f"{y}-{m}-{d}", f"{d}.{m}.{y}", f"{m}/{d}/{y}", f"{d}/{m}/{y}", f"{y}/{m}/{d}", f"{y}.{m}.{d}"}


def identifying(plan: Plan, items: Iterable[Item]) -> set[str]:
    """Return what identifies the patients of some files, in all forms; a file that can't be read adds what is known."""
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
