"""Live targets beside dead ones: how much of their throughput is left.

    python -m benchmarks.soak [--each 20] [--rounds 3] [--one-client]

Dispatches of one small CT image to six folders, in any order; in every other round as many go to a target that refuses
connections, and to one that accepts them and says nothing, among them. Time is from the first creation of a run until
the last one to a folder has ended, by its own time. Aim: at least 0.9 of the rate without the dead ones.

Each round has studies of its own. What is sent again replaces the files that are there, which the receipt says, with an
artifact more: that costs a tenth more, and every round but the first one without dead targets would have to pay it.

Two clients create them at once: one those to folders, the other those to dead targets. A single one (--one-client),
which waits for each answer, asks for a third more where the dead are among them, and takes most of the time for that:
then it is its own rate that is measured. How long those to folders took to create is said as well.

CPU is that of server and worker together, creation and what is sent in bulk afterwards included: for a dispatch to a
folder, and for one to a dead target, which is what the round with them takes more. In the first such round it is found
out that they are dead.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from talaria.testing import studies
from tests.engine.test_soak import AT_ONCE, DEAD, LIVE, WAITS, silence
from tests.servers.up import Talaria, talaria

LOOK_S = 0.5  # between two looks at the server, which cost it CPU
SETTLE_S = 4.0  # until the last logs and events have been sent and written down
AIM = 0.9


def cpu(up: Talaria) -> float:
    """Return the seconds of CPU that server and worker have taken."""
    found = [up.child(mark).cpu_times() for mark in ("talaria.front", "talaria.engine.worker")]
    return sum(one.user + one.system + one.children_user + one.children_system for one in found)


@dataclass
class Measured:
    """What a round has shown.

    Attributes:
        rate: dispatches a second to targets that live.
        used: seconds of CPU until all others wait.
        created: seconds until the last one to a target that lives was created.
    """

    rate: float
    used: float
    created: float


def measured(up: Talaria, sources: list[Path], targets: list[str], *, one_client: bool = False) -> Measured:
    """Send each study to each target, in any order."""
    used = cpu(up)
    order = [(name, source) for name in targets for source in sources]
    random.Random(14).shuffle(order)
    deployment = up.api("GET", "/deployments/name/dispatch/talaria")["id"]
    begun = time.time()

    def create(chosen: Sequence[str]) -> tuple[dict[str, list[str]], float]:
        """Create the dispatches to some targets; return their ids, by target, and when the last one was there."""
        made, last = {name: list[str]() for name in chosen}, begun
        for name, source in order:
            if name in chosen:
                asked = {"paths": [str(source)], "targets": [name]}
                run = up.api("POST", f"/deployments/{deployment}/create_flow_run", parameters=asked)
                made[name].append(str(run["id"]))
                last = time.time() if name in LIVE else last
        return made, last

    with ThreadPoolExecutor() as clients:
        parts = [targets] if one_client else [LIVE, [name for name in targets if name in DEAD]]
        found = [*clients.map(create, parts)]
    made = {name: runs for one, _ in found for name, runs in one.items()}
    living, waiting = ([run for name in kind for run in made.get(name, ())] for kind in (LIVE, DEAD))

    def until(runs: list[str], **state: list[str]) -> dict[str, Any]:
        wanted = {"id": {"any_": runs}, "state": {key: {"any_": value} for key, value in state.items()}}
        while runs and int(up.api("POST", "/flow_runs/count", flow_runs=wanted)) < len(runs):
            time.sleep(LOOK_S)
        return wanted

    ended = until(living, type=["COMPLETED"])
    (last,) = up.api("POST", "/flow_runs/filter", flow_runs=ended, sort="END_TIME_DESC", limit=1)
    until(waiting, name=["AwaitingRetry"])
    time.sleep(SETTLE_S)
    rate = len(living) / (datetime.fromisoformat(last["end_time"]).timestamp() - begun)
    return Measured(rate, cpu(up) - used, found[0][1] - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one-client", action="store_true", help="let one client create all, one after another")
    given = parser.parse_args()
    print(machine())
    with (
        tempfile.TemporaryDirectory(prefix="talaria-benchmark-") as name,
        talaria(Path(name)) as up,
        silence() as (port, _),
    ):
        root = Path(name)

        def new(number: int) -> list[Path]:
            """Return the folders of so many studies that were never sent."""
            folder = root / "studies" / studies.uid()
            for one in range(number):
                studies.ct(folder / str(one), 1, side=16)
            return [folder / str(one) for one in range(number)]

        dead = {"type": "dicom", "host": "127.0.0.1", "aet_target": "PACS", "max_dispatches": AT_ONCE, **WAITS}
        for one in LIVE:
            (root / one).mkdir()
        folders = {one: {"type": "folder", "folder": str(root / one), "max_dispatches": AT_ONCE} for one in LIVE}
        up.apply(**folders, refusing=dead | {"port": 1}, hanging=dead | {"port": port})
        measured(up, new(1), LIVE)  # what is loaded at first use is loaded
        columns = (
            "dispatches/s alone | beside the dead | ratio | created in s | beside | CPU s, a live one | a dead one"
        )
        print(f"| {columns} |\n|---|---|---|---|---|---|---|")
        ratios = []
        for _ in range(given.rounds):
            alone = measured(up, new(given.each), LIVE, one_client=given.one_client)
            beside = measured(up, new(given.each), [*LIVE, *DEAD], one_client=given.one_client)
            ratios.append(beside.rate / alone.rate)
            live = alone.used / given.each / len(LIVE)
            dead_one = (beside.used - alone.used) / given.each / len(DEAD)
            shown = (
                f"{alone.rate:.2f} | {beside.rate:.2f} | {ratios[-1]:.2f} | {alone.created:.1f} | {beside.created:.1f}"
            )
            print(f"| {shown} | {live:.3f} | {dead_one:.3f} |", flush=True)
        print(f"\nmedian {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), aim {AIM}")


if __name__ == "__main__":
    main()
