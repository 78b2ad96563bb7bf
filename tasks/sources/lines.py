"""The units of a list: its lines, each a path, or an accession number at a target that is queried.

Each line is dispatched once. What became of it stands in a CSV file beside the list, which is written anew as a whole.
"""

from __future__ import annotations

import csv
import io
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from blocks.list_source import ListSource
from tasks.sources.units import Unit
from tasks.sources.writers import is_written
from transfer import roots
from transfer.accessions import BOMS, SEPARATOR, NoNumbers, accessions, of_cells, text_of
from transfer.columns import DoubtfulColumn
from transfer.errors import Busy, Denied, DispatchError, Misconfigured
from transfer.ledger import Ledger
from transfer.oserrors import FULL, words_of
from transfer.plan import Item
from transfer.sourcebook import UnitRow, UnitState
from transfer.studies import LIST_BYTES
from transfer.tables import csv_text

SETTLE_S = 5.0  # without a change, after which a last line without an end is taken for whole
PATHS = frozenset(("path", "paths", "file", "files", "folder", "folders", "directory"))  # titles of what is a path
DOUBTFUL = frozenset(("name", "id"))  # titles that may also be those of a folder's, or of a patient's
TITLES = PATHS | DOUBTFUL | {"study", "studies"}
ONCE = "listed"  # as fingerprint: a line doesn't change
LINE_ENDS = "\r\n"
COMMENT = "#"  # begins a line that doesn't count
BLANKS, ENDS = " \t\r", re.compile(r"\r\n|\r|\n")  # of lines; any other letter may belong to a name
COLUMNS = ("listed", "state", "detail", "run")


def units(source: ListSource, ledger: Ledger, check: Callable[[], None]) -> Iterator[Unit]:
    """Yield the lines that were dispatched before, and as many others as there is room for beside those under way.

    A last line that doesn't end, and what it changes, is ready when nobody has written to the list for a while.
    """
    rows = ledger.sources.units(source.name)
    room = source.at_once - sum(row.state is UnitState.DISPATCHED for row in rows.values())
    text, changed = _read(source)
    whole = text[: max(text.rfind(end) for end in LINE_ENDS) + 1]
    every = dict(_listed(text, source))
    complete = every if len(whole) == len(text) else dict(_listed(whole, source))
    for key, path in every.items():
        check()
        if key not in rows:
            room -= 1
            if room < 0:
                continue
        paths, ready = (path,) if path else (), key in complete
        settled = 0.0 if ready else changed + SETTLE_S
        yield Unit(key, paths, ONCE, settled, 0, source.origin, source.reaches, complete=ready)


def lines(source: ListSource) -> list[tuple[str, str]]:
    """Return what a list names, each once: its text, and its path if it is one.

    Raises:
        NotFound, Denied, Misconfigured: the list can't be read, or is none.
    """
    return list(_listed(_read(source)[0], source))


def _listed(text: str, source: ListSource) -> Iterator[tuple[str, str]]:
    if source.query:
        numbers = of_cells(_column(text, source)) if source.column else _numbers(text, source)
        yield from ((number, "") for number in numbers)
        return
    folder = source.file.rpartition("/")[0]
    keys, paths = set[str](), set[str]()
    for value in _column(text, source):
        path = value if value.startswith("/") else f"{folder}/{value}"
        key = Item(value, 0, 0).shown
        if key not in keys and path.rstrip("/") not in paths:
            yield key, path
        keys.add(key)
        paths.add(path.rstrip("/"))


def _numbers(text: str, source: ListSource) -> tuple[str, ...]:
    try:
        return accessions(text)
    except NoNumbers:  # yet
        return ()
    except DoubtfulColumn as exc:
        raise Misconfigured(f"{source.file}: {exc.message}, or name it as the source's column") from exc


def _read(source: ListSource) -> tuple[str, float]:
    """Return the text of a list, and when it was changed last, in seconds since the epoch: now, if it is being written.

    Raises:
        NotFound, Denied, Misconfigured: as `lines`.
    """
    path = source.file
    try:
        fd = roots.sources().open(path)
    except OSError as exc:
        raise Denied(f"{path}: {words_of(exc)}") from exc
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise Misconfigured(f"{path}: is not a file")
        changed = max(status.st_mtime, time.time()) if is_written(fd) else status.st_mtime
        with open(fd, "rb", closefd=False) as file:
            data = file.read(LIST_BYTES + 1)
    finally:
        os.close(fd)
    if len(data) > LIST_BYTES:
        raise Misconfigured(f"{path}: a list has at most {LIST_BYTES >> 20} MiB")
    return (text_of(data, path) if source.query else _decoded(data)), changed


def _decoded(raw: bytes) -> str:
    coding = next((name for mark, name in BOMS if raw.startswith(mark)), "utf-8-sig")
    return raw.decode(coding, "surrogateescape" if coding == "utf-8-sig" else "replace")


