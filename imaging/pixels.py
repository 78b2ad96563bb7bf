"""Decodes and encodes the pixel data of a DICOM file, one frame at a time and without loss.

The codecs are pydicom's and those of pylibjpeg and pyjpegls (the extra `transcode`).
"""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

from imaging import recode
from imaging.header import Damaged
from imaging.recode import EXPLICIT_LITTLE, PIXELS, UNDEFINED, Element, EncodedSource, Encoding, Found, Recoder

EXPLICIT = "1.2.840.10008.1.2.1"
RLE = "1.2.840.10008.1.2.5"
JPEG_LS, JPEG_LS_NEAR = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"
JPEG_2000, JPEG_2000_LOSSY = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"
# The encoder that writes a syntax without loss. The two that allow loss hold such codestreams as well
# (PS3.5 sections A.4.3 and A.4.4).
ENCODERS = {JPEG_2000: JPEG_2000, JPEG_LS: JPEG_LS, RLE: RLE, JPEG_2000_LOSSY: JPEG_2000, JPEG_LS_NEAR: JPEG_LS}
PANIC = "PanicException"  # of a codec in Rust, which is no Exception (PyO3): what it meets is damage all the same
JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"  # how a JP2 file begins (ISO/IEC 15444-1, I.5.1)
WINDOW_BYTES = 65_536  # small reads come out of one of this
MAX_NATIVE_BYTES = 0xFFFFFFFE  # a length field has 32 bits, and FFFFFFFF is the undefined one
_SAMPLES, _PHOTOMETRIC, _PLANAR, _FRAMES, _ROWS, _COLUMNS = 0x280002, 0x280004, 0x280006, 0x280008, 0x280010, 0x280011
ALLOCATED, _STORED, REPRESENTATION = 0x280100, 0x280101, 0x280103
_EXTENDED_OFFSETS, _EXTENDED_LENGTHS, _EXTENDED_TOTAL = 0x7FE00001, 0x7FE00002, 0x7FE00003
_WANTED = frozenset(
    (
        _SAMPLES, _PHOTOMETRIC, _PLANAR, _FRAMES, _ROWS, _COLUMNS, ALLOCATED, _STORED, REPRESENTATION,
        _EXTENDED_OFFSETS, _EXTENDED_LENGTHS,
    )
)  # fmt: skip
_NO_OFFSETS: dict[int, tuple[str, bytes] | None] = dict.fromkeys(
    (_EXTENDED_OFFSETS, _EXTENDED_LENGTHS, _EXTENDED_TOTAL)
)


class Unfit(Exception):
    """The data set can't be converted; the text says why."""


class Reader:
    """A file from `base` on, read by position, so that its descriptor's offset stays where it is."""

    def __init__(self, fd: int, base: int, limit: int | None = None) -> None:
        self.fd, self.base, self.position = fd, base, 0
        self._window, self._start = b"", 0

    def read(self, count: int = -1, /) -> bytes:
        if count < 0:
            count = max(0, os.fstat(self.fd).st_size - self.base - self.position)
        begin = self.position - self._start
        if not 0 <= begin <= len(self._window) - count:
            if count > WINDOW_BYTES:
                data = os.pread(self.fd, count, self.base + self.position)
                self.position += len(data)
                return data
            self._window, self._start, begin = (
                os.pread(self.fd, WINDOW_BYTES, self.base + self.position),
                self.position,
                0,
            )
        data = self._window[begin : begin + count]
        self.position += len(data)
        return data

    def skip(self, count: int) -> None:
        self.position += count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset += self.position
        elif whence == os.SEEK_END:
            offset += os.fstat(self.fd).st_size - self.base
        self.position = offset
        return offset

    def tell(self) -> int:
        return self.position


def scan(source: Reader, encoding: Encoding) -> dict[int, Found]:
    """Find the elements that describe the pixel data; the source's position stays where it was."""
    begin = source.tell()
    found = recode.scan(source, encoding, source.skip, _WANTED)
    source.seek(begin)
    return found


def number(found: dict[int, Found], tag: int, default: int, encoding: Encoding = EXPLICIT_LITTLE) -> int:
    value = found[tag].value if tag in found else b""
    return int(struct.unpack_from(encoding.order + "H", value)[0]) if len(value) >= 2 else default


def _text(found: dict[int, Found], tag: int) -> str:
    return found[tag].value.decode("latin-1").strip("\0 ") if tag in found else ""


def _options(found: dict[int, Found]) -> dict[str, Any]:
    """Return what pydicom's decoders and encoders must know about the pixels (PS3.3 section C.7.6.3)."""
    frames = _text(found, _FRAMES)
    options: dict[str, Any] = {
        "rows": number(found, _ROWS, 0),
        "columns": number(found, _COLUMNS, 0),
        "number_of_frames": int(frames) if frames.isdigit() and int(frames) else 1,
        "samples_per_pixel": number(found, _SAMPLES, 1),
        "bits_allocated": number(found, ALLOCATED, 0),
        "bits_stored": number(found, _STORED, number(found, ALLOCATED, 0)),
        "pixel_representation": number(found, REPRESENTATION, 0),
        "photometric_interpretation": _text(found, _PHOTOMETRIC),
        "pixel_keyword": "PixelData",
    }
    if options["samples_per_pixel"] > 1:
        options["planar_configuration"] = number(found, _PLANAR, 0)
    return options


