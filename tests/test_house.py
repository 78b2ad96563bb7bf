"""The house as its documents describe it: where things are, which words stand for what, what each library carries."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest

from blocks import EXTENSIONS, TYPES

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
FLOORS = ("imaging", "transfer", "protocols", "blocks", "tasks", "flows", "talaria")
PRODUCT = [
    path for floor in FLOORS for path in (ROOT / floor).rglob("*.py") if (ROOT / "talaria/testing") not in path.parents
]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """All of a file's, which are walked once for all tests."""
    return list(ast.walk(tree(path)))


def table(text: str, title: str) -> list[list[str]]:
    """The rows of the first table below a heading, cells without their backticks."""
    below = text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("| ").split(" | ") for line in below.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("`") for cell in row] for row in rows[1:]]


# ---- where is it


@pytest.mark.parametrize(("question", "file", "name"), table((ROOT / "CONTRIBUTING.md").read_text(), "Where is it?"))
def test_each_question_is_answered_by_the_file_that_is_named(question: str, file: str, name: str) -> None:
    found = nodes(ROOT / file)
    defined = {
        node.name for node in found if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    } | {node.id for node in found if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    in_text = any(isinstance(node, ast.Constant) and name in str(node.value) for node in found) and " " in name
    assert name in defined or in_text, f"{question} {file} does not define {name}"


def test_there_are_twenty_questions() -> None:
    assert len(table((ROOT / "CONTRIBUTING.md").read_text(), "Where is it?")) >= 20


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (document.parent / link).exists()] == []
    example = text if document.name != "ninth-target.md" else text.split("## In this repository")[1]
    named = re.findall(rf"`((?:{'|'.join(FLOORS)}|tests|benchmarks|docs|deployments)/[\w./-]*)`", example)
    assert [name for name in named if not (ROOT / name).exists() and not re.search(r"/x(\.py|/)$", name)] == []


def test_every_folder_says_what_is_in_it() -> None:
    for floor in FLOORS:
        for folder in {path.parent for path in (ROOT / floor).rglob("*.py")}:
            assert ast.get_docstring(tree(folder / "__init__.py")), folder
    for path in PRODUCT:
        assert ast.get_docstring(tree(path)), path


def test_the_types_are_listed_in_two_files_only() -> None:
    """A file that names them all, as words of its own, would have to change for a ninth."""
    own = [name for name in TYPES if name not in EXTENSIONS]
    for path in [*PRODUCT, *(ROOT / "tests").rglob("*.py"), *(ROOT / "talaria/testing").rglob("*.py")]:
        text = path.read_text()
        if not all(name in text for name in own):
            continue
        words = {node.value for node in nodes(path) if isinstance(node, ast.Constant)}
        if words >= set(own):
            assert path == ROOT / "tasks/__init__.py"


# ---- words


def _words() -> list[tuple[str, str]]:
    return [
        (retired, now) for retired, now, *_ in table((ROOT / "docs/words.md").read_text(), "Names that are no more")
    ]


@pytest.mark.parametrize(("retired", "now"), _words())
def test_no_retired_name_comes_back(retired: str, now: str) -> None:
    """A row names a module and a class (`protocols.net.link.Link`), or a class that nothing may be called."""
    module, _, name = retired.rpartition(".")
    for path in [*PRODUCT, *(ROOT / "talaria/testing").rglob("*.py")]:
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module and dotted != module:
            continue
        defined = {
            node.name for node in nodes(path) if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert name not in defined, f"{path.relative_to(ROOT)}: {retired} is called {now} now"


def test_a_name_of_the_table_is_one_class_in_the_whole_house() -> None:
    classes: dict[str, list[str]] = {}
    for path in PRODUCT:
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    for name, file, *_ in table((ROOT / "docs/words.md").read_text(), "One name for one thing"):
        assert classes.get(name) == [file], name


def test_no_two_public_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for path in [*PRODUCT, *(ROOT / "talaria/testing").rglob("*.py")]:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: found for name, found in places.items() if len(found) > 1}


