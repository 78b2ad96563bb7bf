"""Stores instances into a folder that others query, and copies requested instances out of one.

    <root>/<study>/<series>/<SOP instance>.dcm       UIDs, made safe as names
    <root>/.incoming-<dispatch id>/<owner>/          what is being written; gone when the dispatch has arrived

An instance appears under its name when it is whole and flushed to disk, by one rename; the same instance again changes
nothing, another version of it takes its place.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from imaging.header import UID, Damaged, Header, NotDicom, read_header
from protocols.dicomfolder.folder import DicomFolder, HeldInstance
from protocols.files import filesystem as fs
from protocols.files import partial
from protocols.files.alike import same
from protocols.files.durable import settle
from protocols.files.incoming import PIECE_BYTES, Incoming, Place, Style
from protocols.files.instances import held
from protocols.files.tree import Tree, parent
from transfer.content import copy_bytes, same_content
from transfer.duplicates import Duplicates
from transfer.errors import Cancelled, Denied, Permanent, Rejected
from transfer.fanout import each
from transfer.layout import sanitised
from transfer.oserrors import FULL, ITEM_ERRORS
from transfer.outcome import ALREADY, DELIVERED, Kind, Outcome
from transfer.plan import Item, Plan, header_of
from transfer.receipt import Level, PushReport
from transfer.throttle import Throttle

NO_FILE = "what has its name there is a link or a device, not a file"
REPLACED = Outcome(Kind.WARNING, "replaced another version of this instance")


# ---- into the folder


class FolderPush(Incoming):
    """One push into a folder.

    Args:
        tree: the folder.
        owner: name of the target, which keeps its push apart from another target's into the same folder.

    Attributes:
        notes: why a level was not reached, for people.
    """

    def __init__(self, tree: Tree, owner: str, plan: Plan, report: PushReport, style: Style) -> None:
        self.notes: list[str] = []
        self._all, self._owner = tree, owner
        self.places = _places(plan, tree, owner)
        super().__init__(plan, _where(plan, self.places), report, style)

    def kept(self, item: Item) -> str:
        return f"{self.where[item.path].files}/{_name(item)}"

    def final(self, item: Item) -> str:
        """Return where the instance shall be, relative to the folder."""
        return f"{self.where[item.path].final}/{_name(item)}"

    def run(self, level: Level) -> Level:
        """Store the pending items; return the level of verification that was reached for the whole plan.

        Raises:
            Denied: a link leads out of the folder.
            DispatchError, OSError: as `Incoming.bring` does; what is whole by then stays for the next attempt, unless
                there will be none.
        """
        try:
            self._stay_inside()
            proven: set[str] = set()
            duplicates = Duplicates(self.plan, self.report)
            self._refuse_homeless()
            items = [item for item in duplicates.begin() if item.path not in self.report.outcomes]
            while items:
                here = self.bring([item for item in items if not self._already(item)])
                if level is Level.PROVEN:
                    self.prove(here)
                    proven |= {item.path for item in here}
                self._publish(here)
                self.places = _places(self.plan, self._all, self._owner)  # as they are before anything is written
                self.where = _where(self.plan, self.places)
                items = list(duplicates.settle())
            reached = self._verify(level, proven)
            self.settle_aside()
        except (Cancelled, Permanent):
            self.discard()  # nobody will go on with it
            raise
        self.discard()
        return reached

    def discard(self) -> None:
        """Remove everything that lies beside the final names."""
        for place in self.places.values():
            place.discard()

    def _stay_inside(self) -> None:
        for place in self.places.values():
            if place.tree.is_linked(place.final):
                raise Denied(f"a symbolic link leads from {place.final} to elsewhere")

    def _refuse_homeless(self) -> None:
        """Reject instances that don't name their study and series."""
        for item in self.plan.pending:
            if not (header_of(item).StudyInstanceUID and header_of(item).SeriesInstanceUID):
                self.report(item, Outcome(Kind.REJECTED, "has no Study or Series Instance UID"))

    def _already(self, item: Item) -> bool:
        """Report ALREADY if the instance is there, the same to the last byte; return whether it is."""
        try:
            with self._all.opened(self.final(item)) as there:
                info = os.fstat(there)
                if not stat.S_ISREG(info.st_mode) or info.st_size != item.size:
                    return False
                with self.plan.open(item) as fd:
                    if not same_content(fd, there, self.report.check):
                        return False
        except (FileNotFoundError, NotADirectoryError, PermissionError, Rejected):
            return False
        except OSError as exc:
            if exc.errno in ITEM_ERRORS or exc.errno == errno.ENXIO:  # a link, a socket
                return False
            raise
        self.report(item, ALREADY)
        return True

    def _publish(self, items: list[Item]) -> None:
        """Give whole files their final names, series by series, and report them as arrived."""
        for place in self.places.values():
            mine = [item for item in items if self.where[item.path] is place]
            if not mine:
                continue
            self.report.check()
            tree = place.tree
            try:
                new = tree.make_folders(place.final, "", self.style.dir_mode, self.style.group)
            except OSError as exc:
                if exc.errno not in ITEM_ERRORS:
                    raise
                for item in mine:  # other series are not concerned
                    self.report(item, Outcome(Kind.REJECTED, f"{ITEM_ERRORS[exc.errno]}: {_obstacle(place)}"))
                continue
            outcomes = [self._rename(item) for item in mine]
            moved = (item for item, one in zip(mine, outcomes, strict=True) if one in (DELIVERED, REPLACED))
            self.report.unanswered.update(item.path for item in moved)
            for folder in {place.final, *map(parent, new)}:
                tree.flush(folder)
            for item, outcome in zip(mine, outcomes, strict=True):
                if outcome is not None:
                    self.report(item, outcome)

    def _rename(self, item: Item) -> Outcome | None:
        """Give a file its final name; None if the file system fails at it, perhaps at it alone."""
        tree, kept, final = self._all, self.kept(item), self.final(item)
        try:
            if tree.move_file(kept, final):
                return DELIVERED
            if not stat.S_ISREG(mode := tree.stat(final).st_mode):
                return Outcome(Kind.REJECTED, ITEM_ERRORS[errno.EISDIR] if stat.S_ISDIR(mode) else NO_FILE)
            with tree.opened(kept) as file, tree.opened(final) as there:
                if same_content(file, there, self.report.check):
                    return ALREADY
            tree.rename(kept, final)
        except OSError as exc:
            if exc.errno in ITEM_ERRORS:
                return Outcome(Kind.REJECTED, ITEM_ERRORS[exc.errno])
            self.set_aside(item, exc)
            return None
        return REPLACED

    def _verify(self, level: Level, proven: set[str]) -> Level:
        """Verify that all that has arrived is there, by size or checksum; revoke what isn't."""
        if level is Level.ACCEPTED:
            return level
        reached = level
        for item in self.plan.items:
            if not self.report.arrived(self.plan, item):
                continue
            self.report.check()
            try:
                info = self._all.stat(self.final(item))
                size = info.st_size if stat.S_ISREG(info.st_mode) else 0
                if size != item.size:
                    self.report.revoke(item, f"it has {size} bytes there instead of {item.size}")
                elif (
                    level is Level.PROVEN and item.path not in proven and not self.same_checksum(item, self.final(item))
                ):
                    self.report.revoke(item, "its checksum there is not that of the file that was sent")
            except OSError as exc:
                if isinstance(exc, PermissionError):
                    reached = Level.LISTED
                    continue
                if exc.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
                self.report.revoke(item, "it was delivered, but is not there any more")
            except Rejected:
                reached = Level.LISTED
        if reached is not level:
            self.notes.append("not proven: some files that were there before can't be read again")
        return reached


