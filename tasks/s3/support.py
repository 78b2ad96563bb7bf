"""What is sent with a target's objects: header fields, and the checksum that the store supports."""

from __future__ import annotations

import functools
import threading

from blocks.s3 import Checksum, S3Target
from protocols.s3.checksums import ALGORITHMS, MD5, Algorithm, Support
from protocols.s3.probe import AUTOMATIC, Prober
from protocols.s3.store import Store
from protocols.s3.upload import Form
from tasks.s3.errors import errors
from transfer.receipt import Level

_lock = threading.Lock()
# What stores were found to do, once in a process; by place, setting and fields.
_supports: dict[tuple[str, ...], Support] = {}
_forms: dict[tuple[str, ...], Form] = {}


def forget() -> None:
    """Forget what was found out, because a different store may be there now."""
    with _lock:
        _supports.clear()
        _forms.clear()


def common_headers(target: S3Target) -> dict[str, str]:
    """Return the header fields that every object of a target gets."""
    fields = {
        "x-amz-server-side-encryption": target.sse.value if target.sse else None,
        "x-amz-server-side-encryption-aws-kms-key-id": target.kms_key_id,
        "x-amz-storage-class": target.storage_class,
    }
    return {name: value for name, value in fields.items() if value}


class Supports:
    """The checksum of one push, found when it is first used; use it before threads start."""

    def __init__(self, target: S3Target, store: Store) -> None:
        self.target, self.store = target, store
        self.headers = common_headers(target)
        self.notes: list[str] = []
        self._key = (store.where, target.checksum.value, *self.headers.values())
        self._support: Support | None = None
        self._form: Form | None = None

    @property
    def support(self) -> Support:
        """What the store does with checksums of objects.

        Raises:
            DispatchError: the store doesn't keep what is sent to it, refuses writes, or can't be reached.
        """
        if self._support is None:
            self._support = self._found()
            if not self._support.read_back:
                self.notes.append("the key may not read: whether the store keeps what it is given could not be tried")
            if not self._support.removed:
                self.notes.append(f"{self.stays}: an object .talaria-probe-* of 4 kB stays below the prefix")
        return self._support

    def _found(self) -> Support:
        explicit = ALGORITHMS.get(self.target.checksum.value)
        proving = self.target.verify is Level.PROVEN
        if self.target.checksum is Checksum.OFF or (explicit and not proving):
            return Support(explicit)
        with _lock:
            known = _supports.get(self._key)
        if known is None:
            known = self.probe()
            with _lock:
                _supports[self._key] = known
        return known

    @functools.cached_property
    def retention(self) -> str:
        """How long the bucket keeps every object by default; "" if it doesn't, or doesn't say."""
        with errors(self.store.where):
            return self.store.retention()

    @property
    def stays(self) -> str:
        """Why a probe can't be removed."""
        if self.retention:
            return f"the bucket has Object Lock ({self.retention})"
        return "the key may not delete"

    @property
    def candidates(self) -> tuple[Algorithm, ...]:
        """The algorithms that the target's setting leaves to try."""
        if self.target.checksum is Checksum.AUTO:
            return AUTOMATIC
        explicit = ALGORITHMS.get(self.target.checksum.value)
        return (explicit,) if explicit else ()

    def probe(self) -> Support:
        """Find out what the store does; an algorithm that the settings name is used whatever the result."""
        with errors(self.store.where):
            prober = Prober(self.store, self.target.prefix, self.headers)
            found = (prober.locked if self.retention else prober.checksums)(self.candidates)
        if self.target.checksum is not Checksum.AUTO and self.candidates:
            return Support(self.candidates[0], found.verifies, found.reports, found.read_back, found.removed)
        return found

    @property
    def form(self) -> Form:
        """The form of the checksum of an object in parts; raises as `support`."""
        if self._form is None:
            algorithm = self.support.algorithm
            # One probe that stays is enough.
            if self.target.checksum is Checksum.AUTO and self.support.removed:
                with _lock:
                    known = _forms.get(self._key)
                self._form = known or self.probe_form()
                with _lock:
                    _forms[self._key] = self._form
            elif algorithm is None or algorithm is MD5:
                self._form = Form.PLAIN
            else:
                self._form = Form.FULL if algorithm.whole else Form.COMPOSITE
        return self._form

    def probe_form(self) -> Form:
        """Find out which form the store takes."""
        with errors(self.store.where):
            return Prober(self.store, self.target.prefix, self.headers).parts(self.support)
