"""Lists: what their lines mean, how many are under way at once, and what the report beside them says."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from blocks.list_source import ListSource
from talaria.testing import studies as material
from tasks.sources import lines
from tests.sources.bench import Bench
from transfer.errors import Misconfigured


@pytest.fixture(autouse=True)
def _without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tasks.happened.emit_event", lambda *args, **more: None)  # it would start one


def listed(path: Path, text: str, **fields: Any) -> ListSource:
    path.write_bytes(text.encode("utf-8"))
    return ListSource(file=str(path), targets=["shelf"], **fields).named("box")


def report(source: ListSource) -> dict[str, str]:
    with lines.report_of(source).open(encoding="utf-8", newline="") as file:
        return {row["listed"]: row["state"] for row in csv.DictReader(file)}


def test_each_line_is_dispatched_once_and_so_many_at_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for number in range(5):
        material.ct(tmp_path / "data" / f"s{number}", 2)
    text = "# to do\n\n" + "".join(f"data/s{number}\n" for number in range(5)) + f"{tmp_path}/gone\ndata/s0\n"
    bench.source = source = listed(tmp_path / "todo.txt", text, at_once=2)
    assert sum(bench.sweep().runs.values()) == 2
    assert not bench.sweep().runs, "as many are under way as may be"
    assert sorted(report(source).values()) == ["under way"] * 2 + ["waiting"] * 4
    for _ in range(3):
        bench.dispatch()
        bench.sweep()
    assert report(source) == {f"data/s{n}": "delivered" for n in range(5)} | {f"{tmp_path}/gone": "failed"}
    assert sum(path.is_file() for path in bench.at("shelf").rglob("*.dcm")) == 10
    with (tmp_path / "todo.txt").open("a") as file:
        file.write("data/late\n")
    material.ct(tmp_path / "data" / "late", 1)
    bench.all()
    assert report(source)["data/late"] == "delivered" and bench.sweep().words == "nothing new"


@pytest.mark.parametrize("name", ["todo.txt", "todo.csv"])
def test_paths_with_names_of_any_kind(tmp_path: Path, name: str) -> None:
    bench = Bench(tmp_path)
    odd = ["\xa0", "\udca0", "a\u2028b", "a\x85", "a\udc85", "ü", "a\\xa0"]
    for one in odd:
        material.ct(tmp_path / "data" / one, 1)
    text = "path\n" * name.endswith("csv") + "".join(f"data/{one}\n" for one in odd)
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    bench.source = source = ListSource(file=str(tmp_path / name), targets=["shelf"]).named("box")
    bench.all()
    assert len(report(source)) == len(odd) and set(report(source).values()) == {"delivered"}, report(source)
    assert sum(path.is_file() for path in bench.at("shelf").rglob("*.dcm")) == len(odd)


@pytest.mark.parametrize(
    ("name", "text", "fields", "found"),
    [
        ("a.txt", "/a\n /b \r\n#/c\n", {}, ["/a", "/b"]),
        ("a.csv", "path;note\n/a;x\n/b;y\n", {}, ["/a", "/b"]),
        ("a.csv", "/a,x\n/b,y\n", {}, ["/a", "/b"]),
        ("a.csv", '\ufeffid,"where it is"\n1,"/a, b"\n2,/c\n3\n', {"column": "where it is"}, ["/a, b", "/c"]),
        ("a.txt", "id\tpath\n1\t/a\n", {"column": "path"}, ["/a"]),
    ],
)
def test_text_and_csv(tmp_path: Path, name: str, text: str, fields: dict[str, Any], found: list[str]) -> None:
    assert [path for _, path in lines.lines(listed(tmp_path / name, text, **fields))] == found


def test_accession_numbers(tmp_path: Path) -> None:
    source = listed(tmp_path / "a.csv", "Accession Number;x\nA1;1\nA2;2\nA1;3\n", query="pacs")
    assert lines.lines(source) == [("A1", ""), ("A2", "")]
    by_name = listed(tmp_path / "b.csv", "x;nr\n1;A7\n2;A8\n", query="pacs", column="nr")
    assert lines.lines(by_name) == [("A7", ""), ("A8", "")]


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="none of the 2 columns of its first line is path"):
        lines.lines(listed(tmp_path / "a.csv", "id,place\n1,/a\n", column="path"))
