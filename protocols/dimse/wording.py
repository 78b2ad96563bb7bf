"""How the text of a query is written for peers: so that none of them leaves out what it should find."""

from __future__ import annotations

import re

TEXTS = ("PatientName", "PatientID", "StudyDescription")
LATIN = 0x24F  # the last of its letters in Unicode; others may stand in a second or third form of a name
SINGLE = re.compile(r"\*?\?[*?]*")  # a wild card for one character, with those around it


def worded(keyword: str, value: str) -> str:
    """Return a key's value without `?`, and a name in any form."""
    # To some a ? is one byte (Orthanc), so that it passes over letters that are not ASCII.
    value = SINGLE.sub("*", value) if keyword in TEXTS else value
    return _any_form(value) if keyword == "PatientName" else value


def forms(keyword: str, value: str) -> list[str]:
    """Return patterns that together find what a key's value stands for, and no more; of a `?`, as much as of a `*`.

    A name may stand in any of three forms, before others or behind them, and have empty parts at its end.
    """
    if keyword != "PatientName":
        return [worded(keyword, value)]
    name = SINGLE.sub("*", value).rstrip("^=")
    ends = [name] if name.endswith("*") else [name + end for end in ("", "=*", "^", "^^", "^^^", "^^^^")]
    return [begin + one for begin in ("", "*=") for one in ends]


def _any_form(name: str) -> str:
    """Return a pattern for a name with and without empty parts at its end, and its other forms (PS3.5 section 6.2).

    Peers that compare names as text (dcmqrscp) take Doe^Jane and Doe^Jane^^^ for two, and see one form only.
    """
    begin = "*" if any(ord(letter) > LATIN for letter in name) else ""
    return re.sub(r"\*+", "*", f"{begin}{name.rstrip('^=')}*")
