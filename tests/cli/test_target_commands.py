"""`talaria target`: what it does to targets, what it says, and the codes it ends with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import studies
from tests.servers.up import Talaria, talaria

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
    up.api("PATCH", f"/block_documents/{document['id']}", data=values, merge_existing_data=True)


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
    assert apply(up, "--prune", shelf=as_dicom) == {"shelf": "updated", "cloud": "removed"}
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
    assert up.told("target", "remove", "b") == {"name": "b", "action": "removed"}
    apply(up, a=first, b=first)
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