def _column(text: str, source: ListSource) -> list[str]:
    """Return the values of a list: its lines, or those of one column of a CSV file."""
    if not source.column and not source.file.lower().endswith((".csv", ".tsv")):
        found = (line.strip(BLANKS) for line in ENDS.split(text))
        return [line for line in found if line and not line.startswith(COMMENT)]
    text = SEPARATOR.sub("", text)
    first = next((line for line in ENDS.split(text) if line.strip() and not line.startswith(COMMENT)), "")
    delimiter = max(";\t,", key=first.count)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as exc:
        raise Misconfigured(f"{source.file}: is no valid CSV: {exc}") from exc
    rows = [row for row in rows if any(cell.strip() for cell in row) and not _is_comment(row, source)]
    if not rows:
        return []
    titles = [cell.strip() for cell in rows[0]]
    if source.column:
        if source.column not in titles:
            # Not what they are: where a file has no line of names, they are a patient's.
            raise Misconfigured(
                f"{source.file}: none of the {len(titles)} columns of its first line is {source.column}"
            )
        at, rows = titles.index(source.column), rows[1:]
    else:
        folder = Path(source.file).parent
        at = _of_paths(rows, folder)
        if len(rows[0]) > at and _is_title(titles[at], _cells(rows[1:], at), folder):
            rows = rows[1:]
    return _cells(rows, at)


def _is_comment(row: list[str], source: ListSource) -> bool:
    """Return True if a row of a CSV file doesn't count; titles and names of files that are there do."""
    if not row[0].startswith(COMMENT) or row[0].strip() == COMMENT:
        return False
    titles = {cell.strip() for cell in row}
    is_head = source.column in titles or bool({one.casefold() for one in titles} & TITLES)
    return not is_head and not os.path.lexists(Path(source.file).parent / row[0])


def _cells(rows: list[list[str]], at: int) -> list[str]:
    """Return the values of a column."""
    return [value for row in rows if len(row) > at and (value := row[at].strip(BLANKS))]


def _of_paths(rows: list[list[str]], folder: Path) -> int:
    """Return the column that has the paths: the first, unless nothing in it is one and one other is titled so, or has
    them alone.

    What stands in the first then may be patients' names, which would be looked for as folders, and reported.
    """
    first, titles = _cells(rows, 0), [cell.strip().casefold() for cell in rows[0]]
    if any("/" in one or os.path.lexists(folder / one) for one in first):
        return 0
    if len(titled := [at for at, one in enumerate(titles) if one in PATHS]) == 1:
        return titled[0]
    if titles[0] in TITLES - DOUBTFUL:
        return 0
    others = {at: _cells(rows[1:], at) or _cells(rows, at) for at in range(1, max(map(len, rows)))}
    found = [at for at, values in others.items() if values and all(one.startswith("/") for one in values)]
    return found[0] if len(found) == 1 else 0


def _is_title(text: str, others: list[str], folder: Path) -> bool:
    """Return True if the first value of a column of paths is its title, and not a path like the others that is gone."""
    if "/" in text or os.path.lexists(folder / text):
        return False
    if text.casefold() in TITLES or not others:
        return text.casefold() in TITLES
    return not any(_form(text) == _form(other) for other in others)


def _form(value: str) -> str:
    """Return what the names of a series of folders have in common, whatever their numbers and last letters."""
    return re.sub(r"\d+|[^\W\d_]$", "9", value.casefold())


def report_of(source: ListSource) -> Path:
    """Return the file that says what became of each line."""
    return Path(f"{source.file}.report.csv")


def report(source: ListSource, rows: Mapping[str, UnitRow], waits: Mapping[str, str]) -> None:
    """Write what became of each line of a list; `waits` as of `tasks.sources.units.report`.

    Raises:
        Busy: there is no room. Denied: the file can't be written.
    """
    try:
        known = [key for key, _ in lines(source)]
    except DispatchError:
        known = list(rows)
    table = []
    for key in dict.fromkeys((*known, *rows)):
        row = rows.get(key)
        waits_for = waits.get(row.run, "") if row and row.state is UnitState.DISPATCHED else ""
        state = _words(row.state) if row and not waits_for else "waiting"
        detail = row.detail or waits_for if row else ""
        table.append({"listed": key, "state": state, "detail": detail, "run": row.run if row else ""})
    text, path = csv_text(COLUMNS, table), report_of(source)
    part = path.with_name(f".talaria-{uuid.uuid4().hex[:16]}")
    try:
        data = text.encode("utf-8", "backslashreplace")
        if path.exists() and path.read_bytes() == data:
            return
        with part.open("xb") as file:
            file.write(data)
        part.replace(path)
    except OSError as exc:
        part.unlink(missing_ok=True)
        raise (Busy if exc.errno in FULL else Denied)(f"{path}: can't be written: {words_of(exc)}") from exc


def _words(state: UnitState) -> str:
    return {UnitState.DONE: "delivered", UnitState.DISPATCHED: "under way"}.get(state, str(state))
