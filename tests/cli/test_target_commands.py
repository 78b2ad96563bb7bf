"""`talaria target`: what it does to targets, what it says, and the codes it ends with."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from talaria.testing import studies
from tests.servers.up import Talaria, talaria
from transfer.home import Home
from transfer.ledger import Ledger

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talaria]:
    with talaria(tmp_path_factory.mktemp("up")) as one:
        yield one


def apply(up: Talaria, *options: str, **targets: dict[str, Any]) -> dict[str, str]:
    """Apply a file; return what was done to each target."""
    path = up.folder / "targets.yaml"
    path.write_text(yaml.safe_dump({"targets": targets}))
    return {one["name"]: one["action"] for one in up.told("target", "apply", str(path), *options)["targets"]}


def spoil(up: Talaria, name: str, **values: Any) -> None:
    """Change a saved target behind its validators' back, as an older version or another client might have."""
    (document,) = up.api("POST", "/block_documents/filter", block_documents={"name": {"any_": [name]}})
    body = {"data": values, "merge_existing_data": True}
    up.as_worker("PATCH", f"/block_documents/{document['id']}", body)


def refused(up: Talaria, *arguments: str) -> str:
    """Run what must be refused as wrong use; return the line that says so."""
    ran = up.here(*arguments)
    assert ran.returncode == 2 and ran.stdout == "", ran
    lines = ran.stderr.strip().splitlines()
    assert len(lines) == 1, ran.stderr
    assert up.told(*arguments, code=2)["error"] == lines[0].removeprefix("talaria: ")
    return lines[0]


def test_apply_says_what_it_did(up: Talaria, tmp_path: Path) -> None:
    shelf = {"type": "folder", "folder": str(tmp_path), "exclude": "*.png", "verify": "listed"}
    cloud = {"type": "s3", "bucket": "studies", "access_key_id": "AK", "secret_access_key": "one"}
    assert apply(up, "--dry-run", shelf=shelf, cloud=cloud) == {"shelf": "created", "cloud": "created"}
    assert apply(up, shelf=shelf, cloud=cloud) == {"shelf": "created", "cloud": "created"}
    (before,) = up.api("POST", "/block_documents/filter", block_documents={"name": {"any_": ["cloud"]}})
    assert apply(up, shelf=shelf, cloud=cloud) == {"shelf": "unchanged", "cloud": "unchanged"}
    (after,) = up.api("POST", "/block_documents/filter", block_documents={"name": {"any_": ["cloud"]}})
    assert after["updated"] == before["updated"]  # nothing was written
    # A secret counts as any other value; one target's change says nothing of the other.
    cloud["secret_access_key"] = "two"
    assert apply(up, shelf=shelf, cloud=cloud) == {"shelf": "unchanged", "cloud": "updated"}
    assert apply(up, shelf={**shelf, "exclude": ""}, cloud=cloud) == {"shelf": "updated", "cloud": "unchanged"}
    as_dicom = {"type": "dicom", "host": "127.0.0.1", "aet_target": "PACS"}
    assert apply(up, "--prune", "--replace", shelf=as_dicom) == {"shelf": "replaced", "cloud": "removed"}
    assert [one["name"] for one in up.told("target", "list")["targets"]] == ["shelf"]
    printed = up.here("target", "apply", str(up.folder / "targets.yaml"), "--dry-run")
    assert printed.stdout == "shelf: unchanged\n"


def test_a_target_that_is_not_valid_any_more_is_listed_as_broken(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)
    pacs = {"type": "dicom", "host": "127.0.0.1", "port": 104, "aet_target": "PACS"}
    apply(up, "--prune", good={"type": "folder", "folder": str(tmp_path)}, old=pacs)
    spoil(up, "old", port=99999, colour="red")
    listed = {one["name"]: one for one in up.told("target", "list")["targets"]}
    assert set(listed) == {"good", "old"} and listed["good"]["broken"] is None
    assert listed["old"]["type"] == "dicom"
    assert "port: must be a number, at least 1 and at most 65535" in listed["old"]["broken"]
    assert "colour" in listed["old"]["broken"]
    printed = up.here("target", "list")
    assert printed.returncode == 0 and "broken" in printed.stdout and "good" in printed.stdout
    assert {one["name"]: bool(one["broken"]) for one in up.told("status")["targets"]} == {"good": False, "old": True}
    # What needs its settings is refused; the rest goes on.
    assert "port" in refused(up, "send", str(tmp_path / "study"), "--to", "good,old")
    assert "port" in refused(up, "target", "show", "old")
    exported = up.here("target", "export")
    assert list(yaml.safe_load(exported.stdout)["targets"]) == ["good"] and "old is left out" in exported.stderr
    tested = {one["name"]: one for one in up.told("target", "test", "--all", code=1)["targets"]}
    assert tested["good"]["ok"] and not tested["old"]["ok"] and "port" in tested["old"]["probes"][0]["detail"]
    # Made by a script at Prefect's API, the dispatch ends with the same words.
    (deployment,) = up.api("POST", "/deployments/filter", flows={"name": {"any_": ["dispatch"]}})
    run = up.api(
        "POST",
        f"/deployments/{deployment['id']}/create_flow_run",
        parameters={"paths": [str(tmp_path / "study")], "targets": ["old"]},
    )
    up.until(lambda: up.run(run["id"])["state"]["type"] == "FAILED")
    assert "its settings are not valid" in up.run(run["id"])["state"]["message"]
    assert apply(up, old=pacs) == {"old": "updated"}
    spoil(up, "old", port=99999)
    up.told("target", "remove", "old")
    assert [one["name"] for one in up.told("target", "list")["targets"]] == ["good"]