def _folder(item: Item) -> str:
    header = header_of(item)
    return f"{sanitised(header.StudyInstanceUID)}/{sanitised(header.SeriesInstanceUID)}"


def _obstacle(place: Place) -> str:
    """Return the first part of a folder's name that is no folder: it is made of UIDs, which messages may hold."""
    parts = place.final.split("/")
    return next(
        (name for end in range(1, len(parts)) if not place.tree.is_folder(name := "/".join(parts[:end]))), place.final
    )


def _places(plan: Plan, tree: Tree, owner: str) -> dict[str, Place]:
    """Return the places of the plan's series, by folder."""
    folders = dict.fromkeys(_folder(item) for item in plan.items)
    return {folder: Place(tree, folder, f".incoming-{plan.dispatch_id}", owner) for folder in folders}


def _where(plan: Plan, places: dict[str, Place]) -> dict[str, Place]:
    return {item.path: places[_folder(item)] for item in plan.items}


def _name(item: Item) -> str:
    return f"{sanitised(header_of(item).SOPInstanceUID)}.dcm"


# ---- out of the folder


class Fetched(NamedTuple):
    """What came out of a folder.

    Attributes:
        missing: instances that did not come, as others of their UIDs did.
        notes: about instances that are in several series, for people.
    """

    plan: Plan
    missing: int
    notes: tuple[str, ...]


