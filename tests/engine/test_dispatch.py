"""Dispatches as people make them: the command line, the server, the worker, a PACS and an archive."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pydicom
import pytest

from talaria.testing import studies
from talaria.testing.process import as_loaded
from talaria.testing.relay import relay
from tests.engine.material import dicom, files, folder
from tests.servers.dcmtk import StoreScp, storescp
from tests.servers.up import Talaria

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[StoreScp]:
    with storescp(tmp_path / "pacs") as one:
        yield one


def test_a_study_goes_to_a_pacs_and_an_archive(up: Talaria, pacs: StoreScp, tmp_path: Path) -> None:
    sent = studies.sample(tmp_path / "study")
    up.apply(pacs=dicom(pacs.port), archive=folder(tmp_path / "archive", exclude="*.png, *.json"))
    result = up.json("send", str(tmp_path / "study"), "--to", "pacs,archive")
    instances = [p for p in sent if p.suffix == ".dcm"]
    assert result["state"] == "delivered"
    assert result["targets"]["pacs"]["delivered"] == len(instances) == len(pacs.files())
    assert result["targets"]["archive"]["delivered"] == len(instances)
    assert {i["outcome"] for i in result["targets"]["pacs"]["items"]} == {"skipped"}
    arrived = files(tmp_path / "archive" / result["dispatch_id"])
    assert arrived.pop(".complete") == b""
    assert arrived == {str(p.relative_to(tmp_path / "study")): p.read_bytes() for p in instances}
    assert not list((up.home / "staging").iterdir())
    again = up.told("send", str(tmp_path / "study"), "--to", "pacs,archive")
    assert again["targets"]["pacs"]["already"] == len(instances) and again["targets"]["pacs"]["delivered"] == 0
    assert again["dispatch_id"] == result["dispatch_id"]
    shown = up.told("jobs", "show", result["flow_run_id"])
    assert shown["targets"] == result["targets"] and shown["run"]["state"] == "Completed"
    artifacts = up.api("POST", "/artifacts/filter", flow_runs={"id": {"any_": [result["flow_run_id"]]}})
    # Only a delivery that takes its time has an artifact of its progress, too.
    assert {a["key"] for a in artifacts if a["key"]} >= {"receipt", "receipt-details"}
    run, words = result["flow_run_id"], {a["key"]: f"{a['description']} {a['data']}" for a in artifacts}
    for link in (f"/talaria/dispatches/{run}", f"/talaria/dispatches/{run}/receipt", f"/v2/runs/flow-run/{run}"):
        assert f"]({link})" in words["receipt"] and f"]({link})" in words["receipt-details"]
    assert "[pacs](/talaria/targets/pacs)" in words["receipt-details"]
    assert shown["progress"] == {"pacs": 100.0, "archive": 100.0}
    assert studies.PATIENT_NAME not in json.dumps(artifacts) and studies.PATIENT_ID not in json.dumps(artifacts)
    trail = up.told("audit", "show", "--last", "1000")["entries"]
    of_run = [one for one in trail if one["details"].get("run") == result["flow_run_id"]]
    ended = {one["details"]["target"]: one["result"] for one in of_run if one["event"] == "delivery"}
    assert ended == {"pacs": "success", "archive": "success"}
    assert {one["details"]["target"] for one in of_run if one["event"] == "delivery-begun"} == {"pacs", "archive"}
    (asked,) = [one for one in of_run if one["event"] == "dispatch"]
    assert asked["details"]["action"] == "asked"
    assert {one["details"]["dispatch"] for one in of_run if one != asked} == {result["dispatch_id"]}
    assert not any(private in json.dumps(of_run) for private in studies.PHI)
    assert up.told("audit", "verify")["ok"]


def test_a_source_on_another_file_system_is_read_in_its_place(up: Talaria, tmp_path: Path) -> None:
    """Unless it is to be copied first; the run's log says what was done."""
    up.apply(apart=folder(tmp_path / "archive"))
    with TemporaryDirectory(dir="/dev/shm") as source:
        studies.ct(Path(source), 3)
        for options, in_place in (((), True), (("--copy-first", "--force"), False)):
            run = up.told("send", source, "--to", "apart", *options)
            assert run["state"] == "delivered"
            of_run = {"flow_run_id": {"any_": [run["flow_run_id"]]}}

            def said(of_run: dict[str, Any] = of_run) -> list[str]:
                lines = [line["message"] for line in up.api("POST", "/logs/filter", logs=of_run)]
                return [line for line in lines if line.startswith("3 files, ")]

            up.until(said)
            assert said()[0].endswith("3 can't be linked and are read in their place") is in_place
    assert not list((up.home / "staging").iterdir())


