"""Pages in no frame: login and logout, and refusals of what somebody may not see, or is not there."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from starlette.responses import HTMLResponse

from talaria.front.static import asset

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Talaria: {title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="{icon}" type="image/svg+xml"><link rel="stylesheet" href="{style}"></head>
<body class="door"><main>{inner}</main></body></html>
"""
REFUSAL = """<div class="box"><h1>Talaria</h1><p role="alert">{words}</p>
<p><a href="/talaria/">Home page</a></p></div>"""


def plain(title: str, inner: str, status: int = 200) -> HTMLResponse:
    """Return a page with something in its middle, which is HTML already."""
    style, icon = asset("talaria.css"), asset("icons/talaria.svg")
    return HTMLResponse(PAGE.format(title=title, inner=inner, style=style, icon=icon), status)


def refusal(words: str, status: int) -> HTMLResponse:
    """Return a page that says why there is no other one."""
    return plain("refused", REFUSAL.format(words=html.escape(words)), status)


def wants_page(scope: Mapping[str, Any]) -> bool:
    """Return True if a browser asks for a page, not a script for an answer of Prefect's API."""
    accept = next((value for key, value in scope["headers"] if key == b"accept"), b"")
    return scope["method"] == "GET" and b"text/html" in accept and not scope["path"].startswith("/api/")
