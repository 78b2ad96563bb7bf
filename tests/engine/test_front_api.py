"""Talaria's own API at a server that runs: dispatches that are queued when it answers, followed live, and the rest."""

from __future__ import annotations

import asyncio
import builtins
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from functools import lru_cache
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import jsonschema
import pytest
from websockets import ConnectionClosed, Subprotocol
from websockets.sync.client import connect

from talaria.front.access import Identity, Role
from talaria.front.api import PATH, application
from talaria.front.keys import KeyRing
from talaria.front.lasting import MOST_OF_ONE
from talaria.front.sessions import COOKIE
from talaria.testing import studies
from talaria.testing.process import as_loaded, free_port, until
from tasks.retrieve.search import MOST_ROWS
from tests.engine.material import files, folder, later, placed, source, study
from tests.servers.qr import archive
from tests.servers.steps import Silence
from tests.servers.up import Talaria
from transfer.home import Home

pytestmark = pytest.mark.timeout(600)
CREATES, CLIENTS = 60, 16
BURST = 700  # events
OTHERS = (
    ("GET", "/sources", None),
    ("GET", "/source-types", None),
    ("GET", "/sources/box", None),
    ("POST", "/sources/box/enable", {"enabled": True}),
    ("POST", "/sources/box/test", None),
    ("POST", "/sources/box/sweep", None),
    ("POST", "/sources/box/retry", {}),
    ("DELETE", "/sources/box", None),
    ("GET", "/rules", None),
    ("GET", "/rule-types", None),
    ("GET", "/rules/team", None),
    ("POST", "/rules/team/test", None),
    ("POST", "/rules/team/enable", {"enabled": False}),
    ("DELETE", "/rules/team", None),
)
SLOW = 40_000  # bytes a second
SEEN = set[str]()  # operations whose answers have been compared with their description


def client(up: Talaria, **more: Any) -> httpx.Client:
    secret = (up.home / "api.auth").read_text().strip()
    base = f"http://127.0.0.1:{up.port}/talaria/api/v1"
    hooks = {"response": [described]}
    return httpx.Client(
        base_url=base, headers={"Authorization": f"Bearer {secret}"}, timeout=120, trust_env=False, event_hooks=hooks
    )


@lru_cache
def description() -> dict[str, Any]:
    async def nobody() -> Any:
        raise AssertionError("no request")

    return application(nobody, Home(Path("/nowhere"))).openapi()


