"""Errors as answers: a status, and one line that says what to change; never a secret, never a patient's data."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from talaria import __version__
from talaria.errors import one_line
from talaria.front.lasting import TooMany
from talaria.front.subscription import Ended
from talaria.service import Conflict
from talaria.service.searching import TooManySearches
from transfer.errors import Denied, DispatchError, LedgerAway, Misconfigured, NotFound, SourceAway
from transfer.validation import what_is_wrong

logger = logging.getLogger(__name__)
WRONG, MISSING, CONFLICT, TARGET, AWAY, BUG = 422, 404, 409, 502, 503, 500

SHOWN = 40  # characters of a name that is not known
_BODY = "the body must be a JSON object in UTF-8, not compressed (Content-Type application/json)"
_NO_JSON = ("json_invalid", "model_attributes_type")  # pydantic's names of what is wrong with a whole body


class Forbidden(Exception):
    """The client has not logged in, or may not do this."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def answer_to(exc: BaseException) -> tuple[int, str]:
    """Return the status and the line of words for an error; an unexpected one is named by its type only."""
    if isinstance(exc, Forbidden | TooMany):
        return exc.status, str(exc)
    if isinstance(exc, NotFound):
        return MISSING, str(exc)
    if isinstance(exc, Conflict):
        return CONFLICT, str(exc)
    if isinstance(exc, Misconfigured | Denied) or type(exc) is ValueError:  # others' may quote the value
        return WRONG, str(exc)
    if isinstance(exc, Ended | LedgerAway | SourceAway | TooManySearches):
        return AWAY, str(exc)
    if isinstance(exc, DispatchError):
        return TARGET, str(exc)
    if any(cls.__module__.partition(".")[0] in ("httpx", "prefect") for cls in type(exc).__mro__):
        logger.warning("the Prefect server did not answer as expected", exc_info=exc)
        return AWAY, f"the Prefect server did not answer as expected ({type(exc).__name__})"
    logger.error("a request failed", exc_info=exc)
    return BUG, f"unexpected {type(exc).__name__}: see the server's log"


class _Request(Request):
    """A request whose JSON names nothing twice: readers differ in which of two values counts (RFC 8259 section 4)."""

    async def json(self) -> Any:
        return json.loads(await self.body(), object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
        raise HTTPException(WRONG, f"the body has {twice[:SHOWN]!r} twice: say which value is meant")
    return found


class Answering(APIRoute):
    """A route that turns errors into answers."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        known = {field.alias for field in self.dependant.query_params}  # what it depends on takes none

        async def answered(request: Request) -> Response:
            try:
                # `DELETE …?dry_run=true` must not remove anything.
                if unknown := [name for name in request.query_params if name not in known]:
                    takes = f"this route takes {', '.join(sorted(known))}" if known else "this route takes none"
                    return said(WRONG, f"unknown parameter {unknown[0][:SHOWN]!r}: {takes}")
                return await handler(_Request(request.scope, request.receive))
            except (RequestValidationError, HTTPException):
                raise  # the application's, as below
            except Exception as exc:
                return said(*answer_to(exc))

        return answered


def add_to(app: FastAPI) -> None:
    """Let an application answer in the same form to requests that are not valid and to unknown routes."""

    async def invalid(request: Request, exc: Exception) -> JSONResponse:
        errors: Sequence[Mapping[str, Any]] = exc.errors() if isinstance(exc, RequestValidationError) else ()
        none = ("body",), "missing"
        plain = [
            {**one, "loc": one["loc"][1:]}
            for one in errors
            if one["type"] not in _NO_JSON and (one["loc"], one["type"]) != none
        ]
        return said(WRONG, what_is_wrong(plain, {}) or _BODY)

    async def http(request: Request, exc: Exception) -> JSONResponse:
        status = exc.status_code if isinstance(exc, HTTPException) else BUG
        words = {
            404: "there is no such route: see openapi.json",
            405: "this route has no such method: see openapi.json",
        }
        if status == 400:  # of FastAPI, for a body that is no text, or JSON that Python does not read
            return said(WRONG, _BODY)
        detail = exc.detail if isinstance(exc, HTTPException) else ""
        return said(status, words.get(status, str(detail)), getattr(exc, "headers", None))

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def said(status: int, words: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return an answer that says what is wrong."""
    more = {"Talaria-Version": __version__, **(headers or {})}
    return JSONResponse({"error": one_line(words)}, status, headers=more)
