"""Logins at XNAT, and permissions of users."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import as_loaded
from tests.servers.xnat import Fault, Xnat, error
from tests.targets.xnat import xnat_target
from tests.targets.xnat_push.pushing import all_of, fails
from transfer.errors import (
    Cancelled,
    Denied,
    Interrupted,
    NotFound,
)
from transfer.outcome import Kind


def test_alias_token(server: Xnat, study: Path) -> None:
    studies.ct(study, 1)
    alias, secret = server.store.issue_alias("sender")
    assert all_of(attempt(xnat_target(server.url, user=alias, password=secret), study), Kind.DELIVERED)


def test_odd_credentials(server: Xnat, study: Path) -> None:
    studies.ct(study, 1)
    server.store.add_user("müller", "пароль: 秘密 ")
    server.store.projects["P"].roles["müller"] = "member"
    assert all_of(attempt(xnat_target(server.url, user="müller", password="пароль: 秘密 "), study), Kind.DELIVERED)


def test_wrong_password_is_Denied(server: Xnat, study: Path) -> None:
    studies.ct(study, 1)
    problem = fails(attempt(xnat_target(server.url, password="wrong-password"), study), Denied)
    assert "wrong-password" not in str(problem)
    assert not server.imports


def test_project_that_is_not_there_or_not_seen_is_NotFound(server: Xnat, study: Path) -> None:
    studies.ct(study, 1)
    server.store.add_project("HIDDEN", somebody="owner")
    for project in ("NOPE", "HIDDEN"):
        fails(attempt(xnat_target(server.url, project_id=project), study), NotFound)
    assert not server.imports


def test_no_right_to_create_is_Denied(server: Xnat, study: Path) -> None:
    studies.ct(study, 1)
    server.store.projects["P"].roles["sender"] = "collaborator"
    fails(attempt(xnat_target(server.url), study), Denied)
    assert not server.imports


def test_another_project_in_the_answer_is_Denied(server: Xnat, study: Path) -> None:
    """A server that doesn't tell rights beforehand: the study lands nowhere, and that is noticed."""
    studies.ct(study, 1)
    server.store.projects["P"].roles["sender"] = "collaborator"
    server.rest.knows_permissions = False
    problem = fails(attempt(xnat_target(server.url), study), Denied)
    assert "'null'" in str(problem)
    assert len(server.imports) == 1


def test_session_that_expires_during_an_upload(server: Xnat, study: Path) -> None:
    studies.ct(study, 3)
    server.faults.append(Fault("POST", "/data/services/import", expire=True))
    target = xnat_target(server.url)
    sent = attempt(target, study)
    fails(sent, Interrupted)
    again = attempt(target, study)  # with a fresh login
    assert again.arrived == {item.path for item in again.plan.items}
    assert len(server.store.experiments) == 1


def test_cookie_that_expired_is_not_renewed(server: Xnat, study: Path) -> None:
    studies.ct(study, 1)
    server.server.basic_renews = False
    server.faults.append(Fault("GET", "/data/prearchive/.*", error(401, "The request requires user authentication")))
    fails(attempt(xnat_target(server.url), study), Interrupted)


def test_login_is_ended_in_every_case(server: Xnat, study: Path) -> None:
    """Also after a cancellation in the middle; the fixture looks after all the others."""
    studies.multiframe(study / "large.dcm", 4)
    cancelled = threading.Event()
    sent = attempt(
        xnat_target(server.url, bandwidth_limit=1 << 20), study, cancelled=cancelled, moved=lambda *_: cancelled.set()
    )
    fails(sent, Cancelled)
    assert ("DELETE", "/data/JSESSION", {}) in server.seen


def test_cancel_while_xnat_is_silent(server: Xnat, study: Path) -> None:
    server.rules.archive_s = 8
    studies.ct(study, 1)
    cancelled = threading.Event()
    timer = threading.Timer(1, cancelled.set)
    timer.start()
    begun = time.monotonic()
    fails(attempt(xnat_target(server.url, idle_timeout_s=60), study, cancelled=cancelled), Cancelled)
    assert time.monotonic() - begun < as_loaded(5)
