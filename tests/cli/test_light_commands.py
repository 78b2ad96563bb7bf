"""Commands are clients of the API where one answers: they load nothing, and have the same words and exit codes."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from talaria import __version__
from talaria.cli import remote
from talaria.cli.kinds import types_of
from tests.servers.api import SECRET, Api, api, events
from tests.servers.certificates import Authority

HEAVY = (
    *("prefect", "pydantic", "rich", "pydicom", "httpx", "fastapi", "starlette", "sqlalchemy", "pydantic_settings"),
    *("requests", "numpy", "pynetdicom", "boto3", "botocore", "paramiko", "pyxnat", "dicomweb_client"),
    *("blocks", "tasks", "flows", "protocols"),
    *("talaria.service", "talaria.engine", "talaria.front", "talaria.settings"),
)
SCRIPT = f"""
import sys
from talaria.__main__ import main
try:
    main()
finally:
    print("loaded:", *[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
RUN = "3f2a0000-0000-4000-8000-000000000001"
RECEIPT = {"state": "delivered", "delivered": 1, "warnings": 0, "already": 0, "rejected": 0, "skipped": 0, "unsent": 0,
           "bytes": 7, "seconds": 0.1, "attempts": 1, "verified": "accepted", "hook": "none", "error": None,
           "notes": [], "items": []}  # fmt: skip
DONE = {"dispatch_id": "d1", "flow_run_id": RUN, "state": "delivered", "targets": {"pacs": RECEIPT}}
LINE = {"id": RUN, "state": "Completed", "kind": "dispatch", "source": "", "dispatch_id": "d1", "targets": ["pacs"],
        "paths": [], "begun": None, "ended": None, "runs": 1, "message": None}  # fmt: skip
PART = {"items": 1, "done": 1, "bytes": 7, "moved": 7, "percent": 100.0, "rate": 7.0, "seconds_left": 0.0,
        "words": "1 of 1 items to pacs", "failures": ["attempt 1 of 3 failed: gone"]}  # fmt: skip
TARGET = {"name": "pacs", "type": "dicom", "direction": "store", "enabled": True, "broken": None, "last_check": None}
FOUND = {"matches": [{"StudyInstanceUID": "1.2", "instances": 1}]}
SEND = {
    ("POST", "/dispatches"): [(201, {**DONE, "state": "waiting", "run": LINE})],
    ("GET", f"/jobs/{RUN}/events"): [
        (200, events(("state", LINE), ("progress", {"targets": {"pacs": PART}}), ("result", DONE)))
    ],
}


def run(one: Api, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, *arguments],
        env={**one.env, **env},
        capture_output=True,
        text=True,
        cwd=one.home.parent,
        check=False,
    )


def words(ran: subprocess.CompletedProcess[str]) -> list[str]:
    """What a command said, without the line that this test adds."""
    *said, loaded = ran.stderr.strip().splitlines()
    assert loaded == "loaded:", loaded
    return said


@pytest.mark.parametrize(
    ("arguments", "answers", "code"),
    [
        (["target", "list"], {("GET", "/targets"): [(200, {"targets": [TARGET]})]}, 0),
        (["target", "list", "--json"], {("GET", "/targets"): [(200, {"targets": [TARGET]})]}, 0),
        (["target", "show", "pacs"], {("GET", "/targets/pacs"): [(200, TARGET)]}, 0),
        (["target", "apply", "targets.yaml"], {("POST", "/targets"): [(200, {"dry_run": False, "targets": []})]}, 0),
        (["target", "types"], {("GET", "/target-types"): [(200, {"types": {}, "refused": {}})]}, 0),
        (
            ["target", "test", "pacs"],
            {("POST", "/target-tests"): [(200, events(("result", {"name": "pacs", "ok": False, "probes": []})))]},
            1,
        ),
        (["send", "study", "--to", "pacs", "--json"], SEND, 0),
        (["send", "study", "--to", "pacs"], SEND, 0),
        (["jobs", "list"], {("GET", "/jobs"): [(200, {"jobs": [LINE]})]}, 0),
        (["jobs", "show", "3f2a"], {("GET", "/jobs/3f2a"): [(200, {**DONE, "run": LINE, "progress": {}})]}, 0),
        (["query", "pacs", "--accession", "A"], {("POST", "/matches"): [(200, {"matches": []})]}, 1),
        (["query", "pacs", "--accession", "A"], {("POST", "/matches"): [(200, {**FOUND, "unread": None})]}, 0),
        (
            ["query", "pacs", "--accession", "A"],
            {("POST", "/matches"): [(200, {**FOUND, "unread": "one can't be"})]},
            1,
        ),
        (
            ["retrieve", "pacs", "--accession-file", "list.csv", "--to", "x", "--no-wait", "--json"],
            {("POST", "/retrievals"): [(201, {"flow_run_id": RUN, "run": LINE})]},
            0,
        ),
        (
            ["status"],
            {
                ("GET", "/status"): [
                    (200, {"server": {"ok": True, "url": "u"}, "workers": [], "queues": {}, "targets": []})
                ]
            },
            0,
        ),
    ],
)
def test_commands_load_nothing_heavy(
    arguments: list[str], answers: dict[tuple[str, str], list[tuple[int, Any]]], code: int, tmp_path: Path
) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "list.csv").write_text("A1\n")
    (tmp_path / "targets.yaml").write_text("targets: {a: {type: folder, folder: /x}}")
    with api(tmp_path / "home", {key: list(value) for key, value in answers.items()}) as one:
        ran = run(one, *arguments)
        assert ran.returncode == code, ran.stderr
        words(ran)
        assert all(asked.headers["Authorization"] == f"Bearer {SECRET}" for asked in one.asked)
        if "--json" in arguments:
            json.loads(ran.stdout)


