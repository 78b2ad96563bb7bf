"""Delivers one study to XNAT: look, import, follow it to the archive, compare what is there, report.

XNAT's word on an import is worth little by itself: 200 comes with files left out (unreadable for XNAT, or filtered),
with a session that stays in the prearchive, or under no project at all; 400 comes with a session that gets archived
a minute later. So no outcome is reported before XNAT has listed what it has of the study, file by file.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from blocks.xnat import Destination, Overwrite, XnatTarget
from protocols.net.words import clean
from protocols.xnat.answers import ArchivePlace, CatalogEntry, ImageSession, XnatRefused
from protocols.xnat.client import XnatClient
from tasks.xnat import refusals
from tasks.xnat.errors import classified
from tasks.xnat.held import Held, distinct, held_in_archive, held_in_prearchive, name_of
from tasks.xnat.names import Name, Names, XnatStudy
from tasks.xnat.refusals import RefusedWhole
from tasks.xnat.zip import ZipBody
from transfer.errors import Busy, Denied, Interrupted, Misconfigured, Rejected, Retryable, TimedOut
from transfer.outcome import ALREADY, DELIVERED, Kind, Outcome
from transfer.plan import Item, Plan, header_of
from transfer.receipt import Level, PushReport
from transfer.throttle import Throttle

POLL_S = (0.2, 5.0)  # between two looks at the prearchive: at first, and at most
COLLISION_S = 2.0  # until files of a broken import that XNAT is still writing may be sent again
GROUPS = 16  # parts that a study is imported in where it can't be in one: 1,000 files are alone after three attempts
ALONE = 64  # files of a refused import that are sent one by one at once: each import costs seconds at a real XNAT
MAX_FAILED = 3  # parts that fail one after the other before XNAT is left in peace
MAX_TRIES = 3  # of a file that XNAT fails at each time, before it is rejected
MAX_SENDS = 2  # of a study in one attempt; what is still lacking then is left to the next one


@dataclass
class _Ended:
    """How an import ended according to XNAT: in the archive, in the prearchive, or refused."""

    archived: ImageSession | None = None
    entry: CatalogEntry | None = None
    warning: str = ""
    refused: str = ""
    silent: bool = False  # XNAT did not answer the import: what is not there may still come


class _Taken(Exception):
    """Another study took this label while ours was on its way."""


@dataclass
class Importer:
    """What the imports of a push have in common."""

    client: XnatClient
    target: XnatTarget
    plan: Plan
    names: Names
    report: PushReport
    check: Callable[[], None]
    throttle: Throttle
    is_away: Callable[[Retryable], bool]  # whether an error is one of the whole server
    notes: set[str] = field(default_factory=set)
    sends: Counter[str] = field(default_factory=Counter)  # imports that were begun, by study
    listed: bool = True  # whether XNAT showed what it has of every study

    def deliver(self, study: XnatStudy, name: Name) -> None:
        """Import what XNAT lacks of a study; report every pending item's outcome.

        Raises:
            Retryable: the connection or the session was lost, or XNAT asked to wait; what was not reported is left to
                do.
            Denied, Misconfigured: nothing can be sent at all.
        """
        avoid: set[str] = set()
        while True:
            try:
                _Delivery(self, study, name).run()
            except _Taken:
                avoid.add(name.session)
                if self.sends[study.uid] >= MAX_SENDS:
                    raise Busy(f"{study.shown}: other studies keep taking its label at XNAT") from None
                name = self.names.name(study, avoid=avoid)
            else:
                return


class _Delivery:
    def __init__(self, shared: Importer, study: XnatStudy, name: Name) -> None:
        self.shared, self.study, self.name = shared, study, name
        self.client, self.target = shared.client, shared.target
        self.project = shared.target.project_id
        wanted = {item.path for item in study.pending}
        arrived = shared.report.arrived
        self.whole = distinct(item for item in study.items if item.path in wanted or arrived(shared.plan, item))
        self.rejected: dict[str, str] = {}  # by path
        self.unreadable = False  # whether XNAT has refused an import because it can't read a file
        self.already: list[Item] = []  # at XNAT, before anything is sent

    # ---- the way of a study

    def run(self) -> None:
        entry = self._wait_for_earlier()
        held = self._held(self.name.existing, entry)
        pending = list(self.study.pending)
        if held is None or self.target.overwrite is Overwrite.DELETE:
            lacking = pending
        else:
            paths = held.lacks(pending, self.whole)
            lacking = [item for item in pending if item.path in paths]
        sending = {item.path for item in lacking}
        self.already = [item for item in pending if item.path not in sending]
        if not lacking:
            self._report()
            self._verify(held)
        elif held is not None and not self._may_add():
            self.rejected = dict.fromkeys(sending, refusals.EXISTS)
            self._report()
        else:
            self._import_and_report(lacking, held or Held())

    def _import_and_report(self, lacking: list[Item], before: Held) -> None:
        """Import what XNAT lacks: at once, or in parts if that was tried before and failed, or fails now."""
        unanswered = self.shared.report.unanswered
        anew = self.target.overwrite is Overwrite.DELETE
        if len(lacking) == 1 or all(unanswered[item.path] for item in lacking):
            self._import_groups(lacking, before, anew=anew)
            return
        try:
            self._import_group(lacking, before)
        except RefusedWhole:
            self._import_groups(lacking, before, again=True, anew=anew)

    def _import_group(self, items: list[Item], before: Held) -> Held:
        """Import items and report their outcomes; return what XNAT has then, as far as that is known.

        Raises:
            RefusedWhole: XNAT refuses them together, for a reason that may lie in one of them.
        """
        ended = self._import(items)
        left = [item for item in items if item.path not in self.rejected]
        if ended is not None and not ended.refused:
            return self._confirm(ended, left, before)
        if ended is not None:  # else no file was left to be imported
            self.rejected |= dict.fromkeys((item.path for item in left), ended.refused)
        self._report()
        return before

    def _import_groups(self, items: list[Item], before: Held, *, again: bool = False, anew: bool = False) -> Held:
        """Import items in parts, so that in the end a file that XNAT refuses, or fails at, affects no other.

        Args:
            again: whether this attempt has sent them before, together, and XNAT has refused that: few are sent alone.
            anew: whether what is there is to be replaced; from the first import on, what is there has been sent.

        Raises:
            Retryable: what went wrong with a part; the next attempt makes smaller ones of it.
        """
        errors: list[Retryable] = []
        refused: list[tuple[list[Item], RefusedWhole]] = []
        failed = taken = 0  # parts: of the first since one arrived
        ordered = sorted(
            (item for item in items if item.path not in self.rejected),
            key=lambda item: (header_of(item).SeriesInstanceUID, item.path),
        )
        size = 1 if again and len(ordered) <= ALONE else max(1, -(-len(ordered) // GROUPS))
        for start in range(0, len(ordered), size):
            group = ordered[start : start + size]
            # With an earlier part XNAT may have archived what had come of this one in a broken import.
            lacking = {item.path: "" for item in group} if anew else before.lacks(group, self.whole)
            self.already += (item for item in group if item.path not in lacking)
            group = [item for item in group if item.path in lacking]
            if not group:
                self._report()
                continue
            self.shared.sends[self.study.uid] = int(again)  # counts for the same files
            try:
                with classified(self.name.hidden):
                    try:
                        before = self._import_group(group, before)
                    except RefusedWhole as exc:
                        if again:
                            refused.append((group, exc))
                            continue
                        before = self._import_groups(group, before, again=True, anew=anew)
                    anew = False
                    self.name = self.shared.names.name(self.study)  # from the first on, there is a session
                failed = 0
                taken += any(item.path not in self.rejected for item in group)
            except Retryable as exc:
                failed += 1
                if failed >= MAX_FAILED or self.shared.is_away(exc):
                    raise
                if len(group) == 1 and self.shared.report.unanswered[group[0].path] >= MAX_TRIES:
                    self.rejected[group[0].path] = f"sent {MAX_TRIES} times, alone in the end: {exc.message}"
                    self._report()
                else:
                    errors.append(exc)
        if refused and not taken and not errors and not any(exc.too_large for _, exc in refused):
            for group, said in refused:  # it is hardly a file in each of them
                self.rejected |= dict.fromkeys((item.path for item in group), said.words)
            self._report()
        elif refused:
            words = f"{len(refused)} part(s) of it refused, to be sent in smaller ones: {refused[0][1].words}"
            errors.append(Busy(f"{self.study.shown}: {words}", item=refused[0][0][0].shown))
        if errors:
            raise errors[0]
        return before

    def _may_add(self) -> bool:
        """Return True if files may be added to an existing session: `overwrite` allows it, or this dispatch made it."""
        shared = self.shared
        ours = any(
            item.path in shared.report.unanswered or shared.report.arrived(shared.plan, item)
            for item in self.study.items
        )
        return ours or self.target.overwrite is not Overwrite.NONE

    # ---- what XNAT has

    def _wait_for_earlier(self) -> CatalogEntry | None:
        """Wait while XNAT still works on an earlier import of this session; return what is in the prearchive."""
        entry = self._find()
        if entry is None or not entry.working:
            return entry
        ended = self._see_through(entry)
        if ended.warning:
            raise Busy(f"{self.study.shown}: XNAT is still at work on an earlier import of it ({entry.shown})")
        self.name = self.shared.names.name(self.study)  # what there is now
        return ended.entry

    def _find(self) -> CatalogEntry | None:
        """Return this study's entry in the prearchive, the latest if there are several."""
        try:
            entries = self.client.prearchive(self.project)
        except XnatRefused as exc:
            if exc.status in (403, 404):  # who may create sessions may not always see the prearchive
                return None
            raise
        # Of two entries made in the same millisecond the second gets a number behind its name.
        ours = [one for one in entries if one.uid == self.study.uid and one.name.startswith(self.name.session)]
        return max(ours, key=lambda one: one.timestamp, default=None)

    def _held(self, session: ImageSession | None, entry: CatalogEntry | None) -> Held | None:
        """Return what XNAT has of the study at its destination; None if nothing, and for a failed entry."""
        if session is not None:
            return held_in_archive(self.client, self.project, session)
        wanted = self.target.destination is Destination.PREARCHIVE
        if entry is not None and wanted and not entry.failed and not entry.state.startswith("RECEIVING"):
            return held_in_prearchive(self.client, entry)
        return None

    # ---- the import

    def _import(self, items: list[Item]) -> _Ended | None:
        """Send items; if XNAT can't read some, or some change, send the others a second time. None if none is left.

        Raises:
            Busy: sending twice was not enough. What has been found out is reported, so the next attempt gets further.
        """
        why = ""
        while items:
            self.shared.check()
            if self.shared.sends[self.study.uid] >= MAX_SENDS:
                self._report()
                raise Busy(f"{self.study.shown}: sent {MAX_SENDS} times in this attempt: {why}")
            try:
                return self._ended(self._send(items))
            except Rejected as exc:
                why = exc.message
                items = self._unchanged(self._without(items, exc.item, why))
            except XnatRefused as exc:
                why = self._words(exc.words)
                found = refusals.UNREADABLE.search(exc.words)
                culprit = next((item for item in items if found and name_of(item) in found.groups()), None)
                if culprit:
                    self.unreadable = True
                    items = self._without(items, culprit.shown, why)
                elif refusals.COLLISION in exc.words and self.shared.sends[self.study.uid] < MAX_SENDS:
                    self._sleep(COLLISION_S)
                else:
                    return self._after_refusal(exc, why, several=len(items) > 1)
        return None

    def _without(self, items: list[Item], shown: str | None, why: str) -> list[Item]:
        for item in items:
            if item.shown == shown:
                self.rejected[item.path] = why
        return [item for item in items if item.path not in self.rejected]

    def _unchanged(self, items: list[Item]) -> list[Item]:
        """Return the items whose files have not changed: each changed one would cost one more import."""
        for item in items:
            try:
                self.shared.plan.check(item)
            except Rejected as exc:
                self.rejected[item.path] = exc.message
        return [item for item in items if item.path not in self.rejected]

    def _send(self, items: list[Item]) -> list[ArchivePlace] | None:
        """Send a zip of these items; return None if XNAT has received all of it but doesn't answer in time."""
        names = [(item, name_of(item)) for item in items]
        destination = self.target.destination
        query = {
            "dest": f"/{destination}/projects/{self.project}",
            "project": self.project,
            "subject": self.name.subject,
            "session": self.name.session,
            "overwrite": Overwrite.NONE.value,
        }
        if self.unreadable:
            query["Ignore-Unparsable"] = "true"  # else each further one would cost an import
        if self.name.existing is not None:
            # Only ever to a session of this very study: `delete` would put another study's session aside.
            delete = self.target.overwrite is Overwrite.DELETE
            query["overwrite"] = Overwrite.DELETE.value if delete else Overwrite.APPEND.value
            if delete:
                query["overwrite_files"] = "true"
        shared = self.shared
        with ZipBody(shared.plan, names, shared.throttle, shared.check, shared.report.moved) as body:
            try:
                return self.client.import_zip(query, body)
            except TimedOut:
                if not body.finished:
                    raise
                return None  # it unpacks, builds and archives before it answers: see how far it is
            finally:
                if body.begun:
                    shared.sends[self.study.uid] += 1
                    shared.report.unanswered.update(item.path for item in items)  # until it is reported

    def _after_refusal(self, exc: XnatRefused, words: str, *, several: bool) -> _Ended:
        """Find out how a refused import ended: XNAT may be working on it nevertheless.

        Raises:
            RefusedWhole: of several files, one may be the reason.
            DispatchError: the reason is none of the files.
        """
        if exc.status in (400, 409, 500) and any(part in exc.words for part in refusals.OUR_FAULT):
            raise Misconfigured(f"XNAT doesn't understand the import: {words}") from None
        if exc.status == 404:
            raise Misconfigured(f"XNAT's import service doesn't behave as expected: {words}") from None
        if refusals.BROKEN in exc.words:
            raise Interrupted(f"{self.study.shown}: XNAT could not read the upload to its end: {words}") from None
        if refusals.COLLISION in exc.words:
            raise Busy(f"{self.study.shown}: XNAT is still writing files of an earlier import: {words}") from None
        if exc.status not in (*refusals.CONTENT, 423):
            raise exc
        if exc.status != refusals.TOO_LARGE and refusals.NO_ROOM.search(exc.words):
            raise Busy(f"{self.study.shown}: XNAT has no room: {words}") from None
        entry = self._find()
        if entry is not None and entry.working:
            return self._see_through(entry)
        if exc.status == 423 or any(part in exc.words for part in refusals.WORKING):
            raise Busy(f"{self.study.shown}: {words}") from None
        reason = self._words(self.client.log_of(entry)) if entry is not None and entry.failed else ""
        if refusals.OTHER_STUDY in exc.words + reason and self.name.existing is None:
            if entry is not None:
                self._discard(entry)
            raise _Taken
        if several and refusals.may_be_one(exc.words) and (entry is None or not entry.failed):
            raise RefusedWhole(words, too_large=exc.status == refusals.TOO_LARGE)
        return _Ended(entry=entry, refused=self._refusal(words, entry, reason))

    def _discard(self, entry: CatalogEntry) -> None:
        """Remove the entry that our own import left, before the study is sent again under another label."""
        try:
            self.client.discard(entry)
        except XnatRefused:
            self.shared.notes.add(f"{entry.shown} holds a session in conflict that could not be removed")

    def _refusal(self, words: str, entry: CatalogEntry | None, reason: str) -> str:
        state = f" (in the prearchive: {entry.state})" if entry is not None else ""
        return f"{reason}; {words}{state}" if reason and reason not in words else f"{words}{state}"

    # ---- after the import

    def _ended(self, places: list[ArchivePlace] | None) -> _Ended:
        """Follow an accepted import to its end."""
        for place in places or ():
            if place.project != self.project:
                raise Denied(
                    f"XNAT put {self.study.shown} under project {place.project!r} instead of {self.project!r} (see "
                    f"{place.shown}): the user may not create sessions there, or there is no such project"
                )
        archived = [place for place in places or () if place.kind == "archive"]
        if archived:
            label = archived[0].rest.rpartition("experiments/")[2].strip("/")
            return self._archived(label or self.name.session) or _Ended(warning="XNAT doesn't show the session")
        entry = self._find()
        ended = self._see_through(entry) if entry else self._archived(self.name.session)
        if places is None:
            if ended is None or (ended.entry and ended.entry.state.startswith("RECEIVING")):
                raise self._silence()
            ended.silent = True
        if ended is not None:
            return ended
        if places:
            return _Ended(warning=f"XNAT put it into {places[0].shown}, and no longer shows it")
        why = "XNAT took none of the files and gave no reason: an import filter or an anonymisation script refuses them"
        return _Ended(refused=why)

    def _silence(self) -> TimedOut:
        return TimedOut(f"{self.study.shown}: XNAT was silent for {self.target.idle_timeout_s:g} s after the upload")

    def _archived(self, label: str) -> _Ended | None:
        session = self.client.session(self.project, label)
        return _Ended(archived=session) if session is not None else None

    def _see_through(self, entry: CatalogEntry) -> _Ended:
        """Watch an entry of the prearchive until it is at its destination, or won't get there by itself."""
        end = time.monotonic() + self.target.archive_timeout_s
        pause = POLL_S[0]
        stays = self.target.destination is Destination.PREARCHIVE
        now: CatalogEntry | None = entry
        while True:
            if now is None:
                return self._archived(self.name.session) or _Ended(
                    refused="the session left XNAT's prearchive, and is not in the archive either"
                )
            entry = now
            if entry.failed and not entry.working:
                reason = self._words(self.client.log_of(entry))
                return _Ended(entry=entry, refused=f"{entry.state}: {reason or 'XNAT gives no reason'}")
            if stays and entry.state == "READY" and not entry.working:
                return _Ended(entry=entry)
            if time.monotonic() >= end:
                waited = f"after {self.target.archive_timeout_s:g} s"
                return _Ended(entry=entry, warning=f"in XNAT's prearchive, not archived {waited}: {entry.state}")
            self._sleep(pause)
            pause = min(2 * pause, POLL_S[1])
            now = self.client.entry(entry)

    def _confirm(self, ended: _Ended, sent: list[Item], before: Held) -> Held:
        """Compare what XNAT has with what was sent, and report outcomes; return what it has."""
        try:
            held = self._held(ended.archived, None)
            if held is None and ended.entry is not None:
                held = held_in_prearchive(self.client, ended.entry)
        except XnatRefused as exc:
            if exc.status not in (403, 404):
                raise
            held = None
        if held is None:
            self.shared.listed = False
            self.shared.notes.add("XNAT doesn't let this user list the files of a session")
            self._report(sent, ended.warning)
            return before
        known = {item.path for item in (*sent, *self.already)}
        study = [i for i in self.whole if i.path in known or self.shared.report.arrived(self.shared.plan, i)]
        lacking = held.lacks(sent, study, before)
        if lacking and ended.silent:
            raise self._silence()
        for path, seen in lacking.items():
            self.rejected[path] = f"XNAT left it out: {seen}"
        self._report([item for item in sent if item.path not in lacking], ended.warning)
        self._verify(held)
        return held

    def _verify(self, held: Held | None) -> None:
        """Verify that what was delivered earlier is still there; revoke what isn't."""
        done = [item for item in self.whole if item.path in self.shared.plan.done]
        if self.target.verify is Level.ACCEPTED or not done:
            return
        if held is None:
            lacking = {item.path: "XNAT has no session of the study" for item in done}
        else:
            lacking = held.lacks(done, self.whole)
        for item in done:
            if seen := lacking.get(item.path):
                self.shared.report.revoke(item, f"delivered earlier, but not there: {seen}")

    def _report(self, delivered: Iterable[Item] = (), warning: str = "") -> None:
        """Report pending items that XNAT has."""
        shared = self.shared
        outcomes = {item.path: ALREADY for item in self.already}
        fine = Outcome(Kind.WARNING, warning) if warning else DELIVERED
        outcomes |= dict.fromkeys((item.path for item in delivered), fine)
        outcomes |= {path: Outcome(Kind.REJECTED, why) for path, why in self.rejected.items()}
        for item in self.study.pending:
            if item.path in outcomes and item.path not in shared.report.outcomes:
                shared.report(item, outcomes[item.path])

    # ---- small things

    def _words(self, words: str) -> str:
        return clean(words, self.name.hidden)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.shared.check()
            time.sleep(min(0.2, left))
