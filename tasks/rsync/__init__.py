"""rsync targets: folders on servers that offer a shell and have rsync installed.

Everything goes into `<folder>/.incoming-<dispatch>/`, where a later attempt finds what an interrupted transfer has
brought. When everything is there, one rename makes it visible; if the folder exists already, file after file is renamed
into it. A shell prepares and completes this; rsync logs in by itself.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory

from blocks.rsync import RsyncTarget
from imaging.header import BEGINNING_BYTES
from protocols.net.hiding import quieted
from protocols.ssh.client import SshClient
from protocols.ssh.programs import program
from protocols.ssh.rsync import PARTIAL, PARTLY, TEMPORARY, WORDS, Result, Rsync
from protocols.ssh.shell import Shell
from protocols.ssh.words import short
from tasks import ssh
from tasks.driver import Driver, Facts
from tasks.rsync.names import DESCRIPTORS, NamedFiles
from tasks.rsync.scripts import (
    FINISH,
    INCOMPLETE,
    LEFT,
    PLACE,
    PREPARE,
    PROBE,
    REMOVE,
    REPLACED,
    SOME_REPLACED,
    Script,
    filled,
)
from transfer.content import is_sparse
from transfer.errors import Busy, Denied, DispatchError, Interrupted, Misconfigured, NotFound, Rejected, Retryable
from transfer.health import Health
from transfer.layout import OTHER_INSTANCE
from transfer.outcome import DELIVERED, Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import Level, PushReport, Receipt

SLOWEST_RENAMES = 100  # files a second that a server renames, one program each
MOST_ASIDE = 8  # files that are set aside for want of room: more, and there is none for all
REMEMBERED = 200  # dispatches

# Files at which the link may have broken, by target and dispatch: they are sent alone, after all others. None of them:
# it is not known yet which. As long as this process lives; another one finds out by itself.
_broke: OrderedDict[tuple[str, str], set[str]] = OrderedDict()


def check(target: RsyncTarget) -> Health:
    """Probe name, port, host key, login, shell, writing in the folder, rsync on both sides, and the script."""
    health = Health()
    rest = ["trust", "authenticate", "shell", "authorize", "rsync", *(["hook"] if target.on_complete else [])]
    if ssh.probe_host(health, target):
        try:
            with SshClient(ssh.login(target)) as client:
                _check(health, target, client)
        except DispatchError:
            with health.probe("authenticate"):
                raise
    health.skip(*(name for name in rest if name not in {probe.name for probe in health.probes}))
    return health


def _check(health: Health, target: RsyncTarget, client: SshClient) -> None:
    error: DispatchError | None = None
    with Shell(client) as shell:
        try:
            shell.run("")
        except DispatchError as exc:
            error = exc
        if not ssh.probe_login(health, error, shell.facts):
            return
        with health.probe("shell"):
            if error is not None:
                raise error
        if error is not None:
            return
        place = ""
        with health.probe("authorize") as probe:
            code, output = shell.run(filled(PROBE, FOLDER=target.folder, PROBE=ssh.probe_name()))
            if code:
                raise _said(output, target)
            place = output.decode("utf-8", "replace")
            probe.detail = f"{place}: a file was written and removed"
            if place != target.folder:
                probe.detail += f"; {target.folder} will be made"
        with health.probe("rsync") as probe:
            program("rsync")
            code, output = shell.run("rsync --version")
            if code:
                raise Misconfigured(f"{client.login.shown}: rsync is not installed on the server")
            probe.detail = output.decode("utf-8", "replace").split("\n")[0].strip()
            if place:
                _rehearse(client, shell, place)
        if target.on_complete:
            with health.probe("hook"):
                if shell.run(ssh.script_there(target))[0]:
                    raise ssh.no_script(target)


def _rehearse(client: SshClient, shell: Shell, place: str) -> None:
    """Let rsync log in by itself, with ssh(1), and compare a file of ours with a missing one at `place`."""
    with TemporaryDirectory(prefix="talaria-") as here:
        name = ssh.probe_name()
        Path(here, name).write_bytes(b"talaria")
        result, differing = Rsync(client, lambda: shell.banner).differing(Path(here), [name], place)
    if result.code:
        raise result.failure()
    if differing != [name]:
        raise Misconfigured(f"{client.login.shown}: rsync compares files and names none: it is not rsync, or too old")


def push(target: RsyncTarget, plan: Plan, report: PushReport) -> Receipt:
    """Send every pending file, make all visible at once, then put the marker; report a file when it is visible."""
    report.check()
    hide = ssh.hiding(target, plan)
    with (
        quieted(hide, target.name),
        SshClient(ssh.login(target), hide, report.check) as client,
        Shell(client, report.check) as shell,
        NamedFiles(plan) as names,
    ):
        rsync = Rsync(client, lambda: shell.banner, target.bandwidth_limit, target.compress, report.check, report.moved)
        return _Push(target, plan, report, shell, rsync, names).run()


@dataclass
class _Folder:
    """One folder that the layout makes: its name, where it is filled, and the items that belong into it."""

    name: str
    number: int
    items: list[Item]
    pending: list[Item] = field(default_factory=list)
    sent: list[Item] = field(default_factory=list)


class _Push:
    def __init__(
        self, target: RsyncTarget, plan: Plan, report: PushReport, shell: Shell, rsync: Rsync, names: NamedFiles
    ) -> None:
        self.hide = shell.client.hide
        self.target, self.plan, self.report, self.shell, self.rsync = target, plan, report, shell, rsync
        self.names = names
        self.incoming = f".incoming-{plan.dispatch_id}"
        self.base = target.folder  # absolute once the server has said where it is
        self.placed: set[int] = set()  # numbers of the folders that an earlier attempt has made visible
        self.notes: list[str] = []
        self.aside: dict[Item, DispatchError] = {}  # files that nothing but themselves kept from coming
        self.key = target.name, plan.dispatch_id
        self.has_broken = self.key in _broke
        self.broke = _broke.pop(self.key, set())
        while len(_broke) >= REMEMBERED:
            _broke.popitem(last=False)
        waiting = {item.path for item in plan.pending}
        self.folders = [
            _Folder(name, number, items, [item for item in items if item.path in waiting])
            for number, (name, items) in enumerate(ssh.by_folder(target, plan).items())
        ]

    def run(self) -> Receipt:
        growing = [folder for folder in self.folders if folder.pending]
        if growing:
            for folder in growing:
                folder.pending = self.unchanged(folder.pending, self.reject)
            try:
                self.prepare(growing)
                self.has_broken, had_broken = True, self.has_broken  # if anything breaks from here on
                for folder in growing:
                    self.send(folder, look=had_broken)
                self.place(growing)
                for error in self.aside.values():
                    raise error
            except Retryable:
                if self.has_broken:
                    _broke[self.key] = self.broke
                raise
        verified = self.verify()
        self.finish()
        return self.report.receipt(self.target.name, self.plan, verified, tuple(map(self.hide, self.notes)))

    def script(self, text: str, **words: str | list[str]) -> tuple[int, bytes]:
        """Run one of the scripts above in the target's folder."""
        script = filled(text, FOLDER=self.target.folder, INCOMING=self.incoming, MARKER=ssh.MARKER, **words)
        idle_s = self.target.idle_timeout_s + len(self.plan.items) / SLOWEST_RENAMES
        return self.shell.run(script, idle_s=idle_s)

    def reject(self, item: Item, reason: str) -> None:
        self.report(item, Outcome(Kind.REJECTED, self.hide(reason)))

    def unchanged(self, items: Iterable[Item], refuse: Callable[[Item, str], None]) -> list[Item]:
        """Return the items whose files are as planned; call `refuse` with each of the others and the reason."""
        good = []
        for item in items:
            try:
                self.plan.check(item)
                good.append(item)
            except Rejected as exc:
                refuse(item, exc.message)
        return good

    def prepare(self, growing: list[_Folder]) -> None:
        """Make the folders that rsync writes to."""
        places = [f"{self.incoming}/{folder.number}/{TEMPORARY}" for folder in growing]
        code, output = self.script(PREPARE, FOLDERS=places)
        if code:
            raise _said(output, self.target, self.hide)
        self.base, *placed = output.decode("utf-8", "surrogateescape").split("\n")
        self.placed = {int(name.removeprefix("placed-")) for name in placed if name}

    def send(self, folder: _Folder, *, look: bool) -> None:
        """Bring a folder's files to where it is filled; reject what has changed meanwhile.

        Args:
            look: whether an earlier attempt broke off.
        """
        place = f"{self.base}/{self.incoming}/{folder.number}"
        there = f"{self.base}/{folder.name}" if folder.number in self.placed else ""
        suspects = self.suspects(folder, place, there) if look else []
        items = [item for item in folder.pending if item not in suspects]
        missing: dict[str, str] = {}
        while items:
            result = self.bring(items, place, there)
            error = result.failure() if result.code else None
            item = _named(result, items) if result.code not in PARTLY or isinstance(error, Busy) else None
            if item and isinstance(error, Rejected):
                items = self.too_large(item, error.message, items)
                continue
            if item and isinstance(error, Retryable) and len(items) > 1 and len(self.aside) < MOST_ASIDE:
                self.set_aside(item, error, folder)
                items.remove(item)
                continue
            if result.code in PARTLY:
                missing = self.missing(result, items, place, there)
            elif error is not None:
                raise _lost(error)
            break
        for item in suspects:
            result = self.bring([item], place, there)
            error = result.failure() if result.code else None
            if isinstance(error, Retryable) and (items or len(suspects) > 1):
                self.set_aside(item, error, folder)
            elif result.code in PARTLY:
                missing |= self.missing(result, [item], place, there)
                items.append(item)
            elif error is not None:
                raise _lost(error)
            else:
                items.append(item)
        missing |= self.names.lacking
        for item in self.unchanged(items, self.reject):
            if item.path in missing:
                self.reject(item, missing[item.path])
            else:
                folder.sent.append(item)

    def too_large(self, item: Item, reason: str, items: list[Item]) -> list[Item]:
        """Reject a file for its length, and all that are at least as long; return the others."""
        for one in items:
            if one.size >= item.size:
                self.reject(one, reason if one is item else f"no shorter than {item.shown}: {reason}")
        return [one for one in items if one.size < item.size]

    def bring(self, items: list[Item], place: str, there: str) -> Result:
        largest = max(item.size for item in items)
        sparse = any(self.is_sparse(item) for item in items)
        paths = [item.path for item in items]
        return self.rsync.send(self.names.folder(items), paths, place, largest=largest, there=there, sparse=sparse)

    def is_sparse(self, item: Item) -> bool:
        try:
            return is_sparse(self.plan.file(item).stat())
        except OSError:  # rsync will say so
            return False

    def suspects(self, folder: _Folder, place: str, there: str) -> list[Item]:
        """Return the files at which the connection may have broken in earlier attempts.

        rsync sends one file after the other, in an order of its own: the first that has not arrived is suspected.
        """
        by_path = {item.path: item for item in folder.pending}
        _, paths = self.rsync.differing(self.names.folder(folder.pending), by_path, place, there=there)
        if more := next((path for path in paths if path not in self.broke), None):
            self.broke.add(more)
        return [by_path[path] for path in paths if path in self.broke]

    def set_aside(self, item: Item, error: DispatchError, folder: _Folder) -> None:
        """Leave a file to the next attempt; delete its part, which must not take the room of others."""
        error.item = item.shown
        self.aside[item] = error
        self.report.put_off[item.path] = self.hide(error.message)
        if isinstance(error, Busy):
            above, _, name = f"./{self.incoming}/{folder.number}/{item.path}".rpartition("/")
            self.script(REMOVE, PATHS=[f"{above}/{PARTIAL}/{name}"])

    def missing(self, result: Result, items: list[Item], place: str, there: str) -> dict[str, str]:
        """Return the files that have not arrived, with the reasons, after rsync has said that there are some.

        Raises:
            DispatchError: the reason holds for every file, or none has arrived.
        """
        error = result.failure()
        if isinstance(error, Busy):
            raise error
        again, paths = self.rsync.differing(self.names.folder(items), [item.path for item in items], place, there=there)
        if again.code not in (0, *PARTLY):
            raise _lost(again.failure())
        if len(paths) == len(items) and isinstance(error, Denied):
            raise error
        lines = result.words.splitlines()
        return {
            path: short(next((line for line in lines if path in line), "rsync could not transfer it"), self.hide)
            for path in paths
        }

    def place(self, growing: list[_Folder]) -> None:
        """Give the folders their final names, and report what has arrived."""
        sent = {item.path for folder in growing for item in folder.sent}
        drop = [
            f"{self.incoming}/{folder.number}/{item.path}"
            for folder in growing
            for item in folder.items
            if item.path not in sent
        ]
        calls = (
            f"place {folder.number} {quote(folder.name)} {self.expected(folder)}; note {folder.number}"
            for folder in growing
            if folder.sent
        )
        code, output = self.script(
            PLACE,
            DROP=Script(f"rm -f -- {' '.join(map(quote, drop))}" if drop else ""),
            PLACES=Script("\n".join(calls)),
            OTHER=Script(f'"{OTHER_INSTANCE}"'),  # within quotes already
            BEGINNING=str(BEGINNING_BYTES),
            PARTIAL=PARTIAL,
            TEMPORARY=TEMPORARY,
            REPLACED=SOME_REPLACED,
        )
        output, replaced = output.removesuffix(SOME_REPLACED.encode()), output.endswith(SOME_REPLACED.encode())
        if code == INCOMPLETE:  # what an attempt at other items has left, or a fault of rsync: begin anew
            self.script("rm -rf @FOLDER@/@INCOMING@")
            raise Interrupted(f"{self.target.folder}: {short(output.decode('utf-8', 'replace'), self.hide)}")
        if code not in (0, 2):
            raise _said(output, self.target, self.hide)
        left: dict[str, str] = {}
        if code:
            left = self.left(growing, output.decode("utf-8", "replace"))
        for folder in growing:
            old = self.replaced(folder) if replaced else frozenset()
            for item in folder.sent:
                if item.path in left:
                    self.reject(item, left[item.path])
                else:
                    self.report(item, ssh.REPLACED if item.path in old else DELIVERED)

    def replaced(self, folder: _Folder) -> frozenset[str]:
        """Return the paths at which another file was replaced in a folder that existed before."""
        _, output = self.script(REPLACED, PLACE=str(folder.number))
        return frozenset(output.decode("utf-8", "surrogateescape").split("\0"))

    def expected(self, folder: _Folder) -> str:
        """Return how many files a folder must hold before it is placed: rsync has been seen to skip a name silently."""
        return "''" if folder.number in self.placed else str(len(folder.sent))

    def left(self, growing: list[_Folder], said: str) -> dict[str, str]:
        """Return the files that could not be renamed into a folder that existed, with the reasons.

        Raises:
            DispatchError: none could.
        """
        left: dict[str, str] = {}
        for folder in growing:
            code, output = self.script(LEFT, PLACE=str(folder.number))
            if code:
                continue
            for name in output.decode("utf-8", "surrogateescape").split("\0"):
                path = name.removeprefix(f"{folder.number}/")
                reasons = [line for line in said.splitlines() if path and path in line]
                if path:
                    left[path] = short(reasons[0].split(": ", 1)[-1] if reasons else said, self.hide)
        sent = sum(len(folder.sent) for folder in growing)
        error = _said(said.encode(), self.target, self.hide)
        if len(left) == sent and not isinstance(error, Misconfigured):
            raise error
        return left

    # ---- after

    def has_arrived(self, item: Item) -> bool:
        return self.report.arrived(self.plan, item)

    def verify(self) -> Level:
        """Ask rsync what it would still have to send; revoke what it names."""
        wanted = self.target.verify
        if wanted is Level.ACCEPTED:
            return wanted
        for folder in self.folders:
            # What can't be compared any more is taken back.
            there = self.unchanged(filter(self.has_arrived, folder.items), self.report.revoke)
            named = self.names.folder(there)
            for item in there:
                if item.path in self.names.lacking:
                    self.report.revoke(item, self.names.lacking[item.path])
            items = {item.path: item for item in there if item.path not in self.names.lacking}
            if not items:
                continue
            result, paths = self.rsync.differing(
                named,
                items,
                ssh.under(self.target.folder, folder.name),
                checksum=wanted is Level.PROVEN,
                size=sum(item.size for item in items.values()),
            )
            if result.code:
                raise result.failure()
            for path in paths:
                self.report.revoke(items[path], "asked afterwards, the server does not hold what was sent")
            if paths:  # rsync would take what has the right length and time for good
                self.script(REMOVE, PATHS=[f"./{folder.name}/{path}" for path in paths])
        return wanted

    def finish(self) -> None:
        """Put the marker into every folder that has all its files; remove the folders in which they were filled.

        A marker that is there is removed where a file was taken back.
        Nothing shows in which folder a file that can't be sent would lie: if there is one, no folder is marked.
        """
        revoked = self.report.revoked
        lacking = [folder.name for folder in self.folders if any(item.path in revoked for item in folder.items)]
        whole = [folder.name for folder in self.folders if all(map(self.has_arrived, folder.items))]
        if self.plan.lacks:
            whole = []
        code, output = self.script(FINISH, NAMES=whole, LACKING=lacking)
        if code:
            if self.plan.pending:
                raise _said(output, self.target, self.hide)
            self.notes.append(f"{self.target.folder} has been taken away since it was delivered to")
            return
        for name in filter(None, output.decode("utf-8", "replace").split("\0")):
            self.notes.append(f"{ssh.under(self.target.folder, name)} has been taken away since it was delivered")


def _named(result: Result, items: list[Item]) -> Item | None:
    """Return the item that rsync's message names."""
    found = [item for item in items if f"/{item.path}" in result.words + result.there]
    return max(found, key=lambda item: len(item.path), default=None)


def _lost(error: DispatchError) -> DispatchError:
    """Return the meaning of an error after we had made the folders: if they are missing, somebody removes them."""
    if not isinstance(error, NotFound):
        return error
    return Interrupted(f"{error.message}: what is being written vanishes: another attempt or program removes it")


def _said(output: bytes, target: RsyncTarget, hide: Callable[[str], str] = str) -> DispatchError:
    """Return the error that a script's message means."""
    words = output.decode("utf-8", "replace").strip()
    kind = next((error for pattern, error in WORDS if re.search(pattern, words, re.MULTILINE)), Misconfigured)
    return kind(f"{target.folder}: {short(words, hide)}")


driver = Driver(
    target=RsyncTarget,
    check=check,
    push=push,
    hook=ssh.hook,
    facts=Facts(
        keeps_names=True,
        resumes=True,
        atomic_replace=True,
        verifies_by=(Level.ACCEPTED, Level.LISTED, Level.PROVEN),
        by_name=not DESCRIPTORS.is_dir(),
    ),
)
