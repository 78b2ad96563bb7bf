"""Retrieves instances by WADO-URI (PS3.18 section 9), one by one, from servers that have nothing else.

DICOMweb defines no place for the service: it is looked for where servers have it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from urllib.parse import urlencode

from protocols.dicomweb.service import FILES, Service
from protocols.dicomweb.wado_request import DICOM, one_file, paced
from protocols.http.multipart import parameters
from transfer.errors import Cancelled, DispatchError, Misconfigured

NAME = "wado"
SYNTAXES = ("*", "")  # as it is stored, where a server knows that; else as it likes
OTHER_FORM = (400, 406, 415)


def places(service: Service) -> list[str]:
    """Return the paths at which the service may be: as the target says, below its URL, beside it, at the top."""
    base = [part for part in service.base.split("/") if part]
    found = [service.path(service.wado)] if service.wado else []
    found += [service.path("", NAME)]
    found += ["".join(f"/{part}" for part in [*base[:length], NAME]) for length in range(len(base) - 1, -1, -1)]
    return list(dict.fromkeys(found))


def fetch(
    service: Service, place: str, uids: tuple[str, ...], pace: Callable[[int], None]
) -> Generator[Iterator[memoryview], None, None]:
    """Yield the content of an instance as it arrives; it must be read to its end, or left.

    Args:
        place: one of `places`.
        uids: of study, series and instance.
        pace: called with the bytes that came; may wait, or raise to stop.

    Raises:
        NotFound, Misconfigured: it is not here. Others: as `service.error` says.
    """
    keys = dict(zip(("studyUID", "seriesUID", "objectUID"), uids, strict=True))
    for syntax in SYNTAXES:
        asked = {"requestType": "WADO", **keys, "contentType": DICOM} | ({"transferSyntax": syntax} if syntax else {})
        where = f"{place}?{urlencode(asked, safe='/*')}"  # as they are: Orthanc takes them so only
        with service.session.request("GET", where, {"Accept": DICOM}) as answer:
            if answer.status == 200:
                kind, _ = parameters(answer.headers.get("Content-Type", ""))
                file, _ = one_file(kind, paced(answer.chunks(), pace))
                if file is None:
                    raise Misconfigured(f"{service.where}{place}: gives {kind or 'no type'} instead of {DICOM}")
                yield file
                return
            body = answer.read()
            if syntax == SYNTAXES[-1] or answer.status not in OTHER_FORM:
                raise service.error(answer, body, place, FILES)


def found(service: Service, uids: tuple[str, ...]) -> str:
    """Return the path of the service that has an instance; "" if there is none."""
    for place in places(service):
        contents = fetch(service, place, uids, lambda count: None)
        try:
            next(contents)
        except Cancelled:
            raise
        except DispatchError:
            continue
        finally:
            contents.close()
        return place
    return ""
