"""Folder targets: files go to `<folder>/<name>/<relative path>`, and `<name>` appears when it is whole.

What is written lies in `<folder>/.incoming-<dispatch id>/` first (protocols/files/incoming.py). A new `<name>` then
appears with one rename; if it is there already, each file is renamed into it. `.complete` comes last.

Messages never hold `<name>`: a layout may make it from a patient's data.
"""

from __future__ import annotations

import errno
import grp
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blocks.folder import FolderTarget, LinkPolicy
from imaging.header import Damaged, NotDicom, read_header
from protocols.files import filesystem as fs
from protocols.files.incoming import MARKER, Incoming, Place, Style
from tasks.driver import Driver, Facts
from transfer.content import same_content
from transfer.errors import Busy, Cancelled, Interrupted, Misconfigured, NotFound, Permanent, Rejected, Unreachable
from transfer.health import Health
from transfer.layout import OTHER_INSTANCE, names
from transfer.oserrors import FULL, ITEM_ERRORS, kind_of, user, words_of
from transfer.outcome import ALREADY, Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import Level, PushReport, Receipt

REPLACED = Outcome(Kind.WARNING, "replaced an older file of this name")


@contextmanager
def errors(target: FolderTarget) -> Iterator[None]:
    """Turn the file system's errors into our own, which name the folder."""
    try:
        yield
    except fs.Silent as exc:
        raise Unreachable(f"{target.folder} did not answer within {target.connect_timeout_s:g} s", target.name) from exc
    except (Busy, Interrupted) as exc:
        if not exc.target:
            exc.message, exc.target = f"{target.folder}: {exc.message}", target.name
        raise
    except OSError as exc:
        exc.filename = exc.filename2 = None  # a path below the folder may hold a patient's data
        kind = kind_of(exc)
        if kind is None:
            raise
        if kind is NotFound and Path(target.folder).is_dir():
            raise Interrupted(
                f"{target.folder}: what is being written there vanishes: another program removes it", target.name
            ) from exc
        words = words_of(exc)
        if exc.errno in FULL:
            words += f"; {fs.size(fs.room(Path(target.folder))[0])} are free"
        raise kind(f"{target.folder}: {words}", target.name) from exc


# ---- connect


