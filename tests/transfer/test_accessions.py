"""Lists of accession numbers as people paste them."""

from __future__ import annotations

import io
import re
from contextlib import suppress
from pathlib import Path

import pytest

from transfer.accessions import accessions, from_file, of_cells, pasted
from transfer.errors import Misconfigured


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A1,A2", ("A1", "A2")),
        ("A1 A2\tA3\nA4\r\nA5;A6", ("A1", "A2", "A3", "A4", "A5", "A6")),
        ("  A1 ,, A2 ,\n\n", ("A1", "A2")),
        ("A2\nA1\nA2", ("A2", "A1")),
        ("\ufeffA1\nA2", ("A1", "A2")),
        ("A1\u00a0A2\u200b", ("A1", "A2")),
        ('"A1","A2"\n"A3"', ("A1", "A2", "A3")),
        ("'A1', \u201cA2\u201d, \u201eA3\u201c", ("A1", "A2", "A3")),
        ("Accession Number\nA1\nA2", ("A1", "A2")),
        ("AccessionNumber\nA1", ("A1",)),
        ('"Accession No."\r\n"0012"\r\n"0013"\r\n', ("0012", "0013")),
        ('"A 1",A2', ("A 1", "A2")),
        ("Patient;Accession;Date\nx;A1;2024\ny;A2;2024\n", ("A1", "A2")),
        ("accession number,comment\n0001,none\n0002,\n", ("0001", "0002")),
        ("ACC1 ACC2", ("ACC1", "ACC2")),
        ('\ufeff"Name";"AccessionNumber"\r\n"Meier; Hans";"0012"\r\n"Huber";"0013"\r\n', ("0012", "0013")),
        ("Name\tAccession #\nx\tA1\ny\tA2\ny\tA2\n", ("A1", "A2")),
        ('Name,accession\n"two\nlines",A1\nx,="0002"\n', ("A1", "0002")),
        # A table without that title: its first column.
        ("Fall;Name;Datum\n0012;Meier;20240101\n0013;;20240102\n", ("0012", "0013")),
        ('Case,Name\r\n1,"Meier, Hans"\r\n2,Huber\r\n', ("1", "2")),
        ('="0012"\r\n="0013"\r\n', ("0012", "0013")),
        # As programs write lists.
        ("('A1','A2',\n 'A 3')", ("A1", "A2", "A 3")),
        ("numbers = ['A1', 'A2']", ("A1", "A2")),
        ('study.accession IN ("A1", "A2");', ("A1", "A2")),
        ("(A1, A2)", ("A1", "A2")),
        ("(A1)", ("(A1)",)),
        ('="0012",="0013"', ("0012", "0013")),
        ("'0012\n'0013", ("0012", "0013")),
        ("sep=;\r\nName;Accession\r\nx;A1\r\ny;A2\r\n", ("A1", "A2")),
        ("Name 1;Accession Number;Date 2\nx;A1;2024\ny;A2;2024\n", ("A1", "A2")),
        ("Accession #\n0012\n0013", ("0012", "0013")),
        ("Acc. Number\n0012\n0013", ("0012", "0013")),
        ("weight;accession\n1.2E+05;A1\n1.3E+05;A2", ("A1", "A2")),
        ("1E5\nA2E+05\n3E-02", ("1E5", "A2E+05", "3E-02")),
        # What stands above the table, or is not seen.
        ("\n\nAccession,Name\nA1,Meier\nA2,Huber\n", ("A1", "A2")),
        ("\r\n\t\r\nName\tAccession\r\nx\tA1\r\n", ("A1",)),
        ("sep=;\r\n;;\r\nName;Accession\r\nx;A1\r\n", ("A1",)),
        ("Worklist of 2024-01-01\n\nAccession;Name\nA1;Meier\nA2;Huber", ("A1", "A2")),
        ('"List, all",,\r\n,,\r\nName,Accession No.,Date\r\n"Meier, Hans",A1,2024\r\n', ("A1",)),
        ('"A1\n","A2"', ("A1", "A2")),
        # Tables as wikis and databases print them.
        ("| Accession | Name |\n|:---|---|\n| A1 | Meier |\r\n| A 2 | x |\n", ("A1", "A 2")),
        (" name  | accession \n-------+------\n Meier | A1\n x     | A2\n(2 rows)\n", ("A1", "A2")),
        ("A|1", ("A|1",)),
        ("\u200eA1\u200f\n\u202aA2\u202c", ("A1", "A2")),
        ("A1\uff0cA2\u3001A3\uff1bA4", ("A1", "A2", "A3", "A4")),
        ("Accession Number:\nA1\nA2", ("A1", "A2")),
        ("Accession number: A1, A2", ("A1", "A2")),
        ("Accession: A1, A2", ("A1", "A2")),
        ("Accession|Name\nA1|x\nA2|y", ("A1", "A2")),
        # The title of a list stands beside its first numbers.
        ("Accession;A1\nA2,A3", ("A1", "A2", "A3")),
        ("Accession Number; A1\r\nA2, A3, A4\r\nA5\r\n", ("A1", "A2", "A3", "A4", "A5")),
        ("Accession,A1\nA2;A3", ("A1", "A2", "A3")),
        ("Accession\tA1\nA2,A3", ("A1", "A2", "A3")),
        ("Accession;A1\nA2\nA3", ("A1", "A2", "A3")),
        ("Accession;A1;A2\nA3;A4", ("A1", "A2", "A3", "A4")),
        ("Accession;A1;A2\nA3;;", ("A1", "A2", "A3")),
        ("Accession;A9,B10\nA11,B12\nA13;X14", ("A9", "B10", "A11", "B12", "A13", "X14")),
        ("Acc\u00a0No;0012\n\n0013,0014;0015", ("0012", "0013", "0014", "0015")),
        ("Accession;A1\nAccession;A2", ("A1", "A2")),
        ("Accession Number: A1\nAccession Number:A2", ("A1", "A2")),
        ("1. A1\n2. A2\n3. A3", ("A1", "A2", "A3")),
        ("1. A1\n3. A2", ("1.", "A1", "3.", "A2")),
        # Columns that are printed below titles.
        ("Accession   Name\nA1   Doe\nA2   Roe", ("A1", "A2")),
        (
            "Name            Accession No.   Date\n-------------   -------------   ----------\n"
            "Doe, John       0012            2024-01-01\r\nRoe, Jane       0013            2024-01-02\n",
            ("0012", "0013"),
        ),
        ("Accession\nA1, A2\nA3", ("A1", "A2", "A3")),
        # A table on its side, and titles that hold digits.
        ("Accession;A1;A2\nName;Meier;Huber\nDate;20240101;20240102", ("A1", "A2")),
        ("Accession;T1;T2\n1001;yes;3\n1002;no;4", ("1001", "1002")),
        ("Accession;T1\nA1;3\nA2;4", ("A1", "A2")),
        ("Accession;Column1\r\nA1;\r\nA2;\r\n", ("A1", "A2")),
        ("Accession;Phase 1\nA1\nA2", ("A1", "A2")),
        # One column is the only one that can have them.
        ("Patient ID;Order;Birth date;Name\n4711;A1;19700101;Doe\n4712;A2;19800101;Roe\n", ("A1", "A2")),
        ("Fall;Geburtsdatum\nA1;01.02.1970\nA2;\n", ("A1", "A2")),
        ("1\tA1\n2\tA7\n3\tB3", ("A1", "A7", "B3")),
        ("A1\t\t\nA2\t\t\n", ("A1", "A2")),
        # Lists in several lines.
        ("A1\tA2\nA3\tA4", ("A1", "A2", "A3", "A4")),
        ("0012,0034\n0056,0078\n0090,0091", ("0012", "0034", "0056", "0078", "0090", "0091")),
        ("A1 A2 A3\nA4 A5", ("A1", "A2", "A3", "A4", "A5")),
        ('"AC 12 X"\n"AC 13 X"', ("AC 12 X", "AC 13 X")),
        ("20240101\n20240102", ("20240101", "20240102")),
        # What a web page puts at the end of a cell.
        ("Name\tAccession\nx\tA1\u200b\ny\t\u2060A2 \ufeff\n", ("A1", "A2")),
        # Bullets, and dashes for no value.
        ("- A1\n- A2", ("A1", "A2")),
        ("\u2022\tA1\n\u2022\tA2", ("A1", "A2")),
        ("A1 / A2", ("A1", "A2")),
        ("Name;Accession\nx;A1\ny;-\nz;A2", ("A1", "A2")),
        # No tables: lists in several lines.
        ("A1,A2\nA3,A4", ("A1", "A2", "A3", "A4")),
        ("X,Y\nZ,W", ("X", "Y", "Z", "W")),
        ("A1, A2\tA3\r\nA1 A4", ("A1", "A2", "A3", "A4")),
        ("1001\t1002\n1003", ("1001", "1002", "1003")),
        ("1001, 1002\t1003\n1004 1005", ("1001", "1002", "1003", "1004", "1005")),
        ("A1\tB2 CT3\nD4;E5", ("A1", "B2", "CT3", "D4", "E5")),
        ("A1 NOPE A2", ("A1", "NOPE", "A2")),
        ("ONE,TWO\n1A,2B,3C", ("ONE", "TWO", "1A", "2B", "3C")),
        # Comments: lines that begin with #, and what stands behind a number.
        ("# comment\nA1\nA2", ("A1", "A2")),
        ("#the list of Monday 2 patients\nA1\nA2", ("A1", "A2")),
        ("# A0\nA1 # urgent please\nA2", ("A1", "A2")),
        ("# of 2024; from PACS 1\nName;Accession\nx;A1\ny;A2", ("A1", "A2")),
        ("#123\n#124", ("#123", "#124")),
        ("Accession\n#123\n#124", ("#123", "#124")),
        ("Accession,Name\n#123,Doe\n#124,Roe", ("#123", "#124")),
        ("# 123\n# 124", ("123", "124")),
        ("#,Accession\n1,A1\n2,A2", ("A1", "A2")),
        ('"#123"\n"A1 # x"\nA2', ("#123", "A1 # x", "A2")),
        ("Accession # 123\nAccession # 124", ("123", "124")),
        # Last lines that count.
        *(
            (f"A1\nA2\n{last}\n\n", ("A1", "A2"))
            for last in (
                "Total: 2",
                "Total 2",
                "Total:2",
                "TOTAL\t2",
                "Sum 2",
                "Count: 12",
                "Grand total; 2",
                "Total",
                "Anzahl: 2",
                "Number of studies: 2",
                "2 records",
                "(2 rows)",
                "2 rows in set (0.00 sec)",
                "Total studies = 1.234",
            )
        ),
        ("Accession,Name\nA1,x\nA2,y\nTotal,2", ("A1", "A2")),
        ("accession\n-----------\nA1\nA2\n(2 rows)\n", ("A1", "A2")),
        ("| Accession | N |\n|---|---|\n| A1 | 2 |\n| Total | 2 |", ("A1",)),
        ('A1\n"Total: 2"', ("A1", "Total: 2")),
        ("A1\nSUM-12", ("A1", "SUM-12")),
        ("SUM:10\nSUM:11", ("SUM:10", "SUM:11")),
        ("A:1\nB:2", ("A:1", "B:2")),
        ("10.0\n10.1", ("10.0", "10.1")),
        ('"123.0"\nA1', ("123.0", "A1")),
        ("", ()),
        (" \n,;\t", ()),
        ("\u5929-1", ("\u5929-1",)),
    ],
)
def test_lists_as_people_paste_them(text: str, wanted: tuple[str, ...]) -> None:
    assert accessions(text) == wanted


