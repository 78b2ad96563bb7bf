"""Targets: listed, shown, applied, renamed, enabled, removed and tested."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from blocks import REFUSED, TYPES, Target
from blocks.named import check_name
from talaria.engine.registry import CHECKS, workers
from talaria.engine.runs import at_rest, create
from talaria.service import Office, recorded
from talaria.service.fields import field_facts
from talaria.service.uses import RENAMED, check_unused
from talaria.targetfile import action_for, all_values_of, differing, made_of, make, values_of
from tasks import DRIVERS
from tasks import targets as saved
from tasks.checking import LastChecks, check_target, keep, result_of_run
from tasks.dispatch import breaker
from tasks.documents import Broken
from tasks.names import split
from tasks.targets import all_targets, facts, load
from transfer import live
from transfer.database import LOST
from transfer.errors import REMEDIES, Misconfigured
from transfer.health import FAILED, Probe, watched
from transfer.ledger import Ledger
from transfer.waits import Breaker

Event = tuple[str, dict[str, Any]]
LOOK_S = 0.1  # between two looks at a check that runs
SETTINGS = "settings"  # the step that fails where these are not valid
STATE_S = 0.5  # and at the state of its run


async def target_types(office: Office | None = None) -> dict[str, Any]:
    """Return the types of target: what each can do, and its fields."""
    return await asyncio.to_thread(_types)  # imports every driver


def _types() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, cls in TYPES.items():
        problem = ""
        try:
            driver = DRIVERS.get(name)
        except Misconfigured as exc:  # its extra is not installed, or another package's driver is broken
            driver, problem = None, exc.message
        abilities = (
            {}
            if driver is None
            else {
                "push": True,
                "query": driver.find is not None,
                "pull": driver.retrieve is not None,
                "hook": driver.hook is not None,
                "dicom_only": driver.facts.dicom_only,
                "verifies": [str(level) for level in driver.facts.verifies_by],
            }
        )
        why = {"problem": problem} if problem else {}
        found[name] = {"works": driver is not None, **why, **abilities, "fields": field_facts(cls)}
    return {"types": found, "refused": REFUSED}


async def list_targets(office: Office) -> dict[str, Any]:
    """Return all targets; one whose settings are no longer valid is listed as broken, with the reason."""
    return {"targets": await entries(office, await all_targets(office.client))}


async def entries(
    office: Office, found: Sequence[Target | Broken], *, settings: bool = True, known: LastChecks | None = None
) -> list[dict[str, Any]]:
    """Return saved targets as a list shows them.

    Args:
        settings: whether what each is set to stands there, too.
        known: the checks that whoever asks has read before.
    """
    checks = await (known or LastChecks()).read(office.client, found)
    breakers = await asyncio.to_thread(breaker.every_of, office.home, [one for one in found if isinstance(one, Target)])
    return [_entry(one, checks.get(one.name), breakers.get(one.name), settings=settings) for one in found]


def _entry(
    one: Target | Broken, check: dict[str, Any] | None, known: Breaker | None, *, settings: bool
) -> dict[str, Any]:
    state = None if check is None else {"ok": check["ok"], "time": check["time"]}
    values = values_of(one, secrets=True) if settings and isinstance(one, Target) else {}
    return {"name": one.name, **values, **facts(one), "last_check": state, "breaker": _shown(known)}


def _shown(known: Breaker | None) -> dict[str, Any]:
    if known is None or not known.opened:
        return {"state": "closed"}
    times = {"since": known.opened, "next_test": known.until}
    shown = {key: datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds") for key, time in times.items()}
    return {"state": "open", **shown, "failures": known.failures, "reason": known.reason}


async def show_target(office: Office, name: str, given: bool = False) -> dict[str, Any]:
    """Return one target's settings, secrets masked.

    Args:
        given: only those that are not the defaults.
    """
    (target,) = await load(office.client, [name], secrets=False)
    return {"name": target.name, **(values_of(target, secrets=True) if given else all_values_of(target))}


async def apply_targets(
    office: Office,
    targets: dict[str, Any],  # by name, the values that a file gives
    dry_run: bool = False,
    replace: bool = False,
    prune: bool = False,
) -> dict[str, Any]:
    """Create or update targets; all of them or, if one is wrong, none.

    Raises:
        InUse: something uses those that would be removed.
    """
    wanted = made(targets)
    there = await all_targets(office.client, used=wanted)
    actions = {name: action_for(target, there, replace=replace) for name, target in wanted.items()}
    old = [one for one in there if prune and one.name not in wanted]
    await check_unused(office.client, {f"{one.type_name}/{one.name}" for one in old}, "removed")
    for name, action in actions.items() if not dry_run else ():
        if action != "unchanged":
            await saved.save(office.client, wanted[name], name, replace=replace)
            before = next((one for one in there if one.name == name and isinstance(one, Target)), None)
            await recorded.target_changed(office, name, action, differing(wanted[name], before))
    for one in old if not dry_run else ():
        await saved.remove(office.client, f"{one.type_name}/{one.name}")
        await forget_standing(office, one.name)
        await recorded.target_removed(office, one.name)
    actions |= {one.name: "removed" for one in old}
    return {"dry_run": dry_run, "targets": [{"name": name, "action": action} for name, action in actions.items()]}


def made(values: dict[str, Any]) -> dict[str, Target]:
    """Return targets made of values, in which variables and files are filled in: nothing is read on this machine.

    Raises:
        Misconfigured: every target that is wrong, each in a line.
    """
    return made_of(values, make, "target")


async def save_target(office: Office, target: Target, before: Target | None, change: str) -> None:
    """Save a target as somebody has edited it.

    Args:
        before: what it was.
        change: `created` or `updated`.
    """
    await saved.save(office.client, target, target.name)
    await recorded.target_changed(office, target.name, change, differing(target, before))


async def remove_target(office: Office, name: str) -> dict[str, Any]:
    """Remove a target; what was delivered stays in the ledger.

    Raises:
        InUse: a dispatch or retrieval that has not ended, a source or a schedule names it.
    """
    await check_unused(office.client, [name], "removed")
    await saved.remove(office.client, name)
    await forget_standing(office, name)
    await recorded.target_removed(office, name)
    return {"name": name, "action": "removed"}


async def rename_target(office: Office, name: str, to: str) -> dict[str, Any]:
    """Give a target another name.

    Raises:
        InUse: as of `remove_target`, or a rule names it.
        ValueError: that name is not valid, or is taken.
    """
    check_name(to)
    (target,) = await load(office.client, [name])
    await check_unused(office.client, [name], RENAMED)
    if await saved.documents(office.client, [to]):
        raise ValueError(f"a target named {to} is there already")
    await saved.save(office.client, target, to)
    await saved.remove(office.client, name)
    await forget_standing(office, name)
    await recorded.target_changed(office, to, f"renamed from {name}", ["name"])
    return {"name": to, "action": f"renamed from {name}"}


async def forget_standing(office: Office, name: str) -> None:
    """Forget that a target is down which is not there any more: another one may get its name.

    Where the ledger is away, that is forgotten with what is older than the retention.
    """
    target = split(name)[1]

    def forget() -> None:
        with suppress(*LOST), Ledger(office.home.ledger) as ledger:
            ledger.happenings.stands(f"target/{target}", "up", at_first=False)
            ledger.waits.forget(target)

    await asyncio.to_thread(forget)


async def enable_target(office: Office, name: str, enabled: bool = True) -> dict[str, Any]:
    """Let a target take part again, or take it out: dispatches to it are refused then, queued ones wait."""
    (target,) = await load(office.client, [name])
    target.enabled = enabled
    await saved.save(office.client, target, target.name)
    action = "enabled" if enabled else "disabled"
    await recorded.target_changed(office, target.name, action, ["enabled"])
    return {"name": target.name, "action": action}


async def export_targets(office: Office) -> dict[str, Any]:
    """Return all targets as `apply` reads them, without secrets; and why others are left out."""
    found = await all_targets(office.client)
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Misconfigured(f"several targets are named {', '.join(twice)}: rename or remove one of each")
    return {
        "targets": {one.name: values_of(one) for one in found if isinstance(one, Target)},
        "left_out": {one.name: one.reason for one in found if isinstance(one, Broken)},
    }


# ---- tests


async def test_targets(office: Office, name: str | None = None, move: bool = False) -> AsyncIterator[Event]:
    """Check a saved target, or all enabled ones: on the worker if one runs, else here.

    Args:
        move: whether those that can are to move one instance to us.

    Yields:
        "probe" with a target's name and a probe, as each is made; "result" with the JSON of `target test`.

    Raises:
        Misconfigured: the one that is named can't move instances.
    """
    found: list[Target | Broken] = []
    found += await load(office.client, [name], secrets=False) if name else await all_targets(office.client)
    if name and move:
        _check_moves(one for one in found if isinstance(one, Target))
    for one in found:
        if isinstance(one, Broken):
            for event in _ended(_failed(one.name, SETTINGS, one.reason)):
                yield event
        elif name or one.enabled:
            here = office.alone or not await workers(office.client)
            async for event in _check_saved(office, one, move) if here else _check_there(office, one, move):
                yield event


def _check_moves(found: Iterable[Target]) -> None:
    for one in found:
        if not one.moves:
            raise Misconfigured("no move can be tested: it is no DICOM node of direction query or both", one.name)


async def test_values(office: Office, targets: dict[str, Any], move: bool = False) -> AsyncIterator[Event]:
    """Check targets that are not saved, here: a secret must not become a run's parameter. As `test_targets`."""
    unsaved = [*made(targets).values()]
    if move and len(unsaved) == 1:
        _check_moves(unsaved)
    for target in unsaved:
        async for event in test_unsaved(target, move):
            yield event


