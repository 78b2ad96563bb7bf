"""Words and bodies of answers."""

from __future__ import annotations

import threading

import pytest

from protocols.http.multipart import Parts, parameters
from protocols.net.words import clean, excerpt
from talaria.testing.harness import attempt
from tests.servers.dicomweb import Scripted
from tests.targets.dicomweb import dicomweb_target
from transfer.errors import (
    Interrupted,
)
from transfer.plan import Plan

# ---- words of others


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (b"<html><script>var x=1</script><title>A</title><p>B &amp; C</p></html>", "text/html", "A B & C"),
        (b'{"Message": "bad", "Details": "very", "HttpStatus": 400}', "application/json", "bad; very"),
        (b'{"error": {"message": "inner"}}', "application/json", "inner"),
        (b'[{"error": "x"}]', "application/json", "x"),
        (b"plain\r\n\x1b[31mtext\x00", "text/plain", "plain [31mtext"),
        (b"\xff\xfe", "text/plain", "��"),
        (b"", "text/html", ""),
    ],
)
def test_quote(body: bytes, kind: str, said: str) -> None:
    assert excerpt(body, kind) == said


def test_quote_is_short_and_hides() -> None:
    text = excerpt(b"x" * 100_000, "text/plain")
    assert len(text) <= 200
    assert clean("user Secret-1 and SECRET-1", ["secret-1", ""]) == "user *** and ***"


# ---- multipart


def parts_of(body: bytes, size: int, boundary: str = "b") -> list[tuple[str, bytes]]:
    pieces = (memoryview(body)[at : at + size] for at in range(0, len(body), size))
    parts = Parts(pieces, boundary, "here")
    return [(head.get("X", ""), b"".join(bytes(piece) for piece in parts.content())) for head in parts]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_multipart(size: int) -> None:
    body = (
        b"preamble\r\n--b \t\r\nX: 1\r\n\r\none\r\n--bb\r\n-\r\n--\r\r\n"
        b"--b\r\n\r\ntwo\r\n\r\n--b\r\nX: 3\r\n\r\n\r\n--b--\r\nepilogue --b"
    )
    # The line break before a delimiter belongs to the delimiter, all others to the content.
    expected = [("1", b"one\r\n--bb\r\n-\r\n--\r"), ("", b"two\r\n"), ("3", b"")]
    got = parts_of(body.replace(b"--bb", b"--x"), size)
    assert got == [(name, content.replace(b"--bb", b"--x")) for name, content in expected]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_multipart_with_bare_line_feeds(size: int) -> None:
    body = b"preamble\n--b \nX: 1\n\none\r\n--\r\n--x\r\n--b\n\ntwo\n\n--b\nX: 3\n\n\n--b--\nepilogue --b"
    assert parts_of(body, size) == [("1", b"one\r\n--\r\n--x\r"), ("", b"two\n"), ("3", b"")]


@pytest.mark.parametrize("size", [1, 5, 100])
@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_multipart_cut_short(size: int, cut: int) -> None:
    body = b"--b\r\nX: 1\r\n\r\none\r\n--b\r\n\r\ntwo\r\n--b--"
    with pytest.raises(Interrupted):
        parts_of(body[:-cut], size)


def test_multipart_parameters() -> None:
    assert parameters('Multipart/Related; type="application/dicom"; boundary="a b;c"') == (
        "multipart/related",
        {"type": "application/dicom", "boundary": "a b;c"},
    )
    assert parameters("multipart/related; boundary*=us-ascii'en'a%20b") == ("multipart/related", {"boundary": "a b"})
    assert parameters("") == ("", {})


def test_threads_end(server: Scripted, plan: Plan) -> None:
    attempt(dicomweb_target(server.url), plan).require()
    assert not [thread for thread in threading.enumerate() if thread.name in ("stow", "wado", "read-back")]
