"""What a check found: probes in the order in which they were made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from transfer.errors import REMEDIES, DispatchError, known_as

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


@dataclass
class Probe:
    """One step of a check: its result, how long it took (milliseconds), and the peer's own words if it failed.

    Attributes:
        error: class of the error that it failed with, one of `transfer.errors`.
        remedy: what somebody can do about it, in a sentence.
        facts: what was learned of the peer: `certificate` (subject, issuer, names, expires, days, fingerprint),
            `transfer_syntaxes` (names of those that it accepts).
    """

    name: str
    result: str = OK
    ms: float = 0.0
    detail: str = ""
    informative: bool = False  # a failure doesn't make the target unhealthy (ping)
    error: str = ""
    remedy: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the probe as it stands in the JSON of `target test`."""
        known = {"name": self.name, "result": self.result, "ms": self.ms, "detail": self.detail}
        return known | {"error": self.error, "remedy": self.remedy, "facts": self.facts}


_watcher: ContextVar[Callable[[Probe], None] | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(watcher: Callable[[Probe], None]) -> Iterator[None]:
    """Report each probe that is made in this context as soon as it is made; from the thread that made it."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@dataclass
class Health:
    """The probes of one check.

    Use `with health.probe("tcp") as probe:`; an error of ours inside fails the probe, and ends the check if the
    rest makes no sense without it: `skip` names what was not reached.
    """

    probes: list[Probe] = field(default_factory=list)
    error: DispatchError | None = None  # the first failure, for callers that want the class

    @property
    def ok(self) -> bool:
        return bool(self.probes) and all(p.result != FAILED or p.informative for p in self.probes)

    @contextmanager
    def probe(self, name: str, *, informative: bool = False) -> Iterator[Probe]:
        """Time a probe. A DispatchError inside becomes the probe's result and does not propagate.

        What to do about it is the error's remedy, unless the probe has been given one.
        """
        probe = Probe(name, informative=informative)
        begun = time.monotonic()
        try:
            yield probe
        except DispatchError as exc:
            probe.result, probe.detail = FAILED, exc.message
            known = known_as(exc)
            probe.error, probe.remedy = known.__name__, probe.remedy or REMEDIES[known]
            if not informative and self.error is None:
                self.error = exc
        finally:
            probe.ms = round((time.monotonic() - begun) * 1000, 1)
            self.probes.append(probe)
            _report(probe)

    def hint(self, name: str, result: str, ms: float, detail: str, after: str = "") -> None:
        """Add a probe that doesn't count as a failure, behind the probe `after` if there is one."""
        at = next((n + 1 for n, probe in enumerate(self.probes) if probe.name == after), 0)
        self.probes.insert(at, Probe(name, result, ms, detail, informative=True))
        _report(self.probes[at])

    def skip(self, *names: str, why: str = "an earlier probe failed") -> None:
        """Add the probes that were not made."""
        for name in names:
            self.probes.append(Probe(name, SKIPPED, detail=why))
            _report(self.probes[-1])

    def to_json(self, name: str) -> dict[str, Any]:
        """Return the JSON of `target test`."""
        return {"name": name, "ok": self.ok, "probes": [probe.to_json() for probe in self.probes]}


def _report(probe: Probe) -> None:
    if watcher := _watcher.get():
        watcher(probe)
