"""Prefect's form of a target in a browser: labels in order, our icons, a wrong value refused at its field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from blocks.dicom import DicomTarget
from blocks.fields import ordered
from talaria.front.access import Role
from talaria.front.users import Users
from tests.front.browser import chromium
from tests.front.door import PASSWORD
from tests.servers.up import Talaria, talaria
from transfer.home import Home

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
WAIT_MS = 120_000
LOADED = "[...document.images].length > 0 && [...document.images].every(one => one.complete && one.naturalWidth > 0)"
TAKEN = "(name) => window.fetch(`/api/block_types/slug/dicom-target/block_documents/name/${name}`).then(a => a.status)"


def test_a_target_is_made_and_edited_in_prefect_s_form(tmp_path: Path) -> None:
    with talaria(tmp_path) as up, chromium() as (page, asked):
        Users(Home(up.home)).add("anna", Role.ADMIN, PASSWORD)
        page.set_default_timeout(WAIT_MS)
        expect.set_options(timeout=WAIT_MS)
        case(page, up)
    assert asked == {f"127.0.0.1:{up.port}"}


def case(page: Page, up: Talaria) -> None:
    base = up.url.removesuffix("/api")
    page.goto(f"{base}/v2/blocks/catalog")
    page.fill("[name=user]", "anna")
    page.fill("[name=password]", PASSWORD)
    page.click("button")
    page.get_by_text("DICOM TLS Target").wait_for()
    page.wait_for_function(LOADED)  # those of Prefect's own types, too

    page.goto(f"{base}/v2/blocks/catalog/dicom-target/create")
    title = page.get_by_label("Their AE title (Optional)", exact=True)
    title.wait_for()
    labels = [text.removesuffix(" (Optional)") for text in page.locator("form label").all_inner_texts()]
    assert labels == ["Name", *(one.title for one in ordered(DicomTarget))]
    page.fill("[name=blockName]", "made-there")
    page.get_by_label("Host", exact=True).fill("pacs.example.org")
    title.fill("A" * 17)
    page.get_by_role("button", name="Save").click()
    wrong = page.locator("form").get_by_text("must have 1 to 16 characters")
    wrong.wait_for()
    assert page.evaluate(TAKEN, "made-there") == 404
    title.fill("MAIN")
    wrong.wait_for(state="detached")
    page.get_by_role("button", name="Save").click()
    page.wait_for_url("**/v2/blocks/block/*")
    assert up.json("target", "show", "made-there")["aet_target"] == "MAIN"

    page.goto(f"{page.url}/edit")
    expect(title).to_have_value("MAIN")
    title.fill("B" * 17)
    page.get_by_role("button", name="Save").click()
    wrong.wait_for()
    assert page.url.endswith("/edit")
    title.fill("SECOND")
    wrong.wait_for(state="detached")
    page.get_by_role("button", name="Save").click()
    page.wait_for_url(re.compile(r"/v2/blocks/block/[^/]+$"))
    assert up.json("target", "show", "made-there")["aet_target"] == "SECOND"