# ---- libraries


def requirements(lines: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", line)[0].lower() for line in lines}


OWN_LIBRARIES = requirements(PROJECT["project"]["dependencies"]).union(
    *(requirements(extra) for name, extra in PROJECT["project"]["optional-dependencies"].items() if name != "testing")
)
SECTIONS = {
    name.strip(" `")
    for title in re.findall(r"^## (.*)$", (ROOT / "docs/dependencies.md").read_text(), re.MULTILINE)
    for name in title.lower().split(":")[-1].split(",")
}


@functools.cache
def imported() -> dict[str, set[str]]:
    """The distributions that the product imports, and where."""
    providers = packages_distributions()
    found: dict[str, set[str]] = {}
    for path in PRODUCT:
        for node in nodes(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                names = [str(one.value) for one in node.args if isinstance(one, ast.Constant)]
            for name in {name.split(".")[0] for name in names} - set(FLOORS) - set(sys.stdlib_module_names):
                for one in providers.get(name, [name]):
                    found.setdefault(one.lower().replace("_", "-"), set()).add(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize("library", sorted(OWN_LIBRARIES))
def test_each_dependency_has_its_section(library: str) -> None:
    assert any(section.split(" ")[0] == library for section in SECTIONS), (
        f"docs/dependencies.md says nothing of {library}"
    )


@pytest.mark.parametrize("library", sorted(OWN_LIBRARIES))
def test_each_dependency_is_imported_or_says_why_not(library: str) -> None:
    text = (ROOT / "docs/dependencies.md").read_text()
    found = re.search(rf"^## [^\n]*\b{re.escape(library)}\b[^\n]*\n\n(.*?)$", text, re.MULTILINE)
    assert found and found[1].startswith("Not imported") is (library not in imported()), library


@pytest.mark.parametrize(
    "library",
    [
        "prefect", "pydicom", "pynetdicom", "pyxnat", "boto3", "pydantic-settings", "paramiko", "dicomweb-client",
    ],
)  # fmt: skip
def test_each_library_that_was_asked_for_carries_a_path_of_the_product(library: str) -> None:
    assert library in imported()


def test_the_product_imports_only_what_it_declares() -> None:
    """Else it would run where tests' tools are installed, and nowhere else."""
    closure: set[str] = set()
    waiting = {*OWN_LIBRARIES}
    while waiting:
        name = waiting.pop()
        closure.add(name)
        try:
            lines = distribution(name).requires or []
        except ModuleNotFoundError:
            continue  # for another platform
        waiting |= {
            name.replace("_", "-") for name in requirements([one for one in lines if "extra ==" not in one])
        } - closure
    extra = {"awscrt"}  # of botocore[crt]
    assert {name.replace("_", "-") for name in imported()} - closure <= extra


MOST_MB = 350


def test_the_product_and_its_libraries_stay_small() -> None:
    """What `make install` puts into .venv, all types of target included, in blocks of the disk."""
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    packages = {one["name"]: one for one in lock["package"]}
    waiting = [(name, ()) for name in OWN_LIBRARIES] + [("botocore", ("crt",))]
    seen: set[str] = set()
    size = 0
    while waiting:
        name, extras = waiting.pop()
        one = packages[name]
        needs = one.get("dependencies", [])
        for extra in extras:
            needs = needs + one.get("optional-dependencies", {}).get(extra, [])
        waiting += [
            (need["name"], tuple(need.get("extra", ())))
            for need in needs
            if need["name"] not in seen or need.get("extra")
        ]
        if name in seen:
            continue
        seen.add(name)
        try:
            files = distribution(name).files or []
        except ModuleNotFoundError:
            continue  # for another platform
        for file in files:
            if not str(file).endswith(".pyc") and (path := Path(str(file.locate()))).exists():
                size += path.stat().st_blocks * 512
    assert size < MOST_MB << 20, f"{size >> 20} MB"
