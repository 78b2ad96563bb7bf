"""Tables as CSV (RFC 4180) that spreadsheets may open: no value of somebody else's is taken for a formula."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FORMULAS = "=+-@\t\r"  # what a cell begins with that a spreadsheet computes


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a line of titles; what could be a formula gets an apostrophe before it."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns)
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _safe(row[key]) for key in columns})
    return out.getvalue()


def _safe(value: Any) -> Any:
    return f"'{value}" if str(value)[:1] in FORMULAS and str(value) else value
