"""Takes secrets, and what identifies patients, out of every text that people will read.

The one place for it: what a value looks like when a peer quotes it, which values of a plan's files are private, and
how an error loses them before anybody logs it.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from html.entities import codepoint2name
from urllib.parse import quote

from imaging.charset import NAME_DELIMITERS, TEXT_DELIMITERS, decoded
from imaging.header import Damaged, NotDicom, read_elements
from transfer.errors import DispatchError
from transfer.plan import Item, Plan

BLOT = "***"
MIN_PRIVATE_CHARS = 3  # shorter values would blot out parts of ordinary words: of those, only whole words are meant
MANY = 500  # values
MIN_CODED_CHARS = 6  # of a secret in Base64; shorter ones stand in ordinary words
LONG_CHARS = 40  # of a value in ASCII without blanks: a token, a line of a key
WHOLE_KEY_CHARS = 400  # of one with several lines; names and passwords are shorter
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
    many = len(values) + len(parts) > MANY  # then a pattern of all spellings would take minutes to make
    known = [
        *((value, _in_words) for value in values if _is_private(value)),
        *((part, _in_paths) for part in parts - values if part),
    ]
    if not known:
        return str
    known.sort(key=lambda one: len(one[0]), reverse=True)
    # A pattern for a key, its lines and all their forms takes seconds to make, and hardly any text shows one.
    rare = {value: may_be_in for value, _ in known if (may_be_in := _if_rare(value))}

    @lru_cache(maxsize=16)
    def pattern(shown: frozenset[str]) -> re.Pattern[str]:
        spelled = [spell(value, many) for value, spell in known if value not in rare or value in shown]
        return re.compile("|".join(spelled) or "(?!)", re.IGNORECASE)

    def hide(text: str) -> str:
        folded = text.translate(_LIKE_ASCII).lower()
        shown = frozenset(value for value, may_be_in in rare.items() if may_be_in(folded))
        return pattern(shown).sub(BLOT, text)

    return hide


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


def _in_words(value: str, many: bool) -> str:
    pattern = _in_any_form(value, many)
    return rf"(?<![A-Za-z0-9]){pattern}(?![A-Za-z0-9])" if _is_short(value) else pattern


def _in_paths(value: str, many: bool) -> str:
    pattern = _in_any_form(value, many)
    return rf"(?<=/){pattern}(?=$|[/'\":;\s])" if _is_short(value) else pattern


def _if_rare(value: str) -> Callable[[str], bool] | None:
    """Return what finds out quickly whether a text in small letters may show a long value; None for others."""
    if _is_token(value):
        spelled = [one.lower() for one in _encoded(value)]
        return lambda text: any(one in text for one in spelled)
    # Of its characters none has an empty form; of blanks one may stand for several.
    least = min(len("".join(form.split())) for form in _normalized(value))
    return (lambda text: len(text) >= least) if least >= WHOLE_KEY_CHARS else None


def _normalized(value: str) -> list[str]:
    """Return a value composed (NFC), and as it is where that is something else, as with compatibility ideographs."""
    return list(dict.fromkeys((unicodedata.normalize("NFC", value), value)))


def _is_token(value: str) -> bool:
    return len(value) >= LONG_CHARS and _PLAIN.fullmatch(value) is not None


def _in_any_form(value: str, many: bool = False) -> str:
    """Return a pattern for a value as it is, or as peers and programs on the way to them spell it.

    Any of its characters may be encoded as in a URL, a form, HTML or JSON, once or twice; those beyond ASCII may be
    decomposed (NFD), in Latin-1 taken for UTF-8 or the other way round, or lost; blanks may be one or several.
    A long value in ASCII is encoded as a whole or not at all: a pattern of all mixtures for each line of a key, in
    each of its forms, would take seconds to make.
    """
    if _is_token(value):
        return f"(?:{'|'.join(map(re.escape, sorted(_encoded(value), key=len, reverse=True)))})"
    return f"(?:{'|'.join(_spelled(form, many) for form in _normalized(value))})"


def _spelled(value: str, many: bool) -> str:
    """Return a pattern for a value, character by character."""
    if many:
        return "".join(f"(?:{re.escape(c)}|{_percent(c.encode('utf-8', 'surrogatepass'))})" for c in value)
    lossy = sum(c.isascii() and c.isalnum() for c in value) > 1  # else any question mark would be taken for it
    return "".join(_SPACE if part.isspace() else "".join(_char(c, lossy) for c in part) for part in _parts(value))


def _encoded(value: str) -> set[str]:
    """Return a value as it is, as in a URL (once or twice, all of it or only what must be), HTML and JSON."""
    once = {quote(value), quote(value, safe="")}
    numbers = {"".join(f"&#{ord(c)};" for c in value), "".join(f"&#x{ord(c):X};" for c in value)}
    return {value, *once, *map(quote, once), html.escape(value), *numbers, json.dumps(value)[1:-1]}


_PLAIN = re.compile(r"[!-~]+")
# The other characters that a pattern takes for letters of ASCII when it ignores case.
_LIKE_ASCII = str.maketrans("\u0130\u0131\u017f\u212a", "iisk")


def _parts(value: str) -> list[str]:
    return [part for part in re.split(r"(\s+)", value) if part]


_SPACE = r"(?:\s|[+]|%(?:25)*20|%(?:25)*C2%(?:25)*A0|&nbsp;|&#(?:0*32|0*160|x0*20|x0*A0);|\\u00[2A]0)+"


@lru_cache(maxsize=4096)
def _char(c: str, lossy: bool) -> str:
    """Return a pattern for one character."""
    code = ord(c)
    utf8 = c.encode("utf-8", "surrogatepass")
    found = [re.escape(c), _percent(utf8), f"&#(?:0*{code}|x0*{code:X});"]
    if code < 0x10000:
        found.append(rf"\\u{code:04X}")
    if c in _ENTITIES:
        found.append(f"&(?:amp;)?{_ENTITIES[c]};")
    if not c.isascii():
        if len(c.upper()) > 1:
            found.append(re.escape(c.upper()))
        if (decomposed := unicodedata.normalize("NFD", c)) != c:
            found.append(re.escape(decomposed))
        found += {re.escape(utf8.decode(wrong, "ignore")) for wrong in ("latin-1", "cp1252")} - {""}
        found.append("".join("[ ?\ufffd]" if 0x7F < byte < 0xA0 else re.escape(chr(byte)) for byte in utf8))
        if code < 0x100:
            found += [_percent(bytes((code,))), rf"\\x{code:02X}"]
        if lossy:
            found.append(f"[?\ufffd]{{1,{len(utf8)}}}")
    return f"(?:{'|'.join(dict.fromkeys(found))})"


def _percent(data: bytes) -> str:
    return "".join(f"%(?:25)*{byte:02X}" for byte in data)


_ENTITIES = {chr(code): name for code, name in codepoint2name.items()} | {"'": "(?:apos|#0*39)"}


def secret_forms(secrets: Iterable[str], users: Iterable[str] = ()) -> set[str]:
    """Return secrets, and what a peer may show of them: in Base64, alone or behind a user's name, and as hexadecimals.

    Base64 depends on what stands before a text only by its length: its inner part is found after anything.
    """
    found: set[str] = set()
    for secret in secrets:
        if not secret:
            continue
        found.add(secret)
        data = secret.encode("utf-8", "surrogatepass")
        for user in users:
            whole = base64.b64encode(f"{user}:{secret}".encode("utf-8", "surrogatepass")).decode("ascii")
            found |= {whole, whole.rstrip("=")}
        for before in range(3):
            code = base64.b64encode(b"\0" * before + data).decode("ascii")
            inner = code[-(-before * 8 // 6) : (before + len(data)) * 8 // 6]
            if len(inner) >= MIN_CODED_CHARS:
                found |= {inner, inner.replace("+", "-").replace("/", "_")}
        if len(data) * 2 >= MIN_CODED_CHARS:
            found.add(data.hex())
    return found


def forms(name: str) -> set[str]:
    """Return the forms in which a person's name may show up, part by part (PS3.5 section 6.2.1)."""
    return {part for part in re.split(r"[\^=\s,*?]+", name) if _is_private(part)} | {name}


def date_forms(date: str) -> set[str]:
    """Return the forms in which a date of VR DA may show up."""
    if len(date) != 8:
        return {date}
    y, m, d = date[:4], date[4:6], date[6:]
    written = (f"{y}-{m}-{d}", f"{d}.{m}.{y}", f"{m}/{d}/{y}", f"{d}/{m}/{y}", f"{y}/{m}/{d}", f"{y}.{m}.{d}")
    return {date, f"{d}{m}{y}", f"{d}-{m}-{y}", *written}


def identifying(plan: Plan, items: Iterable[Item]) -> set[str]:
    """Return what identifies the patients of some files, in all forms; a file that can't be read adds what is known."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    for item in items:
        if item.shared is None:
            continue
        found |= {item.shared.PatientID, item.shared.AccessionNumber}
        key = (item.shared.StudyInstanceUID, item.shared.PatientID)
        if key not in seen and len(seen) < MAX_FILES:
            seen.add(key)
            found |= _read(plan, item)
    return found - {""}


def _read(plan: Plan, item: Item) -> set[str]:
    try:
        fd = plan.descriptor(item)
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
