"""A process that looks at a folder all the time, as whoever waits for studies there does.

    with watched(folder, {"a/1.dcm": digest, ...}, marker="x/.complete") as seen: push(...)
    assert not seen.wrong and seen.looks

A file that is visible under a final name must be whole, and the marker must not be there before the last file.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HIDDEN = (".incoming-", ".talaria-")
MARKER = ".complete"


@dataclass
class Seen:
    """What the process saw; filled when the block ends."""

    looks: int = 0
    wrong: list[str] = field(default_factory=list)
    partly: int = 0  # looks at which some files were visible, and not all


@contextmanager
def watched(folder: Path, plan_root: Path, paths: list[str], name: str) -> Iterator[Seen]:
    """Watch `<folder>/<name>` for files that are to become equal to those below `plan_root`."""
    stop = folder.parent / f"stop-{os.getpid()}-{time.monotonic_ns()}"
    job = json.dumps({"folder": str(folder / name), "root": str(plan_root), "paths": paths, "stop": str(stop)})
    seen = Seen()
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert process.stdin and process.stdout
    process.stdin.write(job + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "watching\n"
    try:
        yield seen
    finally:
        stop.touch()
        answer = json.loads(process.communicate(timeout=300)[0])
        stop.unlink()
        seen.looks, seen.wrong, seen.partly = answer["looks"], answer["wrong"], answer["partly"]


def main() -> None:
    job = json.loads(sys.stdin.readline())
    folder, root = Path(job["folder"]), Path(job["root"])
    sizes = {path: (root / path).stat().st_size for path in job["paths"]}
    digests: dict[str, str] = {}
    checked: dict[str, tuple[int, int]] = {}
    looks = partly = 0
    wrong: list[str] = []
    print("watching", flush=True)
    while True:
        last = Path(job["stop"]).exists()
        marked = (folder / MARKER).exists()
        there = set()
        for path, folders, files in os.walk(folder):
            folders[:] = [one for one in folders if not one.startswith(HIDDEN)]
            for file in files:
                full = os.path.join(path, file)
                relative = os.path.relpath(full, folder)
                if file.startswith(HIDDEN) or relative == MARKER:
                    continue
                try:
                    info = os.stat(full)
                except FileNotFoundError:
                    continue
                there.add(relative)
                if relative not in sizes:
                    wrong.append(f"{relative} is a stranger")
                elif info.st_size != sizes[relative]:
                    wrong.append(f"{relative} has {info.st_size} of {sizes[relative]} bytes")
                elif checked.get(relative) != (info.st_ino, info.st_mtime_ns):
                    if digest(full) != digests.setdefault(relative, digest(root / relative)):
                        wrong.append(f"{relative} has other bytes")
                    checked[relative] = (info.st_ino, info.st_mtime_ns)
        if marked and there != set(sizes):
            wrong.append(f"marked with {len(there)} of {len(sizes)} files")
        looks += 1
        partly += 0 < len(there) < len(sizes)
        if last:
            break
        time.sleep(0.005)
    print(json.dumps({"looks": looks, "wrong": sorted(set(wrong))[:20], "partly": partly}))


def digest(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
