"""What stands in lists of accession numbers beside the numbers: comments, last lines that count, and words.

A number that is taken from them may be another patient's: of `Total: 2`, 2 would be looked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transfer.columns import BETWEEN
from transfer.errors import Misconfigured

_TOTALS = frozenset(
    ("total", "totals", "sub-total", "subtotal", "sum", "count", "summe", "gesamt", "anzahl", "somme", "suma")
)
_NUMBER_OF = (["number", "of"], ["nombre", "de"], ["nombre", "d"])
_COUNTED = re.compile(  # 2 records; (2 rows); 2 rows in set (0.00 sec)
    r"\(?\d+[ \t]+(?:rows?|records?|results?|entry|entries|items?|lines?|stud(?:y|ies)|exams?|accessions?|numbers?"
    r"|zeilen?|eintr[\u00e4a]ge?|datens[\u00e4a]tze?|studien?|untersuchungen?)\b(?![-/]).*",
    re.IGNORECASE,
)
_PARTS = re.compile(r"[\s:=,;|\"'()]+")  # of a last line; no signs as in SUM-12 or COUNT/2, which are numbers
_CELLS = re.compile(r"[\t,;|]")
_FLOAT = re.compile(r"\d+\.0+")
_FRACTION = re.compile(r"\d+\.\d*[1-9]\d*")
_WITH_COMMA = re.compile(r"\d+,0+")
MADE = " is what a spreadsheet has made of a number: format that column as text"


def without_remarks(lines: Sequence[str], titled: Sequence[bool]) -> list[str]:
    """Return the lines of a list without comments, and without a last line that says how many there are.

    A comment begins with # and a blank, or has words; or it stands behind a number, as `A1 # urgent`. Where all lines
    below a title begin with #, that is a bullet, or a part of the numbers.

    Args:
        titled: which lines have the title of a column of accession numbers.

    Raises:
        Misconfigured: a line may be a comment, or a number that begins with #.
    """
    said = [line for line, title in zip(lines, titled, strict=True) if line.strip() and not title]
    hashes = not all(map(_is_marked, said))
    kept: list[str] = []
    for at, (line, title) in enumerate(zip(lines, titled, strict=True), 1):
        if not hashes or title or not _is_marked(line):
            kept.append(_without_comment(line))
        elif not _is_comment(line):
            raise Misconfigured(
                f"line {at} of the list begins with #: leave it out if it is a comment; if it is a number, put it in "
                "double quotes"
            )
    last = next((at for at in reversed(range(len(kept))) if kept[at].strip()), 0)
    others = [line for line in kept[:last] if line.strip()]
    if others and _is_footer(kept[last]) and not any(map(_is_footer, others)):
        del kept[last:]
    return kept


def _is_marked(line: str) -> bool:
    return line.lstrip().startswith("#") and line.count('"') % 2 == 0


def _is_comment(line: str) -> bool:
    rest = line.lstrip().lstrip("#")
    if not rest.strip() or rest[0].isspace() or not _has_digit(rest):
        return True
    return not _CELLS.search(rest) and not all(map(_has_digit, _words(rest)))


def _without_comment(line: str) -> str:
    """Return a line of one number without what stands behind a # that blanks surround, and begins with a word."""
    number, sign, comment = line.rstrip("\r\n").partition(" # ")
    words = comment.split()
    if not sign or _CELLS.search(line) or '"' in line or len(number.split()) != 1 or not _has_digit(number):
        return line
    return f"{number}\n" if words and words[0].rstrip(".:!?").isalpha() else line


def _is_footer(line: str) -> bool:
    parts = [part for part in _PARTS.split(line.casefold()) if part]
    if line.count('"') == 2 and line.strip().startswith('"') and line.strip().endswith('"'):
        return False  # one value, on purpose
    if parts[:1] == ["grand"]:
        del parts[0]
    if parts and (parts[0] in _TOTALS or parts[:2] in _NUMBER_OF):
        return all(part.isalpha() or re.fullmatch(r"[\d.]+", part) for part in parts)
    return _COUNTED.fullmatch(line.strip()) is not None


def _words(line: str) -> list[str]:
    return [word for word in BETWEEN.split(line) if any(map(str.isalnum, word))]


def _has_digit(text: str) -> bool:
    return any(map(str.isdigit, text))


def check_words(lines: Sequence[Sequence[str]]) -> None:
    """Look at the values of the lines of a list, none of which is a title.

    Raises:
        Misconfigured: one has words beside a number, as no list has that is no table.
    """
    if sum(map(bool, lines)) < 2:
        return
    for at, line in enumerate(lines, 1):
        digits = list(map(_has_digit, line))
        if any(digits) and not all(digits):
            raise Misconfigured(
                f"line {at} of the list holds words beside a number: leave them out; if it is one number with blanks, "
                "put it in double quotes"
            )


def check_made_numbers(values: Sequence[str], text: str = "") -> None:
    """Look at values that nobody has put in quotes, and at the list that they come from; "" for a table.

    Raises:
        Misconfigured: a spreadsheet has taken them for quantities, as 123.0.
    """
    made = next(filter(_FLOAT.fullmatch, values), "")
    if any(map(_FRACTION.fullmatch, values)):
        made = ""  # 10.0 beside 10.1
    lines = [line.strip() for line in text.splitlines() if _has_digit(line)]
    if lines and all(map(_WITH_COMMA.fullmatch, lines)):
        made = lines[0]
    if made:
        raise Misconfigured(f"{made}{MADE}{'; if it is the number, put it in double quotes' if text else ''}")
