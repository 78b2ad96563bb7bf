"""The Query page at a server that runs, without scripts: asked, picked, fetched; and nothing of a patient elsewhere."""

from __future__ import annotations

import csv
import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from talaria.front.access import Role
from talaria.testing.process import as_loaded, until
from tests.engine.material import folder, placed, source, study
from tests.front.people import Person, fields, person, words
from tests.servers.qr import GET, Instance, Request, Steps, archive, sends
from tests.servers.up import Talaria

pytestmark = pytest.mark.timeout(600)
XSS = '<img src=x onerror="alert(1)">'
NAME = "DOE^QUERY"


@pytest.fixture(scope="module")
def place(up: Talaria, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server, an archive that it may query, and somebody of each role."""
    root = tmp_path_factory.mktemp("query")
    data = {f"0{n}": study(f"0{n}", PatientName=NAME, PatientID="P-77", StudyDescription="Thorax") for n in range(1, 4)}
    data["twice"] = study("04", StudyDescription=XSS) + study("04")
    files = [one for each in data.values() for one in each]
    with archive(files) as peer:
        up.apply(src=source(peer), arch=folder(root / "arch"))
        people = {role: person(up, role) for role in (Role.VIEWER, Role.OPERATOR)}
        viewer, operator = (next(one) for one in people.values())
        yield SimpleNamespace(up=up, peer=peer, data=data, root=root, viewer=viewer, operator=operator)
        for one in people.values():
            next(one, None)


def asked(operator: Person, **keys: str) -> tuple[str, str]:
    """Search; return the address of what was found, and its page."""
    form = operator.form("/talaria/query") | {"source": "src", "do": "search", **keys}
    leads = operator.post("/talaria/query", form)
    until(lambda: "Asking" not in words(operator.get(leads)), as_loaded(60))
    return leads, operator.get(leads)


def ended(operator: Person, leads: str) -> str:
    until(lambda: 'hx-get="/talaria/retrievals/' not in operator.get(leads), as_loaded(120))
    return operator.get(leads)


def test_studies_are_found_picked_and_fetched_to_a_target(place: SimpleNamespace) -> None:
    operator: Person = place.operator
    leads, page = asked(operator, accessions="01\n02; 0404\n04")
    assert "Found: 4" in words(page) and "Not found: 0404" in words(page)
    assert "Several studies have the number 04" in words(page)
    assert NAME in words(page) and "P-77" in words(page) and "Thorax" in words(page)
    # Only what is surely meant is picked beforehand; what a peer says is text.
    assert page.count('name="pick"') == 4 and page.count(" checked") == 2
    assert XSS not in page and "&lt;img" in page
    assert operator.client.get(leads).headers["cache-control"] == "no-store"

    form = fields(page)
    first = next(at for at in range(4) if f'value="{at}" checked' in page)
    fetch = {**form, "pick": str(first), "to": "arch", "do": "picked"}
    job = operator.post(leads, fetch)
    assert operator.post(leads, fetch) == job  # a double click fetches once
    page = ended(operator, job)
    run = job.rpartition("/")[2].partition("?")[0]
    assert f">{run[:13]}</a>" in operator.get("/talaria/query")  # its beginning, which every command takes
    assert "Delivered: 1" in words(page) and "All: 1" in words(page)
    assert NAME not in page and "P-77" not in page
    rows = list(csv.DictReader(operator.get(f"{job}/csv").splitlines()))
    assert [(one["accession"], one["state"], one["instances"]) for one in rows] == [("01", "delivered", "4")]
    wanted = {Instance.of(one).uid for one in place.data["01"]}
    assert {path.stem for path in (place.root / "arch").rglob("*.dcm")} == wanted
    page = operator.get("/talaria/query")
    assert job in page and "Only in the off-peak hours (22:00-06:00 UTC)" in words(page)


def test_single_series_are_picked_and_brought_to_a_folder(place: SimpleNamespace) -> None:
    operator: Person = place.operator
    leads, page = asked(operator, accessions="03")
    leads = operator.post(leads, {"pick": "0", "do": "series"})
    until(lambda: "Asking" not in words(operator.get(leads)), as_loaded(60))
    page = operator.get(leads)
    assert "Found: 2" in words(page) and "Show series" not in words(page)
    into = place.root / "into"
    browsed = operator.post(leads, {**fields(page), "pick": "1", "open": str(place.root)}, 200)
    assert f'value="{place.root}/arch"' in browsed and 'value="1" checked' in browsed
    job = operator.post(leads, {**fields(page), "pick": "1", "into": str(into), "do": "picked"})
    ended(operator, job)
    found = placed(into)
    assert found.keys() == {"03"} and len(found["03"]) == 2
    assert str(into) in operator.get(job)


def test_a_list_is_uploaded_and_fetched_without_looking_then_retried(place: SimpleNamespace) -> None:
    operator: Person = place.operator
    form = operator.form("/talaria/query") | {"source": "src", "to": "arch", "do": "fetch", "accessions": "02"}
    listed = {
        "list": ("list.csv", "\ufeffAccession Number,Ward\r\n03,A\r\nNOPE,A\r\n02\uff0c03,B\r\n".encode(), "text/csv")
    }
    answer = operator.client.post("/talaria/query", data=form, files=listed)
    assert answer.status_code == 303, words(answer.text)[:400]
    job = answer.headers["location"]
    page = ended(operator, job)
    assert "Delivered: 2" in words(page) and "Missing: 2" in words(page)  # what is one number stays one
    # Its page and the list say with one word how it stands.
    assert "Partial · Retrieval" in words(page)

    def listed_as() -> str:
        return next((words(one) for one in operator.get("/talaria/query").split("<tr>") if job in one), "")

    until(lambda: listed_as().startswith("Partial"), as_loaded(60))
    assert "2 studies found, 2 delivered, 2 missing" in listed_as()
    assert "NOPE" in operator.get(f"{job}?state=missing") and "NOPE" not in operator.get(f"{job}?state=delivered")
    for answer in (operator.client.get(job), operator.client.get(f"{job}/csv")):
        assert answer.headers["cache-control"] == "no-store"
    assert "is not paused" in words(operator.post(f"{job}/resume", {}, 409))
    # Somebody says at Prefect that it is complete: NOPE is missing all the same.
    state = {"state": {"type": "COMPLETED", "name": "Completed"}, "force": True}
    place.up.as_worker("POST", f"/flow_runs/{job.rpartition('/')[2]}/set_state", state)
    assert "Partial · Retrieval" in words(operator.get(job))
    assert operator.post(f"{job}/retry", {}) == job


def test_a_retrieval_is_paused_resumed_cancelled_and_retried_by_its_page(
    place: SimpleNamespace, tmp_path: Path
) -> None:
    operator: Person = place.operator
    permits = threading.Semaphore(1)  # of a peer that sends a series for each

    def script(request: Request, found: list[Instance]) -> Steps:
        permits.acquire(timeout=as_loaded(120))
        return sends(found)

    with archive(study("P1", series=9, each=1), on_get=script) as peer:
        place.up.apply(slow=source(peer, concurrency=1))
        form = operator.form("/talaria/query") | {"source": "slow", "accessions": "P1", "into": str(tmp_path / "in")}
        job = operator.post("/talaria/query", {**form, "do": "fetch"})

        def buttons() -> set[str]:
            return set(re.findall(rf"{job}/(\w+)", operator.get(job))) - {"csv"}

        until(lambda: len(peer.asked(GET)) > 1, as_loaded(120))
        assert buttons() == {"pause", "cancel"}
        operator.post(f"{job}/pause", {})
        permits.release()
        until(lambda: buttons() == {"resume", "cancel"}, as_loaded(120))
        got = len(peer.asked(GET))
        assert got < 9 and "Paused" in words(operator.get(job))
        (row,) = csv.DictReader(operator.get(f"{job}/csv").splitlines())
        assert (row["accession"], row["state"]) == ("P1", "waiting")
        operator.post(f"{job}/resume", {})
        until(lambda: len(peer.asked(GET)) > got, as_loaded(120))
        operator.post(f"{job}/cancel", {})
        until(lambda: buttons() == {"retry"}, as_loaded(120))
        assert len(peer.asked(GET)) < 9 and "Cancelled: 1" in words(operator.get(job))
        assert "1 study found, 0 delivered, 1 cancelled" in words(operator.get(job))
        (row,) = csv.DictReader(operator.get(f"{job}/csv").splitlines())
        assert (row["accession"], row["state"]) == ("P1", "cancelled")
        permits.release(100)
        operator.post(f"{job}/retry", {})
        until(lambda: "Delivered: 1" in words(operator.get(job)), as_loaded(120))
        assert len(placed(tmp_path / "in")["P1"]) == 9


def test_a_retrieval_waits_for_the_quiet_hours(place: SimpleNamespace, tmp_path: Path) -> None:
    operator: Person = place.operator
    form = operator.form("/talaria/query") | {"source": "src", "accessions": "01", "into": str(tmp_path / "in")}
    job = operator.post("/talaria/query", {**form, "do": "fetch", "off_peak": "true"})
    assert place.up.run(job.rpartition("/")[2])["work_queue_name"].endswith("offpeak")
    operator.post(f"{job}/cancel", {})


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        ({}, 422, "Say what to look for"),
        ({"accessions": "01", "do": "fetch"}, 422, "Say where to bring it"),
        ({"accessions": "1.2E+11"}, 422, "format that column as text"),
        ({"accessions": "A1\t19700101\tDoe"}, 422, "give the column of accession numbers alone"),
        ({"accessions": "01", "do": "fetch", "into": "relative"}, 422, "absolute path"),
        ({"accessions": "01", "do": "fetch", "to": "arch", "studies_per_hour": "-1"}, 422, "give a number"),
        ({"accessions": "01", "source": "arch"}, 303, ""),
        ({"accessions": "01", "source": "nobody"}, 303, ""),
    ],
)
def test_what_can_t_be_meant_is_refused_and_nothing_typed_is_lost(
    place: SimpleNamespace, more: dict[str, str], status: int, said: str
) -> None:
    operator: Person = place.operator
    form = {"source": "src", "do": "search", "patient_name": "", "modality": "CT", **more}
    if "accessions" not in more:
        form["modality"] = ""
    page = operator.post("/talaria/query", form, status)
    if status == 303:
        until(lambda: "could not be asked" in words(operator.get(page)), as_loaded(60))
        return
    assert said in words(page)
    assert fields(page)["accessions"] == more.get("accessions", "") and fields(page)["modality"] == form["modality"]


def test_nobody_else_sees_what_was_found_and_no_patient_is_written_down(place: SimpleNamespace) -> None:
    operator: Person = place.operator
    leads, page = asked(operator, patient_name=NAME, patient_id="P-77")
    assert "Found: 3" in words(page)
    assert fields(operator.get(f"/talaria/query?again={leads.rpartition('/')[2]}"))["patient_name"] == NAME
    rows = list(csv.DictReader(operator.get(f"{leads}/csv").splitlines()))
    assert {one["PatientID"] for one in rows} == {"P-77"} and all(one["StudyInstanceUID"] for one in rows)
    for other in person(place.up, Role.ADMIN):
        other.get(leads, 404)
        other.get(f"{leads}/csv", 404)
    for path in ("/talaria/query", leads, "/talaria/retrievals/x"):
        place.viewer.get(path, 403)
    assert "Query" not in words(place.viewer.get("/talaria/"))
    # os.walk passes over folders that go while it looks.
    written = [Path(where, name) for where, _, names in os.walk(place.up.home) for name in names]
    assert len(written) > 10
    for path in [place.up.log, *(one for one in written if one.suffix != ".dcm")]:
        with suppress(FileNotFoundError):  # replaced by another one meanwhile
            content = path.read_bytes()
            assert NAME.encode() not in content and b"P-77" not in content, path
