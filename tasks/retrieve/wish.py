"""What a retrieval is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from imaging.query import Query
from transfer.accessions import accessions
from transfer.errors import Misconfigured
from transfer.query import study_tests


@dataclass(frozen=True)
class Wish:
    """What a retrieval was asked for."""

    source: str
    targets: tuple[str, ...] = ()
    into: str = ""
    accessions: str = ""
    filters: Query = field(default_factory=Query)
    priority: str = "normal"
    studies_per_hour: int = 0

    def numbers(self) -> tuple[str, ...]:
        """Return the accession numbers of the list, each once.

        Raises:
            Misconfigured: there is nothing to look for, or no place to bring it to; or a value can't be.
        """
        found = accessions(self.accessions)
        keys = ("StudyInstanceUID", "SeriesInstanceUID", "StudyDate", "PatientID", "PatientName", "StudyDescription")
        if not found and not any(getattr(self.filters, key) for key in keys):
            raise Misconfigured("nothing to look for: give accession numbers, study UIDs, dates or descriptions")
        if bool(self.targets) == bool(self.into):
            raise Misconfigured("give either targets or a folder to bring the studies to")
        if self.studies_per_hour < 0:
            raise Misconfigured("studies an hour: give a number, or 0 for no limit")
        if self.into and not Path(self.into).is_absolute():
            raise Misconfigured(f"{self.into}: give the folder's absolute path")
        study_tests(self.filters)
        return found