def test_wrong_names_are_refused_with_those_that_there_are(up: Talaria, tmp_path: Path) -> None:
    apply(up, "--prune", a={"type": "folder", "folder": str(tmp_path)}, b={"type": "folder", "folder": str(tmp_path)})
    for arguments in (
        ("show", "nobody"),
        ("remove", "nobody"),
        ("enable", "nobody"),
        ("disable", "nobody"),
        ("rename", "nobody", "somebody"),
        ("test", "nobody"),
    ):
        line = refused(up, "target", *arguments)
        assert "no target named nobody" in line and "a, b" in line
    assert "b is there already" in refused(up, "target", "rename", "a", "b")
    assert "lower-case letters" in refused(up, "target", "rename", "a", "B_c")
    assert "--all" in refused(up, "target", "test")
    assert "the target's name is empty" in refused(up, "target", "test", "")
    assert "no target is named; there are: a, b" in refused(up, "target", "disable", "")
    assert "no source is named; there are none yet" in refused(up, "source", "sweep", " ")
    assert "/no/such.yaml" in refused(up, "target", "apply", "/no/such.yaml")
    assert [one["name"] for one in up.told("target", "list")["targets"]] == ["a", "b"]


def test_targets_are_renamed_disabled_exported_and_removed(up: Talaria, tmp_path: Path) -> None:
    first = {"type": "folder", "folder": str(tmp_path), "description": "shelf"}
    cloud = {"type": "s3", "bucket": "studies", "access_key_id": "AK", "secret_access_key": "very secret"}
    apply(up, "--prune", a=first, cloud=cloud)
    assert up.told("target", "test", "a")["ok"]
    assert up.told("target", "rename", "a", "b") == {"name": "b", "action": "renamed from a"}
    assert up.told("target", "disable", "b") == {"name": "b", "action": "disabled"}
    assert up.told("target", "show", "b")["enabled"] is False
    assert [one["name"] for one in up.told("target", "test", "--all", code=1)["targets"]] == ["cloud"]
    assert up.here("target", "enable", "b").stdout == "b: enabled\n"
    exported = up.here("target", "export")
    assert exported.returncode == 0 and "very secret" not in exported.stdout
    document = yaml.safe_load(exported.stdout)
    assert document == up.told("target", "export")
    assert document["targets"]["b"] == first
    # What was exported is what is there, as soon as its secrets are put in again.
    document["targets"]["cloud"]["secret_access_key"] = "very secret"
    assert apply(up, **document["targets"]) == {"b": "unchanged", "cloud": "unchanged"}
    with Ledger(Home(up.home).ledger) as ledger:
        with ledger.together():
            for name in ("b", "cloud"):
                ledger.waits.count(name, "its settings", "no route")
        assert up.told("target", "remove", "b") == {"name": "b", "action": "removed"}
        assert ledger.waits.breaker("b") is None
        apply(up, "--prune", a=first, b=first)
        assert ledger.waits.breaker("cloud") is None
    # A new target begins without the checks of one that had its name.
    assert all(one["last_check"] is None for one in up.told("target", "list")["targets"] if one["name"] in ("a", "b"))


