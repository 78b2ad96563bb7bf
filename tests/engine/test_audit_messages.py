"""The audit trail as DICOM audit messages, formed as PS3.15 A.5.1 has it, at a real syslog server; and its commands."""

from __future__ import annotations

import base64
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest
from typer.testing import CliRunner

from talaria.audit.forward import SETTING, Forwarder, forwarding
from talaria.audit.messages import FORMS, message
from talaria.audit.syslog import SyslogTarget, formatted
from talaria.cli import app
from tests.servers.rsyslog import LINE, Rsyslog, rsyslog
from transfer.audit import AuditResult, Event, Trail, entries, record
from transfer.home import Home

WAIT_S = 60.0  # for a server on a busy machine


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return Home.current()


def waited(holds: Callable[[], Any]) -> None:
    end = time.monotonic() + WAIT_S
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    assert holds()


# ---- the schema of PS3.15 A.5.1, as far as it has what we write

CODED = {"csd-code": True, "codeSystemName": True, "displayName": False, "originalText": True}
# By element: its attributes (True: must be there), and its elements in their order with how often each may come.
SCHEMA: dict[str, tuple[dict[str, bool], list[tuple[str, int, int]]]] = {
    "AuditMessage": (
        {},
        [
            ("EventIdentification", 1, 1),
            ("ActiveParticipant", 1, 99),
            ("AuditSourceIdentification", 1, 1),
            ("ParticipantObjectIdentification", 0, 99),
        ],
    ),
    "EventIdentification": (
        {"EventActionCode": False, "EventDateTime": True, "EventOutcomeIndicator": True},
        [("EventID", 1, 1), ("EventTypeCode", 0, 99), ("EventOutcomeDescription", 0, 1)],
    ),
    "ActiveParticipant": (
        {
            "UserID": True,
            "AlternativeUserID": False,
            "UserName": False,
            "UserIsRequestor": True,
            "NetworkAccessPointID": False,
            "NetworkAccessPointTypeCode": False,
        },
        [("RoleIDCode", 0, 99)],
    ),
    "AuditSourceIdentification": (
        {"AuditEnterpriseSiteID": False, "AuditSourceID": True},
        [("AuditSourceTypeCode", 0, 99)],
    ),
    "AuditSourceTypeCode": (dict.fromkeys(CODED, False), []),
    "ParticipantObjectIdentification": (
        {
            "ParticipantObjectID": True,
            "ParticipantObjectTypeCode": False,
            "ParticipantObjectTypeCodeRole": False,
            "ParticipantObjectDataLifeCycle": False,
            "ParticipantObjectSensitivity": False,
        },
        [
            ("ParticipantObjectIDTypeCode", 1, 1),
            ("ParticipantObjectName", 0, 1),
            ("ParticipantObjectQuery", 0, 1),
            ("ParticipantObjectDetail", 0, 99),
            ("ParticipantObjectDescription", 0, 99),
        ],
    ),
    "ParticipantObjectDetail": ({"type": True, "value": True}, []),
    "ParticipantObjectDescription": ({}, [("SOPClass", 0, 99), ("ParticipantObjectContainsStudy", 0, 1)]),
    "SOPClass": ({"UID": False, "NumberOfInstances": True}, []),
    "ParticipantObjectContainsStudy": ({}, [("StudyIDs", 0, 99)]),
    "StudyIDs": ({"UID": True}, []),
    **dict.fromkeys(("EventOutcomeDescription", "ParticipantObjectName", "ParticipantObjectQuery"), ({}, [])),
    **dict.fromkeys(("EventID", "EventTypeCode", "RoleIDCode", "ParticipantObjectIDTypeCode"), (CODED, [])),
}
VALUES = {
    "EventActionCode": set("CRUDE"),
    "EventOutcomeIndicator": {"0", "4", "8", "12"},
    "UserIsRequestor": {"true", "false"},
    "NetworkAccessPointTypeCode": set("12345"),
    "ParticipantObjectTypeCode": set("1234"),
    "ParticipantObjectTypeCodeRole": {str(n) for n in range(1, 27)},
}


