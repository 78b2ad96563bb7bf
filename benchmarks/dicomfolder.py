"""A folder of 100,000 small DICOM files: the first look, a query, a query after ten files changed; and its peer.

    python -m benchmarks.dicomfolder [--files 100000] [--peer-files 2000] [--rounds 5]

Every figure is of a process of its own, as a query of the command line is: from opening the folder to the last match,
without the time that imports take. The peer is dicomweb-client's DICOMfileClient, on a smaller folder, because it
reads every file again at each query. Files are hot in the page cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks import measure
from talaria.testing import studies

UID_CHARS = 56
SERIES_FILES, STUDY_SERIES = 50, 4
DESCRIPTION = "Study 00007"  # one in a hundred
# What a header of an image has that people look for; the rest of it only makes the files larger.
KEPT = frozenset(
    ("SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "StudyDate", "StudyTime", "AccessionNumber", "Modality",
     "ReferringPhysicianName", "StudyDescription", "SeriesDescription", "PatientName", "PatientID", "PatientBirthDate",
     "PatientSex", "StudyInstanceUID", "SeriesInstanceUID", "StudyID", "SeriesNumber", "InstanceNumber")
)  # fmt: skip


def make(root: Path, count: int) -> None:
    """Write `count` files of some 800 bytes each: studies of four series of 50 instances, a folder for each series."""
    instance, series, study = (studies.uid(UID_CHARS) for _ in range(3))
    ds = studies.dataset(SOPInstanceUID=instance, series=series, study=study, StudyDescription=DESCRIPTION)
    for element in list(ds):
        if element.keyword not in KEPT:
            del ds[element.tag]
    template = studies.encoded(ds)
    for number in range(-(-count // (SERIES_FILES * STUDY_SERIES))):
        of_study = template.replace(study.encode(), studies.uid(UID_CHARS).encode())
        of_study = of_study.replace(DESCRIPTION.encode(), b"Study %05d" % (number % 100))
        for one in range(STUDY_SERIES):
            folder = root / f"{number:05}" / str(one)
            folder.mkdir(parents=True)
            of_series = of_study.replace(series.encode(), studies.uid(UID_CHARS).encode())
            for name in range(min(SERIES_FILES, count)):
                uid = studies.uid(UID_CHARS).encode()
                (folder / f"{name:04}.dcm").write_bytes(of_series.replace(instance.encode(), uid))
            count -= SERIES_FILES
            if count <= 0:
                return


# ---- what is measured, in processes of its own


def ours(root: str) -> None:
    """Bring the index up to date, and find one study in a hundred by its description."""
    from imaging.query import Query
    from protocols.dicomfolder.folder import DicomFolder

    with measure.section(), DicomFolder(Path(root)) as folder:
        found = list(folder.find(Query(StudyDescription=(DESCRIPTION,), Modality="CT")))
    print(f"{len(found)} studies, {folder.report}", file=sys.stderr)


def peer(root: str) -> None:
    """The same with DICOMfileClient, which knows no description: by the patient's ID, which all have."""
    from dicomweb_client.file import DICOMfileClient

    with measure.section():
        client = DICOMfileClient(f"file://{root}", update_db=True)
        found = client.search_for_studies(search_filters={"PatientID": studies.PATIENT_ID})
    print(f"{len(found)} studies", file=sys.stderr)


CANDIDATES: dict[str, Callable[[str], None]] = {"ours": ours, "peer": peer}


def candidate(name: str, root: Path, prepare: Callable[[], None] = lambda: None) -> measure.Run:
    prepare()
    return measure.run([sys.executable, "-m", "benchmarks.dicomfolder", "--candidate", name, str(root)])


# ---- what changes between two runs


def forget(root: Path) -> None:
    """Remove the index of either."""
    for path in root.iterdir():
        if path.name.startswith((".talaria-", ".dicom-file-client")):
            path.unlink()


def change_ten(root: Path) -> None:
    """Change four files, remove three and add three, each in a folder of its own."""
    files = [next(iter(folder.iterdir())) for folder, _ in zip(sorted(root.glob("*/0")), range(10), strict=False)]
    for path in files[:4]:
        path.write_bytes(path.read_bytes())
    for path in files[4:7]:
        path.unlink()
    for path in files[7:]:
        data = path.read_bytes()
        at = data.index(b"\x08\x00\x18\x00UI") + 8
        new = studies.uid(UID_CHARS).encode()
        (path.parent / f"{new.decode()}.dcm").write_bytes(data[:at] + new + data[at + UID_CHARS :])


def table(found: Mapping[str, list[measure.Run]]) -> str:
    lines = ["| what | wall s | CPU s | peak MiB |", "|---|---|---|---|"]
    for name, runs in found.items():
        wall, cpu, peak = (
            statistics.median(getattr(run, what) for run in runs) for what in ("wall_s", "cpu_s", "peak_mib")
        )
        low, high = min(run.wall_s for run in runs), max(run.wall_s for run in runs)
        lines.append(f"| {name} | {wall:.2f} ({low:.2f}-{high:.2f}) | {cpu:.2f} | {peak:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--peer-files", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--candidate", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.candidate:
        name, root = options.candidate
        CANDIDATES[name](root)
        return
    with tempfile.TemporaryDirectory(prefix="talaria-dicomfolder-") as folder:
        large, small = Path(folder) / "large", Path(folder) / "small"
        make(large, options.files)
        make(small, options.peer_files)
        print(f"{measure.machine()}; {options.rounds} rounds\n")
        first = measure.in_turn({"first look": partial(candidate, "ours", large, partial(forget, large))}, 1)
        again = {
            "query, nothing changed": partial(candidate, "ours", large),
            "query, ten files changed": partial(candidate, "ours", large, partial(change_ten, large)),
        }
        print(f"{options.files} files:\n\n{table(first | measure.in_turn(again, options.rounds))}\n")
        both = {}
        for what, prepare in (("first look", partial(forget, small)), ("query, nothing changed", lambda: None)):
            for name in ("ours", "peer"):
                both[f"{what}, {name}"] = partial(candidate, name, small, prepare)
        # Each query comes right after its own first look, which the other's must not undo.
        order = {name: both[name] for name in sorted(both, key=lambda name: name.endswith("peer"))}
        found = measure.in_turn(order, options.rounds)
        print(f"{options.peer_files} files, beside DICOMfileClient:\n\n{table(found)}\n")
        for what in ("first look", "query, nothing changed"):
            pairs = zip(found[f"{what}, peer"], found[f"{what}, ours"], strict=True)
            ratios = [theirs.wall_s / own.wall_s for theirs, own in pairs]
            print(
                f"{what}: {statistics.median(ratios):.1f} times the peer's speed ({min(ratios):.1f}-{max(ratios):.1f})"
            )
        shutil.rmtree(large)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # pydicom's, about its own test file
    main()