@pytest.mark.parametrize("text", ["a\\b", "x" * 65, "a\x00b", 'Accession,Name\nA1,"' + "x" * 200_000])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(Misconfigured):
        accessions(text)


@pytest.mark.parametrize(
    "text", ["1.23E+05", "A1\n1.234568e+10", "A1\n1,23E+11", "A1,2E+05,A3", "Name;Accession\nx;1.23E+11\ny;A2"]
)
def test_what_a_spreadsheet_has_shortened_is_refused_and_not_looked_for(text: str) -> None:
    with pytest.raises(
        Misconfigured, match=r"(?i)E\+\d\d is what a spreadsheet has left .* format that column as text"
    ):
        accessions(text)


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("123.0\n124.0", "123.0"), ("123.00", "123.00"), ("A1, 7.0", "7.0"), ("123,0\n124,0", "123,0"),
        ("Accession,Name\n123.0,x\n124.0,y", "123.0"), ("Accession\n123.0\n124.0", "123.0"),
    ],
)  # fmt: skip
def test_what_a_spreadsheet_has_taken_for_a_quantity_is_refused(text: str, made: str) -> None:
    with pytest.raises(Misconfigured, match=rf"^{re.escape(made)} is what a spreadsheet has made of .* column as text"):
        accessions(text)
    with pytest.raises(Misconfigured, match=r"^7\.0 is what a spreadsheet .* column as text$"):
        of_cells(["7.0", "8.0"])


