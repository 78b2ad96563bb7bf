"""Pictures of every page, for people to look at: `make screenshots` makes those of the documentation.

python -m tests.front.screenshots FOLDER [--every]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.front.browser import chromium
from tests.front.scene import log_in, scene, search

LIGHT, DARK, PHONE = "light", "dark", "phone"
SIZES = {LIGHT: (1280, 800), DARK: (1280, 800), PHONE: (390, 844)}
# Those that are kept in the documentation in each form; all others are kept in the light one.
IN_EACH = ("home", "targets", "target-form", "dispatch-failed", "matches")
TALLEST = 1600  # pixels of a picture: below that, a page says nothing new


def main(folder: Path, *, every: bool) -> None:
    """Make the pictures; with `every`, each page in each form."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root, scene(Path(root)) as one, chromium() as (page, _):
        page.set_default_timeout(120_000)
        log_in(page, one.base)
        for form, (width, height) in SIZES.items():
            page.emulate_media(color_scheme="dark" if form == DARK else "light")
            page.set_viewport_size({"width": width, "height": height})
            for name, path in [*one.paths.items(), ("matches", "")]:
                if form != LIGHT and name not in IN_EACH and not every:
                    continue
                if path:
                    page.goto(one.base + path)
                else:
                    search(page, one)
                page.wait_for_load_state("networkidle")
                tall = min(TALLEST, int(page.evaluate("document.documentElement.scrollHeight")))
                page.set_viewport_size(
                    {"width": width, "height": tall}
                )  # so that what sticks to its end covers nothing
                page.screenshot(path=folder / f"{name}-{form}.png")
                page.set_viewport_size({"width": width, "height": height})


if __name__ == "__main__":
    main(Path(sys.argv[1]), every="--every" in sys.argv)
