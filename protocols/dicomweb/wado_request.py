"""One request of WADO-RS (PS3.18 section 10.4): its answer's instances as they arrive, and each as a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from imaging.header import PREAMBLE_BYTES, Damaged, Header, NotDicom, has_preamble, read_header
from protocols.dicomweb import service as dicomweb
from protocols.dicomweb.service import Service
from protocols.files import partial
from protocols.http.answer import Answer
from protocols.http.multipart import Parts, parameters
from transfer.errors import Busy, Interrupted, Misconfigured, Rejected

DICOM = "application/dicom"
LEVELS = ("studies", "series", "instances")
# As it is stored; for servers that don't know the star, in whatever syntax they like; without an envelope; anything.
ACCEPTS = (
    f'multipart/related; type="{DICOM}"; transfer-syntax=*', f'multipart/related; type="{DICOM}"',
    f"{DICOM}; transfer-syntax=*", DICOM, "*/*",
)  # fmt: skip
ANY_FILE = ("", "application/octet-stream", "binary/octet-stream")  # types of what a web server doesn't know
MANY = 2  # forms that can hold several instances
OTHER_FORM = (400, 406, 415, 500, 501)  # what servers say to a form that they can't give
UNABLE = (500, 502, 504)  # and to what is too much for them


def path(service: Service, uids: tuple[str, ...]) -> str:
    """Return the path of a study, a series or an instance, by its UID and those above it."""
    return service.path(service.wado, *(part for pair in zip(LEVELS, uids, strict=False) for part in pair))


class Unable(Busy):
    """The server fails at this request, or takes too long; smaller ones may succeed."""


class NoService(Misconfigured):
    """The server does not do this."""


def fetch(
    service: Service, uids: tuple[str, ...], pace: Callable[[int], None], forms: list[str] | None = None
) -> Generator[Iterator[memoryview], None, None]:
    """Yield the content of each instance of a study or series, or of one instance, as it arrives.

    Each content must be read to its end, or left, before the next.

    Args:
        uids: of the study, the series and the instance; fewer for all that is below.
        pace: called with the bytes that came; may wait, or raise to stop.
        forms: media types to request, one after the other until the server accepts one, which comes first from then on.

    Raises:
        NotFound: there is no such resource. Misconfigured: the answer is something else. Unable.
        Interrupted: it was cut short; what came whole before has been yielded.
    """
    where = path(service, uids)
    forms = list(ACCEPTS) if forms is None else forms
    asked = [form for form in forms if len(uids) == len(LEVELS) or form in ACCEPTS[:MANY]]
    for accept in asked:
        with service.session.request("GET", where, {"Accept": accept}) as answer:
            if answer.status in (200, 206):
                if accept != forms[0]:  # other threads read the list, which is empty while `sort` is at it
                    forms[:] = sorted(forms, key=lambda form: form != accept)
                yield from _contents(service, answer, where, pace)
                if answer.status == 206 and len(uids) < len(LEVELS):  # PS3.18 table 10.4.3-1
                    raise Interrupted(f"{service.where}: the answer holds a part of the instances only (206)")
                return
            body = answer.read()
            if accept == asked[-1] or answer.status not in OTHER_FORM:
                error = service.error(answer, body, where, dicomweb.FILES)
                if isinstance(error, Misconfigured):
                    raise NoService(error.message)
                raise Unable(error.message) if answer.status in UNABLE else error


def _contents(
    service: Service, answer: Answer, where: str, pace: Callable[[int], None]
) -> Iterator[Iterator[memoryview]]:
    kind, options = parameters(answer.headers.get("Content-Type", ""))
    pieces = paced(answer.chunks(), pace)
    file, begin = one_file(kind, pieces)
    if file is not None:  # without an envelope
        yield file
    elif kind.startswith("multipart/") and options.get("boundary"):
        parts = Parts(pieces, options["boundary"], service.where)
        for head in parts:
            if head.media_type not in (DICOM, "", "text/plain", "application/octet-stream"):
                raise Misconfigured(f"{service.where}{where}: the answer holds {head.media_type} instead of {DICOM}")
            yield parts.content()
    else:
        raise dicomweb.unexpected(service, answer, begin + answer.read(), where, dicomweb.FILES)


def one_file(kind: str, pieces: Iterator[memoryview]) -> tuple[Iterator[memoryview] | None, bytes]:
    """Return the pieces of a body that is one DICOM file, by its type or, where that says nothing, by its beginning.

    Else None, and what has been taken of the body.
    """
    if kind == DICOM:
        return pieces, b""
    begin = b""
    while kind in ANY_FILE and len(begin) < PREAMBLE_BYTES and (piece := next(pieces, None)) is not None:
        begin += bytes(piece)
    return chain([memoryview(begin)], pieces) if has_preamble(begin) else None, begin


def paced(pieces: Iterator[memoryview], pace: Callable[[int], None]) -> Iterator[memoryview]:
    """Yield pieces; call `pace` with the bytes of each before."""
    for piece in pieces:
        pace(len(piece))
        yield piece


@contextmanager
def spooled(content: Iterator[memoryview], folder: Path) -> Iterator[tuple[Path, Header]]:
    """Write the content of an instance to a temporary file in a folder; remove the file at the end if it is left.

    Raises:
        Rejected: what arrived is not a whole DICOM file. Busy: there is no room. Misconfigured: nothing can be written
            there.
    """
    with partial.writing(folder):
        file, fd = partial.create(folder)
    try:
        try:
            for piece in content:
                rest = piece
                with partial.writing(folder):
                    while rest:
                        rest = rest[os.write(fd, rest) :]
            header = read_header(fd, os.fstat(fd).st_size)
        except (NotDicom, Damaged) as exc:
            raise Rejected(f"the server gave a file that is damaged: {exc}") from exc
        yield file, header
    finally:
        with suppress(OSError):  # it has its name by now; or the next retrieval sweeps it away
            file.unlink()
        os.close(fd)
