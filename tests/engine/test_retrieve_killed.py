"""A worker that is killed while a retrieval hands on what it has fetched."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from tests.engine.material import FAST, files, folder, source, study
from tests.servers.qr import GET, Instance, archive
from tests.servers.scp import scp
from tests.servers.steps import Abort, Script, Store
from tests.servers.up import Talaria

pytestmark = pytest.mark.timeout(900)


def confirmed(up: Talaria, uids: set[str]) -> int:
    """How many outcomes of these instances the ledger has, over all targets."""
    with closing(sqlite3.connect(up.home / "ledger.sqlite", timeout=60)) as ledger:
        rows = ledger.execute("SELECT sop_instance_uid FROM items").fetchall()
    return sum(uid in uids for (uid,) in rows)


def test_what_was_whole_is_delivered_once_and_not_fetched_again(up: Talaria, tmp_path: Path) -> None:
    """Of one study the archive has everything and the PACS two of four, the other has arrived, when the worker dies."""
    data = {name: study(name, series=1, each=4) for name in ("K1", "K2")}
    uids = {name: {Instance.of(one).uid for one in each} for name, each in data.items()}
    held, killed = threading.Event(), threading.Event()

    def store(request: Store) -> Script:
        came = [one for one in pacs.stores if one.SOPInstanceUID in uids["K1"]]
        if len(came) != 3 or request.SOPInstanceUID not in uids["K1"] or killed.is_set():
            return 0
        held.set()
        killed.wait(300)
        return Abort()

    with archive([*data["K1"], *data["K2"]]) as peer, scp(on_store=store) as pacs:
        up.apply(
            src=source(peer),
            pacs={"type": "dicom", "host": "127.0.0.1", "port": pacs.port, "aet_target": pacs.aet, "concurrency": 1,
                  "pass_sender_aet": True, **FAST, "idle_timeout_s": 600},
            arch=folder(tmp_path / "arch"),
        )  # fmt: skip
        run_id = up.told("retrieve", "src", "--accession", "K1,K2", "--to", "pacs,arch", "--no-wait")["flow_run_id"]
        every = uids["K1"] | uids["K2"]
        up.until(lambda: held.is_set() and confirmed(up, every) == 2 * len(every) - 2)
        up.child("talaria.engine.worker").kill()
        killed.set()
        up.until(lambda: up.run(run_id)["state_type"] in ("COMPLETED", "FAILED"), 240)
        result = up.told("jobs", "show", run_id)
        assert (result["state"], result["found"], result["delivered"]) == ("delivered", 2, 2)
        assert {(one["instances"], one["missing"], one["reason"]) for one in result["studies"]} == {(4, 0, "")}
        assert all(one["targets"] == {"pacs": "delivered", "arch": "delivered"} for one in result["studies"])
        # Nothing was fetched or sent again, but what the PACS had no time to confirm.
        assert set(Counter(str(one.keys.StudyInstanceUID) for one in peer.asked(GET)).values()) == {1}
        assert not pacs.repeated and pacs.kept.keys() == every
        sent = Counter(one.SOPInstanceUID for one in pacs.stores)
        assert sorted(sent.values()) == [1] * 7 + [2]
        # The dispatches' sender is the queried node.
        assert {one.proposal.calling for one in pacs.associations if one.proposal} == {peer.aet}
        archived = files(tmp_path / "arch")
        assert sorted(Path(name).stem for name in archived if name.endswith(".dcm")) == sorted(every)
        assert sum(Path(name).name == ".complete" for name in archived) == 2
        assert sum(one["bytes"] for one in result["studies"]) == sum(map(len, archived.values()))
        # The receipts of the dispatches say the same.
        state = json.loads((up.home / "retrievals" / run_id / "job.json").read_text())
        for one in state["studies"].values():
            receipt = json.loads((up.home / "receipts" / f"{one['dispatch']}.json").read_text())
            for target in receipt["targets"].values():
                assert target["delivered"] + target["already"] == 4 and target["state"] == "delivered"
        assert not list((up.home / "retrievals" / run_id / "spool").iterdir())
        up.until(lambda: not list((up.home / "staging").iterdir()))
