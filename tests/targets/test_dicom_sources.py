"""Real archives as sources: the same searches find what they should, and what is fetched is what is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from blocks.dicom import DicomTarget
from imaging.query import Query
from protocols.dimse.get import Retriever
from talaria.testing import studies
from talaria.testing.harness import attempt
from tasks import dicomweb
from tasks.dicom import check, find, retrieve
from tests import searching
from tests.servers.dcmtk import dcmqrscp
from tests.servers.orthanc import orthanc, shared_orthanc
from tests.servers.qr import Instance as Held
from tests.servers.qr import Last, Request, Send, Steps, archive, sends
from tests.servers.qrscp import qrscp
from tests.servers.steps import Silence
from tests.targets import letters
from tests.targets.dicom import dicom_target
from tests.targets.dicom_tls import certificates, tls_target
from tests.targets.dicomweb import dicomweb_target
from tests.targets.pulling import AET, assert_agrees, datasets, port_of_moves, store, study
from transfer.errors import Interrupted, Misconfigured
from transfer.receipt import PushReport, State


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    return port_of_moves(monkeypatch)


def wrong(target: DicomTarget, queries: list[Query]) -> dict[str, str]:
    """Which queries find something else than they should, and what is missing or too much.

    Servers may tell upper from lower case.
    """
    bad = {}
    for query in queries:
        keys = str({key: value for key, value in vars(query).items() if value})
        try:
            uids = searching.uids(find(target, query), query)
        except Misconfigured as exc:
            bad[keys] = str(exc)
            continue
        missing = sorted(searching.truth(query, exact=True) - set(uids))
        more = sorted(set(uids) - searching.truth(query))
        if missing or more or len(uids) != len(set(uids)):
            bad[keys] = f"{len(missing)} missing: {missing[:3]}; {len(more)} too much: {more[:3]}"
    return bad


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """The files of the 500 studies."""
    with tempfile.TemporaryDirectory(prefix="talaria-sources-") as made:
        for name, data in searching.files():
            (Path(made) / name).write_bytes(data)
        yield Path(made)


@pytest.mark.parametrize("queries", [searching.some, pytest.param(searching.queries, marks=pytest.mark.slow)])
def test_searches_of_dcmqrscp(queries: Callable[[], list[Query]], folder: Path, tmp_path: Path) -> None:
    with dcmqrscp(tmp_path / "qr", studies=600) as server:
        target = dicom_target(server.port, aet_target=server.aet, direction="both", idle_timeout_s=60, concurrency=1)
        assert attempt(target, folder).require().state is State.DELIVERED
        asked = queries()
        # It looks at no ModalitiesInStudy: each study is asked for its series, which is the same for all of these.
        alike = [query for query in asked if vars(query) == vars(Query(Modality=query.Modality)) and query.Modality]
        assert wrong(target, [query for query in asked if query not in alike[2:]]) == {}
        # It has no Series Description: what is fetched is chosen by what its instances say.
        one = next(one for one in searching.archive() if len({series.description for series in one.series}) > 1)
        wanted = next(series for series in one.series if series.description)
        query = Query(StudyInstanceUID=one.uid, SeriesDescription=(wanted.description,))
        assert retrieve(target, query, tmp_path / "in", PushReport()).state is State.DELIVERED
        assert set(datasets(tmp_path / "in")) == {f"{wanted.uid}.1"}


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("\\ISO 2022 IR 87", "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("ISO 2022 IR 13\\ISO 2022 IR 87", "ﾔﾏﾀﾞ^ﾀﾛｳ=武田川^次郎"),
        ("ISO_IR 13", "ﾔﾏﾀﾞ^ﾀﾛｳ"),
        ("\\ISO 2022 IR 149", "Hong^Gildong=洪^吉洞=홍^길동"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
        ("ISO_IR 100", "Müller^Jörg"),
    ],
)
def test_names_are_found_by_any_part_of_their_forms_where_bytes_are_compared(
    charset: str, name: str, names_at_dcmqrscp: DicomTarget, tmp_path: Path
) -> None:
    term = charset.split("\\")
    files = [studies.encoded(studies.dataset(SpecificCharacterSet=term, PatientName=name, AccessionNumber=name[:6]))]
    store(tmp_path, files, names_at_dcmqrscp.port, names_at_dcmqrscp.aet_target)
    for part in [form.partition("^")[0] for form in name.split("=")]:
        for pattern in (f"{part}*", f"*{part}*", f"{part[0]}*", f"*{part[1:2]}*", f"*{part[-1]}^*"):
            found = [match.attributes["PatientName"] for match in find(names_at_dcmqrscp, Query(PatientName=pattern))]
            assert name in found, pattern


@pytest.fixture(scope="module")
def names_at_dcmqrscp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DicomTarget]:
    """A server that takes a name for bytes."""
    with dcmqrscp(tmp_path_factory.mktemp("names") / "qr") as server:
        yield dicom_target(server.port, aet_target=server.aet, direction="query", idle_timeout_s=30)


def test_searches_of_orthanc(folder: Path, tmp_path: Path) -> None:
    with orthanc(tmp_path / "orthanc", settings={"DefaultEncoding": "Utf8"}) as server:
        target = dicom_target(server.dicom_port, aet_target=server.aet, direction="both", idle_timeout_s=60)
        assert attempt(target, folder).require().state is State.DELIVERED
        assert wrong(target, searching.queries()) == {}


def test_an_orthanc_that_allows_us_no_c_get_sends_by_c_move(tmp_path: Path, port: int) -> None:
    us = {"AET": "US", "Host": "127.0.0.1", "Port": port, "AllowGet": False}
    nodes = {"us": us, "there": [AET, "127.0.0.1", port]}
    settings = {"DicomModalities": nodes, "DicomAlwaysAllowGet": False, "DicomAlwaysAllowFind": False}
    with orthanc(tmp_path / "orthanc", settings=settings) as server:
        for file in study():
            server.request("POST", "/instances", file)
        target = dicom_target(server.dicom_port, aet_target=server.aet, aet_source="US", direction="query")
        receipt = retrieve(target, Query(AccessionNumber=(studies.ACCESSION,)), tmp_path / "in", PushReport())
        assert receipt.state is State.DELIVERED and set(datasets(tmp_path / "in")) == server.uids()
        assert any("by C-MOVE" in note for note in receipt.notes)
        health = check(target)
        assert health.ok and "C-MOVE is granted, C-GET is not" in health.probes[-1].detail
        assert "asked by C-GET: is US registered there" in health.probes[-1].detail
        # By its own settings it lets nobody search who is not registered there.
        stranger = dicom_target(server.dicom_port, aet_target=server.aet, aet_source="STRANGER", direction="query")
        with pytest.raises(Interrupted, match="asked by C-FIND: is STRANGER registered there"):
            list(find(stranger, Query()))


def test_an_orthanc_that_ends_searches_at_a_limit_loses_nothing(tmp_path: Path) -> None:
    limits = {"LimitFindResults": 5, "LimitFindInstances": 5}
    many, series = studies.uid(), [studies.uid() for _ in range(8)]
    files = [
        studies.encoded(
            studies.dataset(
                study=many, series=one, AccessionNumber="MANY", InstanceNumber=number, SeriesNumber=series.index(one)
            )
        )
        for one in series
        for number in range(8 if one == series[0] else 1)
    ]
    numbers = [f"L{day:02}" for day in range(1, 14)]
    files += [studies.encoded(studies.dataset(AccessionNumber=one, StudyDate=f"202401{one[1:]}")) for one in numbers]
    with orthanc(tmp_path / "orthanc", settings=limits) as server:
        store(tmp_path, files, server.dicom_port, server.aet)
        target = dicom_target(server.dicom_port, aet_target=server.aet, direction="query", idle_timeout_s=30)

        def found(**keys: Any) -> list[Any]:
            return sorted(one.attributes["AccessionNumber"] for one in find(target, Query(**keys)))

        assert found(StudyDate="20240101-20240131") == numbers
        assert found(AccessionNumber=(*numbers, "MANY", "NONE")) == [*numbers, "MANY"]
        assert found(StudyInstanceUID=many, level="series") == ["MANY"] * 8
        receipt = retrieve(target, Query(AccessionNumber=("MANY",)), tmp_path / "in", PushReport())
        assert receipt.state is State.DELIVERED, receipt.notes
        assert len(datasets(tmp_path / "in")) == 15
        # Its DICOMweb has pages, which end at the limit without a word.
        web = dicomweb_target(
            server.dicomweb_url, http_user=server.user, http_password=server.password, direction="query"
        )
        listed = list(dicomweb.find(web, Query(StudyDate="20240101-20240131")))
        assert sorted(one.attributes["AccessionNumber"] for one in listed) == numbers
        assert len(list(dicomweb.find(web, Query(StudyInstanceUID=many, level="series")))) == 8
        receipt = dicomweb.retrieve(web, Query(StudyInstanceUID=many), tmp_path / "web", PushReport())
        assert receipt.state is State.DELIVERED, receipt.notes
        assert len(datasets(tmp_path / "web")) == 15
        with pytest.raises(Misconfigured, match="and may have more"):
            list(dicomweb.find(web, Query(PatientName="*")))
        assert "Too many results" in server.log()  # so that these were limits


def test_names_that_orthanc_shows_without_some_letters_are_found(tmp_path: Path) -> None:
    """It leaves out what Latin-1 doesn't have, unless it is told to answer otherwise."""
    server = shared_orthanc()
    letters.fill(server)
    target = dicom_target(server.dicom_port, aet_target=server.aet, direction="query")
    assert letters.wrong(lambda query: find(target, query)) == {}
    job = letters.searched(target, tmp_path)
    assert sorted(one.accession for one in job.studies.values()) == sorted(["0", letters.NUMBER, "7"])
    assert job.missing == ["x"]
    [match] = find(target, Query(PatientName="Павлов^Иван"))
    assert match.to_json()["note"] == (
        "the peer matches PatientName, and shows it in ISO_IR 100, without the other letters"
    )
    [match] = find(target, Query(PatientName="Doe^Jane"))
    assert "note" not in match.to_json()


