"""A test of a target with a move of one instance, as commands and the API ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.engine.material import files, folder, source, study
from tests.servers.qr import MOVE, archive
from tests.servers.up import Talaria

# pynetdicom, which the archive sends by, leaves the socket of a connection that is refused to the garbage collector.
pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


def steps(document: dict[str, Any]) -> dict[str, str]:
    return {probe["name"]: probe["result"] for probe in document["probes"]}


def instances(up: Talaria) -> set[str]:
    return {name for name in files(up.home) if name.endswith(".dcm")}


def test_a_worker_has_one_instance_moved_to_it_and_keeps_nothing(up: Talaria, tmp_path: Path) -> None:
    with archive(study("M1"), ports={"TALARIA": int(up.ports["TALARIA_SCP_PORT"])}) as peer:
        up.apply(moves=source(peer, idle_timeout_s=120), moves_not=folder(tmp_path / "shelf"))
        up.until(lambda: up.told("status")["workers"])
        before = instances(up)
        assert "move" not in steps(up.told("target", "test", "moves")) and not peer.asked(MOVE)
        tested = up.told("target", "test", "moves", "--move")
        assert tested["ok"] and steps(tested)["move"] == "ok" and peer.store_answers == [0]
        checks = up.api("POST", "/flow_runs/filter", flow_runs={"name": {"any_": ["check of moves"]}})
        assert {str(one["parameters"].get("move")) for one in checks} == {"None", "True"}
        # Those that are not saved are tested on the server's machine.
        path = tmp_path / "unsaved.yaml"
        path.write_text(
            yaml.safe_dump({"targets": {"new": source(peer, idle_timeout_s=120), "other": folder(tmp_path / "shelf")}})
        )
        ran = up.here("target", "test", "--file", str(path), "--move")
        assert ran.returncode == 0 and "new: move: ok" in ran.stdout and "other: move" not in ran.stdout
        assert len(peer.asked(MOVE)) == 2 and instances(up) <= before
        refused = up.here("target", "test", "moves-not", "--move")
        assert refused.returncode == 2 and "talaria: moves-not: no move can be tested: " in refused.stderr
        assert len(peer.asked(MOVE)) == 2
