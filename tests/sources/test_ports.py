"""Which DICOM sources can't listen beside others, and which would receive what they have sent themselves."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from blocks import Target
from blocks.dicom import DicomTarget
from blocks.dicom_source import DicomSource
from blocks.dicom_tls import DicomTlsTarget
from tasks.sources import checks
from tasks.sources.ports import clashes, loops
from tests.targets.dicom_tls import certificates


def source(name: str, port: int = 104, **fields: Any) -> DicomSource:
    return DicomSource(**{"port": port, "aet": name.upper(), "targets": ["pacs"], **fields}).named(name)


def target(name: str, port: int = 104, cls: type[DicomTarget] = DicomTarget, **fields: Any) -> DicomTarget:
    return cls(**{"host": "127.0.0.1", "port": port, "aet_target": "CT", **fields}).named(name)


def test_what_can_not_listen_beside_another() -> None:
    made = certificates()
    tls = {"tls_cert": str(made.server.cert), "tls_key": str(made.server.key)}
    first = source("a", aet="X")
    assert clashes([first, source("b", aet="Y"), source("c", 105, aet="X")]) == {}
    assert "is that of a: each source" in clashes([first, source("b", aet="X")])["b"]
    assert "other settings of TLS" in clashes([first, source("b", aet="Y", **tls)])["b"]


@pytest.mark.parametrize(
    ("one", "other", "clash"),
    [
        ("127.0.0.1", "127.0.0.2", False),
        ("127.0.0.1", "::1", False),
        ("::", "127.0.0.1", False),  # a listener on one address of IPv6 takes nothing of IPv4
        ("name.invalid", "127.0.0.1", False),  # that it means nothing is seen when it is to listen
        ("127.0.0.1", "", True),
        ("", "::1", True),
        ("127.0.0.1", "localhost", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("0.0.0.0", "", True),
        ("::", "::1", True),
        ("::1", "0:0:0:0:0:0:0:1", True),
    ],
)
def test_addresses_are_compared_and_not_their_names(one: str, other: str, clash: bool) -> None:
    for first, second in ((one, other), (other, one)):
        found = clashes([source("a", aet="X", host=first), source("b", aet="X", host=second)])
        assert bool(found) is clash
        assert not clash or "give both the same host, or two ports" in found["b"]


def wrong(here: DicomSource, others: list[DicomSource], *targets: Target) -> list[str]:
    return list(loops(here, [here, *others], {one.name: one for one in targets}))


def name_of_this_machine() -> str:
    """Return an address of this machine that is no loopback, where it has one."""
    try:
        found = [str(one[4][0]) for one in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    except OSError:  # nobody knows its name
        found = []
    return next((one for one in found if not one.startswith("127.")), "127.0.0.1")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "localhost", "0.0.0.0", "::1", "name of this machine"])
def test_a_source_that_would_send_to_itself_is_refused(host: str) -> None:
    host = name_of_this_machine() if host.startswith("name") else host
    for fields in ({"targets": ["pacs"]}, {"targets": [], "routes": [{"modality": "CT", "targets": ["dicom/pacs"]}]}):
        (words,) = wrong(source("ct", **fields), [], target("pacs", host=host))
        assert words.endswith("pacs is this source itself: what it receives would come again, and then be removed")


def test_a_loop_is_among_the_problems_of_a_source() -> None:
    ct = source("ct")
    assert any("is this source itself" in one for one in checks.problems(ct, [ct], [target("pacs")]))
    assert checks.problems(ct, [ct], [target("pacs", aet_target="PACS")]) == []


def test_targets_that_call_the_title_that_was_called() -> None:
    passing = {"aet_target": "ANY", "pass_receiver_aet": True}
    assert wrong(source("ct"), [], target("pacs", **passing))
    assert wrong(source("ct"), [source("mr", 105)], target("pacs", 105, **passing)) == []  # it has another title
    assert wrong(source("ct"), [], target("pacs", cls=DicomTlsTarget))


@pytest.mark.parametrize(
    "fields",
    [{"port": 105}, {"aet_target": "MR"}, {"host": "192.0.2.254"}, {"host": "sender"}, {"host": "name.invalid"}],
)
def test_another_node_is_no_loop(fields: dict[str, Any]) -> None:
    assert wrong(source("ct"), [], target("pacs", **fields)) == []


def test_a_listener_on_one_address_does_not_get_what_goes_to_another() -> None:
    assert wrong(source("ct", host="127.0.0.2"), [], target("pacs", host="127.0.0.1")) == []
    assert wrong(source("ct", host="127.0.0.2"), [], target("pacs", host="127.0.0.2"))


def test_loops_over_several_sources_are_refused_and_chains_are_not() -> None:
    ct, mr, xa = source("ct", targets=["to-mr"]), source("mr", targets=["to-xa"]), source("xa", targets=["to-ct"])
    ways = [target(f"to-{one.name}", aet_target=one.aet) for one in (ct, mr, xa)]
    for first, others in ((ct, [mr, xa]), (mr, [ct, xa]), (xa, [ct, mr])):
        (words,) = wrong(first, others, *ways)
        assert "from which studies come back to this one" in words
    assert wrong(ct, [mr], *ways) == []  # nobody listens at the end
    assert wrong(ct, [mr, source("xa", targets=["pacs"])], *ways, target("pacs", host="192.0.2.254")) == []
    into = source("us", targets=["to-ct"])  # it leads into a circle, and is not of it
    assert wrong(into, [ct, mr, xa], *ways) == []
