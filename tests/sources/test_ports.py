"""Which DICOM sources can't listen beside others, and which would receive what they have sent themselves."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any, cast

import pytest

from blocks import Target
from blocks.dicom import DicomTarget
from blocks.dicom_source import DicomSource
from blocks.dicom_tls import DicomTlsTarget
from talaria.service import Office
from talaria.service import sources as service
from tasks.sources import checks
from tasks.sources.ports import clashes, loops
from tests.targets.dicom_tls import certificates
from transfer import listening
from transfer.errors import Misconfigured
from transfer.home import Home
from transfer.ledger import Ledger


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


def wrong(here: DicomSource, others: list[DicomSource], *targets: Target, **elsewhere: str) -> list[str]:
    return list(loops(here, [here, *others], {one.name: one for one in targets}, elsewhere))


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


THERE = "192.0.2.7"  # a host that is known by its address, so that nobody has to be asked for it


@pytest.mark.parametrize(
    ("there", "to", "listens", "loop"),
    [
        (THERE, THERE, "", True),
        (THERE, f"::ffff:{THERE}", "", True),
        (THERE, THERE, THERE, True),
        (THERE, THERE, "192.0.2.8", False),  # of its addresses another one
        ("mr-host.invalid", "MR-host.invalid", "", True),  # known there, if not here
        ("mr-host.invalid", THERE, THERE, True),
        ("mr-host.invalid", THERE, "", False),  # whose that is can't be seen
        (THERE, "192.0.2.8", "", False),
        (THERE, "127.0.0.1", "", False),  # this machine
        (THERE, "name of this machine", "", False),
    ],
)
def test_a_loop_over_two_hosts_is_refused_where_it_is_seen(
    there: str, to: str, listens: str, loop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would have removed what the other had confirmed."""
    monkeypatch.setenv("TALARIA_HOST_NAME", "ct-host")
    to = name_of_this_machine() if to.startswith("name") else to
    ct, mr = source("ct", targets=["to-mr"]), source("mr", 105, host=listens, targets=["to-ct"])
    ways = target("to-mr", 105, host=to, aet_target="MR"), target("to-ct", host="CT-host", aet_target="CT")
    found = wrong(ct, [mr], *ways, mr=there)
    assert bool(found) is loop
    assert not loop or found[0].startswith(f"target to-mr is source mr on the host {there}, from which studies come")


def test_what_another_host_sends_to_itself_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALARIA_HOST_NAME", "ct-host")
    ct, mr, xa = source("ct", targets=["to-mr"]), source("mr", targets=["to-xa"]), source("xa", targets=["to-ct"])
    ways = [target("to-mr", host=THERE, aet_target="MR"), target("to-xa", aet_target="XA")]
    ways += [target("to-ct", host=name_of_this_machine(), aet_target="CT")]
    assert wrong(ct, [mr, xa], *ways, mr=THERE, xa="192.0.2.8") == []  # its 127.0.0.1 is another machine than xa's
    monkeypatch.setattr(ways[2], "host", "ct-host")
    assert wrong(ct, [mr, xa], *ways, mr=THERE, xa=THERE)
    assert wrong(ct, [mr], *ways, mr=THERE) == []


def test_listeners_of_two_hosts_may_have_one_port_and_title() -> None:
    ct, other = source("ct"), source("other", aet="CT")
    assert "is that of other" in checks.of_listener(ct, [ct, other])[0]
    assert checks.of_listener(ct, [ct, other], elsewhere={"other": "there"}) == []


def test_who_applies_or_tests_a_source_hears_of_a_loop_over_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that is applied becomes this host's, wherever it was."""
    ct, mr = source("ct", targets=["to-mr"]), source("mr", targets=["to-ct"])
    ways = [target("to-mr", host=THERE, aet_target="MR"), target("to-ct", host="ct-host", aet_target="CT")]

    async def saved(client: Any, **asked: Any) -> list[Any]:
        return [ct, mr]

    async def targets(client: Any, **asked: Any) -> list[Any]:
        return ways

    async def hosts_of(client: Any) -> dict[str, str]:
        return {"mr": THERE, "ct": "elsewhere.invalid"}

    monkeypatch.setenv("TALARIA_HOST_NAME", "ct-host")
    monkeypatch.setattr("tasks.sources.saved.KEPT.all", saved)
    monkeypatch.setattr("tasks.targets.TARGETS.all", targets)
    monkeypatch.setattr("tasks.sources.belonging.hosts_of", hosts_of)
    office = Office(cast("Any", object()), Home(tmp_path))
    assert asyncio.run(service.problems_of(office, ct)) == []  # of one host mr is this machine's, and THERE is not it
    monkeypatch.setenv("TALARIA_LEDGER", "postgresql://database/talaria")
    (words,) = asyncio.run(service.problems_of(office, ct))
    assert "target to-mr is source mr on the host 192.0.2.7" in words
    monkeypatch.setattr("talaria.service.sources.Ledger", lambda path: Ledger(tmp_path / "ledger.sqlite"))
    tested = asyncio.run(service.test_unsaved(office, ct))
    assert not tested["ok"] and words in tested["problems"]


def test_a_source_of_another_host_is_named_and_what_a_listener_lacks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source was called well that accepted nothing, and one of another host said not to listen."""
    home, ct, mr = Home(tmp_path), source("ct"), source("mr", 105)

    async def saved(client: Any, *args: Any, **asked: Any) -> list[Any]:
        return [ct, mr]

    async def load(client: Any, names: list[str], **asked: Any) -> list[Any]:
        return [one for one in (ct, mr) if one.name in names]

    async def hosts_of(client: Any) -> dict[str, str]:
        return {"mr": THERE}

    monkeypatch.setenv("TALARIA_LEDGER", "postgresql://database/talaria")
    monkeypatch.setattr("tasks.sources.saved.KEPT.all", saved)
    monkeypatch.setattr("tasks.sources.saved.KEPT.load", load)
    monkeypatch.setattr("tasks.sources.belonging.hosts_of", hosts_of)
    monkeypatch.setattr("talaria.service.sources.Ledger", lambda path: Ledger(tmp_path / "ledger.sqlite"))
    office = Office(cast("Any", object()), home)

    def said() -> list[tuple[Any, Any]]:
        return [(one["problem"], one["belongs_to"]) for one in asyncio.run(service.list_sources(office))["sources"]]

    assert said() == [("nobody listens: `talaria up` does not run, or has not begun to", None), ("", THERE)]
    listening.write_sources(home, 1, {"ct": {"error": "", "full": True}})
    assert said() == [(listening.FULL, None), ("", THERE)]
    assert listening.FULL in checks.of_listener(ct, [ct], home)
    listening.write_sources(home, 1, {"ct": {"error": "", "full": False}})
    assert said() == [("", None), ("", THERE)]
    with pytest.raises(
        Misconfigured, match=f"belongs to the host {THERE}, on which it was applied last: test it there"
    ):
        asyncio.run(service.test_source(office, "mr"))
