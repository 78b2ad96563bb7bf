"""What the scripted peer tells a script of (Store, Commit), and the steps that a script may answer with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.servers import wire

# PS3.8 section 9.3.3.2
REFUSED_USER, REFUSED_NO_REASON, REFUSED_CLASS, REFUSED_SYNTAXES = 1, 2, 3, 4


@dataclass(frozen=True)
class Store:
    """A C-STORE-RQ that came whole; `number` counts from 1 over all associations."""

    number: int
    association: int
    message_id: int
    SOPClassUID: str
    SOPInstanceUID: str
    syntax: str
    data: bytes = field(repr=False)
    command: dict[int, bytes] = field(repr=False, default_factory=dict)

    def file(self) -> bytes:
        """The DICOM file that a receiver would write."""
        return wire.part10(self.SOPClassUID, self.SOPInstanceUID, self.syntax, self.data)


@dataclass(frozen=True)
class Commit:
    """An N-ACTION-RQ that asks for storage commitment."""

    association: int
    transaction: str
    uids: dict[str, str]  # SOP class by SOP instance UID
    calling: str


# ---- steps: what a script may answer with; a bare number is an Answer with that status


@dataclass(frozen=True)
class Answer:
    """A response message.

    Attributes:
        status: None leaves the element out: an empty response.
        message_id: instead of the request's.
        uid: Affected SOP Instance UID instead of the request's.
        comment: Error Comment (0000,0902).
        bare: the command set holds nothing but its group length.
    """

    status: int | None = 0
    message_id: int | None = None
    uid: str | None = None
    comment: str = ""
    bare: bool = False
    kept: bool | None = None  # whether the instance counts as kept; None: if the status says so


@dataclass(frozen=True)
class Partly:
    """The first bytes of a right response, then the end of the connection."""

    count: int = 20


@dataclass(frozen=True)
class Raw:
    """These bytes as they are."""

    data: bytes


@dataclass(frozen=True)
class Abort:
    """An A-ABORT."""

    source: int = 2
    reason: int = 0


@dataclass(frozen=True)
class Reject:
    """An A-ASSOCIATE-RJ: result 1 permanent or 2 transient, source and reason of PS3.8 table 9-21."""

    result: int
    source: int
    reason: int


@dataclass(frozen=True)
class Accept:
    """An A-ASSOCIATE-AC of these bytes, which is taken to accept every context as it was asked for."""

    data: bytes


@dataclass(frozen=True)
class Close:
    """The connection's end, with a FIN."""


@dataclass(frozen=True)
class Reset:
    """The connection's end, with a RST."""


@dataclass(frozen=True)
class Silence:
    """Nothing more on this connection; it stays open until the other side closes it."""


@dataclass(frozen=True)
class Wait:
    """A pause."""

    seconds: float


@dataclass(frozen=True)
class Report:
    """An N-EVENT-REPORT-RQ with the result of a commitment.

    Attributes:
        failed: failure reasons (0008,1197) by SOP instance UID; the others are reported as committed.
        missing: SOP instance UIDs that are in neither list.
        port: report on a new association to this port; None for the association of the request.
        transaction: instead of the request's.
        delay_s: seconds after the request; on a new association the request's own is served meanwhile.
    """

    failed: dict[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    port: int | None = None
    transaction: str | None = None
    delay_s: float = 0.0


Step = int | Accept | Answer | Partly | Raw | Abort | Reject | Close | Reset | Silence | Wait | Report
Script = Step | Sequence[Step] | None
