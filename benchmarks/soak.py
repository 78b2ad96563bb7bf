"""Live targets beside dead ones: how much of their throughput is left.

    python -m benchmarks.soak [--each 20] [--rounds 3]

Dispatches of one small CT image to six folders, in any order; in every other round as many go to a target that refuses
connections, and to one that accepts them and says nothing, among them. Time is from the first creation of a run until
the last one to a folder has ended. Aim: at least 0.9 of the rate without the dead ones.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.measure import machine
from talaria.testing import studies
from tests.engine.test_soak import AT_ONCE, DEAD, LIVE, WAITS, silence
from tests.servers.up import Talaria, talaria

LOOK_S = 0.1
AIM = 0.9


def measured(up: Talaria, sources: list[Path], targets: list[str]) -> float:
    """Send each study to each target, in any order; return dispatches a second to those that live."""
    order = [(name, source) for name in targets for source in sources]
    random.Random(14).shuffle(order)
    deployment, begun, living = up.api("GET", "/deployments/name/dispatch/talaria")["id"], time.monotonic(), []
    for name, source in order:
        asked = {"paths": [str(source)], "targets": [name], "force": True}
        made = up.api("POST", f"/deployments/{deployment}/create_flow_run", parameters=asked)
        living += [str(made["id"])] if name in LIVE else []
    ended = {"id": {"any_": living}, "state": {"type": {"any_": ["COMPLETED"]}}}
    while int(up.api("POST", "/flow_runs/count", flow_runs=ended)) < len(living):
        time.sleep(LOOK_S)
    return len(living) / (time.monotonic() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(machine())
    with (
        tempfile.TemporaryDirectory(prefix="talaria-benchmark-") as name,
        talaria(Path(name)) as up,
        silence() as (port, _),
    ):
        root = Path(name)
        sources = [root / "studies" / str(number) for number in range(given.each)]
        for source in sources:
            studies.ct(source, 1, side=16)
        dead = {"type": "dicom", "host": "127.0.0.1", "aet_target": "PACS", "max_dispatches": AT_ONCE, **WAITS}
        for one in LIVE:
            (root / one).mkdir()
        folders = {one: {"type": "folder", "folder": str(root / one), "max_dispatches": AT_ONCE} for one in LIVE}
        up.apply(**folders, refusing=dead | {"port": 1}, hanging=dead | {"port": port})
        measured(up, sources[:1], LIVE)  # what is loaded at first use is loaded
        print("| dispatches/s alone | beside the dead | ratio |\n|---|---|---|")
        ratios = []
        for _ in range(given.rounds):
            alone = measured(up, sources, LIVE)
            beside = measured(up, sources, [*LIVE, *DEAD])
            ratios.append(beside / alone)
            print(f"| {alone:.2f} | {beside:.2f} | {ratios[-1]:.2f} |", flush=True)
        print(f"\nmedian {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), aim {AIM}")


if __name__ == "__main__":
    main()
