"""What the product uses of pynetdicom beside its public interface: as long as there is any, its version is fixed."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pynetdicom

ROOT = Path(__file__).parents[2]
# Any change in one of these may break an association: they are looked at with each new version of pynetdicom.
PRIVATE = {
    "_config",  # its log handlers, which write patients' data
    "_create_association",  # of its server: our transport under associations that peers open
    "_create_socket",  # of AE: our transport under associations that we open
    "_globals",  # the application context's name
    "_is_connected",
    "_is_paused",  # whether its reactor lets others read
    "_reactor_checkpoint",
    "_ready",
    "_servers",
}


def trees() -> Iterator[ast.Module]:
    """The product's files that know pynetdicom."""
    for floor in ("imaging", "transfer", "protocols", "blocks", "tasks", "flows", "talaria"):
        for path in (ROOT / floor).rglob("*.py"):
            text = path.read_text()
            if "pynetdicom" in text or path.parent.name == "dimse":
                yield ast.parse(text)


def names(tree: ast.AST, *, defined: bool) -> set[str]:
    """Private names that are defined in a file, or used."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and defined:
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and (not defined or isinstance(node.ctx, ast.Store)):
            found.add(node.attr)
        elif isinstance(node, ast.FunctionDef) and not defined:
            found.add(node.name)  # an override is used by the class that it is in
        elif isinstance(node, ast.ImportFrom) and not defined and (node.module or "").startswith("pynetdicom"):
            found |= {alias.name for alias in node.names} | set((node.module or "").split("."))
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def test_private_names_are_known() -> None:
    theirs: set[str] = set()
    for path in Path(pynetdicom.__file__).parent.glob("*.py"):
        theirs |= names(ast.parse(path.read_text()), defined=True) | {path.stem}
    used = set().union(*(names(tree, defined=False) for tree in trees())) & theirs
    ours = set().union(*(own(tree) for tree in trees()))
    assert used - (ours - PRIVATE) == PRIVATE


def own(tree: ast.Module) -> set[str]:
    """Private names of classes of ours."""
    return names(tree, defined=True)


def test_what_it_does_in_the_product() -> None:
    """It negotiates every association, and speaks C-ECHO and storage commitment; all else of DIMSE is our own."""
    used: dict[str, set[str]] = {}
    for path in (ROOT / "protocols" / "dimse").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and (node.attr.startswith(("send_c_", "send_n_", "EVT_"))):
                used.setdefault(path.stem, set()).add(node.attr)
            elif isinstance(node, ast.Attribute) and node.attr == "associate":
                used.setdefault(path.stem, set()).add("associate")
    assert used == {
        "association": {"associate", "send_c_echo"},
        "asking": {"associate"},  # that of `association`, with what a peer is asked for
        "fleet": {"associate"},
        "commitment": {"send_n_action", "EVT_N_EVENT_REPORT"},
    }


def test_its_version_is_fixed_as_long_as_there_are_any() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {line for lines in extras.values() for line in lines if line.startswith("pynetdicom")}
    assert PRIVATE
    assert wanted == {f"pynetdicom=={pynetdicom.__version__}"}
