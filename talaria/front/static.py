"""Files that pages load: styles, scripts, icons. Their addresses hold a hash of the content, so browsers keep them."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from talaria.front.access import Role, needs

FOLDER = Path(__file__).parent / "static"
PATH = "/talaria/static"
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FOR_EVER = "public, max-age=31536000, immutable"
A_WHILE = "public, max-age=3600"  # under an address that another content may have tomorrow


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    mark: str


@functools.cache
def _files() -> dict[str, _File]:
    """Return all files by their names, as in `icons/dicom.svg`."""
    found = {}
    for path in sorted(FOLDER.rglob("*")):
        if path.suffix in TYPES:
            content = path.read_bytes()
            mark = hashlib.sha256(content).hexdigest()[:16]
            found[path.relative_to(FOLDER).as_posix()] = _File(content, TYPES[path.suffix], mark)
    return found


def asset(name: str) -> str:
    """Return the address of a file, which changes with its content.

    Raises:
        KeyError: there is no such file.
    """
    return f"{PATH}/{_files()[name].mark}/{name}"


def type_icon(type_name: str) -> str:
    """Return the address of a target type's icon; types from outside share one."""
    name = f"icons/{type_name}.svg"
    return asset(name if name in _files() else "icons/target.svg")


@needs(Role.NOBODY)
async def _serve(request: Request) -> Response:
    """Answer with a file: under its address for ever, or by its plain name for a while."""
    path = str(request.path_params["path"])
    mark, _, name = path.partition("/")
    for one, caching in ((_files().get(name), FOR_EVER), (_files().get(path), A_WHILE)):
        if one and (caching == A_WHILE or one.mark == mark):
            return Response(one.content, media_type=one.media_type, headers={"cache-control": caching})
    return Response("there is no such file", 404, media_type="text/plain")


def routes() -> list[BaseRoute]:
    """Return the route of the files."""
    return [Route(f"{PATH}/{{path:path}}", _serve, methods=["GET"])]
