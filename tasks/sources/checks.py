"""Whether a source can be used: looked at when it is applied, tested, and before anything of it is touched.

A folder that is not there, or lies on a share that is not mounted, would look like one from which all has gone. One
that overlaps a folder target, another source, or the state directory would send, or delete, what Talaria has put there
itself.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from urllib.parse import unquote, urlsplit

from blocks import Source, Target
from blocks.dicom_source import DicomSource
from blocks.inbox import InboxSource
from blocks.list_source import ListSource
from blocks.source import After, FileSource
from protocols.files.filesystem import FLUSHED_AS_A_WHOLE, kind
from tasks.dispatch.hours import check_hours
from tasks.names import split
from tasks.sources import dicom, inbox, lines, ports
from tasks.targets import UNKNOWN, check_destination, check_origin, check_source, origin_of
from transfer import listening, roots
from transfer.beneath import resolved
from transfer.errors import DispatchError, Misconfigured
from transfer.home import Home
from transfer.shared import host_of
from transfer.spool import FOLDER

# File systems that one machine has for itself: of any other, as a share, several hosts may have the same files.
OWN_DISKS = FLUSHED_AS_A_WHOLE - {"nfs", "nfs4"}
MOUNTS, PLANNED = Path("/proc/self/mountinfo"), Path("/etc/fstab")
DEVICES = "/dev/"
_Mount = tuple[list[str], list[str]]  # a line of mountinfo (proc_pid_mountinfo(5)): what is before the dash, and behind


def problems(
    source: Source,
    sources: Iterable[Source],
    targets: Iterable[Target],
    mount: str = "",
    elsewhere: Mapping[str, str] = MappingProxyType({}),
    mute: Collection[str] = (),
) -> list[str]:
    """Return why a source can't be used, each reason a sentence; nothing if it can.

    Args:
        sources: all that are saved, or about to be.
        targets: all that are saved.
        mount: the file system that its folder lay on before; "" if that is not known.
        elsewhere: the sources that belong to other hosts, each with its host.
        mute: those of `places_beside` whose file system does not answer: they are known by their names alone.
    """
    known = {one.name: one for one in targets}
    found, folders = list(_of_targets(source, known)), _Folders(mute)
    if isinstance(source, InboxSource):
        found += _of_folder(source, mount)
    if isinstance(source, ListSource):
        found += _of_file(source)
    if isinstance(source, DicomSource):
        found += ports.loops(source, sources, known, elsewhere)
    for folder in source.folders:
        real = resolved(folder)
        if folders.overlap(real, roots.state_folder()):
            found.append(
                f"{folder}: lies in Talaria's state directory, or holds it: what others have yet to deliver lies there"
            )
        for other in sources:
            if other.name != source.name and not (other.name in elsewhere and is_own(folder)):
                found += (
                    f"{folder} and {one} of source {other.name} overlap: each file must have one source"
                    for one in (*other.folders, *_moved_to(other))
                    if folders.overlap(real, folders.real(one))
                )
        for target in known.values():
            place = folder_of(target)
            if place and folders.overlap(real, folders.real(place)):
                found.append(
                    f"{folder} and {place} of target {target.name} overlap: what is delivered would come again"
                )
    for one in _moved_to(source):
        if roots.is_in(roots.state_folder(), resolved(one)):  # one that lies in it is refused as a place to write to
            found.append(f"move_to: {one}: holds Talaria's state directory")
        found += (
            f"move_to: {one} and {folder} of source {other.name} overlap: what is moved would come again"
            for other in sources
            if not (other.name in elsewhere and is_own(one))
            for folder in other.folders
            if folders.overlap(resolved(one), folders.real(folder))
        )
    return list(dict.fromkeys(found))


def of_listener(
    source: Source,
    sources: Iterable[Source],
    home: Home | None = None,
    elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """Return why a DICOM source can't listen, each reason a sentence; what it has received is dispatched all the same.

    Args:
        home: of the process that listens, which knows more; None if the source is about to be saved.
        elsewhere: the sources that belong to other hosts, each with its host.
    """
    if not isinstance(source, DicomSource):
        return []
    found = list(dicom.problems(source, [one for one in sources if one.name not in elsewhere]))
    if home is not None and source.enabled:
        found += filter(None, [listening.trouble(home, source.name)])
    return list(dict.fromkeys(found))


def of_report(
    source: Source,
    sources: Iterable[Source],
    elsewhere: Mapping[str, str] = MappingProxyType({}),
    mute: Collection[str] = (),
) -> list[str]:
    """Return why a list's report would be another one's, too, if the source is about to be saved.

    One that is saved goes on: its lines are dispatched, and it is just not known which report is the last one.

    Args:
        elsewhere, mute: as of `problems`.
    """
    if not isinstance(source, ListSource):
        return []
    real = resolved(source.file)
    return [
        f"{source.file} is the list of source {other.name}, too, and each would write over the report of the other:"
        " copy the list"
        for other in sources
        if isinstance(other, ListSource)
        and other.name != source.name
        and _real(other.file, mute) == real
        and not (other.name in elsewhere and is_own(str(Path(real).parent)))
    ]


def check_removal(home: Home, name: str) -> None:
    """Check that a source has nothing that only it would deliver.

    Raises:
        Misconfigured: what senders were told is kept would lie there for ever.
    """
    if count := dicom.waiting(home, name):
        raise Misconfigured(
            f"{count} units that it received are not delivered yet: let its senders send elsewhere, and wait until"
            f" they are, or move {home.root / FOLDER / name} away",
            name,
        )


def _of_targets(source: Source, known: dict[str, Target]) -> Iterator[str]:
    query = str(getattr(source, "query", ""))
    asked = known.get(split(query)[1]) if query else None
    for written in source.reaches:
        type_name, name = split(written)
        target = known.get(name)
        if target is None or type_name not in (None, target.type_name):
            there = f"there are: {', '.join(sorted(known))}" if known else "there are none yet"
            yield f"no target named {written}; {there}"
            continue
        try:
            if target.enabled:  # what goes to one that is not waits for it
                check_destination(target)
                check_hours(target, "" if query else source.priority)  # what was fetched is sent in its own hours
        except DispatchError as exc:
            yield f"target {name} {exc.message}"
        if isinstance(source, FileSource) and not query:
            for field, why in target.of_origin.items():
                if not getattr(source.origin, field):
                    yield f"target {name}: {why}, but nobody knows where files come from: give the source {field}"
        elif asked is not None:  # it is the origin
            try:
                check_origin(target, origin_of(asked), UNKNOWN)
            except DispatchError as exc:
                yield f"target {name}: {exc.message}"
    if query:
        try:
            if asked is None:
                yield f"no target named {query}"
            else:
                check_source(asked)
                check_hours(asked, source.priority)
        except DispatchError as exc:
            yield f"target {query} {exc.message}"


def _of_folder(source: InboxSource, mount: str) -> Iterator[str]:
    folder = source.folder
    try:
        inbox.real_folder(folder)
    except DispatchError as exc:
        missing = not_mounted(folder)
        yield f"{exc.message}{f': {missing} is not mounted' if missing else ''}"
        return
    if missing := not_mounted(folder):
        yield f"{folder}: lies on {missing}, which is not mounted"
    elif mount and not is_same_mount(mount, mounted_at(folder)):
        yield (
            f"{folder}: lies on another file system than when it was applied ({mounted_at(folder)}, and not {mount}): "
            "is its share mounted? If that is as it should be, apply the source again"
        )
    if source.after is not After.LEAVE and not os.access(folder, os.W_OK | os.X_OK):
        yield f"{folder}: can't be written to by this user, so that nothing can be moved or deleted"
    if source.after is After.MOVE:
        try:
            roots.places().check(source.move_to)
        except DispatchError as exc:
            yield f"move_to: {exc.message}"
            return
        if not Path(source.move_to).is_dir():
            yield f"move_to: {source.move_to}: is not a folder"
        elif not os.access(source.move_to, os.W_OK | os.X_OK):
            yield f"move_to: {source.move_to}: can't be written to by this user"


def _of_file(source: ListSource) -> Iterator[str]:
    path = source.file
    try:
        fd = roots.sources().open(path)
    except DispatchError as exc:
        yield exc.message
        return
    except OSError as exc:
        yield f"{path}: {exc.strerror}"
        return
    os.close(fd)
    try:
        lines.lines(source)  # that it is a list, and has the column
    except DispatchError as exc:
        yield exc.message
    if not os.access(Path(path).parent, os.W_OK | os.X_OK):
        yield f"{path}: the report beside it can't be written by this user"


def places_of(source: Source) -> tuple[str, ...]:
    """Return what of this machine's a sweep of a source looks into, or moves files to."""
    listed = (source.file,) if isinstance(source, ListSource) else ()
    return (*source.folders, *listed, *_moved_to(source))


