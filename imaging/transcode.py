"""Converts a DICOM file to a transfer syntax that a peer accepts, without changing a pixel.

What the policies allow (`fallbacks`):

    never     nothing
    lossless  uncompressed data to every other uncompressed syntax, or compressed without loss; data that was
              compressed without loss decompressed, or compressed without loss in another way; data that was
              compressed with loss decompressed, which loses nothing more
    any       also: data that was compressed with loss compressed again without loss, and syntaxes that allow loss
              written without making use of it

No policy has pixels compressed with loss: what arrives decodes to what the file decodes to, and so keeps its SOP
Instance UID (PS3.3 section C.7.6.1.1.5 asks for a new one where pixels change). Every frame that is compressed here is
decoded again and compared. Elements other than those of the pixel data are copied as bytes (`imaging.recode`).

Decoders and encoders are pydicom's and those of pylibjpeg and pyjpegls (the extra `transcode`); changing between
uncompressed syntaxes, inflating and deflating needs none of them.
"""

from __future__ import annotations

import errno
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from pydicom.uid import UID

from imaging import pixels
from imaging.header import Damaged, inflated_limit
from imaging.pixels import EXPLICIT, JPEG_2000, JPEG_2000_LOSSY, JPEG_LS, JPEG_LS_NEAR, RLE, Reader, Unfit
from imaging.recode import EXPLICIT_BIG, EXPLICIT_LITTLE, IMPLICIT_LITTLE, PIECE_BYTES, EncodedSource, Encoding, Recoder

NEVER, LOSSLESS, ANY = "never", "lossless", "any"

IMPLICIT = "1.2.840.10008.1.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
BIG = "1.2.840.10008.1.2.2"

ENCODINGS = {
    EXPLICIT: EXPLICIT_LITTLE,
    IMPLICIT: IMPLICIT_LITTLE,
    DEFLATED: EXPLICIT_LITTLE,
    BIG: EXPLICIT_BIG,
}
# What pixel data is written in, best known first; the explicit one keeps the representation of private elements.
# Big endian is read but never written: it is retired, and who takes it takes implicit little endian too.
_NATIVE = (EXPLICIT, IMPLICIT, DEFLATED)
_WITHOUT_LOSS = (JPEG_2000, JPEG_LS, RLE)
# Compressed syntaxes whose frames can be decoded one by one: those that can't lose anything, and those that may.
LOSSLESS_SYNTAXES = frozenset(
    (
        RLE, JPEG_LS, JPEG_2000,
        "1.2.840.10008.1.2.4.57",  # JPEG lossless, process 14
        "1.2.840.10008.1.2.4.70",  # JPEG lossless, process 14, selection value 1
        "1.2.840.10008.1.2.4.201",  # High-Throughput JPEG 2000, lossless only
        "1.2.840.10008.1.2.4.202",  # the same, RPCL
    )
)  # fmt: skip
LOSSY_SYNTAXES = frozenset(
    (
        JPEG_LS_NEAR, JPEG_2000_LOSSY,
        "1.2.840.10008.1.2.4.50",  # JPEG baseline
        "1.2.840.10008.1.2.4.51",  # JPEG extended
        "1.2.840.10008.1.2.4.203",  # High-Throughput JPEG 2000
    )
)  # fmt: skip

FULL = (errno.ENOSPC, errno.EDQUOT)


def fallbacks(syntax: str, policy: str) -> tuple[str, ...]:
    """Return the transfer syntaxes that a file of `syntax` may be converted to, best first; none if there are none.

    Uncompressed ones come first: nothing but the encoding can be wrong about them.
    """
    allowed: tuple[str, ...]
    if policy == NEVER:
        return ()
    if syntax in ENCODINGS or syntax in LOSSLESS_SYNTAXES:
        allowed = (*_NATIVE[:2], *_WITHOUT_LOSS, *_NATIVE[2:])
    elif syntax in LOSSY_SYNTAXES:
        allowed = _NATIVE if policy == LOSSLESS else (*_NATIVE[:2], *_WITHOUT_LOSS, *_NATIVE[2:])
    else:
        return ()
    if policy == ANY:
        allowed += (JPEG_2000_LOSSY, JPEG_LS_NEAR)
    return tuple(each for each in allowed if each != syntax)


@dataclass(frozen=True)
class Converted:
    """A converted data set, in a file without a name that vanishes when its descriptor is closed."""

    fd: int
    size: int
    syntax: str


class NoRoom(Exception):
    """The disk that holds converted files for a moment is full."""


@contextmanager
def room() -> Iterator[None]:
    """Turn the error of a full disk into NoRoom.

    Raises:
        NoRoom: no room for a converted file.
    """
    try:
        yield
    except OSError as exc:
        if exc.errno in FULL:
            raise NoRoom("no room for a converted file: free some where temporary files go") from exc
        raise