def _pixels(found: dict[int, Found], encapsulated: bool) -> Found:
    pixels = found.get(PIXELS)
    if pixels is None:
        raise Unfit("it holds no pixel data")
    if (pixels.element.length == UNDEFINED) != encapsulated:
        raise Unfit("its pixel data is not encoded as its transfer syntax says")
    return pixels


@contextmanager
def _codecs(what: str) -> Iterator[None]:
    """Turn a decoder's or encoder's errors into Unfit, and silence its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (Unfit, Damaged, OSError, MemoryError):
            raise
        except ImportError as exc:
            raise Unfit(f"the libraries for it are missing: install talaria[transcode] ({exc.name})") from exc
        except BaseException as exc:
            if not isinstance(exc, Exception) and type(exc).__name__ != PANIC:
                raise
            # Their messages speak of codestreams and modules, never of values. Where several plugins failed, the first
            # line says only that; the last one is a plugin's own.
            lines = str(exc).strip().splitlines() or [type(exc).__name__]
            reason = lines[-1 if isinstance(exc, RuntimeError) else 0].strip().rstrip(":")
            raise Unfit(f"{what}: {reason[:200]}") from exc


def _decoder(syntax: str) -> Any:
    from pydicom.pixels.decoders.base import get_decoder

    get_decoder.__globals__["get_j2k_parameters"] = _j2k_parameters  # those of its module, which decodes frames
    decoder = get_decoder(syntax)
    if not decoder.is_available:
        raise Unfit(f"no decoder for {decoder.UID.name} is installed: install talaria[transcode]")
    return decoder


def _j2k_parameters(codestream: bytes) -> dict[str, Any]:
    """Return what pydicom reads in a codestream; behind a JP2 box without a length it would look without end."""
    from pydicom.pixels.utils import get_j2k_parameters

    at = len(JP2)
    while codestream.startswith(JP2[:8]) and at < len(codestream) and codestream[at + 4 : at + 8] != b"jp2c":
        length = int.from_bytes(codestream[at : at + 4], "big")
        if length < 8:  # of length and type alone
            return {}
        at += length
    return get_j2k_parameters(codestream)


def decode(source: Reader, syntax: str, out: IO[bytes], target: Encoding, check: Callable[[], None]) -> None:
    """Write encapsulated pixel data as native pixel data, frame by frame."""
    found = scan(source, EXPLICIT_LITTLE)
    if PIXELS not in found:  # a report or the like under a syntax for images
        Recoder(EncodedSource(source, EXPLICIT_LITTLE), out, target, check=check).run()
        return
    pixels, options = _pixels(found, encapsulated=True), _options(found)
    if _EXTENDED_OFFSETS in found and _EXTENDED_LENGTHS in found:
        options["extended_offsets"] = (found[_EXTENDED_OFFSETS].value, found[_EXTENDED_LENGTHS].value)
    begin = source.tell()
    stream = Reader(source.fd, source.base + begin + pixels.position)
    with _codecs("its pixel data can't be decoded"):
        frames = _decoder(syntax).iter_array(stream, raw=True, **options)
        first, properties = next(frames)
        if properties["photometric_interpretation"] == "YBR_FULL_422":
            properties["photometric_interpretation"] = "YBR_FULL"  # a decoder gives every pixel its own colour
    frame_bytes = first.nbytes
    length = frame_bytes * options["number_of_frames"]
    if length > MAX_NATIVE_BYTES:
        raise Unfit(f"decompressed it has {length} bytes of pixel data, and an element holds at most 4 GiB")
    bits = options["bits_allocated"]

    def write(element: Element) -> None:
        recoder.head(PIXELS, "OB" if bits <= 8 else "OW", length + length % 2)
        out.write(first.tobytes())
        count = 1
        while True:
            check()  # what it raises is no codec's error
            with _codecs("its pixel data can't be decoded"):
                frame, _ = next(frames, (None, None))
            if frame is None:
                break
            if frame.nbytes != frame_bytes or count == options["number_of_frames"]:
                raise Unfit("its frames are not those that its header describes")
            out.write(frame.tobytes())
            count += 1
        if count != options["number_of_frames"]:
            raise Unfit(f"it holds {count} of {options['number_of_frames']} frames")
        out.write(b"\0" * (length % 2))
        _pass_fragments(reading)

    reading = EncodedSource(source, EXPLICIT_LITTLE)
    recoder = Recoder(
        reading,
        out,
        target,
        pixel_representation=options["pixel_representation"],
        bits_allocated=bits,
        changes=_NO_OFFSETS | _changes(options, properties),
        pixels=write,
        icon=partial(_icon, syntax),
        check=check,
    )
    recoder.run()


def _changes(options: dict[str, Any], properties: dict[str, Any]) -> dict[int, tuple[str, bytes] | None]:
    """Return what the header must say about decoded pixels: their colour space, and samples side by side."""
    changes: dict[int, tuple[str, bytes] | None] = {}
    if properties["photometric_interpretation"] != options["photometric_interpretation"]:
        text = str(properties["photometric_interpretation"]).encode()
        changes[_PHOTOMETRIC] = ("CS", text + b" " * (len(text) % 2))
    if options["samples_per_pixel"] > 1:
        changes[_PLANAR] = ("US", struct.pack("<H", 0))
    return changes


def _pass_fragments(source: EncodedSource) -> None:
    """Skip encapsulated pixel data."""
    while True:
        item = source.element(explicit=False)
        if item is None:
            raise Damaged("truncated within the pixel data")
        if item.tag == recode.SEQUENCE_END:
            return
        source.skip(item.length)


def _icon(syntax: str, beside: dict[int, bytes], codestream: bytes) -> bytes:
    """Decode the one frame of an icon (PS3.3 section C.7.6.1.1.6), whose attributes stand beside it."""
    from pydicom.encaps import encapsulate

    found = {tag: Found(Element(tag, "", len(value)), 0, value) for tag, value in beside.items()}
    options = _options(found)
    if options["samples_per_pixel"] != 1:
        raise Unfit("an icon in it is compressed and in colour")
    with _codecs("an icon in it can't be decoded"):
        array, _ = _decoder(syntax).as_array(encapsulate([codestream]), raw=True, **options)
        return bytes(array.tobytes())


def encode(source: Reader, out: IO[bytes], to: str, check: Callable[[], None]) -> None:
    """Write native pixel data as encapsulated pixel data, one fragment per frame; decode each again and compare."""
    found = scan(source, EXPLICIT_LITTLE)
    if recode.FLOAT_PIXELS in found or recode.DOUBLE_PIXELS in found:
        raise Unfit("its pixels are floating-point numbers, which can't be compressed")
    pixels, options = _pixels(found, encapsulated=False), _options(found)
    if options["bits_allocated"] % 8:
        raise Unfit(f"its pixels have {options['bits_allocated']} bits, which can't be compressed")
    stream = Reader(source.fd, source.base + source.tell() + pixels.position)
    reading = EncodedSource(source, EXPLICIT_LITTLE)
    with _codecs("its pixel data can't be read"):
        # Bits above those stored may hold an overlay: they stay, or the comparison finds that they didn't.
        frames = _decoder(EXPLICIT).iter_array(
            stream, raw=True, **options, correct_unused_bits=False, pixel_vr=pixels.element.vr
        )
        first, properties = next(frames)
    changes = _NO_OFFSETS | _changes(options, properties)
    options |= {"photometric_interpretation": properties["photometric_interpretation"]}
    if options["samples_per_pixel"] > 1:
        options["planar_configuration"] = 0
    count = options["number_of_frames"]
    options["number_of_frames"] = 1

    def write(element: Element) -> None:
        reading.skip(element.length)
        recoder.head(PIXELS, "OB", UNDEFINED)
        table = out.tell() + 8
        fits = element.length < UNDEFINED // 2  # compressed noise grows a little: offsets need 32 bits
        out.write(_item(b"\0" * 4 * count if fits and count > 1 else b""))
        start, offsets = out.tell(), []
        frame = first
        while frame is not None:
            check()
            offsets.append(out.tell() - start)
            out.write(_item(_compressed(frame, to, options)))
            with _codecs("its pixel data can't be read"):
                frame, _ = next(frames, (None, None))
        out.write(struct.pack("<HHI", 0xFFFE, 0xE0DD, 0))
        if fits and count > 1:
            end = out.tell()
            out.seek(table)
            out.write(struct.pack(f"<{count}I", *offsets))
            out.seek(end)

    recoder = Recoder(reading, out, EXPLICIT_LITTLE, changes=changes, pixels=write, check=check)
    recoder.run()


def _compressed(frame: Any, to: str, options: dict[str, Any]) -> bytes:
    """Compress one frame, and make sure that it decompresses to the same bytes."""
    from pydicom.encaps import encapsulate
    from pydicom.pixels.encoders.base import get_encoder

    encoder = get_encoder(ENCODERS[to])
    if not encoder.is_available:
        raise Unfit(f"no encoder for {encoder.UID.name} is installed: install talaria[transcode]")
    with _codecs("its pixel data can't be compressed"):
        raw = bytes(encoder.encode(frame, **options))
        again, properties = _decoder(to).as_array(encapsulate([raw]), raw=True, **options)
        same = again.shape == frame.shape and again.tobytes() == frame.tobytes()
    if not same or properties["photometric_interpretation"] != options["photometric_interpretation"]:
        raise Unfit("its pixels would not come out of the compression as they are")
    return raw


def _item(value: bytes) -> bytes:
    """Return an item of encapsulated pixel data, PS3.5 section A.4."""
    value += b"\0" * (len(value) % 2)
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(value)) + value
