"""Logs as JSON: each line an object, each change of a run's state one line with the ids of run and dispatch."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from talaria import logs
from talaria.settings import load_settings
from talaria.testing import studies
from talaria.testing.process import free_port
from tests.engine.material import dicom, folder
from tests.servers.up import Talaria


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, every one of which must be an object."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_every_line_of_a_running_talaria_is_json_and_states_are_told_with_their_ids(tmp_path: Path) -> None:
    up = Talaria(tmp_path)
    up.more = {"TALARIA_LOG_JSON": "yes"}
    try:
        up.begin_with_a_database()
        up._start(())
        source = tmp_path / studies.PATIENT_NAME.replace("^", "_")
        studies.ct(source, 1)
        up.apply(good=folder(tmp_path / "good"), dead=dicom(free_port(), retry_delay_s=3600, retry_max_delay_s=3600))
        sent = up.told("send", str(source), "--to", "good")
        waits = up.told("send", str(source), "--to", "dead", "--no-wait")["flow_run_id"]
        worker = up.home / "logs" / "worker.log"

        def states(run: str) -> list[dict[str, Any]]:
            return [one for one in lines(worker) if one["logger"] == "talaria.state" and one.get("run") == run]

        up.until(lambda: any(one["event"] == "run.scheduled" for one in states(waits)))
        up.until(lambda: any(one["event"] == "run.completed" for one in states(sent["flow_run_id"])))
        events = {one["event"]: one for one in states(sent["flow_run_id"])}
        assert list(events) == ["run.running", "dispatch.delivered", "run.completed"]
        assert events["dispatch.delivered"]["target"] == "good" and events["dispatch.delivered"]["delivered"] == 1
        assert events["run.completed"]["dispatch"] == events["dispatch.delivered"]["dispatch"] == sent["dispatch_id"]
        assert all(one["time"].endswith("Z") and one["level"] == "info" for one in events.values())
        (rests,) = [one for one in states(waits) if one["event"] == "run.scheduled"]
        assert rests["state"] == "AwaitingRetry" and rests["until"] and rests["targets"] == ["dead"]
        of_run = [one for one in lines(worker) if one.get("run") == sent["flow_run_id"] and "run_name" in one]
        assert of_run  # Prefect's own lines on the run
        told = json.dumps([one for one in lines(worker) if one["logger"] == "talaria.state"])
        assert source.name not in told and not any(private in told for private in studies.PHI)
        up.stop()
        assert any(one["message"].startswith("ready:") for one in lines(up.log))
        lines(up.home / "logs" / "server.log")
    finally:
        if up.process:
            up.kill()


def test_the_states_of_a_run_are_lines_of_the_worker_s_log(up: Talaria, tmp_path: Path) -> None:
    studies.ct(tmp_path / "study", 1)
    up.apply(logged=folder(tmp_path / "logged"))
    run = up.told("send", str(tmp_path / "study"), "--to", "logged")["flow_run_id"]

    def said() -> list[str]:
        text = (up.home / "logs" / "worker.log").read_text()
        found = [line.partition("talaria.state - ")[2] for line in text.splitlines() if "talaria.state" in line]
        return [line for line in found if run in line or line == "dispatch.delivered: logged"]

    expected = [
        f"run.running: run {run} begins",
        "dispatch.delivered: logged",
        f"run.completed: run {run} is Completed",
    ]
    up.until(lambda: said() == expected)
    lines = (up.home / "logs" / "worker.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} \| ", one) for one in lines if " | INFO " in one)
    assert any(" | Flow run " in one for one in lines)  # Prefect's own as well


def test_an_error_s_trace_stays_in_its_line_and_text_stays_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger, handlers = logging.getLogger("talaria"), list(logging.getLogger("talaria").handlers)
    known = {name: list(logging.getLogger(name).handlers) for name in logs.OURS}
    root = list(logging.root.handlers)
    monkeypatch.setenv("TALARIA_LOG_JSON", "1")
    for module in (sys, threading):
        monkeypatch.setattr(module, "excepthook", module.excepthook)
    try:
        for name in logs.OURS:
            logging.getLogger(name).handlers.clear()
        logs.set_up()
        logs.set_up()
        try:
            int("not\nthis")
        except ValueError:
            logging.getLogger("talaria.x").exception("it\nfailed")
        (line,) = capsys.readouterr().err.splitlines()
        found = json.loads(line)
        logs.changed("run.failed", "run r1 is Failed", run="r1", dispatch="d1", until=None)
        state = json.loads(capsys.readouterr().err)
        assert state == state | {"event": "run.failed", "run": "r1", "dispatch": "d1", "logger": "talaria.state"}
        assert "until" not in state
        assert found["message"] == "it\nfailed" and "ValueError" in found["exception"] and found["level"] == "error"
        for name in logs.OURS:
            logging.getLogger(name).handlers.clear()
        monkeypatch.setenv("TALARIA_LOG_JSON", "")
        logs.set_up()
        logs.changed("run.running", "run r1 begins", run="r1")
        assert capsys.readouterr().err.rstrip().endswith("| INFO    | talaria.state - run.running: run r1 begins")
    finally:
        logging.captureWarnings(False)
        for name, before in known.items():
            logging.getLogger(name).handlers[:] = before
            logging.getLogger(name).propagate = True
            logging.getLogger(name).setLevel(logging.NOTSET)
        logging.root.handlers[:] = root
        assert logger.handlers == handlers and sys.stderr


def test_settings_that_were_applied_can_be_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the processes do that `talaria up` starts."""
    monkeypatch.chdir(tmp_path)
    for value, expected in (("no", False), ("yes", True)):
        with mock.patch.dict(os.environ, {"TALARIA_LOG_JSON": value, "TALARIA_HOME": str(tmp_path)}):
            assert [load_settings().log_json for _ in range(2)] == [expected, expected]
            assert logs.as_json() is expected
    with mock.patch.dict(os.environ, {"TALARIA_HOME": str(tmp_path)}):
        first = load_settings()
        assert load_settings() == first and not first.log_json


def test_what_nobody_catches_or_handles_is_json_as_well() -> None:
    """A warning, a record of a library's, an error that ends a thread, and one that ends the process."""
    program = (
        "import logging, threading, warnings; from talaria import logs; logs.set_up();"
        "warnings.warn('an old call'); logging.getLogger('asyncio').error('a task');"
        "thread = threading.Thread(target=lambda: 1 / 0, name='lost'); thread.start(); thread.join();"
        "raise ValueError('the end\\nof it')"
    )
    env = os.environ | {"TALARIA_LOG_JSON": "yes"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 1 and len(found) == 4
    said = [one["message"] for one in found]
    assert "an old call" in said[0] and said[1:] == [
        "a task", "the thread lost ends: ZeroDivisionError", "this process ends: ValueError",
    ]  # fmt: skip
    assert [one["exception"].splitlines()[-1] for one in found[2:]] == ["ZeroDivisionError: division by zero", "of it"]
