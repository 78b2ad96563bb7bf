"""The conformance suite: every case against every harness of a type of target.

A test file takes the whole suite over, and says which harnesses it is for (`harness.Harness`; one is one server), and
in `SOURCES`, by name, from which of them can be pulled, if any:

    from talaria.testing.conformance import *
    from talaria_webdav.harness import HARNESSES

    pytest tests/conformance.py -k webdav            this type; `-k dicom-storescp` one server
    pytest --pyargs talaria.testing.conformance      every type that another package has installed here

Where a type differs, its driver's Facts or its Harness declare it, and the suite asserts that; nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blocks import EXTENSIONS
from talaria.testing.cases.arrival import *  # noqa: F403
from talaria.testing.cases.checks import *  # noqa: F403
from talaria.testing.cases.compare import *  # noqa: F403
from talaria.testing.cases.faults import *  # noqa: F403
from talaria.testing.cases.pulls import *  # noqa: F403
from talaria.testing.cases.repeats import *  # noqa: F403
from talaria.testing.cases.reports import *  # noqa: F403
from talaria.testing.harness import Factory, Harness, of_extensions, sources_of_extension


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each case for each harness of the test file that imports the suite, or for those of other packages."""
    if "harness" in metafunc.fixturenames:
        harnesses: dict[str, Factory] = getattr(metafunc.module, "HARNESSES", None) or of_extensions()
        if not harnesses:
            raise pytest.UsageError("no harness to test: define HARNESSES, or install a package that adds a type")
        metafunc.parametrize("harness", [pytest.param(f, id=name) for name, f in harnesses.items()], indirect=True)
    if "source" in metafunc.fixturenames:
        own: dict[str, Factory] | None = getattr(metafunc.module, "HARNESSES", None)
        if own:
            sources = {name: own[name] for name in getattr(metafunc.module, "SOURCES", ())}
        else:
            sources = {name: factory for one in EXTENSIONS for name, factory in sources_of_extension(one).items()}
        given = [pytest.param(factory, id=name) for name, factory in sources.items()]
        metafunc.parametrize("source", given or [pytest.param(None, id="none")], indirect=True)


@pytest.fixture
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    server = tmp_path / "server"
    server.mkdir()
    with request.param(server) as made:
        yield made


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness | None]:
    """A harness whose server can be queried; None where no type can be."""
    if request.param is None:
        yield None
        return
    server = tmp_path / "server"
    server.mkdir()
    with request.param(server) as made:
        yield made


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The folder for the files that a test sends."""
    folder = tmp_path / "study"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give each test a state directory of its own: what drivers keep there (known hosts, tokens) is not the user's."""
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "talaria"))


__all__ = [  # what a test file takes over with `import *`: the cases, and the fixtures that they use
    *(name for name in globals() if name.startswith("test_")),
    "harness",
    "own_home",
    "pytest_generate_tests",
    "source",
    "study",
]
