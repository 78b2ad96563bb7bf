"""What the receipts of a flood say of each study: a row for it, made when it is asked for.

All rows of 100,000 files at once would be 45 MB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

from transfer import lines
from transfer.receipt import Receipt, State, overall
from transfer.studies import FloodStudy


class StudyRows(Sequence[dict[str, Any]]):
    """The rows of a flood's studies, in JSON: its dispatch, its state, and its receipt at every target.

    Args:
        ids: of the dispatches, by the study's name.
        receipts: by target, and by study.
        before: the rows of the run's last part; from there come those of targets for which this part had nothing to do.
    """

    def __init__(
        self,
        studies: Sequence[FloodStudy],
        ids: Mapping[str, str],
        receipts: Mapping[str, Mapping[str, Receipt]],
        before: Sequence[Mapping[str, Any]],
    ) -> None:
        self._studies, self._ids, self._receipts = studies, ids, receipts
        self._before = {row["study"]: row for row in before}

    def __len__(self) -> int:
        return len(self._studies)

    @overload
    def __getitem__(self, at: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, at: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, at: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return [*map(self._row, self._studies[at])] if isinstance(at, slice) else self._row(self._studies[at])

    def _row(self, study: FloodStudy) -> dict[str, Any]:
        old = self._before.get(study.name, {"dispatch_id": "", "targets": {}})
        targets = {name: one | {"items": _json(lines.read(one["items"]))} for name, one in old["targets"].items()}
        for name, of_target in self._receipts.items():
            receipt = of_target[study.name]
            targets[name] = receipt.facts() | {"items": _json(receipt.items)}
        state = overall([State(one["state"]) for one in targets.values()])
        dispatch_id = self._ids.get(study.name) or old["dispatch_id"]
        return {"study": study.name, "dispatch_id": dispatch_id, "state": str(state), "targets": targets}


def rows_given_up(before: Sequence[dict[str, Any]], failed: Mapping[str, str]) -> Sequence[dict[str, Any]]:
    """Return the rows of the run's last part where what waited for some targets was given up before it was read.

    Args:
        failed: why, by target.
    """

    def row(one: dict[str, Any]) -> dict[str, Any]:
        targets = dict(one["targets"])
        for name, why in failed.items():
            if targets.get(name, {}).get("state") == State.WAITING:
                receipt = replace(Receipt.from_json(name, targets[name]), stopped=None, error=why)
                targets[name] = receipt.facts() | {"items": targets[name]["items"]}
        return one | {"state": str(overall([State(of["state"]) for of in targets.values()])), "targets": targets}

    return [row(one) for one in before] if failed else before


def settled(target: str, before: Sequence[dict[str, Any]]) -> dict[str, Receipt]:
    """Return the receipts of the studies that are settled at a target, from the rows of the run's last part."""
    found = {row["study"]: row["targets"].get(target) for row in before}
    return {
        name: Receipt.from_json(target, one)
        for name, one in found.items()
        if one and one["state"] not in (State.WAITING, State.CANCELLED)
    }


def _json(items: Sequence[lines.ItemResult]) -> list[dict[str, str]]:
    return [one.to_json() for one in items]