def assert_valid(element: Xml.Element) -> None:
    attributes, parts = SCHEMA[element.tag]
    assert set(element.attrib) <= set(attributes), element.tag
    assert {name for name, needed in attributes.items() if needed} <= set(element.attrib), element.tag
    for name, value in element.attrib.items():
        assert value, f"{element.tag} {name} is empty"
        assert value in VALUES.get(name, {value}), f"{name}={value}"
    names, order = [part.tag for part in element], [name for name, _, _ in parts]
    assert [order.index(name) for name in names] == sorted(order.index(name) for name in names), names
    for name, least, most in parts:
        assert least <= names.count(name) <= most, name
    if element.tag == "ParticipantObjectIdentification":
        assert names.count("ParticipantObjectName") + names.count("ParticipantObjectQuery") == 1
    for part in element:
        assert_valid(part)


DETAILS: dict[str, Any] = {
    "target": "pacs",
    "node": "10.0.0.9",
    "run": "1f2e",
    "dispatch": "0123456789",
    "items": 3,
    "studies": ["1.2.3", "1.2.4"],
    "sop_classes": {"1.2.840.10008.5.1.4.1.1.2": 3},
    "patients": ["a1b2c3d4"],
    "reason": 'because <of> & "that"',
    "fields": ["host", "port"],
    "keys": ["PatientID"],
    "outcomes": {"delivered": 3},
}


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("details", [DETAILS, {}])
def test_every_message_is_as_the_schema_has_it(home: Home, event: Event, details: dict[str, Any]) -> None:
    record(event, "anna", AuditResult.MINOR, address="10.0.0.7", **details)
    (entry,) = entries(Trail(home))
    text = message(entry, "host.example.org")
    if event not in FORMS:
        assert text is None
        return
    assert text is not None
    root = Xml.fromstring(text)
    assert_valid(root)
    assert root.find("EventIdentification").attrib["EventOutcomeIndicator"] == "4"  # type: ignore[union-attr]
    assert "anna" in {one.attrib["UserID"] for one in root.findall("ActiveParticipant")}


def test_an_instance_transfer_says_who_sent_what_to_whom(home: Home) -> None:
    record(Event.DELIVERY, "anna", **DETAILS)
    (entry,) = entries(Trail(home))
    root = Xml.fromstring(message(entry, "here") or "")
    assert root.find("EventIdentification/EventID").attrib["csd-code"] == "110104"  # type: ignore[union-attr]
    roles = {
        one.find("RoleIDCode").attrib["csd-code"]: one.attrib  # type: ignore[union-attr]
        for one in root.findall("ActiveParticipant")
        if one.find("RoleIDCode") is not None
    }
    assert roles["110152"]["UserID"] == "pacs"
    assert roles["110152"]["NetworkAccessPointID"] == "10.0.0.9"
    assert roles["110153"]["UserIsRequestor"] == "false"
    studies = [
        one.attrib["ParticipantObjectID"]
        for one in root.findall("ParticipantObjectIdentification")
        if one.find("ParticipantObjectIDTypeCode").attrib["csd-code"] == "110180"  # type: ignore[union-attr]
    ]
    assert studies == ["1.2.3", "1.2.4"]
    assert root.find(".//SOPClass").attrib["NumberOfInstances"] == "3"  # type: ignore[union-attr]
    details = {
        one.attrib["type"]: base64.b64decode(one.attrib["value"]) for one in root.iter("ParticipantObjectDetail")
    }
    assert details["items"] == b"3"


def test_what_no_xml_may_hold_ends_no_message() -> None:
    entry = {"event": "login", "time": "2026-11-28T12:00:00Z", "result": "serious", "who": "an\x00na\x1b \ufffe <é>"}
    (who, *_) = Xml.fromstring(message(entry, "host") or "").iter("ActiveParticipant")
    assert who.attrib["UserID"] == "an\ufffdna\ufffd \ufffd <é>"


def test_a_frame() -> None:
    framed = formatted("<x>é</x>", "2026-11-28T12:00:00.000+00:00", "a host", 7)
    length, _, rest = framed.partition(b" ")
    assert int(length) == len(rest)
    assert rest == b"<85>1 2026-11-28T12:00:00.000+00:00 ahost talaria 7 DICOM+RFC3881 - \xef\xbb\xbf<x>\xc3\xa9</x>"


@pytest.mark.parametrize(
    "address",
    ["", "user@host", "host/path", "host:port", "a..b", f"{'a' * 64}.org", "tls://host", "::1", "host:0", "a b", "h?x"],
)
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ValueError):
        SyslogTarget.of(address)


