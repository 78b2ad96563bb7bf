"""What is reported: progress, and errors without secrets, which survive a process boundary."""

from __future__ import annotations

import json
import logging
import pickle
import threading
import traceback
from pathlib import Path

import psutil
import pytest

from talaria.testing import studies
from talaria.testing.cases.compare import assert_delivered
from talaria.testing.harness import Harness, attempt
from tasks import DRIVERS
from transfer.errors import DispatchError
from transfer.plan import scan


def test_progress_once_per_item(harness: Harness, study: Path) -> None:
    studies.ct(study, 10, side=64)
    counts: list[int] = []
    told: list[str] = []
    sent = attempt(
        harness.target,
        study,
        told=lambda _, item, outcome: told.append(item.path),
        moved=lambda _, count: counts.append(count),
    )
    assert_delivered(harness, sent)
    assert sorted(told) == [item.path for item in sent.plan.items]
    assert all(count >= 0 for count in counts)
    assert 0.9 * sent.plan.size <= sent.moved <= 1.1 * sent.plan.size + 65_536


def test_secrets_absent_from_logs_and_errors(
    harness: Harness, study: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither what opens the target nor who the patient is shows in a log, an error, a receipt or an argument."""
    studies.ct(study, 24, side=64)
    plan = scan([study])
    caplog.set_level(logging.DEBUG)
    texts: list[str] = []
    done = threading.Event()
    arguments: set[str] = set()

    def watch() -> None:
        while not done.wait(0.02):
            for child in psutil.Process().children(recursive=True):
                try:
                    arguments.add(" ".join(child.cmdline()))
                except psutil.Error:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for target in (harness.target, harness.dead):
            health = DRIVERS.of(target).check(target)
            texts += [json.dumps(health.to_json("x")), repr(health)]
        dead = attempt(harness.dead, plan)
        with harness.cut(plan.size // 2) as target:
            texts += [repr(target), str(target), target.model_dump_json()]
            broken = attempt(target, plan)
            whole = attempt(target, plan, done=broken.arrived)
    finally:
        done.set()
        watcher.join()
    assert dead.error is not None
    assert broken.error is not None or harness.driver.facts.reconnects
    for error in filter(None, (dead.error, broken.error)):
        texts += ["".join(traceback.format_exception(error)), repr(error), str(error)]
    texts += [json.dumps(whole.require().to_json(all_items=True)), repr(whole.receipt)]
    ours = ("transfer", "protocols", "blocks", "tasks", "flows", "talaria")
    for record in caplog.records:
        # What a library says to whoever debugs it is not ours to word.
        if record.levelno >= logging.INFO or record.name.split(".")[0] in ours:
            texts.append(caplog.handler.format(record))
    out, err = capfd.readouterr()
    texts += [out, err, *arguments]
    for secret in (*harness.secrets, *studies.PHI):
        for text in texts:
            assert secret not in text


def test_errors_survive_pickle(harness: Harness, study: Path) -> None:
    studies.ct(study, 24, side=64)
    plan = scan([study])
    with harness.cut(plan.size // 2) as target:
        errors = [attempt(harness.dead, plan).error, attempt(target, plan).error]
    if harness.driver.facts.reconnects:
        errors = errors[:1]
    errors.append(DRIVERS.of(harness.dead).check(harness.dead).error)
    for error in errors:
        assert isinstance(error, DispatchError)
        assert error.message
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert (copy.message, copy.target, copy.item, str(copy)) == (
            error.message, error.target, error.item, str(error),
        )  # fmt: skip
        assert vars(copy) == vars(error)
