"""Retrievals as people make them: a list from an archive, to targets or a folder; paused, killed, repaired."""

from __future__ import annotations

import csv
import json
import threading
from pathlib import Path

import pytest

from talaria.testing import studies
from tasks.retrieve.job import size_of
from tests.engine.material import FAST, files, folder, go_on, later, placed, source, study
from tests.servers.dcmtk import storescp
from tests.servers.orthanc import orthanc
from tests.servers.qr import FIND, GET, Holding, Instance, Last, Request, Send, Steps, archive, sends
from tests.servers.up import Talaria

pytestmark = pytest.mark.timeout(900)


def test_a_list_goes_to_targets_and_what_is_missing_or_partial_is_repaired_by_retry(
    up: Talaria, tmp_path: Path
) -> None:
    data = {f"ACC{n}": study(f"ACC{n}", StudyDescription="Thorax") for n in range(4)}
    broken = Instance.of(data["ACC2"][0]).uid
    lost = [broken]

    def script(request: Request, found: list[Instance]) -> Steps:
        there = [one for one in found if one.uid not in lost]
        failed = len(found) - len(there)
        return [*(Send(one) for one in there), Last(0xB000 if failed else 0, len(there), failed, 0)]

    listed = tmp_path / "list.csv"
    listed.write_text('\ufeff"Accession Number"\r\n"ACC0"\r\nACC1\tACC2\r\nACC1, NOPE\r\n', encoding="utf-8")
    with (
        archive([one for each in data.values() for one in each], on_get=script) as peer,
        storescp(tmp_path / "b") as pacs,
    ):
        pacs_target = {"type": "dicom", "host": "127.0.0.1", "port": pacs.port, "aet_target": "STORESCP", **FAST}
        up.apply(src=source(peer), pacs=pacs_target, arch=folder(tmp_path / "arch"))
        result = up.told("retrieve", "src", "--accession-file", str(listed), "--to", "pacs,arch", code=1)
        assert (result["state"], result["found"], result["delivered"]) == ("partial", 3, 2)
        assert result["missing"] == ["NOPE"] and result["partial"] == ["ACC2"] and result["failed"] == []
        wanted = {Instance.of(one).uid for name in ("ACC0", "ACC1") for one in data[name]}
        assert pacs.files().keys() == wanted
        by_number = {one["accession"]: one for one in result["studies"]}
        assert by_number["ACC0"]["targets"] == {"pacs": "delivered", "arch": "delivered"}
        assert by_number["ACC2"]["missing"] == 1 and "missing" in by_number["ACC2"]["reason"]
        assert by_number["ACC0"]["notes"] == ["retrieved by C-GET, which the peer grants"]
        table = (up.home / "receipts" / f"{result['flow_run_id']}.csv").read_text(encoding="utf-8")
        rows = list(csv.DictReader(table.splitlines()))
        assert {row["accession"]: row["state"] for row in rows} == {
            "ACC0": "delivered", "ACC1": "delivered", "ACC2": "partial", "NOPE": "missing",
        }  # fmt: skip
        shown = up.told("jobs", "show", result["flow_run_id"])
        assert shown["studies"] == result["studies"]
        assert up.told("jobs", "list")["jobs"][0]["kind"] == "retrieval"
        seen = json.dumps([up.run(result["flow_run_id"]), up.api("POST", "/artifacts/filter"), result])
        assert not any(value in seen for value in studies.PHI)
        # The source has found what it had lost: a retry fetches that, and nothing that was delivered.
        lost.clear()
        before = len(peer.asked(GET))
        again = up.told("jobs", "retry", result["flow_run_id"], code=1)
        assert (again["state"], again["delivered"], again["missing"]) == ("partial", 3, ["NOPE"])
        asked = {str(request.keys.StudyInstanceUID) for request in peer.asked(GET)[before:]}
        assert asked == {by_number["ACC2"]["study"]}
        assert pacs.files().keys() == wanted | {Instance.of(one).uid for one in data["ACC2"]}
        assert not list((up.home / "staging").iterdir())