def fetch(
    folder: DicomFolder,
    instances: Iterable[HeldInstance],
    into: Path,
    report: PushReport,
    *,
    threads: int,
    bandwidth_limit: int | None = None,
) -> Fetched:
    """Copy instances into a folder, as `<SOP instance UID>.dcm`; return them as a plan whose outcomes are reported.

    What is there already is not copied again. An instance that is in several series comes once, if it is the same in
    all of them. Series by series: if the retrieval is to pause, the series after the current one have no outcome.

    Raises:
        DiskFull, Misconfigured: `into` is full, or can't be written to.
        Cancelled, OSError: what came until then is in the folder, and has been reported.
    """
    with partial.writing(into):
        into.mkdir(parents=True, exist_ok=True)
        partial.sweep(into)
    unique: dict[str, HeldInstance] = {}
    seconds: list[HeldInstance] = []
    for one in instances:
        report.check()
        if unique.setdefault(one.SOPInstanceUID, one) is not one:
            seconds.append(one)
    series: dict[str, list[HeldInstance]] = {}
    for one in unique.values():
        series.setdefault(one.SeriesInstanceUID, []).append(one)
    throttle = Throttle(bandwidth_limit)
    items: list[Item] = []
    for some in series.values():
        if report.pausing.is_set():
            items.extend(map(_item, some))
        else:
            each(
                some,
                lambda one: items.append(_bring(folder, one, into, report, throttle)),
                min(threads, len(some)),
                "fetch",
            )
    plan = Plan("", into, tuple(sorted(items, key=lambda item: item.path)))
    settle(into, [item.path for item in items if report.arrived(plan, item)], report.check)
    if report.pausing.is_set():
        return Fetched(plan, 0, ())
    return Fetched(plan, *_compared(folder, seconds, folder.older, unique, into, report))


def _compared(
    folder: DicomFolder,
    seconds: Iterable[HeldInstance],
    older: Iterable[HeldInstance],
    firsts: dict[str, HeldInstance],
    into: Path,
    report: PushReport,
) -> tuple[int, tuple[str, ...]]:
    """Compare instances whose UIDs stand for those of another series with these, as they came.

    Returns:
        How many are not the same, and what there is to say of them and of the others.
    """
    alike, others = Counter[str](), Counter[tuple[str, str]]()
    for one in seconds:
        series, other = one.SeriesInstanceUID, firsts[one.SOPInstanceUID].SeriesInstanceUID
        if _serves(folder, one, into / _item(one).path, report):
            alike[series] += 1
        else:
            others[series, other] += 1
    notes = [
        f"series {one}: {count} instances are in another series as well, and come once" for one, count in alike.items()
    ]
    notes += [
        f"series {one}: {count} instances were not taken: another instance of the same UID is in series {other}"
        for (one, other), count in others.items()
    ]
    # Of several files of one series with one UID, the one that was written last stands for all; see `instances`.
    differ = Counter(one.SeriesInstanceUID for one in older if not _serves(folder, one, into / _item(one).path, report))
    notes += [
        f"series {one}: {count} files were not taken: each holds another instance of a UID than a later file does"
        for one, count in differ.items()
    ]
    return others.total(), tuple(notes)


