"""How a test of a target is shown: its steps, what to do about one that failed, and what the other side has shown."""

from __future__ import annotations

from html import unescape
from typing import Any

import pytest

from blocks import TYPES
from talaria.front.pages.checks import Check, _shown
from talaria.front.pages.shown_settings import in_labels
from talaria.front.pages.site import render
from tests.front.people import words
from transfer.errors import Denied
from transfer.health import Health

XSS = '<img src=x onerror="alert(1)">'


def page(*probes: dict[str, Any], ok: bool = False) -> str:
    check = Check("id", "pacs", "anna", "/", probes=[_shown(one) for one in probes], over=True, ok=ok)
    return bytes(render("check.html", check=check).body).decode()


def probe(**more: Any) -> dict[str, Any]:
    return {"name": "tls", "result": "ok", "ms": 1.0, "detail": "", "error": "", "remedy": "", "facts": {}} | more


def test_a_step_that_failed_is_shown_with_what_to_do_about_it() -> None:
    health = Health()
    with health.probe("authenticate"):
        raise Denied("the server said: 530 Login incorrect")
    health.skip("authorize")
    shown = words(page(*(one.to_json() for one in health.probes)))
    assert "failed Signed in" in shown and "530 Login incorrect Check user, password" in shown
    assert "not run May write" in shown and "an earlier probe failed" in shown


def test_fields_are_named_as_forms_name_them() -> None:
    words = in_labels(TYPES["dicomweb"])
    said = _shown(probe(detail="unknown authority: set ca_cert to it, not other_name", remedy="Set tls_cert."), words)
    assert said["detail"] == "unknown authority: set “Trust these authorities” to it, not other_name"
    assert said["remedy"] == "Set “Our certificate”."


@pytest.mark.parametrize(("days", "said", "opened"), [(400, "400 days left", False), (9, "9 days left", True),
                                                      (-1, "it is over", True)])  # fmt: skip
def test_a_peer_s_certificate_is_shown_whatever_it_says(days: int, said: str, opened: bool) -> None:
    shown = {"subject": f"CN={XSS}", "issuer": "\u202eCN=\u00a0" + "x" * 10_000, "names": [XSS, "pacs.example.org"],
             "expires": "2027-01-01T00:00:00+00:00", "days": days, "fingerprint": "AB:CD"}  # fmt: skip
    found = page(probe(facts={"certificate": shown, "transfer_syntaxes": ["JPEG 2000", XSS]}))
    assert XSS not in found and unescape(found).count(XSS) == 3
    assert said in words(found) and ("<details open>" in found) is opened
    assert "Transfer syntaxes that it accepts: 2" in words(found) and "01 Jan 2027" in found
