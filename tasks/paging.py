"""Reads lists from a Prefect server to their end: it returns a limited number for each request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

R = TypeVar("R")
PAGE = 200  # what a request brings at most; Prefect's own limit


async def every(ask: Callable[..., Awaitable[list[R]]], *, most: int | None = None, **given: Any) -> list[R]:
    """Return all results of a method of Prefect's client that takes `limit` and `offset`.

    Args:
        most: results after which no further request is made.
    """
    found: list[R] = []
    while True:
        page = await ask(**given, limit=PAGE, offset=len(found))
        found += page
        if len(page) < PAGE or (most is not None and len(found) >= most):
            return found
