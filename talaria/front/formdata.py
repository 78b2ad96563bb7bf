"""Forms as they come in, for the login and every page: bounded while they are read, and each field once."""

from __future__ import annotations

from urllib.parse import parse_qs

from starlette.requests import ClientDisconnect, Request


class NoForm(ValueError):
    """It is not a form of ours; `long` if it was only longer than it may be."""

    def __init__(self, *, long: bool = False) -> None:
        super().__init__()
        self.long = long


async def body(request: Request, most: int) -> bytes:
    """Return the body of a request.

    Args:
        most: bytes that it may have.

    Raises:
        NoForm: it is longer, or breaks off.
    """
    found = bytearray()
    try:
        async for piece in request.stream():
            found += piece
            if len(found) > most:
                raise NoForm(long=True)
    except ClientDisconnect as exc:
        raise NoForm from exc
    return bytes(found)


async def urlencoded(request: Request, most: int, fields: int, several: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Return the values of the fields of a form.

    Args:
        most: bytes that it may have.
        fields: values that it may have in all.
        several: fields that may be there several times.

    Raises:
        NoForm: it is none, is longer, or has another field twice: whoever sends it so does not mean one of the two.
    """
    sent = await body(request, most)
    try:
        found = parse_qs(sent.decode(), keep_blank_values=True, max_num_fields=fields, strict_parsing=bool(sent))
    except (UnicodeDecodeError, ValueError) as exc:
        raise NoForm from exc
    return once(found, several)


def once(found: dict[str, list[str]], several: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the values of fields as they are.

    Raises:
        NoForm: one that may be there once is there twice.
    """
    if any(len(values) > 1 for name, values in found.items() if name not in several):
        raise NoForm
    return found