@contextmanager
def converted(
    fd: int,
    offset: int,
    syntax: str,
    targets: Sequence[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Converted]:
    """Convert the data set of an open DICOM file; memory holds one frame at most.

    Args:
        fd: the file; its offset is not changed.
        offset: bytes from its start to the data set.
        syntax: its transfer syntax.
        targets: out of `fallbacks`; a later one is used if an encoder can't do the ones before it.
        folder: where the temporary file goes; the system's if None.
        check: called between pieces and frames; may raise to stop.

    Yields:
        the data set alone, without file meta information.

    Raises:
        Unfit: it can't be converted; the message says why.
        NoRoom: no room for the converted file.
    """

    def temporary() -> IO[bytes]:
        return tempfile.TemporaryFile(dir=folder)

    reasons: dict[str, str] = {}
    with temporary() as out:
        for to in targets:
            try:
                out.truncate(0)
                out.seek(0)
                _convert(Reader(fd, offset), syntax, to, out, temporary, check)
                out.flush()
                break
            except OSError as exc:
                if exc.errno in FULL:
                    raise NoRoom("no room for a converted file: free some where temporary files go") from exc
                reasons[to] = exc.strerror or "it can't be read"
            except (Damaged, Unfit) as exc:
                reasons[to] = str(exc)
        else:
            why = "; ".join(f"to {UID(to).name}: {reason}" for to, reason in reasons.items()) or "to nothing accepted"
            raise Unfit(f"can't be converted from {UID(syntax).name} {why}")
        yield Converted(out.fileno(), os.fstat(out.fileno()).st_size, to)


def _convert(
    source: Reader,
    syntax: str,
    to: str,
    out: IO[bytes],
    temporary: Callable[[], IO[bytes]],
    check: Callable[[], None],
) -> None:
    """Go from one syntax to another in as few steps as possible, all by way of explicit little endian."""
    if syntax == to:
        raise ValueError(f"the file is in {to} already")
    if syntax == DEFLATED:
        if to == EXPLICIT:
            inflate(source, out, check)
            return
        with temporary() as plain:
            inflate(source, plain, check)
            plain.flush()
            _convert(Reader(plain.fileno(), 0), EXPLICIT, to, out, temporary, check)
        return
    if to == DEFLATED and syntax == EXPLICIT:
        deflate(source, out, check)
        return
    if syntax in ENCODINGS and to in ENCODINGS and to != DEFLATED:
        _recode(source, ENCODINGS[syntax], out, ENCODINGS[to], check)
        return
    if syntax not in ENCODINGS and to in (EXPLICIT, IMPLICIT):
        pixels.decode(source, syntax, out, ENCODINGS[to], check)
        return
    if syntax == EXPLICIT and to in pixels.ENCODERS:
        pixels.encode(source, out, to, check)
        return
    with temporary() as middle:
        _convert(source, syntax, EXPLICIT, middle, temporary, check)
        middle.flush()
        _convert(Reader(middle.fileno(), 0), EXPLICIT, to, out, temporary, check)


# ---- without codecs


def inflate(source: Reader, out: IO[bytes], check: Callable[[], None]) -> None:
    """Undo the compression of a whole data set, PS3.5 section A.5.

    Raises:
        Damaged: it is no such thing, has no end, or inflates to more than `header.inflated_limit` allows.
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    limit = inflated_limit(os.fstat(source.fd).st_size - source.base)
    try:
        while not inflater.eof:
            raw = source.read(PIECE_BYTES)
            if not raw:
                raise Damaged("the deflated data set has no end")
            while raw and not inflater.eof:
                check()
                limit -= out.write(inflater.decompress(raw, PIECE_BYTES))
                if limit < 0:
                    raise Damaged("the deflated data set inflates to far more than images do")
                raw = inflater.unconsumed_tail
        out.write(inflater.flush())
    except zlib.error as exc:
        raise Damaged("the deflated data set is damaged") from exc


def deflate(source: Reader, out: IO[bytes], check: Callable[[], None]) -> None:
    """Compress a whole data set."""
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    while raw := source.read(PIECE_BYTES):
        check()
        out.write(deflater.compress(raw))
    out.write(deflater.flush())
    if out.tell() % 2:
        out.write(b"\0")  # PS3.5 section A.5: an even length


def _recode(source: Reader, encoding: Encoding, out: IO[bytes], target: Encoding, check: Callable[[], None]) -> None:
    found = pixels.scan(source, encoding)
    Recoder(
        EncodedSource(source, encoding),
        out,
        target,
        pixel_representation=pixels.number(found, pixels.REPRESENTATION, 0, encoding),
        bits_allocated=pixels.number(found, pixels.ALLOCATED, 16, encoding),
        check=check,
    ).run()
