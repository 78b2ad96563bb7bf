"""Labels of subjects and sessions: filled from templates, made valid for XNAT, and never the same for two.

XNAT knows a session by its label, unique within the project, and not by its study. So before a label is used, XNAT is
asked what it has: a session of this study, under whatever label, is used again; a label that another study has gets
a suffix made from the study's UID, the same one each time. Likewise a subject's label gets a suffix if XNAT's subject
with that label is another patient, and if the patient's ID had to be changed to become a label: `A/1` and `A:1` would
both be `A_1`. A patient who has a subject of the plain label, from earlier releases, keeps it.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from blocks.xnat import XnatTarget
from protocols.xnat.answers import ImageSession, XnatRefused
from protocols.xnat.client import XnatClient
from transfer.layout import FIELDS, UNKNOWN
from transfer.plan import Item, Plan, header_of

MAX_LABEL_CHARS = 100  # XNAT keeps 255, but a label is a folder's name there, beside others in a path
DIGEST_CHARS = 8
LOOKED_AT = 3  # sessions of a subject that are asked whose they are

_UNFIT = re.compile(r"[^A-Za-z0-9_-]")  # what XNAT itself turns into an underscore


@dataclass(frozen=True)
class XnatStudy:
    """The items of one study, sorted by path; `pending` are those that are to be sent."""

    uid: str
    items: tuple[Item, ...] = field(repr=False)
    pending: tuple[Item, ...] = field(repr=False)

    @property
    def shown(self) -> str:
        """For messages, which never hold a label."""
        return f"study {self.uid}"


@dataclass(frozen=True)
class Name:
    """A study's labels at XNAT, and its archived session if there is one already."""

    subject: str = field(repr=False)
    session: str = field(repr=False)
    existing: ImageSession | None = field(default=None, repr=False)
    hidden: frozenset[str] = field(default=frozenset(), repr=False)  # what no message may show


def digest(text: str, chars: int = DIGEST_CHARS) -> str:
    """Return a short mark of a text, the same each time."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:chars]


def label_of(text: str) -> tuple[str, bool]:
    """Return a label made of a text, and whether it equals the text.

    Accents are dropped; every other character that XNAT doesn't allow becomes an underscore. Where that loses letters
    or digits of other scripts, or the text is too long, a digest of the text is added, so that different texts don't
    get the same label.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    label = _UNFIT.sub("_", plain)
    lost = any(c.isalnum() and not c.isascii() for c in plain) or not any(c.isalnum() for c in label)
    if lost or len(label) > MAX_LABEL_CHARS:
        label = label[: MAX_LABEL_CHARS - DIGEST_CHARS - 1].strip("_") + "-" + digest(text)
        return label.lstrip("-"), False
    return label, label == text


def values_of(study: XnatStudy, dispatch_id: str) -> dict[str, str]:
    """Return the values of a template's fields: for each the first value that any file of the study has.

    A study without a patient's ID is not mixed with others: its patient is named after the study.
    """
    values = {}
    for name in FIELDS:
        found = (str(getattr(item.shared, name, "") or "").strip() for item in study.items)
        values[name] = next((value for value in found if value), UNKNOWN)
    if values["PatientID"] == UNKNOWN:
        values["PatientID"] = f"{UNKNOWN}-{digest(study.uid)}"
    # DA and TM of PS3.5 table 6.2-1, and of ACR-NEMA with its dots and colons; fractions of a second are of no use.
    values["StudyDate"] = values["StudyDate"].replace(".", "")
    values["StudyTime"] = values["StudyTime"].partition(".")[0].replace(":", "")
    return values | {"dispatch_id": dispatch_id}


def candidates(label: str, uid: str) -> Iterator[str]:
    """Yield the labels that a study may have, in the order in which they are tried."""
    yield label
    for chars in (DIGEST_CHARS, 2 * DIGEST_CHARS):
        yield f"{label[: MAX_LABEL_CHARS - chars - 1]}-{digest(uid, chars)}"


