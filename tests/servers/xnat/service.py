"""The import service and the archiving of the stand-in, by XNAT's rules (DicomZipImporter, PrearcSessionArchiver)."""

from __future__ import annotations

import os
import re
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from imaging.header import Damaged, NotDicom, read_elements
from tests.servers.xnat.model import Experiment, Prearchived, Refusal, Scan, Store, Stored, clean, safe_name
from tests.servers.xnat.zipinput import Read, ZipError, ZipInput

# What the import service takes from the query or from form fields; the rest of XNAT's are XML paths of session fields.
PARAMETERS = frozenset(
    (
        "import-handler", "dest", "project", "subject", "session", "overwrite", "overwrite_files", "rename",
        "Direct-Archive", "Ignore-Unparsable", "prevent_anon", "prevent_auto_commit", "SOURCE", "AA", "auto-archive",
        "action", "prearchive_code", "http-session-listener", "src", "inbody", "PROJECT_ID", "SUBJECT_ID",
        "EXPT_LABEL", "XNAT_CSRF", "quarantine", "triggerPipelines", "VISIT", "SUBTYPE", "format",
    )
)  # fmt: skip
HANDLERS = ("DICOM-zip", "gradual-DICOM", "SI", "XAR", "inbox", "automation")
DESTINATIONS = (
    r"/archive(/projects/(?P<project>[^/]+)(/subjects/(?P<subject>[^/]+)(/experiments/(?P<session>[^/]+))?)?)?/?",
    r"/archive/(subjects|experiments)/(?P<session>[^/]+)/?",
    r"/prearchive(/projects/(?P<project>[^/]+)(/(?P<timestamp>[^/]+)(/(?P<session>[^/]+))?)?)?/?",
)
# In-body files are named by their Content-Type.
NAMES = {
    "application/zip": "upload.zip",
    "application/x-zip-compressed": "upload.zip",
    "application/dicom": "upload.dcm",
    "application/x-tar": "upload.tar",
    "application/octet-stream": "upload.bin",
}

# XNAT's words.
PRE_EXISTS = "Session already exists, retry with overwrite enabled"
MATCHING_FILES = "Session already exists with matching files."
SAME_SCAN = "Session already contains a scan ({}) with the same UID and number."
OTHER_SCAN = "Session already contains a scan ({}) with the same number, but a different UID."
UID_MOD = "Invalid modification of session UID via archive process."
SUBJECT_MOD = "Invalid modification of session subject via archive process.: {} Already Exists for another Subject"
MODALITY_MOD = "Invalid modification of session modality via archive process.  Data may require a manual merge."
WRAPPED = "unable to archive for the Prearchive session"

# In a large benchmark a full parse of every file would be measured instead of the client: explicit little endian only.
_UID = {"study": b"\x20\x00\x0d\x00UI", "series": b"\x20\x00\x0e\x00UI", "sop": b"\x08\x00\x18\x00UI"}


@dataclass
class Rules:
    """How this XNAT behaves; may be changed while it runs.

    Attributes:
        build_s, archive_s: how long the entry is BUILDING and ARCHIVING.
        background: answer with the entry in the prearchive, and archive it afterwards.
        strict_parameters: refuse parameters that the import service doesn't know.
        commit_ignores: `action=commit` turns Ignore-Unparsable on by itself.
        always_merges: `dest=/archive` merges into a session that is there, whatever `overwrite` says.
        strict_scans: an append to a scan that is there is a conflict.
        renames: files get names of XNAT's own.
        unreadable: SOP instances that can't be parsed.
        filtered: SOP instances or series that an import filter leaves out, without a word.
        refused: status and words by which archiving a study ends (409 leaves CONFLICT, else ERROR).
        stays: statuses in which studies get stuck in the prearchive.
        new_uids: an anonymisation script replaces the UIDs of studies and series.
        forget: SOP instances that are taken and are not there later.
    """

    build_s: float = 0.0
    archive_s: float = 0.0
    background: bool = False
    strict_parameters: bool = True
    commit_ignores: bool = True
    always_merges: bool = False
    strict_scans: bool = False
    renames: bool = False
    unreadable: set[str] = field(default_factory=set)
    filtered: set[str] = field(default_factory=set)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    stays: dict[str, str] = field(default_factory=dict)
    new_uids: bool = False
    forget: set[str] = field(default_factory=set)


