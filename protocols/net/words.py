"""A peer's own words in a form for messages: short, on one line, without secrets and patients' data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from html.parser import HTMLParser

from protocols.net.hiding import hiding

QUOTE_CHARS = 120  # of a peer's own words in a message
READ_CHARS = 20_000  # of its page that are looked at
# Members of JSON error documents: Orthanc, dcm4chee, Google, Azure, RFC 9457 and RFC 6749.
_JSON_KEYS = ("message", "details", "detail", "error_description", "error", "errormessage", "title", "reason")
_DATA = re.compile(r"""\0|"[0-9A-Fa-f]{8}"\s*:|<(?:\w+:)?(?:NativeDicomModel|DicomAttribute)\b""")


def excerpt(body: bytes, media_type: str, hidden: Iterable[str] = ()) -> str:
    """Return the gist of an error document: text of HTML and XML, the members of JSON that explain it.

    "" for what may be data of patients: what is not text, DICOM JSON and the Native DICOM Model.

    Args:
        hidden: values that must not show: secrets, and what names a patient.
    """
    text = body[: READ_CHARS * 4].decode("utf-8", "replace")[:READ_CHARS].strip().strip("\0")
    if _DATA.search(text):
        return ""
    if "json" in media_type or text[:1] in ("{", "[", '"'):
        text = _json(text)
    elif "html" in media_type or "xml" in media_type or text[:1] == "<":
        text = _markup(text)
    return clean(text, hidden)


def clean(text: str, hidden: Iterable[str] = ()) -> str:
    """Return a text on one line, without what is hidden, cut to `QUOTE_CHARS`."""
    hide = hiding(hidden)
    # Before as well: what is made fit to be read may be what shows that two characters were one.
    text = hide(" ".join("".join(c if c.isprintable() else " " for c in hide(text)).split()))
    return text if len(text) <= QUOTE_CHARS else text[: QUOTE_CHARS - 1].rstrip() + "…"


def _json(text: str) -> str:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(document, str):  # a reason alone
        return document
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