def entry_name(SOPInstanceUID: str) -> str:
    """Return an instance's name in the zip, and so at XNAT, which keeps file names."""
    name = SOPInstanceUID
    if not (name.isascii() and name.replace(".", "0").isdigit()) or name.startswith("."):  # PS3.5 section 9.1
        name = re.sub(r"[^A-Za-z0-9.-]", "_", name).lstrip(".") + "-" + digest(SOPInstanceUID)
    return name + ".dcm"


class Names:
    """Gives the studies of a plan their names, one after the other."""

    def __init__(self, client: XnatClient, target: XnatTarget, plan: Plan) -> None:
        self._client, self._target, self._plan = client, target, plan
        self._sessions: dict[str, str] = {}  # label: study
        self._subjects: dict[str, str] = {}  # label: patient's ID

    def name(self, study: XnatStudy, *, avoid: Iterable[str] = ()) -> Name:
        """Return the name of a study.

        Args:
            avoid: labels that turned out to be another study's.
        """
        values = values_of(study, self._plan.dispatch_id)
        wish, _ = label_of(self._target.session.format(**values))
        session, subject, existing = self._session(study, wish, set(avoid))
        subject = subject or self._subject(values)
        self._sessions[session] = study.uid
        patients = {header_of(item).PatientID for item in study.items}
        plain, _ = label_of(values["PatientID"])
        hidden = frozenset({*patients, values["PatientID"], plain, subject, wish, session} - {""})
        return Name(subject, session, existing, hidden)

    def _session(self, study: XnatStudy, wish: str, avoid: set[str]) -> tuple[str, str, ImageSession | None]:
        """Return the label, the session with that label and its subject, if there are any."""
        project, labels = self._target.project_id, list(candidates(wish, study.uid))
        try:
            known = dict(self._client.sessions_of(project, study.uid))
        except XnatRefused as exc:
            if exc.status in (401, 403):
                raise
            known = {}  # this server doesn't search by UID (the next request shows what else is wrong): by label then
        for label in sorted(known, key=lambda one: (labels.index(one) if one in labels else len(labels), one)):
            if existing := self._client.session(project, label):
                return label, known[label], existing
        for label in labels:
            if label in avoid or self._sessions.get(label, study.uid) != study.uid:
                continue
            existing = self._client.session(project, label)
            if existing is None or existing.uid == study.uid or self._is_ours(study, label):
                return label, "", existing
        return labels[-1], "", None

    def _is_ours(self, study: XnatStudy, label: str) -> bool:
        """Return True if a session has this study's files although its UID differs: some projects replace UIDs."""
        ours = {entry_name(header_of(item).SOPInstanceUID) for item in study.items}
        return any(name in ours for _, name in self._client.files(self._target.project_id, label))

    def _subject(self, values: dict[str, str]) -> str:
        text = self._target.subject.format(**values)
        label, exact = label_of(text)
        marked = f"{label[: MAX_LABEL_CHARS - DIGEST_CHARS - 1]}-{digest(text)}"
        if "{PatientID}" not in self._target.subject:
            return label
        owner = self._owner(label, values)
        if (owner is not None and owner != values["PatientID"]) or (not exact and owner is None):
            label = marked
        self._subjects.setdefault(label.lower(), values["PatientID"])
        return label

    def _owner(self, label: str, values: dict[str, str]) -> str | None:
        """Return the patient's ID of the subject with that label; None if there is no such subject or ID.

        XNAT keeps the patient's ID with each session, unless a script replaced it: an ID that would not have become
        this label says nothing.
        """
        if label.lower() in self._subjects:
            return self._subjects[label.lower()]
        project = self._target.project_id
        for session in self._client.labels_of(project, label)[:LOOKED_AT]:
            found = self._client.session(project, session)
            theirs = found.patient_id.strip() if found else ""
            if theirs == values["PatientID"]:
                return theirs
            if theirs and label_of(self._target.subject.format(**values | {"PatientID": theirs}))[0].lower() == (
                label.lower()
            ):
                return theirs
        return None
