"""Runs that others create, through Prefect's API: they fail at once, in words, or are named; forms offer targets."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun

from flows.dispatch import dispatch
from flows.retrieve import retrieve
from talaria.engine import logged
from talaria.engine.table import _misfit
from talaria.service import overview, results
from talaria.testing import studies
from tasks.dispatch import asked
from tests.engine.material import folder
from tests.servers.up import Talaria
from transfer.errors import Misconfigured
from transfer.plan import DISPATCH_ID_CHARS


@pytest.fixture
def study(tmp_path: Path) -> Path:
    studies.ct(tmp_path / "study 7", 1)
    return tmp_path / "study 7"


def deployment(up: Talaria, flow: str) -> dict[str, Any]:
    found: dict[str, Any] = up.api("GET", f"/deployments/name/{flow}/talaria")
    return found


def create(up: Talaria, flow: str, **body: Any) -> httpx.Response:
    """Create a run as scripts do, with Prefect's API and a person's token."""
    headers = {"Authorization": f"Bearer {(up.home / 'api.auth').read_text().strip()}"}
    path = f"{up.url}/deployments/{deployment(up, flow)['id']}/create_flow_run"
    return httpx.post(path, json=body, headers=headers, trust_env=False, timeout=60)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"paths": []}, "no path to send is given"),
        ({"paths": ["study"]}, "paths: 'study' is not an absolute path"),
        ({"paths": ["/nowhere/at/all"]}, "/nowhere/at/all: no such file or folder"),
        ({"targets": []}, "no target is named"),
        ({"targets": ["nobody"]}, "no target named nobody"),
        ({"colour": 1}, "Not run: dispatch has no parameter colour"),
    ],
)
def test_a_dispatch_that_cant_be_done_fails_at_once_in_words(
    up: Talaria, study: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    up.apply(there=folder(tmp_path / "there"))
    answer = create(up, "dispatch", parameters={"paths": [str(study)], "targets": ["there"]} | change)
    assert answer.status_code == 201
    run = answer.json()["id"]
    up.until(lambda: up.run(run)["state_type"] == "FAILED")
    found = up.run(run)
    assert words in found["state"]["message"]
    assert found["name"] == f"to {', '.join(change.get('targets', ['there'])) or 'nobody'}"
    log = up.home / "logs" / "worker.log"
    name = "there" if change.keys() & {"colour"} or "file or folder" in words else "(unknown)"
    up.until(lambda: f"dispatch.failed: {name} (refused)" in log.read_text())


def test_what_fits_no_parameter_is_refused_whatever_its_maker_says_of_checks(up: Talaria) -> None:
    """Prefect's pages offer to leave checks out; `targets: 5` would end each list of runs."""
    for wrong in ({"targets": 5}, {"paths": "/x"}, {"priority": {"a": 1}}, {"force": "maybe"}):
        asked = {"paths": ["/x"], "targets": ["there"]} | wrong
        for more in ({}, {"enforce_parameter_schema": False}):
            assert create(up, "dispatch", parameters=asked, **more).status_code == 409
    assert create(up, "retrieve", parameters={}, enforce_parameter_schema=False).status_code == 409


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"paths": ["/x"], "targets": ["a"]}, ""),
        ({"paths": [], "targets": ["a"], "priority": "urgent", "force": True, "each": ""}, ""),
        ({"paths": ["/x"]}, "it needs targets"),
        ({"paths": ["/x"], "targets": 5}, "targets: must be a list, as in [one, two]"),
        ({"paths": [None], "targets": ["a"]}, "paths.0: must be text: put it in quotes, or leave the field out"),
        ({"paths": ["/x"], "targets": ["a"], "priority": 7}, "priority: must be 'urgent', 'normal' or 'offpeak'"),
        ({"source": "a", "studies_per_hour": True}, "studies_per_hour: must be a whole number"),
    ],
)
def test_parameters_that_fit_no_flow_are_named(given: dict[str, Any], words: str) -> None:
    assert _misfit(retrieve if "source" in given else dispatch, given) == words


def test_a_run_with_any_parameters_can_be_listed() -> None:
    """As one that was made at a server elsewhere, past our door."""
    for odd in (5, True, {"a": 1}, "pacs", None, [None, 5, ["x"]]):
        run = FlowRun(flow_id=uuid4(), name="odd", parameters={"paths": odd, "targets": odd, "source": odd})
        assert all(isinstance(one, str) for name in ("targets", "paths") for one in results.line(run)[name])
        assert overview.names_of(run) is not None and logged._about(run, "")["run"] == str(run.id)


