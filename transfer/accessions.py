"""Lists of accession numbers as people paste them: from a spreadsheet, a mail, a file."""

from __future__ import annotations

import csv
import io
import re
import sys
from pathlib import Path

from transfer.errors import Misconfigured

MOST_CHARS = 64
QUOTES = "\"'`\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u00ab\u00bb"
# A column's title, which comes along when the column is copied.
TITLES = frozenset((
    "accession", "accessionnumber", "accessionno", "accessionnr", "accessionid", "accno", "accnr", "accnum", "acc",
    "accessions", "accessionnumbers", "accnumber", "studyaccessionnumber",
))  # fmt: skip
_BETWEEN = re.compile(r"[\s,;\u00a0\u200b\ufeff\u2060\uff0c\uff1b\u3001]+")
_UNSEEN = re.compile(r"[\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]")  # directions of writing: no part of a number
_BLANK_LINES = re.compile(r"\A(?:[ \t,;]*\r?\n)+")
MOST_ABOVE = 20  # lines above a table, as a report's title
_AS_TEXT = re.compile(r'(?<![^\s,;"])="([^"\n\r]*)"')  # how spreadsheets write a text that looks like a number: ="0012"
_TWO_WORDS = re.compile(
    r"\A[\s\"']*(accession|acc\.?)[ _]+(numbers?|no\.?|nr\.?|id|#)[\"']?\s*(?::|(?=[\n\r,;\t]))", re.IGNORECASE
)
_SEPARATOR = re.compile(r"""\A["']?sep=.["']?[ \t]*\r?\n""")  # a line that some spreadsheets write first
_RULE = re.compile(r"(?m)^[ \t]*\|?[ \t]*:?-{2,}:?[ \t]*(?:[|+][-:+| \t]*)\r?$")  # below the titles of a table in text
_ROWS = re.compile(r"(?m)^\(\d+ rows?\)\r?$")  # the last line of one that a database prints
_SHORTENED = re.compile(r"(?<![\w.+-])\d(?:[.,]\d+)?E\+\d+(?!\w)")
STANDARD_INPUT = Path("-")
BOMS = ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def accessions(text: str) -> tuple[str, ...]:
    """Return the accession numbers of a text, each once, in order.

    Separated by commas, semicolons, blanks, tabs or new lines; quotes around one, byte-order marks and the title of a
    column are dropped. In double quotes a number may hold blanks and commas.

    Raises:
        Misconfigured: a value is not an accession number (too long, or with control characters or a backslash), or no
            longer one (1.23E+11).
    """
    found: dict[str, None] = {}
    text = _BLANK_LINES.sub("", _SEPARATOR.sub("", _UNSEEN.sub("", text.lstrip("\ufeff"))))
    if "|" in text and _RULE.search(text):  # as wikis and databases print tables
        text = "\n".join(
            line.strip().strip("|").replace("|", "\t") for line in _ROWS.sub("", _RULE.sub("", text)).splitlines()
        )
        text = _BLANK_LINES.sub("", text)
    column = _column(text)
    shortened = _SHORTENED.search("\n".join(column) if column else text)
    if shortened:
        raise Misconfigured(
            f"{shortened[0]} is what a spreadsheet has left of a long number: format that column as text"
        )
    for value in column or _values(text):
        if len(value) > MOST_CHARS or "\\" in value or not value.isprintable():
            raise Misconfigured(
                f"an accession number must have at most {MOST_CHARS} printable characters, no backslash"
            )
        found[value] = None
    first = next(iter(found), "")
    if _is_title(first) and not re.search(r"\d", first) and len(found) > 1:
        del found[first]
    return tuple(found)


def _column(text: str) -> list[str]:
    """Return the values of a table's column of accession numbers; none if the text is not a table.

    That is the column with the title, which may stand below other lines, or the first one where no column has it.
    """
    first = text.partition("\n")[0]
    for sign in ("\t", ";", ","):
        if sign not in text:
            continue
        try:
            rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=sign))
        except csv.Error as exc:  # a quote that is not closed makes all that follows one value
            if sign not in first:
                continue
            raise Misconfigured(f"the list is not valid CSV: {exc}") from exc
        rows = [[_cell(cell) for cell in row] for row in rows if any(cell.strip() for cell in row)]
        if len(rows) < 2:
            continue
        top, at = _titled_column(rows) or (0, 0 if sign in first and _is_table(rows) else None)
        if at is not None:
            return [row[at] for row in rows[top + 1 :] if len(row) > at and row[at]]
    return []


def _titled_column(rows: list[list[str]]) -> tuple[int, int] | None:
    """Return the row and the column of the title in a table; None if there is none."""
    for top, row in enumerate(rows[:MOST_ABOVE]):
        for at, title in enumerate(row if len(row) > 1 else ()):
            if _is_title(title) and not re.search(r"\d", title):
                return top, at
    return None


def _cell(text: str) -> str:
    """Return a cell without blanks and quotes; spreadsheets write ="0012" for a text that looks like a number."""
    return text.strip().removeprefix("=").strip(QUOTES).strip()


def _is_title(text: str) -> bool:
    return re.sub(r"[^a-z]", "", text.lower()) in TITLES


def _is_table(rows: list[list[str]]) -> bool:
    """Return True if a row of words stands above rows of the same width whose first cells hold digits."""
    title, *others = rows
    if any(re.search(r"\d", one) for one in title):
        return False
    return all(title) and all(len(row) == len(title) and re.search(r"\d", row[0]) for row in others)


def _values(text: str) -> list[str]:
    values: list[str] = []
    text = _AS_TEXT.sub(r'"\1"', text)
    for quoted, plain in re.findall(r'"([^"\n\r]*)"|([^"]+)', _titled(text)):
        parts = [quoted] if quoted else _BETWEEN.split(plain)
        values += [part.strip().strip(QUOTES).strip() for part in parts]
    return [value for value in values if any(map(str.isalnum, value))]  # not what is left between two quotes


def _titled(text: str) -> str:
    """Return the text with a title of two words joined into one, so that it is recognised as a title."""
    return _TWO_WORDS.sub("accessionnumber", text)


def from_file(path: Path) -> tuple[str, ...]:
    """Return the accession numbers of a text file, UTF-8, UTF-16 or Latin-1; `-` is standard input.

    Raises:
        Misconfigured: it can't be read, or is not text.
    """
    try:
        raw = sys.stdin.buffer.read() if path == STANDARD_INPUT else path.read_bytes()
    except OSError as exc:
        raise Misconfigured(f"{path}: {exc.strerror}") from exc
    return from_bytes(raw, str(path))


def from_bytes(raw: bytes, name: str) -> tuple[str, ...]:
    """Return the accession numbers of a file's content; `name` is what messages call it.

    Raises:
        Misconfigured: it is not text, or holds what is no accession number.
    """
    for bom, encoding in BOMS:
        if raw.startswith(bom):
            return accessions(raw.decode(encoding, "replace"))
    if b"\0" in raw:
        raise Misconfigured(f"{name} is not a text file: save the list as text or CSV")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return accessions(text)
