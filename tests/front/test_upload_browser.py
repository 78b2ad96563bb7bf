"""A folder uploaded in a browser: what is wrong is said before, and a piece that is lost on the way comes again."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Route, expect

from talaria.front.access import Role
from tests.engine.material import folder, study
from tests.front.browser import WAIT_MS, chromium
from tests.front.people import person
from tests.front.scene import USER, log_in
from tests.servers.up import talaria

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_folder_is_uploaded_though_a_piece_is_lost_on_the_way(tmp_path: Path) -> None:
    chosen = tmp_path / "mine" / "ct"
    chosen.mkdir(parents=True)
    for number, content in enumerate(study("X1", series=1, each=4, PatientComments="x" * 3_000_000)):
        (chosen / f"{number}.dcm").write_bytes(content)
    pieces: list[str] = []
    failed: list[str] = []

    def pass_on(route: Route) -> None:
        if route.request.method == "POST" and not route.request.url.endswith("/send"):
            pieces.append(route.request.url)
            if len(pieces) == 2:
                route.abort()
                return
        route.continue_()

    with talaria(tmp_path) as up:
        # Before the browser, whose loop runs in this thread: commands have one of their own.
        up.apply(arch=folder(tmp_path / "arch"))
        people = person(up, Role.ADMIN, USER)
        next(people)
        with chromium() as (page, _):
            page.set_default_timeout(WAIT_MS)
            expect.set_options(timeout=WAIT_MS)
            page.on("pageerror", lambda error: failed.append(str(error)))
            page.route("**/talaria/uploads/*/*", pass_on)
            base = up.url.removesuffix("/api")
            log_in(page, base)
            page.goto(f"{base}/talaria/upload")
            page.set_input_files("#folder", str(tmp_path / "mine"))
            expect(page.locator("[data-list]")).to_contain_text("4 files")
            page.get_by_role("button", name="Upload and send").click()
            expect(page.locator("[data-problem]")).to_have_text("Choose at least one target.")
            page.check("[name=to]")
            page.get_by_role("button", name="Upload and send").click()
            page.wait_for_url("**/talaria/dispatches/*")
            expect(page.locator("#now")).to_contain_text("4 of 4 delivered")
        next(people, None)
    assert failed == [] and len(pieces) == 5
    assert len(list((tmp_path / "arch").rglob("*.dcm"))) == 4
