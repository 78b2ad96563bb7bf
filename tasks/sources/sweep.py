"""A sweep: one look through a source. What has been delivered is settled, what is ready is dispatched.

A unit's row is saved before its run is created, with the mark of the list that names it. A sweep that is killed in
between leaves a row without a run, for which the next one creates the run: the mark is its idempotency key.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import repeat
from typing import Any

from blocks import Source, Target
from blocks.dicom_source import DicomSource
from blocks.inbox import InboxSource, Late
from blocks.list_source import ListSource
from blocks.source import After
from tasks.happened import happened
from tasks.sources import after, again, asked, beside, confirming, inbox, units, writers
from tasks.sources.swept import Swept
from tasks.sources.units import Unit
from tasks.sources.ways import Dispatching, EndedRun, failure
from transfer import unitlist
from transfer.errors import Cancelled, DispatchError, Misconfigured, Permanent
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.oserrors import passes, words_of
from transfer.plan import Origin
from transfer.sourcebook import UnitRow, UnitState, is_older, unit_of
from transfer.unitlist import FileFacts, ListedUnit

FLOOD = 250  # units of one dispatch: its receipts stay handy, and one that fails is soon seen
DAY_S = 86_400.0
KEPT_S = 30 * DAY_S  # for which it is remembered what became of units that are there no more
OPEN_S = 60.0  # after which a unit is looked at again that somebody writes to; a watch sees sooner that this has ended
# For which files are moved or deleted before a watched source is looked through: to a NAS it may take hours.
LET_GO_S = 30.0
AGAIN_S = 300.0  # and one whose files a full disk, or a share that is away, kept from going
ARRIVED = (UnitState.DELIVERED, UnitState.DONE)
ENDED = (UnitState.DONE, UnitState.FAILED, UnitState.HELD)
AHEAD = ":ahead"  # after the fingerprint of a unit whose times lie in the future
LATER = "tried again with the next sweep: "
LATE = "files came after it was dispatched; `talaria source retry` dispatches it again"


@dataclass
class _Batch:
    """Units that become one dispatch; `older` are the rows of dispatches that some of them are under way by as well."""

    mark: str
    writer: unitlist.Writer
    parameters: dict[str, Any]
    rows: list[UnitRow] = field(default_factory=list)
    older: list[UnitRow] = field(default_factory=list)


class Sweep:
    """One look through a source.

    Args:
        targets: those that are saved, by name.
        check: called between units and files; may raise to stop.
    """

    def __init__(
        self,
        source: Source,
        targets: Mapping[str, Target],
        home: Home,
        ledger: Ledger,
        dispatching: Dispatching,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.source, self.targets, self.home, self.ledger = source, targets, home, ledger
        self.book, self.dispatching, self.check = ledger.sources, dispatching, check
        self.done = Swept()
        self._put_back = dict[str, FileFacts]()  # what files of the list at hand are now that could not go
        self._open = dict[str, str]()  # units of whose files some are to go with a later sweep, with the reason
        self._resting = set[str]()  # runs that wait, as for a target that does not answer
        self._until, self._tried = math.inf, 0  # `time.monotonic` until which units' files are let go; units so far
        self._older = set[str]()  # units that an older dispatch is to send as well
        self._read: tuple[str, dict[str, ListedUnit]] = "", {}  # the list that was read last, by its mark

    async def run(self, *, looks: bool = True) -> Swept:
        """Settle what has ended, then dispatch what is ready, if it is also to look for that.

        Raises:
            DispatchError: the source can't be looked through.
        """
        runs = await self.settle()
        if looks and runs:
            self._resting = await self.dispatching.resting(runs)
        for batch in await asyncio.to_thread(self._look) if looks else ():
            self.check()  # the next sweep creates what is left
            await self._create(batch.mark, batch.parameters, len(batch.rows))
        if units.reports(self.source):
            runs = self.book.under_way().get(self.source.name, set())
            waits = await self.dispatching.waits([run for run in runs if run])
            await asyncio.to_thread(units.report, self.source, self.ledger, waits)
        return self.done

    # ---- what was dispatched before

    async def settle(self) -> set[str]:
        """See what has become of dispatched units, and of the files of delivered ones; return the runs that go on."""
        rows = self.book.units(self.source.name, UnitState.DISPATCHED, UnitState.FAILED, UnitState.DELIVERED)
        if isinstance(self.source, InboxSource) and self.source.watch:  # another one is looked through when it is said
            self._until = time.monotonic() + LET_GO_S
        by_run: dict[str, list[UnitRow]] = defaultdict(list)
        failed: dict[str, list[UnitRow]] = defaultdict(list)
        delivered = []
        for row in rows.values():
            if row.state is UnitState.DELIVERED:
                delivered.append(row)
                if row.detail.startswith(LATER):
                    self._open[row.unit] = row.detail
            elif row.state is UnitState.FAILED:
                failed[row.run].append(row)
            else:
                by_run[row.run].append(row)
        anew = self.book.run_again().get(self.source.name, set()) if failed else set()
        anew |= set(await self.dispatching.going([run for run in failed if run]) if failed else ())
        for run in anew & failed.keys():
            by_run[run] += failed[run]
        for mark in {row.batch for row in by_run.pop("", ())}:
            await self._create_again(mark)
        ended = await self.dispatching.ended(list(by_run)) if by_run else {}
        newest, self._older = beside.without_older(self.book, self.source.name, by_run, ended)
        arrived = list[UnitRow]()
        for run, end in ended.items():
            arrived += await asyncio.to_thread(self._settle, newest[run], end)
        # Of some a sweep was killed before it had dealt with their files, or could not.
        before = await self.dispatching.ended(list({row.run for row in delivered})) if delivered else {}
        lists: dict[tuple[str, str, bool], list[UnitRow]] = defaultdict(list)
        for row, killed in (*zip(delivered, repeat(True)), *zip(arrived, repeat(False))):
            lists[row.run, row.batch, killed].append(row)
        # What was tried last is the last again: else it would keep the others waiting, where each takes its time.
        for (run, _, killed), some in sorted(lists.items(), key=lambda one: min(row.time for row in one[1])):
            end = ended.get(run) or before.get(run, EndedRun(gone=True))
            await asyncio.to_thread(self._let_go, sorted(some, key=lambda row: row.time), end, killed=killed)
        return by_run.keys() - ended.keys()

    def _settle(self, rows: list[UnitRow], end: EndedRun) -> list[UnitRow]:
        """Save what became of the units of a run that has ended; return the rows of those that were delivered."""
        if end.gone:  # its run was removed: what has arrived is in the ledger, the rest is dispatched again
            self.book.forget(self.source.name, [row.unit for row in rows])
            return []
        arrived, failed, new = list[UnitRow](), list[UnitRow](), list[UnitRow]()
        for row in rows:
            study, (mark, tries) = end.study(row.unit), again.parted(row.fingerprint)
            why, is_first = failure(study, end.message), row.state is not UnitState.FAILED
            if not why:
                arrived.append(row.now(UnitState.DELIVERED, fingerprint=mark))
            elif is_first and tries < again.MOST and again.may_pass(study, units.root(self.source)):
                once_more = again.marked(mark, tries + 1)
                failed.append(row.now(UnitState.FAILED, f"{why}; {again.WORDS}", fingerprint=once_more))
                new += [] if tries else failed[-1:]
            elif is_first or not tries:
                failed.append(row.now(UnitState.FAILED, why, fingerprint=mark))
                new += failed[-1:] if is_first else []
            else:  # somebody has retried its run meanwhile: that this was seen is said by its time alone
                failed.append(row)
        self.book.save(self.source.name, [*failed, *arrived])
        if new:
            self.done.counts[UnitState.FAILED] += len(new)
            count = "1 unit was" if len(new) == 1 else f"{len(new)} units were"
            self._stuck(f"{count} not delivered", new[0].run, new)
        return arrived

    def _let_go(self, rows: list[UnitRow], end: EndedRun, *, killed: bool) -> None:
        """Move or delete the files of units of one list that were delivered, if every target has confirmed them.

        Args:
            killed: whether another sweep has begun with it: it may have left files under our name.
        """
        name, done = self.source.name, UnitState.DONE
        folder, leave = units.root(self.source), self.source.leaving.after is After.LEAVE
        if not folder or (leave and not killed):
            self.done.counts[done] += len(rows)
            self.book.save(name, [row.now(done, batch="") for row in rows])
        elif not self._is_for_the_next(rows[0]):
            try:
                self._let_go_of(rows, rows[0].batch, folder, end, leave=leave)
            finally:
                if self._put_back:
                    unitlist.amend(unitlist.place(self.home, name, rows[0].batch), self._put_back)
                    self._put_back.clear()

    def _is_for_the_next(self, row: UnitRow) -> bool:
        """Return True if the time for letting files go is over, so that the next sweep goes on with this unit."""
        if time.monotonic() <= self._until or not self._tried:
            return False
        if self.done.counts[UnitState.DONE] or not row.detail.startswith(LATER):
            self.done.next = time.time()  # else what was tried is the next, in its own time
        return True

    def _let_go_of(self, rows: list[UnitRow], mark: str, folder: str, end: EndedRun, *, leave: bool) -> None:
        """Do so with the units of one list."""
        name, done = self.source.name, UnitState.DONE
        listed, kept = self._listed(mark), unitlist.kept(unitlist.place(self.home, name, mark)) or {}
        for row in rows:
            self.check()
            if self._is_for_the_next(row):
                return
            self._tried += 1
            if row.unit in self._older and not leave:
                now: UnitRow | None = self._goes_later(row, beside.WORDS, "")
            elif row.unit in listed:
                now = self._finished(row, folder, listed[row.unit], end.study(row.unit) or {}, kept)
            else:  # the list is gone: nobody knows what the files were
                words = "" if leave else "its files stay: the list of them is gone"
                now = row.now(done, words, batch="")
            if now is None or now.state is done:
                self._open.pop(row.unit, None)
            if now is None:
                self.book.forget(name, [row.unit])
            else:
                self.done.counts[done] += now.state is done
                self.book.save(name, [now])

    def _finished(
        self, row: UnitRow, folder: str, unit: ListedUnit, study: Mapping[str, Any], parameters: Mapping[str, Any]
    ) -> UnitRow | None:
        """Move or delete the files of one unit; return its row after that, or None if it is to go to other targets too.

        Raises:
            DispatchError: the source can't be looked through, or the sweep was stopped.
        """
        done = UnitState.DONE
        try:
            if self.source.leaving.after is After.LEAVE:
                after.restore(folder, unit)
                return row.now(done, batch="")
            confirmed = confirming.confirmed(self.source, self.targets, self.ledger, unit, study, parameters)
            left = after.finish(self.source, folder, unit, row.fingerprint, confirmed, self.check)
            self._put_back |= left.put_back if left.passing else {}
        except Cancelled:
            raise
        except (DispatchError, OSError) as exc:
            units.root(self.source)  # raises if all of the source is away, and not only something of this unit
            with suppress(DispatchError, OSError):
                after.restore(folder, unit)
            if isinstance(exc, OSError):
                words, later = words_of(exc), passes(exc)
            else:
                words, later = exc.message, not isinstance(exc, Permanent)
            if later:
                return self._goes_later(row, words, words)
            self._stays(words)
            return row.now(done, f"its files stay: {words}", batch="")
        if after.NOT_CONFIRMED in left.kept and not asked.has_same_targets(self.source, parameters):
            return None  # they were edited meanwhile, and nobody would send it to those, nor let it go
        if left.passing:  # with its fingerprint, and its list, as they were: what has gone counts when all is done
            return self._goes_later(row, left.words, left.failed)
        if left.failed or (left.kept and isinstance(self.source, DicomSource)):  # in whose folder nobody looks
            self._stays(left.failed or next(iter(left.kept)))
        return row.now(done, left.words, batch="", fingerprint=left.fingerprint)

    def _goes_later(self, row: UnitRow, words: str, failed: str) -> UnitRow:
        """Return the row of a unit whose files go with a later sweep; say so of the first one, if something failed.

        Args:
            failed: what the file system said; "" if somebody just writes to a file.
        """
        detail = f"{LATER}{words}"
        told = {*self._open.values()}
        self._open[row.unit] = detail
        self._wait(time.time() + (AGAIN_S if failed else OPEN_S))
        if failed and not any(failed in one for one in told):
            self._stuck(f"files of delivered units stay for now: {failed}", "", [row])
        return row.now(row.state, detail)

    def _stays(self, failed: str) -> None:
        """Say, once a day, that files of delivered units can't be moved or deleted."""
        words = f"files of delivered units stay, which `talaria source show` lists: {failed}"
        self._stuck(words, f"stays/{failed}/{datetime.now(UTC).date()}", [])

    def _listed(self, mark: str) -> dict[str, ListedUnit]:
        try:
            return {one.key: one for one in unitlist.read(unitlist.place(self.home, self.source.name, mark))}
        except DispatchError:
            return {}

    # ---- what is there

    def _look(self) -> list[_Batch]:
        """Look through the source, write down what is ready, and return it."""
        source = self.source
        known, now = self.book.units(source.name), time.time()
        ran = Counter(unit_of(key) for key in known if is_older(key))
        open_, whole = dict[tuple[Any, ...], _Batch](), list[_Batch]()
        held: dict[str, list[UnitRow]] = defaultdict(list)
        seen, coming = set[str](), set[str]()  # units that are there, and those that are, or will be, under way
        try:
            for unit in units.units(source, self.ledger, self.check):
                seen.add(unit.key)
                row = known.get(unit.key)
                older = None
                if row and row.state is UnitState.DISPATCHED:
                    coming.add(unit.key)
                    older = beside.older(unit, row, ran[unit.key], self._resting, now, source)
                    if older is None:
                        continue
                if row and (unit.key in self._open or again.is_known(row, unit.fingerprint, unit.newest, now)):
                    continue
                coming.add(unit.key)
                if row and row.state is UnitState.DELIVERED and self._has_begun(row):
                    continue
                unread = row if again.is_tried(row, unit.fingerprint) else None
                if unread and abs(now - unread.time) < AGAIN_S:  # of the ledger's clock, which may be ahead of ours
                    self._wait(unread.time + AGAIN_S)
                    continue
                if unit.ahead and not unread and not self._has_stayed(unit, row, now):
                    if row is None or row.fingerprint != f"{unit.fingerprint}{AHEAD}" or row.time > now:
                        marked = replace(unit, fingerprint=f"{unit.fingerprint}{AHEAD}")
                        held[unit.ahead].append(self._held(marked, row, unit.ahead))
                    continue
                if not unit.ahead and not self._is_ready(unit, row, now):
                    continue
                if coming.intersection(unit.after):
                    self._wait(now + OPEN_S)  # the end of their run is seen sooner
                    continue
                late = row and (older or row.state in ARRIVED or (row.state is UnitState.HELD and row.run))
                policy = getattr(source, "late", Late.APPEND)
                force = policy is Late.RESEND and bool(late or again.was_by_force(self.home, source.name, row))
                if unit.problem or (late and policy is Late.HOLD):
                    why = unit.problem or LATE
                    coming.discard(unit.key)
                    held[why].append(self._held(unit, row, why))
                    continue
                listed = self._as_listed(unit)
                if listed is None:
                    self._wait(now)
                    continue
                if writers.any_is_written(listed.within, (one.path for one in listed.files)):
                    self._wait(now + OPEN_S)
                    continue
                key = unit.targets, unit.origin, force
                batch = open_.get(key) or open_.setdefault(key, self._batch(*key))
                batch.writer.add(listed)
                made = self._row(unit, UnitState.DISPATCHED, "", batch.mark)
                batch.rows.append(replace(made, fingerprint=unread.fingerprint) if unread else made)
                batch.older += [older] if older else []
                if len(batch.rows) >= FLOOD:
                    whole.append(self._close(open_.pop(key)))
            self.check()  # it may have been left meanwhile, while a share was away
            whole += [self._close(one) for one in open_.values()]
        except BaseException:
            for one in open_.values():
                one.writer.abandon()
            raise
        for why, rows in held.items():
            # Their rows keep it from being said again, until what is wrong has passed, and comes back; those of the
            # future are saved more than once.
            mark = rows[0].fingerprint
            count = "1 unit is" if len(rows) == 1 else f"{len(rows)} units are"
            self._stuck(f"{count} held: {why}", mark if mark.endswith(AHEAD) else "", rows)
            self.book.save(source.name, rows)
            self.done.counts[UnitState.HELD] += len(rows)
        self._tidy(known, seen, now)
        return whole

    def _is_ready(self, unit: Unit, row: UnitRow | None, now: float) -> bool:
        settled = unit.newest + float(getattr(self.source, "settle_s", 0.0))
        if unit.complete or settled <= now:
            return True
        latest = self._latest(unit, row, now)
        if latest > now:
            self._wait(min(settled, latest))
        return latest <= now

    def _latest(self, unit: Unit, row: UnitRow | None, now: float) -> float:
        """Return when a unit goes though more still comes for it, in seconds since the epoch; infinity for never."""
        if not isinstance(self.source, DicomSource):  # of other files nobody knows that they are whole
            return math.inf
        first = unit.oldest
        if row and first <= row.time:  # it was dispatched before, and what could not be delivered lies there still
            came = (one.ctime_ns / 1e9 for one in inbox.facts_of(unit, self.source)[0])
            first = min((one for one in came if one > row.time), default=now)
        return first + self.source.longest_s

    def _has_stayed(self, unit: Unit, row: UnitRow | None, now: float) -> bool:
        """Return True if a unit whose times lie in the future has stayed as it is since a sweep saw it so."""
        settle_s = float(getattr(self.source, "settle_s", 0.0))
        since = row.time if row and row.fingerprint == f"{unit.fingerprint}{AHEAD}" else now
        if since != now and since + settle_s <= now:
            return True
        self._wait(min(since, now) + settle_s)
        return False

    def _has_begun(self, row: UnitRow) -> bool:
        """Return True if a sweep that was stopped or killed has begun to move a unit; a later one goes on."""
        if row.batch != self._read[0]:
            self._read = row.batch, self._listed(row.batch)
        return row.unit in self._read[1] and after.has_begun(self._read[1][row.unit])

    def _wait(self, until: float) -> None:
        self.done.waiting += 1
        self.done.next = min(self.done.next or until, until)

    def _as_listed(self, unit: Unit) -> ListedUnit | None:
        """Return a unit with the facts of its files; None if it has changed since it was looked at."""
        folder = units.root(self.source)
        if not folder:
            return ListedUnit(unit.key, unit.paths)
        facts, mark = inbox.facts_of(unit, self.source)
        return ListedUnit(unit.key, unit.paths, folder, tuple(facts)) if mark == unit.fingerprint else None

    def _row(self, unit: Unit, state: UnitState, detail: str, batch: str = "") -> UnitRow:
        return UnitRow(unit.key, unit.name, state, unit.fingerprint, unit.files, batch, "", detail)

    def _held(self, unit: Unit, row: UnitRow | None, why: str) -> UnitRow:
        """Return the row of a unit that is held; it names the run that has dispatched it before, if there was one."""
        before = row.run if row and row.state is not UnitState.FAILED else ""
        return replace(self._row(unit, UnitState.HELD, why), run=before)

    def _batch(self, targets: tuple[str, ...], origin: Origin, force: bool) -> _Batch:
        if not targets:
            raise Misconfigured("no route leads to a target")
        mark = uuid.uuid4().hex
        writer = unitlist.Writer(unitlist.place(self.home, self.source.name, mark))
        return _Batch(mark, writer, asked.parameters(self.source, writer.path, targets, origin, force=force))

    def _close(self, batch: _Batch) -> _Batch:
        batch.writer.close()
        if isinstance(self.source, ListSource) and self.source.query:
            numbers = (row.unit for row in batch.rows)
            batch.parameters = asked.of_numbers(self.source.query, numbers, batch.parameters)
        unitlist.keep(batch.writer.path, batch.parameters)
        self.book.save(self.source.name, [*batch.rows, *batch.older])
        return batch

    async def _create(self, mark: str, parameters: Mapping[str, Any], count: int) -> None:
        run = await self.dispatching.create(mark, parameters)
        self.book.run_created(self.source.name, mark, run)
        self.done.runs[run] = self.done.runs.get(run, 0) + count

    async def _create_again(self, mark: str) -> None:
        """Create the run of a batch of which nobody knows whether it was created, if its source would still ask for it.

        Else its units are chosen anew: to those whom they were to go to before somebody edited the source, none goes.
        """
        rows = [row for row in self.book.units(self.source.name, UnitState.DISPATCHED).values() if row.batch == mark]
        parameters = unitlist.kept(unitlist.place(self.home, self.source.name, mark))
        if parameters is None or not asked.is_still_so(self.source, parameters, self._listed(mark).values()):
            failed = [row.now(UnitState.FAILED) for row in rows]
            again.forget(self.home, self.book, self.source.name, failed)
        else:
            await self._create(mark, parameters, len(rows))

    def _tidy(self, known: Mapping[str, UnitRow], seen: set[str], now: float) -> None:
        """Forget units that are long gone, and lists that nobody needs."""
        name = self.source.name
        old = [
            row.unit
            for row in known.values()
            if row.state in ENDED and row.unit not in seen and row.time < now - KEPT_S
        ]
        if old and inbox.UNREAD not in seen:  # else nobody knows now what is there
            self.book.forget(name, old)
        unitlist.tidy(self.home, name)
        there = unitlist.batches(self.home, name)
        if there:
            used = {row.batch for row in self.book.units(name).values()}
            for mark, path in there.items():
                if mark not in used:
                    unitlist.remove(path)

    def _stuck(self, words: str, key: str, rows: Collection[UnitRow]) -> None:
        about = {"source": self.source.name, "units": len(rows)}
        happened(self.ledger, "source.stuck", about, f"{self.source.name}/{key}" if key else "", words)
