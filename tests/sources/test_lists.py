"""Lists: what their lines mean, how many are under way at once, and what the report beside them says."""

from __future__ import annotations

import csv
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import AwaitingRetry, Running, Scheduled

from blocks.list_source import ListSource
from talaria.testing import studies as material
from tasks.sources import lines
from tasks.sources.runs import _of_numbers, _waits
from tasks.sources.ways import EndedRun, failure
from tests.sources.bench import Bench
from transfer.accessions import accessions, pasted
from transfer.errors import Misconfigured
from transfer.ledger import Ledger


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


def test_what_waits_for_hours_that_people_have_set_is_not_said_to_be_under_way(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    material.ct(tmp_path / "data" / "s0", 1)
    bench.source = source = listed(tmp_path / "todo.txt", "data/s0\n")
    bench.waiting = "waits until 22:00:00 UTC: the off-peak hours"
    bench.sweep()
    with lines.report_of(source).open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["state"], row["detail"], row["run"]) == ("waiting", bench.waiting, *bench.asked)
    bench.waiting = ""
    bench.sweep()
    assert report(source) == {"data/s0": "under way"}


@pytest.mark.parametrize(
    ("state", "priority", "words"),
    [
        (Scheduled(), "offpeak", "waits until 17:00:00 UTC: the off-peak hours"),
        (Scheduled(), "normal", ""),
        (AwaitingRetry(message="waits until 17:00:00 UTC: the hours of s3; nothing has been sent"), "normal",
         "waits until 17:00:00 UTC: the hours of s3"),
        (AwaitingRetry(message="tries again at 17:00:00 UTC: a slot at s3; nothing has been sent"), "normal", ""),
        (Running(), "offpeak", ""),
    ],
    ids=["offpeak", "normal", "window", "slot", "running"],
)  # fmt: skip
def test_which_runs_wait_for_hours(
    monkeypatch: pytest.MonkeyPatch, state: State[Any], priority: str, words: str
) -> None:
    monkeypatch.setenv("TALARIA_OFF_PEAK", "17:00-18:00")
    run = FlowRun(flow_id=uuid4(), state=state, parameters={"priority": priority})
    assert _waits(run, datetime.now(UTC).replace(hour=9)) == words


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
        ("a.csv", "sep=;\r\npath;note\r\n/a;x\r\n", {}, ["/a"]),
        ("a.csv", '\ufeff"sep=;"\nid;where\n1;/a\n', {"column": "where"}, ["/a"]),
        ("a.txt", "id\tpath\n1\t/a\n", {"column": "path"}, ["/a"]),
        ("a.csv", "Patient;Path\nDOE^J;/a\nROE^J;/b\n", {}, ["/a", "/b"]),
        ("a.csv", "DOE^J,,/a\nROE^J,x,/b\n", {}, ["/a", "/b"]),
        ("a.csv", "Name;Path\nDOE^J;/a\nROE^J;\n", {}, ["/a"]),
        ("a.csv", "ID;Study;Folder\n17;CT;s1\n", {}, ["{here}/s1"]),
        ("a.csv", "Name;Pfad\nDOE^J;/a\n", {}, ["/a"]),
        ("a.csv", "name;note\ns1;x\n", {}, ["{here}/s1"]),
        ("a.csv", "study,copy\ns1,/old/s1\n", {}, ["{here}/s1"]),
        ("a.csv", "nr,copy,backup\n1,/old/s1,/old/s2\n", {}, ["{here}/1"]),
        ("a.csv", "# of Monday, by Jane, again\npath;note\n/a;x\n#/b;y\n", {}, ["/a"]),
        ("a.csv", "# of Monday\n/a,x\n# /b,y\n", {}, ["/a"]),
        ("a.csv", "#,path\n1,s1\n", {}, ["{here}/s1"]),
        ("a.csv", "#nr,where\n1,/a\n#2,/b\n", {"column": "where"}, ["/a"]),
    ],
)
def test_text_and_csv(tmp_path: Path, name: str, text: str, fields: dict[str, Any], found: list[str]) -> None:
    wanted = [path.format(here=tmp_path) for path in found]
    assert [path for _, path in lines.lines(listed(tmp_path / name, text, **fields))] == wanted


def test_accession_numbers(tmp_path: Path) -> None:
    source = listed(tmp_path / "a.csv", "Accession Number;x\nA1;1\nA2;2\nA1;3\n", query="pacs")
    assert lines.lines(source) == [("A1", ""), ("A2", "")]
    by_name = listed(tmp_path / "b.csv", "x;nr\n1;A7\n2;A8\n", query="pacs", column="nr")
    assert lines.lines(by_name) == [("A7", ""), ("A8", "")]


def test_a_table_that_does_not_say_where_its_numbers_are_is_refused_and_how_to_name_them_is_said(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        Misconfigured, match=r"a\.csv: .* nothing says .*, or name it as the source's column"
    ) as refused:
        lines.lines(listed(tmp_path / "a.csv", "A1;19700101\nA2;19800202\n", query="pacs"))
    assert "1970" not in str(refused.value)


