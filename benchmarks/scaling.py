"""Dispatches a second with 1, 2 and 4 workers: two Prefect servers on PostgreSQL, Redis, one ledger for all.

    python -m benchmarks.scaling [--dispatches 60] [--workers 1 2 4]

Each dispatch is 3 small CT images to a DICOM sink that throws them away. The rate is from the first creation of a run
to the last final state. CPU is that of a dispatch: of both servers, of the workers, and of PostgreSQL.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.dicom import discard
from benchmarks.measure import machine
from talaria.testing import studies
from tests.servers.prefect_servers import Servers, prefect_servers
from tests.servers.up import Talaria

FILES = 3


def cpu(processes: list[psutil.Process]) -> float:
    found = 0.0
    for one in processes:
        times = one.cpu_times()
        found += times.user + times.system + times.children_user + times.children_system
    return found


def completed(servers: Servers) -> int:
    """Return how many dispatches have ended well.

    Raises:
        RuntimeError: one has not, so that the figures would say nothing.
    """

    def count(*states: str) -> int:
        asked = {"flow_runs": {"state": {"type": {"any_": states}}}, "flows": {"name": {"any_": ["dispatch"]}}}
        return int(servers.api("POST", "/flow_runs/count", 1, asked))

    if bad := count("FAILED", "CRASHED", "CANCELLED"):
        raise RuntimeError(f"{bad} dispatches have not ended well")
    return count("COMPLETED")


def measured(servers: Servers, up: Talaria, sources: list[Path], begun: int) -> str:
    """Create the runs and wait for their end; return the table's cells."""
    database = [one for one in psutil.process_iter(["name"]) if one.info["name"] == "postgres"]
    ours = [one for one in up.children() if "talaria.engine.worker" in " ".join(one.cmdline())]
    parts = [[psutil.Process(one.pid) for one in servers.processes], ours, database]
    dispatch = servers.api("GET", "/deployments/name/dispatch/talaria", 1)["id"]
    before, since = [cpu(part) for part in parts], time.monotonic()
    for source in sources:
        body = {"parameters": {"paths": [str(source)], "targets": ["sink"], "force": True}, "name": "to sink"}
        servers.api("POST", f"/deployments/{dispatch}/create_flow_run", 1, body)
    while completed(servers) < begun + len(sources):
        time.sleep(0.2)
    seconds, after = time.monotonic() - since, [cpu([one for one in part if one.is_running()]) for part in parts]
    each = [(late - early) / len(sources) for early, late in zip(before, after, strict=True)]
    return f"{len(sources) / seconds:.2f} | " + " | ".join(f"{one:.2f}" for one in each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dispatches", type=int, default=60)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    given = parser.parse_args()
    print(machine())
    print("| workers | dispatches/s | CPU servers s | CPU workers s | CPU PostgreSQL s |\n|---|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory() as folder,
        discard(Path(folder) / "sink") as (sink, _),
        prefect_servers(Path(folder)) as servers,
    ):
        sources = [Path(folder) / "sources" / str(number) for number in range(given.dispatches)]
        for source in sources:
            studies.ct(source, FILES)
        begun = 0
        for number, count in enumerate(given.workers):
            shared = {"TALARIA_SHARED_SOURCES": str(sources[0].parent)}
            with servers.host(f"host-{number}", number % 2, "--workers", str(count), **shared) as up:
                up.apply(
                    sink={
                        "type": "dicom",
                        "host": "127.0.0.1",
                        "port": sink,
                        "aet_target": "SINK",
                        "max_dispatches": 64,
                    }
                )
                print(f"| {count} | {measured(servers, up, sources, begun)} |", flush=True)
                begun += len(sources)


if __name__ == "__main__":
    main()
