"""What XNAT's words mean where it refuses an import (GradualDicomImporter, DicomZipImporter, PrearcSessionArchiver)."""

from __future__ import annotations

import re

CONTENT = (400, 409, 413, 422)  # statuses that may be about what was sent
TOO_LARGE = 413

UNREADABLE = re.compile(r"unable to read DICOM object (\S+)|object (\S+) contains no SOP")
COLLISION = "Concurrent file sends"
BROKEN = "unable to read data from file"
WORKING = ("already be in progress", "already archiving", "in use", "lock session", "did not return a valid data URI")
OTHER_STUDY = "modification of session UID"
EXISTS = "Session already exists: XNAT has this study without this file, and overwrite is none: set it to append"
OUR_FAULT = ("Parameter dest format error", "identify upload format", "Unsupported format", "Importer is limited")
NO_ROOM = re.compile(r"no space left|disk (is )?full|quota|insufficient storage|out of memory", re.IGNORECASE)
# Of the whole session, or of the user: no other choice of files would change it.
_OF_ALL = re.compile(
    r"session already|already (exists|contains)|invalid modification|unable to archive"
    r"|permission|not authori[sz]ed|forbidden",
    re.IGNORECASE,
)


class RefusedWhole(Exception):
    """XNAT refused an import of several files, perhaps because of one that it doesn't name.

    Attributes:
        words: XNAT's own, fit to be shown.
        too_large: whether it refused their size.
    """

    def __init__(self, words: str, *, too_large: bool) -> None:
        super().__init__(words)
        self.words, self.too_large = words, too_large


def may_be_one(words: str) -> bool:
    """Return True if a refusal in these words may be about a single file."""
    return not _OF_ALL.search(words)
