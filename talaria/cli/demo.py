"""`talaria demo`: the whole path on one machine, with a study and a PACS of its own."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import AllTransferSyntaxes, generate_uid
from pynetdicom import AE, AllStoragePresentationContexts, build_context, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from talaria.cli.follow import follow
from talaria.cli.local import local
from talaria.cli.send import show_receipt
from talaria.console import say
from talaria.settings import load_settings
from tasks.targets import save
from transfer.home import Home

# One instance of each kind, all from pydicom's own test files.
SAMPLES = {
    "ct/1.dcm": "CT_small.dcm",
    "mr/1.dcm": "MR_small.dcm",
    "multiframe/1.dcm": "examples_ybr_color.dcm",
    "dose/1.dcm": "rtdose.dcm",
    "sr/1.dcm": "reportsi.dcm",
    "compressed/1.dcm": "JPEG2000.dcm",
}
EXCLUDED = "*.png,*.json"


def make_study(folder: Path) -> Path:
    """Write a new study of several modalities, with a PNG and a JSON beside the images; return its folder."""
    StudyInstanceUID = generate_uid()
    for name, sample in SAMPLES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the samples show what real files look like
            ds = dcmread(str(get_testdata_file(sample, download=False)))
            ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = (
                StudyInstanceUID,
                generate_uid(),
                generate_uid(),
            )
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            ds.PatientID, ds.PatientName, ds.AccessionNumber = "DEMO", "Demo^Talaria", "DEMO1"
            ds.save_as(path)
    (folder / "result.json").write_text(json.dumps({"volume_ml": 42.0}), encoding="utf-8")
    (folder / "preview.png").write_bytes(_png(32))
    return folder


@contextmanager
def pacs(folder: Path) -> Iterator[int]:
    """Run a PACS that writes what it gets into a folder, on a free port of the loopback; yields the port."""
    folder.mkdir(parents=True, exist_ok=True)

    def store(event: Any) -> int:
        ds: Dataset = event.dataset
        (folder / f"{ds.SOPInstanceUID}.dcm").write_bytes(event.encoded_dataset())
        return 0x0000

    ae = AE(ae_title="DEMOPACS")
    ae.supported_contexts = [
        build_context(str(context.abstract_syntax), [str(syntax) for syntax in AllTransferSyntaxes])
        for context in AllStoragePresentationContexts
    ]
    ae.add_supported_context(Verification)
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    if server is None:
        raise RuntimeError("the demo PACS did not start")
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()


def run() -> bool:
    """Send a study to the PACS, an archive folder and a DICOMweb folder; return True if all of it arrived."""
    from blocks.dicom import DicomTarget
    from blocks.dicomweb import DicomWebTarget
    from blocks.folder import FolderTarget

    settings = load_settings()
    demo = settings.home.expanduser().absolute() / "demo"
    os.environ["TALARIA_HOME"] = str(demo / "state")
    load_settings()
    home = Home.current()
    place = demo / "places"  # beside the state directory, from which nothing may be sent
    shutil.rmtree(place, ignore_errors=True)
    for folder in ("archive", "dicomweb"):
        (place / folder).mkdir(parents=True)
    study = make_study(place / "study")
    say(f"a study of {len(SAMPLES)} instances, a PNG and a JSON: {study}")
    with pacs(place / "pacs") as port, local() as access:
        targets = {
            "demo-pacs": DicomTarget(host="127.0.0.1", port=port, aet_target="DEMOPACS", aet_source="TALARIA"),
            "demo-archive": FolderTarget(folder=str(place / "archive"), exclude=EXCLUDED),
            "demo-dicomweb": DicomWebTarget(url=(place / "dicomweb").as_uri()),
        }
        for name, target in targets.items():
            access.run(save, target, name)
        queued = access.call("create_dispatch", paths=[str(study)], targets=list(targets))
        document = follow(access, queued["flow_run_id"])
    show_receipt(document)
    print(f"\nWhat arrived: {place / 'pacs'}, {place / 'archive'} and {place / 'dicomweb'}")
    print(f"The run in the Prefect UI: TALARIA_HOME={shlex.quote(str(home.root))} talaria up")
    print(f"then open http://127.0.0.1:{settings.port}/v2/runs/flow-run/{queued['flow_run_id']}")
    print(f"and give it the line in {home.root / 'api.auth'} as the password; no user is needed.")
    return bool(document["state"] == "delivered")


def _png(side: int) -> bytes:
    """Return a grey PNG of side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(x * y % 256 for x in range(side)) for y in range(side))
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
