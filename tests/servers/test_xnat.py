"""The stand-in for XNAT: pyxnat and xnatpy, unchanged, work with it, and it refuses what XNAT refuses."""

from __future__ import annotations

import io
import logging
import socket
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
import pyxnat
import requests
import xnat as xnatpy

from talaria.testing import studies
from tests.servers.xnat import Xnat, xnat

IMPORT = "/data/services/import"
BASICS = {"import-handler": "DICOM-zip", "project": "P", "subject": "S", "session": "E"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Xnat]:
    with xnat(tmp_path / "xnat") as running:
        yield running


def zipped(*files: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as out:
        for number, data in enumerate(files):
            out.writestr(f"{number}.dcm", data)
    return buffer.getvalue()


def post(server: Xnat, data: bytes | None = None, kind: str = "application/zip", **more: Any) -> requests.Response:
    headers = more.pop("headers", {"Content-Type": kind})
    params = BASICS | more.pop("params", {})
    return requests.post(
        server.url + IMPORT, data=data, params=params, headers=headers, auth=("lab", "lab"), timeout=30, **more
    )


def words(answer: requests.Response) -> str:
    return answer.text.partition("<h3>")[2].partition("</h3>")[0]


# ---- the two clients


def test_pyxnat_logs_in_lists_uploads_and_reads(server: Xnat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It would import pandas and nibabel, for methods that nobody calls here.
    monkeypatch.setattr("pyxnat.core.interfaces.__find_all_functions__", lambda modules: {})
    files = studies.ct(tmp_path / "study", 3)
    archive = tmp_path / "up.zip"
    archive.write_bytes(zipped(*(path.read_bytes() for path in files)))
    client = pyxnat.Interface(server.url, user="lab", password="lab")
    assert client.select.projects().get() == ["P"]
    assert client.version() == {"version": "1.8.10", "buildNumber": "1"}
    assert client.select.project("P").exists()
    assert not client.select.project("Q").exists()
    with archive.open("rb") as stream:
        answer = client.post(
            IMPORT,
            params=BASICS | {"dest": "/archive/projects/P"},
            files={"file": ("up.zip", stream, "application/zip")},
        )
    assert (answer.status_code, answer.text) == (200, "/data/archive/projects/P/subjects/S/experiments/E\r\n")
    session = client.select.project("P").subject("S").experiment("E")
    assert session.exists()
    assert session.scans().get() == ["1"]
    dicom = session.scan("1").resource("DICOM")
    assert dicom.files().get() == ["0.dcm", "1.dcm", "2.dcm"]
    copy = dicom.file("1.dcm").get(str(tmp_path / "copy.dcm"))
    assert Path(copy).read_bytes() == files[1].read_bytes()
    assert server.store.logins
    client.disconnect()
    assert not server.store.logins


def test_xnatpy_logs_in_lists_uploads_and_reads(server: Xnat, tmp_path: Path) -> None:
    files = studies.ct(tmp_path / "study", 3)
    archive = tmp_path / "up.zip"
    archive.write_bytes(zipped(*(path.read_bytes() for path in files)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its generated module
        client = xnatpy.connect(server.url, user="lab", password="lab", loglevel=logging.ERROR)
    try:
        assert [one.id for one in client.projects.values()] == ["P"]
        made = client.services.import_(archive, project="P", subject="S", experiment="E", destination="/archive")
        assert (made.label, made.uid) == ("E", pydicom.dcmread(files[0]).StudyInstanceUID)
        scan = made.scans[0]
        assert scan.uid == pydicom.dcmread(files[0]).SeriesInstanceUID
        assert sorted(one.id for one in scan.files.values()) == ["0.dcm", "1.dcm", "2.dcm"]
        assert client.projects["P"].experiments["E"].uid == made.uid
        held = client.services.import_(archive, project="P", subject="S", experiment="F", destination="/prearchive")
        assert held.status == "READY"
        assert len(held.scans[0].files) == 3
        assert held.archive().label == "F"
    finally:
        client.disconnect()
    assert not server.store.prearchive
    assert not server.store.logins


# ---- logins


def test_without_login_401_or_the_login_page(server: Xnat) -> None:
    url = server.url + "/data/projects"
    answer = requests.get(url, timeout=60)
    assert (answer.status_code, answer.headers["WWW-Authenticate"][:5]) == (401, "Basic")
    answer = requests.get(url, headers={"User-Agent": "Mozilla/5.0"}, timeout=60)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/html")


def test_alias_tokens_log_in(server: Xnat) -> None:
    token = requests.get(server.url + "/data/services/tokens/issue", auth=("lab", "lab"), timeout=60).json()
    alias = (token["alias"], token["secret"])
    assert requests.get(server.url + "/data/auth", auth=alias, timeout=60).text == "User 'lab' is logged in"
    requests.get(f"{server.url}/data/services/tokens/invalidate/{alias[0]}/{alias[1]}", auth=("lab", "lab"), timeout=60)
    assert requests.get(server.url + "/data/auth", auth=alias, timeout=60).status_code == 401


def test_sessions_expire(server: Xnat) -> None:
    with requests.Session() as session:
        first = session.get(server.url + "/data/JSESSION", auth=("lab", "lab"), timeout=60).text
        assert session.get(server.url + "/data/JSESSION", timeout=60).text == first
        server.server.session_s = -1
        assert session.get(server.url + "/data/JSESSION", timeout=60).status_code == 401
    with requests.Session() as session:
        server.server.session_s = 900
        csrf = session.get(server.url + "/data/JSESSION?CSRF=true", auth=("lab", "lab"), timeout=60).text
        assert "; XNAT_CSRF=" in csrf
        session.delete(server.url + "/data/JSESSION", timeout=60)
        assert session.get(server.url + "/data/auth", timeout=60).status_code == 401


def test_projects_by_permission(server: Xnat) -> None:
    server.store.add_user("reader", "r")
    server.store.add_project("Q", reader="collaborator")
    url = server.url + "/data/projects"
    found = requests.get(url, auth=("reader", "r"), timeout=60).json()["ResultSet"]["Result"]
    assert [row["ID"] for row in found] == ["Q"]
    query = {"permissions": "create", "dataType": "xnat:subjectData"}
    found = requests.get(url, auth=("reader", "r"), params=query, timeout=60).json()
    assert found["ResultSet"]["Result"] == []
    assert requests.get(url + "/P", auth=("reader", "r"), timeout=60).status_code == 404


# ---- the import service's refusals


@pytest.mark.parametrize(
    ("params", "status", "said"),
    [
        ({"import-handler": "nope"}, 404, "Unknown importer implementation specified: nope"),
        ({"colour": "red"}, 400, "Unknown parameter: colour"),
        ({"dest": "/elsewhere"}, 400, "Parameter dest format error"),
        ({"prearchive_code": "1", "overwrite": "append"}, 400, "Overwrite flag was not set"),
    ],
)
def test_import_refuses_parameters(server: Xnat, params: dict[str, str], status: int, said: str) -> None:
    answer = post(server, zipped(studies.ct_bytes()), params=params)
    assert (answer.status_code, words(answer)[: len(said)]) == (status, said)
    assert not server.names()


def test_import_takes_one_file_by_post_only(server: Xnat) -> None:
    data = zipped(studies.ct_bytes())
    assert requests.get(server.url + IMPORT, auth=("lab", "lab"), timeout=60).status_code == 405
    assert words(post(server, b"")) == "Unable to identify upload format."
    assert words(post(server, data, kind="text/plain")) == "Unable to identify upload format."
    two = {"a": ("a.zip", data, "application/zip"), "b": ("b.zip", data, "application/zip")}
    answer = post(server, headers={}, files=two)
    assert words(answer) == "Importer is limited to one uploaded resource at a time."
    assert post(server, headers={}, files={"a": ("a.zip", data)}, params={"inbody": "true"}).status_code == 406
    assert words(post(server, headers={}, files={"a": ("a.rar", data)})) == "Unsupported format UNKNOWN"
    in_pieces = iter([studies.ct_bytes()])
    assert post(server, in_pieces, kind="application/dicom").status_code == 400  # type: ignore[arg-type]
    assert post(server, iter([data[:100], data[100:]])).status_code == 200  # type: ignore[arg-type]


def test_import_forms_carry_parameters(server: Xnat) -> None:
    form = {"dest": "/archive/projects/P", "session": "FROM_FORM"}
    answer = post(server, form, headers={}, files={"a": ("a.zip", zipped(studies.ct_bytes()))})  # type: ignore[arg-type]
    assert answer.text == "/data/archive/projects/P/subjects/S/experiments/FROM_FORM\r\n"


def test_import_refuses_stored_entries_with_a_descriptor(server: Xnat) -> None:
    data = studies.ct_bytes()
    head = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 8, 0, 0, 0x21, 0, 0, 0, 5, 0) + b"0.dcm"
    answer = post(server, head + data + struct.pack("<IIII", 0x08074B50, zlib.crc32(data), len(data), len(data)))
    assert (answer.status_code, words(answer)) == (400, "unable to read data from file")
    assert post(server, zipped(data, method=zipfile.ZIP_DEFLATED)).status_code == 200
    damaged = zipped(data)
    assert post(server, damaged[:2000] + bytes([damaged[2000] ^ 1]) + damaged[2001:]).status_code == 400


def test_import_without_destination_is_receiving(server: Xnat) -> None:
    answer = post(server, zipped(studies.ct_bytes()))
    [entry] = server.store.prearchive
    assert entry.status == "RECEIVING"
    assert answer.text == f"/data/prearchive/projects/P/{entry.timestamp}/E\r\n"
    assert answer.headers["Content-Type"] == "text/uri-list"
    commit = requests.post(server.url + answer.text.strip() + "?action=commit", auth=("lab", "lab"), timeout=60)
    assert (commit.status_code, entry.status) == (200, "READY")


def test_import_of_two_studies_makes_two(server: Xnat) -> None:
    a, b = studies.ct_bytes(), studies.ct_bytes()
    answer = post(server, zipped(a, b), params={"dest": "/prearchive/projects/P"})
    assert len(answer.text.split()) == len(server.store.prearchive) == 2
    answer = post(server, zipped(a, b), params={"import-handler": "SI", "dest": "/archive/projects/P"})
    assert (answer.status_code, words(answer)) == (400, "Upload included files for multiple imaging sessions.")
    assert post(server, zipped()).text == ""


def test_import_to_a_foreign_project_is_no_error(server: Xnat) -> None:
    answer = post(server, zipped(studies.ct_bytes()), params={"dest": "/archive/projects/NOPE", "project": "NOPE"})
    assert answer.status_code == 200
    assert answer.text.startswith("/data/prearchive/projects/null/")


def test_import_of_other_files(server: Xnat) -> None:
    """What can't be read is an error without a commit, else it is left out."""
    whole = zipped(studies.ct_bytes(), b"no DICOM" * 100)
    answer = post(server, whole)
    assert (answer.status_code, words(answer)) == (400, "unable to read DICOM object 1.dcm")
    [entry] = server.store.prearchive
    assert (entry.status, len(entry.received)) == ("RECEIVING", 1), "what came before stays"
    answer = post(server, whole, params={"dest": "/archive/projects/P"})
    assert answer.status_code == 200
    assert len(server.instances()) == 1
    assert post(server, zipped(b"no DICOM" * 100), params={"dest": "/archive/projects/P"}).status_code == 400


def test_import_cut_short_leaves_what_came(server: Xnat) -> None:
    study = studies.uid(56)
    data = zipped(*(studies.ct_bytes(study=study) for _ in range(3)))
    head = (
        "POST /data/services/import?import-handler=DICOM-zip&dest=/archive/projects/P&project=P&session=E HTTP/1.1\r\n"
        "Host: x\r\nAuthorization: Basic bGFiOmxhYg==\r\nContent-Type: application/zip\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as link:
        link.sendall(head.encode() + data[:15_000])
    for _ in range(100):
        if server.store.prearchive and len(server.store.prearchive[0].received) == 2:
            break
        time.sleep(0.02)
    [entry] = server.store.prearchive
    assert (entry.status, len(entry.received)) == ("RECEIVING", 2)
    assert not server.instances()


# ---- archiving


def archive(
    server: Xnat, *files: bytes, overwrite: str = "", session: str = "E", subject: str = "S"
) -> requests.Response:
    params = {"dest": "/archive/projects/P", "session": session, "subject": subject}
    return post(server, zipped(*files), params=params | ({"overwrite": overwrite} if overwrite else {}))


def test_overwrite_none_append_delete(server: Xnat) -> None:
    study, series = studies.uid(56), studies.uid(56)
    first, second = (studies.ct_bytes(study=study, series=series) for _ in range(2))
    assert archive(server, first).status_code == 200
    answer = archive(server, second, overwrite="none")
    assert (answer.status_code, words(answer)) == (400, "unable to archive for the Prearchive session")
    [entry] = server.store.prearchive
    assert entry.status == "CONFLICT"
    log = requests.get(f"{server.url}/data{entry.url}/logs/last", auth=("lab", "lab"), timeout=60).json()
    assert log["ResultSet"]["Result"][0]["entry"] == "Session already exists, retry with overwrite enabled"
    server.store.prearchive.clear()
    # Appended: another file of the same scan is added, the same file is a conflict.
    by_series = studies.ct_bytes(study=study)
    assert archive(server, by_series, overwrite="append").status_code == 200
    assert len(server.instances()) == 2
    assert archive(server, by_series, overwrite="append").status_code == 400
    server.store.prearchive.clear()
    assert archive(server, by_series, overwrite="delete").status_code == 200
    assert len(server.instances()) == 2
    # Another study never gets in, but by force.
    assert archive(server, studies.ct_bytes(), overwrite="append").status_code == 400
    assert server.store.prearchive[0].logs[-1].startswith("Invalid modification of session UID")
    server.store.prearchive.clear()
    assert archive(server, studies.ct_bytes(), overwrite="delete").status_code == 200
    # The label belongs to one subject.
    assert archive(server, studies.ct_bytes(study=study), overwrite="append", subject="T").status_code == 400
    assert "Already Exists for another Subject" in server.store.prearchive[0].logs[-1]


def test_archive_service(server: Xnat) -> None:
    post(server, zipped(studies.ct_bytes()), params={"dest": "/prearchive/projects/P"})
    [entry] = server.store.prearchive
    url = server.url + "/data/services/archive"
    answer = requests.post(url, params={"src": entry.url}, auth=("lab", "lab"), timeout=60)
    assert answer.text == "/data/archive/projects/P/subjects/S/experiments/E\r\n"
    assert requests.post(url, params={"src": entry.url}, auth=("lab", "lab"), timeout=60).status_code == 404


def test_prearchive_by_tag_is_for_administrators(server: Xnat) -> None:
    post(server, zipped(studies.ct_bytes()))
    server.store.add_user("root", "root", admin=True)
    url = f"{server.url}/data/prearchive?tag={server.store.prearchive[0].tag}"
    assert requests.get(url, auth=("lab", "lab"), timeout=60).status_code == 403
    assert requests.get(url, auth=("root", "root"), timeout=60).json()["ResultSet"]["totalRecords"] == "1"
    entry = f"{server.url}/data{server.store.prearchive[0].url}"
    assert (
        requests.get(entry, auth=("lab", "lab"), timeout=60).json()["ResultSet"]["Result"][0]["status"] == "RECEIVING"
    )
    assert requests.post(entry, params={"action": "sing"}, auth=("lab", "lab"), timeout=60).status_code == 400
    assert requests.delete(entry, auth=("lab", "lab"), timeout=60).status_code == 200
    assert requests.get(entry, auth=("lab", "lab"), timeout=60).status_code == 404