@pytest.mark.parametrize("text", ["Accession Number\n", "Name;Accession\n", "", "-\n"])
def test_a_list_that_has_no_numbers_yet_names_nothing(tmp_path: Path, text: str) -> None:
    assert lines.lines(listed(tmp_path / "a.csv", text, query="pacs")) == []


def test_a_folder_whose_name_begins_as_a_comment_is_one_of_a_csv_file(tmp_path: Path) -> None:
    (tmp_path / "#1").mkdir()
    assert [key for key, _ in lines.lines(listed(tmp_path / "a.csv", "path\n#1\n#2\n"))] == ["#1"]


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="none of the 2 columns of its first line is path"):
        lines.lines(listed(tmp_path / "a.csv", "id,place\n1,/a\n", column="path"))


def test_cells_of_a_column_are_whole_numbers(tmp_path: Path) -> None:
    """Blanks, commas and letters beyond ASCII belong to the number: parts of it would be other patients' studies."""
    text = 'Größe;Acc\n1;A 123\n2;"B,7"\n3;="0012"\n4;MÜ1\n5;A 123\n6;\n'
    path = tmp_path / "a.csv"
    for encoding in ("utf-8", "latin-1", "utf-16"):
        path.write_bytes(text.encode(encoding))
        for column, wanted in (("Acc", ["A 123", "B,7", "0012", "MÜ1"]), ("Größe", [*"123456"])):
            source = ListSource(file=str(path), targets=["shelf"], query="pacs", column=column).named("box")
            assert [key for key, _ in lines.lines(source)] == wanted
    numbers = ("A 123", "B,7", "A\uff0c1", "1. A1", "C3")
    assert accessions(pasted(numbers)) == numbers


def test_a_line_that_is_being_written_waits_until_it_is_whole(tmp_path: Path) -> None:
    for name in ("s1", "s10", "s2"):
        material.ct(tmp_path / name, 1)
    bench = Bench(tmp_path)
    bench.source = source = listed(tmp_path / "todo.txt", "s2\ns1")
    with (tmp_path / "todo.txt").open("a") as file:  # a block of an export ends in the middle of s10
        os.utime(tmp_path / "todo.txt", (1, 1))
        swept = bench.sweep()
        assert swept.waiting == 1 and swept.next > time.time()
        assert bench.states() == {"s2": "dispatched"}
        file.write("0")
    assert not bench.sweep().runs, "written a moment ago"
    os.utime(tmp_path / "todo.txt", (1, 1))
    bench.all()
    bench.sweep()
    assert report(source) == {"s2": "delivered", "s10": "delivered"}
    numbers = listed(tmp_path / "numbers.csv", "Accession Number\n471123\n4711", query="pacs")
    with Ledger(bench.home.ledger) as ledger:
        assert [unit.key for unit in lines.units(numbers, ledger, lambda: None) if unit.complete] == ["471123"]
        os.utime(tmp_path / "numbers.csv", (1, 1))
        assert [unit.newest < time.time() for unit in lines.units(numbers, ledger, lambda: None)] == [True, True]


def test_a_path_that_is_named_twice_is_one_unit(tmp_path: Path) -> None:
    source = listed(tmp_path / "todo.txt", f"s1\n{tmp_path}/s1\ns1/\ns2\n")
    assert lines.lines(source) == [("s1", f"{tmp_path}/s1"), ("s2", f"{tmp_path}/s2")]


def test_csv_of_old_spreadsheets_and_what_is_no_csv(tmp_path: Path) -> None:
    source = listed(tmp_path / "a.csv", "path;x\r/a;1\r/b;2\r")
    assert [path for _, path in lines.lines(source)] == ["/a", "/b"]
    with pytest.raises(Misconfigured, match=r"a.csv: is no valid CSV"):
        lines.lines(listed(tmp_path / "a.csv", 'path,x\n"' + "x" * 200_000))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("study-a\nstudy-b\n", ["study-a", "study-b"]),  # neither is there
        ("Pat1,x\nPat2,y\n", ["Pat1", "Pat2"]),
        ("Study\nstudy-a\n", ["study-a"]),
        ("folder;note\nstudy-a;x\n", ["study-a"]),
        ("Where it lies\nstudy-a\n", ["study-a"]),
    ],
)
def test_a_first_path_that_is_gone_is_no_title(tmp_path: Path, text: str, found: list[str]) -> None:
    assert [key for key, _ in lines.lines(listed(tmp_path / "a.csv", text))] == found


def test_numbers_of_an_archive_in_another_case_are_those_of_the_list() -> None:
    ok = {"accession": "ACC1", "state": "delivered", "reason": ""}
    bad = {"accession": "A2 ", "state": "partial", "reason": "1 missing"}
    end = EndedRun(numbers=_of_numbers({"source": "pacs", "studies": [ok, bad], "accessions": []}))
    assert [failure(end.study(number), "") for number in ("acc1", "Acc1", "A2", "A3")] == [
        "", "", "pacs: 1 missing", "its dispatch did not begin",
    ]  # fmt: skip