def test_types_are_told_with_what_they_can_do(tmp_path: Path) -> None:
    types = Talaria(tmp_path).told("target", "types")["types"]
    assert len(types) == 8 and all(one["works"] and one["push"] for one in types.values())
    assert types["dicomweb"]["query"] and types["dicomweb"]["pull"]
    assert types["sftp"]["hook"] and types["s3"]["fields"]["secret_access_key"]["secret"]
    assert types["folder"]["fields"]["folder"]["required"] and types["xnat"]["fields"]["host"]["description"]
    printed = Talaria(tmp_path).here("target", "types")
    assert printed.returncode == 0 and all(name in printed.stdout for name in types)


def create(up: Talaria, slug: str, name: str, **data: Any) -> httpx.Response:
    """Save a block document as Prefect's own pages do."""
    kind = up.api("GET", f"/block_types/slug/{slug}")
    (schema, *_) = up.api("POST", "/block_schemas/filter", block_schemas={"block_type_id": {"any_": [kind["id"]]}})
    document = {"name": name, "data": data, "block_type_id": kind["id"], "block_schema_id": schema["id"]}
    user, _, password = (up.home / "api.auth").read_text().strip().partition(":")
    return httpx.post(f"{up.url}/block_documents/", json=document, auth=(user, password), timeout=300)


def make_alike(up: Talaria, slug: str, name: str, **data: Any) -> None:
    """Make a target under a name that is taken, as a Prefect server that isn't ours lets one do."""
    create(up, slug, "for-a-moment", **data).raise_for_status()
    with closing(sqlite3.connect(up.home / "prefect" / "prefect.db", timeout=300)) as db:
        assert db.execute("UPDATE block_document SET name=? WHERE name='for-a-moment'", (name,)).rowcount == 1
        db.commit()


def test_a_name_that_two_targets_have_is_refused_everywhere(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)
    shelf, other = tmp_path / "shelf", tmp_path / "other"
    shelf.mkdir()
    other.mkdir()
    apply(up, "--prune", pacs={"type": "folder", "folder": str(shelf)}, shelf={"type": "folder", "folder": str(other)})
    answer = create(up, "dicomweb-target", "pacs", url=other.as_uri())
    assert answer.status_code == 422 and "pacs is there already, of type Folder" in answer.json()["detail"]
    make_alike(up, "dicomweb-target", "pacs", url=other.as_uri())
    both = "dicomweb/pacs or folder/pacs"
    study = str(tmp_path / "study")
    for arguments in (
        ("send", study, "--to", "pacs"),
        ("send", study, "--to", "shelf,pacs", "--dry-run"),
        ("target", "show", "pacs"),
        ("target", "remove", "pacs"),
        ("target", "enable", "pacs"),
        ("target", "disable", "pacs"),
        ("target", "rename", "pacs", "other"),
        ("target", "test", "pacs"),
    ):
        assert both in refused(up, *arguments), arguments
    assert "pacs" in refused(up, "target", "export")
    assert "pacs" in refused(up, "send", study, "--to", "folder/pacs,dicomweb/pacs")
    # Two are listed, each with its type, and each can be meant by it.
    listed = [(one["name"], one["type"]) for one in up.told("target", "list")["targets"]]
    assert sorted(listed) == [("pacs", "dicomweb"), ("pacs", "folder"), ("shelf", "folder")]
    assert up.told("target", "show", "folder/pacs")["type"] == "folder"
    assert up.told("target", "show", "dicomweb-target/pacs")["type"] == "dicomweb"
    assert up.told("target", "test", "folder/pacs")["ok"]
    assert up.told("send", study, "--to", "folder/pacs")["state"] == "delivered"
    assert list(shelf.glob("*/.complete")) and not list(other.iterdir())
    # One made by a script at Prefect's API is refused by the run.
    (deployment,) = up.api("POST", "/deployments/filter", flows={"name": {"any_": ["dispatch"]}})
    parameters = {"paths": [study], "targets": ["pacs"]}
    run = up.api("POST", f"/deployments/{deployment['id']}/create_flow_run", parameters=parameters)
    up.until(lambda: up.run(run["id"])["state"]["type"] == "FAILED")
    assert both in up.run(run["id"])["state"]["message"]
    # One of them is removed, the other stays.
    assert up.told("target", "remove", "dicomweb-target/pacs")["action"] == "removed"
    assert up.told("target", "show", "pacs")["type"] == "folder"
    assert "no target named" in refused(up, "send", study, "--to", "dicom-target/pacs")
    assert "no target named" in refused(up, "send", study, "--to", "floppy/pacs")