def test_the_state_directory_is_not_sent(up: Talaria, tmp_path: Path) -> None:
    up.apply(archive=folder(tmp_path / "archive"))
    deployments = up.api("POST", "/deployments/filter")
    deployment = next(one for one in deployments if one["entrypoint"] == "flows.dispatch:dispatch")
    run = up.api(
        "POST",
        f"/deployments/{deployment['id']}/create_flow_run",
        parameters={"paths": [str(up.home / "api.auth")], "targets": ["archive"]},
    )
    end = time.monotonic() + 120
    while time.monotonic() < end:
        state = up.api("GET", f"/flow_runs/{run['id']}")["state"]
        if state["type"] in ("FAILED", "COMPLETED", "CRASHED"):
            break
        time.sleep(0.2)
    assert state["type"] == "FAILED"
    assert "state directory, which holds secrets" in state["message"]
    assert not list((tmp_path / "archive").rglob("api.auth"))
    trail = up.told("audit", "show", "--event", "refused", "--last", "1000")["entries"]
    assert any(one["details"].get("run") == run["id"] for one in trail)


@pytest.fixture(scope="module")
def three(up: Talaria, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Apply a good target, one that is off and one to query, once for all that is refused; return the good folder."""
    root = tmp_path_factory.mktemp("three")
    off = folder(root / "off", enabled=False)
    up.apply(good=folder(root / "good"), off=off, source=dicom(1, direction="query"))
    return root / "good"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["/no/such/study", "--to", "good"], "/no/such/study"),
        (["EMPTY", "--to", "good"], "nothing to send"),
        (["STUDY", "--to", "nobody"], "nobody"),
        (["STUDY", "--to", "off"], "disabled"),
        (["STUDY", "--to", "source"], "query"),
        (["STUDY", "--to", ","], "--to"),
        (["STUDY"], "--to"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    up: Talaria, three: Path, tmp_path: Path, arguments: list[str], word: str
) -> None:
    (tmp_path / "empty").mkdir()
    studies.ct(tmp_path / "study", 1)
    names = {"EMPTY": str(tmp_path / "empty"), "STUDY": str(tmp_path / "study")}
    ran = up.here("send", *[names.get(a, a) for a in arguments])
    assert ran.returncode == 2 and ran.stdout == ""
    assert word in ran.stderr and len(ran.stderr.strip().splitlines()) == 1
    assert not files(three)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("targets: {a: {type: folder, folder: /x, colour: red}}", ["a", "colour"]),
        ("targets: {a: {type: floppy}}", ["a", "floppy"]),
        ("targets: {a: {type: folder}}", ["a", "folder"]),
        ("targets: {A_b: {type: folder, folder: /x}}", ["A_b"]),
        ("targets: {a: {type: folder, folder: /x, direction: query}}", ["a", "query"]),
        ("targets: {a: {type: folder, folder: /x}, a: {type: folder, folder: /y}}", ["twice"]),
        ("targets: {a: {type: s3, bucket: b, secret_access_key: '${NO_SUCH_VARIABLE}'}}", ["a", "NO_SUCH_VARIABLE"]),
        ("targets: {a: {type: dicom, host: h, port: 99999, aet_target: X}}", ["a", "port"]),
        ("targets: [", []),
        ("other: {}", ["targets"]),
    ],
)
def test_a_wrong_target_file_is_refused_in_one_line(up: Talaria, tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "targets.yaml"
    path.write_text(text)
    ran = up.here("target", "apply", str(path))
    assert ran.returncode == 2 and ran.stdout == "" and len(ran.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in ran.stderr


def test_bad_files_are_rejected_and_the_others_go(up: Talaria, pacs: StoreScp, tmp_path: Path) -> None:
    good = studies.ct(tmp_path / "study", 3)
    bad = studies.damaged(tmp_path / "study")
    (tmp_path / "study" / "notes.txt").write_text("no DICOM")
    (tmp_path / "outside.dcm").write_bytes(good[0].read_bytes())
    (tmp_path / "study" / "link.dcm").symlink_to(tmp_path / "outside.dcm")
    up.apply(pacs=dicom(pacs.port), archive=folder(tmp_path / "archive"))
    result = up.told("send", str(tmp_path / "study"), "--to", "pacs,archive", code=1)
    to_pacs = result["targets"]["pacs"]
    assert to_pacs["delivered"] == 3 == len(pacs.files())
    said = {item["path"]: (item["outcome"], item["detail"]) for item in to_pacs["items"]}
    assert said.pop("notes.txt")[0] == "skipped"
    outcome, detail = said.pop("link.dcm")
    assert outcome == "rejected" and "link" in detail
    for path in bad.values():
        outcome, detail = said[path.name]
        assert outcome == "rejected" and detail, path.name
    arrived = files(tmp_path / "archive" / result["dispatch_id"])
    assert "notes.txt" in arrived and "link.dcm" not in arrived
    assert up.run(result["flow_run_id"])["state"]["type"] == "FAILED"


def test_retry_in_the_ui_sends_only_what_is_missing(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 40, side=128)
    with storescp(tmp_path / "pacs") as scp, relay(scp.port) as link:
        up.apply(pacs=dicom(link.port, max_attempts=1, concurrency=1))
        link.cut_after, link.stays_cut = 500_000, True  # else the association would be replaced
        result = up.told("send", str(tmp_path / "study"), "--to", "pacs", code=1)
        first = result["targets"]["pacs"]
        assert result["state"] == "partial" and 0 < first["delivered"] < 40
        assert first["unsent"] == 40 - first["delivered"] and first["error"]
        before, confirmed, link.stays_cut = link.sent, first["delivered"], False
        # What the UI's Retry button does.
        up.api(
            "POST",
            f"/flow_runs/{result['flow_run_id']}/set_state",
            state={"type": "SCHEDULED", "name": "AwaitingRetry"},
            force=True,
        )
        up.until(lambda: up.run(result["flow_run_id"])["state"]["type"] == "COMPLETED")
        second = up.told("jobs", "show", result["flow_run_id"])["targets"]["pacs"]
        assert second["already"] == confirmed and second["delivered"] == 40 - confirmed
        assert len(scp.files()) == 40
        size = sum(p.stat().st_size for p in (tmp_path / "study").iterdir())
        assert link.sent - before < size * (40 - confirmed + 1) / 40 + 50_000


def test_one_dead_target_delays_no_other(up: Talaria, pacs: StoreScp, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 3)
    up.apply(dead=dicom(1, max_attempts=9, retry_delay_s=300, retry_max_delay_s=300), pacs=dicom(pacs.port))
    sending = up.background("send", str(tmp_path / "study"), "--to", "dead,pacs")
    try:
        up.until(lambda: len(pacs.names()) == 3, 120)
    finally:
        sending.kill()
        sending.wait()
    job = up.told("jobs", "list")["jobs"][0]["id"]
    up.here("jobs", "cancel", job)
    up.until(lambda: up.run(job)["state"]["type"] == "CANCELLED", 30)


@pytest.mark.parametrize(
    "victim",
    [
        pytest.param("talaria.engine.worker", marks=pytest.mark.slow),
        pytest.param("talaria.front", marks=pytest.mark.slow),
        pytest.param("everything", marks=pytest.mark.slow),
    ],
)
def test_killed_in_the_middle_it_is_taken_up_by_itself(victim: str, tmp_path: Path) -> None:
    count = 60
    studies.ct(tmp_path / "study", count, side=64)
    one = Talaria(tmp_path)
    with storescp(tmp_path / "pacs") as scp, relay(scp.port, delay_s=0.02) as link:
        try:
            one.start()
            one.apply(pacs=dicom(link.port, concurrency=1), archive=folder(tmp_path / "archive"))
            queued = one.told("send", str(tmp_path / "study"), "--to", "pacs,archive", "--no-wait")
            one.until(lambda: len(scp.names()) >= 10)
            if victim == "everything":
                one.kill()
                one.start()
            else:
                one.child(victim).kill()
            done = lambda: (one.home / "receipts" / f"{queued['flow_run_id']}.json").exists()  # noqa: E731
            one.until(lambda: done() and one.run(queued["flow_run_id"])["state"]["type"] == "COMPLETED", 180)
            assert len(scp.files()) == count
            # Each stored instance is one line in the log of storescp: at most the one that was under way comes twice.
            assert scp.log().count("Received Store Request") <= count + 1
            archived = files(tmp_path / "archive" / queued["dispatch_id"])
            assert len(archived) == count + 1 and ".complete" in archived
            assert {p.name for p in (tmp_path / "archive").iterdir()} == {queued["dispatch_id"]}
            assert not list((one.home / "staging").iterdir())
        finally:
            one.stop()


def test_a_dry_run_sends_nothing(up: Talaria, tmp_path: Path) -> None:
    studies.sample(tmp_path / "study")
    up.apply(archive=folder(tmp_path / "archive", exclude="*.json"))
    result = up.told("send", str(tmp_path / "study"), "--to", "archive", "--dry-run", "--exclude", "*.png")
    assert result["dry_run"] and result["targets"]["archive"]["files"] == len(list((tmp_path / "study").rglob("*.dcm")))
    assert not files(tmp_path / "archive")


def test_cancel_stops_within_seconds(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 50, side=64)
    with storescp(tmp_path / "pacs") as scp, relay(scp.port, delay_s=0.1) as link:
        up.apply(pacs=dicom(link.port, concurrency=1))
        queued = up.told("send", str(tmp_path / "study"), "--to", "pacs", "--no-wait")
        up.until(lambda: scp.names())
        up.api("POST", f"/flow_runs/{queued['flow_run_id']}/set_state", state={"type": "CANCELLING"})
        begun = time.monotonic()
        up.until(lambda: up.run(queued["flow_run_id"])["state"]["type"] == "CANCELLED")
        assert time.monotonic() - begun < as_loaded(8)
        assert len(scp.names()) < 50
        shown = up.told("jobs", "show", queued["flow_run_id"])
        assert shown["state"] == "cancelled" and shown["targets"]["pacs"]["unsent"] > 0
        link.delay_s = 0
        assert up.told("jobs", "retry", queued["flow_run_id"])["state"] == "delivered"
        assert len(scp.files()) == 50
        shutil.rmtree(tmp_path / "study")
        gone = up.told("jobs", "retry", queued["flow_run_id"], code=1)  # nothing was missing, and its run has failed
        assert gone["state"] == "delivered" and gone["error"].endswith("study: no such file or folder")


def test_the_server_wants_its_password_and_hides_secrets(up: Talaria, tmp_path: Path) -> None:
    up.apply(cloud={"type": "s3", "bucket": "studies", "access_key_id": "AK", "secret_access_key": "very secret"})
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    ran = subprocess.run(
        [sys.executable, "-c", f"import urllib.request as u; u.urlopen('{up.url}/block_documents/filter', b'{{}}')"],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    assert "401" in ran.stderr
    for path in (up.home / "api.auth", up.home / "encryption.key", up.home / "ledger.sqlite"):
        assert path.stat().st_mode & 0o077 == 0
    assert up.home.stat().st_mode & 0o077 == 0
    listed = (
        up.here("target", "list", "--json").stdout
        + up.here("target", "show", "cloud").stdout
        + up.here("target", "export").stdout
    )
    assert "cloud" in listed and "very secret" not in listed
    for path in up.home.rglob("*"):
        if path.is_file():
            assert b"very secret" not in path.read_bytes(), path


def test_a_study_of_500_images_arrives_whole(up: Talaria, pacs: StoreScp, tmp_path: Path) -> None:
    sent = studies.ct(tmp_path / "study", 500, side=32)
    up.apply(pacs=dicom(pacs.port))
    result = up.told("send", str(tmp_path / "study"), "--to", "pacs")
    assert result["targets"]["pacs"]["delivered"] == 500
    arrived = pacs.files()
    assert len(arrived) == 500
    for path in sent[::50]:
        ds = pydicom.dcmread(path)
        assert pydicom.dcmread(BytesIO(arrived[ds.SOPInstanceUID])).PixelData == ds.PixelData


def test_a_dispatch_waits_for_its_target_s_window_unless_it_is_urgent(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    now = datetime.now(UTC)
    later, end = ((now + timedelta(hours=hours)).strftime("%H:%M") for hours in (2, 3))
    up.apply(archive=folder(tmp_path / "archive", window=f"{later}-{end}"))
    result = up.told("send", str(tmp_path / "study"), "--to", "archive", code=1)
    assert result["state"] == result["targets"]["archive"]["state"] == "waiting"
    state = up.run(result["flow_run_id"])["state"]
    assert state["name"] == "AwaitingRetry"
    begin = datetime.fromisoformat(state["state_details"]["scheduled_time"])
    assert timedelta(hours=1, minutes=58) < begin - now < timedelta(hours=2, minutes=1)
    assert not files(tmp_path / "archive")
    urgent = up.told("send", str(tmp_path / "study"), "--to", "archive", "--priority", "urgent")
    assert urgent["state"] == "delivered" and len(files(tmp_path / "archive")) == 3


def test_no_patient_s_data_is_left_anywhere(up: Talaria, pacs: StoreScp, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    patient = {
        "PatientName": "Solitaire^Unica",
        "PatientID": "SOLO-90210",
        "PatientBirthDate": "19310203",
    }  # no other's
    studies.dicom(tmp_path / "study" / "good.dcm", **patient)
    (tmp_path / "study" / "cut.dcm").write_bytes((tmp_path / "study" / "good.dcm").read_bytes()[:-100])
    up.apply(pacs=dicom(pacs.port), gone=folder(tmp_path / "gone", max_attempts=1))
    (tmp_path / "gone").rmdir()
    up.told("send", str(tmp_path / "study"), "--to", "pacs,gone", code=1)
    kept = [one for one in (up.home / "failed").glob("*/files/*") if one.is_file()]  # to be sent, still
    assert kept
    for path in up.home.rglob("*"):
        if path.is_file() and path not in kept:
            content = path.read_bytes()
            for value in patient.values():
                assert value.encode() not in content, (path, value)