def connect(target: FolderTarget) -> Path:
    """Return the target's folder, after making sure that it exists and answers.

    Raises:
        NotFound: it doesn't exist. It is never made: a share that isn't mounted looks the same.
        Misconfigured: it is not a folder, or the group doesn't exist.
        Unreachable: the file system doesn't answer.
        Denied: the way to it is closed.
    """
    root = Path(target.folder)
    with errors(target):
        info = fs.within(target.connect_timeout_s, root.stat)
        if not stat.S_ISDIR(info.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    _style(target)
    return root


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
    with health.probe("folder") as probe:
        root = connect(target)
        probe.detail = f"{root.resolve()} on {fs.kind(root) or 'an unknown file system'}"
    if not health.ok:
        health.skip("authorize", "space")
        return health
    with health.probe("authorize") as probe, errors(target):
        folders = _written_to(target, root)
        for folder in folders:
            _rehearse(target, folder)
        probe.detail = f"written, renamed and removed as user {user()}"
    if not health.ok:
        health.skip("space")
        return health
    with health.probe("space") as probe, errors(target):
        free, inodes, _ = min(map(fs.room, folders), key=lambda room: room[0] if room[0] >= 0 else float("inf"))
        if free == 0 or inodes == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        probe.detail = f"{fs.size(free)} are free" if free > 0 else "the file system does not say"
    return health


def _written_to(target: FolderTarget, root: Path) -> list[Path]:
    """Return the existing folders that a delivery writes to: the target's, and those that its layout always names.

    Raises:
        OSError: there is a file where a folder should be.
    """
    folder = root
    for part in target.layout.split("/"):
        if "{" in part or not os.path.lexists(folder / part):
            break
        folder /= part
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return [root] if folder == root else [root, folder]


def _rehearse(target: FolderTarget, root: Path) -> None:
    """Do what a delivery does, under names that no delivery has, and remove everything."""
    style = _style(target)
    probe = root / f".talaria-{uuid.uuid4().hex}"
    renamed = probe.with_name(f"{probe.name}-renamed")
    try:
        probe.mkdir()
        fs.own(probe, style.dir_mode, style.group)
        file = probe / "probe"
        file.write_bytes(b"probe")
        fs.own(file, style.mode, style.group)
        fs.flush_folder(probe)
        probe.rename(renamed)
        if (renamed / "probe").read_bytes() != b"probe":
            raise Misconfigured(f"{target.folder}: what is written there can't be read back", target.name)
    finally:
        for left in (probe, renamed):
            shutil.rmtree(left, ignore_errors=True)


# ---- push


def push(target: FolderTarget, plan: Plan, report: PushReport) -> Receipt:
    """Copy what is pending, give it its final name at once, and put the marker last."""
    report.check()
    root = connect(target)
    with errors(target):
        job = _Push(target, plan, report, root)
        try:
            return job.run()
        except (Cancelled, Permanent) as exc:
            if isinstance(exc, Permanent) or not report.pausing.is_set():
                job.discard()  # nobody will go on with it
            raise


class _Push:
    """One push; its steps stand here in the order in which they are taken."""

    def __init__(self, target: FolderTarget, plan: Plan, report: PushReport, root: Path) -> None:
        self.target, self.plan, self.report, self.root = target, plan, report, root
        self.style = _style(target)
        self.places: dict[str, Place] = {}
        self.where: dict[str, Place] = {}
        self.notes: list[str] = []
        for path, folder in names(plan, target.layout, lambda name: fs.is_of_other_name(root / name)).items():
            if folder not in self.places:
                self.places[folder] = Place(root, folder, f".incoming-{plan.dispatch_id}", target.name)
            self.where[path] = self.places[folder]
        for item in plan.items:
            self.where[item.path].items.append(item)
        self.incoming = Incoming(plan, self.where, report, self.style)

    def run(self) -> Receipt:
        here = self.incoming.bring([item for item in self.plan.pending if not self._already(item)])
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

    def discard(self) -> None:
        """Remove everything that lies beside the final names."""
        for place in self.places.values():
            place.discard()

    def _already(self, item: Item) -> bool:
        """Report ALREADY if an item is there under its final name, whole; return whether it was."""
        place = self.where[item.path]
        if not place.existed:
            return False
        final = place.final / item.path
        try:
            info = final.lstat()
            if not stat.S_ISREG(info.st_mode) or info.st_size != item.size:
                return False
            # Length and time may be those of another file: what unpacks archives gives all the same time.
            with self.plan.open(item) as fd:
                if not os.path.samestat(os.fstat(fd), info) and not same_content(fd, final, self.report.check):
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
        for written, _, _ in os.walk(str(place.files), topdown=False):
            fs.flush_folder(Path(written))
        try:
            new = fs.make_folders(place.final.parent, self.root, self.style.dir_mode, self.style.group)
        except OSError as exc:
            if exc.errno not in ITEM_ERRORS:
                raise
            for item in items:  # other places are not concerned
                self.report(item, Outcome(Kind.REJECTED, ITEM_ERRORS[exc.errno]))
            return
        touched = {folder.parent for folder in new}
        if fs.move_folder(place.files, place.final):
            outcomes: list[Outcome | None] = [Outcome(Kind.DELIVERED)] * len(items)
            touched.add(place.final.parent)
        else:
            place.unmark()
            outcomes = [self._merge(place, item, touched) for item in items]
        self.report.unanswered.update(item.path for item, one in zip(items, outcomes, strict=True) if _is_new(one))
        for folder in touched:
            fs.flush_folder(folder)
        for item, outcome in zip(items, outcomes, strict=True):
            if outcome is not None:
                self.report(item, outcome)

    def _merge(self, place: Place, item: Item, touched: set[Path]) -> Outcome | None:
        """Bring one file into a folder that is there already; never lose another file of its name silently.

        Return None if the file system fails at it, perhaps at this file alone.
        """
        kept, final = Path(self.incoming.kept(item)), place.final / item.path
        try:
            new = fs.make_folders(final.parent, place.final, self.style.dir_mode, self.style.group)
            touched |= {folder.parent for folder in new}
            if fs.move_file(kept, final):
                touched.add(final.parent)
                return Outcome(Kind.DELIVERED)
            if not stat.S_ISREG(mode := final.lstat().st_mode):
                folder = stat.S_ISDIR(mode)
                why = (
                    ITEM_ERRORS[errno.EISDIR] if folder else "what has its name there is a link or a device, not a file"
                )
                return Outcome(Kind.REJECTED, why)
            with open(kept, "rb") as file:
                if same_content(file.fileno(), final, self.report.check):
                    return ALREADY
            if _is_other_instance(item, final):
                return Outcome(Kind.REJECTED, OTHER_INSTANCE)
            kept.replace(final)
            touched.add(final.parent)
        except OSError as exc:
            if exc.errno in ITEM_ERRORS:
                return Outcome(Kind.REJECTED, ITEM_ERRORS[exc.errno])
            self.incoming.set_aside(item, exc)
            return None
        return REPLACED

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
                    if not self.incoming.same_checksum(item, place.final / item.path):
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
            info = (self.where[item.path].final / item.path).stat()
        except (FileNotFoundError, NotADirectoryError):
            return "it was delivered, but is not there any more"
        return "" if info.st_size == item.size else f"it has {info.st_size} bytes there instead of {item.size}"

    def _mark(self, place: Place) -> None:
        """Put the marker if every file of the plan is there; its time is that of the last arrival.

        A marker that is there is removed where a file was taken back.
        """
        if any(item.path in self.report.revoked for item in place.items):
            place.unmark()
        if self.plan.lacks or len(list(self._arrived(place.items))) < len(place.items) or not place.final.is_dir():
            return
        marker, reported = place.final / MARKER, self.report.outcomes
        if os.path.lexists(marker):
            if any(item.path in reported and reported[item.path].kind is not Kind.ALREADY for item in place.items):
                os.utime(marker)
            return
        if gone := sum(1 for item in place.items if item.path not in reported and self._lacks(item)):
            self.notes.append(f"no {MARKER}: {gone} files that had been delivered are not there any more")
            return
        marker.touch()
        fs.own(marker, self.style.mode, self.style.group)
        fs.flush_folder(place.final)


def _is_new(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.kind in (Kind.DELIVERED, Kind.WARNING)


def _is_other_instance(item: Item, final: Path) -> bool:
    """Return True if the file at `final` is another DICOM instance than the item."""
    if item.header is None:
        return False
    with open(final, "rb") as file, suppress(NotDicom, Damaged):
        there = read_header(file.fileno(), os.fstat(file.fileno()).st_size).SOPInstanceUID
        return there != item.header.SOPInstanceUID
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