def places_beside(source: Source, sources: Iterable[Source], targets: Iterable[Target]) -> list[str]:
    """Return the folders of other sources, and of targets, that one may overlap with; of a list, the other lists.

    Who looks at one on a share whose server is away waits for that.
    """
    if isinstance(source, ListSource):
        return [one.file for one in sources if isinstance(one, ListSource) and one.name != source.name]
    if not (source.folders or _moved_to(source)):
        return []
    others = [place for one in sources if one.name != source.name for place in (*one.folders, *_moved_to(one))]
    return [*others, *filter(None, map(folder_of, targets))]


def _real(path: str, mute: Collection[str]) -> str:
    """Return an absolute path without links; of those that are not looked at, as it is written."""
    return os.path.normpath(f"/{path.lstrip('/')}") if path in mute else resolved(path)


def _moved_to(source: Source) -> tuple[str, ...]:
    return (source.leaving.move_to,) if source.leaving.move_to else ()


def folder_of(target: Target) -> str:
    """Return the folder on this machine that a target keeps what it gets in; "" if it has none."""
    if target.type_name == "folder":
        return str(getattr(target, "folder", ""))
    url = str(getattr(target, "url", ""))
    return unquote(urlsplit(url).path) if url.startswith("file:") else ""


def is_own(folder: str) -> bool:
    """Return True if a folder surely is this host's alone: what another host has at its path is something else."""
    real = resolved(folder)
    return bool(host_of(folder) and host_of(real)) and kind(Path(real)) in OWN_DISKS


