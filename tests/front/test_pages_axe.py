"""Every page in Chromium, light and dark, wide and narrow: axe-core finds no barrier, and nothing scrolls sideways."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page

from tests.front.browser import VIOLATIONS, WAIT_MS, chromium
from tests.front.scene import Scene, log_in, scene, search

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
AXE = Path(__file__).with_name("axe") / "node_modules" / "axe-core" / "axe.min.js"
RUN = """() => axe.run(document, {runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}).then(
    found => found.violations.map(one => [one.id, one.impact, one.nodes.map(node => node.html.slice(0, 200))]))"""
SIDEWAYS = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


def test_no_page_has_a_barrier(tmp_path: Path) -> None:
    problems: list[str] = []
    with scene(tmp_path) as one, chromium() as (page, asked):
        page.set_default_timeout(WAIT_MS)
        page.add_init_script(VIOLATIONS)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text) if "CSP" in said.text else None)
        log_in(page, one.base)
        for scheme, width in (("light", 1280), ("dark", 1280), ("light", 390), ("light", 320)):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            page.set_viewport_size({"width": width, "height": 800})
            for name, path in [*one.paths.items(), ("matches", "")]:
                looked(page, one, name, path, f"{name} {scheme} {width}", problems)
    assert "\n".join(problems) == ""
    assert asked == {urlsplit(one.base).netloc}


def looked(page: Page, one: Scene, name: str, path: str, where: str, problems: list[str]) -> None:
    if path:
        page.goto(one.base + path)
    else:
        search(page, one)
    page.evaluate(AXE.read_text(encoding="utf-8"))  # our policy forbids a script element
    for rule, impact, nodes in page.evaluate(RUN):
        problems.append(f"{where}: {impact} {rule}: {nodes}")
    if page.evaluate(SIDEWAYS):
        problems.append(f"{where}: scrolls sideways")
