"""What the stand-in answers: XNAT 1.8's REST, as far as uploads and their clients need it."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.servers.xnat.http import Reply, Request, table
from tests.servers.xnat.model import XSI, Experiment, Prearchived, Refusal, Scan, Store, Stored
from tests.servers.xnat.schema import xnat_xsd
from tests.servers.xnat.service import Rules, Service

ENTRY_COLUMNS = (
    "project", "timestamp", "lastmod", "uploaded", "scan_date", "scan_time", "subject", "folderName", "name", "tag",
    "status", "url", "autoarchive", "prevent_anon", "prevent_auto_commit", "SOURCE", "VISIT", "PROTOCOL", "TIMEZONE",
)  # fmt: skip
NOT_FOUND = "The server has not found anything matching the request URI"


class Rest:
    """Routes requests of somebody who is logged in.

    Attributes:
        version: what /data/version says; "" for a release that doesn't know it.
        build: what buildInfo says.
    """

    def __init__(self, store: Store, rules: Rules) -> None:
        self.store = store
        self.service = Service(store, rules)
        self.version = ""
        self.build = "1.8.10"
        self.knows_permissions = True

    def __call__(self, request: Request) -> Reply:
        parts = request.parts
        if parts[:1] == ["xapi"]:
            return self._xapi(request)
        parts = parts[1:]
        if parts[:1] == ["archive"]:
            parts = parts[1:]
        match parts:
            case ["JSESSION"]:
                return self._jsession(request)
            case ["auth"]:
                return Reply(f"User '{request.user}' is logged in")
            case ["version"] if self.version:
                return Reply(self.version)
            case ["search", "elements"]:
                return table(request, [], ("ELEMENT_NAME", "SINGULAR", "PLURAL"))
            case ["services", *rest]:
                return self._services(request, rest)
            case ["prearchive", *rest]:
                return self._prearchive(request, rest)
            case ["projects" | "subjects" | "experiments", *_]:
                return self._archive(request, parts)
        raise Refusal(404, NOT_FOUND)

    def _xapi(self, request: Request) -> Reply:
        if request.parts[1:] == ["siteConfig", "buildInfo"]:
            return Reply(json.dumps({"version": self.build, "buildNumber": "1"}), kind="application/json")
        if request.parts[1:] == ["schemas"]:
            return Reply(json.dumps(["xnat"]), kind="application/json")
        if request.parts[1:2] == ["schemas"] and request.parts[-1] == "xnat":
            return Reply(xnat_xsd([*XSI.values(), "otherDicom"]), kind="application/xml")
        raise Refusal(404, NOT_FOUND)

    def _jsession(self, request: Request) -> Reply:
        if request.method == "DELETE":
            self.store.logins.pop(request.login, None)
            return Reply()
        return Reply(f"{request.login}; XNAT_CSRF=1" if request.query.get("CSRF") == "true" else request.login)

    # ---- services

    def _services(self, request: Request, rest: list[str]) -> Reply:
        match rest:
            case ["import"]:
                return self._import(request)
            case ["archive"] if request.method == "POST":
                return self._archive_entries(request)
            case ["prearchive", "move" | "delete" | "rebuild" as what] if request.method == "POST":
                for entry in self._sources(request):
                    self._act(request, entry, what)
                return Reply()
            case ["tokens", "issue"]:
                alias, secret = self.store.issue_alias(request.user)
                return Reply(json.dumps({"alias": alias, "secret": secret}), kind="application/json")
            case ["tokens", "invalidate", alias, *_]:
                self.store.aliases.pop(alias, None)
                return Reply()
        raise Refusal(404, NOT_FOUND)

    def _import(self, request: Request) -> Reply:
        if request.method != "POST":
            raise Refusal(405, "Method Not Allowed")
        uploads = request.uploads()
        uris, wrapped = self.service.run(request.user, request.query | request.form, uploads)
        lines = ["/data" + uri if wrapped and not uri.startswith("/xapi") else uri for uri in uris]
        return Reply("".join(f"{one}\r\n" for one in lines), kind="text/uri-list")

    def _sources(self, request: Request) -> list[Prearchived]:
        found = []
        for source in (request.query.get("src") or request.form.get("src") or self._form_src(request)).split(","):
            parts = [one for one in source.removeprefix("/data").split("/") if one]
            entry = self.store.entry(*parts[2:5]) if len(parts) == 5 else None
            if entry is None:
                raise Refusal(404, "Unable to find the session in the prearchive")
            found.append(entry)
        return found

    @staticmethod
    def _form_src(request: Request) -> str:
        data = b""
        while piece := request.handler.body.read(1 << 20):
            data += piece
        found = re.search(rb"(?:^|&)src=([^&]+)", data)
        return found[1].decode().replace("%2F", "/") if found else ""

    def _archive_entries(self, request: Request) -> Reply:
        uris = []
        overwrite = request.query.get("overwrite", "")
        for entry in self._sources(request):
            if entry.status in ("ARCHIVING", "BUILDING"):
                raise Refusal(403, "Operation already in progress on this prearchive entry.")
            override = overwrite in ("delete", "override")
            entry.name = request.query.get("session", entry.name)
            entry.subject = request.query.get("subject", entry.subject)
            if not entry.scans:
                self.service.build(entry)
            uris.append(
                self.service.archive(
                    request.user, entry, merge=overwrite not in ("", "none"), override=override,
                    overwrite_files=override or request.query.get("overwrite_files") == "true",
                )
            )  # fmt: skip
        return Reply("".join(f"/data{uri}\r\n" for uri in uris), kind="text/uri-list")

    # ---- prearchive

    def _prearchive(self, request: Request, rest: list[str]) -> Reply:
        if "tag" in request.query and not self.store.users[request.user].admin:
            raise Refusal(403, "Only administrators may search by tag")
        match rest:
            case [] | ["projects"]:
                return self._entries(request, None)
            case ["projects", project]:
                for one in project.split(","):
                    if not self.store.may(request.user, "edit", one) and not self.store.users[request.user].admin:
                        raise Refusal(403, f"User does not have permissions to access {one}")
                return self._entries(request, project.split(","))
            case ["projects", project, timestamp, folder, *more]:
                entry = self.store.entry(project, timestamp, folder)
                if entry is None:
                    raise Refusal(404, "Unable to find the session in the prearchive")
                return self._entry(request, entry, more)
        raise Refusal(404, NOT_FOUND)

    def _entries(self, request: Request, projects: list[str] | None) -> Reply:
        admin = self.store.users[request.user].admin
        found = [
            one
            for one in list(self.store.prearchive)
            if (projects is None and (admin or self.store.may(request.user, "edit", one.project or "")))
            or (projects is not None and (one.project or "Unassigned") in projects)
        ]
        if tag := request.query.get("tag"):
            found = [one for one in found if one.tag == tag]
        return table(request, [_entry_row(one) for one in found], ENTRY_COLUMNS)

    def _entry(self, request: Request, entry: Prearchived, more: list[str]) -> Reply:
        if request.method == "DELETE" and not more:
            if not self.store.may(request.user, "edit", entry.project or ""):
                raise Refusal(403, "Invalid permissions")
            self.store.remove(entry)
            return Reply()
        if request.method == "POST":
            return self._act(request, entry, request.query.get("action", ""))
        match more:
            case []:
                return table(request, [_entry_row(entry)], ENTRY_COLUMNS)
            case ["logs"]:
                rows = [{"id": number, "entry": words} for number, words in enumerate(entry.logs)]
                return table(request, rows, ("id", "entry"))
            case ["logs", "last"]:
                if not entry.logs:
                    raise Refusal(404, NOT_FOUND)
                return table(request, [{"id": len(entry.logs) - 1, "entry": entry.logs[-1]}])
        if not entry.scans:
            raise Refusal(404, "Unable to locate the session XML")
        return self._scan_parts(request, entry.scans, more, f"/data{entry.url}")

    def _act(self, request: Request, entry: Prearchived, action: str) -> Reply:
        if action in ("move", "set"):
            entry.project = request.query.get("newProject", entry.project)
        elif action in ("build", "rebuild"):
            self.service.build(entry)
        elif action == "commit":
            self.service.build(entry)
            if entry.auto_archive:
                uri = self.service.archive(request.user, entry, merge=True, override=False, overwrite_files=False)
                return Reply(f"/data{uri}")
        elif action == "reset":
            entry.set("RECEIVING")
        elif action == "delete":
            self.store.remove(entry)
        else:
            raise Refusal(400, f"Unsupported action: {action}")
        return Reply(f"/data{entry.url}", 301 if action == "move" else 200)

    def _scan_parts(self, request: Request, scans: dict[str, Scan], more: list[str], base: str) -> Reply:
        """Below a session: its scans, their resources, their files."""
        match more:
            case ["scans"]:
                rows = [{"ID": s.id, "xsiType": s.xsi, "series_description": s.description} for s in scans.values()]
                return table(request, rows, ("ID", "xsiType", "series_description"))
            case ["scans", wanted, "files", *file] | ["scans", wanted, "resources", "DICOM" | "1", "files", *file]:
                chosen = _chosen(scans, wanted)
                if file:
                    found = next((s.files[file[-1]] for s in chosen if file[-1] in s.files), None)
                    if found is None:
                        raise Refusal(404, "Unable to find file.")
                    return Reply(found.data, kind="application/octet-stream")
                rows = [_file_row(base, scan, one) for scan in chosen for one in scan.files.values()]
                return table(request, rows, tuple(_FILE_COLUMNS))
            case ["scans", wanted, "resources"]:
                rows = [_resource_row(scan) for scan in _chosen(scans, wanted)]
                if base.startswith("/data/prearchive"):
                    rows = [{key: row[key] for key in ("label", "file_count", "file_size")} for row in rows]
                return table(request, rows, ("label", "file_count", "file_size"))
        raise Refusal(404, NOT_FOUND)

    # ---- archive

    def _archive(self, request: Request, parts: list[str]) -> Reply:
        match parts:
            case ["projects"]:
                return self._projects(request)
            case ["projects", project, *rest]:
                if not self.store.may(request.user, "read", project):
                    raise Refusal(404, f"Unable to identify project {project}")
                return self._project(request, project, rest)
            case ["experiments"]:
                found = [e for e in self.store.experiments.values() if self.store.may(request.user, "read", e.project)]
                return self._sessions(request, found)
            case ["experiments", number, *rest]:
                experiment = self.store.experiments.get(number)
                if experiment is None or not self.store.may(request.user, "read", experiment.project):
                    raise Refusal(404, "Unable to find the specified experiment.")
                return self._session(request, experiment, rest)
            case ["subjects"]:
                visible = [s for s in self.store.subjects.values() if self.store.may(request.user, "read", s.project)]
                return table(request, [_subject_row(one) for one in visible], ("ID", "label", "project", "URI"))
            case ["subjects", number, *rest] if number in self.store.subjects:
                return self._project(request, self.store.subjects[number].project, ["subjects", number, *rest])
        raise Refusal(404, NOT_FOUND)

    def _projects(self, request: Request) -> Reply:
        permission = request.query.get("permissions")
        if permission and self.knows_permissions:
            if permission not in ("activate", "create", "delete", "edit", "read"):
                raise Refusal(500, "You must specify one of the following values for the permissions parameter")
            ids = [one for one in self.store.projects if self.store.may(request.user, permission, one)]
            return table(request, [{"id": one, "secondary_id": one} for one in ids], ("id", "secondary_id"))
        ids = [one for one in self.store.projects if self.store.may(request.user, "read", one)]
        rows = [_project_row(self.store.projects[one].id, self.store.projects[one].name) for one in ids]
        return table(request, _columns(request, rows), ("ID", "secondary_ID", "name"))

    def _project(self, request: Request, project: str, rest: list[str]) -> Reply:
        match rest:
            case []:
                facts = {"ID": project, "name": self.store.projects[project].name, "secondary_ID": project}
                return _item(facts, "xnat:projectData")
            case ["users"]:
                rows = [
                    {"login": user, "displayname": f"{role.capitalize()}s", "GROUP_ID": f"{project}_{role}"}
                    for user, role in self.store.projects[project].roles.items()
                ]
                return table(request, rows, ("login", "displayname", "GROUP_ID"))
            case ["subjects"]:
                rows = [_subject_row(one) for one in self.store.subjects.values() if one.project == project]
                return table(request, _columns(request, rows), ("ID", "label", "project", "URI"))
            case ["subjects", label, *more]:
                return self._subject(request, project, label, more)
            case ["experiments"]:
                found = [one for one in self.store.experiments.values() if one.project == project]
                return self._sessions(request, found)
            case ["experiments", label, *more]:
                experiment = self.store.experiment(project, label)
                if experiment is None:
                    raise Refusal(404, "Unable to find the specified experiment.")
                return self._session(request, experiment, more)
        raise Refusal(404, NOT_FOUND)

    def _subject(self, request: Request, project: str, label: str, more: list[str]) -> Reply:
        subject = self.store.subject(project, label)
        if subject is None:
            if request.method == "PUT" and not more and self.store.may(request.user, "create", project):
                made = self.store.subject(project, label, make=True)
                return Reply(made.id if made else "", 201)
            raise Refusal(404, "Unable to find the specified subject.")
        match more:
            case []:
                return _item({"ID": subject.id, "label": subject.label, "project": project}, "xnat:subjectData")
            case ["experiments"]:
                found = [one for one in self.store.experiments.values() if one.subject is subject]
                return self._sessions(request, found)
            case ["experiments", session, *rest]:
                experiment = self.store.experiment(project, session)
                if experiment is None or experiment.subject is not subject:
                    raise Refusal(404, "Unable to find the specified experiment.")
                return self._session(request, experiment, rest)
        raise Refusal(404, NOT_FOUND)

    def _sessions(self, request: Request, found: list[Experiment]) -> Reply:
        for key, value in request.query.items():
            name = key.lower().rpartition("/")[2]
            if name in ("uid", "label", "id") and key not in ("columns", "format"):
                found = [
                    one for one in found if _experiment_row(one)[name.upper() if name != "label" else name] == value
                ]
        return table(request, _columns(request, [_experiment_row(one) for one in found]), ("ID", "label", "URI"))

    def _session(self, request: Request, experiment: Experiment, more: list[str]) -> Reply:
        if request.method == "DELETE" and not more:
            if not self.store.may(request.user, "delete", experiment.project):
                raise Refusal(403, "User account doesn't have permission to modify this session.")
            del self.store.experiments[experiment.id]
            return Reply()
        base = f"/data/experiments/{experiment.id}"
        if not more:
            return _item(
                _experiment_facts(experiment), experiment.xsi, [_scan_item(s) for s in experiment.scans.values()]
            )
        if more == ["scans"]:
            rows = [
                {"xnat_imagescandata_id": number, "ID": scan.id, "type": scan.description, "quality": "usable",
                 "xsiType": scan.xsi, "note": "", "series_description": scan.description, "UID": scan.uid,
                 "URI": f"{base}/scans/{scan.id}"}
                for number, scan in enumerate(experiment.scans.values())
            ]  # fmt: skip
            return table(request, _columns(request, rows), ("ID", "URI"))
        if len(more) == 2 and more[0] == "scans":
            scan = experiment.scans.get(more[1])
            if scan is None:
                raise Refusal(404, "Unable to find the specified scan.")
            found = _scan_item(scan)
            return Reply(json.dumps({"items": [found]}), kind="application/json")
        return self._scan_parts(request, experiment.scans, more, base)


_FILE_COLUMNS = ("Name", "Size", "URI", "collection", "file_tags", "file_format", "file_content", "cat_ID", "digest")


def _chosen(scans: dict[str, Scan], wanted: str) -> list[Scan]:
    """The scans that a path names: IDs with commas between them, types, or ALL."""
    if wanted in ("ALL", "*"):
        return list(scans.values())
    found = [scans[one] for one in wanted.split(",") if one in scans]
    if not found:
        raise Refusal(404, "Unable to find the specified scan.")
    return found


def _columns(request: Request, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns that are asked for; a path of a field stands under that path, in lower case."""
    wanted = [one.strip() for one in request.query.get("columns", "").split(",") if one.strip()]
    if not wanted:
        return [{key: value for key, value in row.items() if key not in ("UID", "subject_label")} for row in rows]
    chosen = []
    for row in rows:
        by_name = {key.lower(): value for key, value in row.items()}
        one = {(c.lower() if "/" in c else c): by_name.get(c.lower().rpartition("/")[2], "") for c in wanted}
        chosen.append(one | {"URI": row.get("URI", "")})
    return chosen


