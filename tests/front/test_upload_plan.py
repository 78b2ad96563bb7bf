"""What would be sent of an upload is shown before it is; no Prefect is needed for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from blocks.folder import FolderTarget
from protocols.files import filesystem as fs
from talaria.front.access import Role
from talaria.service import dispatches
from tests.engine.material import study
from tests.front.house import House, run
from tests.front.people import words
from tests.transfer.test_uploads import archived


def there(folder: str) -> set[str]:
    return {one.name for one in Path(folder).rglob("*") if one.is_file()}


def test_what_would_be_sent_is_shown_and_then_sent_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    house = House(tmp_path / "home")
    for name, role in (("olga", Role.OPERATOR), ("adam", Role.ADMIN)):
        house.add(name, role)
    target, made, where = FolderTarget(folder=str(tmp_path)), list[str](), list[str]()
    target._block_document_name = "arch"

    async def load(*_: Any, **__: Any) -> list[Any]:
        return [target]

    async def create(office: Any, paths: list[str], targets: list[str], key: str, **asked: Any) -> dict[str, Any]:
        made.append(key)
        assert targets == ["arch"] and asked == {"exclude": "*.png", "priority": "normal", "each": ""}
        assert there(paths[0]) == {"1.dcm", "note.txt", "left.png"}
        return {"flow_run_id": "r1"}

    monkeypatch.setattr(dispatches, "load", load)
    monkeypatch.setattr(dispatches, "create_dispatch", create)
    content = archived(**{"1.dcm": study("U7", series=1, each=1)[0], "note.txt": b"no image"})
    files = [("files", ("day.zip", content)), ("files", ("left.png", b"x"))]

    async def case(client: httpx.AsyncClient) -> None:
        form = {"to": "arch", "exclude": "*.png", "do": "plan"}
        where.append((await client.post("/talaria/upload", data=form, files=files)).headers["location"])
        for _ in range(2):  # to look changes nothing
            page = words((await client.get(where[0])).text)
            assert "To arch 2 files" in page and "left.png" in page, page
        assert made == []
        for _ in range(2):
            assert (await client.post(where[0])).headers["location"] == "/talaria/dispatches/r1"
        assert (await client.get(where[0])).headers["location"] == "/talaria/dispatches/r1"

    async def stranger(client: httpx.AsyncClient) -> None:
        assert (await client.get(where[0])).status_code == (await client.post(where[0])).status_code == 404

    run(house, "olga", case)
    run(house, "adam", stranger)
    assert made == [where[0].split("/")[3]]


def test_what_is_sent_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut files may be empty that are not, and what is no image is left out without a word."""
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    house = House(tmp_path / "home")
    house.add("olga", Role.OPERATOR)
    flushed: list[set[str]] = []

    def noted(folder: Path, check: Any) -> bool:
        flushed.append(there(str(folder / "files")))
        return True

    async def create(office: Any, paths: list[str], targets: list[str], **asked: Any) -> dict[str, Any]:
        assert flushed == [{"1.dcm", "2.dcm"}]
        return {"flow_run_id": "r1"}

    monkeypatch.setattr(fs, "flush_all", noted)
    monkeypatch.setattr(dispatches, "create_dispatch", create)
    one, two = study("U7", series=1, each=2)
    files = [("files", ("day.zip", archived(**{"1.dcm": one}))), ("files", ("2.dcm", two))]

    async def case(client: httpx.AsyncClient) -> None:
        answer = await client.post("/talaria/upload", data={"to": "arch"}, files=files)
        assert answer.headers["location"] == "/talaria/dispatches/r1"

    run(house, "olga", case)
