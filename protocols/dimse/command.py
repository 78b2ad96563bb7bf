"""Command sets: what stands before a data set in a message, always in implicit VR little endian.

Source: PS3.7 section 6.3 and Annex E.
"""

from __future__ import annotations

import struct
import sys

from imaging.header import UID
from protocols.dimse.message import NO_DATASET

AFFECTED_CLASS, FIELD, MESSAGE_ID, RESPONDED_TO = 0x0002, 0x0100, 0x0110, 0x0120
DESTINATION, PRIORITY, DATASET_TYPE, STATUS = 0x0600, 0x0700, 0x0800, 0x0900
COMMENT, AFFECTED_INSTANCE, ORIGINATOR, ORIGINATOR_ID = 0x0902, 0x1000, 0x1030, 0x1031
REMAINING, COMPLETED, FAILED, WARNING = COUNTS = 0x1020, 0x1021, 0x1022, 0x1023

_ELEMENT = struct.Struct("<HHI")


class CommandSet(dict[int, bytes]):
    """A command set: values by element number of group 0000. What `Commands` reads is not to be changed.

    Attributes:
        context: of the presentation context that it came in.
        kind: its command field; None if it is absent or not one.
        sop_class: the affected SOP class UID; "" if it is absent or not one.
    """

    __slots__ = ("context", "has_dataset", "kind", "sop_class")
    context: int
    has_dataset: bool
    kind: int | None
    sop_class: str

    def work_out(self, context: int) -> None:
        """Set what is asked of every command set, once its values are there."""
        self.context = context
        self.has_dataset = self.number(DATASET_TYPE) not in (None, NO_DATASET)
        self.kind = self.number(FIELD)
        uid = self.uid(AFFECTED_CLASS)
        self.sop_class = sys.intern(uid) if UID.fullmatch(uid) else ""

    def following(self, message_id: bytes, instance: bytes, context: int) -> CommandSet:
        """Return the command set that differs in message ID and SOP instance UID only, in a context."""
        made = CommandSet(self)
        made[MESSAGE_ID], made[AFFECTED_INSTANCE] = message_id, instance
        return made._as_this(self, context)

    def counting(self, raw: bytes, begin: int, context: int) -> CommandSet | None:
        """Return the command set that differs in its counts only, which begin there; None if others stand there too."""
        made = CommandSet(self)
        for element in COUNTS:
            made.pop(element, None)
        pos, end = begin, len(raw)
        while pos + 8 <= end:
            group, element, length = _ELEMENT.unpack_from(raw, pos)
            if group or element not in COUNTS:
                return None
            pos += 8
            if pos + length <= end:
                made[element] = raw[pos : pos + length]
            pos += length
        return made._as_this(self, context)

    def _as_this(self, other: CommandSet, context: int) -> CommandSet:
        """Return itself, once what is asked of every command set is taken from another one that agrees in that."""
        self.context, self.has_dataset = context, other.has_dataset
        self.kind, self.sop_class = other.kind, other.sop_class
        return self

    def number(self, element: int) -> int | None:
        """Return the value of an element of VR US; None if it is absent or not one."""
        value = self.get(element, b"")
        return int.from_bytes(value, "little") if len(value) == 2 else None

    def uid(self, element: int) -> str:
        """Return the value of an element of VR UI, valid or not."""
        return self.get(element, b"").partition(b"\0")[0].rstrip(b" ").decode("ascii", "replace")

    def text(self, element: int) -> str:
        """Return the value of an element as text without padding."""
        raw = self.get(element, b"")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
        return (text if text.isprintable() else "".join(c for c in text if c.isprintable())).strip()


def decoded(raw: bytes | bytearray | memoryview, context: int = 0) -> CommandSet:
    """Read a command set; leave out a truncated element."""
    command = CommandSet()
    pos, end = 0, len(raw)
    while pos + 8 <= end:
        group, element, length = _ELEMENT.unpack_from(raw, pos)
        pos += 8
        if group == 0 and pos + length <= end:
            command[element] = bytes(raw[pos : pos + length])
        pos += length
    command.work_out(context)
    return command


class Commands:
    """Reads command sets, of which most are those of another: all answers to a query, all requests but their UIDs, what
    a peer has sent but its counts.

    What comes between two requests for instances, as a peer's count of them does, makes no difference to these.
    """

    def __init__(self) -> None:
        self._raw, self._command = b"", decoded(b"")  # the last one
        self._model, self._length = self._command, -1  # the last one that others may follow, and its bytes
        self._values = (0, 0, 0, 0)  # begin and end of its message ID and instance UID
        self._same = (b"", b"", b"")  # what stands before, between and behind these
        self._counted, self._uncounted = self._command, b""  # the last one with counts; what stands before them

    def read(self, raw: bytes, context: int) -> CommandSet:
        """Return what `decoded` does; not to be changed."""
        if raw == self._raw and context == self._command.context:
            return self._command
        begin, end, uid, uid_end = self._values
        before, between, behind = self._same
        alike = len(raw) == self._length and raw.startswith(before) and raw.endswith(behind)
        if alike and raw.startswith(between, end):
            command = self._model.following(raw[begin:end], raw[uid:uid_end], context)
        elif self._uncounted and raw.startswith(self._uncounted):
            command = self._counted.counting(raw, len(self._uncounted), context) or decoded(raw, context)
        else:
            command = decoded(raw, context)
            if AFFECTED_INSTANCE in command:
                self._learn(raw, command)
            elif REMAINING in command:
                self._learn_counts(raw, command)
        self._command, self._raw = command, raw
        return command

    def _learn(self, raw: bytes, command: CommandSet) -> None:
        """Let others follow a command set, if message ID and instance UID stand in it once and in this order."""
        places: dict[int, tuple[int, int]] = {}
        pos = 0
        while pos + 8 <= len(raw):
            group, element, length = _ELEMENT.unpack_from(raw, pos)
            if group or element in places or pos + 8 + length > len(raw):
                return
            places[element] = pos + 8, pos + 8 + length
            pos += 8 + length
        (begin, end), (uid, uid_end) = places.get(MESSAGE_ID, (0, 0)), places.get(AFFECTED_INSTANCE, (0, 0))
        if 0 < begin < uid:
            self._model, self._length = command, len(raw)
            self._values = begin, end, uid, uid_end
            self._same = raw[:begin], raw[end:uid], raw[uid_end:]

    def _learn_counts(self, raw: bytes, command: CommandSet) -> None:
        """Let others follow a command set in which nothing stands behind the counts."""
        pos = 0
        while pos + 8 <= len(raw):
            _, element, length = _ELEMENT.unpack_from(raw, pos)
            if element in COUNTS:
                break
            pos += 8 + length
        if command.counting(raw, pos, command.context) == command:
            self._counted, self._uncounted = command, raw[:pos]


def encoded(elements: dict[int, int | str | bytes]) -> bytes:
    """Return a command set with its group length: numbers as US, text as AE or UI."""
    body = b"".join(_element(number, elements[number]) for number in sorted(elements))
    return _ELEMENT.pack(0, 0, 4) + len(body).to_bytes(4, "little") + body


def _element(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        raw = value.to_bytes(2, "little")
    elif isinstance(value, str):
        raw = value.encode("ascii", "replace")
        raw += (b" " if number in (DESTINATION, ORIGINATOR) else b"\0") * (len(raw) % 2)
    else:
        raw = value + b" " * (len(value) % 2)
    return _ELEMENT.pack(0, number, len(raw)) + raw
