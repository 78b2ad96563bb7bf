"""Folder targets: files go to `<folder>/<name>/<relative path>`, and `<name>` appears when it is whole.

What is written lies in `<folder>/.incoming-<dispatch id>/` first (protocols/files/incoming.py). A new `<name>` then
comes by one rename; into one that is there already, each file comes by a rename of its own. `.complete` comes last.
No link below the folder is followed (protocols/files/tree.py).

Messages never hold `<name>`: a layout may make it from a patient's data.
"""

from __future__ import annotations

import errno
import grp
import os
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from blocks.folder import FolderTarget, LinkPolicy
from imaging.header import Damaged, NotDicom, read_header
from protocols.files import filesystem as fs
from protocols.files.incoming import MARKER, Incoming, Place, Style
from protocols.files.tree import Tree, joined, own, parent
from tasks.driver import Driver, Facts
from tasks.filesystem import file_errors
from transfer.beneath import WAY
from transfer.content import same_content
from transfer.errors import Busy, Cancelled, Interrupted, Misconfigured, Permanent, Rejected
from transfer.health import Health
from transfer.layout import OTHER_INSTANCE, names
from transfer.oserrors import ITEM_ERRORS, user
from transfer.outcome import ALREADY, Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import Level, PushReport, Receipt

NO_FILE = "what has its name there is a link or a device, not a file"
IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.ELOOP)  # something else is in the place of a folder
REPLACED = Outcome(Kind.WARNING, "replaced an older file of this name")


# ---- connect


