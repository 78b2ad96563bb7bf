"""Retrieval by WADO-URI, from servers that have nothing else."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pydicom
import pytest

from protocols.dicomweb import wado_uri
from talaria.testing import studies
from tasks.dicomweb import check, connect
from tests.servers.dicomweb import Scripted
from tests.servers.orthanc import Orthanc
from tests.targets.dicomweb import dicomweb_target
from tests.targets.dicomweb_query.fetching import fetched, orthanc_target, series_of
from tests.targets.dicomweb_query.finding import files, hold
from transfer.outcome import Kind
from transfer.receipt import State


@pytest.mark.parametrize("status", [404, 405, 501, 400])
@pytest.mark.parametrize("place", ["/rs/wado", "/wado"])
def test_a_server_that_has_wado_uri_only(status: int, place: str, server: Scripted, tmp_path: Path) -> None:
    uids = hold(server, *series_of(3), *series_of(3))
    server.uri, server.no_rs, server.withheld = place, status, {uids[4]}
    receipt = fetched(server, tmp_path / "out")
    assert receipt.state is State.PARTIAL and receipt.counts[Kind.DELIVERED] == 5
    assert files(tmp_path / "out") == {uid: server.stored[uid] for uid in uids if uid != uids[4]}
    assert any("WADO-URI" in note and place in note for note in receipt.notes)
    server.withheld = set()
    assert fetched(server, tmp_path / "out").state is State.DELIVERED
    [probe] = [one for one in check(dicomweb_target(server.url, direction="query")).probes if one.name == "wado"]
    assert "WADO-URI" in probe.detail


def test_wado_uri_of_orthanc_gives_what_wado_rs_gives(orthanc: Orthanc, tmp_path: Path) -> None:
    data = studies.ct_bytes()
    orthanc.request("POST", "/instances", data)
    ds = pydicom.dcmread(BytesIO(data))
    with connect(orthanc_target(orthanc)) as service:
        uids = (ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID)
        place = wado_uri.found(service, uids)
        assert place == "/wado"
        [content] = [b"".join(bytes(piece) for piece in one) for one in wado_uri.fetch(service, place, uids, int)]
    assert pydicom.dcmread(BytesIO(content)).PixelData == ds.PixelData
