"""Association requests of peers, and our answers, as bytes (PS3.8 sections 9.3.2 to 9.3.4)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from protocols.dimse.message import IMPLEMENTATION_UID, IMPLEMENTATION_VERSION

REQUEST, ACCEPT, REJECT = 0x01, 0x02, 0x03
FIXED = 68  # bytes before the first item: protocol version, AE titles, reserved
MAX_REQUEST = 1 << 20  # bytes; 128 contexts of 40 syntaxes take 130 kB
APPLICATION, PROPOSED, ANSWERED, ABSTRACT, SYNTAX, USER = 0x10, 0x20, 0x21, 0x30, 0x40, 0x50
MAX_LENGTH, IMPLEMENTATION, VERSION = 0x51, 0x52, 0x55
APPLICATION_CONTEXT = b"1.2.840.10008.3.1.1.1"
ACCEPTED, NO_CLASS, NO_SYNTAX = 0, 3, 4  # result of a context, PS3.8 table 9-18


@dataclass(frozen=True)
class Proposal:
    """A peer's association request.

    Attributes:
        contexts: abstract syntax and transfer syntaxes by context id.
        max_pdu: the largest PDU that the peer accepts, bytes; 0 for any.
    """

    called: str
    calling: str
    contexts: dict[int, tuple[str, tuple[str, ...]]]
    max_pdu: int


def proposal(body: bytes) -> Proposal:
    """Read the variable field of an A-ASSOCIATE-RQ.

    Raises:
        ValueError: it is not valid.
    """
    if len(body) < FIXED:
        raise ValueError("an association request that is cut short")
    contexts: dict[int, tuple[str, tuple[str, ...]]] = {}
    max_pdu = 0
    for kind, value in _items(body[FIXED:]):
        if kind == PROPOSED and len(value) > 4:
            inner = list(_items(value[4:]))
            abstract = next((_uid(one) for tag, one in inner if tag == ABSTRACT), "")
            contexts[value[0]] = abstract, tuple(_uid(one) for tag, one in inner if tag == SYNTAX)
        elif kind == USER:
            limit = dict(_items(value)).get(MAX_LENGTH, b"")
            max_pdu = int.from_bytes(limit, "big") if len(limit) == 4 else 0
    return Proposal(_title(body[4:20]), _title(body[20:36]), contexts, max_pdu)


def acceptance(
    body: bytes, asked: Proposal, choose: Callable[[str, tuple[str, ...]], str | int], max_pdu: int
) -> tuple[bytes, dict[int, tuple[str, str]]]:
    """Return an A-ASSOCIATE-AC for a request, and what it accepts: abstract and transfer syntax by context id.

    Args:
        body: the variable field of the request.
        choose: returns the transfer syntax for an abstract syntax and those that are offered, or the reason for none (a
            result of PS3.8 table 9-18).
    """
    accepted: dict[int, tuple[str, str]] = {}
    items = [_item(APPLICATION, APPLICATION_CONTEXT)]
    for number, (abstract, offered) in asked.contexts.items():
        chosen = choose(abstract, offered)
        result = chosen if isinstance(chosen, int) else ACCEPTED
        syntax = chosen if isinstance(chosen, str) else (offered or ("1.2.840.10008.1.2",))[0]
        if result == ACCEPTED:
            accepted[number] = abstract, syntax
        items.append(_item(ANSWERED, bytes((number, 0, result, 0)) + _item(SYNTAX, syntax.encode("ascii", "replace"))))
    user = _item(MAX_LENGTH, struct.pack(">I", max_pdu)) + _item(IMPLEMENTATION, IMPLEMENTATION_UID.encode())
    user += _item(VERSION, IMPLEMENTATION_VERSION.encode())
    made = struct.pack(">HH", 1, 0) + body[4:FIXED] + b"".join(items) + _item(USER, user)
    return _pdu(ACCEPT, made), accepted


def rejection(result: int, source: int, reason: int) -> bytes:
    """Return an A-ASSOCIATE-RJ (PS3.8 table 9-21)."""
    return _pdu(REJECT, bytes((0, result, source, reason)))


def _pdu(kind: int, body: bytes) -> bytes:
    return struct.pack(">BxI", kind, len(body)) + body


def _item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(value)) + value


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    pos = 0
    while pos + 4 <= len(data):
        kind, length = struct.unpack_from(">BxH", data, pos)
        if pos + 4 + length > len(data):
            raise ValueError("an item that is longer than what it is in")
        yield kind, data[pos + 4 : pos + 4 + length]
        pos += 4 + length


def _uid(raw: bytes) -> str:
    return raw.decode("ascii", "replace").strip("\0 ")


def _title(raw: bytes) -> str:
    """Return an AE title; other letters than PS3.5 allows stay apart, what would break a line of a log doesn't."""
    text = raw.decode("latin-1").strip("\0 ")
    return "".join(one if one.isprintable() else "?" for one in text)