def _serves(folder: DicomFolder, one: HeldInstance, final: Path, report: PushReport) -> bool:
    """Return True if a file that came is an instance which another series of the folder has as well."""
    there = held(final, one.SOPInstanceUID)
    if there is None:
        return True  # it did not come, which its own outcome says
    with suppress(OSError, Rejected, NotDicom, Damaged), final.open("rb") as file:
        fd = folder.open(one)
        try:
            header = read_header(fd, os.fstat(fd).st_size)
            return same(file.fileno(), header_of(there), fd, header, report.check)
        finally:
            os.close(fd)
    return False


def _item(one: HeldInstance) -> Item:
    uid = one.SOPInstanceUID
    header = Header.of(one.SOPClassUID, uid, one.TransferSyntaxUID, one.StudyInstanceUID, one.SeriesInstanceUID, 0)
    return Item(f"{sanitised(uid)}.dcm", 0, 0, header)


def _bring(folder: DicomFolder, one: HeldInstance, into: Path, report: PushReport, throttle: Throttle) -> Item:
    """Copy one instance, and report its outcome."""
    report.check()
    uid, item = one.SOPInstanceUID, _item(one)
    final = into / item.path
    there = held(final, uid)
    if there is not None and there.size == one.size and _is_copy(folder, one, final, report):
        report(there, ALREADY)
        return there
    try:
        _copy(folder, one, final, report, throttle)
    except Rejected as exc:
        report(item, Outcome(Kind.REJECTED, exc.message))
        return item
    item = held(final, uid) or item
    report(item, DELIVERED)
    return item


def _is_copy(folder: DicomFolder, one: HeldInstance, final: Path, report: PushReport) -> bool:
    """Return True if a file is what the folder holds now: a correction may have the same length."""
    with suppress(OSError, Rejected):
        fd = folder.open(one)
        try:
            return same_content(fd, final, report.check)
        finally:
            os.close(fd)
    return False


def _copy(folder: DicomFolder, one: HeldInstance, final: Path, report: PushReport, throttle: Throttle) -> None:
    """Copy a file, whole or not at all.

    Raises:
        Rejected: it is no longer the file whose header was read, or can't be read.
    """
    if not UID.fullmatch(one.SOPInstanceUID):
        raise Rejected("its SOP Instance UID is not valid")
    source = Plan("", one.path.parent, ())
    item = Item(one.path.name, one.size, one.stamp.mtime_ns)

    def moved(count: int) -> None:
        throttle.spend(count)
        report.moved(count)
        report.check()

    reader = folder.open(one)
    try:
        source.check(item, reader)
        with partial.writing(final.parent):
            part, writer = partial.create(final.parent)
        try:
            copy_bytes(reader, writer, moved, min(PIECE_BYTES, throttle.piece))
            source.check(item, reader)
            if _uid(writer) != one.SOPInstanceUID:
                raise Rejected("the file holds another instance than before: ask again")
            with partial.writing(final.parent):
                part.replace(final)
        except OSError as exc:
            if exc.errno in FULL:
                raise partial.failure(final.parent, exc) from exc
            if exc.errno == errno.EIO and not fs.readable(reader):
                raise Rejected(f"can't be read: {exc.strerror}") from exc
            raise
        finally:
            part.unlink(missing_ok=True)
            os.close(writer)
    finally:
        os.close(reader)


def _uid(fd: int) -> str:
    try:
        return read_header(fd, os.fstat(fd).st_size).SOPInstanceUID
    except (NotDicom, Damaged):
        return ""