def _item(facts: dict[str, Any], xsi: str, scans: list[dict[str, Any]] | None = None) -> Reply:
    children = [{"field": "scans/scan", "items": scans}] if scans else []
    found = {"children": children, "meta": {"xsi:type": xsi, "isHistory": False}, "data_fields": facts}
    return Reply(json.dumps({"items": [found]}), kind="application/json")


def _scan_item(scan: Scan) -> dict[str, Any]:
    resource = {
        "children": [],
        "meta": {"xsi:type": "xnat:resourceCatalog", "isHistory": False},
        "data_fields": {"label": "DICOM", "format": "DICOM", "content": "RAW", "file_count": len(scan.files),
                        "file_size": sum(file.size for file in scan.files.values())},
    }  # fmt: skip
    return {
        "children": [{"field": "file", "items": [resource]}],
        "meta": {"xsi:type": scan.xsi, "isHistory": False},
        "data_fields": {"ID": scan.id, "UID": scan.uid, "type": scan.description, "modality": scan.modality,
                        "series_description": scan.description, "quality": "usable", "frames": len(scan.files)},
    }  # fmt: skip


def _experiment_facts(one: Experiment) -> dict[str, Any]:
    facts = {
        "ID": one.id, "label": one.label, "project": one.project, "subject_ID": one.subject.id, "UID": one.uid,
        "modality": one.modality, "dcmPatientId": one.patient_id, "dcmPatientName": one.patient_name,
        "date": one.date, "time": one.time, "prearchivePath": "",
    }  # fmt: skip
    return {key: value for key, value in facts.items() if value}