@pytest.mark.parametrize(
    ("text", "line"),
    [("A1\n\nPage 1 of 1", 3), ("A1\nA2\nPrinted: 2024-01-01", 3), ("\nA1\nTotal: 2\nA3", 3), ("# x\nAC 12 X\nA2", 2)],
)
def test_words_beside_a_number_are_refused_for_they_may_make_another_one_of_it(text: str, line: int) -> None:
    with pytest.raises(Misconfigured, match=f"^line {line} of the list holds words beside a number: .* double quotes$"):
        accessions(text)


@pytest.mark.parametrize("text", ["A1\n#123", "Accession,Name\nA5,Roe\n#123,Doe"])
def test_what_may_be_a_comment_or_a_number_is_refused(text: str) -> None:
    with pytest.raises(Misconfigured, match=r"^line [23] of the list begins with #: .* double quotes$"):
        accessions(text)


@pytest.mark.parametrize(
    "text",
    ["total" + " " * 100_000 + "x-", "1" * 100_000, "#" * 100_000, "A1 # " + "x " * 50_000, "1 " * 50_000],
    ids=["blanks", "digits", "hashes", "comment", "words"],
)
def test_long_lines_take_no_longer_than_they_are(text: str) -> None:
    with suppress(Misconfigured):
        accessions(text)


