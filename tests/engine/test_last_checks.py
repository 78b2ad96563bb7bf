"""The last checks of targets are read once, and then only what is new; a reading that breaks off counts for nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tasks.checking import LastChecks, keep
from transfer.health import Health


class Server:
    """Answers as Prefect's API does, with so many checks; counts what it was asked for."""

    def __init__(self, count: int) -> None:
        self.checks = [self.check(f"check-target-{number}", number) for number in range(count)]
        self.asked, self.fails_at = list[int](), -1

    def check(self, key: str, minute: int, data: Any = "[]") -> dict[str, Any]:
        made = "2026-11-29T10:00:00Z"
        time = f"2026-11-29T{11 + minute // 60}:{minute % 60:02}:00.500000Z"
        newest = {"latest_id": f"{key} {minute}", "created": made, "updated": time}
        return newest | {"key": key, "type": "table", "description": "healthy", "data": data}

    async def request(self, method: str, path: str, *, json: dict[str, Any]) -> Any:
        assert (method, path, json["sort"]) == ("POST", "/artifacts/latest/filter", "UPDATED_DESC")
        if json["offset"] == self.fails_at:
            raise httpx.ReadError("gone")
        self.asked.append(json["limit"])
        newest = sorted(self.checks, key=lambda one: str(one["updated"]), reverse=True)
        page = newest[json["offset"] : json["offset"] + json["limit"]]
        return SimpleNamespace(json=lambda: page)


def test_only_what_is_new_is_read_again() -> None:
    server, known = Server(120), LastChecks()
    server.checks.append(server.check("check-disk", 130, "# no table"))  # a stranger's
    server.checks.append(server.check("my-check-target-1", 131))
    targets: Any = [SimpleNamespace(name=f"target-{number}", made=None) for number in range(120)]

    def read() -> dict[str, dict[str, Any]]:
        return asyncio.run(known.read(server, targets))  # type: ignore[arg-type]

    server.fails_at = 50
    with pytest.raises(httpx.ReadError):
        read()
    server.fails_at, server.asked = -1, []
    assert len(read()) == 120 and len(server.asked) == 3  # and not what the first one had read
    server.asked = []
    server.checks[7] = server.check("check-target-7", 140)
    assert read()["target-7"]["time"] == "2026-11-29T13:20:00+00:00"
    assert server.asked == [20, 20]  # the second had nothing new
    server.asked = []
    assert len(read()) == 120 and server.asked == [20]


@pytest.mark.parametrize("damaged", ["", "{}", "[]", '{"time": "then", "probes": []}', '{"time": 5, "probes": []}'])
def test_a_damaged_file_of_a_check_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str) -> None:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path))
    targets: Any = [SimpleNamespace(name=name, made=None) for name in ("here", "target-0")]
    for one in targets:
        keep(one, Health())
    (tmp_path / "checks" / "target-0.json").write_text(damaged)
    found = asyncio.run(LastChecks().read(Server(1), targets))  # type: ignore[arg-type]
    assert found.keys() == {"here", "target-0"} and found["target-0"]["time"] == "2026-11-29T11:00:00+00:00"
