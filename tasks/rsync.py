"""rsync targets: folders on servers that give a shell and have rsync.

Everything goes into `<folder>/.incoming-<dispatch>/`, where an interrupted transfer finds again what has come. When
it is whole, one rename makes it visible; if the folder is there already, file after file is renamed into it. A shell
prepares and ends it; rsync logs in on its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from shlex import quote

from blocks.rsync import RsyncTarget
from imaging.header import BEGINNING_BYTES
from protocols.net.hiding import quieted
from protocols.ssh.client import Client
from protocols.ssh.programs import program
from protocols.ssh.rsync import PARTIAL, PARTLY, TEMPORARY, WORDS, Result, Rsync
from protocols.ssh.shell import Shell
from protocols.ssh.words import short
from tasks import ssh
from tasks.driver import Driver, Facts
from transfer.errors import Busy, Denied, DispatchError, Interrupted, Misconfigured, NotFound, Rejected
from transfer.health import Health
from transfer.layout import OTHER_INSTANCE
from transfer.outcome import DELIVERED, Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import Level, PushReport, Receipt

SLOWEST_RENAMES = 100  # files a second that a server renames, one program each
INCOMPLETE = 3  # exit code of PLACE
SOME_REPLACED = "talaria: replaced"  # last words of PLACE, if files were in the way
# Scripts for a POSIX shell on the server; every @NAME@ is replaced by quoted words.
# Prints where it is, and what an earlier attempt has given its final name already, though we were not told.
PREPARE = """
mkdir -p @FOLDER@ && cd @FOLDER@ && mkdir -p @FOLDERS@ && [ -w . ] || exit 1
chmod 700 @INCOMING@
pwd
cd @INCOMING@ && for one in placed-*; do [ ! -e "$one" ] || echo "$one"; done
"""
# mv -T never moves into a folder that is there; where mv doesn't know it, nobody but us makes folders of this name.
# Folders stay enterable for the group whatever the umask.
PLACE = """
cd @FOLDER@ || exit 1
base=$(pwd)
place() {  # number, name, how many files must have come ("" where an earlier attempt brought some)
  from=@INCOMING@/$1 to=./$2 replaced=$base/@INCOMING@/replaced-$1
  [ -d "$from" ] || { echo "what has come is gone: another attempt or program has cleared it"; exit 3; }
  rm -rf "$from/@TEMPORARY@"
  find "$from" -type d -name @PARTIAL@ -prune -exec rm -rf {} +
  count=$(find "$from" ! -type d -exec printf '%.0sx' {} + | wc -c)
  [ -z "$3" ] || [ "$count" -eq "$3" ] || { echo "$count of $3 files have come"; exit 3; }
  find "$from" -type d -exec chmod g+rx {} +
  case $to in ./*/*) mkdir -p "${to%/*}" || return 1 ;; esac
  if [ ! -e "$to" ]; then
    if mv -T -- "$from" "$to" 2>/dev/null; then return 0; fi
    if [ ! -e "$to" ]; then mv -- "$from" "$to"; return; fi
  fi
  rm -f "$to/@MARKER@"
  cd "$from" || return 1
  find . -type d -exec sh -c '
    to=$1; shift
    for one do [ -d "$to/$one" ] || mkdir "$to/$one"; done' sh "$base/$to" {} +
  find . ! -type d -exec sh -c '
    to=$1; replaced=$2; shift 2
    instance() {  # in hexadecimal, of Media Storage SOP Instance UID (0002,0003) of a file
      hex=$(od -An -v -tx1 -N @BEGINNING@ "$1" 2>/dev/null | tr -d " \\n")
      [ "$(printf %s "$hex" | cut -c257-264)" = 4449434d ] || return
      value=${hex#*020003005549}
      [ "$value" = "$hex" ] || printf %s "$value" | cut -c5-$((4 + 2 * 0x$(printf %s "$value" | cut -c1-2)))
    }
    for one do
      if [ -d "$to/$one" ]; then echo "$one: a folder of this name is in the way"; continue; fi
      [ -d "$to/${one%/*}" ] || { echo "$one: a file is in the way of its folder"; continue; }
      if [ -f "$to/$one" ] && ! cmp -s -- "$one" "$to/$one"; then
        ours=$(instance "$one") theirs=$(instance "$to/$one")
        if [ "$ours" ] && [ "$theirs" ] && [ "$ours" != "$theirs" ]; then echo "$one: "@OTHER@; continue; fi
        printf "%s\\\\0" "${one#./}" >>"$replaced"
      fi
      mv -f -- "$one" "$to/$one"
    done' sh "$base/$to" "$replaced" {} +
  cd "$base" || return 1
  [ -z "$(find "$from" ! -type d | head -n 1)" ]
}
note() { if [ $? -eq 0 ]; then : >@INCOMING@/placed-$1; else code=2; fi; }
@DROP@
code=0
@PLACES@
for one in @INCOMING@/replaced-*; do [ ! -e "$one" ] || { printf %s @REPLACED@; break; }; done
exit $code
"""
# Paths of the files in whose place others were, each with a NUL.
REPLACED = """
cd @FOLDER@/@INCOMING@ && cat replaced-@PLACE@ 2>/dev/null
"""
LEFT = """
cd @FOLDER@/@INCOMING@ && find @PLACE@ ! -type d -exec printf '%s\\0' {} +
"""
FINISH = """
cd @FOLDER@ || exit 1
for one in @NAMES@; do
  if [ ! -d "./$one" ]; then printf '%s\\0' "$one"
  elif [ ! -e "./$one/@MARKER@" ]; then : >"./$one/@MARKER@" || exit 1
  fi
done
rm -rf @INCOMING@
"""
REMOVE = """
cd @FOLDER@ && rm -f -- @PATHS@
"""
PROBE = """
folder=@FOLDER@
while [ ! -e "$folder" ]; do
  case $folder in */*) up=${folder%/*}; folder=${up:-/} ;; *) folder=. ;; esac
done
cd "$folder" || exit 1
: >@PROBE@ && mv -- @PROBE@ @PROBE@- && rm -- @PROBE@- || exit 1
printf '%s' "$folder"
"""


def check(target: RsyncTarget) -> Health:
    """Probe name, port, host key, login, shell, writing in the folder, rsync on both sides, and the script."""
    health = Health()
    rest = ["trust", "authenticate", "shell", "authorize", "rsync", *(["hook"] if target.on_complete else [])]
    if ssh.probe_host(health, target):
        try:
            with Client(ssh.login(target)) as client:
                _check(health, target, client)
        except DispatchError:
            with health.probe("authenticate"):
                raise
    health.skip(*(name for name in rest if name not in {probe.name for probe in health.probes}))
    return health


def _check(health: Health, target: RsyncTarget, client: Client) -> None:
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
        with health.probe("authorize") as probe:
            code, output = shell.run(_filled(PROBE, FOLDER=target.folder, PROBE=ssh.probe_name()))
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
        if target.on_complete:
            with health.probe("hook"):
                if shell.run(ssh.script_there(target))[0]:
                    raise ssh.no_script(target)


def push(target: RsyncTarget, plan: Plan, report: PushReport) -> Receipt:
    """Send every pending file, make all visible at once, then put the marker; told when visible."""
    report.check()
    hide = ssh.hiding(target, plan)
    with (
        quieted(hide, target.name),
        Client(ssh.login(target), hide, report.check) as client,
        Shell(client, report.check) as shell,
    ):
        rsync = Rsync(client, lambda: shell.banner, target.bandwidth_limit, target.compress, report.check, report.moved)
        return _Push(target, plan, report, shell, rsync).run()


@dataclass
class _Folder:
    """One folder that the layout makes: its name, where it grows, and what it shall hold."""

    name: str
    number: int
    items: list[Item]
    pending: list[Item] = field(default_factory=list)
    sent: list[Item] = field(default_factory=list)


class _Push:
    def __init__(self, target: RsyncTarget, plan: Plan, report: PushReport, shell: Shell, rsync: Rsync) -> None:
        self.hide = shell.client.hide
        self.target, self.plan, self.report, self.shell, self.rsync = target, plan, report, shell, rsync
        self.incoming = f".incoming-{plan.dispatch_id}"
        self.base = target.folder  # absolute once the server has told
        self.placed: set[int] = set()  # numbers of the folders that an earlier attempt has made visible
        self.notes: list[str] = []
        waiting = {item.path for item in plan.pending}
        self.folders = [
            _Folder(name, number, items, [item for item in items if item.path in waiting])
            for number, (name, items) in enumerate(ssh.by_folder(target, plan).items())
        ]

    def run(self) -> Receipt:
        growing = [folder for folder in self.folders if folder.pending]
        if growing:
            for folder in growing:  # while ssh connects
                folder.pending = self.unchanged(folder.pending, self.reject)
            self.prepare(growing)
            for folder in growing:
                self.send(folder)
            self.place(growing)
        verified = self.verify()
        self.finish()
        return self.report.receipt(self.target.name, self.plan, verified, tuple(map(self.hide, self.notes)))

    def script(self, text: str, **words: str | list[str]) -> tuple[int, bytes]:
        """Run one of the scripts above in the target's folder."""
        filled = _filled(text, FOLDER=self.target.folder, INCOMING=self.incoming, MARKER=ssh.MARKER, **words)
        idle_s = self.target.idle_timeout_s + len(self.plan.items) / SLOWEST_RENAMES
        return self.shell.run(filled, idle_s=idle_s)

    def reject(self, item: Item, reason: str) -> None:
        self.report(item, Outcome(Kind.REJECTED, self.hide(reason)))

    def unchanged(self, items: Iterable[Item], refuse: Callable[[Item, str], None]) -> list[Item]:
        """Return the items whose files are as planned; why the others are not is told to `refuse`."""
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

    def send(self, folder: _Folder) -> None:
        """Bring a folder's files to where it grows; what has changed meanwhile is rejected."""
        items = folder.pending
        if not items:
            return
        place = f"{self.base}/{self.incoming}/{folder.number}"
        there = f"{self.base}/{folder.name}" if folder.number in self.placed else ""
        largest = max(item.size for item in items)
        paths = [item.path for item in items]
        result = self.rsync.send(self.plan.root, paths, place, largest=largest, there=there)
        missing: dict[str, str] = {}
        if result.code in PARTLY:
            missing = self.missing(result, items, place, there)
        elif result.code:
            raise _lost(result.failure())
        for item in self.unchanged(items, self.reject):
            if item.path in missing:
                self.reject(item, missing[item.path])
            else:
                folder.sent.append(item)

    def missing(self, result: Result, items: list[Item], place: str, there: str) -> dict[str, str]:
        """Return why which files have not come, where rsync says that some have not.

        Raises:
            DispatchError: the reason holds for every file, or none has come.
        """
        error = result.failure()
        if isinstance(error, Busy):
            raise error
        again, paths = self.rsync.differing(self.plan.root, [item.path for item in items], place, there=there)
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
        """Give the folders their final names, and tell what has arrived."""
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
            DROP=_Script(f"rm -f -- {' '.join(map(quote, drop))}" if drop else ""),
            PLACES=_Script("\n".join(calls)),
            OTHER=_Script(f'"{OTHER_INSTANCE}"'),  # within quotes already
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
        """Return the paths at which another file was in a folder that was there before."""
        _, output = self.script(REPLACED, PLACE=str(folder.number))
        return frozenset(output.decode("utf-8", "surrogateescape").split("\0"))

    def expected(self, folder: _Folder) -> str:
        """How many files must be where a folder grows: rsync has been seen to leave out a name without a word."""
        return "''" if folder.number in self.placed else str(len(folder.sent))

    def left(self, growing: list[_Folder], said: str) -> dict[str, str]:
        """Return why which files could not be renamed into a folder that was there.

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
        """Ask rsync what it would have to send; take back what it names."""
        wanted = self.target.verify
        if wanted is Level.ACCEPTED:
            return wanted
        for folder in self.folders:
            # What can't be compared any more is taken back.
            there = self.unchanged(filter(self.has_arrived, folder.items), self.report.revoke)
            items = {item.path: item for item in there}
            if not items:
                continue
            result, paths = self.rsync.differing(
                self.plan.root,
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
        """Put the marker into every folder that has all its files; take away where they grew.

        Which folder lacks what can't be sent is not known: then none is marked.
        """
        whole = [folder.name for folder in self.folders if all(map(self.has_arrived, folder.items))]
        if self.plan.lacks:
            whole = []
        code, output = self.script(FINISH, NAMES=whole)
        if code:
            if self.plan.pending:
                raise _said(output, self.target, self.hide)
            self.notes.append(f"{self.target.folder} has been taken away since it was delivered to")
            return
        for name in filter(None, output.decode("utf-8", "replace").split("\0")):
            self.notes.append(f"{ssh.under(self.target.folder, name)} has been taken away since it was delivered")


class _Script(str):
    """Text of a script that is put into another as it is."""


def _filled(text: str, **words: str | list[str]) -> str:
    """Put words into a script, quoted, in one pass: what is put in is not looked at again."""

    def word(found: re.Match[str]) -> str:
        value = words[found[1]]
        if isinstance(value, _Script):
            return value
        return quote(value) if isinstance(value, str) else " ".join(map(quote, value))

    return re.sub(r"@([A-Z]+)@", word, text)


def _lost(error: DispatchError) -> DispatchError:
    """Return what an error means that came after we had made the folders: they are not wrong, they vanish."""
    if not isinstance(error, NotFound):
        return error
    return Interrupted(f"{error.message}: what is being written vanishes, another attempt or program clears it")


def _said(output: bytes, target: RsyncTarget, hide: Callable[[str], str] = str) -> DispatchError:
    """Return the error that a script's words mean."""
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
    ),
)
