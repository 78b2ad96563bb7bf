"""DICOM audit messages (PS3.15 section A.5) made of entries of the audit trail.

They hold no more than the trail does: patients by a pseudonym, queries without the values of their keys.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from xml.etree import ElementTree as Xml

from transfer.audit import Event


class AuditCode(NamedTuple):
    """A coded value; of the DICOM Controlled Terminology unless it says otherwise (PS3.16 annex D)."""

    value: str
    meaning: str
    system: str = "DCM"


class AuditForm(NamedTuple):
    """What kind of message an event becomes: its event, its type, and the action (PS3.15 tables A.5.3.x-1)."""

    event: AuditCode
    action: str
    kind: AuditCode | None = None


APPLICATION = AuditCode("110100", "Application Activity")
AUTHENTICATION = AuditCode("110114", "User Authentication")
ALERT = AuditCode("110113", "Security Alert")
FORMS: dict[str, AuditForm] = {
    Event.STARTED: AuditForm(APPLICATION, "E", AuditCode("110120", "Application Start")),
    Event.STOPPED: AuditForm(APPLICATION, "E", AuditCode("110121", "Application Stop")),
    Event.LOGIN: AuditForm(AUTHENTICATION, "E", AuditCode("110122", "Login")),
    Event.LOGOUT: AuditForm(AUTHENTICATION, "E", AuditCode("110123", "Logout")),
    Event.REFUSED: AuditForm(ALERT, "E", AuditCode("110132", "Use of Restricted Function")),
    Event.USER_CHANGED: AuditForm(ALERT, "E", AuditCode("110137", "User Security Attributes Changed")),
    Event.TARGET_CHANGED: AuditForm(ALERT, "E", AuditCode("110128", "Network Configuration")),
    Event.TARGET_REMOVED: AuditForm(ALERT, "E", AuditCode("110128", "Network Configuration")),
    Event.SOURCE_CHANGED: AuditForm(ALERT, "E", AuditCode("110128", "Network Configuration")),
    Event.SOURCE_REMOVED: AuditForm(ALERT, "E", AuditCode("110128", "Network Configuration")),
    Event.RULE_CHANGED: AuditForm(ALERT, "E", AuditCode("110136", "Security Roles Changed")),
    Event.LOST: AuditForm(ALERT, "E", AuditCode("110133", "Audit Recording Stopped")),
    Event.DELIVERY_BEGUN: AuditForm(AuditCode("110102", "Begin Transferring DICOM Instances"), "E"),
    Event.DELIVERY: AuditForm(AuditCode("110104", "DICOM Instances Transferred"), "C"),
    Event.RETRIEVAL: AuditForm(AuditCode("110104", "DICOM Instances Transferred"), "C"),
    Event.QUERY: AuditForm(AuditCode("110112", "Query"), "E"),
}
OUTCOMES = {"success": "0", "minor": "4", "serious": "8"}
SOURCE, DESTINATION = AuditCode("110153", "Source Role ID"), AuditCode("110152", "Destination Role ID")
RUNS, RUNNER = AuditCode("110150", "Application"), AuditCode("110151", "Application Launcher")
STUDY, SOP_CLASS, NODE = (
    AuditCode("110180", "Study Instance UID"),
    AuditCode("110181", "SOP Class UID"),
    AuditCode("110182", "Node ID"),
)
PATIENT, USER_ID, URI = (AuditCode("2", "Patient Number", "RFC-3881"), AuditCode("11", "User Identifier", "RFC-3881"),
                         AuditCode("12", "URI", "RFC-3881"))  # fmt: skip
PERSON, SYSTEM = "1", "2"  # ParticipantObjectTypeCode
STUDY_ROOT = "1.2.840.10008.5.1.4.1.2.2.1"  # the SOP class that is searched, whatever the protocol
OURSELVES = "talaria"
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0 section 2.2, of a login, say


def message(entry: Mapping[str, Any], host: str) -> str | None:
    """Return an entry as an audit message; None for what PS3.15 has no message for.

    Args:
        host: name of this machine.
    """
    form = FORMS.get(entry["event"])
    if form is None or "action" in entry.get("details", {}):  # a request: nothing was asked of a peer, or transferred
        return None
    root = Xml.Element("AuditMessage")
    event = Xml.SubElement(
        root,
        "EventIdentification",
        EventActionCode=form.action,
        EventDateTime=str(entry["time"]),
        EventOutcomeIndicator=OUTCOMES.get(str(entry["result"]), "8"),
    )
    _code(event, "EventID", form.event)
    if form.kind:
        _code(event, "EventTypeCode", form.kind)
    details = entry.get("details", {})
    if details.get("reason"):
        Xml.SubElement(event, "EventOutcomeDescription").text = str(details["reason"])
    _participants(root, entry, form, details, host)
    source = Xml.SubElement(root, "AuditSourceIdentification", AuditSourceID=f"{OURSELVES}@{host}")
    Xml.SubElement(source, "AuditSourceTypeCode", {"csd-code": "4"})  # application server
    _objects(root, entry, form, details)
    return _NO_XML.sub("\ufffd", Xml.tostring(root, encoding="unicode"))


def _participants(
    root: Xml.Element, entry: Mapping[str, Any], form: AuditForm, details: Mapping[str, Any], host: str
) -> None:
    who, address = str(entry["who"]), str(entry.get("source", ""))
    peer = str(details.get("target") or details.get("source") or "")
    if form.event is APPLICATION:
        _participant(root, OURSELVES, host, requestor=False, role=RUNS)
        _participant(root, who, address, requestor=True, role=RUNNER)
    elif form.event in (AUTHENTICATION, ALERT):
        _participant(root, who, address, requestor=True)
        _participant(root, OURSELVES, host, requestor=False)
    else:  # instances or queries from one machine to another, on a user's behalf
        sends = entry["event"] in (Event.DELIVERY_BEGUN, Event.DELIVERY, Event.QUERY)
        node = str(details.get("node") or "")
        _participant(root, OURSELVES, host, requestor=False, role=SOURCE if sends else DESTINATION)
        _participant(root, peer or "unknown", node, requestor=False, role=DESTINATION if sends else SOURCE)
        _participant(root, who, address, requestor=True)


def _participant(root: Xml.Element, user: str, address: str, *, requestor: bool, role: AuditCode | None = None) -> None:
    made = Xml.SubElement(root, "ActiveParticipant", UserID=user, UserIsRequestor="true" if requestor else "false")
    if address:
        made.set("NetworkAccessPointID", address)
        made.set("NetworkAccessPointTypeCode", "2" if _is_address(address) else "1")
    if role:
        _code(made, "RoleIDCode", role)


def _is_address(text: str) -> bool:
    return ":" in text or text.replace(".", "").isdigit()


def _objects(root: Xml.Element, entry: Mapping[str, Any], form: AuditForm, details: Mapping[str, Any]) -> None:
    event = entry["event"]
    if form.event is ALERT:
        about = str(details.get("target") or details.get("user") or details.get("path") or event)
        kind = NODE if "target" in details else USER_ID if "user" in details else URI
        _object(root, about, SYSTEM, "13", kind, f"{event}: {about}", details)
        return
    if event == Event.QUERY:
        _object(root, STUDY_ROOT, SYSTEM, "3", SOP_CLASS, None, details)
        return
    if form.event in (APPLICATION, AUTHENTICATION):
        return
    studies = [str(uid) for uid in details.get("studies", [])] or ["unknown"]
    for study in studies:
        made = _object(root, study, SYSTEM, "3", STUDY, study, details if study == studies[0] else {})
        description = Xml.SubElement(made, "ParticipantObjectDescription")
        classes = details.get("sop_classes", {}) if study == studies[0] else {}
        for uid, count in classes.items() if isinstance(classes, Mapping) else ():
            Xml.SubElement(description, "SOPClass", UID=str(uid), NumberOfInstances=str(count))
        contains = Xml.SubElement(description, "ParticipantObjectContainsStudy")
        Xml.SubElement(contains, "StudyIDs", UID=study)
    for patient in details.get("patients", []) or ["unknown"]:
        _object(root, str(patient), PERSON, "1", PATIENT, str(patient), {})


SHOWN = ("run", "dispatch", "items", "delivered", "rejected", "bytes", "state", "fields", "count", "keys")


def _object(
    root: Xml.Element, name: str, kind: str, role: str, code: AuditCode, shown: str | None, details: Mapping[str, Any]
) -> Xml.Element:
    """Add an object; its elements in the order of the schema.

    Args:
        shown: its name; None for a query, whose values are not in the trail.
    """
    made = Xml.SubElement(
        root,
        "ParticipantObjectIdentification",
        ParticipantObjectID=name,
        ParticipantObjectTypeCode=kind,
        ParticipantObjectTypeCodeRole=role,
    )
    _code(made, "ParticipantObjectIDTypeCode", code)
    if shown is None:
        keys = ",".join(map(str, _list(details.get("keys", []))))
        Xml.SubElement(made, "ParticipantObjectQuery").text = base64.b64encode(keys.encode()).decode("ascii")
    else:
        Xml.SubElement(made, "ParticipantObjectName").text = shown
    for key in SHOWN:
        if key in details:
            value = base64.b64encode(",".join(map(str, _list(details[key]))).encode()).decode("ascii")
            Xml.SubElement(made, "ParticipantObjectDetail", type=key, value=value)
    return made


def _list(value: object) -> Iterable[object]:
    return value if isinstance(value, list) else [value]


def _code(parent: Xml.Element, name: str, code: AuditCode) -> None:
    Xml.SubElement(
        parent,
        name,
        {"csd-code": code.value, "codeSystemName": code.system, "originalText": code.meaning},
    )