@pytest.mark.parametrize(
    "text",
    [
        "A1\tDoe, John\nA2\tRoe, Jane",
        "A1\tDoe\n",
        'A1;"Doe, John"\nA2;\nA3;Roe',
        "1980-01-01,Doe,A1\n1981-01-01,Roe,A2",
        # Columns of which several hold digits.
        "A1\t19700101\tDoe",
        "A1\t19700101\nA2\t19800202",
        "A1\t4711\nA2\t4712\nA3\t4713",
        "0012\t4711\n0013\t4712",
        "A100\tP100\nA101\tP101",
        "A1\t4711",
        "A1,19700101\nA2,19800202",
        "A1;01.01.1970\nA2;02.02.1980",
        "A1,1970-01-01,Doe",
        "A1,Doe^John",
        "0012345,4711\n0012346,4712\n0012347,4713",
        "A100,P100\nA101,P101\nA102,P102",
        "A1\t4711\nA2",
        "A1\tDoe, John\nA2",
        "A1\t1970-01-01\nA2",
        # Some cells are empty, or were cut off.
        "A1\tDoe\tx\nA2\tRoe\nA3\t",
        "1\tA1\tDoe\n2\tA2\tRoe",
        # Titles that are none of accession numbers.
        "Patient ID;Name\n4711;Doe\n4712;Roe",
        "ID\tName\n4711\tDoe",
        "Case;Order;Name\n1;A1;Doe\n2;A2;Roe",
        # Columns that blanks separate.
        "A1   Doe, John   19700101\nA2   Roe, Jane   19800101".replace(",", ""),
        "4711 Doe\n4712 Roe",
        "A1 19700101\nA2 19800101",
        "Accession Name\nA1 Doe\nA2 Roe",
        "Accession   Name   Date\nA1   Doe\nA2   Roe",
        # A comma within names, below a line without one.
        "Accession Name\nA1 Doe, John\nA2 Roe, Jane",
        "Accession   Name   Ward\nA1   Doe, John\nA2   Roe, Jane",
        "Worklist of today\nA1 Doe\nA2 Roe",
        "Worklist\nA1 Doe, John\nA2 Roe, Jane",
    ],
)
def test_names_dates_and_ids_beside_numbers_are_not_taken_for_numbers(text: str) -> None:
    with pytest.raises(Misconfigured, match="give the column of accession numbers alone, or a title"):
        accessions(text)


