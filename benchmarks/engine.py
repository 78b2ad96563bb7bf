"""The engine: our worker beside Prefect's process worker, on the same flow, at one server, to the same sink.

    python -m benchmarks.engine [--single 10] [--many 40] [--process-single 3] [--process-many 4] [--flood 200]
                                [--idle 60] [--postgresql]

Each dispatch is 3 small CT images to a DICOM sink that throws them away (benchmarks/discard.c), behind a relay that
notes when the first byte comes. `first` is from the API's answer to the creation until then, `done` until the run's
final state, by its own time: the server is asked seldom, for that costs it CPU, too. Calls are those of the worker and
its runs, one dispatch at a time. CPU is that of all processes while many are there at once, creation and what is sent
in bulk afterwards included. A flood is so many studies in one run, to the sink and to a folder at once. Last comes what
server, worker and `talaria up` use while nothing is to be done.

With --postgresql the server's database is Debian's PostgreSQL, whose commits wait for the disk; then the dispatches a
second that server and PostgreSQL have CPU for on each core are said, too (aim: 5).
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.dicom import discard
from benchmarks.measure import machine
from talaria.testing import process, studies
from tests.servers.postgresql import postgresql

FILES = 3
LOGS = {  # each call of the API in a line of the log
    "PREFECT_LOGGING_ROOT_LEVEL": "INFO",
    "PREFECT_LOGGING_LEVEL": "INFO",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
}
SETTLE_S = 6.0  # until the last logs and events have been sent and written down
LOOK_S = 0.5  # between two looks at the server
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
POOL = "bench-process"


class Relay:
    """Passes each connection on to a sink; notes when its first byte came."""

    def __init__(self, to: int) -> None:
        self.first: list[float] = []
        self._to = to
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._to))
                for source, sink, note in ((here, there, True), (there, here, False)):
                    threading.Thread(target=self._pass, args=(source, sink, note), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, note: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 18):
                if note:
                    self.first.append(time.time())
                    note = False
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@dataclass
class Way:
    """One kind of worker.

    Attributes:
        workers: returns its processes.
    """

    name: str
    deployment: str
    log: Path
    workers: Callable[[], list[psutil.Process]]
    first: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)
    calls: float = 0.0
    rate: float = 0.0
    server_cpu: float = 0.0
    worker_cpu: float = 0.0
    database_cpu: float = 0.0

    def row(self) -> str:
        numbers = (statistics.median(self.first), max(self.first), statistics.median(self.done))
        times = " | ".join(f"{number:.2f}" for number in numbers)
        return (
            f"| {self.name} | {times} | {self.calls:.1f} | {self.rate:.2f} "
            f"| {self.server_cpu:.2f} | {self.worker_cpu:.2f} | {self.database_cpu:.2f} |"
        )


class Bench:
    """A running `talaria up`, and what is asked of it.

    Args:
        database: URL of Prefect's database, "" for SQLite.
        database_pid: of the process that started it.
    """

    def __init__(self, root: Path, relay: Relay, database: str = "", database_pid: int = 0) -> None:
        self.root, self.relay, self.home = root, relay, root / "home"
        self.home.mkdir()
        self.port = process.free_port()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TALARIA_"))}
        self.env = kept | LOGS | {"TALARIA_HOME": str(self.home), "HOME": str(root)}
        if database:
            self.env["PREFECT_API_DATABASE_CONNECTION_URL"] = database
        self.database_pid = database_pid
        self.made = 0

    @contextmanager
    def up(self) -> Iterator[None]:
        log = self.root / "up.log"
        argv = [sys.executable, "-P", "-m", "talaria", "up", "--port", str(self.port)]
        with log.open("wb") as out:
            self.process = subprocess.Popen(argv, env=self.env, stdout=out, stderr=out, start_new_session=True)
        try:
            _until(lambda: b"ready:" in log.read_bytes(), 180)
            user, _, password = (self.home / "api.auth").read_text().strip().partition(":")
            self.api = httpx.Client(
                base_url=f"http://127.0.0.1:{self.port}/api", auth=(user, password), timeout=60, trust_env=False
            )
            targets = self.root / "targets.yaml"
            sink = f"{{type: dicom, host: 127.0.0.1, port: {self.relay.port}, max_dispatches: 16}}"
            (self.root / "shelf").mkdir()
            shelf = f"{{type: folder, folder: {self.root}/shelf}}"
            targets.write_text(f"targets:\n  sink: {sink}\n  shelf: {shelf}\n")
            apply = [sys.executable, "-P", "-m", "talaria", "target", "apply", str(targets)]
            subprocess.run(apply, env=self.env, check=True, capture_output=True)
            yield
        finally:
            process.stop(self.process)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.api.request(method, path, json=body)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def family(self) -> dict[str, list[psutil.Process]]:
        """The server, our worker, what starts them, and PostgreSQL's processes."""
        found: dict[str, list[psutil.Process]] = {"server": [], "worker": []}
        if self.database_pid:
            first = psutil.Process(self.database_pid)
            found["PostgreSQL"] = [first, *first.children(recursive=True)]
        for child in psutil.Process(self.process.pid).children(recursive=True):
            found["worker" if "talaria.engine.worker" in " ".join(child.cmdline()) else "server"].append(child)
        return found | {"up": [psutil.Process(self.process.pid)]}

    def study(self) -> Path:
        self.made += 1
        folder = self.root / f"study{self.made}"
        studies.ct(folder, FILES)
        return folder

    def create(self, way: Way, folder: Path) -> str:
        parameters = {"paths": [str(folder)], "targets": ["sink"]}
        made = self.ask("POST", f"/deployments/{way.deployment}/create_flow_run", {"parameters": parameters})
        return str(made["id"])

    def measure(self, way: Way, single: int, many: int) -> None:
        """Run dispatches one at a time, then many at once."""
        self._one(way)  # what is loaded at first use is loaded
        way.first.clear()
        way.done.clear()
        calls = _calls(way.log)
        for _ in range(single):
            self._one(way)
        time.sleep(SETTLE_S)
        way.calls = (_calls(way.log) - calls) / single
        folders = [self.study() for _ in range(many)]
        before, begun = self._cpu(way), time.time()
        ids = [self.create(way, folder) for folder in folders]
        wanted = {"id": {"any_": ids}, "state": {"type": {"any_": list(ENDED)}}}
        _until(lambda: self.ask("POST", "/flow_runs/count", {"flow_runs": wanted}) == many, 60 + 30 * many)
        found = self.ask("POST", "/flow_runs/filter", {"flow_runs": wanted, "limit": 200, "sort": "END_TIME_DESC"})
        way.rate = many / (_ended(found[0]) - begun)
        time.sleep(SETTLE_S)
        after = self._cpu(way)
        used = ((b - a) / many for a, b in zip(before, after, strict=True))
        way.server_cpu, way.worker_cpu, way.database_cpu = used

    def flood(self, way: Way, count: int) -> str:
        """Send many studies in one run; return a sentence on it."""
        for number in range(count):
            studies.ct(self.root / "flood" / f"study{number}", FILES)
        before, calls = self._cpu(way), _calls(way.log)
        parameters = {"paths": [str(self.root / "flood")], "targets": ["sink", "shelf"], "each": "folder"}
        begun = time.time()
        made = self.ask("POST", f"/deployments/{way.deployment}/create_flow_run", {"parameters": parameters})
        _until(lambda: self.ask("GET", f"/flow_runs/{made['id']}")["state_type"] in ENDED, 60 + count)
        ended = self.ask("GET", f"/flow_runs/{made['id']}")
        seconds = _ended(ended) - begun
        if ended["state"]["type"] != "COMPLETED":
            raise RuntimeError(f"flood: {ended['state']}")
        time.sleep(SETTLE_S)
        server, worker, _ = ((b - a) / count * 1000 for a, b in zip(before, self._cpu(way), strict=True))
        return (
            f"flood of {count} studies: {seconds:.1f} s, {count / seconds:.0f} studies/s, "
            f"{_calls(way.log) - calls} calls; CPU for a study: worker {worker:.0f} ms, server {server:.1f} ms"
        )

    def _one(self, way: Way) -> None:
        folder = self.study()
        time.sleep(1.0)
        self.relay.first.clear()
        run_id = self.create(way, folder)
        created = time.time()
        _until(lambda: self.ask("GET", f"/flow_runs/{run_id}")["state_type"] in ENDED, 180)
        ended = self.ask("GET", f"/flow_runs/{run_id}")
        if ended["state"]["type"] != "COMPLETED":
            raise RuntimeError(f"{way.name}: {ended['state']}")
        way.first.append(min(self.relay.first) - created)
        way.done.append(_ended(ended) - created)

    def _cpu(self, way: Way) -> tuple[float, float, float]:
        found = self.family()
        parts = found["server"], way.workers(), found.get("PostgreSQL", [])
        server, worker, database = (sum(map(_seconds, part)) for part in parts)
        return server, worker, database