def _experiment_row(one: Experiment) -> dict[str, Any]:
    return {
        "ID": one.id, "label": one.label, "project": one.project, "date": one.date, "xsiType": one.xsi,
        "insert_date": "", "subject_ID": one.subject.id, "subject_label": one.subject.label, "UID": one.uid,
        "URI": f"/data/experiments/{one.id}",
    }  # fmt: skip


def _subject_row(one: Any) -> dict[str, Any]:
    return {"ID": one.id, "label": one.label, "project": one.project, "URI": f"/data/subjects/{one.id}"}


def _project_row(project: str, name: str) -> dict[str, Any]:
    return {"ID": project, "secondary_ID": project, "name": name, "description": "", "pi_firstname": "",
            "pi_lastname": "", "URI": f"/data/projects/{project}"}  # fmt: skip


def _resource_row(scan: Scan) -> dict[str, Any]:
    size = sum(file.size for file in scan.files.values())
    return {"xnat_abstractresource_id": "1", "label": "DICOM", "element_name": "xnat:resourceCatalog",
            "category": "scans", "cat_id": scan.id, "file_count": len(scan.files), "file_size": size,
            "content": "RAW", "format": "DICOM"}  # fmt: skip


def _file_row(base: str, scan: Scan, file: Stored) -> dict[str, Any]:
    uri = f"{base}/scans/{scan.id}/resources/DICOM/files/{file.name}"
    return dict(zip(_FILE_COLUMNS, (file.name, file.size, uri, "DICOM", "", "DICOM", "RAW", "1", ""), strict=True))


def _entry_row(one: Prearchived) -> dict[str, Any]:
    some = next(iter(one.received.values()), None)
    values = {
        "project": one.project or "Unassigned", "timestamp": one.timestamp, "lastmod": one.lastmod,
        "uploaded": one.uploaded, "scan_date": some.date if some else "", "scan_time": some.time if some else "",
        "subject": one.subject, "folderName": one.folder, "name": one.name, "tag": one.tag, "status": one.status,
        "url": one.url, "autoarchive": one.auto_archive,
    }  # fmt: skip
    return {column: values.get(column, "") for column in ENTRY_COLUMNS}