def test_the_tour_ten_numbers_from_one_archive_to_another_and_a_folder(up: Talaria, tmp_path: Path) -> None:
    """README's tour with real servers: filtered, one study missing, one partial, repaired by retry."""
    data = {f"T{n}": tour_study(f"T{n}") for n in range(10)}
    late = data.pop("T9")
    in_memory = {"MaximumStorageCacheSize": 0}  # MB of files that it need not read from its disk
    with orthanc(tmp_path / "first", settings=in_memory) as first, orthanc(tmp_path / "second") as second:
        for file in (one for each in data.values() for one in each):
            first.request("POST", "/instances", file)
        wanted = {Instance.of(one).uid for each in [*data.values(), late] for one in each if b"axial T1" in one}
        # What Orthanc lists and can't give: one file of T4's is gone from its disk.
        lost = Instance.of(next(one for one in data["T4"] if b"axial T1" in one)).uid
        [kept] = [
            path for path in (first.folder / "storage").glob("??/??/*") if lost.encode() in path.read_bytes()[:4000]
        ]
        away = kept.rename(tmp_path / "away")
        up.apply(
            pacs={"type": "dicom", "host": "127.0.0.1", "port": first.dicom_port, "aet_target": first.aet,
                  "direction": "query", **FAST},
            second={"type": "dicom", "host": "127.0.0.1", "port": second.dicom_port, "aet_target": second.aet, **FAST},
            archive=folder(tmp_path / "archive"),
        )  # fmt: skip
        listed = tmp_path / "list.csv"
        listed.write_text("\ufeffName;Accession Number\r\n" + "".join(f"x;T{n}\r\n" for n in range(10)))
        arguments = ["--accession-file", str(listed), "--series-description", "axial T1", "--to", "second,archive"]
        result = up.told("retrieve", "pacs", *arguments, code=1)
        assert (result["state"], result["found"], result["delivered"]) == ("partial", 9, 8)
        assert (result["missing"], result["partial"], result["failed"]) == (["T9"], ["T4"], [])
        partial = {Instance.of(one).uid for one in data["T4"] + late}
        assert second.uids() == wanted - partial
        away.rename(kept)
        for file in late:
            first.request("POST", "/instances", file)
        again = up.told("jobs", "retry", result["flow_run_id"])
        assert (again["state"], again["found"], again["delivered"]) == ("delivered", 10, 10)
        assert second.uids() == wanted
        archived = list((tmp_path / "archive").rglob("*.dcm"))
        assert sorted(path.stem for path in archived) == sorted(wanted)
        assert {(one["instances"], one["missing"]) for one in again["studies"]} == {(2, 0)}
        assert sum(one["bytes"] for one in again["studies"]) == sum(path.stat().st_size for path in archived)


def tour_study(accession: str) -> list[bytes]:
    uid = studies.uid()
    return [
        studies.encoded(
            studies.dataset(study=uid, series=series, AccessionNumber=accession, SeriesDescription=description)
        )
        for series, description in ((studies.uid(), "axial T1"), (studies.uid(), "localizer"))
        for _ in range(2)
    ]


def test_a_folder_is_measured_while_its_files_are_moved_away(tmp_path: Path) -> None:
    (tmp_path / "1.dcm").write_bytes(b"12345")
    (tmp_path / "2.dcm").symlink_to(tmp_path / "gone")  # listed, and not there any more when it is looked at
    assert size_of(tmp_path) == (1, 5)
    assert size_of(tmp_path / "gone") == (0, 0)


def test_into_a_folder_by_accession_and_series_with_filters(up: Talaria, tmp_path: Path) -> None:
    data = [*study("B1", SeriesDescription="T1"), *study("B2", SeriesDescription="T2, axial"), *study("B3")]
    with archive(data) as peer:
        up.apply(src=source(peer))
        into = tmp_path / "into"
        arguments = ["--accession", "B1 B2;B3", "--series-description", '"T2, axial",T1', "--into", str(into)]
        result = up.told("retrieve", "src", *arguments, code=1)
        assert result["delivered"] == 2 and result["missing"] == ["B3"]
        assert placed(into).keys() == {"B1", "B2"}
        for one in peer.instances:
            path = into / str(one.ds.AccessionNumber) / str(one.ds.SeriesInstanceUID) / f"{one.uid}.dcm"
            assert path.exists() == (one.ds.AccessionNumber != "B3")
            assert not path.exists() or path.read_bytes().endswith(one.data)


def test_a_patients_name_is_in_no_run(up: Talaria, tmp_path: Path) -> None:
    with archive(study("C1")) as peer:
        up.apply(src=source(peer))
        query = up.told("query", "src", "--patient-name", studies.PATIENT_NAME)
        assert [match["PatientID"] for match in query["matches"]] == [studies.PATIENT_ID]
        shown = up.here("query", "src", "--patient-name", studies.PATIENT_NAME)
        assert "1 study\n" in shown.stdout + shown.stderr
        arguments = ["--patient-name", studies.PATIENT_NAME, "--into", str(tmp_path / "into")]
        result = up.told("retrieve", "src", *arguments)
        assert result["delivered"] == 1
        assert not any(value in json.dumps(up.run(result["flow_run_id"])) for value in studies.PHI)
        logs = json.dumps(up.api("POST", "/logs/filter")) + up.log.read_text()
        assert not any(value in logs for value in studies.PHI)