@dataclass
class Upload:
    """One file that came with a request."""

    name: str
    read: Read


class Service:
    def __init__(self, store: Store, rules: Rules) -> None:
        self.store, self.rules = store, rules
        self.workers: list[threading.Thread] = []

    # ---- import

    def run(self, user: str, params: dict[str, str], uploads: list[Upload]) -> tuple[list[str], bool]:
        """Import; return the URIs, and whether /data is put before them."""
        if self.rules.strict_parameters and (unknown := set(params) - PARAMETERS):
            raise Refusal(400, f"Unknown parameter: {sorted(unknown)[0]}")
        if params.get("prearchive_code") == "1" and "overwrite" in params:
            raise Refusal(400, "Overwrite flag was not set to a valid option. ('append' or 'delete')")
        if "reference" in params:
            raise Refusal(400, "Reference uploads are not supported.")
        handler = params.get("import-handler", "")
        if handler and handler not in HANDLERS:
            raise Refusal(404, f"Unknown importer implementation specified: {handler}")
        if not uploads:
            raise Refusal(400, "Unable to identify upload format.")
        if len(uploads) > 1:
            raise Refusal(400, "Importer is limited to one uploaded resource at a time.")
        upload = uploads[0]
        if handler in ("XAR", "inbox", "automation"):
            raise Refusal(500, f"{handler} is not part of this stand-in")
        single = handler == "gradual-DICOM" or (not handler and upload.name.endswith(".dcm"))
        if not single and not upload.name.endswith((".zip", ".zar")):
            raise Refusal(400, "Unsupported format UNKNOWN")
        return self._dicom(user, dict(params), upload, single, handler in ("SI", "") and not single), True

    def _dicom(self, user: str, params: dict[str, str], upload: Upload, single: bool, strict: bool) -> list[str]:
        auto, commit, place = self._destination(params)
        ignore = params.get("Ignore-Unparsable") == "true" or (commit and self.rules.commit_ignores)
        entries: list[Prearchived] = []
        problem: Refusal | None = None
        try:
            for name, pieces in _one(upload) if single else _members(upload, sums=self.store.root is not None):
                try:
                    entry = self._file(user, params, place, name, pieces, auto)
                except Refusal as exc:
                    if not ignore:
                        raise
                    problem = exc
                    continue
                if entry is not None and entry not in entries:
                    entries.append(entry)
        except (ZipError, EOFError, ConnectionError) as exc:
            raise Refusal(400, "unable to read data from file") from exc
        if not entries and problem:
            raise problem
        if strict and len(entries) > 1:
            raise Refusal(400, "Upload included files for multiple imaging sessions.")
        if not commit:
            return [_external(entry) for entry in entries]
        if self.rules.background:
            for entry in entries:
                self._later(user, params, entry, auto)
            return [_external(entry) for entry in entries]
        uris = []
        for entry in entries:
            archived = self._finish(user, params, entry, auto, wrap=not strict)
            uris.append(archived or _external(entry))
        return uris

    def _destination(self, params: dict[str, str]) -> tuple[bool, bool, dict[str, str]]:
        """Whether to archive, whether to commit, and what the destination names."""
        auto = "true" in (params.get("AA"), params.get("auto-archive"))
        commit = params.get("action") == "commit"
        dest = params.get("dest", "").removeprefix("/data")
        if not dest:
            return auto, commit, {}
        for form in DESTINATIONS:
            if found := re.fullmatch(form, dest):
                named = {key: value for key, value in found.groupdict().items() if value}
                return dest.startswith("/archive"), True, named
        raise Refusal(400, "Parameter dest format error")

    def _file(
        self, user: str, params: dict[str, str], place: dict[str, str], name: str, pieces: Iterator[bytes], auto: bool
    ) -> Prearchived | None:
        """Receive one file; return the entry that it went to, None if a filter left it out."""
        path = self._spool(pieces)
        if isinstance(path, Stored):
            file, instance = path, ""
            file.name = name
        else:
            file, instance = self._read(path, name)
        if file.sop in self.rules.unreadable:
            raise Refusal(400, f"unable to read DICOM object {name}")
        if file.sop in self.rules.filtered or file.series in self.rules.filtered:
            return None
        wanted = params.get("project") or params.get("PROJECT_ID") or place.get("project") or ""
        project = wanted if self.store.may(user, "create", wanted) else None
        session = params.get("session") or params.get("EXPT_LABEL") or place.get("session") or clean(file.patient_id)
        subject = params.get("subject") or params.get("SUBJECT_ID") or place.get("subject") or clean(file.patient_name)
        with self.store.lock:
            code = "AutoArchive" if auto else ""
            entry = self.store.receive(project, file.study, session or "dicom_upload", subject, code)
            self._put(entry, file, instance, rename=params.get("rename") == "true" or self.rules.renames)
        return entry

    def _put(self, entry: Prearchived, file: Stored, instance: str, *, rename: bool) -> None:
        wish = re.sub(r"[^\w.-]", "_", file.name, flags=re.ASCII)
        known = entry.received.get((file.number, wish))
        if rename or not wish or (known is not None and known.sop != file.sop):
            wish = safe_name(file, instance)
        file.name = wish
        entry.received[file.number, wish] = file

    def _spool(self, pieces: Iterator[bytes]) -> Path | Stored:
        """Write a file to disk; without one, keep only what its first bytes tell."""
        if self.store.root is None:
            return _glance(pieces)
        folder = self.store.root / "incoming"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / uuid.uuid4().hex
        try:
            with path.open("wb") as out:
                for piece in pieces:
                    out.write(piece)
        except BaseException:
            path.unlink()
            raise
        return path

    def _read(self, path: Path, name: str) -> tuple[Stored, str]:
        fd = os.open(path, os.O_RDONLY)
        try:
            header, more = read_elements(fd, path.stat().st_size, (0x0008103E, 0x00100010, 0x00200013))
        except NotDicom as exc:
            raise Refusal(400, f"unable to read DICOM object {name}") from exc
        except Damaged as exc:
            words = f"object {name} contains no SOP Class UID" if "SOP Class" in str(exc) else ""
            raise Refusal(400, words or f"unable to read DICOM object {name}") from exc
        finally:
            os.close(fd)

        def text(tag: int) -> str:
            return more.get(tag, b"").rstrip(b"\0 ").decode("latin-1")

        number = re.sub(r"[^\w.-]", "_", header.SeriesNumber, flags=re.ASCII) or header.SeriesInstanceUID
        file = Stored(
            name, path, path.stat().st_size, header.SOPInstanceUID, header.StudyInstanceUID, header.SeriesInstanceUID,
            number, header.Modality, text(0x0008103E), header.PatientID, text(0x00100010), header.StudyDate,
            header.StudyTime,
        )  # fmt: skip
        return file, text(0x00200013)

    # ---- build and archive

    def _later(self, user: str, params: dict[str, str], entry: Prearchived, auto: bool) -> None:
        def work() -> None:
            try:
                self._finish(user, params, entry, auto, wrap=True)
            except Refusal:
                return  # told by the entry's status and log

        worker = threading.Thread(target=work, daemon=True)
        self.workers.append(worker)
        worker.start()

    def _finish(self, user: str, params: dict[str, str], entry: Prearchived, auto: bool, *, wrap: bool) -> str:
        """Build an entry, and archive it if that is wanted; return the URI in the archive."""
        self.build(entry)
        stuck = self.rules.stays.get(entry.tag)
        if stuck:
            entry.set(stuck)
            return ""
        if not auto or entry.project is None:
            return ""
        overwrite = params.get("overwrite", "")
        merge = overwrite not in ("", "none") or self.rules.always_merges
        override = overwrite in ("delete", "override")
        files = override or params.get("overwrite_files") == "true"
        try:
            return self.archive(user, entry, merge=merge, override=override, overwrite_files=files)
        except Refusal as exc:
            if not wrap:
                raise
            raise Refusal(400, WRAPPED) from exc

    def build(self, entry: Prearchived) -> None:
        entry.set("BUILDING")
        time.sleep(self.rules.build_s)
        with self.store.lock:
            entry.build()
            entry.set("READY")

    def archive(self, user: str, entry: Prearchived, *, merge: bool, override: bool, overwrite_files: bool) -> str:
        """Move an entry to the archive.

        Raises:
            Refusal: 409 and the like; the entry is left in CONFLICT or ERROR, with the words in its log.
        """
        entry.set("ARCHIVING")
        time.sleep(self.rules.archive_s)
        with self.store.lock:
            try:
                return self._archive(user, entry, merge, override, overwrite_files)
            except Refusal as exc:
                entry.logs.append(exc.words)
                entry.set("CONFLICT" if exc.status == 409 else "ERROR")
                raise

    def _archive(self, user: str, entry: Prearchived, merge: bool, override: bool, overwrite_files: bool) -> str:
        project = entry.project
        if entry.tag in self.rules.refused:
            raise Refusal(*self.rules.refused[entry.tag])
        if project is None:
            raise Refusal(400, "unable to identify destination project")
        if not self.store.may(user, "create", project):
            raise Refusal(403, "Invalid permissions for new project.")
        label = clean(entry.name)
        subject = self.store.subject(project, clean(entry.subject), make=True)
        assert subject is not None
        existing = self.store.experiment(project, label)
        first = next(iter(entry.scans.values())).files
        some = next(iter(first.values()))
        tag = f"2.25.{abs(hash(entry.tag))}" if self.rules.new_uids else entry.tag
        if existing is not None:
            self._check(existing, entry, subject.id, tag, merge, override, overwrite_files)
            target = existing
            target.touched += 1
        else:
            target = Experiment(
                self.store.number("E"), label, project, subject, tag, some.modality, some.date, some.time,
                some.patient_id, some.patient_name,
            )  # fmt: skip
            self.store.experiments[target.id] = target
        for scan in entry.scans.values():
            self._merge(target, scan)
        self.store.remove(entry)
        return f"/archive/projects/{project}/subjects/{subject.label}/experiments/{label}"

    def _check(
        self, old: Experiment, entry: Prearchived, subject: str, tag: str, merge: bool, override: bool, files: bool
    ) -> None:
        """PrearcSessionArchiver.checkForConflicts, and what MergeSessionsA adds."""
        if not merge:
            raise Refusal(409, PRE_EXISTS)
        if old.subject.id != subject:
            raise Refusal(409, SUBJECT_MOD.format(old.label))
        if old.uid != tag and not override:
            raise Refusal(409, UID_MOD)
        for scan in entry.scans.values():
            same = next((one for one in old.scans.values() if one.uid == scan.uid), None)
            if same is None:
                if scan.id in old.scans and self.rules.strict_scans and not override:
                    raise Refusal(409, OTHER_SCAN.format(scan.id))
                continue
            if self.rules.strict_scans and not override:
                raise Refusal(409, SAME_SCAN.format(same.id))
            if not files and set(same.files) & set(scan.files):
                raise Refusal(409, MATCHING_FILES)

    def _merge(self, target: Experiment, scan: Scan) -> None:
        same = next((one for one in target.scans.values() if one.uid == scan.uid), None)
        if same is None:
            scan_id, more = scan.id, 0
            while scan_id in target.scans:
                more += 1
                scan_id = f"{scan.id}-{scan.modality or 'OT'}{more}"
            same = target.scans[scan_id] = Scan(scan_id, scan.uid, scan.modality, scan.description)
        for name, file in scan.files.items():
            if file.sop not in self.rules.forget:
                same.files[name] = file


def _external(entry: Prearchived) -> str:
    return f"/prearchive/projects/{entry.project or 'null'}/{entry.timestamp}/{entry.folder}"


def _one(upload: Upload) -> Iterator[tuple[str, Iterator[bytes]]]:
    yield upload.name, iter(lambda: upload.read(1 << 20), b"")


def _members(upload: Upload, *, sums: bool) -> Iterator[tuple[str, Iterator[bytes]]]:
    for entry in ZipInput(upload.read).entries():
        if not entry.name.endswith("/"):
            yield entry.name, entry.pieces(sums=sums)


def _glance(pieces: Iterator[bytes]) -> Stored:
    head, size = b"", 0
    for piece in pieces:
        if len(head) < 4096:
            head += piece[:4096]
        size += len(piece)

    def value(tag: bytes) -> str:
        at = head.index(tag) + len(tag)
        length = int.from_bytes(head[at : at + 2], "little")
        return head[at + 2 : at + 2 + length].rstrip(b"\0 ").decode()

    try:
        study, series, sop = (value(_UID[name]) for name in ("study", "series", "sop"))
    except ValueError as exc:
        raise Refusal(400, "unable to read DICOM object") from exc
    return Stored("", None, size, sop, study, series, series, "CT")
