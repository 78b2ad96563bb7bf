"""Contents of open files: copied inside the kernel with their holes, and compared."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from transfer.errors import Rejected

COPY_BYTES = 1 << 24  # one call of copy_file_range(2)
READ_BYTES = 1 << 20  # one read, where the bytes go through our hands
BLOCK_BYTES = 512  # of what stat(2) counts
# How copy_file_range(2) says that these two file systems can't: then the bytes go through our hands.
NOT_IN_KERNEL = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)


def copy_bytes(
    reader: int, writer: int, moved: Callable[[int], None] = lambda count: None, piece_bytes: int = COPY_BYTES
) -> int:
    """Copy an open file into an empty one, holes as holes; return the number of bytes, holes included.

    Args:
        moved: called with the count of every piece; may raise to stop.
        piece_bytes: the largest piece.
    """
    info = os.fstat(reader)
    if not is_sparse(info):
        return _copy_all(reader, writer, moved, piece_bytes)
    end = done = 0
    while (begin := _next(reader, end, os.SEEK_DATA, info.st_size)) < info.st_size:
        if begin > end:
            moved(begin - end)
        end = _next(reader, begin, os.SEEK_HOLE, info.st_size)
        os.lseek(reader, begin, os.SEEK_SET)
        os.lseek(writer, begin, os.SEEK_SET)
        done = begin + _copy_all(reader, writer, moved, piece_bytes, end - begin)
        if done < end:  # it has become shorter
            return done
    if info.st_size > end:
        moved(info.st_size - end)
    os.ftruncate(writer, info.st_size)
    return info.st_size


def is_sparse(info: os.stat_result) -> bool:
    """Return True if a file takes fewer blocks than its bytes: it has holes, or its file system compresses."""
    return info.st_blocks * BLOCK_BYTES < info.st_size


def data_parts(fd: int, begin: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield where the data of an open file begin and end, from `begin` to `size`; what lies between are holes."""
    while (begin := _next(fd, begin, os.SEEK_DATA, size)) < size:
        end = _next(fd, begin, os.SEEK_HOLE, size)
        yield begin, end
        begin = end


def data_before(fd: int, end: int, count: int) -> int:
    """Return the offset after which `count` bytes of data, without holes, lie before `end`; negative if too few."""
    if not is_sparse(os.fstat(fd)):
        return end - count
    for first, last in reversed(list(data_parts(fd, 0, end))):
        if last - first >= count:
            return last - count
        count -= last - first
    return -count


def _next(fd: int, offset: int, what: int, size: int) -> int:
    """Return where the next data, or the next hole, of an open file begins; its end if there is none."""
    try:
        return min(os.lseek(fd, offset, what), size)
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            return size
        raise


def _copy_all(
    reader: int, writer: int, moved: Callable[[int], None], piece_bytes: int, limit: int | None = None
) -> int:
    """Copy from where both files stand to the reader's end, or `limit` bytes; return how many."""
    total, in_kernel = 0, True
    while limit is None or total < limit:
        most = piece_bytes if limit is None else min(piece_bytes, limit - total)
        if in_kernel:
            try:
                count = os.copy_file_range(reader, writer, most)
            except OSError as exc:
                if total or exc.errno not in NOT_IN_KERNEL:
                    raise
                in_kernel = False
                continue
            if count == 0 and total == 0:  # some file systems answer so for "can't" (copy_file_range(2), BUGS)
                in_kernel = False
                continue
        else:
            piece = os.read(reader, min(most, READ_BYTES))
            count = len(piece)
            while piece:
                piece = piece[os.write(writer, piece) :]
        if count == 0:
            break
        total += count
        moved(count)
    return total


def read_here(fd: int, count: int, at: int) -> bytes:
    """Read a piece of a file of ours; less of it where the file ends.

    Raises:
        Rejected: it can't be read: a broken disk, a share that is gone.
    """
    try:
        data = os.pread(fd, count, at)
        while len(data) < count and (more := os.pread(fd, count - len(data), at + len(data))):
            data += more
    except OSError as exc:
        raise Rejected(f"can't be read: {exc.strerror}") from exc
    return data


def same_content(one: int, other: int | Path, check: Callable[[], None] = lambda: None) -> bool:
    """Return True if an open file and another one, open or named by its path, are equal to the last byte.

    Args:
        check: called between pieces; may raise to stop.
    """
    if isinstance(other, Path):
        with open(other, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            return same_content(one, file.fileno(), check)
    if os.fstat(one).st_size != os.fstat(other).st_size:
        return False
    offset = 0
    while True:
        check()
        mine = os.pread(one, READ_BYTES, offset)
        if mine != os.pread(other, len(mine) or 1, offset):
            return False
        if not mine:
            return True
        offset += len(mine)


def sha256(fd: int, check: Callable[[], None] = lambda: None, *, in_memory: bool = False) -> str:
    """Return the SHA-256 of an open file.

    Args:
        check: called between pieces; may raise to stop.
        in_memory: give up, with "", as soon as a part would have to be read from the disk.
    """
    total, buffer, offset = hashlib.sha256(), memoryview(bytearray(READ_BYTES)), 0
    flags = getattr(os, "RWF_NOWAIT", 0) if in_memory else 0
    while True:
        check()
        try:
            count = os.preadv(fd, [buffer], offset, flags)
        except BlockingIOError:
            return ""
        except OSError as exc:
            if not flags or exc.errno not in NOT_IN_KERNEL:
                raise
            flags = 0  # this file system can't say what is in memory
            continue
        if not count:
            return total.hexdigest()
        total.update(buffer[:count])
        offset += count
