"""The units of a list: its lines, each a path, or an accession number at a target that is queried.

Each line is dispatched once. What became of it stands in a CSV file beside the list, which is written anew as a whole.
"""

from __future__ import annotations

import csv
import io
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from blocks.list_source import ListSource
from tasks.sources.units import Unit
from transfer import roots
from transfer.accessions import BOMS, from_bytes
from transfer.errors import Busy, Denied, DispatchError, Misconfigured
from transfer.ledger import Ledger
from transfer.oserrors import FULL, words_of
from transfer.plan import Item
from transfer.sourcebook import UnitRow, UnitState
from transfer.studies import LIST_BYTES
from transfer.tables import csv_text

ONCE = "listed"  # as fingerprint: a line doesn't change
BLANKS, ENDS = " \t\r", re.compile(r"\r\n|\r|\n")  # of lines; any other letter may belong to a name
COLUMNS = ("listed", "state", "detail", "run")


def units(source: ListSource, ledger: Ledger, check: Callable[[], None]) -> Iterator[Unit]:
    """Yield the lines that were dispatched before, and as many others as there is room for beside those under way."""
    rows = ledger.sources.units(source.name)
    room = source.at_once - sum(row.state is UnitState.DISPATCHED for row in rows.values())
    for key, path in lines(source):
        check()
        if key not in rows:
            room -= 1
            if room < 0:
                continue
        paths = (path,) if path else ()
        yield Unit(key, paths, ONCE, 0.0, 0, source.origin, source.reaches, complete=True)


def lines(source: ListSource) -> list[tuple[str, str]]:
    """Return what a list names, each once: its text, and its path if it is one.

    Raises:
        NotFound, Denied, Misconfigured: the list can't be read, or is none.
    """
    raw = _read(source.file)
    if source.query:
        text = raw if not source.column else "\n".join(_column(_decoded(raw), source)).encode("utf-8", "replace")
        return [(number, "") for number in from_bytes(text, source.file)]
    folder = source.file.rpartition("/")[0]
    found: dict[str, str] = {}
    for value in _column(_decoded(raw), source):
        path = value if value.startswith("/") else f"{folder}/{value}"
        found.setdefault(Item(value, 0, 0).shown, path)
    return list(found.items())


def _read(path: str) -> bytes:
    try:
        fd = roots.sources().open(path)
    except OSError as exc:
        raise Denied(f"{path}: {words_of(exc)}") from exc
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Misconfigured(f"{path}: is not a file")
        with open(fd, "rb", closefd=False) as file:
            data = file.read(LIST_BYTES + 1)
    finally:
        os.close(fd)
    if len(data) > LIST_BYTES:
        raise Misconfigured(f"{path}: a list has at most {LIST_BYTES >> 20} MiB")
    return data


def _decoded(raw: bytes) -> str:
    coding = next((name for mark, name in BOMS if raw.startswith(mark)), "utf-8-sig")
    return raw.decode(coding, "surrogateescape" if coding == "utf-8-sig" else "replace")


def _column(text: str, source: ListSource) -> list[str]:
    """Return the values of a list: its lines, or those of one column of a CSV file."""
    if not source.column and not source.file.lower().endswith((".csv", ".tsv")):
        found = (line.strip(BLANKS) for line in ENDS.split(text))
        return [line for line in found if line and not line.startswith("#")]
    first = text.lstrip().partition("\n")[0]
    delimiter = max(";\t,", key=first.count)
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if any(cell.strip() for cell in row)]
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
        at, folder = 0, Path(source.file).parent
        if not titles[0].startswith("/") and not os.path.lexists(folder / titles[0]):
            rows = rows[1:]  # a line of names
    return [value for row in rows if len(row) > at and (value := row[at].strip(BLANKS))]


def report_of(source: ListSource) -> Path:
    """Return the file that says what became of each line."""
    return Path(f"{source.file}.report.csv")


def report(source: ListSource, rows: Mapping[str, UnitRow]) -> None:
    """Write what became of each line of a list.

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
        state = _words(row.state) if row else "waiting"
        table.append(
            {"listed": key, "state": state, "detail": row.detail if row else "", "run": row.run if row else ""}
        )
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
