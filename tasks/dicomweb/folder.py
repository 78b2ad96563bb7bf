"""DICOMweb targets whose URL is a folder (`file://`): the same four functions as for a server.

Files and folders may be named after patients, so messages hold the folder itself, never a path below it.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from blocks.dicomweb import DicomWebTarget
from imaging.query import Match, Query, listed, text
from protocols.dicomfolder.folder import DicomFolder, HeldInstance, IndexReport
from protocols.dicomfolder.store import FolderPush, fetch
from protocols.dicomfolder.unread import Lack
from protocols.files import filesystem as fs
from protocols.files.incoming import Style
from protocols.files.tree import Tree
from tasks.filesystem import file_errors
from transfer import stopping
from transfer.beneath import FOLDER
from transfer.errors import Busy, Denied, Interrupted, Misconfigured, NotFound, Unread
from transfer.health import Health
from transfer.home import Home
from transfer.oserrors import user
from transfer.plan import Plan
from transfer.receipt import Level, PushReport, Receipt

logger = logging.getLogger(__name__)


# ---- connect


def connect(target: DicomWebTarget) -> Path:
    """Return the target's folder, after making sure that it exists and answers.

    Raises:
        NotFound: it doesn't exist. It is never made: a share that isn't mounted looks the same.
        Misconfigured: it is not a folder. Unreachable: its file system doesn't answer. Denied: the way to it is closed.
    """
    root = target.folder
    if root is None:
        raise Misconfigured(f"{target.url} is not a folder", target.name)
    with file_errors(target):
        info = fs.within(target.connect_timeout_s, root)
        if not stat.S_ISDIR(info.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return root


def opened(target: DicomWebTarget, check: Callable[[], None] = lambda: None) -> DicomFolder:
    """Return the target's folder with its index; the caller closes it, and wraps its use in `file_errors`."""
    try:
        state: Path | None = Home.current().root
    except OSError:
        state = None  # then the index of a read-only folder is kept in memory
    with file_errors(target):
        return DicomFolder(connect(target), state, check)


# ---- check


def check(target: DicomWebTarget) -> Health:
    """Probe: the folder is there, can be listed (to query it), and written to (to store in it)."""
    health = Health()
    with health.probe("folder") as probe:
        root = connect(target)
        probe.detail = os.fsencode(root.resolve()).decode(errors="backslashreplace")
    if not health.ok:
        health.skip("authorize", "qido")
        return health
    if target.stores:
        with health.probe("authorize") as probe, file_errors(target):
            with Tree(root) as tree:
                _rehearse(target, tree)
            probe.detail = f"written, renamed and removed as user {user()}"
    else:
        health.skip("authorize", why="nothing is stored here")
    with health.probe("qido") as probe, file_errors(target):
        # A first look at a large folder takes minutes: not in a check.
        with Tree(root) as tree, tree.opened("", FOLDER) as fd, os.scandir(fd) as entries:
            empty = next(entries, None) is None
        probe.detail = "the folder is empty" if empty else "the folder can be listed"
    return health


