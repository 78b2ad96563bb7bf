"""pyxnat at work: what it carries, what it must not bring, and what it says no word of."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from pyxnat.core.interfaces import Interface
from pyxnat.core.manage import PreArchive
from pyxnat.core.resources import CObject

from protocols.xnat import client as module
from talaria.testing import studies
from talaria.testing.harness import attempt
from tasks.xnat import check
from tests.servers.xnat import Fault, Reply, Xnat
from tests.targets.xnat import serving, xnat_target
from transfer.errors import Cancelled, Interrupted
from transfer.outcome import Kind


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Xnat]:
    with serving(tmp_path / "xnat") as running:
        yield running
        assert not running.store.logins, "a session at XNAT was not ended"


def test_pandas_and_nibabel_are_neither_installed_nor_imported(tmp_path: Path) -> None:
    """A whole delivery, in a process where importing them fails."""
    studies.ct(tmp_path / "study", 2)
    with serving(tmp_path / "xnat") as server:
        script = textwrap.dedent(f"""
            import sys
            from pathlib import Path
            for name in ("pandas", "nibabel"):
                sys.modules[name] = None  # its import raises
            from talaria.testing.harness import attempt
            from tests.targets.xnat import xnat_target
            attempt(xnat_target({server.url!r}, destination="prearchive"), Path({str(tmp_path / "study")!r})).require()
            assert not [name for name in sys.modules if name.startswith("pyxnat.core.derivatives.")]
            print("delivered", "pyxnat" in sys.modules)
        """)
        ran = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2]
        )
    assert ran.stdout == "delivered True\n", ran.stderr
    root = Path(__file__).parents[2]
    for file in ("pyproject.toml", "uv.lock"):
        for name in ("pandas", "nibabel"):
            assert f'"{name}' not in (root / file).read_text().replace(f'name = "{name}', f'"{name}')


def test_the_private_names_of_pyxnat_that_are_used() -> None:
    """They hold for exactly the version that pyproject.toml names."""
    import pyxnat.core.interfaces as interfaces

    assert version("pyxnat") == "1.6.4"
    assert f'"pyxnat=={version("pyxnat")}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert callable(interfaces.__find_all_functions__)
    source = Path(interfaces.__file__).read_text()
    assert source.count("__find_all_functions__(derivatives)") == 1
    assert "self._http = requests.Session()" in source
    assert callable(Interface._get_entry_point)


def test_pyxnat_carries_a_delivery(server: Xnat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Login, requests, projects, and the prearchive's scans, resources and files: no request goes past it."""
    calls: Counter[str] = Counter()
    inside: list[str] = []  # calls of pyxnat that are under way
    past: list[str] = []

    def recorded(owner: Any, name: str) -> None:
        really = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            calls[f"{owner.__name__}.{name}"] += 1
            inside.append(name)
            try:
                return really(*args, **options)
            finally:
                inside.remove(name)

        monkeypatch.setattr(owner, name, call)

    for owner, names in (
        (Interface, ("_get_entry_point", "get", "post", "close_jsession", "delete")),
        (PreArchive, ("get_scans", "get_resources", "get_files")),
        (CObject, ("get",)),
    ):
        for name in names:
            recorded(owner, name)
    sends = module.Adapter.send

    def send(self: Any, request: Any, *rest: Any, **options: Any) -> Any:
        if not inside:
            past.append(request.url)
        return sends(self, request, *rest, **options)

    monkeypatch.setattr(module.Adapter, "send", send)
    studies.ct(tmp_path / "study", 2)
    sent = attempt(xnat_target(server.url, destination="prearchive"), tmp_path / "study")
    assert {outcome.kind for outcome in sent.outcomes.values()} == {Kind.DELIVERED}
    assert not past
    assert set(calls) == {
        "Interface._get_entry_point", "Interface.get", "Interface.post", "Interface.close_jsession", "Interface.delete",
        "PreArchive.get_scans", "PreArchive.get_resources", "PreArchive.get_files", "CObject.get",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "first", "again"),
    [({}, 11, 9), ({"destination": "prearchive"}, 13, 11), ({"verify": "listed"}, 11, 9)],
)
def test_no_more_requests_than_before_pyxnat_carried_them(
    server: Xnat, tmp_path: Path, settings: dict[str, Any], first: int, again: int
) -> None:
    studies.ct(tmp_path / "study", 3)
    for most in (first, again):
        before = len(server.seen)
        attempt(xnat_target(server.url, **settings), tmp_path / "study").require()
        assert len(server.seen) - before <= most, server.seen[before:]
    before = len(server.seen)
    assert check(xnat_target(server.url)).ok
    assert len(server.seen) - before <= 6


@pytest.mark.parametrize(
    "reply",
    [
        Reply("", 200, "text/csv"),
        Reply("[]", 200, "application/json"),
        Reply('{"ResultSet": {"Result": []}}', 200, "application/json"),
        Reply('"other"\n"P"\n', 200, "text/csv"),
        Reply("<html><body>Please log in</body></html>", 200, "text/html"),
    ],
)
@pytest.mark.parametrize("path", ["/data/projects", "/data/prearchive/projects/P/.*/(scans|resources|files)"])
def test_what_is_no_table_is_never_an_empty_one(server: Xnat, tmp_path: Path, path: str, reply: Reply) -> None:
    """pyxnat makes an empty list of it, or fails in one way or another."""
    studies.ct(tmp_path / "study", 1)
    server.faults.append(Fault("GET", path, reply))
    sent = attempt(xnat_target(server.url, destination="prearchive"), tmp_path / "study")
    assert isinstance(sent.error, Interrupted), repr(sent.error)


def test_a_cancelled_question_is_no_empty_answer(server: Xnat) -> None:
    """pyxnat's list of projects takes any error for none."""
    stop: list[bool] = []

    def ask() -> None:
        if stop:
            raise Cancelled("the dispatch was cancelled")

    from tasks.xnat import connect

    with connect(xnat_target(server.url), ask) as client:
        stop.append(True)
        with pytest.raises(Cancelled):
            client.projects()
        stop.clear()
        assert client.projects() == {"P"}