def test_a_name_that_the_archive_does_not_show_in_full_is_found_and_that_is_said(up: Talaria) -> None:
    names = study("K1", SpecificCharacterSet="ISO_IR 192", PatientName="Павлов^Иван")
    with archive([*names, *study("K2")], answer_charset=("ISO_IR 100", "ISO_IR 100")) as peer:
        up.apply(src=source(peer))
        ran = up.here("query", "src", "--patient-name", "Павлов*")
        assert ran.returncode == 0 and "K1" in ran.stdout and "K2" not in ran.stdout
        assert "1 study\n1 of them: the peer matches PatientName, and shows it in ISO_IR 100" in ran.stderr


def test_of_a_patients_studies_only_those_that_a_file_lists_come(up: Talaria, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text('H1\n"H 2"\nH9')
    with archive([*study("H1"), *study("H 2"), *study("H3")]) as peer:
        up.apply(src=source(peer))
        arguments = ["--accession-file", str(tmp_path / "list.csv"), "--patient-name", studies.PATIENT_NAME]
        result = up.told("retrieve", "src", *arguments, "--into", str(tmp_path / "into"), code=1)
        assert (result["delivered"], result["missing"]) == (2, ["H9"])
        assert placed(tmp_path / "into").keys() == {"H1", "H 2"}


def test_a_study_uid_that_nothing_matches_is_missing_until_a_retry_finds_it(up: Talaria, tmp_path: Path) -> None:
    with archive([*study("L1"), *study("L2")]) as peer:
        up.apply(src=source(peer))
        uids = list(dict.fromkeys(str(one.ds.StudyInstanceUID) for one in peer.instances))
        later = [one for one in peer.instances if one.ds.StudyInstanceUID == uids[1]]
        peer.instances = [one for one in peer.instances if one not in later]
        into = str(tmp_path / "into")
        result = up.told("retrieve", "src", "--study-uid", ",".join([*uids, uids[0]]), "--into", into, code=1)
        assert (result["state"], result["found"], result["missing"]) == ("partial", 1, [uids[1]])
        [row] = result["accessions"]
        assert (row["study"], row["state"]) == (uids[1], "missing")
        peer.instances += later
        again = up.told("jobs", "retry", result["flow_run_id"])
        assert (again["state"], again["delivered"], again["missing"]) == ("delivered", 2, [])
        assert placed(tmp_path / "into").keys() == {"L1", "L2"}


def test_a_search_as_a_run_lists_uids_and_no_patient(up: Talaria) -> None:
    with archive([*study("G1"), *study("G2")]) as peer:
        up.apply(src=source(peer))
        deployment = up.api("GET", "/deployments/name/find/talaria")
        shown = deployment["parameter_openapi_schema"]["properties"]
        assert {"source", "accessions", "study_date", "level"} <= shown.keys()
        # As a person fills the form, with a blank line that was added and left.
        parameters = {"source": "src ", "accessions": "G1\nG2 G3", "level": "series", "study_descriptions": [""]}
        run = up.api("POST", f"/deployments/{deployment['id']}/create_flow_run", parameters=parameters)
        up.until(lambda: up.run(run["id"])["state_type"] in ("COMPLETED", "FAILED"), 120)
        assert up.run(run["id"])["state"]["message"] == "4 series at src"
        [artifact] = up.api("POST", "/artifacts/filter", flow_runs={"id": {"any_": [run["id"]]}})
        rows = json.loads(artifact["data"])
        assert sorted(row["AccessionNumber"] for row in rows) == ["G1", "G1", "G2", "G2"]
        assert {row["instances"] for row in rows} == {2}
        assert not any(value in json.dumps(artifact) for value in studies.PHI)


def test_a_search_as_a_run_waits_for_a_slot_of_its_source(up: Talaria, tmp_path: Path) -> None:
    held = Holding()
    with archive(study("W1"), on_get=held) as peer:
        up.apply(one_slot=source(peer, max_dispatches=1))
        deployment = up.api("GET", "/deployments/name/find/talaria")
        fetch = up.told("retrieve", "one-slot", "--accession", "W1", "--into", str(tmp_path / "into"), "--no-wait")
        assert held.asked.wait(120)
        asked = len(peer.asked(FIND))
        parameters = {"source": "one-slot", "accessions": "W1"}
        run = up.api("POST", f"/deployments/{deployment['id']}/create_flow_run", parameters=parameters)
        up.until(lambda: "a slot at one-slot" in (up.run(run["id"])["state"]["message"] or ""), 60)
        assert up.run(run["id"])["state_name"] == "AwaitingRetry" and len(peer.asked(FIND)) == asked
        held.go_on.set()
        up.until(lambda: up.run(run["id"])["state_type"] == "COMPLETED", 60)
        assert up.run(run["id"])["state"]["message"] == "1 study at one-slot"
        up.until(lambda: up.run(fetch["flow_run_id"])["state_type"] == "COMPLETED", 60)


@pytest.mark.parametrize("name", ["find", "retrieve"])
def test_a_form_says_of_each_field_what_it_is_for_and_needs_the_source_only(up: Talaria, name: str) -> None:
    schema = up.api("GET", f"/deployments/name/{name}/talaria")["parameter_openapi_schema"]
    assert schema["required"] == ["source"]
    for field, shown in schema["properties"].items():
        assert shown["title"] != field and shown["title"][0].isupper() and "_" not in shown["title"]
        assert shown["description"][0].isupper() or shown["description"][0] == "`"
        assert field == "source" or shown["default"] in ("", [], 0, "normal", "study")
    choice = schema["properties"]["level" if name == "find" else "priority"]
    assert choice["enum"] == (["study", "series"] if name == "find" else ["normal", "offpeak"])
    assert schema["properties"]["accessions"]["title"] == "Accession numbers"


def test_a_retrieval_s_form_with_the_obvious_fields_only(up: Talaria, tmp_path: Path) -> None:
    with archive([*study("Q1"), *study("Q2")]) as peer:
        up.apply(src=source(peer), arch=folder(tmp_path / "arch"))
        deployment = up.api("GET", "/deployments/name/retrieve/talaria")
        parameters = {"source": "src", "accessions": "Accession\r\nQ1\r\n'Q2\r\n", "targets": [" arch", ""]}
        run = up.api("POST", f"/deployments/{deployment['id']}/create_flow_run", parameters=parameters)
        up.until(lambda: up.run(run["id"])["state_type"] in ("COMPLETED", "FAILED"), 120)
        assert up.run(run["id"])["state"]["message"] == "2 studies found, 2 delivered"
        archived = {path.stem for path in (tmp_path / "arch").rglob("*.dcm")}
        assert archived == {one.uid for one in peer.instances}


def test_a_pause_ends_after_the_running_series_and_resume_goes_on_there(up: Talaria, tmp_path: Path) -> None:
    held = Holding()
    with archive(study("D1", series=3), on_get=held) as peer:
        up.apply(src=source(peer, concurrency=1))
        queued = up.told("retrieve", "src", "--accession", "D1", "--into", str(tmp_path / "into"), "--no-wait")
        run_id = queued["flow_run_id"]
        assert held.asked.wait(120)
        assert up.told("jobs", "pause", run_id)["action"] == "pausing"
        # The worker looks once a second; the series goes on until then and beyond.
        up.until(lambda: up.run(run_id)["state_name"] == "Pausing")
        threading.Timer(3, held.go_on.set).start()
        up.until(lambda: up.run(run_id)["state_name"] == "Paused", 120)
        assert len(peer.asked(GET)) == 1 and not (tmp_path / "into" / "D1").exists()
        assert up.told("jobs", "show", run_id)["state"] == "paused"
        job = json.loads((up.home / "retrievals" / run_id / "job.json").read_text())
        assert len(placed(Path(job["spool"]))["spool"]) == 2  # is known where, should nobody resume it
        result = up.told("jobs", "resume", run_id)
        assert result["state"] == "delivered" and len(peer.asked(GET)) == 3
        assert len(placed(tmp_path / "into")["D1"]) == 6


def test_cancelling_releases_the_association_within_seconds_and_a_retry_fetches_the_rest(
    up: Talaria, tmp_path: Path
) -> None:
    from tests.servers.steps import Silence

    held = threading.Event()

    def script(request: Request, found: list[Instance]) -> Steps:
        if request.number > 1:
            return sends(found)
        held.set()
        return [Send(found[0]), Silence()]

    with archive(study("E1", series=1, each=4), on_get=script) as peer:
        up.apply(src=source(peer, idle_timeout_s=600))
        queued = up.told("retrieve", "src", "--accession", "E1", "--into", str(tmp_path / "into"), "--no-wait")
        assert held.wait(120)
        up.told("jobs", "cancel", queued["flow_run_id"])
        assert peer.wait_closed()
        up.until(lambda: up.run(queued["flow_run_id"])["state_type"] == "CANCELLED", 60)
        shown = up.told("jobs", "show", queued["flow_run_id"])
        assert (shown["state"], shown["cancelled"], shown["waiting"]) == ("cancelled", ["E1"], [])
        result = up.told("jobs", "retry", queued["flow_run_id"])
        assert result["state"] == "delivered" and len(placed(tmp_path / "into")["E1"]) == 4
        assert peer.asked(GET)[1].level == "IMAGE"  # what had come is not fetched again


def test_what_a_kill_interrupts_is_taken_up_and_nothing_delivered_is_fetched_again(up: Talaria, tmp_path: Path) -> None:
    held, killed = threading.Event(), threading.Event()

    def script(request: Request, found: list[Instance]) -> Steps:
        if request.number == 2:
            held.set()
            killed.wait(120)
        return sends(found)

    with archive([*study("F1", series=1), *study("F2", series=1)], on_get=script) as peer:
        up.apply(src=source(peer))
        into = tmp_path / "into"
        queued = up.told("retrieve", "src", "--accession", "F1,F2", "--into", str(into), "--no-wait")
        assert held.wait(120)
        up.until(lambda: len(placed(into).get("F1", ())) == 2, 60)
        up.kill()
        killed.set()
        up.start()
        up.until(lambda: up.run(queued["flow_run_id"])["state_type"] == "COMPLETED", 240)
        assert {name: len(there) for name, there in placed(into).items()} == {"F1": 2, "F2": 2}
        asked = [str(request.keys.StudyInstanceUID) for request in peer.asked(GET)]
        first = str(next(one.ds.StudyInstanceUID for one in peer.instances if one.ds.AccessionNumber == "F1"))
        assert asked.count(first) == 1
        assert not [name for name in files(into) if ".talaria" in name]


@pytest.fixture(scope="module")
def three(up: Talaria, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Apply a source, a target that only stores and a folder, once for all that is refused."""
    pacs = {"type": "dicom", "host": "127.0.0.1", "port": 1, "aet_target": "X"}
    up.apply(src=pacs | {"direction": "query"}, pacs=pacs, arch=folder(tmp_path_factory.mktemp("arch")))


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nobody", "--accession", "A", "--into", "INTO"], "nobody"),
        (["arch", "--accession", "A", "--into", "INTO"], "can't be queried"),
        (["pacs", "--accession", "A", "--into", "INTO"], "direction store"),
        (["src", "--accession", "A"], "--to"),
        (["src", "--accession", "A", "--to", "arch", "--into", "INTO"], "--to"),
        (["src", "--into", "INTO"], "nothing to look for"),
        (["src", "--patient-name", "*^*", "--into", "INTO"], "nothing to look for"),
        (["src", "--study-date", "soon", "--into", "INTO"], "study date"),
        (["src", "--study-date", "20240231", "--into", "INTO"], "20240231 is not a date"),
        (["src", "--study-date", "20240131-20240101", "--into", "INTO"], "ends before it begins"),
        (["src", "--accession", "A", "--into", "/no/such/folder"], "there is no folder /no/such"),
        (["src", "--accession", "A", "--into", "/etc/passwd"], "/etc/passwd is not a folder"),
        (["src", "--accession-file", "/no/such/file", "--into", "INTO"], "/no/such/file"),
    ],
)
def test_bad_input_is_refused_in_one_line(up: Talaria, tmp_path: Path, arguments: list[str], word: str) -> None:
    ran = up.here("retrieve", *(str(tmp_path / "into") if one == "INTO" else one for one in arguments))
    assert ran.returncode == 2 and ran.stdout == ""
    assert word in ran.stderr and len(ran.stderr.strip().splitlines()) == 1


def test_a_retrieval_waits_for_its_source_s_hours(up: Talaria, tmp_path: Path) -> None:
    with archive(study("W1", series=1)) as peer:
        up.apply(src=source(peer, window=later(2)))
        queued = up.told("retrieve", "src", "--accession", "W1", "--into", str(tmp_path / "into"), "--no-wait")
        run_id = queued["flow_run_id"]
        up.until(lambda: up.run(run_id)["state_name"] == "AwaitingRetry", 120)
        assert up.told("jobs", "show", run_id)["waiting"] == ["W1"] and not peer.requests
        up.apply(src=source(peer))
        go_on(up, run_id)
        up.until(lambda: up.run(run_id)["state_type"] == "COMPLETED", 120)
        assert len(placed(tmp_path / "into")["W1"]) == 2
