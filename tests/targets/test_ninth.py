"""A ninth type from outside: the package that docs/ninth-target.md prints is built, installed beside us and used.

And packages with which something is wrong: they are named in one line, and every other type works.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocks import EXTENSIONS, TYPES
from talaria.testing import studies
from talaria.testing.process import free_port, server
from tests.servers.up import Talaria

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs/ninth-target.md"
UV = ROOT / ".cache/uv/bin/uv"
CASES = sum(
    len(re.findall(r"^def test_", path.read_text(), re.MULTILINE))
    for path in (ROOT / "talaria/testing/cases").glob("*.py")
)
OWN = [name for name in TYPES if name not in EXTENSIONS]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the tutorial prints."""
    folder = tmp_path_factory.mktemp("package") / "talaria-webdav"
    for path, code in re.findall(
        r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL
    ):
        studies.write(folder / path, code.encode())
    return folder


@pytest.fixture(scope="module")
def beside(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that the package is installed in: on the path of what a test starts, not in our environment."""
    folder = tmp_path_factory.mktemp("beside")
    argv = [UV, "pip", "install", "--quiet", "--offline", "--no-deps", "--no-build-isolation", "--no-config"]
    ran = subprocess.run(
        [*argv, "--python", sys.executable, "--target", folder, package],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "UV_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))},
    )
    assert ran.returncode == 0, ran.stderr
    yield folder


def environment(folder: Path) -> dict[str, str]:
    given = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return {**given, "PYTHONPATH": str(folder)}


def suite(package: Path, beside: Path, *arguments: str) -> str:
    """Run pytest where nothing of our tests is; return its closing line."""
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=package,
        env=environment(beside),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    return ran.stdout.strip().splitlines()[-1]


def test_its_package_passes_the_conformance_suite(package: Path, beside: Path) -> None:
    closing = suite(package, beside, "tests")
    passed = re.match(r"(\d+) passed in ", closing)
    assert passed and int(passed[1]) >= CASES, closing


def test_the_suite_finds_what_packages_add(package: Path, beside: Path) -> None:
    closing = suite(package, beside, "--pyargs", "talaria.testing.conformance", "-k", "check_ok or push_empty_file")
    assert re.match(r"[2-9] passed, \d+ deselected", closing), closing


@pytest.fixture(scope="module")
def up(beside: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talaria]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(beside))
        one = Talaria(tmp_path_factory.mktemp("up"))
        try:
            yield one.start()
        finally:
            one.stop()


def test_it_is_applied_tested_and_sent_to_as_any_other(up: Talaria, tmp_path: Path) -> None:
    types = up.json("target", "types")["types"]
    assert list(types) == [*OWN, "webdav"]
    assert types["webdav"]["works"] and types["webdav"]["verifies"] == ["accepted", "listed"]
    assert types["webdav"]["fields"]["password"]["secret"]
    # Its block is there for whoever looks with Prefect's own means, before any target is.
    assert up.api("GET", "/block_types/slug/webdav-target")["name"] == "WebDAV Target"

    there, port = tmp_path / "there", free_port()
    there.mkdir()
    program = Path(sys.executable).with_name("wsgidav")
    argv = [program, "--host", "127.0.0.1", "--port", str(port), "--root", there, "--auth", "anonymous"]
    with server([str(one) for one in argv], port, tmp_path / "wsgidav.log"):
        file = tmp_path / "targets.yaml"
        file.write_text(f"targets:\n  cloud: {{type: webdav, url: 'http://127.0.0.1:{port}', verify: listed}}\n")
        assert up.json("target", "apply", str(file))["targets"] == [{"name": "cloud", "action": "created"}]
        assert up.json("target", "test", "cloud")["ok"]
        sent = studies.sample(tmp_path / "study")
        result = up.json("send", str(tmp_path / "study"), "--to", "cloud")
        assert result["state"] == "delivered"
        assert result["targets"]["cloud"]["verified"] == "listed"
        again = up.json("send", str(tmp_path / "study"), "--to", "cloud")
        assert again["targets"]["cloud"]["already"] == len(sent)
    found = {p.relative_to(there / result["dispatch_id"]) for p in there.rglob("*") if p.is_file()}
    assert found == {p.relative_to(tmp_path / "study") for p in sent} | {Path(".complete")}


def test_a_target_whose_package_is_gone_is_listed_and_can_be_removed(up: Talaria, tmp_path: Path) -> None:
    file = tmp_path / "targets.yaml"
    file.write_text("targets:\n  cloud: {type: webdav, url: 'http://127.0.0.1:9'}\n")
    up.json("target", "apply", str(file))
    gone = {  # by a command at the same server, in this process, which has no such package, as `talaria up` has
        "TALARIA_HOME": str(tmp_path / "another"),
        "PREFECT_API_URL": up.url,
        "PREFECT_API_AUTH_STRING": (up.home / "worker.auth").read_text().strip(),
    }
    listed = up.here("target", "list", "--json", env=gone)
    (one,) = json.loads(listed.stdout)["targets"]
    assert one["name"] == "cloud" and "install the package that adds it" in one["broken"]
    sent = up.here("send", str(tmp_path), "--to", "cloud", env=gone)
    assert sent.returncode == 2 and "webdav-target" in sent.stderr and "Traceback" not in sent.stderr
    assert up.here("target", "remove", "cloud", env=gone).returncode == 0


# ---- something is wrong with a package


GOOD = """
from typing import ClassVar
from blocks import Extension, Target

class {name}Target(Target):
    _block_type_name = "{block_name}"
    _block_type_slug = "{slug}"
    type_name: ClassVar[str] = "{type}"

extension = Extension({name}Target, "{driver}")
"""


def good(type_name: str, slug: str = "", block_name: str = "", driver: str = "tasks.folder") -> str:
    names = {"slug": slug or f"{type_name}-target", "block_name": block_name or f"{type_name} Target"}
    return GOOD.format(name=type_name.title(), type=type_name, driver=driver, **names)


def install(folder: Path, package: str, points: dict[str, str], code: str) -> None:
    """Put a package into a folder as an installer does."""
    module = package.replace("-", "_")
    lines = "".join(f"{name} = {module}:{value}\n" for name, value in points.items())
    studies.write(folder / f"{module}.py", code.encode())
    studies.write(folder / f"{module}-2.0.dist-info/METADATA", f"Name: {package}\nVersion: 2.0\n".encode())
    studies.write(folder / f"{module}-2.0.dist-info/entry_points.txt", f"[talaria.targets]\n{lines}".encode())


WRONG: dict[str, tuple[str, str, str]] = {  # the entry point's name, the module's code, what is said
    "its-import-fails": ("aa", "import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
    "it-ends-the-program": ("bb", "raise SystemExit('line one\\nline two')", "SystemExit: line one"),
    "it-has-no-such-name": ("cc", "", "AttributeError: "),
    "it-is-something-else": ("dd", "extension = object()", "is not a blocks.Extension"),
    "its-block-is-none": ("ee", "from blocks import Extension\nextension = Extension(dict, '')", "not a subclass"),
    "its-name-is-another": ("ff", good("gg"), "type_name is 'gg', the entry point's name 'ff'"),
    "its-name-is-ours": ("s3", good("s3", "other"), "there is a type s3 already"),
    "its-block-type-is-ours": ("hh", good("hh", "folder-target"), "has the block type 'folder-target' of type folder"),
    "its-name-is-not-valid": ("A b", good("A b"), "is not valid as the name of a type"),
    "its-syntax-is-wrong": ("jj", "def", "SyntaxError: "),
}


DRIVERS = {  # modules that hold no driver of the type, and what is said
    "kk": ("no_such_driver", "ModuleNotFoundError: No module named 'no_such_driver'"),
    "ll": ("tasks.folder", "tasks.folder.driver is not a Driver of targets of type ll"),
    "mm": ("json", "AttributeError: "),
}


def talaria(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command with the packages that are in `home`."""
    env = {**os.environ, "PYTHONPATH": str(home), "TALARIA_HOME": str(home / "home")}
    argv = [sys.executable, "-P", "-m", "talaria", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, env=env, check=False, cwd=home)


def test_what_is_wrong_with_a_package_is_named_in_one_line_and_the_others_work(tmp_path: Path) -> None:
    for package, (name, code, _) in WRONG.items():
        install(tmp_path, package, {name: "extension"}, code)
    for package in ("twice-one", "twice-two"):
        install(tmp_path, package, {"zz": "extension"}, good("zz"))
    for name, (module, _) in DRIVERS.items():
        install(tmp_path, f"{name}-driver", {name: "extension"}, good(name, driver=module))

    ran = talaria(tmp_path, "target", "types", "--json")
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert list(document["types"]) == [*OWN, *DRIVERS]
    assert [name for name, one in document["types"].items() if one["works"]] == OWN
    refused = document["refused"]
    assert set(refused) == {name for name, _, _ in WRONG.values()} | {"zz"}
    for package, (name, _, words) in WRONG.items():
        assert words in refused[name], name
        assert f"package {package} 2.0" in refused[name]
    assert "package twice-one 2.0 and package twice-two 2.0" in refused["zz"]
    problems = {name: document["types"][name]["problem"] for name in DRIVERS}
    for name, (_, words) in DRIVERS.items():
        assert words in problems[name]

    said = talaria(tmp_path, "target", "types").stderr.splitlines()
    assert said == [
        *(f"talaria: type {name}: {why}" for name, why in problems.items()),
        *(f"talaria: type {name} can't be used: {why}" for name, why in refused.items()),
    ]

    (tmp_path / "targets.yaml").write_text("targets:\n  x: {type: aa}\n")
    ran = talaria(tmp_path, "target", "test", "--file", "targets.yaml")
    assert ran.returncode == 2
    assert (
        ran.stderr == f"talaria: target x: targets of type aa can't be used: {refused['aa']}\n"
    )  # and started no server


def test_saved_targets_load_as_ours_whatever_a_refused_package_registers(tmp_path: Path) -> None:
    install(tmp_path, "its-block-type-is-ours", {"hh": "extension"}, good("hh", "folder-target"))
    code = """
        import blocks, its_block_type_is_ours
        from prefect.blocks.core import Block
        print(Block.get_block_class_from_key("folder-target").__module__)
    """
    ran = subprocess.run(
        [sys.executable, "-P", "-c", "import textwrap; exec(textwrap.dedent('''" + code + "'''))"],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        check=False,
    )
    assert ran.stdout.strip() == "blocks.folder", ran.stderr


def test_nothing_of_it_stays_in_our_environment() -> None:
    assert not EXTENSIONS, "a package that adds a type is installed here"
    assert shutil.which("wsgidav", path=str(Path(sys.executable).parent)), "run `make tools`"
