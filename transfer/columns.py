"""Which column of a table has the accession numbers, where no title says so: the others are patients' data.

What can't be decided is refused: dates of birth, patients' IDs and names must neither be asked for as accession
numbers, nor stand in a result as missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, zip_longest

from transfer.errors import Misconfigured

Rows = Sequence[Sequence[str]]

BETWEEN = re.compile(r"[\s,;\u00a0\u200b\ufeff\u2060\uff0c\uff1b\u3001]+")  # the values of a list
SURE = 3  # rows that agree in how long the numbers of each column are, after which that is no chance
_DATE = re.compile(
    r"(?:\d{4}([-./ ])\d{1,2}\1\d{1,2}|\d{1,2}([-./ ])\d{1,2}\2(?:\d{4}|\d\d)|"
    r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]))(?:[ T]\d\d:?\d\d.*)?"
)
# Titles of what is no accession number, by what is in them, and as a whole; letters only.
_OTHERS = re.compile(r"patient|name|nom|birth|geburt|naiss|nacim|gender|geschlecht|datum|date|fecha|time|zeit")
_WHOLE = frozenset(("id", "pid", "mrn", "dob", "pat", "patid", "patno", "patnr", "sex", "age", "alter", "geb", "day"))


class DoubtfulColumn(Misconfigured):
    """Nothing says which column of a table is meant."""


def only_column(rows: Rows) -> list[str]:
    """Return the values of the one column below titles that can have accession numbers; none if it is no table.

    Raises:
        DoubtfulColumn: there are several, or none.
    """
    title, *others = rows
    if not all(title) or any(map(_has_digit, title)) or any(len(row) != len(title) for row in others):
        return []
    columns = [[cell for cell in column if cell] for column in zip(*others, strict=True)]
    if not any(column and all(map(_has_digit, column)) for column in columns):
        return []
    found = [
        column
        for name, column in zip(title, columns, strict=True)
        if not is_of_others(name) and any(map(_has_digit, column)) and not all(map(_is_date, column))
    ]
    if len(found) != 1:
        raise _doubtful()
    return found[0]


def check(rows: Rows, sign: str) -> list[str]:
    """Return the values of the one column that can have accession numbers; none if the rows are a list in lines.

    Args:
        sign: what separates the cells. A tab stands in tables, a comma also in lists.

    Raises:
        DoubtfulColumn: it is a table, and nothing says which column is meant.
    """
    columns = [[cell for cell in column if cell] for column in zip_longest(*rows, fillvalue="")]
    columns = [column for column in columns if column]
    if sign == "\t" and len(rows) > 1 and columns[0] == [str(number) for number in range(1, len(rows) + 1)]:
        columns = columns[1:]  # the rows are counted
        if len(columns) == 1:
            return columns[0]
    if len(columns) > 1 and not _are_a_list(columns, len(rows), sign) and not _is_ragged_list(rows):
        raise _doubtful()
    return []


def check_lines(lines: Iterable[Sequence[str]]) -> None:
    """Look at the values of lines that blanks separate.

    Raises:
        DoubtfulColumn: words stand beside numbers, or dates beside what is none.
    """
    several = [line for line in lines if len(line) > 1 and any(map(_has_digit, line))]  # others are titles
    if len(several) > 1 and (all(map(_has_words, several)) or all(map(_has_one_date, several))):
        raise _doubtful()


def check_title(title: str) -> None:
    """Look at what stands above the values of a list.

    Raises:
        Misconfigured: it says that they are no accession numbers.
    """
    if not _has_digit(title) and is_of_others(title):
        raise Misconfigured(
            f"the list has the title {title[:40]!r}: give the column of accession numbers, with its own title or none"
        )


def is_of_others(title: str) -> bool:
    """Return True if a title says that a column has something else than accession numbers."""
    plain = re.sub(r"[^a-z]", "", title.casefold())
    return plain in _WHOLE or _OTHERS.search(plain) is not None


def _are_a_list(columns: Sequence[Sequence[str]], rows: int, sign: str) -> bool:
    """Return True if the columns of some rows are all of one kind: a list that was written in several lines."""
    digits = [list(map(_has_digit, column)) for column in columns]
    if rows == 1 and sign != "\t":  # the most usual list
        named = any("^" in cell for column in columns for cell in column)
        dated = any(_is_date(cell) for column in columns for cell in column)
        return not named and not (dated and not all(map(all, digits)))
    if any(map(all, digits)) and not all(map(any, digits)):  # one holds names
        return False
    dates = [all(map(_is_date, column)) for column in columns]
    if any(dates) and not all(dates):
        return False
    form = _mask if rows == 1 or (sign != "\t" and rows < SURE) else _letters if sign == "\t" else _lengths
    if not _are_alike(columns, form):
        return False
    # Of numbers without letters nothing shows that those beside them are not patients' IDs.
    return sign != "\t" or rows == 1 or not all(cell.isdecimal() for column in columns for cell in column)


def _is_ragged_list(rows: Rows) -> bool:
    """Return True if lines have different numbers of values, of one kind: no table is written so, a list may be."""
    if len({len(row) for row in rows}) == 1:
        return False
    values = [value for row in rows for cell in row for value in BETWEEN.split(cell) if value]
    dates = list(map(_is_date, values))
    return all(map(_has_digit, values)) and len(set(map(_mask, values))) == 1 and (all(dates) or not any(dates))


def _are_alike(columns: Sequence[Sequence[str]], form: Callable[[str], str]) -> bool:
    shapes = [set(map(form, column)) for column in columns]
    return all(one & other for one, other in combinations(shapes, 2))


def _letters(value: str) -> str:
    return re.sub(r"\d+", "9", value.casefold())


def _mask(value: str) -> str:
    return re.sub(r"[^\W\d_]+", "a", _letters(value))


def _lengths(value: str) -> str:
    return re.sub(r"\d", "9", value.casefold())


def _has_words(values: Sequence[str]) -> bool:
    digits = [_has_digit(value) for value in values]
    return any(digits) and not all(digits)


def _has_one_date(values: Sequence[str]) -> bool:
    dates = list(map(_is_date, values))
    return any(dates) and not all(dates)


def _has_digit(value: str) -> bool:
    return re.search(r"\d", value) is not None


def _is_date(value: str) -> bool:
    return _DATE.fullmatch(value) is not None


def _doubtful() -> DoubtfulColumn:
    return DoubtfulColumn(
        "the list has several columns, and nothing says which of them has the accession numbers: give the column of "
        "accession numbers alone, or a title above it (Accession Number)"
    )
