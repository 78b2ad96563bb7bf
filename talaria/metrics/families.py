"""The figures as Prometheus reads them. Labels are names of targets, queues, rules: bounded, and no patient's data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from talaria import __version__
from talaria.metrics.gather import Figures
from talaria.metrics.peers import DAY_S
from tasks.dispatch.ends import UNKNOWN
from transfer.happenings import BEYOND, BOUNDS_S, BYTES, DISPATCHES, ITEMS, SECONDS, SECONDS_WITHIN, Total
from transfer.outcome import Kind
from transfer.receipt import State

MOST_TARGETS = 1000  # with labels of their own, those that had most to do; the rest is OTHERS together
OUTCOMES = (State.DELIVERED, State.PARTIAL, State.FAILED)
OTHERS = "(others)"  # no target has such a name
BOUNDS = (*(f"{bound:g}" for bound in BOUNDS_S), BEYOND)


def exposed(figures: Figures, accept: str) -> tuple[bytes, str]:
    """Return the figures as a client wants them, and the media type of that.

    Args:
        accept: the request's header.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(figures))
    ProcessCollector(registry=registry)
    encode, media_type = choose_encoder(accept)
    return encode(registry), media_type


class _Families(Collector):
    def __init__(self, figures: Figures) -> None:
        self.figures = figures

    def collect(self) -> Iterator[Metric]:
        one = self.figures
        info = GaugeMetricFamily("talaria_build_info", "1, with the version as a label.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        yield _plain(
            "talaria_prefect_up", "Whether Prefect's server answered; its figures are missing if not.", one.prefect
        )
        yield _plain("talaria_ledger_up", "Whether the ledger answered; its figures are missing if not.", one.ledger)
        if one.ledger:
            yield from _totals(one.totals, [target.name for target in one.targets])
            yield _by("talaria_messages", "Messages of a rule by state; late ones are tried again.", ["rule", "state"],
                      ((key, count) for key, count in one.messages.items()))  # fmt: skip
        if one.prefect:
            yield from self._prefect()
        yield from self._machine()

    def _prefect(self) -> Iterator[Metric]:
        one = self.figures
        yield _by("talaria_queue_runs", "Runs that wait in a queue or rest; not those that are yet to come.", ["queue"],
                  (((queue.name,), queue.waiting) for queue in one.queues))  # fmt: skip
        yield _by("talaria_queue_oldest_seconds", "How long the first run that is due has been waiting.", ["queue"],
                  (((queue.name,), queue.oldest_s) for queue in one.queues))  # fmt: skip
        yield _plain("talaria_runs_running", "Runs that workers are at.", one.running)
        yield _plain("talaria_workers_online", "Workers that have been heard of lately.", one.workers)
        targets = [target for target in one.targets if not target.broken]
        yield _by("talaria_target_enabled", "Whether a target takes part.", ["target"],
                  (((target.name,), target.enabled) for target in targets))  # fmt: skip
        yield _by("talaria_target_broken", "1 for a target whose settings are no longer valid.", ["target"],
                  (((target.name,), target.broken) for target in one.targets))  # fmt: skip
        yield _by("talaria_target_healthy", "Whether a target's last check was good.", ["target"],
                  (((target.name,), target.healthy) for target in targets if target.healthy is not None))  # fmt: skip
        yield _by("talaria_breaker_open", "1 while dispatches to a target wait, as it does not answer.", ["target"],
                  (((target.name,), target.open) for target in targets))  # fmt: skip
        yield _by("talaria_breaker_failures", "Failures of a target in a row.", ["target"],
                  (((target.name,), target.failures) for target in targets))  # fmt: skip
        yield _by("talaria_certificate_expires_seconds", "Until a certificate expires: shown by us, or a peer.",
                  ["of", "whose"],
                  (((cert.of, cert.whose), cert.days * DAY_S) for cert in one.certificates))  # fmt: skip

    def _machine(self) -> Iterator[Metric]:
        one = self.figures
        yield _plain("talaria_staging_runs", "Runs with staged files.", one.staged)
        names = {
            "ledger": "The ledger's file.",
            "prefect": "Prefect's database.",
            "staging": "Staged files that are no links.",
            "failed": "Files of failed dispatches that are kept for a retry.",
        }
        for name, words in names.items():
            if name in one.sizes:
                yield _plain(f"talaria_{name}_bytes", words, one.sizes[name])
        yield _by("talaria_disk_free_bytes", "Free space where something is written to.", ["of"],
                  (((disk.of,), disk.free) for disk in one.disks))  # fmt: skip
        yield _by("talaria_disk_size_bytes", "All space there.", ["of"],
                  (((disk.of,), disk.size) for disk in one.disks))  # fmt: skip
        at_work = [(name, it) for name, it in one.received.items() if it["state"] != "paused"]
        yield _by("talaria_listener_up", "Whether it listens for a source that is not paused.", ["source"],
                  (((name,), it["state"] == "listening") for name, it in at_work))  # fmt: skip
        for key, words in (("receiving", "Units that are not complete."), ("full", "1 if the disk is too full.")):
            yield _by(f"talaria_listener_{key}", words, ["source"],
                      (((name,), it[key]) for name, it in at_work if key in it))  # fmt: skip
        yield _by("talaria_listener_associations", "Open associations of a listener.", ["port"],
                  (((str(it.port),), it.associations) for it in one.listeners))  # fmt: skip
        counted = CounterMetricFamily("talaria_listener_requests", "Associations that peers asked for, or wanted to.",
                                      labels=["port", "outcome"])  # fmt: skip
        instances = CounterMetricFamily("talaria_listener_instances", "Instances received.", labels=["port"])
        size = CounterMetricFamily("talaria_listener_bytes", "Bytes received.", labels=["port"])
        for it in one.listeners:
            counted.add_metric([str(it.port), "accepted"], it.accepted)
            counted.add_metric([str(it.port), "refused"], it.refused)
            counted.add_metric([str(it.port), "tls_failed"], it.unsecured)
            instances.add_metric([str(it.port)], it.instances)
            size.add_metric([str(it.port)], it.bytes)
        yield from (counted, instances, size)