@pytest.mark.parametrize("title", ["Patient ID", "MRN", "Patienten-Nr.", "Date of birth", '"PatientName"'])
def test_a_column_that_is_titled_as_something_else_is_refused(title: str) -> None:
    with pytest.raises(Misconfigured, match="give the column of accession numbers, with its own title or none"):
        accessions(f"{title}\n4711\n4712\n")


@pytest.mark.parametrize(
    "number", ["AC 12 X", "X Y 1", "A;B1", "Doe 1", "#1", "# 1", "A1 # x", "Total:2", "123.0", "2 rows"]
)
def test_numbers_with_blanks_and_signs_are_kept_as_they_are(number: str) -> None:
    assert accessions(pasted(["A1", number, "A2"])) == ("A1", number, "A2")
    assert accessions(pasted([number, "A1"])) == (number, "A1")
    assert accessions(pasted(["A1", number])) == ("A1", number)


def test_which_value_is_no_number_is_said_without_it() -> None:
    with pytest.raises(Misconfigured, match="value 2 of the list") as refused:
        accessions("A1\nsecret\\\nA3")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["***", "%", "-", "\u2014\n\u2014", "Accession Number", "Accession\n\n", '"?"', "\ud800"]
)
def test_what_holds_no_number_is_refused_for_it_would_ask_for_everything(text: str) -> None:
    with pytest.raises(Misconfigured, match="holds no accession number"):
        accessions(text)


def test_two_thousand_in_one_list() -> None:
    numbers = tuple(f"ACC{n:06}" for n in range(2000))
    assert accessions("\n".join(numbers)) == numbers


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"])
def test_files_in_every_usual_encoding(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("A\u00e41\r\nA2\u00a0A3\r\n".encode(encoding))
    assert from_file(tmp_path / "list.txt") == ("A\u00e41", "A2", "A3")


def test_what_excel_saves_as_unicode_text_and_word_with_its_quotes(tmp_path: Path) -> None:
    table = 'Name\tAccession Number\r\n"Meier, Hans"\t0012\r\nHuber\t\r\n\u5929\t0013\r\n'
    (tmp_path / "list.txt").write_bytes(table.encode("utf-16"))
    assert from_file(tmp_path / "list.txt") == ("0012", "0013")
    (tmp_path / "list.txt").write_bytes("\u201c0012\u201d, \u201e0013\u201c \u2022 0014".encode("cp1252"))
    assert from_file(tmp_path / "list.txt") == ("0012", "0013", "0014")


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    piped = io.TextIOWrapper(io.BytesIO("\ufeffAccession\r\nA1\r\n".encode("utf-16-le")))
    monkeypatch.setattr("sys.stdin", piped)
    assert from_file(Path("-")) == ("A1",)


def test_files_that_are_no_lists(tmp_path: Path) -> None:
    (tmp_path / "list.xlsx").write_bytes(b"PK\x03\x04\0\0")
    for path in (tmp_path / "list.xlsx", tmp_path / "none.txt", tmp_path):
        with pytest.raises(Misconfigured):
            from_file(path)


def test_thousands_of_numbers_are_written_as_a_text_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, read = [*(f"CT-2026_{number:06d}" for number in range(2000)), "SUM-12", "Total 2"], list[str]()
    monkeypatch.setattr("transfer.accessions.without_remarks", lambda lines, titled: (read.append("one"), [*lines])[1])
    pasted(numbers)
    assert len(read) <= 6, "each number was read as lists of its own: a server answers nobody meanwhile"
    monkeypatch.undo()
    assert accessions(pasted(numbers)) == tuple(numbers)
