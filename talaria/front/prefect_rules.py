"""Which role each route of Prefect's API needs, and which requests ask for secrets or for more than their role may.

Whatever is not named here is for admins: a route that a later Prefect adds is closed to viewers and operators.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qsl

from talaria.front.access import Role
from transfer import live

BODY_BYTES = 4 << 20  # most bytes of a body that is checked before it is passed on

_OPEN = re.compile(r"/api/(health|ready)")
# POST requests by which Prefect's UI reads. Despite their names, get_scheduled_flow_runs and get_runs are not among
# them: they record that a worker has polled.
_READS = re.compile(
    r"/api/(?:"
    r"(?:flows|flow_runs|task_runs|deployments|saved_searches|logs|concurrency_limits|v2/concurrency_limits|block_types"
    r"|block_documents|block_schemas|work_pools|work_queues|task_workers|artifacts|artifacts/latest|variables|automations"
    r"|events)/(?:filter|count|paginate)"
    r"|(?:flow_runs|task_runs)/history|flow_runs/lateness|flow_runs/[^/]+/input/filter"
    r"|work_pools/[^/]+/(?:queues|workers)/filter|work_pools/[^/]+/concurrency_status|work_queues/[^/]+/concurrency_status"
    r"|events/count-by/[^/]+"
    r"|ui/flow_runs/(?:history|count-task-runs)|ui/flows/(?:count-deployments|next-runs)"
    r"|ui/task_runs/(?:count|dashboard/counts)|ui/schemas/validate"
    r"|templates/validate|automations/templates/validate"
    r")"
)
_OPERATES = re.compile(
    r"/api/(?:deployments/[^/]+/create_flow_run(?:/bulk)?|flow_runs/[^/]+/(?:set_state|resume)|flow_runs/bulk_set_state)"
)
# What only the product's own processes do. An admin who did it would falsify the state of runs, or stop workers.
_WORKS = re.compile(
    r"/api/(?:logs|events|(?:v2/)?concurrency_limits/(?:increment|decrement|increment-with-lease|decrement-with-lease)"
    r"|v2/concurrency_limits/leases/[^/]+/renew|work_pools/[^/]+/workers/heartbeat"
    r"|(?:deployments|work_pools/[^/]+)/get_scheduled_flow_runs|work_queues/[^/]+/get_runs)"
)
# Where runs are made, which get a label that says for whom.
_CREATES = re.compile(r"/api/(?:deployments/[^/]+/create_flow_run(?:/bulk)?|flow_runs)")
_WATCHES = re.compile(r"/api/(?:events|logs)/out")  # websockets that only read
_INSPECTED = re.compile(r"/api/(?:block_documents|block_types)(?:/.*)?")
# States that an operator may put a run into: again, cancel, pause. Others would say that something has arrived.
_STATES = ("SCHEDULED", "CANCELLING", "PAUSED")
# What the audit trail has an entry for: targets are Prefect's blocks.
_TARGETS = re.compile(r"/api/block_documents(?:/.*)?")
_OF_TARGETS = re.compile(r"/api/block_(?:types|schemas)/.*")  # which go with them
_NO = ("false", "0", "off", "no", "n", "f", "")


def role_for(method: str, path: str) -> Role:
    """Return the role that a request needs; paths as they are after decoding."""
    path = path.rstrip("/")
    if method in ("GET", "HEAD"):
        return Role.NOBODY if method == "GET" and _OPEN.fullmatch(path) else Role.VIEWER
    if method == "POST":
        if _READS.fullmatch(path):
            return Role.VIEWER
        if _OPERATES.fullmatch(path):
            return Role.OPERATOR
        if _WORKS.fullmatch(path):
            return Role.WORKER
    return Role.ADMIN


def recorded(method: str, path: str, role: Role) -> str:
    """Return what a request of a person does that the audit trail has an entry for, "" if nothing.

    One of `heard.EVENTS`: `target changed`, `target removed`, `run changed`.
    """
    path = path.rstrip("/")
    if role >= Role.WORKER or method in ("GET", "HEAD") or (method == "POST" and _READS.fullmatch(path)):
        return ""
    if _TARGETS.fullmatch(path):
        return "target removed" if method == "DELETE" else "target changed"
    if method == "DELETE" and _OF_TARGETS.fullmatch(path):
        return "target removed"
    return "run changed" if _OPERATES.fullmatch(path) or path.startswith("/api/flow_runs/") else ""


def role_for_websocket(path: str) -> Role:
    """Return the role that a websocket needs."""
    return Role.VIEWER if _WATCHES.fullmatch(path.rstrip("/")) else Role.WORKER


def inspected(method: str, path: str, role: Role) -> bool:
    """Return True if the body of a request must be checked, or signed, before it is passed on."""
    if role >= Role.WORKER or method in ("GET", "HEAD"):
        return False
    path = path.rstrip("/")
    return bool(_CREATES.fullmatch(path)) or bool(
        _INSPECTED.fullmatch(path) or (role is Role.OPERATOR and _OPERATES.fullmatch(path))
    )


def why_not(query: bytes, role: Role) -> str:
    """Return why a request's query is refused, "" if it isn't."""
    if role >= Role.WORKER or b"=" not in query:
        return ""
    try:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=1000)
    except ValueError:
        return "the query has too many fields"
    for key, value in pairs:
        if _is_include(key) and value.strip().casefold() not in _NO:
            return _SECRETS
    return ""


def signed(path: str, body: bytes, who: str) -> bytes:
    """Return a body with the name of whoever makes runs in their labels: a Prefect server elsewhere knows nobody.

    Bodies that make no runs are returned as they are.
    """
    if not _CREATES.fullmatch(path.rstrip("/")):
        return body
    document = json.loads(body or b"{}")
    for one in document if isinstance(document, list) else [document]:
        if isinstance(one, dict) and isinstance(one.setdefault("labels", None), dict | None):
            one["labels"] = (one["labels"] or {}) | {live.BY: who}
    return json.dumps(document).encode()


def why_not_body(path: str, body: bytes, role: Role) -> str:
    """Return why a request's body is refused, "" if it isn't. Bodies are parsed as Prefect's server does."""
    try:
        document = json.loads(body or b"{}", object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        return "the body is not JSON"
    if _INSPECTED.fullmatch(path.rstrip("/")):
        pairs = document if isinstance(document, _Pairs) else ()
        return _SECRETS if any(_is_include(key) and value not in (False, None) for key, value in pairs) else ""
    wrong = _state_of(document) if role is Role.OPERATOR else ""
    return f"an operator may not set the state {wrong[:40]}: it is not one of {', '.join(_STATES)}" if wrong else ""


_SECRETS = "secrets are answered to the worker's own credential only"


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with all of its keys, repeated ones included."""


def _is_include(key: str) -> bool:
    return key.strip().casefold().replace("-", "_") == "include_secrets"


def _state_of(document: Any) -> str:
    """Return a type of state that a body asks for and an operator may not set, "" if there is none."""
    bodies = [document] if isinstance(document, _Pairs) else document if isinstance(document, list) else []
    states = [value for body in bodies if isinstance(body, _Pairs) for key, value in body if key == "state"]
    asked = [str(value) for state in states if isinstance(state, _Pairs) for key, value in state if key == "type"]
    return next((one for one in asked if one not in _STATES), "")
