"""Where a retrieval that brings studies into a folder keeps what it has fetched: in that one, if it is ours alone."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path


def name_of(flow_run_id: str) -> str:
    """Return the name of a retrieval's spool: run ids begin with the time, those of a minute alike."""
    return f".talaria-{flow_run_id[-12:]}"


def spool_in(into: Path, name: str) -> Path | None:
    """Return the folder below the destination that studies are fetched into; None where others could swap it.

    It lies on the destination's file system, so that nothing need be copied.
    """
    near = into if into.is_dir() else into.parent
    try:
        info = near.stat()
    except OSError:
        return None
    others = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not info.st_mode & stat.S_ISVTX
    if others or info.st_uid not in (os.geteuid(), 0):
        return None
    spool = into / name
    try:
        there = spool.lstat()
    except OSError:
        return spool
    return spool if stat.S_ISDIR(there.st_mode) and there.st_uid == os.geteuid() else None


def discard_spool(spool: Path, flow_run_id: str) -> None:
    """Remove what a retrieval has left in its spool; what others could have put in its place stays."""
    if spool.name == name_of(flow_run_id) and spool_in(spool.parent, spool.name) == spool:
        shutil.rmtree(spool, ignore_errors=True)