def _rehearse(target: DicomWebTarget, tree: Tree) -> None:
    """Do once what a push does, under names that are no instance's, and remove it.

    Raises:
        Misconfigured: what can be read there is not what was written.
    """
    probe = f".talaria-{uuid.uuid4().hex}"
    renamed = f"{probe}-renamed"
    try:
        with tree.opened(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
            os.write(fd, b"probe")
        tree.rename(probe, renamed)
        with tree.opened(renamed) as fd:
            if os.read(fd, 100) != b"probe":
                raise Misconfigured(f"{target.url}: what is written there can't be read back", target.name)
    finally:
        for left in (probe, renamed):
            with suppress(OSError):
                tree.unlink(left)


# ---- push


def push(target: DicomWebTarget, plan: Plan, report: PushReport) -> Receipt:
    """Put what is pending into the folder, as `<study>/<series>/<instance>.dcm`."""
    report.check()
    root = connect(target)
    style = Style(threads=target.concurrency, bandwidth_limit=target.bandwidth_limit)
    with file_errors(target), Tree(root) as tree:
        store = FolderPush(tree, target.name, plan, report, style)
        try:
            reached = store.run(target.verify)
        except (Busy, Interrupted, Denied) as exc:
            exc.message = f"{target.url}: {exc.message}"
            raise
    return report.receipt(target.name, plan, verified=reached, notes=tuple(store.notes))


# ---- find


def find(target: DicomWebTarget, query: Query) -> Iterator[Match]:
    """Yield the studies or series that match, as the folder is now.

    Raises:
        Unread: after all matches, if something that is asked for may be where nothing can be read, or is damaged.
    """
    asked = {one.strip().casefold() for one in (*query.AccessionNumber, *listed(query.StudyInstanceUID))} - {""}
    found: set[str] = set()
    with file_errors(target), opened(target, stopping.check) as folder:
        for match in folder.find(query):
            found |= {text(match.attributes.get("AccessionNumber")).casefold(), match.StudyInstanceUID}
            yield match
        _log(target, folder.report)
        if folder.report.unread and (asked - found or not asked):
            raise Unread(f"{_unreadable(folder.report)}: it may be there", target.name)
        if damaged := folder.damaged(asked - found):
            raise Unread("all that there is of it is damaged", target.name, about=damaged)


# ---- retrieve


def retrieve(target: DicomWebTarget, query: Query, into: Path, report: PushReport) -> Receipt:
    """Copy the instances of all series that match into a folder, as `<SOP instance UID>.dcm`.

    What can't be read or is damaged, and may be part of the studies, is missing; if it may be of many, that is a doubt.

    Raises:
        NotFound: nothing matches.
    """
    report.check()
    with file_errors(target), opened(target, report.check) as folder:
        held = list(folder.instances(query))
        _log(target, folder.report)
        if not held:
            raise NotFound(f"{target.url}: nothing matches the query")
        got = fetch(folder, held, into, report, threads=target.concurrency, bandwidth_limit=target.bandwidth_limit)
        lack = _lack(folder, held)
        notes = (str(lack), *got.notes, *(text for _, text in _passed_over(folder.report)))
    receipt = report.receipt(target.name, got.plan, verified=Level.LISTED, notes=tuple(filter(None, notes)))
    return replace(receipt, missing=receipt.missing + got.missing + lack.count, doubt="; ".join(sorted(lack.doubts)))


def _lack(folder: DicomFolder, held: Iterable[HeldInstance]) -> Lack:
    """Return what may be part of the series of these instances, and can't be given."""
    series: dict[str, set[str]] = {}
    for one in held:
        series.setdefault(one.StudyInstanceUID, set()).add(one.SeriesInstanceUID)
    return sum((folder.lack(*one) for one in series.items()), Lack())


def _log(target: DicomWebTarget, report: IndexReport) -> None:
    logger.info(
        "%s: headers of %d files read, %d files unchanged, %d gone", target.url, report.read, report.unchanged,
        report.removed,
    )  # fmt: skip
    for level, words in _passed_over(report):
        logger.log(level, "%s: %s", target.url, words)


def _passed_over(report: IndexReport) -> Iterator[tuple[int, str]]:
    """Return what in a folder no answer shows, and why; each with the level at which it is logged."""
    if report.not_dicom:
        yield logging.INFO, f"{report.not_dicom} files are not DICOM: passed over"
    if report.damaged:
        yield logging.WARNING, f"{report.damaged} files are damaged, or belong to no series: passed over"
    if report.links:
        yield logging.INFO, f"{report.links} symbolic links are not followed"
    if report.unread:
        yield logging.WARNING, f"{_unreadable(report)}: what is in them is left out"


def _unreadable(report: IndexReport) -> str:
    return f"{len(report.unread)} files or folders can't be read by user {user()}"
