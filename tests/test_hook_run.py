"""The script at the end as people see it: `talaria send`, a failure, `talaria jobs retry`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import studies
from tests.servers.openssh import shared
from tests.servers.up import Talaria, talaria

pytestmark = pytest.mark.timeout(300)
DELAY_S = 1.5  # of the script's own policy
TARGETS = ("by-rsync", "by-sftp")
SCRIPT = """#!/bin/sh
date +%s.%N >> "$0.times"
printf '%s\\0' "$@" >> "$0.arguments"
test -e "$1/.complete" || exit 9
echo "a word of the script"
{end}
"""


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talaria]:
    with talaria(tmp_path_factory.mktemp("up")) as one:
        yield one


def install(folder: Path, end: str) -> None:
    script = folder / "mercure_complete.sh"
    script.write_text(SCRIPT.replace("{end}", end))
    script.chmod(0o755)


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What would differ if a file were written, replaced or renamed again."""
    found = {}
    for path, _, names in os.walk(folder):
        for name in names:
            if not name.startswith("mercure_complete"):
                info = os.lstat(os.path.join(path, name))
                found[os.path.join(path, name)] = (info.st_ino, info.st_mtime_ns, info.st_ctime_ns)
    return found


@pytest.fixture
def folders(up: Talaria, tmp_path: Path) -> dict[str, Path]:
    server = shared()
    found, targets = {}, {}
    for name in TARGETS:
        found[name] = tmp_path / f"in {name}"
        found[name].mkdir()
        fields: dict[str, Any] = {
            "type": name.removeprefix("by-"), "host": "127.0.0.1", "port": server.port, "user": server.user,
            "folder": str(found[name]), "host_key": server.host_keys[0], "private_key": str(server.key),
            "on_complete": True, "hook_attempts": 2, "hook_retry_delay_s": DELAY_S,
            # The push's own policy must not be the script's.
            "retry_delay_s": 120, "retry_max_delay_s": 120,
        }  # fmt: skip
        targets[name.replace("-", "_")] = fields
    up.apply(**targets)
    return found


def test_a_retry_runs_only_the_script_that_failed(up: Talaria, folders: dict[str, Path], tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 3)
    install(folders["by-rsync"], "exit 5")
    install(folders["by-sftp"], "exit 0")
    result = up.json("send", str(tmp_path / "study"), "--to", ",".join(TARGETS), code=1)
    assert result["state"] == "partial"
    failed, good = (result["targets"][name] for name in TARGETS)
    assert (failed["state"], failed["hook"], failed["delivered"], failed["error"]) == ("partial", "failed", 3, None)
    assert "the script ended with exit code 5" in failed["notes"]
    assert (good["state"], good["hook"], good["delivered"]) == ("delivered", "done", 3)
    first, second = map(float, (folders["by-rsync"] / "mercure_complete.sh.times").read_text().split())
    assert DELAY_S <= second - first < DELAY_S + 20
    artifacts = up.api("POST", "/artifacts/filter", flow_runs={"id": {"any_": [result["flow_run_id"]]}})
    (details,) = (one["data"] for one in artifacts if one["key"] == "receipt-details")
    assert "the script ended with exit code 5" in details
    assert "the script ended with exit code 0" in details
    assert "a word of the script" in details

    before = {name: snapshot(folder) for name, folder in folders.items()}
    assert all(len(one) == 4 for one in before.values())
    install(folders["by-rsync"], "exit 0")
    again = up.json("jobs", "retry", result["flow_run_id"])
    assert again["state"] == "delivered"
    assert {name: one["hook"] for name, one in again["targets"].items()} == dict.fromkeys(TARGETS, "done")
    assert {name: one["already"] for name, one in again["targets"].items()} == dict.fromkeys(TARGETS, 3)
    assert {name: snapshot(folder) for name, folder in folders.items()} == before
    times = {name: len((folder / "mercure_complete.sh.times").read_text().split()) for name, folder in folders.items()}
    assert times == {"by-rsync": 3, "by-sftp": 1}
    arguments = (folders["by-rsync"] / "mercure_complete.sh.arguments").read_text().split("\0")[:-1]
    assert arguments == [f"{folders['by-rsync']}/{result['dispatch_id']}", "by-rsync"] * 3
    once_more = up.json("jobs", "retry", result["flow_run_id"])
    assert once_more["state"] == "delivered"
    assert times == {
        name: len((folder / "mercure_complete.sh.times").read_text().split()) for name, folder in folders.items()
    }


def test_a_script_that_is_not_there(up: Talaria, folders: dict[str, Path], tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)
    install(folders["by-sftp"], "exit 0")
    (folders["by-sftp"] / "mercure_complete.sh").chmod(0o644)
    for name in TARGETS:
        health = up.json("target", "test", name, code=1)
        assert [probe["name"] for probe in health["probes"] if probe["result"] == "failed"] == ["hook"]
    result = up.json("send", str(tmp_path / "study"), "--to", ",".join(TARGETS), code=1)
    for name in TARGETS:
        one = result["targets"][name]
        assert (one["state"], one["hook"], one["delivered"], one["attempts"]) == ("partial", "failed", 1, 1)
        assert any("not there, or not executable" in note for note in one["notes"])
        assert (folders[name] / result["dispatch_id"] / ".complete").exists()
