"""A source of which one file can't be sent: the others arrive, and nothing says that it is complete."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from blocks.rsync import RsyncTarget
from talaria.testing import studies
from talaria.testing.harness import Harness
from tasks.dispatch.delivery import Delivery
from tests.targets import folder, rsync, s3, sftp
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.outcome import Kind
from transfer.plan import scan
from transfer.receipt import Level, State

FACTORIES: dict[str, Callable[[Path], AbstractContextManager[Harness]]] = {
    name: factory
    for module, name in ((folder, "folder"), (rsync, "rsync-openssh"), (sftp, "sftp-openssh"), (s3, "s3-moto"))
    for name, factory in [(name, module.HARNESSES[name])]
}
FOLDERS = [name for name in FACTORIES if not name.startswith("s3")]


@pytest.fixture(params=FACTORIES)
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    (tmp_path / "server").mkdir()
    with FACTORIES[request.param](tmp_path / "server") as one:
        yield one


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite") as one:
        yield one


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two files, and a link that leads out of the study."""
    studies.ct(tmp_path / "study", 2)
    studies.ct(tmp_path / "elsewhere", 1)
    (tmp_path / "study" / "link.dcm").symlink_to(tmp_path / "elsewhere" / "CT0001.dcm")
    return tmp_path / "study"


def delivery(harness: Harness, study: Path, ledger: Ledger, tmp_path: Path, again: Delivery | None = None) -> Delivery:
    (tmp_path / "home").mkdir(exist_ok=True)
    plan = scan([study])
    if again:  # as when a run is retried
        plan = ledger.runs.same_dispatch("run", plan)
    else:
        ledger.runs.same_dispatch("run", plan)
    return Delivery(harness.driver, harness.target, plan, ledger, Home(tmp_path / "home"), threading.Event())


def marked(harness: Harness) -> bool:
    return any(name.split("/")[-1] == ".complete" for name in harness.names())


def test_there_is_no_marker_and_no_script_runs_until_it_can_be_sent(
    harness: Harness, study: Path, ledger: Ledger, tmp_path: Path
) -> None:
    one = delivery(harness, study, ledger, tmp_path)
    one.push()
    receipt = one.receipt()
    assert receipt.state is State.PARTIAL
    assert {row.path: row.outcome for row in receipt.items}["link.dcm"] is Kind.REJECTED
    assert len(harness.read_back(one.plan)) == 2
    assert not marked(harness)
    if isinstance(harness.target, RsyncTarget):
        harness.target.on_complete = True
    assert not one.wants_hook

    (study / "link.dcm").unlink()
    (study / "link.dcm").hardlink_to(tmp_path / "elsewhere" / "CT0001.dcm")
    again = delivery(harness, study, ledger, tmp_path, one)
    again.push()
    assert again.receipt().state is State.DELIVERED
    assert {row.path: row.outcome for row in again.receipt().items}["CT0001.dcm"] is Kind.ALREADY
    assert len(harness.read_back(again.plan)) == 3
    assert marked(harness)


def test_what_the_target_does_not_want_does_not_make_it_incomplete(
    harness: Harness, study: Path, ledger: Ledger, tmp_path: Path
) -> None:
    harness.target.exclude = "link*"
    one = delivery(harness, study, ledger, tmp_path)
    one.push()
    assert one.receipt().state is State.DELIVERED
    assert marked(harness)


@pytest.mark.parametrize("harness", FOLDERS, indirect=True)
@pytest.mark.parametrize("level", [Level.LISTED, Level.PROVEN])
def test_a_marker_goes_where_a_file_is_found_lost_and_comes_back_with_it(
    harness: Harness, study: Path, ledger: Ledger, tmp_path: Path, level: Level
) -> None:
    (study / "link.dcm").unlink()
    harness.target.verify = level
    delivery(harness, study, ledger, tmp_path).push()
    assert marked(harness)
    (lost,) = (tmp_path / "server").rglob("CT0002.dcm")
    lost.unlink()
    found = delivery(harness, study, ledger, tmp_path).push()
    assert found.state is State.PARTIAL
    assert {row.path: row.outcome for row in found.items} == {
        "CT0001.dcm": Kind.ALREADY,
        "CT0002.dcm": Kind.REJECTED,
    }
    assert not marked(harness)
    again = delivery(harness, study, ledger, tmp_path).push()
    assert again.state is State.DELIVERED
    assert again.counts[Kind.DELIVERED] == 1
    assert marked(harness)
