"""DICOM sources as blocks, and the ports that they listen on while they are added, changed, paused and removed."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import ValidationError

from blocks import SOURCES, FolderTarget
from blocks.dicom import DicomTarget
from blocks.dicom_source import DicomSource, Route
from protocols.net.tls import certificate_shown
from talaria.engine import listening as engine
from talaria.engine.listeners import Listeners
from talaria.testing import studies
from talaria.testing.harness import attempt
from talaria.testing.process import free_port, listening, until
from tests.protocols.intake import AET, lying, refusal
from tests.protocols.test_dimse_committing import Modality, ask, request
from tests.protocols.test_dimse_intake import associated, sent, stored
from tests.servers.certificates import Authority
from tests.targets.dicom import dicom_target
from tests.targets.dicom_tls import certificates, tls_target
from transfer import silent
from transfer.errors import Busy
from transfer.home import Home
from transfer.receipt import State
from transfer.spool import ReceivedUnit


def source(name: str, port: int, **fields: Any) -> DicomSource:
    return DicomSource(
        **{"port": port, "host": "127.0.0.1", "aet": name.upper(), "targets": ["pacs"], "keep_free": 0, **fields}
    ).named(name)


@pytest.fixture
def listeners(tmp_path: Path) -> Iterator[Listeners]:
    home = Home(tmp_path / "home")
    home.root.mkdir()
    made = Listeners(home)
    try:
        yield made
    finally:
        made.close(0)


def sends(port: int, called: str) -> bool:
    """Store one instance; return False if nobody listens, or nobody has the AE title."""
    if not listening(port):
        return False
    assoc = associated(port, called=called)
    if not assoc.is_established:
        return False
    assert stored(assoc, studies.dataset()) == 0
    assoc.release()
    return True


# ---- the block


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"targets": []}, "must name one target at least"),
        ({"routes": [{"calling": "CT*", "targets": []}]}, "a route to nobody"),
        ({"routes": [{"calling": "CT*"}]}, "targets"),
        ({"routes": [{"callin": "CT*", "targets": ["a"]}]}, "callin"),
        ({"aet": "A" * 17}, "must have 1 to 16 characters"),
        ({"peers": [{"aet": "A\\B"}]}, "not a pattern of AE titles"),
        ({"peers": [{"aet": "A" * 17}]}, "at most 16"),
        ({"peers": [{"host": "10.0.0.0/99"}]}, "is not a network"),
        ({"peers": [{"host": "a b"}]}, "is not a host name"),
        ({"peers": [{"host": "10.1.2.3:104"}]}, "is not a host name or an IP address"),
        ({"peers": [{"host": "10.1.2.300"}]}, "is not a host name or an IP address"),
        ({"peers": [{"host": "10.1.2.3-10.1.2.9"}]}, "is not a host name or an IP address"),
        ({"host": "a b"}, "is not a host name"),
        ({"port": 70_000}, "port"),
        ({"settle_s": -1}, "settle_s"),
        ({"tls_key": "k"}, "tls_key is set without tls_cert"),
        ({"ca_cert": "k"}, "ca_cert is set without tls_cert"),
    ],
)
def test_what_a_source_may_not_be(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        source("ct", fields.pop("port", 104), **fields)


def test_a_source_reaches_what_its_routes_name() -> None:
    assert SOURCES["dicom"] is DicomSource
    one = source("ct", 104, targets=["a"], routes=[{"targets": ["b", "a"]}, {"calling": "X", "targets": ["c"]}])
    assert one.reaches == ("a", "b", "c")


@pytest.mark.parametrize(
    ("route", "fits"),
    [
        ({}, True),
        ({"modality": "CT"}, True),
        ({"modality": "MR, ct"}, True),
        ({"modality": "MR"}, False),
        ({"study_description": "*THORAX*"}, True),
        ({"study_description": "thorax"}, False),
        ({"series_description": "lung*", "modality": "CT"}, True),
        ({"series_description": "lung*", "modality": "MR"}, False),
    ],
)
def test_what_a_route_takes(route: dict[str, Any], fits: bool) -> None:
    assert Route(targets=["a"], **route).fits("CT", "CT Thorax nativ", "Lung 1.0") is fits


@pytest.mark.parametrize("pattern", ["*SCHÄDEL*", unicodedata.normalize("NFD", "*schädel*")])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_description_fits_however_its_letters_are_composed(pattern: str, form: Any) -> None:
    said = unicodedata.normalize(form, "CT Schädel nativ")
    assert Route(targets=["a"], study_description=pattern).fits("CT", said, "")
    assert Route(targets=["a"], series_description=pattern).fits("CT", "", said)


@pytest.mark.parametrize(
    ("host", "good"),
    [("192.168.010.020", False), ("10.1.2.010", False), ("192.168.001.005", True), ("10.1.2.0", True),
     ("10.0.0.1", True), ("100.200.10.20", True), ("ct-010.example.org", True), ("ct.7", True), ("127.1", True),
     ("::1", True), ("[fe80::1%eth0]", True), ("::ffff:10.1.2.3", True)],
)  # fmt: skip
def test_an_address_that_means_another_one_is_refused(host: str, good: bool) -> None:
    for made in (lambda: source("ct", 104, peers=[{"host": host}]), lambda: DicomTarget(host=host, aet_target="A")):
        if good:
            made()
        else:
            with pytest.raises(ValidationError, match="another address than it looks like"):
                made()


@pytest.mark.parametrize(
    ("host", "seen"),
    [("::ffff:10.1.2.3", "10.1.2.3"), ("[::FFFF:a01:203]", "10.1.2.3"), ("::ffff:10.1.0.0/112", "10.1.0.0/16"),
     ("fe80::1%eth0", "fe80::1%eth0"), ("2001:db8::7", "2001:db8::7"), ("2001:db8::/32", "2001:db8::/32"),
     ("::/0", "::/0"), ("10.1.2.3", "10.1.2.3"), ("", "")],
)  # fmt: skip
def test_a_peer_is_named_as_it_is_seen(host: str, seen: str) -> None:
    (peer,) = source("ct", 104, peers=[{"host": host}]).peers
    assert peer.host == seen


def test_routes_by_titles() -> None:
    route = Route(targets=["a"], calling="CT*", called="ROUTER")
    assert route.fits_titles("CT1", "ROUTER")
    assert not route.fits_titles("CT1", "OTHER") and not route.fits_titles("MR1", "ROUTER")


# ---- the ports


def test_sources_come_change_and_go(listeners: Listeners, tmp_path: Path) -> None:
    port, other = free_port(), free_port()
    received = tmp_path / "home" / "received"
    listeners.apply([])
    assert not listening(port)
    listeners.apply([source("ct", port), source("mr", port)])  # two on one port
    assert sends(port, "CT") and sends(port, "MR") and not sends(port, "XA")
    assert len(lying(received / "ct")) == len(lying(received / "mr")) == 1
    listeners.apply([source("ct", other), source("mr", port, aet="MR2")])
    assert sends(other, "CT") and sends(port, "MR2") and not sends(port, "MR") and not sends(port, "CT")
    assert len(lying(received / "ct")) == len(lying(received / "mr")) == 2
    listeners.apply([source("ct", other, enabled=False)])
    assert not listening(port)
    assert refusal(other, called="CT") == (2, 3, 1)
    assert listeners.status()["ct"]["state"] == "paused"
    assert listeners.status()["ct"]["totals"]["refused"] == {"paused": 1}
    listeners.apply([])
    assert not listening(other) and listeners.status() == {}


def test_one_port_at_two_addresses_is_counted_together(listeners: Listeners) -> None:
    port = free_port()
    listeners.apply([source("ct", port), source("mr", port, host="127.0.0.2"), source("xa", port, host="localhost")])
    assert set(listeners.troubles) == {"xa"} and "give both the same host" in listeners.troubles["xa"]
    for host, aet in (("127.0.0.1", "CT"), ("127.0.0.2", "MR")):
        assert sent("echoscu", "-aec", aet, host, str(port)).returncode == 0
    assert [(one.port, one.accepted) for one in listeners.counts()] == [(port, 2)]


def test_associations_outlive_what_is_changed_and_removed(listeners: Listeners, tmp_path: Path) -> None:
    port, other = free_port(), free_port()
    listeners.apply([source("ct", port)])
    open_ = [associated(port, called="CT") for _ in range(2)]
    listeners.apply([source("ct", other)])
    assert not listening(port)
    assert stored(open_[0], studies.dataset()) == 0
    listeners.apply([])
    assert stored(open_[1], studies.dataset()) == 0xA700  # nobody would dispatch it
    open_[0].release()
    assert len(lying(tmp_path / "home" / "received" / "ct")) == 1
    listeners.apply([source("ct", port)])  # the same source again: what it had received is its own
    until(lambda: listeners.status()["ct"]["receiving"] == 1)
    assert sends(port, "CT")


def test_a_port_that_is_taken_is_tried_again(listeners: Listeners) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        listeners.apply([source("ct", port)])
        assert listeners.troubles["ct"] == f"can't listen on 127.0.0.1, port {port}: Address already in use"
        assert listeners.status()["ct"]["state"] == "failed"
    listeners.apply([source("ct", port)])
    assert listeners.troubles == {} and sends(port, "CT")


def test_who_listens_already_keeps_its_title(listeners: Listeners) -> None:
    port = free_port()
    listeners.apply([source("ct", port)])
    listeners.apply([source("a", port, aet="CT"), source("ct", port)])
    assert set(listeners.troubles) == {"a"} and sends(port, "CT")
    assert listeners.status()["ct"]["totals"]["instances"] == 1


def test_reports_of_commitment_go_as_their_own_source_receives(listeners: Listeners) -> None:
    """Another one of the same AE title listens over TLS."""
    made, modality, port, listens = certificates(), Modality(), free_port(), free_port()
    tls = {"tls_cert": str(made.server.cert), "tls_key": str(made.server.key), "ca_cert": str(made.ca)}
    plain = source("b", port, aet=AET, peers=[{"aet": "CT*", "port": listens}])
    listeners.apply([source("a", free_port(), aet=AET, **tls), plain])
    with modality.listening(listens):
        assoc = modality.associate(port)
        ds = studies.dataset()
        assert stored(assoc, ds) == 0 and ask(assoc, request(str(ds.SOPInstanceUID))) == 0
        assoc.release()
        assert modality.heard.wait(60) and modality.events == [1]


def test_tls_comes_and_goes_with_the_settings(listeners: Listeners, tmp_path: Path) -> None:
    made, port = certificates(), free_port()
    tls = {"tls_cert": str(made.server.cert), "tls_key": str(made.server.key), "ca_cert": str(made.ca)}
    studies.ct(tmp_path / "study", 1)
    listeners.apply([source("ct", port)])
    listeners.apply([source("ct", port, **tls)])
    assert attempt(tls_target(port, aet_target="CT"), tmp_path / "study").require().state is State.DELIVERED
    assert sent("echoscu", "-aec", "CT", "127.0.0.1", str(port)).returncode != 0
    listeners.apply([source("ct", port, **(tls | {"tls_cert": "/nowhere.pem"}))])
    assert "/nowhere.pem" in listeners.troubles["ct"] and not listening(port)
    listeners.apply([source("ct", port)])
    assert attempt(dicom_target(port, aet_target="CT"), tmp_path / "study").require().state is State.DELIVERED


def test_a_renewed_certificate_is_shown_when_it_is_whole(
    listeners: Listeners, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, port = Authority(tmp_path / "ca"), free_port()
    old, new = authority.leaf("old"), authority.leaf("new")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    for one, path in ((old.cert, cert), (old.key, key)):
        path.write_bytes(one.read_bytes())
    tls = {"tls_cert": str(cert), "tls_key": str(key), "ca_cert": str(authority.ca)}

    def shown() -> str:
        found = certificate_shown(socket.create_connection(("127.0.0.1", port)), "127.0.0.1", 30)
        return str(found["subject"])

    listeners.apply([source("ct", port, **tls), source("mr", port, **tls)])
    assert listeners.renew() == {} and "old" in shown()
    over, stat = threading.Event(), os.stat  # a share whose server is away

    def hangs(path: Any, **more: Any) -> os.stat_result:
        if str(path) == str(cert):
            over.wait(120)
        return stat(path, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", hangs)
        patched.setattr(silent, "LOOK_S", 0.1)
        assert listeners.renew() == {} and "old" in shown()
        over.set()
    until(lambda: not silent._is_silent(str(cert)))
    (tmp_path / "part").write_bytes(new.cert.read_bytes())
    (tmp_path / "part").rename(cert)  # as certbot does; the key follows
    for _ in range(2):
        assert listeners.renew() == dict.fromkeys(("ct", "mr"), "tls_key does not belong to tls_cert")
        assert "old" in shown()
    key.write_bytes(new.key.read_bytes())
    assert listeners.renew() == {} and "new" in shown()
    listeners.apply([source("ct", port, **tls)])
    assert "new" in shown() and listeners.renew() == {}


def test_a_look_for_renewed_files_logs_no_key_where_it_is_slow(
    listeners: Listeners, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    leaf, port, stat = Authority(tmp_path / "ca").leaf("one"), free_port(), os.stat
    key, asked = leaf.key.read_text(), list[str]()
    listeners.apply([source("ct", port, tls_cert=str(leaf.cert), tls_key=key)])

    def slow(path: Any, **more: Any) -> os.stat_result:
        asked.append(str(path))
        if str(path) == key:
            time.sleep(0.5)
        return stat(path, **more)

    monkeypatch.setattr(os, "stat", slow)
    monkeypatch.setattr(silent, "LOOK_S", 0.1)
    assert listeners.renew() == {}
    assert str(leaf.cert) in asked and key not in asked and key.splitlines()[1][:20] not in caplog.text


def test_that_a_renewed_certificate_stays_unfit_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [{"ct": "no"}, {}, {"ct": "no"}, {"ct": "no"}, {"ct": "no"}, {}]
    said = list[str]()
    monkeypatch.setattr(engine, "RENEW_S", 0.0)
    watch = engine._Watch(cast("Any", SimpleNamespace(renew=lambda: found.pop(0))), Home(tmp_path), cast("Any", None))
    monkeypatch.setattr(watch, "_stuck", lambda name, words: said.append(words))
    while found:
        asyncio.run(watch._renew())
    assert said == ["its renewed certificate can't be used, the former one is shown: no"]


def test_what_is_complete_is_named_by_its_source(listeners: Listeners) -> None:
    port = free_port()
    listeners.apply([source("ct", port), source("mr", port)])
    assert sends(port, "CT") and listeners.settled() == {}
    listeners._receptions["ct"].terms = listeners._receptions["ct"].terms.__class__(name="ct", aet="CT", settle_s=0)
    assert list(listeners.settled()) == ["ct"]


# ---- what goes wrong beside it


def test_a_full_disk_does_not_end_the_listener(listeners: Listeners, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a server that answers nonsense: who has an association keeps it, and is told what is to be told."""
    port = free_port()
    listeners.apply([source("ct", port)])
    failed: set[str] = set()
    asked = type("Asked", (), {"event": threading.Event(), "times": 0})()

    def full(what: str) -> None:
        failed.add(what)
        if failed == {"settled", "status", "server"}:
            asked.event.set()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Client:
        def __getattr__(self, name: str) -> None:
            full("server")

    @asynccontextmanager
    async def client() -> Any:
        yield Client()

    monkeypatch.setattr("prefect.get_client", client)
    for name in ("settled", "status"):
        monkeypatch.setattr(listeners, name, lambda what=name: full(what))
    assoc = associated(port, called="CT")
    asyncio.run(engine._Watch(listeners, listeners._home, asked).run())
    assert stored(assoc, studies.dataset()) == 0
    assoc.release()