async def test_unsaved(target: Target, move: bool = False) -> AsyncIterator[Event]:
    """Check a target that is not saved, here. Yields as `test_targets`."""
    async for event in _check_here(target, saved=False, move=move):
        yield event


async def _check_saved(office: Office, target: Target, move: bool) -> AsyncIterator[Event]:
    """Check a saved target here, with its secrets."""
    try:
        (whole,) = await load(office.client, [f"{target.type_name}/{target.name}"])
    except Misconfigured as exc:  # one of its secrets is not valid, or it is gone
        for event in _ended(_failed(target.name, SETTINGS, exc.message)):
            yield event
        return
    async for event in _check_here(whole, saved=True, move=move):
        yield event


async def _check_here(target: Target, *, saved: bool, move: bool) -> AsyncIterator[Event]:
    loop, probes = asyncio.get_running_loop(), asyncio.Queue[Probe]()

    def made_one(probe: Probe) -> None:
        loop.call_soon_threadsafe(probes.put_nowait, probe)

    with watched(made_one):
        check = asyncio.create_task(asyncio.to_thread(check_target, target, move=move))
    shown = set()
    while not check.done() or not probes.empty():
        waiting = asyncio.create_task(probes.get())
        await asyncio.wait([check, waiting], return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            continue
        shown.add(waiting.result().name)
        yield "probe", {"name": target.name, "probe": waiting.result().to_json()}
    health = await check
    document = keep(target, health) if saved else health.to_json(target.name)
    for event in _ended(document, shown):
        yield event


async def _check_there(office: Office, target: Target, move: bool) -> AsyncIterator[Event]:
    """Let a worker check a target, with its probes as they come where it is on this machine."""
    parameters: dict[str, Any] = {"target": f"{target.type_name}/{target.name}"} | ({"move": True} if move else {})
    run = await create(office.client, "check", parameters, f"check of {target.name}", CHECKS, by=office.user)
    shown, looked = set[str](), 0.0
    loop = asyncio.get_running_loop()
    while True:
        probes = (live.read(office.home, str(run.id), live.PROBES) or {}).get("probes", ())
        for probe in [probe for probe in probes if probe["name"] not in shown]:
            shown.add(probe["name"])
            yield "probe", {"name": target.name, "probe": probe}
        if loop.time() - looked >= STATE_S:
            run, looked = await office.client.read_flow_run(run.id), loop.time()
            if at_rest(run):
                break
        await asyncio.sleep(LOOK_S)
    detail = (run.state and run.state.message) or "the check did not run to its end"
    found = await result_of_run(office.client, run.id, target.name)
    for event in _ended(found or _failed(target.name, "check", detail), shown):
        yield event


def _failed(name: str, probe: str, why: str) -> dict[str, Any]:
    """Return the result for a target that could not be checked."""
    failed = Probe(probe, FAILED, detail=why)
    if probe == SETTINGS:
        failed.error, failed.remedy = Misconfigured.__name__, REMEDIES[Misconfigured]
    return {"name": name, "ok": False, "probes": [failed.to_json()]}


def _ended(document: dict[str, Any], shown: Collection[str] = ()) -> Iterator[Event]:
    """Return the probes that have not been shown, and the result."""
    for probe in document["probes"]:
        if probe["name"] not in shown:
            yield "probe", {"name": document["name"], "probe": probe}
    yield "result", {key: document[key] for key in ("name", "ok", "probes")}
