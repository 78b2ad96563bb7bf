"""What the home page says of sources, certificates and disks that need somebody, and where it leads."""

from __future__ import annotations

import time

import pytest

from talaria.front.pages.dispatches import _need
from talaria.metrics.certificates import DAY_S, FRONT, OWN, PEER, SERVER, KnownCertificate
from talaria.metrics.disks import STATE, DiskSpace
from talaria.service import attention
from talaria.service.attention import Attention, Need

ROW = {"name": "ward", "type": "inbox", "broken": None, "enabled": True, "problem": ""} | {
    "units": {"failed": 0, "held": 0, "done": 9}
}


@pytest.mark.parametrize("need", Need)
def test_each_has_words_and_leads_to_where_something_can_be_done(need: Need) -> None:
    for name in ("one", ""):
        for count in (-2, 5):
            path, words = _need(Attention(need, name, why="{braces}", count=count, percent=3.21, free=5_000_000))
            page = "/talaria/sources/" if need.startswith("source.") else "/talaria/targets/"
            assert path == (page + name if name else page if need.startswith("source.") else "")
            assert "{count}" not in words and (name in words or need == Need.CERTIFICATE_SERVER)
            assert need != Need.DISK or ("3.2 %" in words and "5 MB" in words)


@pytest.mark.parametrize(
    ("more", "needs"),
    [
        ({}, []),
        ({"broken": "folder: is required", "enabled": None}, [(Need.SOURCE_BROKEN, "folder: is required", 0)]),
        ({"problem": "/in: is not mounted"}, [(Need.SOURCE_STUCK, "/in: is not mounted", 0)]),
        ({"units": {"failed": 2, "held": 1, "done": 5}}, [(Need.SOURCE_UNITS, "", 3)]),
        ({"problem": "/in: is not mounted", "enabled": False}, []),
    ],
)
def test_sources_that_somebody_must_look_at(more: dict[str, object], needs: list[object]) -> None:
    found = attention._sources([ROW | more])
    assert [(one.need, one.why, one.count) for one in found] == needs


def test_certificates_that_are_soon_over_and_disks_that_are_low() -> None:
    ends = {("web", PEER): 9.5, ("far", PEER): 31, ("own", OWN): -0.5, (FRONT, SERVER): 30}
    known = [KnownCertificate(*whose, time.time() + days * DAY_S) for whose, days in ends.items()]
    assert [(one.need, one.name, one.count) for one in attention._certificates(known)] == [
        (Need.CERTIFICATE_PEER, "web", 9), (Need.CERTIFICATE_OWN, "own", -1), (Need.CERTIFICATE_SERVER, "", 29),
    ]  # fmt: skip
    spaces = [DiskSpace(STATE, 9, 100), DiskSpace("archive", 5, 100), DiskSpace("roomy", 10, 100)]
    assert [(one.need, one.name, one.percent) for one in attention._disks(spaces)] == [
        (Need.DISK, "", 9.0), (Need.DISK, "archive", 5.0)]  # fmt: skip
