"""A form with many large files, written to an upload's folder as it comes in; nothing of it is held in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from python_multipart.multipart import MultipartParser, parse_options_header

from talaria.front.pages.texts import text
from transfer import uploads

FIELD_BYTES = 64 << 10  # of all fields that are no files
MOST_FIELDS = 300


class FormOfFiles:
    """The parts of a form: fields, and files below a folder.

    Attributes:
        fields: values by name.
        files: path and size of each file.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        """Raise ValueError if `kind`, the form's Content-Type, is not that of a form with files."""
        media, options = parse_options_header(kind)
        if media != b"multipart/form-data" or not options.get(b"boundary"):
            raise ValueError(text("error.no_form"))
        self.fields: dict[str, list[str]] = {}
        self.files: list[tuple[str, int]] = []
        self._folder, self._left, self._kept = folder, uploads.limit(), 0
        self._all = uploads.limit() + uploads.MOST_FILES * 2 * uploads.PATH_B  # with what stands before each file
        self._header, self._value, self._part = b"", b"", b""
        self._name, self._path = "", ""
        self._file: BinaryIO | None = None
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_header,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers,
                "on_part_data": self._on_data,
                "on_part_end": self._end,
            },
        )

    def write(self, data: bytes) -> None:
        """Take a piece of the form.

        Raises:
            ValueError: it is no form; Misconfigured, Rejected, Busy: a file can't be taken.
        """
        self._all -= len(data)
        if self._all < 0:
            uploads.check([("x", uploads.limit() + 1)])
        try:
            self._parser.write(data)
        except OSError as exc:
            raise uploads.trouble(exc) from exc

    def close(self) -> None:
        """End the file that is open, if one is."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self._header = self._value = self._part = b""
        self._name = self._path = ""

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            options = parse_options_header(self._value)[1]
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
            self._path = options.get(b"filename", b"").decode("utf-8", "replace")
        self._header = self._value = b""

    def _on_headers(self) -> None:
        if not self._path:
            return
        path = self._folder / uploads.checked(self._path)
        if len(self.files) >= uploads.MOST_FILES:
            uploads.check([*self.files, (self._path, 0)])
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._file = os.fdopen(os.open(path, flags, 0o600), "wb")
        except FileExistsError as exc:
            raise ValueError(text("upload.twice")) from exc
        self.files.append((self._path, 0))

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        size = end - start
        if self._file is None:
            self._kept += size
            if self._kept > FIELD_BYTES:
                raise ValueError(text("error.long_form", count=FIELD_BYTES))
            self._part += data[start:end]
            return
        self._left -= size
        if self._left < 0:
            uploads.check([("x", uploads.limit() + 1)])
        uploads.room(self._folder, size)
        self._file.write(data[start:end])
        path, before = self.files[-1]
        self.files[-1] = path, before + size

    def _end(self) -> None:
        if self._file is not None:
            self.close()
        elif self._name and len(self.fields) < MOST_FIELDS:
            self.fields.setdefault(self._name, []).append(self._part.decode("utf-8", "replace"))
