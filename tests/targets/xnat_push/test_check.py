"""The check of an XNAT target, and its fields."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest
from pydantic import ValidationError

from blocks.xnat import XnatTarget
from talaria.testing import process
from talaria.testing.process import as_loaded
from tasks.xnat import check, driver
from tests.servers.xnat import Xnat
from tests.targets.xnat import PASSWORD, xnat_target
from transfer.errors import (
    Denied,
    DispatchError,
    Misconfigured,
    NotFound,
    Unreachable,
)
from transfer.receipt import Level

# ---- check


def _probes(target: XnatTarget) -> dict[str, tuple[str, str]]:
    return {probe.name: (probe.result, probe.detail) for probe in check(target).probes}


NAMES = ["resolve", "tcp", "authenticate", "project", "authorize", "version"]


def test_check_tells_each_step(server: Xnat) -> None:
    probes = _probes(xnat_target(server.url))
    assert list(probes) == NAMES
    assert {result for result, _ in probes.values()} == {"ok"}
    assert "1.8.10" in probes["version"][1]
    server.rest.version = "1.7.6"
    assert "1.7.6" in _probes(xnat_target(server.url))["version"][1]
    assert not server.imports


@pytest.mark.parametrize(
    ("settings", "failed", "expected"),
    [
        ({"host": "http://no-such-host.invalid"}, "resolve", Unreachable),
        ({"password": "wrong"}, "authenticate", Denied),
        ({"project_id": "NOPE"}, "project", NotFound),
        ({"project_id": "READ"}, "authorize", Denied),
    ],
)
def test_check_stops_where_it_fails(
    server: Xnat, settings: dict[str, Any], failed: str, expected: type[DispatchError]
) -> None:
    server.store.add_project("READ", sender="collaborator")
    target = xnat_target(server.url, **({"host": server.url} | settings))
    health = check(target)
    assert type(health.error) is expected
    assert sorted(probe.name for probe in health.probes) == sorted(NAMES)
    assert [probe.name for probe in health.probes if probe.result == "failed"] == [failed]
    assert all(probe.detail for probe in health.probes)


def test_check_of_a_name_that_nobody_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: over.wait(5) and [])
    begun = time.monotonic()
    health = check(xnat_target("http://xnat.example.org", connect_timeout_s=0.3))
    assert time.monotonic() - begun < as_loaded(3)
    over.set()
    assert type(health.error) is Unreachable
    assert "not resolved within 0.3 s" in health.probes[0].detail


@pytest.mark.parametrize("host", [f"{'x' * 64}.example.org", "xnat..example.org"])
def test_check_of_a_name_that_no_host_can_have(host: str) -> None:
    health = check(xnat_target(f"https://{host}"))
    assert type(health.error) is Unreachable
    assert host in health.probes[0].detail


def test_check_of_something_else() -> None:
    port = process.free_port()
    health = check(xnat_target(f"http://127.0.0.1:{port}"))
    assert type(health.error) is Unreachable
    json.dumps(health.to_json("x"))


def test_check_of_a_base_url_below_the_host(server: Xnat) -> None:
    """Another path on the same server: there is no XNAT."""
    health = check(xnat_target(server.url + "/elsewhere"))
    assert type(health.error) is Misconfigured


# ---- the block


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "xnat.example.org"},
        {"host": "ftp://xnat.example.org"},
        {"host": "https://user:pw@xnat.example.org"},
        {"host": "https://xnat.example.org/?a=b"},
        {"host": "https://xnat.example.org:port"},
        {"host": "https://xnat.example.org/a b"},
        {"project_id": "../P"},
        {"project_id": "My Project"},
        {"user": "a:b"},
        {"user": ""},
        {"password": ""},
        {"subject": "{PatientName}"},
        {"session": ""},
        {"session": "{PatientID"},
        {"destination": "nirvana"},
        {"overwrite": "always"},
        {"direction": "both"},
    ],
)
def test_settings_that_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        xnat_target("https://xnat.example.org", **settings)


def test_defaults_are_safe() -> None:
    target = XnatTarget(host="https://xnat.example.org/xnat/", project_id="P", user="u", password=PASSWORD)
    assert target.host == "https://xnat.example.org/xnat"
    assert (target.overwrite, target.destination) == ("none", "archive")
    assert PASSWORD not in repr(target) + str(target) + target.model_dump_json()
    assert driver.facts.verifies_by == (Level.ACCEPTED, Level.LISTED)
