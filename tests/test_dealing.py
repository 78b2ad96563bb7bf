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


class Process:
    """One of pytest-xdist's, which runs what it is given."""

    def __init__(self) -> None:
        self.given, self.shutting_down = list[int](), False
        self.gateway = SimpleNamespace(id="")

    def send_runtest_some(self, tests: list[int]) -> None:
        self.given += tests

    def shutdown(self) -> None:
        self.shutting_down = True


def dealt(root: Path, tests: list[str], processes: int) -> list[list[str]]:
    """Run tests, each process one of them in turn; return what each process has run."""
    place = ordered(tests)
    tests = sorted(tests, key=lambda test: place[unit_of(test)])
    option = SimpleNamespace(loadscopereorder=True, tx=["popen"] * processes)
    config: Any = SimpleNamespace(option=option, rootpath=root, getvalue=lambda name: getattr(option, name))
    dealer = Dealer(config, Producer("test", enabled=False))
    nodes: Any = [Process() for _ in range(processes)]
    for node in nodes:
        dealer.add_node(node)
        dealer.add_node_collection(node, tests)
    dealer.schedule()
    ran: list[list[str]] = [[] for _ in nodes]
    while not dealer.tests_finished or any(len(done) < len(node.given) for node, done in zip(nodes, ran, strict=True)):
        for node, done in zip(nodes, ran, strict=True):
            if len(done) < len(node.given):
                test = node.given[len(done)]
                done.append(tests[test])
                dealer.mark_test_complete(node, test)
    return ran


def test_files_that_share_a_server_stay_together_and_what_starts_one_begins_with_some_processes(
    tmp_path: Path,
) -> None:
    texts = {f"shared/test_{n}.py": SHARE for n in range(6)} | {f"own/test_{n}.py": OWN for n in range(4)}
    texts |= {f"rest/test_{n}.py": "def test_it() -> None:\n" for n in range(30)} | {"shared/conftest.py": OFFER}
    for path, text in texts.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    tests = [f"{path}::test_{n}" for path in texts if "test_" in path for n in range(6)]
    ran = dealt(tmp_path, tests, 8)
    assert sorted(test for each in ran for test in each) == sorted(tests)
    where = defaultdict(set)
    for number, each in enumerate(ran):
        for test in each:
            where[test.partition("::")[0]].add(number)
    assert {path: at for path, at in where.items() if len(at) > 1} == {}  # no fixture of a file is set up twice
    assert {number for path, at in where.items() if path.startswith("shared/") for number in at} <= {0, 1, 2}
    assert {number for path, at in where.items() if path.startswith("own/") for number in at} <= {0, 1, 2}
    for each in ran:  # who has begun with a server goes on with it
        assert len([home for home, _ in groupby(each, lambda test: test.startswith("shared/")) if home]) <= 1


def test_the_conformance_suite_is_dealt_out_by_harness() -> None:
    suite = "tests/conformance.py"
    assert unit_of(f"{suite}::test_check_ok[folder-link]") == f"{suite}[folder-link]"
    assert unit_of(f"{suite}::test_proof[folder-link-proven]") == f"{suite}[folder-link]"
    assert unit_of("tests/targets/test_hook.py::test_it[rsync]") == "tests/targets/test_hook.py"


def test_long_files_are_there() -> None:
    assert [path for path in LONG if not (ROOT / path).exists()] == []
