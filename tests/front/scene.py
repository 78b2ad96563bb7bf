"""A department at work, for whoever looks at all pages: targets in each state, dispatches of each kind, an archive."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from playwright.sync_api import Page

from talaria.front.access import Role
from talaria.testing.process import as_loaded, free_port, until
from tests.engine.material import dicom, folder, source, study
from tests.front.door import PASSWORD
from tests.front.people import Person, person
from tests.servers.certificates import Authority
from tests.servers.dicomweb import scripted
from tests.servers.qr import archive
from tests.servers.up import Talaria, talaria

USER = "anna"


@dataclass(frozen=True)
class Scene:
    """A server with something on every page.

    Attributes:
        paths: the address of each page by a name for it, for an admin.
        search: how the Query page was asked.
    """

    up: Talaria
    base: str
    paths: dict[str, str]
    search: dict[str, str]


@contextmanager
def scene(root: Path) -> Iterator[Scene]:
    """Make one; it ends with the block."""
    there = [
        study(f"20261{n:03}", PatientName=f"DOE^{name}", StudyDescription="Thorax") for n, name in enumerate("ABC")
    ]
    shown = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leaf = Authority(root / "authority").leaf("web")
    shown.load_cert_chain(leaf.cert, leaf.key)
    with (
        talaria(root) as up,
        archive([one for each in there for one in each]) as peer,
        scripted(shown) as web,
    ):
        up.apply(
            web={"type": "dicomweb", "url": web.url.replace("http:", "https:"), "description": "Of another hospital"},
            research=folder(root / "research", contact="lab@example.org", description="Studies of trial 7"),
            **{"pacs-main": dicom(free_port(), contact="pacs@example.org"), "archive": source(peer)},
            **{"old-archive": folder(root / "old") | {"enabled": False}},
        )
        for number in range(3):
            day = root / "data" / f"CT_{number}"
            day.mkdir(parents=True)
            for at, content in enumerate(study(f"B{number}", series=1, each=4)):
                (day / f"{at}.dcm").write_bytes(content)
        inbox = {"type": "inbox", "folder": str(root / "inbox"), "targets": ["research"]}
        (root / "inbox").mkdir()
        hook = {"type": "webhook", "url": f"http://127.0.0.1:{free_port()}/", "on": ["dispatch.failed"]}
        (root / "more.yaml").write_text(yaml.safe_dump({"sources": {"inbox": inbox}, "notify": {"chat": hook}}))
        up.json("source", "apply", str(root / "more.yaml"))
        up.json("notify", "apply", str(root / "more.yaml"))
        people = person(up, Role.ADMIN, USER)
        admin = next(people)
        paths = worked(admin, root)
        search = {"source": "archive", "accessions": "20261000\n20261001\n20261099"}
        yield Scene(up, up.url.removesuffix("/api"), paths, search)
        next(people, None)


def worked(admin: Person, root: Path) -> dict[str, str]:
    """Send and fetch something; return the address of every page."""
    form = admin.form("/talaria/send") | {"to": "research", "priority": "normal", "do": "send"}
    good = admin.post("/talaria/send", {**form, "paths": str(root / "data" / "CT_0")})
    flood = admin.post("/talaria/send", {**form, "key": "flood", "paths": str(root / "data"), "each": "folder"})
    bad = admin.post("/talaria/send", {**form, "key": "bad", "paths": str(root / "data" / "CT_1"), "to": "pacs-main"})
    query = admin.form("/talaria/query") | {"source": "archive", "accessions": "20261000\nNOPE", "to": "research"}
    fetched = admin.post("/talaria/query", {**query, "do": "fetch"})
    tests = [admin.post(f"/talaria/targets/{name}/test", {}) for name in ("pacs-main", "web")]
    ended = [good, flood, bad, fetched]
    until(lambda: not any('hx-trigger="load' in admin.get(path) for path in ended), as_loaded(120))
    until(lambda: not any("Testing" in re.sub("<[^>]+>", "", admin.get(test)) for test in tests), as_loaded(120))
    return {
        "home": "/talaria/",
        "targets": "/talaria/targets",
        "target": "/talaria/targets/research",
        "target-failing": "/talaria/targets/pacs-main",
        "test": tests[0],
        "test-certificate": tests[1],
        "add-target": "/talaria/add-target",
        "target-form": "/talaria/add-target/dicom",
        "target-edit": "/talaria/targets/research/edit",
        "dispatches": "/talaria/dispatches",
        "dispatch": good,
        "dispatch-failed": bad,
        "dispatch-flood": flood,
        "send": "/talaria/send",
        "upload": "/talaria/upload",
        "query": "/talaria/query",
        "retrieval": fetched,
        "sources": "/talaria/sources",
        "source": "/talaria/sources/inbox",
        "add-source": "/talaria/add-source",
        "source-form": "/talaria/add-source/dicom",
        "source-edit": "/talaria/sources/inbox/edit",
        "notifications": "/talaria/notifications",
        "notification": "/talaria/notifications/chat",
        "add-rule": "/talaria/add-rule",
        "rule-form": "/talaria/add-rule/email",
        "rule-edit": "/talaria/notifications/chat/edit",
        "import": "/talaria/import",
        "settings": "/talaria/settings",
        "users": "/talaria/settings/users",
        "tokens": "/talaria/settings/tokens",
        "audit": "/talaria/settings/audit",
        "nothing": "/talaria/targets/nobody",
    }


def log_in(page: Page, base: str) -> None:
    """Log in as USER."""
    page.goto(f"{base}/talaria/login?next=/talaria/")
    page.fill("[name=user]", USER)
    page.fill("[name=password]", PASSWORD)
    page.keyboard.press("Enter")
    page.get_by_role("heading", level=1, name="Home").wait_for()


def search(page: Page, one: Scene) -> None:
    """Ask the archive; return when its answer is shown."""
    page.goto(f"{one.base}/talaria/query")
    page.select_option("[name=source]", one.search["source"])
    page.fill("[name=accessions]", one.search["accessions"])
    page.get_by_role("button", name="Search").click()
    page.get_by_role("button", name="Fetch what is picked").wait_for()
