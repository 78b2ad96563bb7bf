"""What a peer says for itself, made fit for a message: short, on one line, without secrets and patients' data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from html.parser import HTMLParser

QUOTE_CHARS = 200  # of a peer's own words in a message
READ_CHARS = 20_000  # of its page that are looked at
MIN_PRIVATE_CHARS = 3  # shorter values would blot out parts of ordinary words: of those, only whole words are meant
BLOT = "***"
# Members of JSON error documents: Orthanc, dcm4chee, Google, Azure, RFC 9457 and RFC 6749.
_JSON_KEYS = ("message", "details", "detail", "error_description", "error", "errormessage", "title", "reason")


def excerpt(body: bytes, media_type: str, hidden: Iterable[str] = ()) -> str:
    """Return the gist of an error document: text of HTML and XML, the telling members of JSON.

    Args:
        hidden: values that must not show: secrets, and what names a patient.
    """
    text = body[: READ_CHARS * 4].decode("utf-8", "replace")[:READ_CHARS].strip()
    if "json" in media_type or text[:1] in ("{", "["):
        text = _json(text)
    elif "html" in media_type or "xml" in media_type or text[:1] == "<":
        text = _markup(text)
    return clean(text, hidden)


def clean(text: str, hidden: Iterable[str] = ()) -> str:
    """Return a text on one line, without what is hidden, cut to `QUOTE_CHARS`."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    for value in sorted(filter(_tells, set(hidden)), key=len, reverse=True):
        pattern = _in_any_form(value)
        if value.isascii() and len(value) < MIN_PRIVATE_CHARS:
            pattern = rf"(?<![A-Za-z0-9]){pattern}(?![A-Za-z0-9])"
        text = re.sub(pattern, BLOT, text, flags=re.IGNORECASE)
    return text if len(text) <= QUOTE_CHARS else text[: QUOTE_CHARS - 1].rstrip() + "…"


def _tells(value: str) -> bool:
    """Whether a value is long enough to tell anything: in Chinese, one character is a name."""
    return len(value) > 1 or not value.isascii()


def _in_any_form(value: str) -> str:
    """Return a pattern for a value as it is, or with any of its characters encoded as in a URL or a form."""
    encoded = ("".join(f"%{byte:02X}" for byte in c.encode("utf-8", "surrogatepass")) for c in value)
    return "".join(
        f"(?:{re.escape(c)}|{code}{'|[+]' if c == ' ' else ''})" for c, code in zip(value, encoded, strict=True)
    )


def forms(name: str) -> set[str]:
    """Return the forms in which a person's name may show up, part by part (PS3.5 section 6.2.1)."""
    return {part for part in re.split(r"[\^=\s,*?]+", name) if _tells(part)} | {name}


def date_forms(date: str) -> set[str]:
    """Return the forms in which a date of VR DA may show up."""
    if len(date) != 8:
        return {date}
    y, m, d = date[:4], date[4:6], date[6:]
    return {date, f"{y}-{m}-{d}", f"{d}.{m}.{y}", f"{m}/{d}/{y}", f"{d}/{m}/{y}", f"{y}/{m}/{d}", f"{y}.{m}.{d}"}


def _json(text: str) -> str:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return text
    found: list[str] = []

    def visit(value: object) -> None:
        if isinstance(value, list):
            for one in value[:3]:
                visit(one)
        elif isinstance(value, dict):
            members = {str(key).lower(): one for key, one in value.items()}
            for key in _JSON_KEYS:
                one = members.get(key)
                if isinstance(one, str) and one.strip() and one not in found:
                    found.append(one)
                elif isinstance(one, dict | list):
                    visit(one)

    visit(document)
    return "; ".join(found)


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._ignored = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._ignored += tag in ("script", "style")
        self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self._ignored -= tag in ("script", "style") and self._ignored > 0
        self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        if not self._ignored:
            self.parts.append(data)


def _markup(text: str) -> str:
    parser = _Text()
    parser.feed(text)
    return "".join(parser.parts)
