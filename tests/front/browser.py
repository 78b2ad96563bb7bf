"""A browser for tests of pages, and the hosts that it asks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from playwright.sync_api import Page, sync_playwright

WAIT_MS = 120_000
VIOLATIONS = "addEventListener('securitypolicyviolation', event => console.error('CSP ' + event.violatedDirective))"


@contextmanager
def chromium() -> Iterator[tuple[Page, set[str]]]:
    """Yield a page of Debian's Chromium, and the hosts that are asked, each `name:port`, as they are asked."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page, asked = browser.new_page(), set[str]()

        def ask(url: str) -> None:
            if host := urlsplit(url).netloc:  # none of data: and blob:
                asked.add(host)

        page.on("request", lambda request: ask(request.url))
        try:
            yield page, asked
        finally:
            browser.close()
