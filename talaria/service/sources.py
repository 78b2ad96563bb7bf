"""Sources: listed, shown, applied, tested, paused, swept and removed."""

from __future__ import annotations

import asyncio
import fcntl
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from blocks import SOURCES, Source, Target
from blocks.dicom_source import DicomSource
from blocks.inbox import InboxSource
from talaria.engine import batches
from talaria.service import Office, recorded
from talaria.service.dispatches import ANSWER_S
from talaria.service.fields import field_facts
from talaria.targetfile import action_for, all_values_of, differing, entry, made_of, values_of
from tasks.dispatch import breaker
from tasks.documents import Broken
from tasks.names import pick, split, type_of
from tasks.sources import again, belonging, checks, units
from tasks.sources.saved import KEPT
from tasks.targets import TARGETS
from transfer import listening, silent, unitlist
from transfer.errors import DispatchError, Misconfigured, NotFound
from transfer.home import Home, locked
from transfer.ledger import Ledger
from transfer.sourcebook import Sourcebook, UnitState, is_older

ENDS_S, LOOK_S = 10.0, 0.1  # for a sweep of a source that is removed to end: it may be moving a large file
SHOWN = 50  # units that failed, or are held, in the JSON of one source


async def source_types(office: Office | None = None) -> dict[str, Any]:
    """Return the types of source, and their fields."""
    found = {}
    for name, cls in SOURCES.items():
        found[name] = {"fields": field_facts(cls)}
    return {"types": found}


async def list_sources(office: Office) -> dict[str, Any]:
    """Return all sources, with how many of their units are in which state."""
    found = await KEPT.all(office.client)
    counts, sweeps = await asyncio.to_thread(_read, office, lambda book: (book.counts(), book.sweeps()))
    elsewhere = await belonging.elsewhere(office.client)
    rows = []
    for one in found:
        row, there = sweeps.get(one.name), counts.get(one.name, {})
        values = values_of(one) if isinstance(one, Source) else {}
        known = {"enabled": one.enabled, "broken": None} if isinstance(one, Source) else _broken(one)
        rows.append({
            "name": one.name, **values, "type": one.type_name, **known,
            "units": {str(state): there.get(state, 0) for state in UnitState},
            "waiting": row.waiting if row else 0,
            "last_sweep": _time(row.time) if row else None,
            "problem": _problem(office, one, row.detail if row else "", elsewhere),
            "belongs_to": elsewhere.get(one.name),
        })  # fmt: skip
    return {"sources": rows}


def _problem(office: Office, source: Source | Broken, said: str, elsewhere: Mapping[str, str]) -> str:
    """Return why a source is stuck; "" if it is not, or is paused.

    Args:
        said: by its last sweep.
        elsewhere: the sources of other hosts, which know whether they listen.
    """
    if said or not isinstance(source, DicomSource) or not source.enabled or source.name in elsewhere:
        return said
    return listening.trouble(office.home, source.name)


def _broken(one: Broken) -> dict[str, Any]:
    return {"enabled": None, "broken": one.reason}


async def show_source(office: Office, name: str, given: bool = False) -> dict[str, Any]:
    """Return one source: its settings, schedule as Prefect has it, last sweep, and the units that need a person.

    Args:
        given: only the settings that are not the defaults.
    """
    source = await load_source(office, name)
    values: dict[str, Any] = values_of(source, secrets=True) if given else all_values_of(source)
    rows, row = await asyncio.to_thread(_read, office, lambda book: (book.units(source.name), book.sweep(source.name)))
    elsewhere = await belonging.elsewhere(office.client)
    counts = Counter(one.state for key, one in rows.items() if not is_older(key))
    bad = [one for one in rows.values() if one.state in (UnitState.FAILED, UnitState.HELD) or one.detail]
    return {
        "name": source.name,
        "settings": values,
        "schedule": await batches.schedule_of(office.client, source.name),
        "last_sweep": _time(row.time),
        "problem": _problem(office, source, row.detail, elsewhere),
        "belongs_to": elsewhere.get(source.name),
        "waiting": row.waiting,
        "units": {str(state): counts.get(state, 0) for state in UnitState},
        "attention": [
            {"unit": one.shown, "state": str(one.state), "detail": one.detail, "run": one.run, "time": _time(one.time)}
            for one in sorted(bad, key=lambda one: -one.time)[:SHOWN]
        ],
    }


