"""Talaria's pages in a browser, with their scripts: nothing fails, and no other host is asked."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect

from talaria.front.access import Role
from talaria.front.users import Users
from tests.engine.material import folder
from tests.front.browser import VIOLATIONS, WAIT_MS, chromium
from tests.front.door import PASSWORD
from tests.servers.receiver import Receiver, receiver
from tests.servers.up import talaria
from transfer.home import Home

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_target_is_added_tested_and_deleted_with_mouse_and_keyboard(tmp_path: Path) -> None:
    failed: list[str] = []
    folder = tmp_path / "archive"
    with talaria(tmp_path) as up:
        Users(Home(up.home)).add("anna", Role.ADMIN, PASSWORD)
        base = up.url.removesuffix("/api")
        with chromium() as (page, asked):
            page.set_default_timeout(WAIT_MS)
            expect.set_options(timeout=WAIT_MS)
            page.add_init_script(VIOLATIONS)
            page.on("pageerror", lambda error: failed.append(str(error)))
            page.on("console", lambda one: failed.append(one.text) if "CSP" in one.text else None)
            walk(page, base, folder)
    assert failed == []
    assert asked == {urlsplit(base).netloc}


def walk(page: Page, base: str, folder: Path) -> None:
    page.goto(f"{base}/talaria/")
    page.fill("[name=user]", "anna")
    page.fill("[name=password]", PASSWORD)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Home")
    page.get_by_role("link", name="Add target").click()
    page.locator("a[href='/talaria/add-target/folder']").click()

    # Tested before it is saved: the step that fails is shown below the form, and nothing typed is lost.
    page.get_by_label("Name (required)").fill("archive")
    page.get_by_label("Folder on the worker").fill(str(folder))
    page.get_by_role("button", name="Test").click()
    expect(page.locator("#check")).to_contain_text("A step failed.")
    assert page.get_by_label("Folder on the worker").input_value() == str(folder)
    folder.mkdir()
    page.get_by_role("button", name="Test").click()
    expect(page.locator("#check")).to_contain_text("All steps succeeded.")

    # Tabs, by arrows; what is wrong in a tab or a fold that is closed is opened by its link.
    page.get_by_role("tab", name="Configuration").focus()
    page.keyboard.press("ArrowRight")
    page.get_by_label("Contact").fill("nobody")
    page.get_by_role("tab", name="Configuration").click()
    page.get_by_role("button", name="Save").click()
    expect(page.locator("[data-errors]")).to_be_focused()
    page.get_by_role("tab", name="Configuration").click()
    page.locator("[data-errors] a").click()
    expect(page.get_by_label("Contact")).to_be_focused()
    page.get_by_label("Contact").fill("team@example.org")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("archive")

    page.get_by_role("button", name="Test").click()
    expect(page.locator("#check")).to_contain_text("All steps succeeded.")
    page.get_by_role("link", name="Targets").click()
    page.get_by_role("searchbox").press_sequentially("nothing")
    expect(page.locator("#list")).to_contain_text("No target matches.")
    page.get_by_role("searchbox").fill("arch")
    expect(page.locator("#list")).to_contain_text("1 of 1 targets")
    assert page.url.endswith("q=arch&type=&direction=&state=&sort=state")
    page.reload()
    page.get_by_role("link", name="archive").click()

    page.get_by_role("link", name="Delete").click()
    expect(page.get_by_role("button", name="Cancel")).to_be_focused()  # Enter deletes nothing by mistake
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.get_by_role("link", name="Delete").click()
    page.get_by_role("button", name="Delete archive").click()
    expect(page.get_by_role("status").first).to_contain_text("The target was deleted.")


def test_a_source_and_a_notification_are_added_by_keyboard_and_mouse(tmp_path: Path) -> None:
    failed: list[str] = []
    (tmp_path / "inbox").mkdir()
    with talaria(tmp_path) as up, receiver() as hook:
        Users(Home(up.home)).add("anna", Role.ADMIN, PASSWORD)
        up.apply(archive=folder(tmp_path / "archive"))
        base = up.url.removesuffix("/api")
        with chromium() as (page, asked):
            page.set_default_timeout(WAIT_MS)
            expect.set_options(timeout=WAIT_MS)
            page.add_init_script(VIOLATIONS)
            page.on("pageerror", lambda error: failed.append(str(error)))
            page.on("console", lambda one: failed.append(one.text) if "CSP" in one.text else None)
            page.goto(f"{base}/talaria/login?next=/talaria/sources")
            page.fill("[name=user]", "anna")
            page.fill("[name=password]", PASSWORD)
            page.keyboard.press("Enter")
            add_source(page, tmp_path)
            add_notification(page, hook)
    assert failed == []
    assert asked == {urlsplit(base).netloc}


def by_keyboard(page: Page, name: str) -> None:
    """Reach a link or button by the Tab key alone, and press it."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent.trim()").startswith(name):
            page.keyboard.press("Enter")
            return
    raise AssertionError(f"{name} is not reached by the Tab key")


