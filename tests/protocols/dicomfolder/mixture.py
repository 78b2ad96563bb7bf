"""A folder in which everything that an answer may depend on occurs, and the same files in Orthanc."""

from __future__ import annotations

import random
from pathlib import Path

from talaria.testing import studies
from tests.servers.orthanc import Orthanc


def mixed(folder: Path, seed: int = 0) -> None:
    """Write studies of several series whose instances lie anywhere, twice, and in studies that disagree."""
    choose = random.Random(seed)
    names = ["Müller^Jörg", "MULLER^Jorg", "Quell^A", "quell^b", "O'Neil^X^^Dr", "Quell"]
    for number in range(12):
        study = studies.uid()
        person = {
            "PatientName": choose.choice(names),
            "PatientID": f"P{number % 7}",
            "AccessionNumber": f"ACC{number:03}" if number else "",
            "StudyDate": f"20{10 + number}0{1 + number % 9}15",
            "StudyDescription": choose.choice(["Head routine", "HEAD ROUTINE", "Thorax", "Knee*left", ""]),
        }
        for _ in range(choose.randint(1, 4)):
            series = studies.uid()
            modality = choose.choice(["CT", "MR", "PT", "SR"])
            description = choose.choice(["T1 axial", "t1 AXIAL", "localizer", ""])
            for _ in range(choose.randint(1, 3)):
                changes = person | {"Modality": modality, "SeriesDescription": description}
                if choose.random() < 0.1:
                    changes |= {"StudyDescription": "Disagrees", "PatientSex": "F"}
                name = f"{choose.choice('abc')}/{choose.choice('de')}/{choose.randint(0, 10**9)}.dcm"
                path = studies.dicom(
                    folder / name, study=study, series=series, SpecificCharacterSet="ISO_IR 192", **changes
                )
                if choose.random() < 0.2:
                    studies.write(folder / "copies" / path.name, path.read_bytes())


def upload(server: Orthanc, folder: Path) -> None:
    """Send every file in the order of paths; Orthanc refuses those that are no instances."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            try:
                server.request("POST", "/instances", path.read_bytes())
            except RuntimeError:
                continue
