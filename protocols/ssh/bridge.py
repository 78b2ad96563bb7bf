"""What rsync runs in the place of ssh: it has rsync's other side started in a shell that is logged in already.

A session of its own would cost another login shell, with all that the account's profile does in it, and a server
may allow one session a connection.

Run by rsync as `python -I -S bridge.py HOST rsync --server …`; imports next to nothing, so that it starts within 10 ms.
`TALARIA_SHELL` in its environment holds the pipe to the shell, the pipe from it, and a word that nobody can guess.
Its exit code is that of the other rsync, as ssh's would be, or 255 if the shell has ended.
"""

from __future__ import annotations

import _thread
import os
import select
import sys

VARIABLE = "TALARIA_SHELL"
PIECE = 65_536
KNOWN = 16  # characters of the word, by which its beginning at the end of a piece is known
LOST = 255
ENDED = (0, 23, 24, 25)  # rsync has come to its end, if not with every file: it has read all that was for it
# The shell reads the whole of it before it does any of it. Where rsync has not come to its end, bytes of files may
# still be on their way: they must never be read as commands, so nothing is before a word that they don't know.
# rsync leaves the open files that it has been given non-blocking, of which a shell makes nothing good. Opened anew
# they are its own; where that can't be, this shell ends, and `Shell.run` gets another.
START = """{{
code=0
if [ -p /dev/stdin ] && [ -r /dev/stdin ] && [ -p /dev/stdout ] && [ -w /dev/stdout ]; then
  printf '%s +\\n' {word}
  {command} </dev/stdin >/dev/stdout || code=$?
  printf '%s %d\\n' {word} $code
  case $code in {ended}) ;; *) exit $code ;; esac
  IFS= read -r line && [ "$line" = {word}. ] || exit 1
else
  printf '%s +\\n' {word}
  {command} || code=$?
  printf '%s %d\\n' {word} $code
  exit $code
fi
}}
"""


def main(command: list[str]) -> int:
    """Start the command in the shell, and carry bytes until it has ended; return its exit code."""
    to_shell, from_shell, name = os.environ[VARIABLE].split()
    into, out, word = int(to_shell), int(from_shell), name.encode()
    os.set_blocking(1, True)
    words = {"command": " ".join(map(_quote, command)), "ended": "|".join(map(str, ENDED))}
    _write(into, START.format(word=name, **words).encode())
    held, begun = b"", False
    while piece := os.read(out, PIECE):
        held += piece
        at = held.find(word)
        if not begun and at >= 0 and b"\n" in held[at:]:  # what came before is what a login printed
            begun, held = True, held[at:].partition(b"\n")[2]
            _thread.start_new_thread(_forward, (into,))
            at = held.find(word)
        if begun and at >= 0:
            _write(1, held[:at])
            held = held[at:]
            if b"\n" in held:
                return int(held.partition(b"\n")[0].split()[1])
        elif begun:
            at = held.rfind(word[:KNOWN], max(0, len(held) - len(word)))
            at = len(held) if at < 0 else at
            _write(1, held[:at])
            held = held[at:]
    return LOST


def _forward(into: int) -> None:
    """Carry what rsync says to the shell, without looking at it; rsync is gone when it says no more."""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    try:
        # splice(2) holds the pipe's lock while it waits for a socket: nobody could read from the pipe meanwhile.
        while poll.poll() and os.splice(0, into, PIECE):
            pass
    except OSError:
        try:
            while piece := os.read(0, PIECE):
                _write(into, piece)
        except OSError:
            pass
    os._exit(LOST)


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _quote(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


if __name__ == "__main__":
    try:
        code = main(sys.argv[2:])
    except OSError:
        code = LOST
    os._exit(code)
