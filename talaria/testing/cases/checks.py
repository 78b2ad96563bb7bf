"""Checks: of a server that answers, of one that does not, and what they leave behind."""

from __future__ import annotations

import json
import time
from pathlib import Path

from talaria.testing import studies
from talaria.testing.cases.compare import assert_equal, send
from talaria.testing.harness import Harness, attempt
from talaria.testing.process import as_loaded


def test_check_ok(harness: Harness) -> None:
    health = harness.driver.check(harness.target)
    assert health.ok, health.to_json("x")
    assert health.error is None
    names = [probe.name for probe in health.probes]
    assert len(names) == len(set(names)) >= 1
    assert all(probe.result in ("ok", "skipped") or probe.informative for probe in health.probes)
    json.dumps(health.to_json(harness.target.name))


def test_check_no_server_is_Unreachable(harness: Harness) -> None:
    begun = time.monotonic()
    health = harness.driver.check(harness.dead)
    assert not health.ok
    assert type(health.error) is harness.dead_error
    failed = [probe for probe in health.probes if probe.result == "failed" and not probe.informative]
    assert failed
    assert all(probe.detail for probe in failed), "a failed probe gives the real reason"
    assert time.monotonic() - begun < as_loaded(2 * harness.dead.connect_timeout_s + 5)


def test_push_no_server_is_Unreachable(harness: Harness, study: Path) -> None:
    studies.ct(study, 2)
    sent = attempt(harness.dead, study)
    assert type(sent.error) is harness.dead_error
    assert not sent.outcomes
    assert sent.seconds < as_loaded(2 * harness.dead.connect_timeout_s + 5)


def test_check_leaves_nothing_behind(harness: Harness, study: Path) -> None:
    before = harness.names(), harness.leftovers()
    harness.driver.check(harness.target)
    harness.driver.check(harness.target)
    assert (harness.names(), harness.leftovers()) == before
    studies.ct(study, 2)
    sent = send(harness, study)
    before = harness.names(), harness.leftovers()
    assert harness.driver.check(harness.target).ok
    assert (harness.names(), harness.leftovers()) == before
    assert_equal(harness, sent)
