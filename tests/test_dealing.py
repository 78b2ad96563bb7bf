"""How `make test` deals tests out to its processes."""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from xdist.remote import Producer

from tests.dealing import LONG, Dealer, ordered, unit_of

ROOT = Path(__file__).parents[1]
OFFER, SHARE, OWN = "def up():\n", "def test_it(up: Talaria) -> None:\n", "with talaria(tmp_path) as one:\n"
REST = "def test_it() -> None:\n"


class Process:
    """One of pytest-xdist's, which runs what it is given."""

    def __init__(self) -> None:
        self.given, self.shutting_down = list[int](), False
        self.gateway = SimpleNamespace(id="")

    def send_runtest_some(self, tests: list[int]) -> None:
        self.given += tests

    def shutdown(self) -> None:
        self.shutting_down = True


class Run:
    """A run of tests in a folder of files."""

    def __init__(self, root: Path, tests: list[str], processes: int) -> None:
        place = ordered(tests)
        self.tests = sorted(tests, key=lambda test: place[unit_of(test)])
        option = SimpleNamespace(loadscopereorder=True, tx=["popen"] * processes)
        config: Any = SimpleNamespace(option=option, rootpath=root, getvalue=lambda name: getattr(option, name))
        self.dealer = Dealer(config, Producer("test", enabled=False))
        self.ran: dict[Any, list[str]] = {}
        for process in [Process() for _ in range(processes)]:
            self.join(process)
            self.collected(process)

    def join(self, process: Any) -> None:
        self.ran[process] = []
        self.dealer.add_node(process)

    def collected(self, process: Any) -> None:
        self.dealer.add_node_collection(process, self.tests)
        if self.dealer.collection_is_completed:
            self.dealer.schedule()

    def turn(self) -> bool:
        """Let each process run its next test; return False if there was none."""
        ready = [one for one in self.dealer.nodes if len(self.ran[one]) < len(one.given)]
        for one in ready:
            number = one.given[len(self.ran[one])]
            self.ran[one].append(self.tests[number])
            self.dealer.mark_test_complete(one, number)
        return bool(ready)


def written(root: Path, **texts: str) -> list[str]:
    """Write files of tests; return the ids of six tests of each."""
    for path, text in texts.items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(text)
    return [f"{path}::test_{n}" for path in texts if "test_" in path for n in range(6)]


def test_files_that_share_a_server_stay_together_and_what_starts_one_begins_with_some_processes(
    tmp_path: Path,
) -> None:
    texts = {f"shared/test_{n}.py": SHARE for n in range(6)} | {f"own/test_{n}.py": OWN for n in range(4)}
    texts["shared/test_fixture.py"] = "@pytest.fixture\ndef inbox(tmp_path: Path, up: Talaria) -> None:\n"
    texts |= {f"rest/test_{n}.py": REST for n in range(30)} | {"shared/conftest.py": OFFER}
    tests = written(tmp_path, **texts)
    run = Run(tmp_path, tests, 8)
    while run.turn():
        pass
    ran = list(run.ran.values())
    assert sorted(test for each in ran for test in each) == sorted(tests)
    where = defaultdict(set)
    for number, each in enumerate(ran):
        for test in each:
            where[test.partition("::")[0]].add(number)
    assert {path: at for path, at in where.items() if len(at) > 1} == {}  # no fixture of a file is set up twice
    assert {number for path, at in where.items() if path.startswith("shared/") for number in at} <= {0, 1, 2, 3}
    assert {number for path, at in where.items() if path.startswith("own/") for number in at} <= {0, 1, 2, 3}
    for each in ran:  # who has begun with a server goes on with it
        assert len([home for home, _ in groupby(each, lambda test: test.startswith("shared/")) if home]) <= 1


def test_what_a_process_leaves_that_dies_is_run_by_others_but_for_what_it_died_of(tmp_path: Path) -> None:
    tests = written(tmp_path, **{f"test_{n}.py": REST for n in range(8)})
    run = Run(tmp_path, tests, 2)
    for _ in range(3):
        assert run.turn()
    dead = run.dealer.nodes[0]
    died_of = run.dealer.remove_node(dead)
    assert died_of == run.tests[dead.given[3]]
    another = Process()
    run.join(another)
    assert run.turn()  # of the one that is left
    run.collected(another)
    while run.turn():
        pass
    assert len(run.ran[another]) > 6
    assert sorted([died_of, *(test for each in run.ran.values() for test in each)]) == sorted(tests)
    assert run.dealer.tests_finished and all(one.shutting_down for one in run.dealer.nodes)


def test_the_conformance_suite_is_dealt_out_by_harness() -> None:
    suite = "tests/conformance.py"
    assert unit_of(f"{suite}::test_check_ok[folder-link]") == f"{suite}[folder-link]"
    assert unit_of(f"{suite}::test_proof[folder-link-proven]") == f"{suite}[folder-link]"
    assert unit_of("tests/targets/test_hook.py::test_it[rsync]") == "tests/targets/test_hook.py"


def test_long_files_are_there() -> None:
    assert [path for path in LONG if not (ROOT / path).exists()] == []