class _Folders:
    """Where folders lie; each is looked at once.

    Args:
        mute: those that are not looked at, as their file system does not answer.
    """

    def __init__(self, mute: Collection[str]) -> None:
        self._mounts, self._mute = _mounts(), {*mute}
        self._known: dict[str, tuple[str, str, list[tuple[int, int]]]] = {}

    def real(self, path: str) -> str:
        """Return a path without links; as it is written, if it is not looked at."""
        real = _real(path, self._mute)
        if path in self._mute:
            self._mute.add(real)
        return real

    def overlap(self, one: str, other: str) -> bool:
        """Return True if one of two real paths is the other, or lies in it; also under another name of a folder.

        It has two where it is mounted twice, and more where a share does not tell large letters from small ones.
        """
        if roots.is_in(one, other) or roots.is_in(other, one):
            return True
        (disk, inside, way), (other_disk, other_inside, other_way) = self._where(one), self._where(other)
        if disk == other_disk and (roots.is_in(inside, other_inside) or roots.is_in(other_inside, inside)):
            return True
        return bool(way and other_way) and (way[0] in other_way or other_way[0] in way)

    def _where(self, path: str) -> tuple[str, str, list[tuple[int, int]]]:
        """Return the file system that a path lies on, its path there, and what it and the folders above it are.

        Of shares by NFS only the last tells whether two folders are one.
        """
        if path not in self._known:
            disk, inside = "", path
            if found := _mount_of(path, self._mounts):
                fields, (system, *source) = found
                place = _unescaped(fields[4])
                inside = f"{_unescaped(fields[3])}/{path[len(place) :]}"
                # NFS says / of whatever folder is mounted, and one disk of several exports.
                disk = place if system.startswith("nfs") else f"{fields[2]} {source}"
            way = []
            with suppress(OSError):  # what is not there is in nobody's way
                names = () if path in self._mute else (path, *map(str, Path(path).parents))
                way = [(there.st_dev, there.st_ino) for there in map(os.stat, names)]
            self._known[path] = disk, f"/{os.path.normpath(inside).strip('/')}", way
        return self._known[path]


def _mounts() -> list[_Mount]:
    """Return what is mounted, in that order; nothing where that is not known."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    return [(before.split(), after.split()) for before, _, after in (line.partition(" - ") for line in lines)]


def _mount_of(real: str, mounts: Iterable[_Mount]) -> _Mount | None:
    """Return the one of some mounts that a real path lies on; the last one covers those before it."""
    best, found = "", None
    for mount in mounts:
        place = _unescaped(mount[0][4])
        if roots.is_in(real, place) and len(place) >= len(best):
            best, found = place, mount
    return found


def mounted_at(path: str) -> str:
    """Return the file system that a path lies on, as in `nfs4 server:/export /mnt/share`; "" if that is not known."""
    found = _mount_of(resolved(path), _mounts())
    if found is None:
        return ""
    fields, system = found
    return f"{system[0]} {_unescaped(system[1])} {_unescaped(fields[4])}"


def is_same_mount(before: str, now: str) -> bool:
    """Return True if a folder lies on the file system that it lay on before, as `mounted_at` has said.

    A disk may get another name with each start of its machine, or where a container gets it (/dev/sdb1, /dev/nvme2n1).
    """
    (kind, _, rest), (kind_now, _, rest_now) = before.partition(" "), now.partition(" ")
    (device, _, place), (device_now, _, place_now) = rest.partition(" "), rest_now.partition(" ")
    disks = device.startswith(DEVICES) and device_now.startswith(DEVICES)
    return before == now or (disks and (kind, place) == (kind_now, place_now))


def not_mounted(path: str) -> str:
    """Return the place on the way to a path where a file system should be mounted, and is not; "" if there is none."""
    try:
        lines = PLANNED.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        there = {_unescaped(line.split()[4]) for line in MOUNTS.read_text(errors="surrogateescape").splitlines()}
    except OSError:
        return ""
    rows = [line.split() for line in lines]
    named = [_unescaped(row[1]) for row in rows if len(row) > 1 and not row[0].startswith("#")]
    planned = [f"/{os.path.normpath(one).strip('/')}" for one in named if one.startswith("/")]  # as mount(8) takes it
    real = resolved(path)
    return next((one for one in planned if roots.is_in(real, one) and one not in there and one != "/"), "")


def _unescaped(field: str) -> str:
    r"""Return a field of mountinfo or fstab, in which blanks are written as \040."""
    if "\\" not in field:
        return field
    raw = field.encode("utf-8", "surrogateescape").decode("unicode_escape").encode("latin-1")
    return raw.decode("utf-8", "surrogateescape")
