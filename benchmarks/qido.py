"""QIDO-RS: our searches beside dicomweb-client's own, at Orthanc with 500 studies.

    python -m benchmarks.qido [--pairs 5]

all: every study of the archive. numbers: 60 accession numbers, a search each, over one connection.
Ours proves that a list is whole, and compares each answer with what was asked for; dicomweb-client does neither: it
takes the pages that it is given.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import measure
from tests import searching
from tests.servers.orthanc import orthanc

NUMBERS = 60
FIELDS = ["StudyDescription", "ModalitiesInStudy", "NumberOfStudyRelatedInstances"]


def numbers() -> list[str]:
    """Plain accession numbers that differ by more than case: Orthanc decodes no blanks, and knows no case."""
    counts = Counter(study.accession.lower() for study in searching.archive())
    return sorted(
        one.accession for one in searching.archive() if one.accession.isalnum() and counts[one.accession.lower()] == 1
    )[:NUMBERS]


# ---- candidates: each runs in a process of its own


def ours(job: str, url: str, user: str, password: str) -> int:
    """Our driver's `find`."""
    from blocks.dicomweb import DicomWebTarget
    from imaging.query import Query
    from protocols.dicomweb import qido
    from tasks.dicomweb import connect

    target: Any = DicomWebTarget.model_validate(
        {"url": url, "http_user": user, "http_password": password, "direction": "query"}
    )
    queries = [Query()] if job == "all" else [Query(AccessionNumber=(number,)) for number in numbers()]
    with measure.section(), connect(target, lambda: None) as service:
        return sum(sum(1 for _ in qido.find(service, query)) for query in queries)


def dicomweb_client(job: str, url: str, user: str, password: str) -> int:
    """dicomweb-client, page after page."""
    import requests
    from dicomweb_client.api import DICOMwebClient

    session = requests.Session()
    session.auth, session.trust_env = (user, password), False
    client = DICOMwebClient(url, session=session)
    with measure.section():
        if job == "all":
            found: list[dict[str, Any]] = []
            while page := client.search_for_studies(fields=FIELDS, limit=100, offset=len(found)):
                found += page
            return len(found)
        return sum(
            len(client.search_for_studies(fields=FIELDS, search_filters={"AccessionNumber": number}))
            for number in numbers()
        )


CANDIDATES: dict[str, Callable[[str, str, str, str], int]] = {"ours": ours, "dicomweb-client": dicomweb_client}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--run", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        name, job, expected, *access = options.run
        found = CANDIDATES[name](job, *access)
        if found != int(expected):
            raise SystemExit(f"{name}: {found} matches, not {expected}")
        return
    print(measure.machine())
    with tempfile.TemporaryDirectory(prefix="talaria-benchmark-") as folder, orthanc(Path(folder)) as archive:
        for _, data in searching.files():
            archive.request("POST", "/instances", data)
        counts = {"all": searching.COUNT, "numbers": NUMBERS}
        for job, count in counts.items():

            def candidate(name: str, job: str = job, count: int = count) -> Callable[[], measure.Run]:
                argv = [sys.executable, "-m", "benchmarks.qido", "--run", name, job, str(count)]
                return lambda: measure.run([*argv, archive.dicomweb_url, archive.user, archive.password])

            found = measure.in_turn({name: candidate(name) for name in CANDIDATES}, options.pairs)
            print(f"\n{job}: {count} matches\n")
            print(measure.table(found, "dicomweb-client", 0), flush=True)


if __name__ == "__main__":
    main()
