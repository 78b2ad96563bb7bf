"""What the API answers, as its description tells it: the JSON of docs/cli.md. Answers are not made of these models."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

DISPATCH_STATES = "delivered, partial, failed, cancelled or waiting."
RETRIEVAL_STATES = "delivered, partial, failed, cancelled, paused or waiting."


class ExactAnswer(BaseModel):
    """An object with these keys, and no other ones."""

    model_config = ConfigDict(extra="forbid")


class ProblemAnswer(BaseModel):
    """Why something was not done."""

    error: str = Field(description="One line that says what to change.")


class HealthAnswer(ExactAnswer):
    """That the server answers."""

    ok: bool
    version: str


# ---- targets


class CertificateAnswer(ExactAnswer):
    """A certificate that a peer has shown."""

    subject: str
    issuer: str
    names: list[str] = Field(description="Hosts and addresses that it is for.")
    expires: str
    days: int = Field(description="Until it expires; less than 0 since then.")
    fingerprint: str = Field(description="SHA-256.")


class ProbeFactsAnswer(BaseModel):
    """What a step has found out about a peer; a key is there where it has."""

    model_config = ConfigDict(extra="forbid")

    certificate: CertificateAnswer | None = None
    transfer_syntaxes: list[str] | None = Field(default=None, description="Names of those that it accepts.")


class ProbeAnswer(ExactAnswer):
    """One step of a check."""

    name: str
    result: str = Field(description="ok, failed or skipped.")
    ms: float
    detail: str
    error: str = Field(description="Class of the error that it failed with; empty if it did not.")
    remedy: str = Field(description="What somebody can do about it, in a sentence.")
    facts: ProbeFactsAnswer


class CheckedAnswer(ExactAnswer):
    """How the last check ended."""

    ok: bool
    time: str


class CheckAnswer(CheckedAnswer):
    """The last check, with its probes."""

    name: str
    probes: list[ProbeAnswer]


class TargetFactsAnswer(BaseModel):
    """What is known of every target; direction and `enabled` are null for one that is broken."""

    name: str
    type: str
    direction: str | None = Field(description="store, query or both.")
    enabled: bool | None
    broken: str | None = Field(description="Why its settings are not valid; null if they are.")


class BreakerAnswer(ExactAnswer):
    """Whether dispatches wait for a target that does not answer; the other keys are there if they do (open)."""

    state: str = Field(description="closed or open.")
    since: str = ""
    next_test: str = ""
    failures: int = 0
    reason: str = ""


class ListedTargetAnswer(TargetFactsAnswer):
    """A target in the list: also every field of its type that is not the default, secrets masked."""

    model_config = ConfigDict(extra="allow")

    last_check: CheckedAnswer | None
    breaker: BreakerAnswer


class TargetListAnswer(ExactAnswer):
    """All targets."""

    targets: list[ListedTargetAnswer]


class TargetSettingsAnswer(BaseModel):
    """A target's settings: name, type, and the fields of its type, secrets masked."""

    model_config = ConfigDict(extra="allow")

    name: str
    type: str


class TargetChangeAnswer(ExactAnswer):
    """What was done, or would be."""

    name: str
    action: str


class AppliedAnswer(ExactAnswer):
    """What was done with each target, or would be."""

    dry_run: bool
    targets: list[TargetChangeAnswer]


class ExportedAnswer(ExactAnswer):
    """Targets as `POST /targets` takes them, by name, without secrets."""

    targets: dict[str, dict[str, Any]]
    left_out: dict[str, str] = Field(description="Why others are not among them, by name.")


class TypeFieldAnswer(ExactAnswer):
    """A field of a type."""

    description: str | None
    required: bool
    secret: bool
    title: str = Field("", description="Its label in a form.")
    group: str = Field("", description="The part of a form that it stands in.")
    tier: str = Field("", description="`basic`, or `advanced` for what few need.")
    unit: str = Field("", description="What its number counts: `s`, `B` for bytes, `B/s`, `times`.")
    placeholder: str = Field("", description="An example for an empty field of a form.")
    aims: bool = Field(False, description="Whether it decides who is sent the secrets.")


class TargetTypeAnswer(ExactAnswer):
    """A type of target; what it can do is not known if it does not work."""

    works: bool
    problem: str = ""
    push: bool = False
    query: bool = False
    pull: bool = False
    hook: bool = False
    dicom_only: bool = False
    verifies: list[str] = []
    fields: dict[str, TypeFieldAnswer]


class TargetTypesAnswer(ExactAnswer):
    """The types, by name."""

    types: dict[str, TargetTypeAnswer]
    refused: dict[str, str] = Field(description="Why types of other packages can't be used, by name.")


# ---- jobs


class RunAnswer(ExactAnswer):
    """A job as lists show it."""

    id: str
    state: str | None
    kind: str = Field(description="dispatch, retrieval or query.")
    source: str
    dispatch_id: str
    targets: list[str]
    paths: list[str]
    by: str = Field(description="Who asked for it.")
    begun: str | None
    ended: str | None
    runs: int
    message: str | None


class JobListAnswer(ExactAnswer):
    """The newest jobs."""

    jobs: list[RunAnswer]


class JobChangeAnswer(ExactAnswer):
    """What was done with a job."""

    id: str
    kind: str
    action: str


class RecoveredAnswer(ExactAnswer):
    """The ids of the runs that were taken up."""

    recovered: list[str]


class ForgottenAnswer(ExactAnswer):
    """How much has gone."""

    rows: int = Field(description="Of the ledger.")
    receipts: int
    staging: int = Field(description="Folders of staged files that no run had any more.")
    indexes: int = Field(description="Unused indexes of read-only folders.")


class ItemAnswer(ExactAnswer):
    """What became of one item."""

    path: str
    sop_instance_uid: str
    outcome: str
    detail: str