def test_a_name_that_nothing_can_be_asked_with_is_refused_in_words() -> None:
    with pytest.raises(Misconfigured, match=r"/data/a\\xff: this name is not UTF-8.*send the folder above it"):
        asked.check_asked(["/data/ü", os.fsdecode(b"/data/a\xff")], ["pacs"])


@pytest.mark.parametrize(("given", "behind"), [({}, ""), ({"name": "nightly"}, " (nightly)")])
def test_a_run_that_others_make_says_what_it_is_and_where_to(
    up: Talaria, study: Path, tmp_path: Path, given: dict[str, str], behind: str
) -> None:
    up.apply(named=folder(tmp_path / "named"))
    answer = create(up, "dispatch", parameters={"paths": [str(study)], "targets": ["named"]}, **given)
    assert answer.status_code == 201
    run = answer.json()["id"]
    up.until(lambda: up.run(run)["state_type"] == "COMPLETED")
    listed = next(one for one in up.told("jobs", "list", "--json")["jobs"] if one["id"] == run)
    assert listed["dispatch_id"]
    assert up.run(run)["name"] == f"{listed['dispatch_id']} to named{behind}"


def test_a_form_offers_the_names_of_targets(up: Talaria, tmp_path: Path) -> None:
    web = {"type": "dicomweb", "url": f"file://{tmp_path}", "direction": "query"}
    up.apply(kept=folder(tmp_path / "kept"), asked=web)
    fields = deployment(up, "retrieve")["id"]
    shown = up.api("GET", f"/deployments/{fields}")["parameter_openapi_schema"]["properties"]
    assert "kept" in shown["targets"]["items"]["enum"] and "asked" not in shown["targets"]["items"]["enum"]
    assert "asked" in shown["source"]["enum"] and "kept" not in shown["source"]["enum"]
    checked = up.api("GET", f"/deployments/{deployment(up, 'check')['id']}")["parameter_openapi_schema"]["properties"]
    assert {"kept", "asked"} <= {*checked["target"]["enum"]}
    # A target that was added a moment ago may be named: the names are none of what the server itself enforces.
    assert "enum" not in deployment(up, "retrieve")["parameter_openapi_schema"]["properties"]["targets"]["items"]


ID = "0" * DISPATCH_ID_CHARS


class Renamed:
    """A client that knows how a run was named."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.renamed = asyncio.Event()

    async def __aenter__(self) -> Renamed:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def update_flow_run(self, run_id: str, name: str) -> None:
        self.names.append(name)
        self.renamed.set()


@pytest.mark.parametrize(
    ("own", "dispatch_id", "soon", "names"),
    [
        ("quick-fox", ID, False, [f"{ID} to pacs"]),
        ("Licensed-Salmon", ID, False, [f"{ID} to pacs"]),
        ("Nightly-Pull", ID, False, [f"{ID} to pacs (Nightly-Pull)"]),
        ("quick-fox", ID, True, ["to pacs", f"{ID} to pacs"]),
        ("quick-fox", "", False, ["to pacs"]),
        ("nightly", ID, False, [f"{ID} to pacs (nightly)"]),
        ("to pacs", ID, False, [f"{ID} to pacs"]),
        ("to pacs", "", True, []),
        (f"{ID} to pacs", ID, True, []),
    ],
    ids=[
        "once",
        "newer page",
        "capitals",
        "slow",
        "refused",
        "its maker's",
        "without id",
        "with nothing more",
        "with its id",
    ],
)
def test_a_run_is_named_once_unless_its_files_take_long(
    monkeypatch: pytest.MonkeyPatch, own: str, dispatch_id: str, soon: bool, names: list[str]
) -> None:
    client, run = Renamed(), SimpleNamespace(id="x", name=own)
    monkeypatch.setattr(asked, "get_client", lambda: client)
    monkeypatch.setattr(asked, "FlowRunContext", SimpleNamespace(get=lambda: SimpleNamespace(flow_run=run)))
    monkeypatch.setattr(asked, "NAMED_S", 0 if soon else 3600)

    async def named() -> None:
        async with asked.Naming("to pacs") as naming:
            if soon and names:
                await client.renamed.wait()
            if dispatch_id:
                await naming.known(dispatch_id)

    asyncio.run(named())
    assert client.names == names and run.name == (names or [own])[-1]
