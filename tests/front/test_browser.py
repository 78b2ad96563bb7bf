"""Prefect's UI in a browser behind the front door: a viewer sees it all, nothing fails, and no other host is asked."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Response

from talaria.front.access import Role
from talaria.front.users import Users
from tests.front.browser import chromium
from tests.front.door import PASSWORD
from tests.servers.up import talaria
from transfer.home import Home

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
PAGES = ("dashboard", "runs", "flows", "deployments", "work-pools", "blocks", "events", "settings")
# It has text, and has asked the API; some pages ask again and again, so the network is never idle.
SHOWN = """document.body.innerText.trim().length > 60 && performance.getEntriesByType("resource")
    .filter(one => one.name.includes("/api/") && one.responseEnd).length > 1"""


def test_a_viewer_sees_prefect_s_pages_and_no_other_host_is_asked(tmp_path: Path) -> None:
    failed: list[str] = []

    def answered(response: Response) -> None:
        if response.status >= 400:
            failed.append(f"{response.status} {response.request.method} {response.url}")

    with talaria(tmp_path) as up:
        Users(Home(up.home)).add("anna", Role.VIEWER, PASSWORD)
        base = up.url.removesuffix("/api")
        with chromium() as (page, asked):
            page.on("pageerror", lambda error: failed.append(str(error)))
            page.on("response", answered)
            page.goto(f"{base}/v2/dashboard")
            page.fill("[name=user]", "anna")
            page.fill("[name=password]", PASSWORD)
            page.click("button")
            page.wait_for_url("**/v2/dashboard*", timeout=120_000)
            for name in PAGES:
                page.goto(f"{base}/v2/{name}", timeout=120_000)
                page.wait_for_function(SHOWN, timeout=120_000)
                assert "/talaria/login" not in page.url
    assert failed == []
    assert asked == {urlsplit(base).netloc}
