"""Talaria's own API, `/talaria/api/v1`, documented at `/talaria/api/v1/openapi.json`.

Every route declares the role that it needs (`talaria.front.access.needs`). Errors are JSON: `{"error": "one line that
says what to change"}`. What takes a while comes as server-sent events. JSON as in docs/cli.md and docs/api.md.
"""

from talaria.front.api.application import PATH, application, routes, shared

__all__ = ["PATH", "application", "routes", "shared"]