@pytest.mark.parametrize("has_run", [False, True])
def test_prune_loads_neither_prefect_nor_a_driver(tmp_path: Path, has_run: bool) -> None:
    """It works on this machine's state directory without a server: its database says which runs have not ended."""
    home = tmp_path / "home"
    old, new = (home / "receipts" / f"{name}.json" for name in ("old", "new"))
    rests = home / "receipts" / f"{RUN}.json"
    waiting, orphan = home / "waiting" / "old.json", home / "staging" / "gone" / "1.dcm"
    index = home / "indexes" / f"{'0' * 32}.sqlite"
    for path in (old, new, rests, waiting, orphan, index):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    for path in (old, rests, waiting, index):
        os.utime(path, (1e9, 1e9))
    if has_run:
        (home / "prefect").mkdir()
        with closing(sqlite3.connect(home / "prefect" / "prefect.db")) as db:
            db.execute("CREATE TABLE flow_run (id, parameters, state_type)")
            db.executemany("INSERT INTO flow_run VALUES (?, '{}', ?)", [(RUN, "SCHEDULED"), ("old", "COMPLETED")])
            db.commit()
    script = SCRIPT.replace(str(HEAVY), str(("prefect", "pydicom", "numpy", "httpx", "blocks", "tasks", "flows")))
    env = {**os.environ, "TALARIA_HOME": str(home)}
    ran = subprocess.run(
        [sys.executable, "-P", "-c", script, "prune", "--json"],
        env=env,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert json.loads(ran.stdout) == {"rows": 0, "receipts": 1 if has_run else 2, "staging": 1, "indexes": 1}
    words(ran)
    assert rests.exists() is has_run
    assert new.exists() and not any(path.exists() for path in (old, waiting, orphan, index))


def test_send_says_what_goes_wrong_as_it_does_and_prints_the_receipt(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    with api(tmp_path / "home", {key: list(value) for key, value in SEND.items()}) as one:
        ran = run(one, "send", "study", "--to", "pacs,pacs,cloud", "--exclude", "*.png", "--json")
        assert json.loads(ran.stdout) == DONE
        assert words(ran)[1:] == ["pacs: attempt 1 of 3 failed: gone"] and RUN in words(ran)[0]
        (made,) = [asked for asked in one.asked if asked.path.endswith("/dispatches")]
        assert made.body["paths"] == [str(tmp_path / "study")] and made.body["targets"] == ["pacs", "cloud"]
        assert made.body["exclude"] == "*.png" and made.headers["Idempotency-Key"]
        # A path that is not there is refused before anything is asked.
        one.asked.clear()
        ran = run(one, "send", "no/such", "--to", "pacs")
        assert ran.returncode == 2 and words(ran) == ["talaria: no/such: no such file or folder"]
        # So is an empty one, as of a variable that is not set: it is not the current folder.
        for line in (["send", "", "--to", "pacs"], ["retrieve", "pacs", "--accession", "A1", "--into", ""]):
            ran = run(one, *line)
            assert ran.returncode == 2 and words(ran) == [
                "talaria: the name of a path is empty; the current folder is ."
            ]
        assert not any(asked.path.endswith(("/dispatches", "/retrievals")) for asked in one.asked)


def test_a_retrieval_that_waits_says_until_when_and_for_what(tmp_path: Path) -> None:
    message = "waits until 22:00:00 UTC: the hours of pacs; 0 studies found, 0 delivered, 1 waiting"
    rests = {**LINE, "state": "AwaitingRetry", "kind": "retrieval", "message": message}
    waits = {"flow_run_id": RUN, "source": "pacs", "state": "waiting", "error": None, "studies": [], "accessions": []}
    answers = {
        ("POST", "/retrievals"): [(201, {**waits, "run": LINE})],
        ("GET", f"/jobs/{RUN}/events"): [(200, events(("state", LINE), ("state", rests), ("result", waits)))],
    }
    with api(tmp_path / "home", answers) as one:
        ran = run(one, "retrieve", "pacs", "--accession", "A1", "--off-peak", "--to", "cloud")
    assert ran.returncode == 1 and "Retrieval from pacs: waiting" in ran.stdout and words(ran)[1:] == [message]


@pytest.mark.parametrize(
    ("operation", "given", "listed"),
    [
        ("show_target", "a/", "target"),
        ("enable_source", "..", "source"),
        ("test_rule", "a//b", "notify"),
        ("remove_target", "a\\b", "target"),
        ("show_job", "../3f2a", "jobs"),
        ("retry_job", "dicom/3f2a", "jobs"),
    ],
)
def test_what_can_be_no_name_is_said_to_be_none(operation: str, given: str, listed: str) -> None:
    """The server said that the path has dots for folders, double slashes or backslashes."""
    what = {"job" if listed == "jobs" else "name": given}
    with pytest.raises(ValueError, match=rf"`talaria {listed} list` shows"):
        remote._request(remote.ROUTES[operation], what, in_query=False)


@pytest.mark.parametrize(("status", "code"), [(401, 2), (403, 2), (404, 2), (409, 2), (422, 2), (500, 3), (502, 1)])
def test_a_refusal_is_one_line_and_the_code_that_it_deserves(status: int, code: int, tmp_path: Path) -> None:
    answers = {("GET", "/targets/pacs"): [(status, {"error": "no target named pacs; there are: a, b"})]}
    with api(tmp_path / "home", answers) as one:
        ran = run(one, "target", "show", "pacs", "--json")
    assert ran.returncode == code
    assert words(ran) == ["talaria: no target named pacs; there are: a, b"]
    assert json.loads(ran.stdout) == {"error": "no target named pacs; there are: a, b"}


def test_a_source_is_shown_as_people_read_it(tmp_path: Path) -> None:
    """Targets that only routes name are its targets too; of peers and routes there is what they say, no more."""
    routes = [
        {"called": "", "calling": "", "modality": "CT", "targets": ["pacs", "cloud"]},
        {"called": "", "calling": "", "modality": "", "targets": ["archive", "pacs"]},
    ]
    settings = {"aet": "ROUTER", "peers": [{"aet": "CT*", "host": "10.1.0.0/16", "port": 0}], "routes": routes}
    named = {"name": "ct", "type": "dicom", "enabled": True, "broken": None, "problem": "", "last_sweep": None}
    document = {**named, "units": {"done": 2}, "waiting": 0}
    shown = {**document, "settings": {**settings, "targets": ["mirror"]}, "schedule": [], "attention": []}
    answers = {
        ("GET", "/sources"): [(200, {"sources": [{**document, **settings, "port": 11113}]})],
        ("GET", "/sources/ct"): [(200, shown)],
    }
    with api(tmp_path / "home", answers) as one:
        listed, told = run(one, "source", "list"), run(one, "source", "show", "ct")
    assert (listed.returncode, told.returncode, words(listed), words(told)) == (0, 0, [], [])
    assert "pacs, cloud, archive" in listed.stdout and "2 done" in listed.stdout
    assert told.stdout.splitlines()[1:5] == [
        "aet: ROUTER",
        "peers: aet CT*, host 10.1.0.0/16",
        "routes: modality CT, targets pacs, cloud; targets archive, pacs",
        "targets: mirror",
    ]


def test_what_is_not_there_for_a_moment_is_waited_for_and_made_once(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    answers = {key: list(value) for key, value in SEND.items()}
    answers["POST", "/dispatches"] = [(200, None), (503, {"error": "starting"}), *SEND["POST", "/dispatches"]]
    answers["GET", f"/jobs/{RUN}/events"] = [
        (200, events(("state", LINE))),  # it ends before the job does
        *SEND["GET", f"/jobs/{RUN}/events"],
    ]
    with api(tmp_path / "home", answers) as one:
        ran = run(one, "send", "study", "--to", "pacs", "--json")
        assert ran.returncode == 0 and json.loads(ran.stdout) == DONE
        keys = [asked.headers["Idempotency-Key"] for asked in one.asked if asked.path.endswith("/dispatches")]
        assert len(keys) == 3 and len(set(keys)) == 1


def test_status_says_that_the_server_does_not_answer(tmp_path: Path) -> None:
    with api(tmp_path / "home", {("GET", "/status"): [(500, {"error": "unexpected KeyError"})]}) as one:
        ran = run(one, "status", "--json")
    document = json.loads(ran.stdout)
    assert ran.returncode == 3 and document["server"] == {"ok": False, "url": one.url} and document["workers"] == []
    assert words(ran) == ["talaria: unexpected KeyError"] and document["error"] == "unexpected KeyError"


def test_a_server_of_another_version_is_named_once(tmp_path: Path) -> None:
    with api(tmp_path / "home", {("GET", "/jobs"): [(200, {"jobs": []})]}) as one:
        one.version = "9.9.9"
        said = words(run(one, "jobs", "list", "--json"))
    assert said == [f"the server is Talaria 9.9.9, this command {__version__}: update the older one"]


def test_a_token_goes_to_the_server_that_is_named_and_only_over_https(tmp_path: Path) -> None:
    with api(tmp_path / "home", {("GET", "/targets"): [(200, {"targets": []})]}) as one:
        here = {"TALARIA_HOME": str(tmp_path / "other"), "TALARIA_URL": one.url, "TALARIA_TOKEN": "abc"}
        ran = run(one, "target", "list", "--json", **here)
        assert ran.returncode == 0 and not words(ran)
        assert {asked.headers["Authorization"] for asked in one.asked} == {"Bearer abc"}
        ran = run(one, "target", "list", **here | {"TALARIA_URL": "http://talaria.example:4200"})
        assert ran.returncode == 2 and "https" in words(ran)[0] and "abc" not in ran.stderr
        for wrong in ("ftp://x", "http://x:99999", "talaria.example:4200"):
            ran = run(one, "target", "list", **here | {"TALARIA_URL": wrong})
            assert ran.returncode == 2 and f"TALARIA_URL={wrong}: expected http(s)://host:port" in words(ran)[0]
        one.answers["GET", "/health"] = [(401, {"error": "the token is not valid here"})]
        ran = run(one, "target", "list", **here)
        assert ran.returncode == 2 and words(ran) == ["talaria: TALARIA_TOKEN: the token is not valid here"]
        ran = run(one, "target", "list", **here | {"TALARIA_TOKEN": ""})
        assert ran.returncode == 2 and words(ran) == ["talaria: the server wants a token: set TALARIA_TOKEN"]
        one.answers["GET", "/health"] = [(404, "<html>")]
        ran = run(one, "target", "list", **here)
        assert ran.returncode == 3 and "no Talaria server" in words(ran)[0]
    ran = run(one, "target", "list", **here)
    assert ran.returncode == 3 and "no server answers" in words(ran)[0]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.mark.parametrize(
    ("listens", "url", "ca", "code", "said"),
    [
        ("tls", "https://127.0.0.1", "", 3, "is not trusted: unable to get local issuer certificate; TALARIA_CA names"),
        ("tls", "https://localhost", "ca.pem", 3, "is for another host: Hostname mismatch"),
        ("tls", "https://127.0.0.1", "none.pem", 2, "none.pem: No such file or directory"),
        ("tls", "https://127.0.0.1", "list.txt", 2, "list.txt: is no certificate in PEM"),
        ("tls", "http://127.0.0.1", "", 3, "no server answers at http://127.0.0.1"),
        ("text", "https://127.0.0.1", "", 3, "does not speak TLS as we do (wrong version number): is it http://"),
        ("text", "http://127.0.0.1", "", 3, "no server answers at http://127.0.0.1"),
        ("text", "http://no-such-host.invalid", "", 3, "no server answers at http://no-such-host.invalid"),
    ],
)
def test_a_server_that_is_named_wrong_is_not_waited_for(
    listens: str, url: str, ca: str, code: int, said: str, authority: Authority, tmp_path: Path
) -> None:
    """Its host, its port, its scheme or its authority: none of that changes by itself."""
    (authority.folder / "list.txt").write_text("A1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leaf = authority.leaf("server", hosts=("127.0.0.1",))
    context.load_cert_chain(leaf.cert, leaf.key)
    asked = []

    def serve(listening: socket.socket) -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            asked.append(client)
            with client, suppress(OSError):
                if listens == "text":
                    client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                else:
                    context.wrap_socket(client, server_side=True).close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        more = {"TALARIA_CA": str(authority.folder / ca)} if ca else {}
        named = f"{url}:{listening.getsockname()[1]}"
        one = Api(tmp_path / "home", 0, {})
        ran = run(one, "target", "list", TALARIA_URL=named, TALARIA_TOKEN="" if url[4] == ":" else "abc", **more)
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert ran.returncode == code and said in words(ran)[0] and len(words(ran)) == 1, ran.stderr
    assert len(asked) <= 1


def test_whoever_listens_in_the_server_s_place_gets_no_token(tmp_path: Path) -> None:
    """The server has ended, and somebody else has bound its port."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        elsewhere = {"inode": 1}
        with api(tmp_path / "home", {("GET", "/targets"): [(200, {"targets": []})]}, record=elsewhere) as one:
            ran = run(one, "target", "list")
            assert ran.returncode == 3 and "not our server" in ran.stderr and not one.asked


@pytest.mark.parametrize(
    ("kind", "module", "some"),
    [("target", "targets", "dicom"), ("source", "sources", "inbox"), ("rule", "rules", "email")],
)
def test_types_are_known_without_a_server(
    kind: str, module: str, some: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "none"))
    assert some in types_of(kind, module)["types"]
    assert not (tmp_path / "none").exists()
