"""Files that pages load: for everybody, kept by browsers as long as their content is the same."""

from __future__ import annotations

import asyncio
import hashlib
import tomllib
from pathlib import Path

import httpx
import pytest

from talaria.front.static import FOLDER, PATH, asset, type_icon
from tests.front.door import FrontDoor


def get(folder: Path, path: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with FrontDoor(folder).browser() as client:
            return await client.get(path)

    return asyncio.run(ask())


@pytest.mark.parametrize("name", [path.relative_to(FOLDER).as_posix() for path in sorted(FOLDER.rglob("*.svg"))])
def test_a_file_is_answered_without_a_login_and_kept_for_ever(tmp_path: Path, name: str) -> None:
    answer = get(tmp_path, asset(name))
    assert answer.status_code == 200 and answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["content-type"] == "image/svg+xml"
    assert answer.headers["cache-control"].endswith("immutable")


def test_a_plain_name_is_kept_for_a_while_only(tmp_path: Path) -> None:
    answer = get(tmp_path, f"{PATH}/icons/dicom.svg")
    assert answer.status_code == 200 and "immutable" not in answer.headers["cache-control"]


@pytest.mark.parametrize(
    "path", ["icons/nothing.svg", "0123456789abcdef/icons/dicom.svg", "", "icons", "%2e%2e/static.py"]
)
def test_what_is_not_there_is_not_found(tmp_path: Path, path: str) -> None:
    assert get(tmp_path, f"{PATH}/{path}").status_code in (400, 404)


def test_types_from_outside_share_an_icon() -> None:
    assert type_icon("webdav") == asset("icons/target.svg") != type_icon("dicom") == asset("icons/dicom.svg")


def test_what_others_wrote_is_what_vendor_toml_says_with_its_licence() -> None:
    vendor = FOLDER / "vendor"
    known = tomllib.loads((vendor / "vendor.toml").read_text())
    for name, one in known.items():
        assert hashlib.sha256((vendor / one["as"]).read_bytes()).hexdigest() == one["sha256"]
        assert (vendor / f"{name}.LICENSE").read_text().strip() and one["version"] and one["licence"]
    scripts = {path.name for path in vendor.glob("*.js")}
    assert scripts == {one["as"] for one in known.values()}
