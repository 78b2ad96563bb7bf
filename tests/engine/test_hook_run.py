"""rsync and SFTP targets as people see them: broken links, the script at the end, `talaria jobs retry`."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from talaria.testing import studies
from talaria.testing.relay import relay
from tests.servers.openssh import install, shared
from tests.servers.up import Talaria

pytestmark = pytest.mark.timeout(300)
DELAY_S = 1.5  # of the script's own policy
TARGETS = ("by-rsync", "by-sftp")
SCRIPT = """\
date +%s.%N >> "$0.times"
printf '%s\\0' "$@" >> "$0.arguments"
test -e "$1/.complete" || exit 9
echo "a word of the script"
"""


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What would differ if a file were written, replaced or renamed again."""
    found = {}
    for path, _, names in os.walk(folder):
        for name in names:
            if not name.startswith("mercure_complete"):
                info = os.lstat(os.path.join(path, name))
                found[os.path.join(path, name)] = (info.st_ino, info.st_mtime_ns, info.st_ctime_ns)
    return found


def fields(name: str, folder: Path, **more: Any) -> dict[str, Any]:
    server = shared()
    folder.mkdir()
    return {
        "type": name.removeprefix("by-"), "host": "127.0.0.1", "port": server.port, "user": server.user,
        "folder": str(folder), "host_key": server.host_keys[0], "private_key": str(server.key),
        "on_complete": True, "hook_attempts": 2, "hook_retry_delay_s": DELAY_S,
        # The push's own policy must not be the script's.
        "retry_delay_s": 120, "retry_max_delay_s": 120, **more,
    }  # fmt: skip


@pytest.fixture
def folders(up: Talaria, tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / f"in {name}" for name in TARGETS}
    up.apply(**{name.replace("-", "_"): fields(name, folder) for name, folder in found.items()})
    return found


def test_a_retry_runs_only_the_script_that_failed(up: Talaria, folders: dict[str, Path], tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 3)
    install(folders["by-rsync"], SCRIPT + "exit 5")
    install(folders["by-sftp"], SCRIPT + "exit 0")
    result = up.told("send", str(tmp_path / "study"), "--to", ",".join(TARGETS), code=1)
    assert result["state"] == "partial"
    failed, good = (result["targets"][name] for name in TARGETS)
    assert (failed["state"], failed["hook"], failed["delivered"], failed["error"]) == ("partial", "failed", 3, None)
    assert "the script ended with exit code 5: a word of the script" in failed["notes"]
    assert (good["state"], good["hook"], good["delivered"]) == ("delivered", "done", 3)
    first, second = map(float, (folders["by-rsync"] / "mercure_complete.sh.times").read_text().split())
    assert DELAY_S <= second - first < DELAY_S + 20
    assert up.run(result["flow_run_id"])["run_count"] == 2  # it held no place meanwhile
    artifacts = up.api("POST", "/artifacts/filter", flow_runs={"id": {"any_": [result["flow_run_id"]]}})
    found = [one["data"] for one in artifacts if one["key"] == "receipt-details"]  # of each part of the run
    details = "".join(found)
    assert len(found) == 2 and all("the script ended with exit code 5" in one for one in found)
    assert "the script ended with exit code 0" in details
    assert "a word of the script" in details

    before = {name: snapshot(folder) for name, folder in folders.items()}
    assert all(len(one) == 4 for one in before.values())
    install(folders["by-rsync"], SCRIPT + "exit 0")
    again = up.told("jobs", "retry", result["flow_run_id"])
    assert again["state"] == "delivered"
    assert {name: one["hook"] for name, one in again["targets"].items()} == dict.fromkeys(TARGETS, "done")
    assert {name: one["already"] for name, one in again["targets"].items()} == dict.fromkeys(TARGETS, 3)
    assert {name: snapshot(folder) for name, folder in folders.items()} == before
    times = {name: len((folder / "mercure_complete.sh.times").read_text().split()) for name, folder in folders.items()}
    assert times == {"by-rsync": 3, "by-sftp": 1}
    arguments = (folders["by-rsync"] / "mercure_complete.sh.arguments").read_text().split("\0")[:-1]
    assert arguments == [f"{folders['by-rsync']}/{result['dispatch_id']}", "by-rsync"] * 3
    once_more = up.told("jobs", "retry", result["flow_run_id"])
    assert once_more["state"] == "delivered"
    assert times == {
        name: len((folder / "mercure_complete.sh.times").read_text().split()) for name, folder in folders.items()
    }


def test_a_script_that_is_not_there(up: Talaria, folders: dict[str, Path], tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)
    install(folders["by-sftp"], SCRIPT + "exit 0")
    (folders["by-sftp"] / "mercure_complete.sh").chmod(0o644)
    for name in TARGETS:
        health = up.told("target", "test", name, code=1)
        assert [probe["name"] for probe in health["probes"] if probe["result"] == "failed"] == ["hook"]
    result = up.told("send", str(tmp_path / "study"), "--to", ",".join(TARGETS), code=1)
    for name in TARGETS:
        one = result["targets"][name]
        assert (one["state"], one["hook"], one["delivered"], one["attempts"]) == ("partial", "failed", 1, 1)
        assert any("not there, or not executable" in note for note in one["notes"])
        assert (folders[name] / result["dispatch_id"] / ".complete").exists()


@pytest.mark.slow
def test_a_script_that_is_cancelled(up: Talaria, folders: dict[str, Path], tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 2)
    install(folders["by-sftp"], SCRIPT + 'echo $$ > "$0.pid"; exec sleep 200')
    run = up.told("send", str(tmp_path / "study"), "--to", "by-sftp", "--no-wait")["flow_run_id"]
    pid = folders["by-sftp"] / "mercure_complete.sh.pid"
    up.until(lambda: pid.exists() and pid.read_text().strip())
    assert up.here("jobs", "cancel", run).returncode == 0
    up.until(lambda: up.run(run)["state_type"] == "CANCELLED", 20)
    one = up.told("jobs", "show", run)["targets"]["by-sftp"]
    assert (one["state"], one["hook"], one["delivered"]) == ("cancelled", "failed", 2)
    up.until(lambda: not psutil.pid_exists(int(pid.read_text())), 15)
    install(folders["by-sftp"], SCRIPT + "exit 0")
    one = up.told("jobs", "retry", run)["targets"]["by-sftp"]
    assert (one["state"], one["hook"], one["already"]) == ("delivered", "done", 2)


@pytest.mark.slow
def test_a_link_that_breaks_costs_no_whole_file(up: Talaria, tmp_path: Path) -> None:
    size = 40 << 20
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "large.bin").write_bytes(os.urandom(size))
    with ExitStack() as stack:
        links = {name: stack.enter_context(relay(shared().port, cut_after=size // 2)) for name in TARGETS}
        soon = {"retry_delay_s": 0.2, "retry_max_delay_s": 0.5, "on_complete": False}
        up.apply(
            **{
                name.replace("-", "_"): fields(name, tmp_path / name, port=link.port, **soon)
                for name, link in links.items()
            }
        )
        result = up.told("send", str(tmp_path / "study"), "--to", ",".join(TARGETS))
        for name, link in links.items():
            one = result["targets"][name]
            assert (one["state"], one["delivered"], one["attempts"], link.cuts) == ("delivered", 1, 2, 1)
            assert link.sent < size + (10 << 20)
            arrived = tmp_path / name / result["dispatch_id"] / "large.bin"
            assert arrived.read_bytes() == (tmp_path / "study" / "large.bin").read_bytes()
            assert {path.name for path in arrived.parent.iterdir()} == {"large.bin", ".complete"}
