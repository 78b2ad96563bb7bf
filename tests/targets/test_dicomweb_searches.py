"""Every search finds what it should, no more and no less: the same queries, to servers of all kinds and to a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from blocks.dicomweb import DicomWebTarget
from imaging.query import Query
from tasks.dicomweb import find
from tests import searching
from tests.servers.dicomweb import Scripted, scripted
from tests.servers.orthanc import orthanc
from tests.targets.dicomweb import dicomweb_target
from transfer.errors import Misconfigured

FEW = 80  # studies of a server whose every answer is made by hand


def wrong(target: DicomWebTarget, queries: list[Query], count: int = searching.COUNT) -> dict[str, str]:
    """Which queries find something else than they should, and what is missing or too much."""
    found = {}
    for query in queries:
        uids = searching.uids(find(target, query), query)
        expected = searching.truth(query, count)
        if set(uids) != expected or len(uids) != len(expected):
            keys = {key: value for key, value in vars(query).items() if value}
            missing, more = sorted(expected - set(uids)), sorted(set(uids) - expected)
            found[str(keys)] = f"{len(missing)} missing: {missing[:3]}; {len(more)} too much: {more[:3]}"
    return found


@pytest.fixture(scope="module")
def files() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="talaria-searching-") as folder:
        for name, data in searching.files():
            (Path(folder) / name).write_bytes(data)
        yield Path(folder)


def test_there_are_enough_queries() -> None:
    queries = searching.queries()
    assert len(queries) > 100
    counts = [len(searching.truth(query)) for query in queries]
    assert sum(count > 200 for count in counts) > 5
    assert sum(0 < count < 100 for count in counts) > 50


def test_folder(files: Path) -> None:
    target = DicomWebTarget(url=f"file://{files}", direction="query")
    target.named("folder")
    assert wrong(target, searching.queries()) == {}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [FEW, pytest.param(searching.COUNT, marks=pytest.mark.slow)])
def test_orthanc(count: int) -> None:
    """Its answers are in Latin-1 unless told otherwise, and lose what that can't hold."""
    with (
        tempfile.TemporaryDirectory(prefix="talaria-orthanc-") as folder,
        orthanc(Path(folder) / "orthanc", settings={"DefaultEncoding": "Utf8"}) as server,
    ):
        with ThreadPoolExecutor(4) as threads:
            for _, data in searching.files(count):
                threads.submit(server.request, "POST", "/instances", data)
        assert len(server.uids()) == len(list(searching.files(count)))
        target = dicomweb_target(
            server.dicomweb_url, http_user=server.user, http_password=server.password, idle_timeout_s=60
        )
        assert wrong(target, searching.some() if count == FEW else searching.queries(), count) == {}


# ---- servers that do otherwise


@dataclass
class Odd:
    """How a server differs from what the standard says."""

    ignores: tuple[str, ...] = ()
    rejects: tuple[str, ...] = ()
    cap: int | None = None


ODD = {
    "plain": Odd(),
    "caps": Odd(cap=15),
    "no filters": Odd(ignores=("filters",)),
    "no filters nor fields": Odd(ignores=("filters", "includefield")),
    "no fields": Odd(ignores=("includefield",)),
    "fields refused": Odd(rejects=("includefield",)),
    "no offset": Odd(ignores=("offset",)),
    "no pages": Odd(ignores=("offset", "limit")),
    "no offset, caps": Odd(ignores=("offset",), cap=40),
    "no pages, caps": Odd(ignores=("offset", "limit"), cap=12),
    "paging refused": Odd(rejects=("limit", "offset")),
    "date refused": Odd(rejects=("StudyDate",)),
    "modality refused": Odd(rejects=("ModalitiesInStudy",)),
    "name and fields refused": Odd(rejects=("PatientName", "includefield")),
    "accession refused": Odd(rejects=("AccessionNumber",), cap=64),
    "all keys refused": Odd(
        rejects=("StudyDate", "PatientName", "PatientID", "AccessionNumber", "ModalitiesInStudy", "StudyDescription")
    ),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Scripted]:
    with scripted() as running:
        for name, data in searching.files(FEW):
            running.stored[f"{name.removesuffix('.dcm')}.1"] = data
        yield running


@pytest.mark.timeout(300)
@pytest.mark.parametrize("odd", ODD)
def test_odd_servers_find_all_of_it(server: Scripted, odd: str) -> None:
    """This one takes wild cards in UIDs: all can be had in shares."""
    server.ignores, server.rejects, server.cap = set(ODD[odd].ignores), set(ODD[odd].rejects), ODD[odd].cap
    queries = searching.some()[:: 4 if ODD[odd].cap or "offset" in ODD[odd].ignores else 1]  # shares take their time
    assert wrong(dicomweb_target(server.url), queries, FEW) == {}


@pytest.mark.parametrize("odd", [name for name, one in ODD.items() if one.cap or "offset" in one.ignores])
def test_odd_servers_find_all_of_it_or_say_so(server: Scripted, odd: str) -> None:
    """This one takes none, so some searches have no way to all: these end with an error, never with less."""
    server.ignores, server.rejects, server.cap = set(ODD[odd].ignores), set(ODD[odd].rejects), ODD[odd].cap
    server.rejects |= {"StudyInstanceUID", "SeriesInstanceUID"}
    target = dicomweb_target(server.url)
    whole = 0
    for query in searching.some():
        try:
            found = searching.uids(find(target, query), query)
        except Misconfigured as exc:
            assert "narrow the query" in exc.message
        else:
            whole += 1
            assert set(found) == searching.truth(query, FEW)
    assert whole > len(searching.some()) / 3
