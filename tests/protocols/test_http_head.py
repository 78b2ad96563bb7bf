"""Heads of HTTP answers: taken apart as http.client does it, in whatever pieces they come; and what fields say."""

from __future__ import annotations

import io
import re
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import parse_headers
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.http.answer import Answer
from protocols.http.head import MAX_FIELDS, MAX_RETRY_AFTER_S, head, retry_after, status_line
from protocols.net.connection import HEAD_BYTES, LINE_BYTES, Connection
from transfer.errors import Interrupted

NAMES = st.sampled_from(
    ["Server", "ETag", "x-amz-meta-a", "Content-Length", "content-length", "Transfer-Encoding", "X"]
)
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f\x85\xa0"), max_size=30)
ENDS = st.sampled_from(["\r\n", "\n"])
FIELDS = st.tuples(NAMES, st.sampled_from([":", ": ", ":\t"]), VALUES).map("".join)
CONTINUED = st.tuples(st.sampled_from([" ", "\t", "   "]), VALUES).map("".join)
NO_FIELDS = st.sampled_from(["junk", "HTTP/1.1 200 OK", "<html>", "GET / HTTP/1.1"])
STATUS = st.sampled_from(
    ["HTTP/1.1 200 OK", "HTTP/1.1 204", "HTTP/1.0 500 Not so good", "HTTP/1.1 101 Switching", "HTTP/1.1 299 \xfc"]
)


@contextmanager
def fed(*pieces: bytes, ends: bool = True) -> Iterator[Connection]:
    """A connection on which these pieces come, each only when the one before was read; then it is closed."""
    ours, theirs = socket.socketpair()
    waiting = list(pieces)

    def more() -> None:
        if waiting:
            theirs.sendall(waiting.pop(0))
        elif ends:
            theirs.close()

    with closing(ours), closing(theirs):
        ours.setblocking(False)
        yield Connection(ours, "here", 1.0, more)


def by_http_client(block: bytes) -> tuple[int, str, bool, list[tuple[str, str]]]:
    """What our client read before it had a parser of its own."""
    lines = [line.removesuffix(b"\r") for line in block.split(b"\n")]
    version, _, rest = lines[0].partition(b" ")
    code, _, reason = rest.partition(b" ")
    kept = [line for line in lines[1:] if not line or b":" in line or line[:1] in (b" ", b"\t")]
    found = parse_headers(io.BytesIO(b"".join(line + b"\r\n" for line in kept)))
    pairs = [(name, plain(value)) for name, value in found.items()]
    return int(code), reason.decode("latin-1").strip(), version != b"HTTP/1.0", pairs


def plain(value: str) -> str:
    """A value with its continued lines joined."""
    return re.sub(r"[ \t]*\r?\n[ \t]*", " ", value.strip(" \t\r\n")).strip(" \t")


@st.composite
def heads(draw: st.DrawFn, *, odd: bool = True) -> bytes:
    """A head with what real servers do: folded lines, bare LF, lines that are no fields, fields that contradict."""
    kinds = st.one_of(FIELDS, FIELDS, CONTINUED, NO_FIELDS) if odd else FIELDS
    lines = [draw(STATUS), draw(FIELDS), *draw(st.lists(kinds, max_size=12))]
    kept = [lines[0]]
    for line in lines[1:]:
        # A continued line belongs to the field before it: after something that is none, http.client and we differ.
        if line[:1] not in (" ", "\t") or (":" in kept[-1] and line.strip(" \t")):
            kept.append(line)
    end = draw(ENDS)
    mixed = draw(st.booleans())
    text = "".join(line + (draw(ENDS) if mixed else end) for line in kept)
    return (text + draw(ENDS)).encode("latin-1")


@given(heads(), st.lists(st.integers(0, 400), max_size=8))
def test_read_as_http_client_does(block: bytes, cuts: list[int]) -> None:
    at = sorted({0, len(block), *(cut for cut in cuts if cut < len(block))})
    pieces = [block[start:end] for start, end in pairwise(at)]
    with fed(*pieces, b"body") as connection:
        found = head(connection.head(status_line))
        pairs = [(name, re.sub(r" +", " ", value)) for name, value in found.fields.items()]
        status, reason, modern, expected = by_http_client(block)
        assert (found.status, found.reason, found.modern) == (status, reason, modern)
        assert pairs == [(name, re.sub(r" +", " ", value)) for name, value in expected]
        for name, _ in expected:
            assert found.fields.get(name.upper()) == next(
                v for n, v in found.fields.items() if n.lower() == name.lower()
            )
        assert bytes(connection.take(9)) == b"body"


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
def test_cut_anywhere(end: bytes) -> None:
    block = end.join((b"HTTP/1.1 200 OK", b"A: 1", b" 2", b"B: 3", b"", b""))
    for cut in range(1, len(block)):
        with fed(block[:cut], block[cut:] + b"body") as connection:
            assert head(connection.head(status_line)).fields.items() == [("A", "1 2"), ("B", "3")]
            assert bytes(connection.take(9)) == b"body"


