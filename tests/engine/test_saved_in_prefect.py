"""Targets that people save through Prefect's pages: refused as ours are, at the field, with a sentence."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from talaria.engine import registry
from tests.servers.up import Talaria

pytestmark = pytest.mark.timeout(600)
MASK = "********"


def ask(up: Talaria, method: str, path: str, body: Any, **headers: str) -> httpx.Response:
    user, _, password = (up.home / "api.auth").read_text().strip().partition(":")
    return httpx.request(method, up.url + path, json=body, auth=(user, password), timeout=300, headers=headers)


def schema_of(up: Talaria, slug: str) -> tuple[str, Any]:
    kind = up.api("GET", f"/block_types/slug/{slug}")
    return kind["id"], up.api("POST", "/block_schemas/filter", block_schemas={"block_type_id": {"any_": [kind["id"]]}})


def create(up: Talaria, slug: str, name: str, data: dict[str, Any]) -> httpx.Response:
    """Save a document as Prefect's form does."""
    kind, (schema, *_) = schema_of(up, slug)
    body = {"name": name, "data": data, "block_type_id": kind, "block_schema_id": schema["id"], "is_anonymous": False}
    return ask(up, "POST", "/block_documents/", body)


def there(up: Talaria, name: str) -> list[Any]:
    found: list[Any] = up.api("POST", "/block_documents/filter", block_documents={"name": {"any_": [name]}})
    return found


def listed(up: Talaria, name: str) -> dict[str, Any]:
    return next(one for one in up.told("target", "list")["targets"] if one["name"] == name)


@pytest.mark.parametrize(
    ("slug", "data", "why"),
    [
        ("dicom-target", {"host": "h", "aet_target": "A" * 17}, "aet_target: AE title"),
        ("dicom-target", {"host": "h", "port": 99999}, "port: must be a number, at least 1 and at most 65535"),
        ("dicom-target", {"aet_target": "A"}, "host: is required"),
        ("dicom-target", {"host": "h", "retry_delay_s": 99, "retry_max_delay_s": 9}, "retry_max_delay_s"),
        ("folder-target", {"folder": "relative"}, "folder: 'relative' is not an absolute path"),
        ("s3-target", {"bucket": "b1b", "endpoint_url": "http://lab:hush@h"}, "endpoint_url"),
        ("sftp-target", {"host": "h", "folder": "f", "host_key": "nonsense"}, "host_key"),
        ("xnat-target", {"host": "http://h", "project_id": "a b", "user": "u", "password": "hush"}, "project_id"),
        ("dicom-target", {"host": "h", "colour": "red"}, "colour: unknown field"),
    ],
)
def test_what_is_not_valid_is_not_saved(up: Talaria, slug: str, data: dict[str, Any], why: str) -> None:
    answer = create(up, slug, "wrong", data)
    assert answer.status_code == 422 and why in answer.json()["detail"], answer.text
    assert "hush" not in answer.text and there(up, "wrong") == []


def test_what_is_valid_is_saved_and_edited_with_its_secret_masked(up: Talaria) -> None:
    data = {"host": "https://xnat.example.org", "project_id": "TRIAL", "user": "u", "password": "hush"}
    assert create(up, "xnat-target", "edited", data).status_code == 201
    (document,) = there(up, "edited")
    assert document["data"]["password"] == MASK
    path = f"/block_documents/{document['id']}"
    whole = {"data": {**document["data"], "project_id": "NEXT"}, "merge_existing_data": False}
    assert ask(up, "PATCH", path, whole).status_code == 204
    # Everything at once, as the form sends it, or only what changes.
    for body in ({"data": {**document["data"], "project_id": "a b"}}, {"data": {"project_id": "a b"}}):
        answer = ask(up, "PATCH", path, body | {"merge_existing_data": "host" not in body["data"]})
        assert answer.status_code == 422 and "project_id" in answer.json()["detail"], answer.text
    removed = {"data": {**whole["data"], "password": ""}, "merge_existing_data": False}
    assert "password must not be empty" in ask(up, "PATCH", path, removed).json()["detail"]
    assert ask(up, "PATCH", path, {"data": {"contact": ""}, "merge_existing_data": True}).status_code == 204
    # Nobody reads a stored secret by pointing the target at himself.
    moved = {"host": "https://mine.example.org"}
    for body in ({"data": {**whole["data"], **moved}, "merge_existing_data": False}, {"data": moved}):
        answer = ask(up, "PATCH", path, {"merge_existing_data": True} | body)
        assert answer.status_code == 422 and "type it again" in answer.json()["detail"], answer.text
    shown = up.told("target", "show", "edited")
    assert shown["project_id"] == "NEXT" and set(shown["password"]) == {"*"}
    (kept,) = up.as_worker("POST", "/block_documents/filter", {"include_secrets": True} | named("edited"))
    assert kept["data"]["password"] == "hush"


def named(name: str) -> dict[str, Any]:
    return {"block_documents": {"name": {"any_": [name]}}}


