"""Standard streams as people give them: closed, to a reader that has enough, in the encoding of an old locale."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

MODES = {"stdin": "r", "stdout": "w", "stderr": "w"}  # in the order of their numbers


class _Dropping(io.FileIO):
    """A stream that drops what is written once nobody reads it.

    So a command whose reader has enough (`talaria jobs list | head -1`) comes to its own end, with its own exit code.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def speak_utf8() -> None:
    """Begin this process anew in UTF-8 where its locale has another encoding, as de_DE has.

    Names of files would mean others to it than to the server, and tables could not be printed.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - what runs already


def open_streams() -> None:
    """Make streams that are closed lead nowhere, and let the others outlive their readers."""
    for number, (name, mode) in enumerate(MODES.items()):
        stream = getattr(sys, name)
        if stream is None:  # what is opened takes its number, which no other file gets then
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8", errors="surrogateescape"))  # noqa: SIM115
        elif number and stream is getattr(sys, f"__{name}__"):
            raw = io.BufferedWriter(_Dropping(number, "w", closefd=False))
            # An encoding that somebody demands (PYTHONIOENCODING) may lack what tables are drawn with.
            errors = "backslashreplace" if stream.errors == "strict" else stream.errors
            lines = stream.line_buffering or stream.write_through  # PYTHONUNBUFFERED, as in many images of containers
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, errors, line_buffering=lines))


def flushed() -> None:
    """Write what is left of the output.

    Raises:
        OSError: it can't be written: a full disk.
    """
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - else it is tried once more
        raise