def add_source(page: Page, root: Path) -> None:
    expect(page.get_by_role("heading", level=1)).to_have_text("Sources")
    by_keyboard(page, "Add source")
    expect(page.get_by_role("heading", level=1)).to_have_text("Add a source")
    by_keyboard(page, "DICOM")

    # Lines of a table: more of them, what was typed stays, and a wrong one is led to.
    page.get_by_label("Name (required)").fill("router")
    page.get_by_label("Who may send, line 1: AE title").fill("CT*")
    page.locator("#peers").get_by_role("button", name="More lines").click()
    page.get_by_label("Who may send, line 3: Host").fill("10.1.0.0/99")
    page.locator("#targets").fill("archive")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("[data-errors]")).to_be_focused()
    page.locator("[data-errors] a").click()
    expect(page.get_by_label("Who may send, line 2: Host")).to_be_focused()
    assert page.get_by_label("Who may send, line 1: AE title").input_value() == "CT*"

    # Another type, tested before it is saved, beside the form.
    page.goto(page.url.partition("/add-source")[0] + "/add-source/inbox")
    page.get_by_label("Name (required)").fill("ward")
    page.get_by_label("Folder on the worker").fill(str(root / "nowhere"))
    page.locator("#targets").fill("archive")
    page.get_by_role("button", name="Test").click()
    expect(page.locator("#check")).to_contain_text("It can't be used")
    assert page.get_by_label("Name (required)").input_value() == "ward"
    page.get_by_label("Folder on the worker").fill(str(root / "inbox"))
    page.get_by_role("button", name="Test").click()
    expect(page.locator("#check")).to_contain_text("It can be used.")
    page.get_by_label("Folder on the worker").press("Enter")
    expect(page.get_by_role("status").first).to_contain_text("It was saved.")
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("status").first).to_contain_text("It is paused")
    page.get_by_role("link", name="Delete").click()
    expect(page.get_by_role("dialog")).to_contain_text("No file is touched")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


def add_notification(page: Page, hook: Receiver) -> None:
    page.get_by_role("link", name="Notifications").click()
    page.get_by_role("link", name="Add notification").click()
    page.locator("a[href='/talaria/add-rule/webhook']").click()
    page.get_by_label("Name (required)").fill("chat")
    page.get_by_label("URL").fill(hook.url)
    page.get_by_label("A dispatch is late").uncheck()
    page.get_by_role("button", name="Send a test message").click()
    expect(page.locator("#check")).to_contain_text("The test message was sent.")
    assert len(hook.taken) == 1
    assert page.get_by_label("URL").input_value() == hook.url  # what was typed stays, a secret, too
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("status").first).to_contain_text("It was saved.")
    page.get_by_role("link", name="Edit").click()
    assert not page.get_by_label("A dispatch is late").is_checked()
    page.locator("#url").fill(hook.url + "?other")  # typing says that it is to be replaced
    assert page.get_by_label("Replace").first.is_checked()
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("status").first).to_contain_text("The change was saved.")
