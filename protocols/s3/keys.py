"""Keys of S3 objects: file names in a form that every store accepts and lists."""

from __future__ import annotations

import hashlib
import mimetypes
import re
from collections.abc import Iterable

MAX_KEY_BYTES = 1024  # S3's limit, UTF-8
DICOM = "application/dicom"
# Bytes that are no UTF-8 (surrogates), controls, and what XML 1.0 can't list.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
# Not the files of this machine, so that the same file has the same type wherever it is sent from.
_TYPES = mimetypes.MimeTypes(filenames=())


def keys(prefix: str, folders: dict[str, str], paths: Iterable[str]) -> dict[str, str]:
    """Map relative paths to keys `<prefix>/<folder>/<path>`, no two to the same key.

    Bytes that are not UTF-8 and control characters become `%XX`; where that makes two names the same, the later one
    gets a part of its own hash.

    Args:
        folders: the folder, relative to the prefix, of each path.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    for path in paths:
        name = _UNSAFE.sub(_escaped, path)
        key = under(prefix, folders[path], name)
        if key in taken:
            mark = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:12]
            key = under(prefix, folders[path], f"{name}~{mark}")
        taken.add(key)
        found[path] = key
    return found


def under(*parts: str) -> str:
    """Join the parts of a key that are not empty."""
    return "/".join(part for part in parts if part)


def _escaped(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogateescape"))


def content_type(path: str, is_dicom: bool) -> str:
    """Return the media type of a file, from its content if that is DICOM, else from its name."""
    if is_dicom or path.lower().endswith((".dcm", ".dicom")):
        return DICOM
    return _TYPES.guess_type(path.rsplit("/", 1)[-1])[0] or "application/octet-stream"