async def apply_sources(
    office: Office,
    sources: dict[str, Any],  # by name, the values that a file gives
    dry_run: bool = False,
    replace: bool = False,
    prune: bool = False,
    *,
    beside: Iterable[Target] = (),
) -> dict[str, Any]:
    """Create or update sources; all of them or, if one is wrong, none.

    Args:
        beside: targets that are about to be saved: a look (`dry_run`) takes them for saved.
    """
    wanted = made_of(sources, partial(entry, Source, SOURCES), "source")
    there = await KEPT.all(office.client, used=wanted)
    actions = {name: action_for(source, there, replace=replace) for name, source in wanted.items()}
    old = [one for one in there if prune and one.name not in wanted]
    kept = [one for one in there if isinstance(one, Source) and one.name not in wanted and one not in old]
    coming = list(beside)
    names = {one.name for one in coming}
    targets = [*coming, *(one for one in await _targets(office) if one.name not in names)]
    everyone = [*wanted.values(), *kept]
    others = await _elsewhere(office, *wanted)
    mute = await _mute(wanted.values(), everyone, targets)
    await asyncio.to_thread(_check, wanted.values(), everyone, targets, others, mute)
    for one in (*old, *(one for one in there if one.name in wanted and one.type_name != wanted[one.name].type_name)):
        await check_removal(office, one.name, one.type_name)
    for name, action in actions.items() if not dry_run else ():
        before = next((one for one in there if one.name == name and isinstance(one, Source)), None)
        await save_source(office, wanted[name], before, action)
    for one in old if not dry_run else ():
        await _remove(office, one.name, f"{one.type_name}/{one.name}")
    actions |= {one.name: "removed" for one in old}
    return {"dry_run": dry_run, "sources": [{"name": name, "action": action} for name, action in actions.items()]}


async def _elsewhere(office: Office, *names: str) -> dict[str, str]:
    """Return the sources of other hosts, each with its host, but for those that are about to belong to this one."""
    found = await belonging.elsewhere(office.client)
    return {name: host for name, host in found.items() if name not in names}


async def _mute(wanted: Iterable[Source], everyone: list[Source], targets: list[Target]) -> set[str]:
    """Return the folders, of other sources and of targets, that are not looked at: their file systems do not answer.

    Raises:
        SourceAway: that of one of the wanted sources does not.
    """
    wanted = [*wanted]
    await silent.check([place for one in wanted for place in checks.places_of(one)], ANSWER_S)
    beside = [place for one in wanted for place in checks.places_beside(one, everyone, targets)]
    return {*await silent.mute(beside, 0.0)}


def _check(
    wanted: Iterable[Source],
    everyone: list[Source],
    targets: list[Target],
    elsewhere: Mapping[str, str],
    mute: Collection[str],
) -> None:
    """Raise Misconfigured with a line for each reason why one of the sources can't be used."""
    found = [(one.name, why) for one in wanted for why in _wrong_with(one, everyone, targets, elsewhere, mute)]
    wrong = [f"source {name}: {why}" for name, why in found]
    if wrong:
        raise Misconfigured("\n".join(wrong))


def _wrong_with(
    source: Source,
    everyone: list[Source],
    targets: list[Target],
    elsewhere: Mapping[str, str],
    mute: Collection[str] = (),
) -> list[str]:
    found = checks.problems(source, everyone, targets, elsewhere=elsewhere, mute=mute)
    found += checks.of_listener(source, everyone, elsewhere=elsewhere)
    found += checks.of_report(source, everyone, elsewhere, mute)
    if isinstance(source, DicomSource) and source.port in _of_the_front_door():
        found.append(f"port {source.port}: Talaria's own pages and API are served on it: give it another one")
    return [*found, *filter(None, [batches.never_comes(source)])]


def _of_the_front_door() -> set[int]:
    """Return the ports of this machine's front door, as far as they are known."""
    try:
        record = json.loads((Home.current().root / "server.json").read_text(encoding="utf-8"))
        return {int(record["port"]), urlsplit(str(record["front"])).port or 0}
    except (OSError, ValueError, KeyError, TypeError):  # nobody serves here
        return set()


async def problems_of(office: Office, source: Source) -> list[str]:
    """Return why a source that is about to be saved can't be used, each reason a sentence."""
    others = [one for one in await KEPT.all(office.client) if isinstance(one, Source) and one.name != source.name]
    elsewhere, targets = await _elsewhere(office, source.name), await _targets(office)
    mute = await _mute([source], others, targets)
    return await asyncio.to_thread(_wrong_with, source, [source, *others], targets, elsewhere, mute)


async def save_source(office: Office, source: Source, before: Source | None, action: str) -> None:
    """Save a source, and what follows from it: its schedule, and who looks through it.

    Args:
        before: what it was.
        action: `created`, `updated`, `replaced` or `unchanged`.
    """
    if action != "unchanged":
        there = await KEPT.documents(office.client, [source.name])
        others = [one for one in there if type_of(one) != source.type_name]  # these are to be replaced
        await KEPT.save(office.client, source, source.name, others)
    await follow(office, source, before, action)


