"""Turns a peer's A-ASSOCIATE-AC into one that pynetdicom accepts, which ends the association over unknown items.

The standard has a receiver ignore items that it doesn't know (PS3.8 section 9.3.1), and peers make mistakes in some
that are not needed here: the implementation's version name, or an answer to something that was not asked.

Source: PS3.8 tables 9-17 to 9-19 and Annex D, PS3.7 Annex D.3.3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from imaging.header import MAX_UID_CHARS

AC_BYTES = 68  # before the first item: protocol version, AE titles, reserved
APPLICATION, CONTEXT, SYNTAX, USER = 0x10, 0x21, 0x40, 0x50
MAX_LENGTH, IMPLEMENTATION, WINDOW, ROLE = 0x51, 0x52, 0x53, 0x54
APPLICATION_CONTEXT = b"1.2.840.10008.3.1.1.1"
UNKNOWN = b"1.2.3"  # for the implementation of a peer that doesn't name it
CAREFUL_PDU = 16_384  # bytes, for a peer that doesn't say what it takes: every implementation's least default
ACCEPTED, NO_REASON = 0, 2  # result of a context, PS3.8 table 9-18
RESULTS = range(5)


def tidied(body: bytes) -> bytes:
    """Return the variable field of an A-ASSOCIATE-AC without ignorable items; unchanged if it is not valid."""
    try:
        items = list(_items(body[AC_BYTES:]))
        sent = list(_items(b"".join(value for kind, value in items if kind == USER)))
    except ValueError:
        return body
    made = [item(APPLICATION, APPLICATION_CONTEXT)]
    made += [context for kind, value in items if kind == CONTEXT and (context := _context(value))]
    user = dict(sent)
    limit, implementation = user.get(MAX_LENGTH, b""), user.get(IMPLEMENTATION, b"")
    inner = item(MAX_LENGTH, limit if len(limit) == 4 else struct.pack(">I", CAREFUL_PDU))
    inner += item(IMPLEMENTATION, implementation if _is_uid(implementation) else UNKNOWN)
    if len(user.get(WINDOW, b"")) == 4:
        inner += item(WINDOW, user[WINDOW])
    inner += b"".join(item(ROLE, value) for kind, value in sent if kind == ROLE)
    return body[:AC_BYTES] + b"".join(made) + item(USER, inner)


def accepted(body: bytes) -> tuple[dict[int, str], int]:
    """Return what an A-ASSOCIATE-AC accepts: transfer syntax by context id, and the largest PDU that the peer takes.

    Raises:
        ValueError: it makes no sense.
    """
    items = list(_items(body[AC_BYTES:]))
    sent = dict(_items(b"".join(value for kind, value in items if kind == USER)))
    syntaxes = {}
    for kind, value in items:
        context = _context(value) if kind == CONTEXT else b""
        if context and context[6] == ACCEPTED:
            syntaxes[context[4]] = context[12:].decode("ascii")
    limit = sent.get(MAX_LENGTH, b"")
    return syntaxes, int.from_bytes(limit, "big") if len(limit) == 4 else CAREFUL_PDU


def _context(value: bytes) -> bytes:
    """Return the answer to one context; nothing for one that can't have been requested."""
    if len(value) < 4 or value[0] % 2 == 0:
        return b""
    number, result = value[0], value[2] if value[2] in RESULTS else NO_REASON
    try:
        syntax = dict(_items(value[4:])).get(SYNTAX, b"").strip(b"\0 ")
    except ValueError:
        syntax = b""
    if not _is_uid(syntax):
        # Only an accepted context has to name one.
        result, syntax = result or NO_REASON, UNKNOWN
    return item(CONTEXT, bytes((number, 0, result, 0)) + item(SYNTAX, syntax))


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of each item.

    Raises:
        ValueError: the last one is cut short.
    """
    pos = 0
    while pos < len(data):
        head = data[pos : pos + 4]
        if len(head) < 4:
            raise ValueError("half an item")
        end = pos + 4 + int.from_bytes(head[2:], "big")
        if end > len(data):
            raise ValueError("an item longer than what it is in")
        yield head[0], data[pos + 4 : end]
        pos = end


def item(kind: int, value: bytes) -> bytes:
    """Return an item of an association request or its answer."""
    return struct.pack(">BBH", kind, 0, len(value)) + value


def _is_uid(value: bytes) -> bool:
    return 0 < len(value) <= MAX_UID_CHARS and value.isascii() and value.decode().isprintable()