def described(answer: httpx.Response) -> None:
    """Check that an answer is what the description of the API says: this is asked of all answers in this file."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        return
    path, method = answer.request.url.path.removeprefix(PATH), answer.request.method.lower()
    routes = [
        one
        for one in description()["paths"]
        if re.fullmatch(re.sub(r"\\{name\\}", ".+", re.sub(r"\\{job\\}", "[^/]+", re.escape(one))), path)
        and method in description()["paths"][one]
    ]
    route = min(routes, key=lambda one: one.count("{"))  # a fixed path comes before one that takes any name
    responses = description()["paths"][route][method]["responses"]
    said = responses.get(str(answer.status_code)) or responses[f"{answer.status_code // 100}XX"]
    schema = said["content"]["application/json"]["schema"]
    answer.read()
    jsonschema.validate(answer.json(), schema | {"components": description()["components"]})
    SEEN.add(description()["paths"][route][method]["operationId"])


@pytest.fixture
def api(up: Talaria) -> Iterator[httpx.Client]:
    with client(up) as one:
        yield one


def events(answer: httpx.Response) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


def followed(api: httpx.Client, path: str, method: str = "GET", **more: Any) -> list[tuple[str, Any]]:
    with api.stream(method, path, **more) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        return list(events(answer))


def test_many_creates_at_once_are_all_queued_and_none_is_turned_away(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)
    up.apply(closed=folder(tmp_path / "closed", window=later(3)))
    body = {"paths": [str(tmp_path / "study")], "targets": ["closed"]}
    secret = (up.home / "api.auth").read_text().strip()

    async def flood() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=CLIENTS)
        headers = {"Authorization": f"Bearer {secret}"}
        base = f"http://127.0.0.1:{up.port}/talaria/api/v1"
        async with httpx.AsyncClient(
            base_url=base, headers=headers, limits=limits, timeout=180, trust_env=False
        ) as one:

            async def create() -> httpx.Response:
                made = await one.post("/dispatches", json=body)
                if made.status_code == 201:  # in the queue: it can be cancelled there, or where it waits
                    await one.post(f"/dispatches/{made.json()['flow_run_id']}/cancel")
                return made

            return list(await asyncio.gather(*(create() for _ in range(CREATES))))

    answers = asyncio.run(flood())
    assert [answer.status_code for answer in answers] == [201] * CREATES, {answer.text for answer in answers}
    ids = {answer.json()["flow_run_id"] for answer in answers}
    assert len(ids) == CREATES
    found = up.api("POST", "/flow_runs/filter", flow_runs={"id": {"any_": sorted(ids)}})
    assert len(found) == CREATES


@pytest.mark.timeout(120)
def test_scripts_hear_all_that_happens_and_what_they_have_missed(
    up: Talaria, api: httpx.Client, tmp_path: Path
) -> None:
    studies.ct(tmp_path / "study", 1)
    up.apply(heard=folder(tmp_path / "heard"))
    seen: list[tuple[str, str, Any]] = []

    def hear(run: str, **more: Any) -> None:
        """Hear events until a run has ended, and its delivery."""
        with api.stream("GET", "/events", **more) as answer:
            number = ""
            lines = answer.iter_lines()
            assert next(lines) == "event: open"
            run = run or api.post("/dispatches", json=body).json()["flow_run_id"]
            wanted, name = {"run", "talaria.dispatch.delivered"}, "open"
            while wanted:
                line = next(lines)
                number = line[4:] if line.startswith("id: ") else number
                name = line[7:] if line.startswith("event: ") else name
                if not line.startswith("data: ") or name == "open":
                    continue
                data = json.loads(line[6:])
                seen.append((number, name, data))
                if run in (data.get("id"), data.get("run")):
                    wanted -= {name} if name != "run" or data["state"] == "Completed" else set()

    body = {"paths": [str(tmp_path / "study")], "targets": ["heard"]}
    hear("")
    states = [(one["kind"], one["state"], one["name"]) for _, name, one in seen if name == "run"]
    assert ("dispatch", "Scheduled", "to heard") in states
    delivery = next(one for _, name, one in seen if name == "talaria.dispatch.delivered")
    assert (delivery["target"], delivery["delivered"]) == ("heard", 1)
    # A follower that was cut off goes on after the last event that it saw, also after one that it missed meanwhile.
    missed = api.post("/dispatches", json=body | {"force": True}).json()["flow_run_id"]
    followed(api, f"/dispatches/{missed}/events")
    last = seen[-1][0]
    seen.clear()
    hear(missed, headers={"Last-Event-ID": last})
    assert last not in {number for number, _, _ in seen}
    assert "Scheduled" in [one["state"] for _, name, one in seen if name == "run" and one["id"] == missed]
    hear("", headers={"Last-Event-ID": "2999-01-01T00:00:00Z/x"})  # of a clock that was ahead


@pytest.mark.timeout(120)
def test_scripts_hear_each_event_of_a_burst(up: Talaria, api: httpx.Client) -> None:
    """As when many runs are made or cancelled at once: Prefect drops what is beyond 256 for a follower."""
    resource = {"prefect.resource.id": "talaria.target.burst", "prefect.resource.name": "burst"}
    common = {"event": "talaria.burst", "resource": resource, "occurred": datetime.now(UTC).isoformat()}
    burst = [{**common, "id": str(uuid4()), "payload": {"number": number}} for number in range(BURST)]
    heard = list[int]()
    with api.stream("GET", "/events") as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: open"
        up.as_worker("POST", "/events", burst)
        while BURST - 1 not in heard:
            line = next(lines)
            if line.startswith("data: ") and "number" in line:
                heard.append(json.loads(line[6:])["number"])
    assert heard == list(range(BURST))


@pytest.mark.timeout(120)
def test_a_stream_ends_soon_after_its_reader_may_hear_no_more(up: Talaria) -> None:
    """A token that is revoked, a user who is removed, a session that has ended: read from the file, by any process."""
    base, password = f"http://127.0.0.1:{up.port}/talaria", "correct horse battery"
    home = Home(up.home)
    keys = KeyRing(home)
    made, token = keys.tokens.create(Role.VIEWER, None, "screen")
    for name in ("gone", "left"):
        keys.users.add(f"hears-{name}", Role.VIEWER, password)
    cookies = {name: keys.session_for(Identity(f"hears-{name}", Role.VIEWER, "session")) for name in ("gone", "left")}
    with ExitStack() as stack:
        heard = {}
        for name, headers in {
            "token": {"Authorization": f"Bearer {token}"},
            "gone": {"Cookie": f"{COOKIE}={cookies['gone']}"},
            "left": {"Cookie": f"{COOKIE}={cookies['left']}"},
        }.items():
            one = stack.enter_context(httpx.Client(headers=headers, timeout=60, trust_env=False))
            answer = stack.enter_context(one.stream("GET", f"{base}/api/v1/events"))
            heard[name] = events(answer)
            assert next(heard[name])[0] == "open"
        address = f"ws://127.0.0.1:{up.port}/api/events/out"
        opened = [
            stack.enter_context(connect(address, subprotocols=[Subprotocol("prefect")], additional_headers=more))
            for more in ({"Authorization": f"Bearer {token}"}, {})
        ]
        for one in opened:
            one.send(json.dumps({"type": "auth", "token": token}))
            assert json.loads(one.recv(30))["type"] == "auth_success"
            one.send(json.dumps({"type": "filter", "filter": {}}))
        for name, end in {
            "token": lambda: keys.tokens.revoke(made.id),
            "gone": lambda: keys.users.remove("hears-gone"),
            "left": lambda: keys.sessions.end(str(cookies["left"])),
        }.items():
            end()
            *_, (last, words) = heard[name]
            assert last == "error" and words["status"] == 401, words
        for one in opened:
            with pytest.raises(ConnectionClosed):
                while True:
                    one.recv(30)
            assert one.close_code == 1008


@pytest.mark.timeout(120)
def test_so_many_streams_are_open_at_once_and_no_more(up: Talaria) -> None:
    keys = KeyRing(Home(up.home))
    token = keys.tokens.create(Role.VIEWER, None, "many")[1]
    headers, url = {"Authorization": f"Bearer {token}"}, f"http://127.0.0.1:{up.port}/talaria/api/v1/events"
    with ExitStack() as stack:
        one = stack.enter_context(httpx.Client(headers=headers, timeout=60, trust_env=False))
        streams = [stack.enter_context(one.stream("GET", url)) for _ in range(MOST_OF_ONE)]
        assert {answer.status_code for answer in streams} == {200}
        answer = one.get(url)
        assert answer.status_code == 429 and f"{MOST_OF_ONE} streams" in answer.json()["error"]
        with client(up) as other, other.stream("GET", "/events") as heard:
            assert heard.status_code == 200, "somebody else's count for themselves"
        streams[0].close()

        def again() -> bool:
            with one.stream("GET", url) as answer:
                return answer.status_code == 200

        until(again)


def test_an_event_id_that_is_none_is_refused(api: httpx.Client) -> None:
    answer = api.get("/events", headers={"Last-Event-ID": "yesterday"})
    assert answer.status_code == 422 and "Last-Event-ID" in answer.json()["error"]
    with api.stream("GET", "/events", headers={"Last-Event-ID": "0001-01-01T00:00:00Z/x"}) as old:
        lines = old.iter_lines()
        assert next(lines) == "event: open" and '"missed": true' in next(lines)


def test_the_same_key_is_the_same_dispatch(up: Talaria, api: httpx.Client, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)
    up.apply(archive=folder(tmp_path / "archive"))
    body = {"paths": [str(tmp_path / "study")], "targets": ["archive"]}
    key = {"Idempotency-Key": str(tmp_path)[-100:]}
    first, second = (api.post("/dispatches", json=body, headers=key) for _ in range(2))
    assert first.status_code == second.status_code == 201
    run = first.json()["flow_run_id"]
    assert second.json()["flow_run_id"] == run
    assert followed(api, f"/dispatches/{run}/events")[-1][1]["state"] == "delivered"
    assert api.post("/dispatches", json=body, headers=key).json()["state"] == "delivered"
    other = api.post("/dispatches", json=body | {"force": True}, headers=key)
    assert other.status_code == 409 and run in other.json()["error"]
    assert len(files(tmp_path / "archive")) == 2


def test_a_dispatch_is_followed_with_bytes_rate_and_time_left(up: Talaria, api: httpx.Client, tmp_path: Path) -> None:
    sent = studies.ct(tmp_path / "study", 12)
    up.apply(slow=folder(tmp_path / "slow", bandwidth_limit=SLOW, concurrency=1))
    body = {"paths": [str(tmp_path / "study")], "targets": ["slow"]}
    made = api.post("/dispatches", json=body).json()
    run = made["flow_run_id"]
    assert made["state"] == made["targets"]["slow"]["state"] == "waiting" and made["run"]["by"] == "talaria"
    seen = followed(api, f"/dispatches/{run}/events")
    assert [name for name, _ in seen][-1] == "result"
    states = [event["state"] for name, event in seen if name == "state"]
    assert states[-1] == "Completed" and "Running" in states
    parts = [event["targets"]["slow"] for name, event in seen if name == "progress" and event["targets"]]
    size = sum(path.stat().st_size for path in sent)
    assert all((part["items"], part["bytes"]) == (len(sent), size) for part in parts)
    moved = [part["moved"] for part in parts]
    assert moved == sorted(moved) and len(set(moved)) > 3
    assert any(part["rate"] > 0 and part["seconds_left"] for part in parts)
    receipt = seen[-1][1]
    assert receipt["state"] == "delivered" and receipt["targets"]["slow"]["items"] == []
    whole = api.get(f"/dispatches/{run}/receipt").json()
    assert len(whole["targets"]["slow"]["items"]) == len(sent)
    shown = api.get(f"/dispatches/{run[:13]}").json()
    assert shown["run"]["dispatch_id"] == receipt["dispatch_id"] == shown["dispatch_id"]
    assert api.get("/dispatches").json()["jobs"][0]["id"] == run
    # A retry sends nothing again; what has ended can't be cancelled.
    assert api.post(f"/dispatches/{run}/cancel").status_code == 422
    assert api.post(f"/dispatches/{run}/retry").json()["action"] == "queued"
    again = followed(api, f"/dispatches/{run}/events")[-1][1]["targets"]["slow"]
    assert (again["already"], again["delivered"]) == (len(sent), 0)
    assert api.get("/retrievals").json()["jobs"] == [] or run not in api.get("/retrievals").text
    assert api.get(f"/retrievals/{run}").status_code == 404


def test_send_leaves_the_files_to_the_side_that_sends(
    up: Talaria, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies.ct(tmp_path / "study", 3)
    up.apply(archive=folder(tmp_path / "archive"))
    opened: list[str] = []

    def watched(name: str, real: Any) -> Any:
        def call(path: Any, *more: Any, **named: Any) -> Any:
            if str(tmp_path / "study") in str(path):
                opened.append(f"{name} {path}")
            return real(path, *more, **named)

        return call

    with monkeypatch.context() as patched:
        for module, name in ((os, "open"), (os, "scandir"), (os, "listdir"), (builtins, "open")):
            patched.setattr(module, name, watched(name, getattr(module, name)))
        assert up.told("send", str(tmp_path / "study"), "--to", "archive")["state"] == "delivered"
        queued = up.told("send", str(tmp_path / "study"), "--to", "archive", "--no-wait")
    assert opened == [] and queued["targets"]["archive"]["already"] == 3


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"paths": ["/no/such"], "targets": ["good"]}, 404, "/no/such: no such file or folder"),
        ({"paths": ["relative"], "targets": ["good"]}, 422, "absolute"),
        ({"paths": ["EMPTY"], "targets": ["good"]}, 422, "nothing to send"),
        ({"paths": ["STUDY"], "targets": ["good"], "exclude": "*.dcm"}, 422, "nothing to send"),
        ({"paths": ["STUDY"], "targets": ["nobody"]}, 404, "no target named nobody"),
        ({"paths": ["STUDY"], "targets": ["off"]}, 422, "disabled"),
        ({"paths": ["STUDY"], "targets": ["good", "daily"], "priority": "offpeak"}, 422, "has no time in common"),
        ({"paths": ["STUDY"], "targets": ["good", "passing"]}, 422, "where the study came from: give sender_aet"),
        ({"paths": ["STUDY"], "targets": ["passing"], "sender_aet": "A" * 17}, 422, "1 to 16 characters"),
    ],
)
def test_what_can_t_be_sent_is_refused_in_one_line(
    up: Talaria, api: httpx.Client, tmp_path: Path, body: dict[str, Any], status: int, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    studies.ct(tmp_path / "study", 1)
    passing = {"type": "dicom", "host": "127.0.0.1", "aet_target": "A", "pass_sender_aet": True}
    daily = folder(tmp_path / "good", window="08:00-20:00")
    up.apply(good=folder(tmp_path / "good"), off=folder(tmp_path / "off", enabled=False), passing=passing, daily=daily)
    names = {"EMPTY": str(tmp_path / "empty"), "STUDY": str(tmp_path / "study")}
    answer = api.post("/dispatches", json=body | {"paths": [names.get(path, path) for path in body["paths"]]})
    assert answer.status_code == status and words in answer.json()["error"]
    if body["targets"][-1] == "passing":
        assert words in api.post("/dispatches/plan", json=body | {"paths": [names["STUDY"]]}).json()["error"]


def test_a_body_that_is_not_there_is_named_where_it_is_needed(api: httpx.Client) -> None:
    answer = api.post("/dispatches")
    assert answer.status_code == 422 and answer.json()["error"].startswith("the body must be a JSON object")
    answer = api.post("/sources/nobody/retry")  # of all its units
    assert answer.status_code == 404 and answer.json()["error"].startswith("no source named nobody")


def test_targets_come_and_go_and_secrets_stay(up: Talaria, api: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    cloud = {"type": "s3", "bucket": "studies", "access_key_id": "AK", "secret_access_key": "${HOME} swordfish"}
    shelf = {"type": "folder", "folder": str(tmp_path / "place")}
    made = api.post("/targets", json={"targets": {"api-cloud": cloud, "api-shelf": shelf}}).json()
    assert [one["action"] for one in made["targets"]] == ["created", "created"]
    # Texts are taken as they are: nothing of the server's environment or disk gets into a target.
    again = api.post("/targets", json={"targets": {"api-cloud": cloud}, "dry_run": True}).json()
    assert again["targets"] == [{"name": "api-cloud", "action": "unchanged"}]
    for path in ("/targets", "/targets/api-cloud", "/targets/s3/api-cloud", "/target-export"):
        answer = api.get(path)
        assert answer.status_code == 200 and "swordfish" not in answer.text and "api-cloud" in answer.text
    wrong = api.post(
        "/targets", json={"targets": {"api-shelf": {"type": "folder", "folder": "/x", "colour": "swordfish"}}}
    )
    assert wrong.status_code == 422 and "colour" in wrong.json()["error"] and "swordfish" not in wrong.text
    tested = followed(api, "/target-tests?name=api-shelf", "POST")
    assert [name for name, _ in tested][-1] == "result" and tested[-1][1]["ok"] is True
    assert [event["probe"]["name"] for name, event in tested if name == "probe"]
    unsaved = followed(api, "/target-tests/unsaved", "POST", json={"targets": {"x": shelf | {"folder": "/no/such"}}})
    assert unsaved[-1][1]["ok"] is False and api.get("/targets/x").status_code == 404
    assert api.post("/targets/api-shelf/enable", json={"enabled": False}).json()["action"] == "disabled"
    assert api.post("/targets/api-shelf/rename", json={"to": "api-other"}).json()["name"] == "api-other"
    for name in ("api-other", "api-cloud"):
        assert api.delete(f"/targets/{name}").json()["action"] == "removed"
    gone = api.get("/targets/api-other")
    assert gone.status_code == 404 and "no target named api-other" in gone.json()["error"]


def test_a_search_ends_when_its_client_goes(up: Talaria, api: httpx.Client) -> None:
    with archive(study("Q1"), on_data=lambda _, count: Silence() if count else None) as peer:
        up.apply(mute=source(peer, idle_timeout_s=600))
        whose = {"source": "mute", "patient_name": "Nobody"}
        headers = {"Authorization": api.headers["Authorization"], "Content-Type": "application/json"}
        for path, asked in (("/matches", whose), ("/retrievals", whose | {"into": "/tmp/nowhere"})):
            before = sum(one.bytes > 0 for one in peer.associations)
            with closing(HTTPConnection("127.0.0.1", up.port)) as leaving:
                leaving.request("POST", PATH + path, json.dumps(asked), headers)
                until(lambda before=before: sum(one.bytes > 0 for one in peer.associations) > before)  # type: ignore[misc]
            assert peer.wait_closed(as_loaded(30))


def test_a_search_as_a_run_gives_all_that_it_has_found(up: Talaria, api: httpx.Client, tmp_path: Path) -> None:
    one = studies.dataset(study="1.2.3.4.1000")
    del one.PixelData
    file, uids = studies.encoded(one), {f"1.2.3.4.{number}" for number in range(1000, 1000 + MOST_ROWS + 10)}
    for uid in uids:
        studies.write(tmp_path / "web" / f"{uid}.dcm", file.replace(b"1.2.3.4.1000", uid.encode()))
    up.apply(wide={"type": "dicomweb", "url": (tmp_path / "web").as_uri(), "direction": "query"})
    query = api.post("/queries", json={"source": "wide", "study_date": "19000101-"}).json()["flow_run_id"]
    followed(api, f"/queries/{query}/events")
    found = api.get(f"/queries/{query}").json()
    assert found["state"] == "found" and {match["StudyInstanceUID"] for match in found["matches"]} == uids
    [table] = up.api(
        "POST", "/artifacts/filter", artifacts={"key": {"any_": ["matches"]}, "flow_run_id": {"any_": [query]}}
    )
    assert table["description"] == f"{len(uids)} studies at wide; the first {MOST_ROWS} of them"
    assert len(json.loads(table["data"])) == MOST_ROWS


def test_queries_and_retrievals(up: Talaria, api: httpx.Client, tmp_path: Path) -> None:
    with archive([*study("Q1"), *study("Q2")]) as peer:
        up.apply(src=source(peer))
        asked = {"source": "src", "patient_name": studies.PATIENT_NAME}
        found = api.post("/matches", json=asked).json()["matches"]
        assert {one["AccessionNumber"] for one in found} == {"Q1", "Q2"}
        refused = api.post("/queries", json=asked)
        assert refused.status_code == 422 and studies.PATIENT_NAME not in refused.text
        query = api.post("/queries", json={"source": "src", "accession": "Q1,Q2"}).json()["flow_run_id"]
        listed = followed(api, f"/queries/{query}/events")[-1][1]
        assert {one["AccessionNumber"] for one in listed["matches"]} == {"Q1", "Q2"} and listed["state"] == "found"
        assert not any(value in json.dumps(listed) for value in studies.PHI)
        assert api.get("/queries").json()["jobs"][0]["kind"] == "query"
        into = str(tmp_path / "into")
        made = api.post("/retrievals", json={"source": "src", "numbers": ["Q1"], "into": into}).json()
        ended = followed(api, f"/retrievals/{made['flow_run_id']}/events")[-1][1]
        assert ended["state"] == "delivered" and set(placed(tmp_path / "into")) == {"Q1"}
        whose = {"source": "src", "into": into, "patient_name": "Nobody^At^All"}
        assert api.post("/retrievals", json=whose).status_code == 422
        many = {"source": "src", "into": into, "numbers": [f"{number:016}" for number in range(40_000)]}
        refused = api.post("/retrievals", json=many)
        assert refused.status_code == 422 and "ask for it in several parts" in refused.json()["error"]
        up.apply(called={"type": "dicom", "host": "127.0.0.1", "aet_target": "A", "pass_receiver_aet": True})
        refused = api.post("/retrievals", json={"source": "src", "numbers": ["Q1"], "targets": ["called"]})
        assert refused.status_code == 422 and "a retrieval does not know it" in refused.json()["error"]
        trail = up.told("audit", "show", "--last", "50")["entries"]
        assert "PatientName" in [one for one in trail if one["event"] == "query"][-1]["details"]["keys"]
        assert not any("Nobody" in json.dumps(one) for one in trail)
        for nothing in ({}, {"numbers": ["", " "]}, {"numbers": [" "], "study_date": "20260101"}):
            assert api.post("/retrievals", json={"source": "src", "into": into} | nothing).status_code == 422
        run = made["flow_run_id"]
        assert api.get(f"/retrievals/{run}").json()["run"]["kind"] == "retrieval"
        for asked in (("send", {"json": {"to": ["src"]}}), ("retry", {"params": {"only": "src"}})):
            answer = api.post(f"/jobs/{run}/{asked[0]}", **asked[1])
            assert answer.status_code == 422 and f"{run} is a retrieval" in answer.json()["error"]
        assert api.get(f"/dispatches/{run[:13]}").json() == {"error": f"{run} is a retrieval, no dispatch"}


def test_the_trail_says_who_asked_for_what(up: Talaria, api: httpx.Client, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)

    def own() -> list[dict[str, Any]]:
        found = up.told("audit", "show", "--last", "10000")["entries"]
        assert "started" in [one["event"] for one in found]
        return [one for one in found if "audited" in json.dumps(one)]

    values = folder(tmp_path / "there", window=later(3))
    for one in (values, values, values | {"window": later(5), "description": "secret words"}):
        assert api.post("/targets", json={"targets": {"audited": one}}).status_code == 200
    made = api.post("/dispatches", json={"paths": [str(tmp_path / "study")], "targets": ["audited"]}).json()
    run_id = made["flow_run_id"]
    until(lambda: "it goes on by itself" in api.post(f"/dispatches/{run_id}/retry").json()["error"])
    assert api.post(f"/dispatches/{run_id}/cancel").status_code == 200
    followed(api, f"/dispatches/{run_id}/events")  # as long as it has not ended, its target is in use
    assert api.post("/targets/audited/enable", json={"enabled": False}).status_code == 200
    assert api.post("/targets/audited/rename", json={"to": "audited-too"}).status_code == 200
    assert api.delete("/targets/audited-too").status_code == 200
    found = own()
    assert {one["source"] for one in found} == {"127.0.0.1"} and len({one["who"] for one in found}) == 1
    assert "secret words" not in json.dumps(found)
    said = [(one["event"], {k: v for k, v in one["details"].items() if k != "run"}) for one in found]
    given = sorted(values.keys() - {"type"})
    assert said == [
        ("target-changed", {"target": "audited", "change": "created", "fields": given}),
        ("target-changed", {"target": "audited", "change": "updated", "fields": ["description", "window"]}),
        ("dispatch", {"action": "asked", "targets": ["audited"]}),
        ("dispatch", {"action": "cancel", "targets": ["audited"]}),
        ("target-changed", {"target": "audited", "change": "disabled", "fields": ["enabled"]}),
        ("target-changed", {"target": "audited-too", "change": "renamed from audited", "fields": ["name"]}),
        ("target-removed", {"target": "audited-too"}),
    ]
    assert [one["details"]["run"] for one in found if one["event"] == "dispatch"] == [run_id] * 2
    assert up.told("audit", "verify")["ok"]


def test_every_route_answers_as_it_is_described(up: Talaria, api: httpx.Client, tmp_path: Path) -> None:
    SEEN.clear()
    studies.ct(tmp_path / "study", 2)
    (tmp_path / "web").mkdir()
    up.apply(closed=folder(tmp_path / "closed", window=later(3)), archive=folder(tmp_path / "archive"))
    name = next(iter(api.get("/targets").json()["targets"]))["name"]
    web = {"type": "dicomweb", "url": (tmp_path / "web").as_uri(), "direction": "both"}
    assert api.post("/targets", json={"targets": {"web": web}}).json()["targets"]
    for path in ("/health", "/status", "/target-types", "/target-export", f"/targets/{name}", "/targets/nobody"):
        api.get(path)
    assert api.post("/targets/web/enable", json={"enabled": True}).status_code == 200
    assert api.post("/targets/web/rename", json={"to": "net"}).status_code == 200
    followed(api, "/target-tests?name=archive", "POST")
    assert api.get("/status").status_code == api.get("/targets").status_code == 200  # with a check now
    body = {"paths": [str(tmp_path / "study")], "targets": ["archive", "closed"]}
    assert api.post("/dispatches/plan", json=body).status_code == 200
    delivered = api.post("/dispatches", json=body | {"targets": ["archive"]}).json()["flow_run_id"]
    assert followed(api, f"/dispatches/{delivered}/events")[-1][1]["state"] == "delivered"
    waits = api.post("/dispatches", json=body | {"targets": ["closed"], "planned": True}).json()["flow_run_id"]
    query = api.post("/queries", json={"source": "net", "accession": "A1"}).json()["flow_run_id"]
    into = {"source": "net", "numbers": ["A1"], "into": str(tmp_path / "into")}
    retrieval = api.post("/retrievals", json=into).json()["flow_run_id"]
    assert api.post("/matches", json={"source": "net", "accession": "A1"}).json() == {"matches": [], "unread": None}
    for kind, run in (("queries", query), ("retrievals", retrieval), ("dispatches", waits)):
        followed(api, f"/{kind}/{run}/events")
    for kind, run in (
        ("queries", query),
        ("retrievals", retrieval),
        ("dispatches", delivered),
        ("dispatches", waits),
        ("jobs", delivered),
        ("jobs", retrieval),
    ):
        assert api.get(f"/{kind}").status_code == 200
        for path in ("", "?all_items=true", "/receipt"):
            assert api.get(f"/{kind}/{run}{path}").status_code == 200
        for action in ("pause", "resume", "cancel", "retry", "cancel"):
            api.post(f"/{kind}/{run}/{action}")
    for collection in ("dispatches", "jobs"):
        assert api.post(f"/{collection}/{delivered}/send", json={"to": ["archive"]}).status_code == 201
    assert api.post("/recover").status_code == 200
    assert api.post("/prune", json={"older_than_s": 1e9}).status_code == 200
    (tmp_path / "inbox").mkdir()
    box = {"box": {"type": "inbox", "folder": str(tmp_path / "inbox"), "targets": ["archive"], "interval_s": 3600}}
    assert api.post("/sources", json={"sources": box}).status_code == 200
    team = {"team": {"type": "webhook", "url": f"http://127.0.0.1:{free_port()}/"}}
    assert api.post("/rules", json={"rules": team}).status_code == 200
    for method, path, asked in OTHERS:
        assert api.request(method, path, json=asked).status_code == (404 if path.endswith("retry") else 200), path
    followed(api, f"/retrievals/{retrieval}/events")  # as long as it has not ended, its source is in use
    assert api.delete("/targets/net").status_code == 200
    every = {one["operationId"] for methods in description()["paths"].values() for one in methods.values()}
    streams = {one for one in every if one.startswith("follow_")} | {"test_targets", "test_values"}
    assert every - streams == SEEN
