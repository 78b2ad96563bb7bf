"""Roles and identities, and the role that a route needs; shared by the gate, the routes and their tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

from starlette.routing import BaseRoute, Match, Mount

F = TypeVar("F", bound=Callable[..., Any])
SCOPE_KEY = "talaria.user"  # of an ASGI scope: the Identity that the gate has found


class Role(IntEnum):
    """What a client may do; each role includes the ones before it."""

    NOBODY = 0  # no login: what everybody may see
    VIEWER = 1  # look
    OPERATOR = 2  # dispatch, retry, cancel, test
    ADMIN = 3  # targets, users
    WORKER = 4  # the product's own processes: secrets of targets, logs, events, leases

    @classmethod
    def of(cls, name: str) -> Role:
        """Return the role with a name.

        Raises:
            ValueError: there is none, or people can't have it.
        """
        given = {role.name.lower(): role for role in (cls.VIEWER, cls.OPERATOR, cls.ADMIN)}
        if name not in given:
            raise ValueError(f"role {name!r} is not one of {', '.join(given)}")
        return given[name]

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Identity:
    """Somebody whom the gate has let in.

    Attributes:
        name: as it stands in the audit trail and in `created_by` of runs.
        role: the most that they may do.
        how: `session`, `token`, `machine`, `worker`, `proxy` or `open` (no login is asked for).
    """

    name: str
    role: Role
    how: str = "token"


NOBODY = Identity("", Role.NOBODY, "")

# Whoever asks, for code below a request that has no scope at hand; set by the gate.
ACTING: ContextVar[Identity] = ContextVar("talaria.acting", default=NOBODY)


def needs(role: Role, *, bounds_body: bool = False) -> Callable[[F], F]:
    """Declare the role that an endpoint needs; one without a declaration is for admins.

    Args:
        bounds_body: whether it ends a body that is too long itself, as it comes in; else the gate does, at a length
            that fits into the memory.
    """

    def mark(endpoint: F) -> F:
        endpoint.role, endpoint.bounds_body = role, bounds_body  # type: ignore[attr-defined]
        return endpoint

    return mark


def role_of(route: BaseRoute) -> Role:
    """Return the role that a route needs."""
    return Role(getattr(getattr(route, "endpoint", None), "role", Role.ADMIN))


def bounds_body(route: BaseRoute | None) -> bool:
    """Return True if what answers at a route ends a body that is too long itself."""
    return bool(getattr(getattr(route, "endpoint", None), "bounds_body", False))


def found(routes: Iterable[BaseRoute], scope: dict[str, Any]) -> BaseRoute | None:
    """Return the route of a request, None if the request is for none of these routes.

    A known path with another method gets the route, so that only those who may use it see 405.
    """
    partly: BaseRoute | None = None
    for route in routes:
        match, child = route.matches(scope)
        if match is Match.NONE:
            continue
        if isinstance(route, Mount) and route.routes:
            return found(route.routes, {**scope, **child})
        if match is Match.FULL:
            return route
        partly = route if partly is None else partly
    return partly