def watching(listeners: Listeners) -> engine._Watch:
    return engine._Watch(listeners, listeners._home, type("Asked", (), {"event": threading.Event(), "times": 0})())


def test_associations_ask_for_the_targets_as_they_are_now(
    listeners: Listeners, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From threads of their own; that nobody can name them now says nothing of what they have confirmed."""
    watch, saved = watching(listeners), [FolderTarget(folder="/data").named("archive"), object()]

    async def every(client: Any) -> list[Any]:
        if not saved:
            raise TimeoutError
        return saved

    monkeypatch.setattr("tasks.targets.TARGETS.all", every)
    with pytest.raises(Busy, match="has not been asked"):  # it has not begun
        watch.targets()

    async def ask() -> None:
        watch._client, watch._loop = cast("Any", object()), asyncio.get_running_loop()
        found = await asyncio.to_thread(watch.targets)
        assert set(found) == {"archive"}
        saved.clear()
        with pytest.raises(Busy, match="does not say which targets there are"):
            await asyncio.to_thread(watch.targets)

    asyncio.run(ask())


def test_what_was_received_for_a_source_that_is_gone_is_said_once(
    listeners: Listeners, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, said = watching(listeners), list[str]()
    monkeypatch.setattr(watch, "_stuck", lambda name, words: said.append(f"{name}: {words}"))
    folder = listeners._home.root / "received"
    for name in ("there", "gone", "empty", ".reports"):
        (folder / name / ReceivedUnit("CT1", "CT", "::1", "1.2").name).mkdir(parents=True)
        if name != "empty":
            studies.dicom(folder / name / ReceivedUnit("CT1", "CT", "::1", "1.2").name / "1.dcm")
    for _ in range(2):
        watch._say_what_lies({"there"}, {})
    [words] = said
    assert words.startswith(
        f"gone: 1 units that it received lie in {folder / 'gone'}, and there is no such DICOM source"
    )


def test_a_source_that_is_moved_to_another_host_leaves_this_one(
    listeners: Listeners, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever applies it there changes nothing else of it: two hosts went on listening, and one dispatched."""
    monkeypatch.setenv("TALARIA_LEDGER", "postgresql://database/talaria")
    monkeypatch.setenv("TALARIA_HOST_NAME", "here")
    watch, said, port = watching(listeners), list[str](), free_port()
    one, hosts = source("ct", port), {"ct": "here"}
    kind = type("Kind", (), {"slug": "dicom-source"})
    saved = type("Document", (), {"id": 1, "name": "ct", "data": {}, "block_type": kind})

    async def documents(client: Any, **asked: Any) -> list[Any]:
        return [saved]

    async def hosts_of(client: Any) -> dict[str, str]:
        return hosts

    monkeypatch.setattr("tasks.sources.saved.KEPT.documents", documents)
    monkeypatch.setattr("tasks.sources.saved.KEPT.made_of", lambda document: one)
    monkeypatch.setattr("tasks.sources.belonging.hosts_of", hosts_of)
    monkeypatch.setattr(watch, "_stuck", lambda name, words: said.append(f"{name}: {words}"))

    def look() -> None:
        asyncio.run(watch._look(cast("Any", object())))

    look()
    assert sends(port, "CT") and not said
    for host, is_here in (("there", False), ("here", True), ("there", False)):
        hosts["ct"] = host
        look()
        assert listening(port) is is_here
    assert len(said) == 2 and said[0] == said[1]
    assert said[0].startswith(f"ct: 1 units that it received lie in {listeners._home.root / 'received' / 'ct'}")
    assert "the source was moved to there: apply it on here" in said[0]
    look()
    assert len(said) == 2


@pytest.mark.parametrize(("first", "most", "then"), [(64, 500, 500), (64, 64, 64)])
def test_as_many_files_are_opened_as_the_system_lets_us(first: int, most: int, then: int) -> None:
    """With 1024, as most systems give at first, a source that takes 1000 associations took half of them."""
    script = (
        "import resource\nfrom talaria.engine.listening import allow_many_files\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({first}, {most}))\nallow_many_files()\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(then), str(most)]
