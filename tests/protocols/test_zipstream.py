"""Zips that never exist: any reader takes them, their length is known beforehand, and ZIP64 comes in where it must."""

from __future__ import annotations

import io
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.xnat.zipstream import ZipEntry, directory, length
from tasks.xnat import zip as xnat_zip
from tasks.xnat.zip import ZipBody
from tests.servers.xnat.zipinput import ZipInput
from transfer.errors import Cancelled, Rejected
from transfer.plan import Item, Plan, scan
from transfer.throttle import Throttle

GIB = 1 << 30


def written(files: list[tuple[str, bytes]]) -> bytes:
    entries = [ZipEntry.of(name, len(data)) for name, data in files]
    size = length(entries)
    out = bytearray()
    for entry, (_, data) in zip(entries, files, strict=True):
        entry.crc = zlib.crc32(data)
        out += entry.local() + data
    for piece in directory(entries):
        out += piece
    assert len(out) == size
    return bytes(out)


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/\\"), min_size=1, max_size=60)


@given(st.dictionaries(names, st.binary(max_size=200), max_size=8))
@settings(max_examples=60, deadline=None)
def test_any_reader_takes_it(files: dict[str, bytes]) -> None:
    data = written(list(files.items()))
    with zipfile.ZipFile(io.BytesIO(data)) as reader:
        assert reader.testzip() is None
        assert {info.filename: reader.read(info) for info in reader.infolist()} == files
        assert all(info.compress_type == zipfile.ZIP_STORED for info in reader.infolist())
    stream = io.BytesIO(data)
    assert {one.name: b"".join(one.pieces()) for one in ZipInput(stream.read).entries()} == files


def test_more_entries_than_16_bits_count() -> None:
    files = [(f"{number}.dcm", b"x") for number in range(70_000)]
    with zipfile.ZipFile(io.BytesIO(written(files))) as reader:
        assert len(reader.namelist()) == 70_000


@pytest.mark.parametrize("size", [4 * GIB - 2, 4 * GIB - 1, 4 * GIB, 5 * GIB])
def test_sizes_and_offsets_over_32_bits(tmp_path: Path, size: int) -> None:
    """The large entry is a hole in a sparse file; its sum is nobody's business here."""
    entries = [ZipEntry.of("first.dcm", 5), ZipEntry.of("large.dcm", size), ZipEntry.of("last.dcm", 4)]
    total = length(entries)
    entries[2].crc = zlib.crc32(b"last")
    path = tmp_path / "large.zip"
    with path.open("wb") as out:
        for entry, data in zip(entries, (b"first", None, b"last"), strict=True):
            assert out.tell() == entry.offset
            out.write(entry.local())
            if data is None:
                out.seek(entry.size, io.SEEK_CUR)
            else:
                out.write(data)
        for piece in directory(entries):
            out.write(piece)
        assert out.tell() == total
    with zipfile.ZipFile(path) as reader:
        assert [(info.filename, info.file_size) for info in reader.infolist()] == [
            ("first.dcm", 5), ("large.dcm", size), ("last.dcm", 4),
        ]  # fmt: skip
        assert reader.read("last.dcm") == b"last"
    with path.open("rb") as stream:
        entry = next(iter(ZipInput(stream.read).entries()))
        assert (entry.name, entry.size) == ("first.dcm", 5)


# ---- as the body of a request


def body_of(
    plan: Plan, *, limit: int | None = None, check: Callable[[], None] = lambda: None, moved: list[int] | None = None
) -> ZipBody:
    names = [(item, item.path.replace("/", "_")) for item in plan.items]
    return ZipBody(plan, names, Throttle(limit), check, (moved if moved is not None else []).append)


def content(plan: Plan) -> dict[str, bytes]:
    return {item.path.replace("/", "_"): plan.file(item).read_bytes() for item in plan.items}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    folder = tmp_path / "source"
    folder.mkdir()
    sizes = [1, 5000, 70_000, xnat_zip.PIECE_BYTES - 2000, xnat_zip.PIECE_BYTES, xnat_zip.PIECE_BYTES + 1, 3_333_333]
    for number, size in enumerate(sizes * 2):
        (folder / f"{number:02}.bin").write_bytes(bytes([number]) * size)
    return scan([folder])


@pytest.mark.parametrize("limit", [None, 100 << 20])
def test_body_is_the_zip(plan: Plan, limit: int | None) -> None:
    with body_of(plan, limit=limit) as body:
        pieces = [bytes(piece) for piece in body]
        assert body.finished
        assert sum(map(len, pieces)) == body.length == len(body)
        assert max(map(len, pieces)) <= body.piece + 1024
        again = b"".join(bytes(piece) for piece in body)  # a request may have to be made again
    data = b"".join(pieces)
    assert again == data
    with zipfile.ZipFile(io.BytesIO(data)) as reader:
        assert reader.testzip() is None
        assert {name: reader.read(name) for name in reader.namelist()} == content(plan)
        sizes = [info.file_size for info in reader.infolist()]
    assert sizes[0] == max(sizes), "the largest goes first"
    assert not [thread for thread in threading.enumerate() if thread.name == "crc-32"]


def test_body_stops_before_the_last_byte_of_a_changed_file(plan: Plan) -> None:
    (plan.root / "largest.bin").write_bytes(bytes(9_999_999))
    plan = scan([plan.root])
    victim = next(item for item in plan.items if item.path == "largest.bin")
    with body_of(plan) as body:
        sent = b""
        with pytest.raises(Rejected) as caught:
            for piece in body:
                sent += bytes(piece)
                if len(sent) < xnat_zip.PIECE_BYTES * 2:
                    with plan.file(victim).open("r+b") as file:
                        file.write(b"other")
        assert not body.finished
    assert caught.value.item == victim.path
    assert len(sent) < victim.size


@pytest.mark.parametrize("how", ["shorter", "gone"])
@pytest.mark.parametrize("size", [5000, 3_333_333])
def test_body_of_files_that_are_not_what_was_planned(plan: Plan, how: str, size: int) -> None:
    victims: list[Item] = [item for item in plan.items if item.size == size]
    for victim in victims:
        if how == "gone":
            plan.file(victim).unlink()
        else:
            plan.file(victim).write_bytes(b"x")
    with pytest.raises(Rejected) as caught, body_of(plan) as body:
        for _ in body:
            pass
    assert caught.value.item in {victim.path for victim in victims}


def test_body_can_be_stopped_while_it_sums(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = threading.Event()
    real = xnat_zip._read

    def slow(*args: object) -> None:
        blocked.wait(2)
        real(*args)  # type: ignore[arg-type]

    def stop() -> None:
        raise Cancelled("the dispatch was cancelled")

    monkeypatch.setattr(xnat_zip, "_read", slow)
    with pytest.raises(Cancelled), body_of(plan, check=stop):
        pytest.fail("it waited for the sum")


def test_sums_stay_a_little_ahead(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xnat_zip, "AHEAD_BYTES", 1 << 20)
    with body_of(plan) as body:
        data = b"".join(bytes(piece) for piece in body)
    with zipfile.ZipFile(io.BytesIO(data)) as reader:
        assert reader.testzip() is None
