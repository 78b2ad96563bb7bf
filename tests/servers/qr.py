"""A DICOM archive that is queried and pulled from, and does at any step what a test's script says.

    with archive(files, limit=10) as peer:
        ...  # query 127.0.0.1:peer.port

It answers as the standard says unless told otherwise: matching by PS3.4 section C.2.2.2, C-GET and C-MOVE with
counters. What is retrieved is decided by `on_get` and `on_move`, which return steps; `sends` makes the usual ones.
"""

from __future__ import annotations

import fnmatch
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import pydicom
from pydicom.charset import convert_encodings
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.valuerep import PersonName

from imaging.header import read_header
from tests.servers import wire
from tests.servers.scp import Connection, Scp, served
from tests.servers.steps import Step

FIND, GET, MOVE = 0x0020, 0x0010, 0x0021
LEVELS = {"PATIENT": "PatientID", "STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}
UNIQUE = tuple(LEVELS.values())


@dataclass(frozen=True)
class Instance:
    """One DICOM file of the archive."""

    ds: Dataset
    syntax: str
    data: bytes = field(repr=False)  # the data set

    @classmethod
    def of(cls, file: bytes) -> Instance:
        import tempfile

        with tempfile.TemporaryFile() as temporary:
            temporary.write(file)
            temporary.flush()
            header = read_header(temporary.fileno(), len(file))
        ds = pydicom.dcmread(BytesIO(file), stop_before_pixels=True)
        return cls(ds, header.TransferSyntaxUID, file[header.dataset_offset :])

    @property
    def uid(self) -> str:
        return str(self.ds.SOPInstanceUID)


@dataclass(frozen=True)
class Request:
    """A C-FIND, C-GET or C-MOVE; `number` counts those of its kind from 1."""

    kind: int
    number: int
    association: int
    keys: Dataset
    charset: str
    calling: str
    message_id: int
    destination: str = ""

    @property
    def level(self) -> str:
        return str(self.keys.QueryRetrieveLevel)


@dataclass(frozen=True)
class Send:
    """One C-STORE: of an instance as it is, or of other bytes, or claiming to be another.

    Attributes:
        originator: what it says whose move it is; None for the truth, "" for nothing.
    """

    instance: Instance
    data: bytes | None = None
    uid: str | None = None
    originator: str | None = None
    context: int | None = None


@dataclass(frozen=True)
class Last:
    """A response with counters; pending if the status says so. None leaves a counter out."""

    status: int = 0
    completed: int | None = None
    failed: int | None = None
    warning: int | None = None
    remaining: int | None = None
    uids: tuple[str, ...] = ()
    comment: str = ""


Steps = Sequence[Send | Last | Step]


@dataclass
class Archive(Scp):
    """A running archive, and what it was asked.

    Attributes:
        limit: how many answers C-FIND gives at most; `limit_status` is what it says then.
        limited: levels at which it does.
        leaves_out: keywords that are in no answer.
        ignores: keywords that are not matched.
        blanks: keywords that are not matched, and empty in answers.
        wild_uids: whether UIDs may have wild cards.
        misreads: changes the keys of a query as it is read.
        refuses: returns the status to refuse a query with, 0 to answer it.
        answer_charset: how answers are encoded, with ? for what that lacks, and how that is called in them (None: not
            at all).
        says: what it says for keywords of answers, whatever is true.
        announced_series: how many series it says that each study has; None for the truth.
        ports: of move destinations by AE title.
        store_answers: statuses of C-STORE, in order.
    """

    instances: list[Instance] = field(default_factory=list)
    limit: int | None = None
    limit_status: int = 0
    limited: tuple[str, ...] = tuple(LEVELS)
    leaves_out: frozenset[str] = frozenset()
    ignores: frozenset[str] = frozenset()
    blanks: frozenset[str] = frozenset()
    wild_uids: bool = False
    misreads: Callable[[Dataset], None] = lambda keys: None
    refuses: Callable[[Request], int] = lambda request: 0
    answer_charset: tuple[str, str | None] | None = None
    on_get: Callable[[Request, list[Instance]], Steps] | None = None
    on_move: Callable[[Request, list[Instance]], Steps] | None = None
    says: dict[str, str] = field(default_factory=dict)
    announced_series: int | None = None
    ports: dict[str, int] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    store_answers: list[int] = field(default_factory=list)

    def asked(self, kind: int) -> list[Request]:
        """The requests of one kind, in order."""
        return [one for one in self.requests if one.kind == kind]


def sends(instances: Sequence[Instance], *, pending: bool = True) -> list[Send | Last | Step]:
    """Return the steps of a retrieval in which all goes well."""
    steps: list[Send | Last | Step] = []
    for number, one in enumerate(instances, 1):
        steps.append(Send(one))
        if pending and number < len(instances):
            steps.append(Last(0xFF00, number, 0, 0, len(instances) - number))
    return [*steps, Last(0, len(instances), 0, 0)]


class Holding:
    """The steps of retrievals in which all goes well, once somebody lets them go on.

    Args:
        seconds: in which somebody has to.

    Attributes:
        asked: set when there is such a request.
        go_on: to be set.
    """

    def __init__(self, seconds: float = 120) -> None:
        self.asked, self.go_on, self._seconds = threading.Event(), threading.Event(), seconds

    def __call__(self, request: Request, found: list[Instance]) -> Steps:
        self.asked.set()
        if not self.go_on.wait(self._seconds):
            raise AssertionError("nobody let it go on")
        return sends(found)


@contextmanager
def archive(files: Sequence[bytes], **settings: Any) -> Iterator[Archive]:
    """Run an archive that holds these DICOM files, on loopback, until the block ends."""
    peer = Archive(instances=[Instance.of(file) for file in files], aet="ARCHIVE", **settings)
    with served(peer, _Connection) as running:
        yield running


class _Connection(Connection):
    peer: Archive

    def find(self, context: int, fields: dict[int, bytes], data: bytes) -> None:
        self.other(FIND, context, fields, data)

    def other(self, kind: int, context: int, fields: dict[int, bytes], data: bytes) -> None:
        peer = self.peer
        if kind == 0x8001:
            peer.store_answers.append(wire.number(fields[0x00000900]))
            return
        if kind not in (FIND, GET, MOVE):
            return
        keys = wire.decode_dataset(data, self.contexts[context][1])
        peer.misreads(keys)
        proposal = self.association.proposal
        assert proposal is not None
        with peer.lock:
            request = Request(
                kind,
                len(peer.asked(kind)) + 1,
                self.association.number,
                keys,
                str(keys.get("SpecificCharacterSet", "")),
                proposal.calling,
                wire.number(fields[0x00000110]),
                fields.get(0x00000600, b"").decode().strip(),
            )
            peer.requests.append(request)
        unknown = kind == MOVE and request.destination not in peer.ports and peer.on_move is None
        status = peer.refuses(request) or (0xA801 if unknown else 0)
        if status:
            self.last(context, fields, Last(status))
        elif kind == FIND:
            self._find(context, fields, request)
        else:
            heeded = self._heeded(keys, UNIQUE)
            found = [one for one in peer.instances if self._matches(one.ds, heeded)]
            script = peer.on_get if kind == GET else peer.on_move
            self._play(context, fields, request, sends(found) if script is None else script(request, found))

    # ---- C-FIND

    def _find(self, context: int, fields: dict[int, bytes], request: Request) -> None:
        peer, syntax = self.peer, self.contexts[context][1]
        unique = LEVELS[request.level]
        groups: dict[str, list[Dataset]] = {}
        heeded = self._heeded(request.keys)
        for one in peer.instances:
            if self._matches(one.ds, heeded):
                groups.setdefault(str(one.ds.get(unique, "")), []).append(one.ds)
        answers = list(groups.values())
        limit = peer.limit if request.level in peer.limited else None
        capped = limit is not None and len(answers) > limit
        for group in answers[:limit]:
            data = wire.encode_dataset(self._answer(group, request.keys), syntax)
            if peer.answer_charset is not None:
                encoded, called = (None if term is None else term.encode() for term in peer.answer_charset)
                assert encoded is not None
                at = data.index(encoded)
                data = data[: at - 8] + data[at + 10 :] if called is None else data.replace(encoded, called)
            self.last(context, fields, Last(0xFF00), data)
        self.last(context, fields, Last(peer.limit_status if capped else 0))

    def _answer(self, group: list[Dataset], keys: Dataset) -> Dataset:
        first, answer = group[0], Dataset()
        charset = self.peer.answer_charset
        if charset is None:
            answer.SpecificCharacterSet = first.get("SpecificCharacterSet", "")
        else:
            answer.SpecificCharacterSet = charset[0]
        counted = {
            "NumberOfStudyRelatedInstances": ("StudyInstanceUID", "SOPInstanceUID"),
            "NumberOfSeriesRelatedInstances": ("SeriesInstanceUID", "SOPInstanceUID"),
            "NumberOfStudyRelatedSeries": ("StudyInstanceUID", "SeriesInstanceUID"),
        }
        for element in keys:
            keyword = element.keyword
            if keyword in self.peer.leaves_out or keyword == "SpecificCharacterSet":
                continue
            if keyword in self.peer.says:
                setattr(answer, keyword, self.peer.says[keyword])
            elif keyword in counted:
                above, below = counted[keyword]
                same = [one.ds for one in self.peer.instances if one.ds.get(above) == first.get(above)]
                setattr(answer, keyword, len({ds.get(below) for ds in same}))
                if below == "SeriesInstanceUID" and self.peer.announced_series is not None:
                    answer.NumberOfStudyRelatedSeries = self.peer.announced_series
            elif keyword == "ModalitiesInStudy":
                same = [o.ds for o in self.peer.instances if o.ds.StudyInstanceUID == first.StudyInstanceUID]
                answer.ModalitiesInStudy = sorted({ds.Modality for ds in same})
            elif keyword in self.peer.blanks:
                setattr(answer, keyword, "")
            elif keyword == "QueryRetrieveLevel":
                answer.QueryRetrieveLevel = keys.QueryRetrieveLevel
            else:
                value = first.get(keyword, None)
                if charset is not None and isinstance(value, str | PersonName):
                    codec = convert_encodings(charset[0])[0]
                    value = str(value).encode(codec, "replace").decode(codec)
                setattr(answer, keyword, value)
        return answer

    def _heeded(self, keys: Dataset, only: tuple[str, ...] = ()) -> list[DataElement]:
        """Return those of the keys that instances are compared with."""
        unheeded = {"QueryRetrieveLevel", "SpecificCharacterSet", *self.peer.ignores, *self.peer.blanks}
        given = [one for one in keys if (one.value or one.value == 0) and one.keyword not in unheeded]
        return [one for one in given if not only or one.keyword in only]

    def _matches(self, ds: Dataset, heeded: list[DataElement]) -> bool:
        for element in heeded:
            keyword, wanted = element.keyword, element.value
            value = ds.get(keyword, "")
            if keyword == "ModalitiesInStudy":
                study = [one.ds for one in self.peer.instances if one.ds.StudyInstanceUID == ds.StudyInstanceUID]
                if str(wanted) not in {one.Modality for one in study}:
                    return False
            elif element.VR == "UI" and not (self.peer.wild_uids and "*" in str(wanted)):
                if str(value) not in ([str(wanted)] if isinstance(wanted, str) else list(map(str, wanted))):
                    return False
            elif element.VR in ("DA", "TM"):
                low, dash, high = str(wanted).partition("-")
                text = str(value)
                if not (text and (not low or text >= low) and (not high or text <= high) if dash else text == low):
                    return False
            elif not fnmatch.fnmatchcase(str(value), str(wanted)):
                return False
        return True

    # ---- C-GET and C-MOVE

    def _play(self, context: int, fields: dict[int, bytes], request: Request, steps: Steps) -> None:
        sender = None
        for step in steps:
            if isinstance(step, Last):
                self.last(context, fields, step)
            elif isinstance(step, Send) and request.kind == GET:
                self._send(step)
            elif isinstance(step, Send):
                sender = sender or _Sender(self.peer, request)
                sender.send(step, request)
            else:
                if sender:
                    sender.close()
                    sender = None
                self.play(step, context, fields)
        if sender:
            sender.close()

    def _send(self, step: Send) -> None:
        one = step.instance
        context = step.context or next(
            (n for n, pair in self.contexts.items() if pair == (str(one.ds.SOPClassUID), one.syntax)), None
        )
        if context is None:
            return  # not negotiated
        elements = {
            0x00000002: wire.padded(str(one.ds.SOPClassUID)),
            0x00000100: struct.pack("<H", 1),
            0x00000110: struct.pack("<H", 7),
            0x00000700: struct.pack("<H", 0),
            0x00000800: struct.pack("<H", 1),
            0x00001000: wire.padded(step.uid or one.uid),
        }
        data = one.data if step.data is None else step.data
        pieces = [wire.p_data(context, wire.encode_command(elements))]
        size = self.limit - 6
        for start in range(0, len(data), size):
            last = start + size >= len(data)
            pieces.append(wire.p_data(context, data[start : start + size], command=False, last=last))
        before = len(self.peer.store_answers)
        self.write(b"".join(pieces))
        while len(self.peer.store_answers) == before:
            self.step()

    def last(self, context: int, fields: dict[int, bytes], last: Last, data: bytes = b"") -> None:
        elements = {
            0x00000002: fields[0x00000002],
            0x00000100: struct.pack("<H", wire.number(fields[0x00000100]) | 0x8000),
            0x00000120: fields[0x00000110],
            0x00000800: struct.pack("<H", 1 if data else wire.NO_DATA),
            0x00000900: struct.pack("<H", last.status),
        }
        counters = {0x1020: last.remaining, 0x1021: last.completed, 0x1022: last.failed, 0x1023: last.warning}
        elements |= {tag: struct.pack("<H", value) for tag, value in counters.items() if value is not None}
        if last.comment:
            elements[0x00000902] = (last.comment + " " * (len(last.comment) % 2)).encode()
        out = wire.p_data(context, wire.encode_command(dict(sorted(elements.items()))))
        if data:
            out += wire.p_data(context, data, command=False)
        self.write(out)


def send_to(peer: Archive, request: Request, instances: Sequence[Instance]) -> None:
    """Send instances to the destination of a move, whatever was answered to it."""
    sender = _Sender(peer, request)
    for one in instances:
        sender.send(Send(one), request)
    sender.close()


class _Sender:
    """Sends instances to a move's destination, by pynetdicom."""

    def __init__(self, peer: Archive, request: Request) -> None:
        from tests.servers.scu import AE

        self.peer = peer
        ae = AE(peer.aet)
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = 5
        for pair in dict.fromkeys((str(one.ds.SOPClassUID), one.syntax) for one in peer.instances):
            ae.add_requested_context(pair[0], [pair[1]])
        port = peer.ports[request.destination]
        tls = (peer.report_tls, "127.0.0.1") if peer.report_tls else None
        self.assoc = ae.associate("127.0.0.1", port, ae_title=request.destination, tls_args=tls)

    def send(self, step: Send, request: Request) -> None:
        if not self.assoc.is_established:
            self.peer.store_answers.append(-1)
            return
        one = step.instance
        ds = wire.decode_dataset(one.data if step.data is None else step.data, one.syntax)
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = pydicom.uid.UID(one.syntax)
        originator = request.calling if step.originator is None else step.originator
        names: dict[str, Any] = (
            {"originator_aet": originator, "originator_id": request.message_id} if originator else {}
        )
        try:
            status = self.assoc.send_c_store(ds, msg_id=1, **names)
        except RuntimeError:
            if self.assoc.is_established:
                raise
            status = pydicom.Dataset()  # the receiver has just ended the association
        self.peer.store_answers.append(int(status.get("Status", -1)))

    def close(self) -> None:
        if self.assoc.is_established:
            self.assoc.release()
