"""Secrets of targets are asked for only where one is about to be used: lists, status and exports do without."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import httpx
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.utilities.names import obfuscate

from blocks import TYPES, Target
from blocks.dicomweb import DicomWebTarget
from blocks.xnat import XnatTarget
from talaria.service import Office, targets
from tasks.documents import Broken
from tasks.targets import all_targets, load
from tests.targets.fields import NEEDED, SECRET, filled
from transfer.errors import Misconfigured
from transfer.home import Home

PROXY = f"http://user:{SECRET}@proxy.example.org:3128"


class Server:
    """What Prefect's server answers to requests for block documents (keeps what was asked) and for checks."""

    def __init__(self, *there: Target) -> None:
        self.documents = []
        for number, target in enumerate(there):
            target._block_document_id = uuid4()
            made = target._to_block_document(
                f"target-{number}", block_schema_id=uuid4(), block_type_id=uuid4(), include_secrets=True
            )
            self.documents.append(made.model_dump(mode="json", context={"include_secrets": True}))
        self.asked: list[dict[str, Any]] = []

    async def request(self, method: str, path: str, json: dict[str, Any]) -> httpx.Response:
        if path == "/artifacts/latest/filter":  # the last checks: there were none
            return httpx.Response(200, json=[])
        assert (method, path) == ("POST", "/block_documents/filter")
        self.asked.append(json)
        names = json["block_documents"].get("name", {}).get("any_")
        found = [one for one in self.documents if names is None or one["name"] in names]
        if not json.get("include_secrets"):
            found = [one | {"data": self._masked(one)} for one in found]
        return httpx.Response(200, json=found[json["offset"] : json["offset"] + json["limit"]])

    def _masked(self, document: dict[str, Any]) -> dict[str, Any]:
        secret = document["block_schema"]["fields"].get("secret_fields", [])
        data: dict[str, Any] = document["data"]
        return {
            name: obfuscate(value) if name in secret and value is not None else value for name, value in data.items()
        }

    @property
    def told(self) -> list[list[str] | None]:
        """Of which names secrets were asked for; None for all."""
        return [one["block_documents"].get("name", {}).get("any_") for one in self.asked if one.get("include_secrets")]

    @property
    def client(self) -> PrefectClient:
        return cast(PrefectClient, self)


@pytest.fixture(autouse=True)
def _no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a block sends an event to Prefect's server; there is none here."""
    monkeypatch.setattr("prefect.blocks.core.emit_event", lambda **_: None)


@pytest.fixture(scope="module")
def whole() -> Server:
    """One target of each type, each with a secret where it has any, one with a proxy, and one without secrets."""
    proxied = TYPES["dicomweb"](**NEEDED["dicomweb"] | {"proxy": PROXY})
    return Server(*(filled(name) for name in NEEDED), proxied, TYPES["dicomweb"](**NEEDED["dicomweb"]))


@pytest.fixture
def server(whole: Server) -> Server:
    whole.asked.clear()
    return whole


@pytest.fixture
def office(server: Server, tmp_path: Path) -> Office:
    return Office(server.client, Home(tmp_path))


def test_lists_and_exports_ask_for_no_secret_and_show_what_is_set(server: Server, office: Office) -> None:
    listed = asyncio.run(targets.list_targets(office))["targets"]
    assert [one["broken"] for one in listed] == [None] * len(NEEDED) + [None, None]
    whole = asyncio.run(all_targets(server.client, used=[one["name"] for one in listed]))
    assert len(server.told) == 1
    server.asked.clear()
    for one, target in zip(listed, whole, strict=True):
        assert isinstance(target, Target)
        shown = {name for name, value in one.items() if _is_stars(value)}
        assert shown == {
            name for name in target.secret_fields() if (value := getattr(target, name)) and value.get_secret_value()
        }
    exported = asyncio.run(targets.export_targets(office))
    assert len(exported["targets"]) == len(listed) and not exported["left_out"] and SECRET not in str(exported)
    assert asyncio.run(targets.show_target(office, f"target-{len(NEEDED)}"))["proxy"].strip("*") == ""
    assert not server.told


def _is_stars(value: object) -> bool:
    return isinstance(value, str) and set(value) == {"*"}


def test_one_that_is_used_comes_with_its_secrets_alone(server: Server) -> None:
    (target,) = asyncio.run(load(server.client, [f"target-{len(NEEDED)}"]))
    assert isinstance(target, DicomWebTarget) and target.proxy.get_secret_value() == PROXY
    assert target.http_password.get_secret_value() == ""
    assert server.told == [[f"target-{len(NEEDED)}"]]
    (masked,) = asyncio.run(load(server.client, [f"target-{len(NEEDED)}"], secrets=False))
    assert isinstance(masked, DicomWebTarget) and masked.proxy.get_secret_value() == "********"
    assert len(server.told) == 1


def test_applying_compares_the_secrets_of_the_targets_in_the_file_only(server: Server, office: Office) -> None:
    number = list(NEEDED).index("xnat")
    given = {"type": "xnat", **NEEDED["xnat"]}
    for password, action in ((SECRET, "unchanged"), ("another", "updated")):
        wanted = {f"target-{number}": given | {"password": password}}
        done = asyncio.run(targets.apply_targets(office, wanted, dry_run=True))
        assert done["targets"] == [{"name": f"target-{number}", "action": action}]
    assert server.told == [[f"target-{number}"]] * 2


def test_a_mask_is_no_proxy_that_somebody_may_give() -> None:
    with pytest.raises(ValueError, match="proxy"):
        TYPES["dicomweb"](**NEEDED["dicomweb"] | {"proxy": "********"})


def test_settings_that_can_be_judged_only_with_a_secret_are_asked_for_alone() -> None:
    """A document of before, or of Prefect's own form: secrets that are not set are empty, and come masked as well."""
    server = Server(TYPES["dicomweb"](**NEEDED["dicomweb"]), filled("xnat"))
    server.documents[0]["data"] |= {"http_password": "", "client_secret": "", "tls_key": ""}
    found = asyncio.run(all_targets(server.client))
    assert [type(one) for one in found] == [DicomWebTarget, XnatTarget]
    assert server.told == [["target-0"]]


def test_what_is_broken_is_seen_without_secrets() -> None:
    server = Server(filled("xnat"))
    server.documents[0]["data"]["max_attempts"] = 0
    (broken,) = asyncio.run(all_targets(server.client))
    assert isinstance(broken, Broken) and "max_attempts" in broken.reason and not server.told
    with pytest.raises(Misconfigured, match="max_attempts"):
        asyncio.run(load(server.client, ["target-0"], secrets=False))