def test_apply_replaces_a_type_only_when_asked(up: Talaria, tmp_path: Path) -> None:
    shelf = {"type": "folder", "folder": str(tmp_path)}
    apply(up, "--prune", shelf=shelf)
    path = up.folder / "other.yaml"
    path.write_text(yaml.safe_dump({"targets": {"new": shelf, "shelf": {"type": "s3", "bucket": "studies"}}}))
    line = refused(up, "target", "apply", str(path))
    assert "folder/shelf would be replaced" in line and "--replace" in line
    assert [(one["name"], one["type"]) for one in up.told("target", "list")["targets"]] == [("shelf", "folder")]
    done = up.told("target", "apply", str(path), "--replace")["targets"]
    assert done == [{"name": "new", "action": "created"}, {"name": "shelf", "action": "replaced"}]
    assert up.told("target", "show", "shelf")["type"] == "s3"
    make_alike(up, "folder-target", "shelf", folder=str(tmp_path))
    assert apply(up, "--replace", shelf=shelf) == {"shelf": "replaced"}
    assert [(one["name"], one["type"]) for one in up.told("target", "list")["targets"]][1:] == [("shelf", "folder")]


@contextmanager
def refuses(up: Talaria, what: str) -> Iterator[None]:
    """Let the server's database refuse something of block documents, as a full disk or a kill at that moment would."""
    with closing(sqlite3.connect(up.home / "prefect" / "prefect.db", timeout=300)) as db:
        db.execute(f"CREATE TRIGGER no BEFORE {what} ON block_document BEGIN SELECT RAISE(ABORT, 'no'); END")
        try:
            yield
        finally:
            db.execute("DROP TRIGGER no")


def types_of(up: Talaria, kind: str, name: str) -> list[str]:
    return sorted(one["type"] for one in up.told(kind, "list")[f"{kind}s"] if one["name"] == name)


def test_what_is_replaced_is_there_until_the_new_one_is(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)
    place = {"type": "folder", "folder": str(tmp_path / "nowhere"), "max_attempts": 1}
    inbox = {"type": "inbox", "folder": str(tmp_path / "study"), "targets": ["elsewhere"], "enabled": False}
    paths = tmp_path / "list.csv"
    paths.write_text("path\n")
    listed = {"type": "list", "file": str(paths), "targets": ["elsewhere"], "enabled": False}
    kinds = {"target": ({"type": "s3", "bucket": "studies"}, place), "source": (inbox, listed)}
    apply(up, "--prune", elsewhere=place)
    for kind, (old, new) in kinds.items():
        path = up.folder / "one.yaml"

        def applied(values: dict[str, Any], code: int, kind: str = kind, path: Path = path) -> Any:
            path.write_text(yaml.safe_dump({f"{kind}s": {"one": values}}))
            return up.told(kind, "apply", str(path), "--replace", code=code)

        applied(old, 0)
        with refuses(up, "INSERT"):
            applied(new, 3)
        assert types_of(up, kind, "one") == [old["type"]]
        with refuses(up, "DELETE"):
            applied(new, 3)
        assert types_of(up, kind, "one") == sorted([old["type"], new["type"]])
        if kind == "source":
            line = refused(up, "source", "show", "one")
            assert "2 sources are named one: write inbox/one or list/one, and remove one" in line
        new["description"] = "again"
        assert applied(new, 0)[f"{kind}s"] == [{"name": "one", "action": "replaced"}]
        assert types_of(up, kind, "one") == [new["type"]]
    up.told("source", "remove", "one")


def test_an_empty_or_ambiguous_id_is_refused_with_the_candidates(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)
    apply(up, "--prune", shelf={"type": "folder", "folder": str(tmp_path / "nowhere"), "max_attempts": 1})
    sent = [up.told("send", str(tmp_path / "study"), "--to", "shelf", code=1) for _ in range(2)]
    runs = [one["flow_run_id"] for one in sent]
    for command in ("show", "cancel", "retry"):
        for job in ("", "  ", sent[0]["dispatch_id"]):
            line = refused(up, "jobs", command, job)
            assert all(run in line for run in runs), line
        assert "no job zz" in refused(up, "jobs", command, "zz")
    ids = [one["id"] for one in up.told("jobs", "list")["jobs"]]
    needed = next(n for n in range(1, 37) if sum(one.startswith(runs[0][:n]) for one in ids) == 1)
    assert up.told("jobs", "show", runs[0][:needed].upper())["flow_run_id"] == runs[0]
    if needed > 1:
        line = refused(up, "jobs", "cancel", runs[0][: needed - 1])
        assert all(one in line for one in ids if one.startswith(runs[0][: needed - 1]))
    assert {up.run(run)["state"]["type"] for run in runs} == {"FAILED"}