def _ended(flow_run: Any) -> float:
    return datetime.fromisoformat(flow_run["end_time"]).timestamp()


def _seconds(one: psutil.Process) -> float:
    """CPU time of a process and of those of its children that have ended."""
    with suppress(psutil.Error):
        times = one.cpu_times()
        return float(times.user + times.system + times.children_user + times.children_system)
    return 0.0


def _calls(log: Path) -> int:
    return len(re.findall(rb"HTTP Request: ", log.read_bytes()))


def _until(ready: Callable[[], object], seconds: float, look: float = LOOK_S) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise RuntimeError("waited in vain")
        time.sleep(look)


@contextmanager
def process_worker(bench: Bench) -> Iterator[Way]:
    """Prefect's own worker, which starts an interpreter for each run; for a deployment of the same flow."""
    bench.ask("POST", "/work_pools/", {"name": POOL, "type": "process", "base_job_template": {}})
    (ours,) = bench.ask("POST", "/deployments/filter", {"flows": {"name": {"any_": ["dispatch"]}}})
    body = {"name": "bench", "flow_id": ours["flow_id"], "work_pool_name": POOL, "entrypoint": ours["entrypoint"]}
    begin = bench.root / "process-worker"  # which it copies for each run: the flow itself comes from PYTHONPATH
    begin.mkdir()
    made = bench.ask("POST", "/deployments/", body | {"path": str(begin)})
    log = bench.root / "process-worker.log"
    auth = next(path for name in ("worker.auth", "api.auth") if (path := bench.home / name).exists())
    env = bench.env | {
        "PREFECT_API_URL": f"http://127.0.0.1:{bench.port}/api",
        "PREFECT_API_AUTH_STRING": auth.read_text().strip(),
        "PREFECT_HOME": str(bench.root / "prefect"),
        "PREFECT_WORKER_QUERY_SECONDS": "0.5",
        "PREFECT_WORKER_PREFETCH_SECONDS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    argv = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--limit", "8"]
    with log.open("wb") as out:
        running = subprocess.Popen(argv, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        _until(lambda: b"started!" in log.read_bytes(), 120)
        worker = psutil.Process(running.pid)
        yield Way("Prefect's process worker", made["id"], log, lambda: [worker, *worker.children(recursive=True)])
    finally:
        process.stop(running)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (
        ("single", 10),
        ("many", 40),
        ("process-single", 3),
        ("process-many", 4),
        ("flood", 200),
        ("idle", 60),
    ):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--postgresql", action="store_true", help="let Prefect's database be PostgreSQL")
    options = parser.parse_args()
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="talaria-bench-"))
        port, _ = stack.enter_context(discard(Path(name) / "sink"))
        database, pid = "", 0
        if options.postgresql:
            server = stack.enter_context(postgresql(durable=True))
            database, pid = server.new().replace("://", "+asyncpg://"), server.pid
        bench = Bench(Path(name), Relay(port), database, pid)
        with bench.up():
            (ours,) = bench.ask("POST", "/deployments/filter", {"flows": {"name": {"any_": ["dispatch"]}}})
            talaria = Way(
                "Talaria's worker", ours["id"], bench.home / "logs/worker.log", lambda: bench.family()["worker"]
            )
            bench.measure(talaria, options.single, options.many)
            ways = [talaria]
            flood = bench.flood(talaria, options.flood) if options.flood else ""
            if options.process_single:
                with process_worker(bench) as way:
                    bench.measure(way, options.process_single, options.process_many)
                    ways.append(way)
            time.sleep(SETTLE_S)
            before = {what: sum(map(_seconds, found)) for what, found in bench.family().items()}
            time.sleep(options.idle)
            idle = {what: sum(map(_seconds, found)) - before[what] for what, found in bench.family().items()}
        print(f"{machine()}, load {os.getloadavg()[0]:.1f}\n")
        columns = "first s | worst s | done s | calls | dispatches/s | CPU server s | CPU worker s | CPU PostgreSQL s"
        print(f"| way | {columns} |")
        print("|---|---|---|---|---|---|---|---|---|")
        print("\n".join(way.row() for way in ways))
        if len(ways) > 1:
            print(
                f"\nfirst byte: {statistics.median(ways[1].first) / statistics.median(talaria.first):.0f} times as soon"
            )
        if options.postgresql:
            each = talaria.server_cpu + talaria.database_cpu
            print(
                f"\nserver and PostgreSQL: {each:.2f} s of CPU for a dispatch, so {1 / each:.1f} a second on each core"
            )
        if flood:
            print(f"\n{flood}")
        if options.idle:
            shown = ", ".join(f"{what} {100 * seconds / options.idle:.1f}" for what, seconds in idle.items())
            print(f"idle, % of a core: {shown}; all {100 * sum(idle.values()) / options.idle:.1f}")


if __name__ == "__main__":
    main()
