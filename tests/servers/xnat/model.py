"""What the stand-in for XNAT has: users, projects, the prearchive, the archive."""

from __future__ import annotations

import datetime
import hashlib
import re
import threading
import uuid
from dataclasses import dataclass, field
from pathlib import Path

LABEL = re.compile(r"[^A-Za-z0-9_-]")  # XnatExperimentdata.cleanValue
ROLES = ("owner", "member", "collaborator")
XSI = {"MR": "mr", "CT": "ct", "PT": "pet", "US": "us", "CR": "cr", "DX": "dx", "NM": "nm", "SC": "sc", "SR": "sr"}


class Refusal(Exception):
    """An answer with an error status; the words go into XNAT's error page."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status, self.words = status, words


@dataclass
class Stored:
    """One DICOM file: where it is, and what XNAT knows of it. `path` is None if contents are thrown away."""

    name: str
    path: Path | None
    size: int
    sop: str
    study: str
    series: str
    number: str  # of the series
    modality: str
    description: str = ""
    patient_id: str = ""
    patient_name: str = ""
    date: str = ""
    time: str = ""

    @property
    def data(self) -> bytes:
        assert self.path is not None, "this server throws contents away"
        return self.path.read_bytes()


@dataclass
class Scan:
    id: str
    uid: str
    modality: str
    description: str
    files: dict[str, Stored] = field(default_factory=dict)

    @property
    def xsi(self) -> str:
        return f"xnat:{XSI.get(self.modality, 'otherDicom')}ScanData"


@dataclass
class Subject:
    id: str
    label: str
    project: str


@dataclass
class Experiment:
    """An archived session."""

    id: str
    label: str
    project: str
    subject: Subject
    uid: str
    modality: str
    date: str
    time: str
    patient_id: str
    patient_name: str
    scans: dict[str, Scan] = field(default_factory=dict)
    touched: int = 0  # how often it was merged into

    @property
    def xsi(self) -> str:
        return f"xnat:{XSI.get(self.modality, 'otherDicom')}SessionData"

    @property
    def files(self) -> list[Stored]:
        return [file for scan in self.scans.values() for file in scan.files.values()]


@dataclass
class Prearchived:
    """A session in the prearchive. `scans` are there once it was built."""

    project: str | None
    timestamp: str
    folder: str
    name: str
    tag: str
    subject: str
    status: str = "RECEIVING"
    auto_archive: str = ""
    received: dict[tuple[str, str], Stored] = field(default_factory=dict)  # by folder of the series, and name
    scans: dict[str, Scan] = field(default_factory=dict)
    logs: list[str] = field(default_factory=list)
    uploaded: str = ""
    lastmod: str = ""

    def set(self, status: str) -> None:
        self.status, self.lastmod = status, now()

    @property
    def url(self) -> str:
        return f"/prearchive/projects/{self.project or 'Unassigned'}/{self.timestamp}/{self.folder}"

    def build(self) -> None:
        """Sort the files into scans: by number, a second series of the same number under another ID."""
        self.scans = {}
        by_series: dict[str, Scan] = {}
        for (number, _), file in sorted(self.received.items()):
            scan = by_series.get(file.series)
            if scan is None:
                scan_id, more = number, 0
                while scan_id in self.scans:
                    more += 1
                    scan_id = f"{number}-{file.modality or 'OT'}{more}"
                scan = by_series[file.series] = Scan(scan_id, file.series, file.modality, file.description)
                self.scans[scan_id] = scan
            scan.files[file.name] = file


@dataclass
class Project:
    id: str
    name: str
    roles: dict[str, str] = field(default_factory=dict)
    accessibility: str = "private"


@dataclass
class User:
    name: str
    password: str
    admin: bool = False


@dataclass
class Login:
    """A session of HTTP."""

    user: str
    used: float


def clean(value: str) -> str:
    return LABEL.sub("_", value)


def now() -> str:
    return datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


class Store:
    """Everything that the server keeps. Take `lock` to change it; what tests read they read without.

    Args:
        root: the folder for files; None throws their contents away.
    """

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self.lock = threading.RLock()
        self.users: dict[str, User] = {}
        self.aliases: dict[str, tuple[str, str]] = {}  # alias: (secret, user)
        self.logins: dict[str, Login] = {}
        self.projects: dict[str, Project] = {}
        self.subjects: dict[str, Subject] = {}
        self.experiments: dict[str, Experiment] = {}
        self.prearchive: list[Prearchived] = []
        self._counters: dict[str, int] = {}

    # ---- users and projects

    def add_user(self, name: str, password: str, *, admin: bool = False) -> None:
        self.users[name] = User(name, password, admin)

    def add_project(self, project: str, accessibility: str = "private", **roles: str) -> Project:
        """Roles by user: owner, member or collaborator."""
        self.projects[project] = Project(project, project, roles, accessibility)
        return self.projects[project]

    def issue_alias(self, user: str) -> tuple[str, str]:
        alias, secret = str(uuid.uuid4()), uuid.uuid4().hex * 2
        self.aliases[alias] = (secret, user)
        return alias, secret

    def who(self, name: str, password: str) -> str | None:
        """The user whose credentials these are."""
        if name in self.aliases:
            secret, user = self.aliases[name]
            return user if secret == password else None
        user_found = self.users.get(name)
        return name if user_found and user_found.password == password else None

    def may(self, user: str, what: str, project: str) -> bool:
        """Whether a user may read, create, edit or delete in a project."""
        found = self.projects.get(project)
        if found is None:
            return False
        role = found.roles.get(user, "")
        if self.users[user].admin or role == "owner":
            return True
        if what == "read":
            return bool(role) or found.accessibility == "public"
        return what in ("create", "edit") and role == "member"

    # ---- sessions

    def number(self, kind: str) -> str:
        with self.lock:
            self._counters[kind] = self._counters.get(kind, 0) + 1
            return f"XNAT_{kind}{self._counters[kind]:05d}"

    def subject(self, project: str, label: str, *, make: bool = False) -> Subject | None:
        for one in self.subjects.values():
            if one.project == project and (one.label.lower() == label.lower() or one.id == label):
                return one
        if not make:
            return None
        made = Subject(self.number("S"), label, project)
        self.subjects[made.id] = made
        return made

    def experiment(self, project: str | None, label: str) -> Experiment | None:
        """By label in a project, or by ID."""
        if label in self.experiments:
            found = self.experiments[label]
            return found if project in (None, found.project) else None
        return next((e for e in self.experiments.values() if e.project == project and e.label == label), None)

    def entry(self, project: str, timestamp: str, folder: str) -> Prearchived | None:
        wanted = None if project in ("Unassigned", "null") else project
        for one in self.prearchive:
            if (one.project, one.timestamp, one.folder) == (wanted, timestamp, folder):
                return one
        return None

    def receive(self, project: str | None, tag: str, name: str, subject: str, auto: str) -> Prearchived:
        """The entry that takes a study's files: the one that has its name already, if it may take more."""
        for one in self.prearchive:
            if (one.project, one.tag, one.name) == (project, tag, name):
                if one.status in ("RECEIVING", "READY", "ERROR", "CONFLICT"):
                    one.set("RECEIVING")
                    return one
                if one.status == "BUILDING":
                    one.set("RECEIVING_INTERRUPT")
                    return one
        stamp = datetime.datetime.now().strftime("%Y%m%d_%H%M%S%f")[:-3]
        folder, more = name, 0
        while self.entry(project or "Unassigned", stamp, folder):
            more += 1
            folder = f"{name}_{more}"
        made = Prearchived(
            project, stamp, folder, folder, tag, subject, auto_archive=auto, uploaded=now(), lastmod=now()
        )
        self.prearchive.append(made)
        return made

    def remove(self, entry: Prearchived) -> None:
        self.prearchive = [one for one in self.prearchive if one is not entry]


def safe_name(file: Stored, instance: str) -> str:
    """The name that XNAT makes up if the one of the upload won't do."""
    mark = hashlib.sha1(f"{file.sop}".encode()).hexdigest()[:8]
    return f"{file.study}-{file.number}-{instance or 0}-{mark}.dcm"