def judged(up: Talaria, slug: str, values: dict[str, Any], page: str = "") -> dict[str, list[str]]:
    """What Prefect's form shows at its fields; on a page of Prefect 3.9.1, the schema is not the schema."""
    _, (schema, *_) = schema_of(up, slug)
    body = {"schema": values if page else schema["fields"], "values": values}
    base = up.url.removesuffix("/api")
    answer = ask(up, "POST", "/ui/schemas/validate", body, referer=f"{base}/v2/blocks{page}").json()
    assert answer["valid"] == (answer["errors"] == [])
    return {one["property"]: one["errors"] for one in answer["errors"]}


def test_prefect_s_form_shows_each_error_at_its_field(up: Talaria) -> None:
    found = judged(up, "dicom-tls-target", {"aet_target": "A" * 17, "port": 0, "tls_key": None, "window": ""})
    assert found.keys() == {"host", "aet_target", "port"}
    assert found["host"] == ["Is required"] and found["aet_target"][0].startswith("AE title 'AAAA")
    assert found["port"] == ["Must be a number, at least 1 and at most 65535"]
    both = judged(up, "s3-target", {"bucket": "scans", "access_key_id": "AK", "sse": None})
    assert both == {"access_key_id": ['"Access key" and "Secret of the access key" belong together: set both, or none']}
    page = "/catalog/dicom-target/create?redirect=x"
    assert judged(up, "dicom-target", {"host": "h", "port": 0}, page).keys() == {"port"}
    assert judged(up, "dicom-target", {"host": "h", "port": 0}, "/catalog/secret/create") == {}
    create(up, "dicom-target", "looked-at", {"host": "h"}).raise_for_status()
    page = f"/block/{there(up, 'looked-at')[0]['id']}/edit"
    assert judged(up, "dicom-target", {"host": "h", "aet_target": "x\\y"}, page).keys() == {"aet_target"}
    saved = {"host": "https://h", "project_id": "P", "user": "u", "password": MASK, "proxy": MASK, "window": None}
    assert judged(up, "xnat-target", saved) == {}
    assert judged(up, "dicomweb-target", {"url": "https://h", "access_token": MASK, "http_user": "u"}) != {}


def test_blocks_that_are_no_targets_are_left_to_prefect(up: Talaria) -> None:
    assert create(up, "secret", "other", {"value": "x"}).status_code == 201
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    answer = ask(up, "POST", "/ui/schemas/validate", {"schema": schema, "values": {"n": "x"}})
    assert answer.json() == {
        "errors": [{"property": "n", "errors": ["'x' is not valid under any of the given schemas"]}],
        "valid": False,
    }
    assert ask(up, "PATCH", f"/block_documents/{'0' * 8}-0000-0000-0000-{'0' * 12}", {"data": {}}).status_code == 404


def test_a_target_of_an_older_version_loads_and_is_edited_with_today_s_form(up: Talaria) -> None:
    fields = json.loads(Path(__file__).with_name("block_schema_before_titles.json").read_text())
    kind, (ours, *_) = schema_of(up, "dicom-tls-target")
    assert "title" in ours["fields"]["properties"]["host"]
    old = up.as_worker(
        "POST",
        "/block_schemas/",
        {"fields": fields, "block_type_id": kind, "capabilities": ["talaria-target"], "version": "older"},
    )
    data = {"host": "pacs.example.org", "tls_cert": "x", "tls_key": "hush", "tls_key_password": None, "window": None}
    document = up.as_worker(
        "POST",
        "/block_documents/",
        {"name": "aged", "data": data, "block_type_id": kind, "block_schema_id": old["id"], "is_anonymous": False},
    )
    assert listed(up, "aged")["host"] == "pacs.example.org"
    edit = {"data": {"aet_target": "MAIN"}, "merge_existing_data": True}
    assert ask(up, "PATCH", f"/block_documents/{document['id']}", edit).status_code == 204

    async def register() -> None:
        async with get_client() as client:
            await registry.register(client)

    # The older schema is the younger one here: it is left alone, as a newer version's would be.
    settings = {PREFECT_API_URL: up.url, PREFECT_API_AUTH_STRING: (up.home / "worker.auth").read_text().strip()}
    with temporary_settings(settings):
        asyncio.run(register())
        assert there(up, "aged")[0]["block_schema_id"] == old["id"]
        with closing(sqlite3.connect(up.home / "prefect" / "prefect.db", timeout=300)) as db, db:
            times = "UPDATE block_schema SET created = '2020-01-01 00:00:00.000000' WHERE version = 'older'"
            assert db.execute(times).rowcount == 1
        asyncio.run(register())
    (aged,) = there(up, "aged")
    assert "title" in aged["block_schema"]["fields"]["properties"]["host"]
    assert aged["data"] == data | {"aet_target": "MAIN", "tls_key": MASK}
    assert set(up.told("target", "show", "aged")["tls_key"]) == {"*"}
