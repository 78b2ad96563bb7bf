"""What a check found: probes in the order in which they were made."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transfer.errors import DispatchError

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


@dataclass
class Probe:
    """One step of a check: its result, how long it took (milliseconds), and the peer's own words if it failed."""

    name: str
    result: str = OK
    ms: float = 0.0
    detail: str = ""
    informative: bool = False  # a failure doesn't make the target unhealthy (ping)


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
        """Time a probe. A DispatchError inside becomes the probe's result and does not propagate."""
        probe = Probe(name, informative=informative)
        begun = time.monotonic()
        try:
            yield probe
        except DispatchError as exc:
            probe.result, probe.detail = FAILED, exc.message
            if not informative and self.error is None:
                self.error = exc
        finally:
            probe.ms = round((time.monotonic() - begun) * 1000, 1)
            self.probes.append(probe)

    def hint(self, name: str, result: str, ms: float, detail: str, after: str = "") -> None:
        """Add a probe that doesn't count as a failure, behind the probe `after` if there is one."""
        at = next((n + 1 for n, probe in enumerate(self.probes) if probe.name == after), 0)
        self.probes.insert(at, Probe(name, result, ms, detail, informative=True))

    def skip(self, *names: str, why: str = "an earlier probe failed") -> None:
        """Add the probes that were not made."""
        self.probes.extend(Probe(name, SKIPPED, detail=why) for name in names)

    def to_json(self, name: str) -> dict[str, Any]:
        """Return the JSON of `target test`."""
        return {
            "name": name,
            "ok": self.ok,
            "probes": [{"name": p.name, "result": p.result, "ms": p.ms, "detail": p.detail} for p in self.probes],
        }
