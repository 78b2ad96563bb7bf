"""What was dispatched as many studies, to be sent elsewhere: a list of the same ones as they are now.

The list that a sweep has made goes when its units are settled, and what a listener has received goes then, too. A
folder of studies may have others by now.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from prefect.client.orchestration import PrefectClient

from blocks import Source
from tasks.sources.checks import places_of
from tasks.sources.saved import KEPT
from tasks.sources.units import root, units
from transfer import deadstudies, silent, unitlist
from transfer.beneath import resolved
from transfer.deadletters import Lent, read_by
from transfer.deadstudies import listed_or_kept
from transfer.errors import NotFound
from transfer.globs import patterns
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.studies import Each, FloodStudy
from transfer.unitlist import ListedUnit

LIST = "units.jsonl"
ANSWER_S = 10.0  # for the server of a share: somebody waits for the answer


async def lent_units(client: PrefectClient, home: Home, paths: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Return the list to read instead of those that a source has dispatched, which may be gone.

    Args:
        keys: of the units that were dispatched; those that are not in the source any more are listed all the same, so
            that the dispatch says so of each.

    Raises:
        NotFound: the source has none of them, or is gone. DispatchError: it can't be looked through.
        SourceAway: the share of one does not answer.
        Busy: there is no room for links to what was received.
    """
    lists = [Path(one) for one in paths]
    sources = dict[str, Source]()
    for one in lists:
        if not one.exists():
            if read_by([str(one)]):
                raise NotFound("what was kept for it has gone: send the dispatch that it was sent from")
            name = unitlist.source_of(one)
            (sources[name],) = await KEPT.load(client, [name], secrets=False)
    await silent.check([place for source in sources.values() for place in places_of(source)], ANSWER_S)
    return await asyncio.to_thread(_lent, home, lists, sources, keys)


def lent_studies(
    home: Home, run_id: str, paths: Sequence[str], each: Each, exclude: str, names: Sequence[str]
) -> list[str]:
    """Return the list to read instead of a folder of studies, or another list, that a run's flood was made of.

    Args:
        names: of the studies that were dispatched; those that are there no more are listed all the same, so that the
            dispatch says so of each.

    Raises:
        NotFound, Denied, Misconfigured: as `listed_or_kept` does.
        Busy: there is no room for links to what is in the state directory.
    """
    found = {study.name: study for study in listed_or_kept(home, run_id, paths, each, patterns(exclude))}
    with Lent(home) as lent:
        writer = unitlist.Writer(lent.make() / deadstudies.LIST)
        try:
            for name in names:
                study = found.get(name)
                unit = _listed(name, study, paths[0])
                writer.add(_own(lent, unit) if study and not study.problem else unit)
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        return [str(writer.path)]


def _listed(name: str, study: FloodStudy | None, folder: str) -> ListedUnit:
    if study is None:
        return ListedUnit(name, (os.path.join(folder, name),), resolved(folder))
    # What leads out of its folder stays refused.
    within = resolved(Path(study.paths[0]).parent) if study.problem else study.within
    return ListedUnit(name, study.paths, within)


def _lent(home: Home, lists: Sequence[Path], sources: dict[str, Source], keys: Sequence[str]) -> list[str]:
    with Lent(home) as lent:
        writer = unitlist.Writer(lent.make() / LIST)
        try:
            for one in lists:
                name = unitlist.source_of(one)
                found = unitlist.read(one) if name not in sources else _there(home, sources[name], keys)
                for unit in found:
                    writer.add(_own(lent, unit))
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        return [str(writer.path)]


def _there(home: Home, source: Source, keys: Sequence[str]) -> Iterator[ListedUnit]:
    """Yield the units of a source by their keys, as they are now."""
    folder, missing = root(source), dict.fromkeys(keys)
    with Ledger(home.ledger) as ledger:
        for unit in units(source, ledger):
            if unit.key in missing and unit.paths:
                del missing[unit.key]
                yield ListedUnit(unit.key, unit.paths, folder)
    if len(missing) == len(dict.fromkeys(keys)):
        raise NotFound(f"nothing of it is in the source {source.name} any more: send it from where it is now")
    for key in missing:
        yield ListedUnit(key, (os.path.join(folder or "/", key),), folder)


def _own(lent: Lent, unit: ListedUnit) -> ListedUnit:
    """Return a unit that stays; what was received goes when those have it that it was for."""
    paths = tuple(map(lent.path, unit.paths))
    # Its files are no sweep's: nothing is ever moved or deleted by what this list says.
    return replace(unit, paths=paths, files=(), within=unit.within if paths == unit.paths else resolved(lent.files))
