"""rsync over ssh: the system's rsync, its arguments, its progress and what its exit codes mean.

Source: rsync(1), of 3.1.3 and later; the other side may be older. Names go through a list that ends each with a NUL,
paths on the other side through rsync's own protocol (`-s`), so no shell sees either.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import select
import shlex
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from protocols.ssh.client import END_S, SshClient
from protocols.ssh.memfiles import tail
from protocols.ssh.programs import program, start, stop
from protocols.ssh.words import Said, short
from transfer.errors import (
    Busy,
    Denied,
    DispatchError,
    Interrupted,
    Misconfigured,
    NotFound,
    Rejected,
    TimedOut,
    Unreachable,
)

PARTIAL = ".talaria-partial"  # in each folder; holds what has come of a file when the link breaks
TEMPORARY = ".talaria-temp"  # in the folder that is sent to; holds files that are coming
LOOK_S = 0.05  # between two looks at what rsync has printed, and at whether to stop
PIPE_BYTES = 1 << 20  # what it prints meanwhile must not fill the pipe and stop it
PIECE = 65_536
SLOWEST_SUM = 20 << 20  # bytes a second that either side computes checksums at, in silence

# rsync(1), EXIT VALUES. 255 is ssh's own, 127 and 126 are the shell's on the other side.
PARTLY = (23, 24, 25)  # rsync has come to its end, if not with every file
SILENCED = 12  # the other side has ended without a word
OF_SSH = 255
EXITS: dict[int, tuple[type[DispatchError], str]] = {
    1: (Misconfigured, "rsync doesn't know an option: it is too old on one side"),
    2: (Misconfigured, "what answers is not rsync: the account runs SFTP only, or its login prints text"),
    3: (Misconfigured, "rsync can't use a folder that it was given"),
    4: (Misconfigured, "rsync is too old on one side"),
    5: (Misconfigured, "the server's rsync doesn't start"),
    6: (Misconfigured, "the server's rsync can't write its log"),
    10: (Interrupted, "the link broke"),
    11: (Interrupted, "reading or writing a file failed"),
    12: (Interrupted, "the link broke"),
    13: (Interrupted, "rsync could not report"),
    14: (Interrupted, "rsync lost its child process"),
    20: (Interrupted, "rsync was stopped"),
    21: (Interrupted, "rsync lost its child process"),
    22: (Busy, "no memory for rsync"),
    23: (Interrupted, "not everything was transferred"),
    24: (Interrupted, "files vanished while they were sent"),
    30: (TimedOut, "the server was silent for too long"),
    35: (Unreachable, "no connection in time"),
    126: (Misconfigured, "rsync may not be run on the server"),
    127: (Misconfigured, "rsync is not installed on the server"),
}
# What the system said weighs more than rsync's code: errno(3) in C's words.
WORDS: tuple[tuple[str, type[DispatchError]], ...] = (
    (r"No space left on device|Disk quota exceeded", Busy),
    (r"File too large", Rejected),
    (r"Read-only file system|Permission denied|Operation not permitted", Denied),
    (r"command not found|not found$", Misconfigured),
    (r"Not a directory|No such file or directory", NotFound),
)
_PROGRESS = re.compile(rb"[\r\n]\s*(\d+)\s+\d+%")
_ESCAPED = re.compile(rb"\\#([0-7]{3})")


# rsync starts the other side by this. What a login prints before the other side begins is passed over; what comes on
# ssh's standard error, banners among it, is kept apart from what rsync says; ssh's exit code is kept, because rsync
# doesn't always wait for it.
SSH = """#!/bin/sh
shift
{{ {ssh} -- {host} "$@" 2>>{errors}; echo $? >{ended}; }} | {{
  while IFS= read -r line; do case $line in *{word}) exec cat ;; esac; done
}}
read -r code <{ended}
exit $code
"""


@dataclass(frozen=True)
class Result:
    """How a run of rsync ended: its exit code, both sides' last words, what it printed, and the ssh that it used.

    Attributes:
        words: rsync's messages here, and those that it passed on from the other side.
        there: what the other side wrote outside of rsync's protocol.
    """

    code: int
    words: str
    there: str
    output: bytes
    said: Said

    def failure(self) -> DispatchError:
        """Return the error that exit code and messages mean."""
        words = "\n".join(line for line in self.words.splitlines() if "rsync error:" not in line)
        words = "\n".join(filter(str.strip, (words, self.there))) or self.words
        said, shown = short(words, self.said.hide), self.said.login.shown
        if self.code == OF_SSH or (self.code == SILENCED and self.said.words):
            return self.said.failure(self.code)
        kind, meaning = EXITS.get(self.code, (Interrupted, f"rsync ended with exit code {self.code}"))
        if self.code in (3, 11, 12, 13, *PARTLY):
            kind = next((error for pattern, error in WORDS if re.search(pattern, words, re.MULTILINE)), kind)
        return kind(f"{shown}: {meaning} ({said})" if said else f"{shown}: {meaning}")


@dataclass(frozen=True)
class Rsync:
    """How to run rsync to a host.

    Attributes:
        banner: the host's message to everybody, known from an earlier shell.
        limit: bytes per second, None for no limit.
    """

    client: SshClient
    banner: Callable[[], str] = str
    limit: int | None = None
    compress: bool = False
    check: Callable[[], None] = lambda: None
    moved: Callable[[int], None] = lambda count: None

    def send(
        self,
        source: Path,
        paths: Iterable[str],
        folder: str,
        *,
        largest: int = 0,
        there: str = "",
        sparse: bool = False,
    ) -> Result:
        """Send the files with these paths below `source` to the same paths below `folder`.

        The folder and TEMPORARY in it exist. Files that were interrupted before are continued. The account's umask
        decides the modes of new files and folders.

        Args:
            largest: bytes of the largest file: either side may be silent while it reads the part that is there.
            there: a folder whose files, if length and time are the same, are not sent again.
            sparse: whether runs of zeros become holes.

        Raises:
            what `check` does; rsync and its ssh are then gone.
        """
        options = [
            "--times",
            "--omit-dir-times",
            "--chmod=D0777,F0666",
            f"--partial-dir={PARTIAL}",
            f"--temp-dir={TEMPORARY}",
            "--compress" if self.compress else "--no-compress",
            *(["--sparse"] if sparse else []),
            "--info=progress2",
            "--no-human-readable",
        ]
        if self.limit is not None:
            options.append(f"--bwlimit={max(1, self.limit // 1024)}")  # KiB
        quiet_s = largest / SLOWEST_SUM + (PIECE / self.limit if self.limit else 0)
        return self._run([*options, *_besides(there)], source, paths, folder, quiet_s=quiet_s)

    def differing(
        self,
        source: Path,
        paths: Iterable[str],
        folder: str,
        *,
        checksum: bool = False,
        size: int = 0,
        there: str = "",
    ) -> tuple[Result, list[str]]:
        """Return the files that rsync would have to send, compared by length or by checksum.

        Args:
            size: bytes of all of them, for the time that checksums may take.
            there: as in `send`.
        """
        options = [
            "--dry-run",
            "--checksum" if checksum else "--size-only",
            "--no-times",
            "--out-format=%i %n",
            *_besides(there),
        ]
        quiet_s = size / SLOWEST_SUM if checksum else 0
        result = self._run(options, source, paths, folder, quiet_s=quiet_s)
        lines = [line for line in result.output.split(b"\n") if line.startswith((b"<f", b"cL"))]
        return result, [_unescaped(line.split(b" ", 1)[1]) for line in lines]

    def _run(self, options: list[str], source: Path, paths: Iterable[str], folder: str, *, quiet_s: float) -> Result:
        with self.client.briefly():
            return self._run_once(options, source, paths, folder, quiet_s=quiet_s)

    def _run_once(
        self, options: list[str], source: Path, paths: Iterable[str], folder: str, *, quiet_s: float
    ) -> Result:
        client = self.client
        errors, ended = client.file(), client.file()
        idle_s = math.ceil(client.login.idle_timeout_s + quiet_s)
        # With "./" before each: even in a list with NULs rsync takes a name that begins with # or ; for a comment.
        listed = client.file(b"".join(b"./" + path.encode("utf-8", "surrogateescape") + b"\0" for path in paths))
        ssh, said = client.command()
        word = uuid.uuid4().hex
        script = SSH.format(
            word=word, ssh=shlex.join(ssh), host=shlex.quote(client.login.host), errors=said.errors, ended=ended
        )
        argv = [
            program("rsync"),
            "-s",
            "--8-bit-output",
            "--from0",
            "--files-from=-",
            "--copy-links",  # a source may consist of links to what is open (`tasks.rsync.names`); no other has any
            f"--timeout={idle_s}",
            *options,
            f"--rsync-path=echo {word}; rsync",
            "-e",
            f"/bin/sh {client.file(script.encode())}",
            f"{source}/",
            # A relative folder that begins with a colon would name a module of an rsync daemon.
            f"host:{folder if folder.startswith('/') else f'./{folder}'}/",
        ]
        with open(listed, "rb") as names:
            process = start(argv, errors, client.env, stdin=names)
        try:
            output = self._follow(process, idle_s)
            code = process.wait()
        finally:
            stop(process)
        if code:  # the other side's words may come later than rsync's end
            of_ssh = _code_of_ssh(ended)
            code = of_ssh or code if code == SILENCED else code
        said = said.kept()
        there = said.stderr.replace(self.banner().replace("\r", "").strip() or "\0", "").strip()
        return Result(code, tail(errors).decode("utf-8", "replace"), there, output, said)

    def _follow(self, process: subprocess.Popen[bytes], idle_s: float) -> bytes:
        """Read rsync's output until it ends; report the bytes that have moved.

        rsync's own timeout, and ssh's, take the other side's signs of life for progress, even if nothing of ours
        gets through; so the time counts here as well.
        """
        assert process.stdout is not None  # noqa: S101 - for the type checker
        fd, output, reported = process.stdout.fileno(), bytearray(), 0
        os.set_blocking(fd, False)
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        poll = select.poll()
        # Only the end wakes us: rsync prints a line for each small file, and to run for each took the time of a third.
        poll.register(fd, 0)
        heard = time.monotonic()
        while True:
            self.check()
            over = bool(poll.poll(LOOK_S * 1000))
            piece = _all_there(fd)
            if piece:
                heard = time.monotonic()
                output += piece
                seen = _PROGRESS.findall(output)
                if seen:
                    moved, reported = int(seen[-1]) - reported, int(seen[-1])
                    if moved > 0:
                        self.moved(moved)
                    del output[: max(output.rfind(b"\r"), output.rfind(b"\n"))]
            elif time.monotonic() - heard > idle_s + END_S:
                raise TimedOut(f"{self.client.login.shown}: nothing has moved for {idle_s:g} s")
            if over:
                return bytes(output)


def _code_of_ssh(file: str) -> int:
    """Return ssh's exit code if it comes from ssh itself or from the shell there; else 0."""
    end = time.monotonic() + END_S
    while not (text := tail(file).strip()) and time.monotonic() < end:
        time.sleep(LOOK_S)
    return int(text) if text in (b"126", b"127", b"255") else 0


def _all_there(fd: int) -> bytes:
    """Return everything that a non-blocking pipe holds."""
    pieces = []
    with suppress(BlockingIOError):
        while piece := os.read(fd, PIECE):
            pieces.append(piece)
    return b"".join(pieces)


def _besides(folder: str) -> list[str]:
    return [f"--compare-dest={folder}"] if folder else []


def _unescaped(name: bytes) -> str:
    r"""Return a name without rsync's escapes, which are \#ooo for control characters."""
    return _ESCAPED.sub(lambda found: bytes([int(found[1], 8)]), name).decode("utf-8", "surrogateescape")
