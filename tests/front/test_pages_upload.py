"""Uploads at a server that runs: one form without scripts; pieces that go on where they broke off; what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from talaria.front.access import Role
from talaria.testing.process import as_loaded, until
from tests.engine.material import folder, study
from tests.front.people import Person, person, words
from tests.servers.up import Talaria
from tests.transfer.test_uploads import archived
from transfer.uploads import BrowserUpload

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def place(up: Talaria, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    root = tmp_path_factory.mktemp("upload")
    up.apply(arch=folder(root / "arch"), other=folder(root / "other"))
    people = person(up, Role.OPERATOR)
    yield SimpleNamespace(up=up, root=root, operator=next(people), arch=root / "arch")
    next(people, None)


def delivered(operator: Person, leads: str, count: str) -> None:
    until(lambda: f"{count} delivered" in words(operator.get(leads)), as_loaded(120))


def test_a_form_of_files_and_an_archive_is_sent_without_scripts(place: SimpleNamespace) -> None:
    one, two, three = study("U1", series=1, each=3)
    files = [
        ("files", ("", b"", "application/octet-stream")),
        ("files", ("day/1.dcm", one, "application/dicom")),
        ("files", ("day/2.dcm", two, "application/dicom")),
        ("files", ("rest.zip", archived(**{"3.dcm": three}), "application/zip")),
    ]
    operator: Person = place.operator
    answer = operator.client.post("/talaria/upload", data={"to": ["arch", "other"], "exclude": "*.png"}, files=files)
    assert answer.status_code == 303, words(answer.text)[:400]
    delivered(operator, answer.headers["location"], "3 of 3")
    for name in ("arch", "other"):
        contents = {path.read_bytes() for path in (place.root / name).rglob("*.dcm")}
        assert contents >= {one, two, three}


@pytest.mark.parametrize(
    ("files", "to", "said"),
    [
        ([("files", ("", b""))], "arch", "Choose a folder or files"),
        ([("files", ("1.dcm", b"x"))], "", "Choose at least one target"),
        ([("files", ("../1.dcm", b"x"))], "arch", "name that can't be used"),
        ([("files", ("1.dcm", b"x")), ("files", ("1.dcm", b"y"))], "arch", "have the same name"),
        ([("files", ("1.zip", b"x"))], "arch", "can't be unpacked"),
        ([("files", ("1.dcm", b"x" * (17 << 20)))], "nobody", "no target named nobody"),  # more than fits into memory
    ],
)
def test_what_can_t_be_taken_is_said_and_nothing_is_kept(
    place: SimpleNamespace, files: list[tuple[str, tuple[str, bytes]]], to: str, said: str
) -> None:
    def kept() -> set[Path]:
        return set((place.up.home / "uploads").glob("*"))

    before = kept()
    answer = place.operator.client.post("/talaria/upload", data={"to": to}, files=files)
    assert answer.status_code in (404, 422, 502) and said in words(answer.text), words(answer.text)
    assert kept() == before


def test_an_upload_that_breaks_off_goes_on_where_it_was_and_is_sent_once(place: SimpleNamespace) -> None:
    operator: Person = place.operator
    content = study("U2", series=1, each=1, PatientComments="x" * 3_000_000)[0]
    other = study("U3", series=1, each=1)[0]
    files = [["day/a/1.dcm", len(content)], ["day/b/1.dcm", len(other)]]
    answer = operator.client.post("/talaria/uploads", json={"files": files, "to": ["arch"], "each": "folder"})
    assert answer.status_code == 201, answer.text
    one = f"/talaria/uploads/{answer.json()['id']}"

    def breaks() -> Iterator[bytes]:
        yield content[:2_000_000]
        raise ConnectionError

    with pytest.raises(ConnectionError):
        operator.client.post(f"{one}/0", content=breaks(), headers={"Upload-Offset": "0"})
    until(lambda: operator.client.get(one).json()["have"][0] > 0, as_loaded(60))
    known = operator.client.get(one).json()["have"][0]
    assert 0 < known <= 2_000_000
    wrong = operator.client.post(f"{one}/0", content=b"x", headers={"Upload-Offset": "0"})
    assert wrong.status_code == 422 and f"{known} bytes of this file are there" in wrong.json()["error"]
    early = operator.client.post(f"{one}/send")
    assert early.status_code == 422 and "2 files have not come wholly" in early.json()["error"]
    rest = operator.client.post(f"{one}/0", content=content[known:], headers={"Upload-Offset": str(known)})
    assert rest.json() == {"offset": len(content)}
    assert operator.client.post(f"{one}/1", content=other, headers={"Upload-Offset": "0"}).status_code == 200
    for stranger in person(place.up, Role.ADMIN):
        for method, path in (("GET", one), ("POST", f"{one}/send")):
            assert stranger.client.request(method, path).status_code == 404
    with BrowserUpload(place.up.home / "uploads" / answer.json()["id"], "").held():  # a first request still unpacks
        assert operator.client.post(f"{one}/send").status_code == 503
    leads = {operator.client.post(f"{one}/send").json()["location"] for _ in range(2)}
    assert len(leads) == 1
    delivered(operator, leads.pop(), "2 of 2")  # each folder was a study
    assert {content, other} <= {path.read_bytes() for path in place.arch.rglob("*.dcm")}


def test_what_could_not_be_sent_is_refused_before_anything_is_uploaded(place: SimpleNamespace) -> None:
    client: httpx.Client = place.operator.client
    for sent, status, said in (
        ({"files": [["a", 1]], "to": ["nobody"]}, 404, "no target named nobody"),
        ({"files": [["a", 1]], "to": []}, 422, "Choose at least one target"),
        ({"files": [], "to": ["arch"]}, 422, "Choose a folder or files"),
        ({"files": [["../a", 1]], "to": ["arch"]}, 422, "can't be used"),
        ({"files": [["a", -1]], "to": ["arch"]}, 422, "at most"),
        ({"files": "x", "to": ["arch"]}, 422, "not the form"),
        ([], 422, "not the form"),
    ):
        answer = client.post("/talaria/uploads", json=sent)
        assert (answer.status_code, said in answer.json()["error"]) == (status, True), answer.text
    for length, status in ((17 << 20, 404), (33 << 20, 422)):  # of the list of files
        content = b'{"files": [["a", 1]], "to": ["nobody"]}' + b" " * length
        assert client.post("/talaria/uploads", content=content).status_code == status