class ReceiptAnswer(ExactAnswer):
    """What a target has, and what it has not."""

    state: str = Field(description=DISPATCH_STATES)
    delivered: int
    warnings: int
    already: int
    rejected: int
    skipped: int
    unsent: int
    bytes: int
    seconds: float
    attempts: int
    verified: str = Field(description="accepted, listed or proven.")
    hook: str = Field(description="none, done or failed.")
    error: str | None
    notes: list[str]
    items: list[ItemAnswer]


class FloodStudyAnswer(ExactAnswer):
    """One study of a flood."""

    study: str
    dispatch_id: str = Field(description='"" until its files have been read.')
    state: str = Field(description=DISPATCH_STATES)
    targets: dict[str, ReceiptAnswer]


class DispatchAnswer(ExactAnswer):
    """Receipts, by target."""

    dispatch_id: str = Field(description='"" until the files have been read.')
    flow_run_id: str
    state: str = Field(description=DISPATCH_STATES)
    targets: dict[str, ReceiptAnswer]
    studies: list[FloodStudyAnswer] | None = Field(default=None, description="Of a flood: each study's own receipts.")
    error: str | None = Field(default=None, description="Of a dispatch that could not begin.")


class CreatedDispatchAnswer(DispatchAnswer):
    """Receipts that wait, and the job."""

    run: RunAnswer


class ShownDispatchAnswer(CreatedDispatchAnswer):
    """Receipts so far, the job, and how far it is."""

    progress: dict[str, float] = Field(description="Per cent, by target.")


class PlannedItemAnswer(ExactAnswer):
    """An item that would not be sent."""

    path: str
    outcome: str
    detail: str


class TargetPlanAnswer(ExactAnswer):
    """What a target would be sent."""

    files: int
    bytes: int
    items: list[PlannedItemAnswer]


class StudyPlanAnswer(ExactAnswer):
    """A study of a flood."""

    study: str
    dispatch_id: str
    error: str | None = Field(description="Why it can't be sent.")
    files: int
    bytes: int


class DispatchPlanAnswer(ExactAnswer):
    """What a dispatch would send, by target."""

    dispatch_id: str
    dry_run: bool
    targets: dict[str, TargetPlanAnswer]
    studies: list[StudyPlanAnswer] | None = Field(default=None, description="Of a flood.")


class AccessionAnswer(ExactAnswer):
    """What became of an accession number, or of a study UID that was asked for, that has no study."""

    accession: str
    study: str
    state: str
    instances: int
    missing: int
    bytes: int
    reason: str


class StudyAnswer(AccessionAnswer):
    """What became of a study."""

    notes: list[str]
    targets: dict[str, str] = Field(description="How the delivery ended, by target.")


class RetrievalAnswer(ExactAnswer):
    """The result of a retrieval."""

    flow_run_id: str
    source: str
    state: str = Field(description=RETRIEVAL_STATES)
    found: int
    delivered: int
    missing: list[str]
    partial: list[str]
    failed: list[str]
    waiting: list[str]
    cancelled: list[str] = Field(default=[], description="What waited when it was cancelled.")
    error: str | None
    studies: list[StudyAnswer]
    accessions: list[AccessionAnswer]


class CreatedRetrievalAnswer(RetrievalAnswer):
    """A result that waits, and the job."""

    run: RunAnswer


class ShownRetrievalAnswer(CreatedRetrievalAnswer):
    """The result so far, the job, and how far it is."""

    progress: dict[str, float] = Field(description="Per cent.")


class MatchAnswer(BaseModel):
    """A study or series: values by DICOM keyword."""

    model_config = ConfigDict(extra="allow")

    instances: int | None = Field(description="Null where the peer does not count.")
    note: str = Field("", description="What is not shown in full; names no patient. Not there if there is nothing.")


class MatchesAnswer(ExactAnswer):
    """What a target has."""

    matches: list[MatchAnswer]
    unread: str | None = Field(description="Why what was not found may be there all the same; null if it isn't.")


class QueryResultAnswer(ExactAnswer):
    """The result of a search: UIDs and accession numbers."""

    flow_run_id: str
    source: str
    state: str = Field(description="found, failed, cancelled or waiting.")
    matches: list[dict[str, Any]]
    error: str | None


class CreatedQueryAnswer(QueryResultAnswer):
    """A result that waits, and the job."""

    run: RunAnswer


class ShownQueryAnswer(CreatedQueryAnswer):
    """The result, the job, and how far it is."""

    progress: dict[str, float]


RESULTS: dict[str, Any] = {
    "dispatch": DispatchAnswer,
    "retrieval": RetrievalAnswer,
    "query": QueryResultAnswer,
    "job": DispatchAnswer | RetrievalAnswer,
}
SHOWN: dict[str, Any] = {
    "dispatch": ShownDispatchAnswer,
    "retrieval": ShownRetrievalAnswer,
    "query": ShownQueryAnswer,
    "job": ShownDispatchAnswer | ShownRetrievalAnswer,
}


# ---- status


class ServerAnswer(ExactAnswer):
    """The Prefect server."""

    ok: bool
    url: str | None


class WorkerAnswer(ExactAnswer):
    """A worker that is there."""

    name: str
    status: str
    last_seen: str | None


class CheckedTargetAnswer(TargetFactsAnswer):
    """A target, and its last check."""

    model_config = ConfigDict(extra="forbid")

    last_check: CheckAnswer | None


class StatusAnswer(ExactAnswer):
    """What runs, what waits, and how the targets were when they were last checked."""

    server: ServerAnswer
    workers: list[WorkerAnswer]
    queues: dict[str, int] = Field(description="How many wait, by queue.")
    targets: list[CheckedTargetAnswer]
