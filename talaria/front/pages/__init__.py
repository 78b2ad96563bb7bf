"""Talaria's own pages, made on the server: targets, dispatches, and what needs attention.

Each page works without scripts; htmx and `static/talaria.js` only make it quicker. Texts stand in `texts.py`, templates
in `templates/`. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

from starlette.routing import BaseRoute

from talaria.front.api.asking import Reach
from talaria.front.pages.checks import Checks
from talaria.front.pages.dispatch import DispatchPage
from talaria.front.pages.dispatches import DispatchPages
from talaria.front.pages.editing import RULE, SOURCE, TARGET, EditingPages
from talaria.front.pages.importing import ImportPages
from talaria.front.pages.notifications import NotificationPages
from talaria.front.pages.querying import QueryPages
from talaria.front.pages.retrievals import RetrievalPages
from talaria.front.pages.sending import SendingPages
from talaria.front.pages.settings import SettingsPages
from talaria.front.pages.site import Site
from talaria.front.pages.sources import SourcePages
from talaria.front.pages.targets import TargetPages
from talaria.front.pages.uploading import UploadPages


def routes(reach: Reach) -> list[BaseRoute]:
    """Return the routes of all pages."""
    site = Site(reach)
    checks = Checks(site.changed)
    return [
        *DispatchPages(site).routes(),
        *DispatchPage(site).routes(),
        *SendingPages(site).routes(),
        *UploadPages(site).routes(),
        *QueryPages(site).routes(),
        *RetrievalPages(site).routes(),
        *ImportPages(site).routes(),
        *SourcePages(site).routes(),
        *NotificationPages(site).routes(),
        *SettingsPages(site).routes(),
        *(route for subject in (TARGET, SOURCE, RULE) for route in EditingPages(site, checks, subject).routes()),
        *TargetPages(site, checks).routes(),
    ]