def test_what_was_sent_is_noted_for_good_before_it_counts(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut the note may be empty else, and the whole trail goes to the server again."""
    flushed, fsync, replace = list[str](), os.fsync, os.replace

    def flush(fd: int) -> None:
        fsync(fd)
        flushed.append(os.readlink(f"/proc/self/fd/{fd}"))

    def put(old: Any, new: Any) -> None:
        assert str(old) in flushed and Path(old).read_text() == "4711"
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", put)
    Path(Trail(home).folder).mkdir(parents=True)
    forwarder = Forwarder(home, SyslogTarget.of("localhost"))
    forwarder._note(4711)
    assert forwarder._position() == 4711 and flushed


# ---- at a real server


@pytest.fixture
def server(tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rsyslog]:
    with rsyslog(tmp_path / "rsyslog") as running:
        monkeypatch.setenv(SETTING, f"localhost:{running.port}")
        monkeypatch.setenv(f"{SETTING}_CA", str(running.authority.ca))
        monkeypatch.setattr("talaria.audit.forward.LOOK_S", 0.05)
        monkeypatch.setattr("talaria.audit.forward.MAX_WAIT_S", 0.2)
        yield running


def counts(server: Rsyslog) -> list[str]:
    """Return which targets the messages that arrived are about, in order."""
    found = []
    for line in server.lines:
        match = LINE.fullmatch(line)
        assert match, line
        assert (match["pri"], match["app"], match["id"]) == ("85", "talaria", "DICOM+RFC3881")
        root = Xml.fromstring(match["message"])
        assert_valid(root)
        found.append(root.find("ParticipantObjectIdentification").attrib["ParticipantObjectID"])  # type: ignore[union-attr]
    return found


def test_messages_arrive_and_none_is_lost_while_the_server_is_away(home: Home, server: Rsyslog) -> None:
    with forwarding(home):
        for n in range(3):
            record(Event.TARGET_CHANGED, "anna", target=f"t{n}", fields=["host"])
        waited(lambda: counts(server) == ["t0", "t1", "t2"])
        server.stop()
        begun = time.monotonic()
        for n in range(3, 6):
            assert record(Event.TARGET_CHANGED, "anna", target=f"t{n}")
        assert time.monotonic() - begun < 10, "nobody waits for the server"
        server.start()
        waited(lambda: len(counts(server)) >= 6)
    # What was on its way when the server went may come twice, in order.
    assert list(dict.fromkeys(counts(server))) == [f"t{n}" for n in range(6)]


def test_what_was_recorded_before_is_sent_by_the_next_one(home: Home, server: Rsyslog) -> None:
    record(Event.TARGET_REMOVED, "anna", target="t0")
    with forwarding(home):
        waited(lambda: counts(server) == ["t0"])
        waited(lambda: Path(Trail(home).folder, "forwarded").exists())
    record(Event.TARGET_REMOVED, "anna", target="t1")
    with forwarding(home), forwarding(home):  # the second waits for the first to end
        waited(lambda: counts(server) == ["t0", "t1"])


def test_a_trail_that_is_begun_anew_is_sent_from_its_beginning(home: Home, server: Rsyslog) -> None:
    for name in ("t0", "t1"):
        record(Event.TARGET_REMOVED, "anna", target=name)
    with forwarding(home):
        waited(lambda: counts(server) == ["t0", "t1"])
        trail = Trail(home)
        waited(lambda: Path(trail.folder, "forwarded").read_text() == str(Path(trail.path).stat().st_size))
        Path(trail.path).rename(home.root / "put away")
        record(Event.TARGET_REMOVED, "anna", target="t2")
        waited(lambda: counts(server) == ["t0", "t1", "t2"])


def test_a_trail_that_is_begun_anew_while_the_server_is_away_is_sent_from_its_beginning(
    home: Home, server: Rsyslog
) -> None:
    """Though it is longer than the one before by the time the server is back."""
    record(Event.TARGET_REMOVED, "anna", target="t0")
    with forwarding(home):
        waited(lambda: counts(server) == ["t0"])
        waited(lambda: Path(Trail(home).folder, "forwarded").exists())
    trail = Trail(home)
    Path(trail.path).unlink()
    Path(trail.folder, "forwarded").write_text("900")
    record(Event.TARGET_REMOVED, "anna", target="t1")
    away = Forwarder(home, SyslogTarget("localhost", 1))
    with pytest.raises(OSError):
        away._step()
    for name in ("t2", "t3", "t4"):
        record(Event.TARGET_REMOVED, "anna", target=name)
    assert Path(trail.path).stat().st_size > 900
    with forwarding(home):
        waited(lambda: counts(server) == ["t0", "t1", "t2", "t3", "t4"])


def test_a_server_that_is_not_trusted_gets_nothing(
    tmp_path: Path, home: Home, server: Rsyslog, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.servers.certificates import Authority

    record(Event.TARGET_REMOVED, "anna", target="t0")
    target = SyslogTarget("localhost", server.port, str(Authority(tmp_path / "other", "Other").ca))
    forwarder = Forwarder(home, target)
    forwarder.start()
    waited(lambda: "certificate" in caplog.text)
    forwarder.stop()
    assert not server.lines


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (SyslogTarget("a..b"), "a..b:6514: "),
        (SyslogTarget("localhost", 1, ca="/no/ca.pem"), "localhost:1: /no/ca.pem can't be used: No such file"),
        (SyslogTarget("localhost", 1, cert="/no/cert.pem"), "/no/cert.pem can't be used: No such file"),
    ],
)
def test_what_can_t_be_reached_as_it_is_set_ends_no_forwarding(
    home: Home, server: Rsyslog, caplog: pytest.LogCaptureFixture, target: SyslogTarget, words: str
) -> None:
    record(Event.TARGET_REMOVED, "anna", target="t0")
    forwarder = Forwarder(home, target)
    forwarder.start()
    waited(lambda: words in caplog.text)
    forwarder.target = SyslogTarget("localhost", server.port, str(server.authority.ca))
    waited(lambda: counts(server) == ["t0"])
    forwarder.stop()
    assert "Traceback" not in caplog.text


def test_a_place_that_can_t_be_written_to_and_a_line_that_is_none_end_no_forwarding(
    home: Home, server: Rsyslog, caplog: pytest.LogCaptureFixture
) -> None:
    record(Event.TARGET_REMOVED, "anna", target="t0")
    trail = Trail(home)
    with open(trail.path, "ab") as file:
        file.write(b"[]\nnull\n")
    lock = Path(trail.folder, "forwarding.lock")
    lock.mkdir()
    with forwarding(home):
        waited(lambda: "they can't be sent on: Is a directory" in caplog.text)
        lock.rmdir()
        waited(lambda: counts(server) == ["t0"])
        record(Event.TARGET_REMOVED, "anna", target="t1")
        waited(lambda: counts(server) == ["t0", "t1"])


def test_with_a_certificate_of_ours(tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("talaria.audit.forward.LOOK_S", 0.05)
    with rsyslog(tmp_path / "strict", wants_certificate=True) as server:
        ours = server.authority.leaf("talaria")
        record(Event.TARGET_REMOVED, "anna", target="t0")
        target = SyslogTarget("localhost", server.port, str(server.authority.ca), str(ours.cert), str(ours.key))
        forwarder = Forwarder(home, target)
        forwarder.start()
        waited(lambda: counts(server) == ["t0"])
        forwarder.stop()


def test_a_server_that_takes_nothing_holds_nobody_up(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv(SETTING, f"127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("talaria.audit.syslog.TIMEOUT_S", 0.2)
        with forwarding(home):
            begun = time.monotonic()
            for n in range(20):
                assert record(Event.TARGET_REMOVED, "anna", target=f"t{n}")
            assert time.monotonic() - begun < 10


# ---- commands


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["audit", *arguments])
    return result.exit_code, result.output


def test_show_and_verify(home: Home) -> None:
    record(Event.LOGIN, "anna", address="10.0.0.7")
    record(Event.TARGET_CHANGED, "otto", target="pacs", fields=["host"])
    code, text = run("show")
    assert code == 0
    assert "login success anna from 10.0.0.7" in text
    code, text = run("show", "--who", "otto", "--json")
    (entry,) = json.loads(text)["entries"]
    assert (entry["event"], entry["details"]) == ("target-changed", {"target": "pacs", "fields": ["host"]})
    assert json.loads(run("show", "--last", "1", "--json")[1])["entries"] == [entry]
    assert run("show", "--event", "logout") == (0, "")
    code, text = run("verify", "--json")
    document = json.loads(text)
    assert (code, document["ok"], document["entries"], document["head"]) == (0, True, 2, entry["hash"])
    path = Path(Trail(home).path)
    path.write_bytes(path.read_bytes().replace(b"anna", b"emma"))
    code, text = run("verify")
    assert code == 1
    assert "line 1: entry 1 was altered" in text
    assert run("verify", "--head", "0" * 63 + "1")[0] == 1


def test_an_empty_trail(home: Home) -> None:
    assert run("show") == (0, "")
    assert run("verify")[0] == 0