def connect(target: FolderTarget) -> Tree:
    """Return the target's folder, which is there and answers; the caller closes it.

    Raises:
        NotFound: it doesn't exist. It is never made: a share that isn't mounted looks the same.
        Misconfigured: it is not a folder, or the group doesn't exist.
        Unreachable: the file system doesn't answer.
        Denied: the way to it is closed, or it lies where nothing may be written to.
    """
    root = Path(target.folder)
    with file_errors(target):
        info = fs.within(target.connect_timeout_s, root)
        if not stat.S_ISDIR(info.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        _style(target)
        return Tree(root)


def _style(target: FolderTarget) -> Style:
    group: int | None = None
    if target.group is not None:
        try:
            group = int(target.group) if target.group.isdecimal() else grp.getgrnam(target.group).gr_gid
        except KeyError as exc:
            raise Misconfigured(f"group {target.group!r} does not exist on this machine", target.name) from exc
    return Style(
        threads=target.concurrency,
        bandwidth_limit=target.bandwidth_limit,
        link=target.link == LinkPolicy.AUTO,
        mode=int(target.mode, 8) if target.mode else None,
        dir_mode=int(target.dir_mode, 8) if target.dir_mode else None,
        group=group,
    )


# ---- check


def check(target: FolderTarget) -> Health:
    """Probe: the folder is there, what a delivery does can be done in it, there is room."""
    health = Health()
    with ExitStack() as stack:
        with health.probe("folder") as probe:
            tree = stack.enter_context(connect(target))
            probe.detail = f"{tree.root.resolve()} on {fs.kind(tree.root) or 'an unknown file system'}"
        if not health.ok:
            health.skip("authorize", "space")
            return health
        with health.probe("authorize") as probe, file_errors(target):
            folders = _written_to(target, tree)
            for folder in folders:
                _rehearse(target, tree, folder)
            probe.detail = f"written, renamed and removed as user {user()}"
        if not health.ok:
            health.skip("space")
            return health
        with health.probe("space") as probe, file_errors(target):
            rooms = [fs.room(stack.enter_context(tree.opened(folder, WAY))) for folder in folders]
            free, inodes, _ = min(rooms, key=lambda room: room[0] if room[0] >= 0 else float("inf"))
            if free == 0 or inodes == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            probe.detail = f"{fs.size(free)} are free" if free > 0 else "the file system does not say"
    return health


def _written_to(target: FolderTarget, tree: Tree) -> list[str]:
    """Return the folders that are there and that a delivery writes to: the target's, and what its layout always names.

    Raises:
        OSError: a file, or a link, is in the place of one.
    """
    folder = ""
    for part in target.layout.split("/"):
        if "{" in part or not tree.exists(below := joined(folder, part)):
            break
        with tree.opened(below, WAY):
            folder = below
    return list(dict.fromkeys(["", folder]))


def _rehearse(target: FolderTarget, tree: Tree, folder: str) -> None:
    """Do once what a delivery does, under names that are no delivery's, and remove it."""
    style = _style(target)
    probe = joined(folder, f".talaria-{uuid.uuid4().hex}")
    renamed = f"{probe}-renamed"
    try:
        tree.make_folders(probe, folder, style.dir_mode, style.group)
        with tree.opened(f"{probe}/probe", os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
            os.write(fd, b"probe")
            own(fd, style.mode, style.group)
        tree.flush(probe)
        tree.rename(probe, renamed)
        with tree.opened(f"{renamed}/probe") as fd:
            if os.read(fd, 100) != b"probe":
                raise Misconfigured(f"{target.folder}: what is written there can't be read back", target.name)
    finally:
        for left in (probe, renamed):
            tree.remove(left)


# ---- push


def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
    """Copy what is pending, give it its final name at once, and put the marker last."""
    report.check()
    with connect(target) as tree, file_errors(target):
        job = _Push(target, plan, report, tree)
        try:
            return job.run()
        except (Busy, Interrupted) as exc:
            exc.message = f"{target.folder}: {exc.message}"
            raise
        except (Cancelled, Permanent) as exc:
            if isinstance(exc, Permanent) or not report.pausing.is_set():
                job.discard()  # nobody will go on with it
            raise


class _Push:
    """One push; its steps stand here in the order in which they are taken."""

    def __init__(self, target: FolderTarget, plan: Plan, report: PushReport, tree: Tree) -> None:
        self.target, self.plan, self.report, self.tree = target, plan, report, tree
        self.style = _style(target)
        self.places: dict[str, Place] = {}
        self.where: dict[str, Place] = {}
        self.notes: list[str] = []
        for path, folder in names(plan, target.layout, tree.is_of_other_name).items():
            if folder not in self.places:
                self.places[folder] = Place(tree, folder, f".incoming-{plan.dispatch_id}", target.name)
            self.where[path] = self.places[folder]
        for item in plan.items:
            self.where[item.path].items.append(item)
        self.incoming = Incoming(plan, self.where, report, self.style)

    def run(self) -> Receipt:
        self._refuse_linked()
        pending = [item for item in self.plan.pending if item.path not in self.report.outcomes]
        here = self.incoming.bring([item for item in pending if not self._already(item)])
        if self.target.verify is Level.PROVEN:
            self.incoming.prove(here)
        for place in self.places.values():
            self.report.check()
            self._publish(place, [item for item in here if self.where[item.path] is place])
        verified = self._verify(frozenset(item.path for item in here))
        self.incoming.settle_aside()
        for place in self.places.values():
            self._mark(place)
        self.discard()
        return self.report.receipt(self.target.name, self.plan, verified, tuple(self.notes))

    def _refuse_linked(self) -> None:
        """Reject what belongs into a folder that is a link, or lies behind one; other places are not concerned."""
        linked = {place for place in self.places.values() if self.tree.is_linked(place.final)}
        for item in self.plan.pending if linked else ():
            if self.where[item.path] in linked:
                self.report(item, Outcome(Kind.REJECTED, ITEM_ERRORS[errno.ELOOP]))

    def discard(self) -> None:
        """Remove everything that lies beside the final names."""
        for place in self.places.values():
            place.discard()

    def _already(self, item: Item) -> bool:
        """Report ALREADY if an item is there under its final name, whole; return whether it was."""
        place = self.where[item.path]
        if not place.existed:
            return False
        try:
            with self.tree.opened(f"{place.final}/{item.path}") as there:
                info = os.fstat(there)
                if not stat.S_ISREG(info.st_mode) or info.st_size != item.size:
                    return False
                # Length and time may be those of another file: what unpacks archives gives all the same time.
                with self.plan.open(item) as fd:
                    if not os.path.samestat(os.fstat(fd), info) and not same_content(fd, there, self.report.check):
                        return False
        except (FileNotFoundError, NotADirectoryError, PermissionError, Rejected):
            return False
        except OSError as exc:
            if exc.errno in ITEM_ERRORS:
                return False
            raise
        self.report(item, ALREADY)
        return True

    def _publish(self, place: Place, items: list[Item]) -> None:
        """Give the files of one folder their final names, then report that they have arrived."""
        if not items:
            return
        for written in self.tree.folders(place.files):
            self.tree.flush(written)
        try:
            new = self.tree.make_folders(parent(place.final), "", self.style.dir_mode, self.style.group)
        except OSError as exc:
            if exc.errno not in ITEM_ERRORS:
                raise
            for item in items:  # other places are not concerned
                self.report(item, Outcome(Kind.REJECTED, ITEM_ERRORS[exc.errno]))
            return
        touched = set(map(parent, new))
        if self.tree.move_folder(place.files, place.final):
            outcomes: list[Outcome | None] = [Outcome(Kind.DELIVERED)] * len(items)
            touched.add(parent(place.final))
        else:
            place.unmark()
            outcomes = [self._merge(place, item, touched) for item in items]
        self.report.unanswered.update(item.path for item, one in zip(items, outcomes, strict=True) if _is_new(one))
        for folder in touched:
            self.tree.flush(folder)
        with self.report.together():
            for item, outcome in zip(items, outcomes, strict=True):
                if outcome is not None:
                    self.report(item, outcome)

    def _merge(self, place: Place, item: Item, touched: set[str]) -> Outcome | None:
        """Bring one file into a folder that is there already; another file of its name is not simply lost.

        Return None if the file system fails at it, perhaps at this file alone.
        """
        tree, kept, final = self.tree, self.incoming.kept(item), f"{place.final}/{item.path}"
        try:
            new = tree.make_folders(parent(final), place.final, self.style.dir_mode, self.style.group)
            touched |= set(map(parent, new))
            if tree.move_file(kept, final):
                touched.add(parent(final))
                return Outcome(Kind.DELIVERED)
            if not stat.S_ISREG(mode := tree.stat(final).st_mode):
                return Outcome(Kind.REJECTED, ITEM_ERRORS[errno.EISDIR] if stat.S_ISDIR(mode) else NO_FILE)
            with tree.opened(kept) as file, tree.opened(final) as there:
                if same_content(file, there, self.report.check):
                    return ALREADY
                if _is_other_instance(item, there):
                    return Outcome(Kind.REJECTED, OTHER_INSTANCE)
            tree.rename(kept, final)
            touched.add(parent(final))
        except OSError as exc:
            if exc.errno in ITEM_ERRORS:
                return Outcome(Kind.REJECTED, ITEM_ERRORS[exc.errno] + self._where(place, item, exc))
            self.incoming.set_aside(item, exc)
            return None
        return REPLACED

    def _where(self, place: Place, item: Item, exc: OSError) -> str:
        """Name the file that is in the place of a folder; "" if it is above the item's own folders."""
        if exc.errno in IN_THE_WAY and self.tree.is_folder(place.final):
            *folders, _ = item.shown.split("/")
            *really, _ = item.path.split("/")
            for count in range(1, len(really) + 1):
                if not self.tree.is_folder("/".join([place.final, *really[:count]])):
                    return f": {'/'.join(folders[:count])}"
        return ""

    def _verify(self, proven: frozenset[str]) -> Level:
        """Verify all items at the target's level; revoke those that are not there.

        Args:
            proven: paths of the items whose checksums were compared before they got their final names.
        """
        level = self.target.verify
        if level is Level.ACCEPTED:
            return level
        old: list[Item] = []
        for item in self._arrived(self.plan.items):
            self.report.check()
            if why := self._lacks(item):
                self.report.revoke(item, why)
            elif item.path not in proven:
                old.append(item)
        if level is Level.LISTED:
            return level
        unread: list[Item] = []

        def work(batch: list[Item]) -> None:
            for item in batch:
                try:
                    place = self.where[item.path]
                    if not self.incoming.same_checksum(item, f"{place.final}/{item.path}"):
                        # The next attempt compares, and writes it again.
                        self.report.revoke(item, "its checksum there is not that of the file that was sent")
                except (Rejected, PermissionError):
                    unread.append(item)

        self.incoming.in_threads(old, work)
        if not unread:
            return level
        self.notes.append(f"not proven: {len(unread)} files that were there before can't be read again")
        return Level.LISTED

    def _arrived(self, items: Iterable[Item]) -> Iterator[Item]:
        return (item for item in items if self.report.arrived(self.plan, item))

    def _lacks(self, item: Item) -> str:
        """Return why an item is not there under its final name; "" if it is."""
        try:
            info = self.tree.stat(f"{self.where[item.path].final}/{item.path}")
        except OSError as exc:
            if exc.errno in (errno.ENOENT, *IN_THE_WAY):
                return "it was delivered, but is not there any more"
            raise
        if not stat.S_ISREG(info.st_mode):
            return f"it was delivered, but {NO_FILE}"
        return "" if info.st_size == item.size else f"it has {info.st_size} bytes there instead of {item.size}"

    def _mark(self, place: Place) -> None:
        """Put the marker if every file of the plan is there; its time is that of the last arrival.

        A marker that is there is removed where a file was taken back.
        """
        if any(item.path in self.report.revoked for item in place.items):
            place.unmark()
        if self.plan.lacks or len(list(self._arrived(place.items))) < len(place.items):
            return
        if not self.tree.is_folder(place.final):
            return
        marker, reported = f"{place.final}/{MARKER}", self.report.outcomes
        if self.tree.exists(marker):
            if any(item.path in reported and reported[item.path].kind is not Kind.ALREADY for item in place.items):
                with self.tree.opened(marker) as fd:
                    os.utime(fd)
            return
        if gone := sum(1 for item in place.items if item.path not in reported and self._lacks(item)):
            self.notes.append(f"no {MARKER}: {gone} files that had been delivered are not there any more")
            return
        with self.tree.opened(marker, os.O_WRONLY | os.O_CREAT) as fd:
            own(fd, self.style.mode, self.style.group)
        self.tree.flush(place.final)


def _is_new(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.kind in (Kind.DELIVERED, Kind.WARNING)


def _is_other_instance(item: Item, there: int) -> bool:
    """Return True if an opened file is another DICOM instance than the item."""
    if item.header is None:
        return False
    with suppress(NotDicom, Damaged):
        return read_header(there, os.fstat(there).st_size).SOPInstanceUID != item.header.SOPInstanceUID
    return False


driver = Driver(
    target=FolderTarget,
    check=check,
    push=push,
    facts=Facts(
        keeps_names=True,
        atomic_replace=True,
        verifies_by=(Level.ACCEPTED, Level.LISTED, Level.PROVEN),
    ),
)
