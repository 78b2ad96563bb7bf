"""Lists of accession numbers as people paste them: from a spreadsheet, a mail, a file."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from transfer.columns import BETWEEN, check, check_lines, check_title, only_column
from transfer.errors import Misconfigured
from transfer.remarks import check_made_numbers, check_words, without_remarks

MOST_CHARS = 64
QUOTES = "\"'`\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u00ab\u00bb"
# A column's title, which comes along when the column is copied.
TITLES = frozenset((
    "accession", "accessionnumber", "accessionno", "accessionnr", "accessionid", "accno", "accnr", "accnum", "acc",
    "accessions", "accessionnumbers", "accnumber", "studyaccessionnumber",
))  # fmt: skip
UNSEEN = re.compile(r"[\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]")  # directions of writing: no part of a number
SIGNS = "\t;,|"  # what separates the cells of a table
_GAP = re.compile(r"[ \u00a0]{2,}")  # and does so in one that is printed
_EDGES = re.compile(r"^[\s\u200b\ufeff\u2060]+|[\s\u200b\ufeff\u2060]+$")  # what surrounds a cell, seen or not
_BLANK_LINES = re.compile(r"\A(?:[ \t,;]*\r?\n)+")
MOST_ABOVE = 20  # lines above a table, as a report's title
_AS_TEXT = re.compile(r'(?<![^\s,;"])="([^"\n\r]*)"')  # how spreadsheets write a text that looks like a number: ="0012"
_TWO_WORDS = re.compile(
    r"^[\s\"']*(accession|acc\.?)[ _\u00a0]+(numbers?|no\.?|nr\.?|id|#)[\"']?[^\S\n\r]*(?::|(?=[\n\r,;\t])|\Z)",
    re.IGNORECASE | re.MULTILINE,
)
SEPARATOR = re.compile(r"""\A["']?sep=.["']?[ \t]*\r?\n""")  # a line that some spreadsheets write first
_RULE = re.compile(r"(?m)^[ \t]*\|?[ \t]*:?-{2,}:?[ \t]*(?:[|+][-:+| \t]*)\r?$")  # below the titles of a table in text
_COUNTED = re.compile(r"(?m)^[ \t]*(\d+)[.)][ \t]+(?=\S)")  # what stands before each line of a numbered list
_SHORTENED = re.compile(r"(?<![\w.+-])\d(?:[.,]\d+)?[Ee]\+\d+(?!\w)")
# As programs write lists: ['A1', 'A2'], accession IN ('A1', 'A2').
_BRACKETS = re.compile(r"\s*(?:[\w.]+\s*=\s*|(?:[\w.]+\s+)?in\s*)?[\[(]([^\[\](){}]+)[\])]\s*;?\s*", re.IGNORECASE)
_QUOTED = re.compile(r'"[^"\n\r]*"')
_USUAL = re.compile(r"(?=[^0-9]*[0-9])[A-Za-z0-9]+(?:[-_][A-Za-z0-9]+)*")  # no part can be taken for anything else
STANDARD_INPUT = Path("-")
BOMS = ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


class NoNumbers(Misconfigured):
    """A list that should have accession numbers has none."""


def accessions(text: str) -> tuple[str, ...]:
    """Return the accession numbers of a text, each once, in order; none of a blank one.

    Separated by commas, semicolons, blanks, tabs or new lines; quotes around one, byte-order marks, the title of a
    column, comments and a last line as `Total: 2` are dropped. In double quotes a number may hold blanks and commas.

    Raises:
        Misconfigured: a value is not an accession number (too long, or with control characters or a backslash), or no
            longer one (1.23E+11, 123.0); or a line holds words beside a number; or the text is a table that doesn't
            say which column is meant.
        NoNumbers: there is a title alone, or signs: a search without numbers would find everything.
    """
    text = SEPARATOR.sub("", UNSEEN.sub("", text.lstrip("\ufeff")))
    given = text.splitlines()
    text = _BLANK_LINES.sub("", "".join(without_remarks(text.splitlines(keepends=True), [*map(_has_title, given)])))
    if (in_brackets := _BRACKETS.fullmatch(text)) and re.search("[,'\"]", in_brackets[1]):
        text = re.sub("'([^'\"\n]*)'", r'"\1"', in_brackets[1])
    if "|" in text and _RULE.search(text):  # as wikis and databases print tables
        text = "\n".join(line.strip().strip("|").replace("|", "\t") for line in _RULE.sub("", text).splitlines())
        text = _BLANK_LINES.sub("", text)
    lines = text.strip().splitlines()
    if [mark[1] if (mark := _COUNTED.match(line)) else "" for line in lines] == [*map(str, range(1, len(lines) + 1))]:
        text = _COUNTED.sub("", text)
    column = _column(_with_tabs(text))
    if not column:
        _check_list(text, given)
    check_made_numbers(column or _values(_QUOTED.sub(" ", _AS_TEXT.sub(" ", text))), "" if column else text)
    _check_shortened("\n".join(column) if column else text)
    found = dict.fromkeys(_checked(column or _values(text)))
    first = next(iter(found), "")
    if _is_title(first) and not re.search(r"\d", first):
        del found[first]
    if not found and BETWEEN.sub("", text).strip(QUOTES):
        raise _no_numbers()
    return tuple(found)


def _no_numbers() -> NoNumbers:
    return NoNumbers("the list holds no accession number: those have letters or digits")


def _has_title(line: str) -> bool:
    return any(map(_is_title, re.split(f"[{SIGNS}]", line)))


def _check_list(text: str, given: list[str]) -> None:
    """Look at a list that is no table.

    Args:
        given: the lines that it was given in.

    Raises:
        Misconfigured: its lines hold more than numbers, or its title says that they hold something else.
    """
    if not any(sign in text.partition("\n")[0] for sign in SIGNS):  # else it has been looked at as a table
        check_lines(map(_said, text.splitlines()))
        if not _BRACKETS.fullmatch("\n".join(given)):
            kept = set(text.splitlines())
            check_words([_said(line) if line in kept else [] for line in given])
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and not _titled(text).startswith("accessionnumber "):
        check_title(_cell(lines[0]))


def _said(line: str) -> list[str]:
    """Return the values of a line that say something, and are no title."""
    values = BETWEEN.split(_TWO_WORDS.sub("", _QUOTED.sub("1", line)))
    return [one for one in values if _says_something(one) and not _is_title(one)]


def of_cells(cells: Iterable[str]) -> tuple[str, ...]:
    """Return the accession numbers of the cells of a table's column, each of which holds one, or nothing.

    Raises:
        Misconfigured: as `accessions`.
    """
    values = [_cell(UNSEEN.sub("", cell)) for cell in cells]
    check_made_numbers(values)
    _check_shortened("\n".join(values))
    return tuple(dict.fromkeys(_checked(value for value in values if value)))


def pasted(numbers: Iterable[str]) -> str:
    """Return numbers as a text of which `accessions` makes the same."""
    return "\n".join(one if _is_plain(one) else f'"{one}"' for one in numbers)


def _is_plain(number: str) -> bool:
    """Return True if a number is taken as it is, also as the first or the last one of several.

    Most are usual ones: to read each in three lists takes seconds of thousands, in which a server answers nobody.
    """
    if _USUAL.fullmatch(number):
        return len(number) <= MOST_CHARS
    try:
        around = accessions(f"{number}\n0A"), accessions(f"0A\n{number}")
        return accessions(number) == (number,) and around == ((number, "0A"), ("0A", number))
    except Misconfigured:
        return False


def _check_shortened(text: str) -> None:
    shortened = _SHORTENED.search(text)
    if shortened:
        raise Misconfigured(
            f"{shortened[0]} is what a spreadsheet has left of a long number: format that column as text"
        )


def _checked(values: Iterable[str]) -> Iterator[str]:
    """Yield values after a look at each.

    Raises:
        Misconfigured: one is no accession number; the message says which, and doesn't quote it.
    """
    for number, value in enumerate(values, 1):
        if len(value) > MOST_CHARS or "\\" in value or not value.isprintable():
            raise Misconfigured(
                f"value {number} of the list is no accession number: those have at most {MOST_CHARS} printable "
                "characters, and no backslash"
            )
        yield value


def _column(text: str) -> list[str]:
    """Return the values of a table's column of accession numbers; none if the text is not a table.

    That is the column with the title, which may stand below other lines, or the only one that can be it.

    Raises:
        Misconfigured: which one it is can't be decided.
    """
    first = text.partition("\n")[0]
    for sign in SIGNS:
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
            if rows and not any(map(_is_title, rows[0])):
                check(rows, sign)
            elif rows and len(rows[0]) > 1 and not re.search(r"\d", "".join(rows[0])):
                raise _no_numbers()  # titles, and nothing below them
            continue
        titled = _titled_column(rows)
        if titled:
            return _titled_values(rows, *titled)
        if sign in first and sign != "|":
            return only_column(rows) or check(rows, sign)
    return []


def _with_tabs(text: str) -> str:
    """Return a table whose columns stand below titles with nothing but blanks between them, with tabs in their place.

    Any other text, and one in which a line has more or fewer cells than titles, is returned as it is.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    rows = [_GAP.split(line) for line in lines]
    titles = rows[0] if rows else []
    if len(titles) < 2 or len(rows) < 2 or not any(map(_is_title, titles)) or any(sign in lines[0] for sign in SIGNS):
        return text
    return "\n".join(map("\t".join, rows)) if all(len(row) == len(titles) for row in rows) else text


def _titled_values(rows: list[list[str]], top: int, at: int) -> list[str]:
    """Return what belongs to a title: what stands below it or, in a table on its side, beside it; none if it is the
    title of a list, which has numbers in the title's own line as well."""
    title, below = rows[top], rows[top + 1 :]
    column = [row[at] for row in below if len(row) > at and row[at]]
    beside = [cell for cell in title[at + 1 :] if cell]
    if any(title[:at]) or not beside or not all(re.search(r"\d", cell) and " " not in cell for cell in beside):
        return column
    if any(map(_is_title, column)):  # a label in each line
        return []
    if not any(re.search(r"\d", cell) for cell in column):
        return beside
    others = [cell for row in below for cell in row[at + 1 :] if cell]
    known = {form for number in _numbers(column) for form in _forms(number)}
    alike = all(known & _forms(number) for number in _numbers([*beside, *others]))
    alone = not any(len(row) > at + 1 for row in below)
    return [] if alike or alone else column


def _numbers(cells: list[str]) -> list[str]:
    return [number for cell in cells for number in BETWEEN.split(cell) if number]


def _forms(number: str) -> set[str]:
    """Return what numbers of one kind have in common: the letters, or where letters and digits stand."""
    return {re.sub(r"\d+", "9", number.casefold()), re.sub(r"[^\W\d_]", "a", re.sub(r"\d", "9", number))}


def _titled_column(rows: list[list[str]]) -> tuple[int, int] | None:
    """Return the row and the column of the title in a table; None if there is none."""
    for top, row in enumerate(rows[:MOST_ABOVE]):
        for at, title in enumerate(row if len(row) > 1 else ()):
            if _is_title(title) and not re.search(r"\d", title):
                return top, at
    return None


def _cell(text: str) -> str:
    """Return a cell without blanks and quotes; "" for one of signs alone, as a bullet, or a dash for no value.

    Spreadsheets write ="0012" for a text that looks like a number.
    """
    cell = _EDGES.sub("", _EDGES.sub("", text).removeprefix("=").strip(QUOTES))
    return cell if _says_something(cell) else ""


def _says_something(text: str) -> bool:
    return any(map(str.isalnum, text))


def _is_title(text: str) -> bool:
    """Return True if a text is a title of such a column, whatever signs and digits it has besides."""
    return re.sub(r"[^a-z]", "", text.lower()) in TITLES


def _values(text: str) -> list[str]:
    values: list[str] = []
    text = _AS_TEXT.sub(r'"\1"', text)
    for quoted, plain in re.findall(r'"([^"\n\r]*)"|([^"]+)', _titled(text)):
        parts = [quoted] if quoted else BETWEEN.split(plain)
        values += [part.strip().strip(QUOTES).strip() for part in parts]
    return [value for value in values if _says_something(value)]  # not what is left between two quotes


def _titled(text: str) -> str:
    """Return the text with titles of two words joined into one, so that they are recognised as titles."""
    return _TWO_WORDS.sub("accessionnumber ", text)


def from_file(path: Path) -> tuple[str, ...]:
    """Return the accession numbers of a text file, UTF-8, UTF-16 or Windows-1252; `-` is standard input.

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
    return accessions(text_of(raw, name))


def text_of(raw: bytes, name: str) -> str:
    """Return a file's content as text, without a byte-order mark: UTF-8, UTF-16 or Windows-1252.

    Raises:
        Misconfigured: it is not text.
    """
    for bom, encoding in BOMS:
        if raw.startswith(bom):
            return raw.decode(encoding, "replace")
    if b"\0" in raw:
        raise Misconfigured(f"{name} is not a text file: save the list as text or CSV")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252", "replace")