async def follow(office: Office, source: Source, before: Source | None, action: str) -> None:
    """See to what follows from a source's being saved. Arguments as of `save_source`."""
    if action != "unchanged":
        await recorded.source_changed(office, source.name, action, differing(source, before))
    await batches.deploy(office.client, source, before)
    _say_changed(office)
    # Whoever applies a source says that its folder is the right one, wherever it lies now.
    await asyncio.to_thread(_read, office, lambda book: book.moved(source.name))


def _say_changed(office: Office) -> None:
    """Let the worker that begins sweeps look at once; one of another machine does within a minute."""
    path = unitlist.changed(office.home)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.touch(0o600)


async def remove_source(office: Office, name: str) -> dict[str, Any]:
    """Remove a source, and what is known of its units; no file is touched, and what is under way goes on.

    Raises:
        Misconfigured: it has received what is not delivered yet, or only another host knows.
    """
    document = pick(name, await KEPT.documents(office.client, [split(name)[1]]))  # also one that is broken
    if document is None:
        await load_source(office, name)  # says which there are
    else:
        name = str(document.name)
        await check_removal(office, name, type_of(document))
        await _remove(office, name, f"{type_of(document)}/{name}")
    return {"name": name, "action": "removed"}


async def check_removal(office: Office, name: str, type_name: str) -> None:
    """Check that a source has nothing that only it would deliver.

    Raises:
        Misconfigured: there is something, or only another host knows.
    """
    if type_name == DicomSource.type_name and (host := (await belonging.elsewhere(office.client)).get(name)):
        raise Misconfigured(
            f"the host {host} listens for it, and only {host} knows whether all that it received is delivered:"
            " remove it there, or apply it here first",
            name,
        )
    await asyncio.to_thread(checks.check_removal, office.home, name)


async def _remove(office: Office, name: str, qualified: str) -> None:
    await KEPT.remove(office.client, qualified)
    await forget_source(office, name)


async def forget_source(office: Office, name: str) -> None:
    """See to what follows from a source's being removed: it has no schedule any more, and no units."""
    await batches.withdraw(office.client, name)
    _say_changed(office)  # so that a sweep that runs ends
    await asyncio.to_thread(_forget, office, name)
    await recorded.source_removed(office, name)


def _forget(office: Office, name: str) -> None:
    """Forget a source, but not what is under way: its runs go on, and a source of its name would see how they end."""
    with _no_sweep(office.home, name) as ended, Ledger(office.home.ledger) as ledger:
        book = ledger.sources
        book.forget(name)
        used = {row.batch for row in book.units(name).values()}
        for mark, path in unitlist.batches(office.home, name).items():
            if ended and mark not in used:  # else one may be just written
                unitlist.remove(path)


@contextmanager
def _no_sweep(home: Home, name: str) -> Iterator[bool]:
    """Wait until no sweep of a source runs, and let none begin in the block; yield False if one doesn't end soon."""
    end = time.monotonic() + ENDS_S
    while True:
        with locked(unitlist.sweeping(home, name), fcntl.LOCK_EX | fcntl.LOCK_NB) as mine:
            if mine is not None or time.monotonic() >= end:
                yield mine is not None
                return
        time.sleep(LOOK_S)


async def enable_source(office: Office, name: str, enabled: bool = True) -> dict[str, Any]:
    """Let a source take part again, or pause it: of a paused one nothing is dispatched, moved or deleted."""
    source = await load_source(office, name, secrets=True)
    source.enabled = enabled
    await source.asave(source.name, overwrite=True, client=office.client)
    await batches.pause(office.client, source)
    _say_changed(office)
    action = "resumed" if enabled else "paused"
    await recorded.source_changed(office, source.name, action, ["enabled"])
    return {"name": source.name, "action": action}


async def sweep_source(office: Office, name: str) -> dict[str, Any]:
    """Begin a sweep of a source now."""
    source = await load_source(office, name)
    if not source.enabled:
        raise Misconfigured(f"is paused: `talaria source resume {source.name}` first", source.name)
    flow_run = await batches.start(office.client, source.name, office.user)
    return {"name": source.name, "action": "swept", "flow_run_id": str(flow_run.id)}