def test_the_query_scp_of_pynetdicom(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    files = study(4, 2)
    with qrscp(tmp_path / "qr", peers={AET: port}) as server:
        store(tmp_path, files, server.port, server.aet)
        target = dicom_target(server.port, aet_target=server.aet, direction="query")
        for query in (Query(AccessionNumber=(studies.ACCESSION,)), Query(StudyDate=studies.STUDY_DATE), Query()):
            assert len(list(find(target, query))) == 1
        assert len(list(find(target, Query(level="series")))) == 2
        assert not list(find(target, Query(PatientID="nobody")))
        for way in ("get", "move"):
            with monkeypatch.context() as patch:
                if way == "move":  # it grants C-GET
                    patch.setattr(Retriever, "stores", property(lambda one: False))
                receipt = retrieve(target, Query(AccessionNumber=(studies.ACCESSION,)), tmp_path / way, PushReport())
            assert receipt.state is State.DELIVERED, receipt
            assert ("C-MOVE" in receipt.notes[0]) == (way == "move")
            assert set(datasets(tmp_path / way)) == {Held.of(data).uid for data in files}


def test_c_move_over_tls(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer comes back with TLS as well, and gets our certificate."""
    made = certificates()
    server = shared_orthanc(made.server, made.ca)
    modality = {"AET": AET, "Host": "127.0.0.1", "Port": port, "UseDicomTls": True}
    server.request("PUT", "/modalities/receiver", json.dumps(modality).encode())
    studies.ct(tmp_path / "study", 3)
    target = tls_target(server.dicom_port, aet_target=server.aet, direction="both")
    assert attempt(target, tmp_path / "study").require().state is State.DELIVERED
    monkeypatch.setattr(Retriever, "stores", property(lambda one: False))  # it grants C-GET
    receipt = retrieve(target, Query(AccessionNumber=(studies.ACCESSION,)), tmp_path / "in", PushReport())
    assert receipt.state is State.DELIVERED, receipt
    assert "C-MOVE" in receipt.notes[0]
    assert set(datasets(tmp_path / "in")) == server.uids()


# ---- killed in the middle

CHILD = """
import sys
from pathlib import Path
from imaging.query import Query
from talaria.testing.harness import attempt
from tasks import dicomweb
from tasks.dicom import find, retrieve
from tests.targets.dicom import dicom_target
from transfer.receipt import PushReport
what, port, folder = sys.argv[1:]
target = dicom_target(int(port), aet_target="ARCHIVE", direction="both", idle_timeout_s=60)
if what == "find":
    list(find(target, Query()))
else:
    retrieve(target, Query(), Path(folder), PushReport())
"""


@pytest.mark.parametrize("phase", ["find", "get"])
def test_a_killed_retrieval_leaves_nothing_half_and_goes_on(phase: str, tmp_path: Path) -> None:
    here = threading.Event()

    def refuses(request: Request) -> int:
        if phase == "find" and not here.is_set():
            here.set()
            peer.stopped.wait(300)
        return 0

    def script(request: Request, found: list[Held]) -> Steps:
        if request.number > 1:
            return sends(found)

        def steps() -> Iterator[Any]:
            yield from (Send(found[0]), Send(found[1]), Last(0xFF00, 2, 0, 0, 1))
            here.set()
            yield Silence()

        return cast(Any, steps())

    with archive(study(6, 2), on_get=script, refuses=refuses) as peer:
        what = "find" if phase == "find" else "get"
        argv = [sys.executable, "-c", CHILD, what, str(peer.port), str(tmp_path / "in")]
        child = subprocess.Popen(argv, cwd=Path(__file__).parents[2])
        try:
            assert here.wait(120)
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.wait(60)
        target = dicom_target(peer.port, aet_target=peer.aet, direction="query", idle_timeout_s=5)
        receipt = retrieve(target, Query(AccessionNumber=(studies.ACCESSION,)), tmp_path / "in", PushReport())
        assert receipt.state is State.DELIVERED
        assert_agrees(receipt, tmp_path / "in", peer)
