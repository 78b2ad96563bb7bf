"""Nothing is ever deleted or moved that not every target has confirmed, whatever is done, and killed, in any order."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from talaria.testing import studies as material
from tasks import DRIVERS
from tasks.dispatch.delivery import Delivery
from tasks.sources import beside
from tests.sources.bench import Bench
from transfer.ledger import Ledger
from transfer.plan import scan

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # to make a failure shorter takes minutes
KILLED = 9  # exit code of a process that ended in the middle of a system call
TARGETS = ("one", "two")
# What a sweep does to files and rows: a kill may come before any of these.
CALLS = ("rename", "unlink", "link", "rmdir", "replace", "fsync")
NAMES = st.sampled_from(["a.dcm", "b.dcm", "sub/c.dcm"])
UNITS = st.sampled_from(["s0", "s1"])
STEPS = st.one_of(
    st.tuples(st.just("put"), UNITS, NAMES),
    st.tuples(st.just("edit"), UNITS, NAMES, st.booleans()),
    st.tuples(st.just("swap"), UNITS, NAMES),
    st.tuples(st.just("link"), UNITS, NAMES),
    st.tuples(st.just("take"), UNITS, NAMES),
    st.tuples(st.just("sweep")),
    st.tuples(st.just("settle"), st.booleans()),
    st.tuples(st.just("kill"), st.integers(0, 12)),
    st.tuples(st.just("dispatch"), st.sets(st.sampled_from(TARGETS))),
    st.tuples(st.just("rest")),
    st.tuples(st.just("newest")),
    st.tuples(st.just("repoint"), st.sampled_from(TARGETS)),
    st.tuples(st.just("targets"), st.sampled_from([("one",), ("two",), TARGETS])),
    st.tuples(st.just("forget"), UNITS),
    st.tuples(st.just("others"), UNITS, NAMES, st.sampled_from(TARGETS)),
    st.tuples(st.just("late"), st.sampled_from(["append", "resend", "hold"])),
)


class World:
    """An inbox in which things happen, and what must hold of it."""

    def __init__(self, folder: Path, after: str, unit: str) -> None:
        self.bench = Bench(folder, *TARGETS)
        self.fields = {"after": after, "unit": unit, "move_to": str(folder / "sent") if after == "move" else ""}
        self.settings: dict[str, Any] = {}
        self._set()
        self.before: dict[Path, bytes] = {}
        self.number = 0
        self.uids = {name: (material.uid(56), material.uid(56)) for name in ("s0", "s1")}

    def do(self, step: tuple[Any, ...]) -> None:
        what, *given_ = step
        getattr(self, f"_{what}")(*given_)
        if what not in ("sweep", "kill", "settle"):
            self.look()

    def look(self) -> None:
        self.before = {path: path.read_bytes() for path in self.bench.inbox.rglob("*") if self._is_file(path)}

    @staticmethod
    def _is_file(path: Path) -> bool:
        return path.is_file() and not path.is_symlink()

    # ---- what the sender does

    def _path(self, unit: str, name: str) -> Path:
        return self.bench.inbox / unit / name

    def _put(self, unit: str, name: str) -> None:
        study, series = self.uids[unit]
        material.write(self._path(unit, name), material.ct_bytes(study=study, series=series))

    def _edit(self, unit: str, name: str, restore: bool) -> None:
        path = self._path(unit, name)
        if path.exists():
            info, data = path.stat(), bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
            if restore:
                os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))

    def _swap(self, unit: str, name: str) -> None:
        path = self._path(unit, name)
        if path.exists():
            info, other = path.stat(), path.with_name("new")
            data = bytearray(path.read_bytes())
            data[-2] ^= 1
            other.write_bytes(data)
            os.utime(other, ns=(info.st_atime_ns, info.st_mtime_ns))
            other.rename(path)

    def _link(self, unit: str, name: str) -> None:
        path = self._path(unit, name)
        if path.exists():
            self.number += 1
            os.link(path, self.bench.folder / f"link{self.number}")

    def _take(self, unit: str, name: str) -> None:
        self._path(unit, name).unlink(missing_ok=True)

    # ---- what Talaria does, and people who change its settings

    def _sweep(self) -> None:
        self._in_a_process(lambda: None)

    def _settle(self, late: bool) -> None:
        """Go most of the way, to where files may be deleted by the next sweep."""
        self._sweep()
        self._dispatch(set())
        if late:
            self._put("s0", "b.dcm")
        self.look()

    def _kill(self, count: int) -> None:
        def arm() -> None:
            left = count

            def before(call: Callable[..., Any]) -> Callable[..., Any]:
                def counted(*args: Any, **more: Any) -> Any:
                    nonlocal left
                    if left == 0:
                        os._exit(KILLED)
                    left -= 1
                    return call(*args, **more)

                return counted

            for name in CALLS:
                setattr(os, name, before(getattr(os, name)))

        self._in_a_process(arm)

    def _in_a_process(self, arm: Callable[[], None]) -> None:
        """Sweep in a process of its own, which a kill ends without any cleaning up; then see what must hold."""
        pid = os.fork()
        if not pid:
            code = 1
            try:
                arm()
                self.bench.sweep()
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, KILLED), code
        self._runs_were_asked_for()
        self._holds()

    def _runs_were_asked_for(self) -> None:
        """Learn what the process has asked for, as the server would know it."""
        for row in self.bench.rows().values():
            if row.run and row.run not in self.bench.done and row.state == "dispatched":
                path = self.bench.home.root / "sources" / "box" / "batches" / f"{row.batch}.json"
                self.bench.asked.setdefault(row.run, json.loads(path.read_text()))

    def _holds(self) -> None:
        """What has gone from the inbox is at every target that the source has, and where it was to be moved to."""
        now = {path: path.read_bytes() for path in self.bench.inbox.rglob("*") if self._is_file(path)}
        left = list(now.values())
        sent = self.bench.folder / "sent"
        for path, data in self.before.items():
            if path in now:
                assert now[path] == data, f"{path} was changed"
                continue
            if data in left:  # killed while it had a name of ours
                continue
            note(f"gone: {path}")
            for name in self.bench.source.targets:
                there = self.bench.at(name).rglob("*")
                assert any(one.is_file() and one.read_bytes() == data for one in there), f"{path} is not at {name}"
            if self.fields["after"] == "move":
                assert any(one.is_file() and one.read_bytes() == data for one in sent.rglob("*"))
        self.before = now

    def _dispatch(self, down: set[str]) -> None:
        self.bench.down = down
        self.bench.dispatch()

    def _rest(self) -> None:
        """Let all runs rest, as for a target that is dead: what comes late is dispatched beside them."""
        self.bench.resting_runs = {*self.bench.asked}

    def _newest(self) -> None:
        """Let the newest run go on, and the older ones rest."""
        older = dict([*self.bench.asked.items()][:-1])
        self.bench.asked = dict([*self.bench.asked.items()][-1:])
        self._dispatch(set())
        self.bench.asked = older
        self._rest()

    def _repoint(self, name: str) -> None:
        self.number += 1
        place = self.bench.folder / "at" / f"{name}{self.number}"
        place.mkdir()
        self.bench.targets[name] = self.bench.target(name, folder=str(place))

    def _targets(self, names: tuple[str, ...]) -> None:
        self._set(targets=[*names])

    def _late(self, late: str) -> None:
        self._set(late=late)

    def _set(self, **settings: Any) -> None:
        self.settings |= settings
        self.bench.source = self.bench.named(**self.fields, **self.settings)

    def _others(self, unit: str, name: str, target: str) -> None:
        """Somebody else sends another content of an instance, by the same path, to one of the targets."""
        path = self._path(unit, name)
        if path.exists():
            self.number += 1
            data = bytearray(path.read_bytes())
            data[-3] ^= 1
            material.write(self.bench.folder / "others" / str(self.number) / name, bytes(data))
            plan = scan([self.bench.folder / "others" / str(self.number)])
            one = self.bench.targets[target]
            with Ledger(self.bench.home.ledger) as ledger:
                Delivery(DRIVERS.of(one), one, plan, ledger, self.bench.home, threading.Event()).push()

    def _forget(self, unit: str) -> None:
        with Ledger(self.bench.home.ledger) as ledger:
            ledger.sources.forget("box", [unit, self.uids[unit][0]])


@pytest.fixture(autouse=True)
def _without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)  # it would start one


@settings(
    max_examples=40,
    deadline=None,
    phases=PHASES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    after=st.sampled_from(["delete", "move"]),
    unit=st.sampled_from(["folder", "study"]),
    steps=st.lists(STEPS, min_size=4, max_size=25),
)
def test_nothing_goes_that_is_not_confirmed(
    monkeypatch: pytest.MonkeyPatch, after: str, unit: str, steps: list[tuple[Any, ...]]
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="talaria-never-"))
    try:
        monkeypatch.setenv("TALARIA_HOME", str(folder / "home"))
        monkeypatch.setattr(beside, "RESTS_S", 0.0)
        world = World(folder, after, unit)
        for name in ("a.dcm", "b.dcm"):
            world.do(("put", "s0", name))
        for step in steps:
            world.do(step)
    finally:
        shutil.rmtree(folder)