async def retry_source(office: Office, name: str, unit: str = "") -> dict[str, Any]:
    """Have units that failed, or are held, dispatched again by the next sweep: one, or all of them.

    So has one that was delivered, and of which something stays; of a listener, in whose folder nothing is to stay, all.
    """
    source = await load_source(office, name)

    def forget(book: Sourcebook) -> int:
        rows = [*book.units(source.name, UnitState.FAILED, UnitState.HELD).values()]
        if unit or isinstance(source, DicomSource):
            done = book.units(source.name, UnitState.DONE).values()
            rows += [one for one in done if one.detail]
        chosen = [one for one in rows if unit in ("", one.unit, one.shown)]
        if not chosen:
            what = f"no unit {unit}" if unit else "no unit"
            raise NotFound(f"{what} has failed, is held, or has files that stay", source.name)
        again.forget(office.home, book, source.name, chosen)
        return len(chosen)

    count = await asyncio.to_thread(_read, office, forget)
    await asyncio.to_thread(_look_now, office, source)
    if source.enabled:
        await batches.start(office.client, source.name, office.user)
    when = "" if source.enabled else " when it is resumed"
    units = f"{count} {'unit is' if count == 1 else 'units are'}"
    return {"name": source.name, "action": f"{units} dispatched again{when}"}


def _look_now(office: Office, source: Source) -> None:
    with Ledger(office.home.ledger) as ledger:
        breaker.look_now(ledger, source.reaches)


async def test_source(office: Office, name: str) -> dict[str, Any]:
    """Look whether a source can be used, and what the next sweep would find; nothing is dispatched or moved.

    Raises:
        Misconfigured: it is another host's.
    """
    source = await load_source(office, name)
    if host := (await belonging.elsewhere(office.client)).get(source.name):
        raise Misconfigured(f"belongs to the host {host}, on which it was applied last: test it there", source.name)
    return await test_unsaved(office, source)


async def test_unsaved(office: Office, source: Source) -> dict[str, Any]:
    """Look whether a source that need not be saved can be used. Answers as `test_source`."""
    saved = [one for one in await KEPT.all(office.client) if isinstance(one, Source)]
    others = [one for one in saved if one.name != source.name]
    before = next((one for one in saved if one.name == source.name), None)
    elsewhere, targets = await _elsewhere(office, source.name), await _targets(office)
    mute = await _mute([source], others, targets)
    return await asyncio.to_thread(_tested, office, source, [source, *others], targets, before, elsewhere, mute)


def _tested(
    office: Office,
    source: Source,
    sources: list[Source],
    targets: list[Target],
    saved: Source | None,
    elsewhere: Mapping[str, str],
    mute: Collection[str] = (),
) -> dict[str, Any]:
    """Test a source; what one that looks elsewhere than the saved one of its name finds there is not kept."""
    found: Counter[str] = Counter({"ready": 0, "settling": 0, "known": 0, "files": 0})
    held = list[str]()
    with ExitStack() as stack:
        ledger = notes = stack.enter_context(Ledger(office.home.ledger))
        if isinstance(source, InboxSource) and not _looks_as(source, saved):
            folder = stack.enter_context(TemporaryDirectory(prefix="talaria-"))
            notes = stack.enter_context(Ledger(Path(folder) / "notes.sqlite"))
        row, known = ledger.sources.sweep(source.name), ledger.sources.units(source.name)
        wrong = checks.problems(source, sources, targets, row.mount, elsewhere, mute)
        wrong += checks.of_listener(source, sources, office.home, elsewhere)
        wrong += checks.of_report(source, sources, elsewhere, mute)
        wrong += filter(None, [batches.never_comes(source)])
        try:
            for unit in units.units(source, notes) if not wrong else ():
                found["files"] += unit.files
                before = known.get(unit.key)
                if unit.problem:
                    held.append(f"{unit.name}: {unit.problem}")
                elif before and again.is_known(before, unit.fingerprint, unit.newest, time.time()):
                    found["known"] += 1
                else:
                    settled = unit.newest + float(getattr(source, "settle_s", 0.0)) <= time.time()
                    found["ready" if unit.complete or settled else "settling"] += 1
        except DispatchError as exc:
            wrong.append(exc.message)
    return {"name": source.name, "ok": not wrong, "problems": wrong, "held": held, "units": dict(found)}


def _looks_as(source: InboxSource, saved: Source | None) -> bool:
    """Return True if what an inbox finds is what the saved one of its name finds."""
    what = "folder", "unit", "exclude"
    return isinstance(saved, InboxSource) and all(getattr(source, one) == getattr(saved, one) for one in what)


async def load_source(office: Office, name: str, *, secrets: bool = False) -> Source:
    """Return a saved source; its secrets are masked where they are not wanted."""
    (source,) = await KEPT.load(office.client, [name], secrets=secrets)
    return source


async def _targets(office: Office) -> list[Target]:
    return [one for one in await TARGETS.all(office.client) if isinstance(one, Target)]


def _read(office: Office, work: Callable[[Sourcebook], Any]) -> Any:
    with Ledger(office.home.ledger) as ledger:
        return work(ledger.sources)


def _time(seconds: float) -> str | None:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if seconds else None
