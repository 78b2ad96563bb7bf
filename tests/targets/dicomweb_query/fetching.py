"""Series that are retrieved, and from where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blocks.dicomweb import DicomWebTarget
from imaging.query import Query
from talaria.testing import studies
from tasks.dicomweb import retrieve
from tests.servers.dicomweb import Scripted
from tests.servers.orthanc import Orthanc
from tests.targets.dicomweb import dicomweb_target
from tests.targets.dicomweb_query.finding import EVERYTHING
from transfer.receipt import PushReport, Receipt


def series_of(count: int, **uids: str) -> list[bytes]:
    """One series of CT images."""
    study, series = uids.get("study", studies.uid(56)), uids.get("series", studies.uid(56))
    return [studies.ct_bytes(study=study, series=series) for _ in range(count)]


def fetched(server: Scripted, folder: Path, query: Query = EVERYTHING, **settings: Any) -> Receipt:
    return retrieve(dicomweb_target(server.url, **settings), query, folder, PushReport())


def orthanc_target(orthanc: Orthanc, **settings: Any) -> DicomWebTarget:
    credentials = {"http_user": orthanc.user, "http_password": orthanc.password}
    return dicomweb_target(orthanc.dicomweb_url, **(credentials | settings))
