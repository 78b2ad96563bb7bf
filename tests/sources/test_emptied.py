"""An inbox that is emptied, with a target of each type: what has gone is there, as it was when it went."""

from __future__ import annotations

import dataclasses
import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from blocks.xnat import Overwrite
from talaria.testing import studies as material
from talaria.testing.harness import Factory, Harness
from tests.sources.bench import Bench
from transfer.errors import Unreachable
from transfer.plan import Plan, scan

SERVERS = [  # type, server, settings
    ("dicom", "dicom-storescp", {}),
    ("dicom_tls", "dicom-tls-storescp", {}),
    ("dicomweb", "dicomweb-script", {}),
    ("dicomweb", "dicomweb-file", {}),
    ("folder", "folder", {}),
    ("folder", "folder-link", {}),
    ("rsync", "rsync-openssh", {}),
    ("s3", "s3-stub", {}),
    ("sftp", "sftp-openssh", {}),
    ("xnat", "xnat-stand-in", {"overwrite": Overwrite.APPEND}),
    ("xnat", "xnat-stand-in", {"overwrite": Overwrite.DELETE}),
]
KEEPS = {
    "overwrite": Overwrite.APPEND
}  # a server that keeps the content which it has, and says that it has the instance


@pytest.fixture(autouse=True)
def _without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "bench" / "home"))
    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)  # it would start one


def there(harness: Harness, bench: Bench, plan: Plan) -> dict[str, bytes]:
    """Return the pixels that the server holds of the unit that was dispatched last, by path in it."""
    study = [*bench.done.values()][-1].studies["s"]
    held = harness.read_back(dataclasses.replace(plan, dispatch_id=study["dispatch_id"]))
    if not harness.driver.facts.keeps_names:
        uids = {one.path: one.header.SOPInstanceUID for one in plan.items if one.header}
        held = {path: held[uid] for path, uid in uids.items() if uid in held}
    return {path: pixels(data) for path, data in held.items()}


def pixels(data: bytes) -> bytes:
    """Return the end of a file, which every server keeps as it is."""
    return data[-500:]


def touch(path: Path) -> None:
    """Let something happen to a file, so that it is dispatched again."""
    now = time.time_ns()  # finer than what the kernel would set
    os.utime(path, ns=(now, now))


@pytest.mark.parametrize(("module", "server", "fields"), SERVERS)
def test_what_has_gone_is_there(tmp_path: Path, module: str, server: str, fields: dict[str, Any]) -> None:
    factories: dict[str, Factory] = import_module(f"tests.targets.{module}").HARNESSES
    (tmp_path / "peer").mkdir()
    (tmp_path / "bench").mkdir()
    with factories[server](tmp_path / "peer") as harness:
        bench = Bench(tmp_path / "bench")
        settings = {"max_attempts": 1, "retry_delay_s": 0, **fields}
        target: Any = harness.target.model_copy(update=settings).named("shelf")
        bench.targets = {"shelf": target}
        bench.source = bench.named(after="delete")
        unit, driver = bench.inbox / "s", harness.driver

        def fails(*args: object) -> Any:
            raise Unreachable("nobody answers", "shelf")

        uids = {"study": material.uid(56), "series": material.uid(56)}
        first = {f"{number}.dcm": material.ct_bytes(**uids) for number in range(2)}
        for path, data in first.items():
            material.write(unit / path, data)
        bench.drivers["shelf"] = dataclasses.replace(driver, push=fails)
        bench.all()
        assert bench.states() == {"s": "failed"} and len(list(unit.iterdir())) == 2, "nothing has arrived"

        del bench.drivers["shelf"]
        touch(unit / "0.dcm")
        plan = scan([unit])
        bench.all()
        assert bench.states() == {"s": "done"} and not unit.exists(), bench.rows()
        assert there(harness, bench, plan) == {path: pixels(data) for path, data in first.items()}

        other = bytes([*first["0.dcm"][:-2], 1, 2])  # the same instance with other pixels
        material.write(unit / "0.dcm", other)
        bench.drivers["shelf"] = dataclasses.replace(driver, push=fails)
        bench.all()
        assert (unit / "0.dcm").read_bytes() == other, "another content is confirmed, and not this one"

        del bench.drivers["shelf"]
        touch(unit / "0.dcm")
        plan = scan([unit])
        bench.all()
        if fields == KEEPS:
            assert (unit / "0.dcm").read_bytes() == other and there(harness, bench, plan)["0.dcm"] != pixels(other)
            assert "not confirmed" in bench.rows()["s"].detail
        else:
            assert not unit.exists() and there(harness, bench, plan)["0.dcm"] == pixels(other), bench.rows()


def test_of_two_units_with_one_instance_only_what_is_there_goes(tmp_path: Path) -> None:
    """XNAT has one file of an instance, and replaces it, though each dispatch sends all that it has."""
    for name in ("bench", "peer"):
        (tmp_path / name).mkdir()
    with import_module("tests.targets.xnat").HARNESSES["xnat-stand-in"](tmp_path / "peer") as harness:
        bench = Bench(tmp_path / "bench")
        settings = {"max_attempts": 1, "retry_delay_s": 0, "overwrite": Overwrite.DELETE}
        target: Any = harness.target.model_copy(update=settings).named("shelf")
        bench.targets = {"shelf": target}
        bench.source = bench.named(after="delete")
        data = material.ct_bytes()
        for number, name in enumerate("st"):
            material.write(bench.inbox / name / "0.dcm", bytes([*data[:-2], number, number]))
            bench.sweep()
        bench.dispatch()
        bench.sweep()
        [held] = harness.read_back(scan([bench.inbox])).values()
        left = [one.read_bytes() for one in bench.inbox.rglob("*.dcm")]
        assert set(bench.states().values()) == {"done"} and len(left) == 1 and held != left[0], bench.rows()


ODD = ["\xa0", "\udca0", "a\xadb", "a\udcadb", "a\nb", "a\\nb", "\u2028", " a ", "a\\xa0", "-rf", "ü", "u\u0308", "*"]


@pytest.mark.parametrize("unit", ["folder", "study"])
def test_names_of_any_kind_are_told_apart(tmp_path: Path, unit: str) -> None:
    bench = Bench(tmp_path, "one", "two", unit=unit, after="delete")
    sent = {}
    for name in ODD:
        study = material.uid(56)
        for file in ("\xa0.dcm", "\udca0.dcm", "\u2029\t.dcm"):
            data = sent[study, file] = material.ct_bytes(study=study)
            material.write(bench.inbox / name / file, data)
    assert sum(bench.sweep().runs.values()) == len(ODD)
    bench.dispatch()
    bench.sweep()
    assert set(bench.states().values()) == {"done"} and len(bench.states()) == len(ODD)
    assert not any(path.is_file() for path in bench.inbox.rglob("*")), bench.rows()
    for target in ("one", "two"):
        places = {study: bench.at(target) / study for study, _ in sent}
        found = {(study, file.name): file.read_bytes() for study in places for file in places[study].rglob("*.dcm")}
        assert found == sent