def _totals(totals: list[Total], targets: Iterable[str]) -> Iterator[Metric]:
    """Yield the counters. Of targets, also unknown ones, they begin with 0: a first failure is an increase, too."""
    targets = list(targets)
    begun = [Total(DISPATCHES, name, str(state), 0.0) for name in targets for state in OUTCOMES]
    begun.append(Total(DISPATCHES, UNKNOWN, str(State.FAILED), 0.0))
    begun += [Total(ITEMS, name, str(kind), 0.0) for name in targets for kind in (Kind.DELIVERED, Kind.REJECTED)]
    kept = _bounded([*totals, *begun])
    labels = ["target", "outcome"]
    for name, words in (
        (DISPATCHES, "Dispatches that ended at a target, by outcome; a retry is another one."),
        (ITEMS, "Items of dispatches that ended, by their own outcome."),
        (BYTES, "Bytes that were sent, by the outcome of the dispatch."),
    ):
        family = CounterMetricFamily(f"talaria_{name}", words, labels=labels)
        for (target, label), value in sorted(kept[name].items()):
            family.add_metric([target, label], value)
        yield family
    words = "From a dispatch's first attempt at a target to its end, waits included."
    seconds = HistogramMetricFamily("talaria_dispatch_seconds", words, labels=labels)
    for (target, label), dispatches in sorted(kept[DISPATCHES].items()):
        count, buckets = 0.0, []
        for bound in BOUNDS:
            count += kept[SECONDS_WITHIN].get((target, f"{label}/{bound}"), 0.0)
            buckets.append((bound, count))
        if dispatches:
            seconds.add_metric([target, label], buckets, kept[SECONDS].get((target, label), 0.0))
    yield seconds


def _bounded(totals: list[Total]) -> dict[str, dict[tuple[str, str], float]]:
    """Return sums by name, then by target and label; of many targets, those with few dispatches together."""
    dispatches: dict[str, float] = defaultdict(float)
    for one in totals:
        dispatches[one.target] += one.value if one.name == DISPATCHES else 0.0
    shown = set(sorted(dispatches, key=lambda name: (-dispatches[name], name))[:MOST_TARGETS]) | {UNKNOWN}
    kept: dict[str, dict[tuple[str, str], float]] = defaultdict(lambda: defaultdict(float))
    for one in totals:
        kept[one.name][one.target if one.target in shown else OTHERS, one.label] += one.value
    return kept


def _plain(name: str, words: str, value: float) -> Metric:
    return GaugeMetricFamily(name, words, value=float(value))


def _by(name: str, words: str, labels: list[str], values: Iterable[tuple[Iterable[str], float]]) -> Metric:
    family = GaugeMetricFamily(name, words, labels=labels)
    for key, value in values:
        family.add_metric(list(key), float(value))
    return family