@given(heads(odd=False))
def test_a_blank_before_the_colon_changes_nothing(block: bytes) -> None:
    spaced = re.sub(rb"(?m)^([A-Za-z-]+):", rb"\1 :", block)
    assert head(_text(spaced)).fields.items() == head(_text(block)).fields.items()


def _text(block: bytes) -> str:
    with fed(block) as connection:
        return connection.head(status_line)


@pytest.mark.parametrize(
    ("block", "name", "value"),
    [
        (b"HTTP/1.1 200\r\n\r\n", "X", None),
        (b"HTTP/1.1 200 OK\r\nX\xfc: 1\r\nY: 2\r\n\r\n", "Y", "2"),
        (b"HTTP/1.1 200 OK\r\nX: a\rY: b\r\n\r\n", "X", "a Y: b"),
        (b"HTTP/1.1 200 OK\r\nX: \x00\x01\xff\r\n\r\n", "X", "\x00\x01\xff"),
        (b"HTTP/1.1 200 OK\r\n  X: 1\r\nY: 2\r\n\r\n", "X", None),
        (b"HTTP/1.1 200 OK\r\n: 1\r\nY: 2\r\n\r\n", "Y", "2"),
        (b"HTTP/1.1 200 OK\r\nY: 1\r\ny: 2\r\n\r\n", "Y", "1"),
    ],
)
def test_odd_heads(block: bytes, name: str, value: str | None) -> None:
    found = head(_text(block)).fields
    assert found.get(name) == value
    assert (name in found) == (value is not None)


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "begins with 'SSH-2.0-OpenSSH_9.2'"),
        (b"\x15\x03\x01\n", "begins with"),
        (b"\xff\xfe\n\n", "begins with other bytes"),
        (b"HTTP/2 200\r\n", "begins with 'HTTP/2 200'"),
        (b"HTTP/1.1 20x\r\n", "begins with"),
        (b"\r\nHTTP/1.1 200 OK\r\n\r\n", "begins with ''"),
        (b"x" * (LINE_BYTES + 9), "a line without end"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * (MAX_FIELDS + 1) + b"\r\n", "its head has no end"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"b" * HEAD_BYTES, "its head has no end"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "Content-Length is not valid"),
    ],
)
def test_what_is_no_answer_is_refused_without_waiting_for_more(block: bytes, why: str) -> None:
    pieces = [block[at : at + 60_000] for at in range(0, len(block), 60_000)]
    with fed(*pieces, ends=False) as connection, pytest.raises(Interrupted) as caught:
        Answer(connection, "GET", "here")
    assert why in caught.value.message


def body_of(block: bytes) -> bytes:
    with fed(block) as connection:
        return Answer(connection, "GET", "here").read()


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"5;a=b;c\r\nhello\r\n0\r\n\r\n", b"hello"),
        (b" 5 \r\nhello\r\n00\r\nX-Sum: 1\r\nY: 2\r\n\r\n", b"hello"),
        (b"5\nhello\n0\n\n", b"hello"),
        (b"A" + b";x" * 1000 + b"\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    ],
)
def test_chunks(body: bytes, found: bytes) -> None:
    assert body_of(CHUNKED + body) == found


@pytest.mark.parametrize(
    "body",
    [
        b"-5\r\nhello\r\n0\r\n\r\n",
        b"5_0\r\nhello\r\n0\r\n\r\n",
        b"\r\nhello\r\n0\r\n\r\n",
        b"f" * 17 + b"\r\n",
        b"1;" + b"x" * 40_000 + b"\r\na\r\n1;" + b"x" * 40_000 + b"\r\na\r\n0\r\n\r\n",
        b"0\r\n" + b"X: y\r\n" * (MAX_FIELDS + 1) + b"\r\n",
        b"1;" + b"x" * (LINE_BYTES + 9),
    ],
)
def test_damaged_or_endless_chunks(body: bytes) -> None:
    with pytest.raises(Interrupted, match="chunks are damaged"):
        body_of(CHUNKED + body)


def test_after_lengths_that_contradict_nothing_follows_on_a_connection() -> None:
    block = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: %d\r\n\r\nok"
    for other, reusable in ((2, True), (7, False)):
        with fed(block % other) as connection:
            answer = Answer(connection, "GET", "here")
            assert answer.read() == b"ok"
            assert answer.reusable is reusable


@pytest.mark.parametrize(
    ("field", "seconds"),
    [
        ("120", 120),
        (" 0 ", 0),
        ("1.5", 1.5),
        ("-3", 0),
        ("1e300", MAX_RETRY_AFTER_S),
        ("inf", MAX_RETRY_AFTER_S),
        ("nan", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2065 07:28:00 GMT", MAX_RETRY_AFTER_S),
        ("Wed, 21 Oct 2065 07:28:00 -0000", MAX_RETRY_AFTER_S),
        ("Wed, 99 Oct 2065", None),
        ("soon", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after(field: str | None, seconds: float | None) -> None:
    assert retry_after(field) == seconds
