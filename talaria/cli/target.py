"""`talaria target`: what is known of targets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from talaria.cli.access import api
from talaria.cli.output import DONE, NOT_ALL, checked, enabled, print_json, say, table

if TYPE_CHECKING:
    from blocks import Target
    from tasks.targets import Broken

app = typer.Typer(
    no_args_is_help=True,
    help="Create, show, test and remove targets.\n\nExample: talaria target apply targets.yaml",
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
Name = Annotated[str, typer.Argument(help="Name of the target, or its type and name as in dicom/pacs.")]


@app.command(epilog="Example: talaria target types --json")
def types(as_json: Json = False) -> None:
    """The types of target: what each can do, and its fields."""
    from blocks import REFUSED, TYPES
    from talaria.targetfile import field_names
    from tasks import DRIVERS
    from transfer.errors import Misconfigured

    found: dict[str, Any] = {}
    for name, cls in TYPES.items():
        problem = ""
        try:
            driver = DRIVERS.get(name)
        except Misconfigured as exc:  # its extra is not installed, or another package's driver is broken
            driver, problem = None, exc.message
        fields = {
            field: {
                "description": cls.model_fields[field].description,
                "required": cls.model_fields[field].is_required(),
                "secret": "SecretStr" in str(cls.model_fields[field].annotation),
            }
            for field in field_names(cls)
        }
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
        found[name] = {"works": driver is not None, **why, **abilities, "fields": fields}
    if as_json:
        print_json({"types": found, "refused": REFUSED})
        return
    rows = []
    for name, one in found.items():
        can = [word for word in ("push", "query", "pull", "hook") if one.get(word)]
        rows.append(
            [
                name,
                ", ".join(can) or "not yet",
                ", ".join(one.get("verifies", ())),
                ", ".join(f + ("*" if one["fields"][f]["required"] else "") for f in one["fields"]),
            ]
        )
    table("Types (fields with * are required)", ["type", "can", "verifies", "fields"], rows)
    for name, one in found.items():
        if "problem" in one:
            say(f"talaria: type {name}: {one['problem']}")
    for name, reason in REFUSED.items():
        say(f"talaria: type {name} can't be used: {reason}")


@app.command(epilog="Example: talaria target apply targets.yaml --dry-run")
def apply(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="YAML file with a mapping `targets`.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace targets of another type that have the same name.")
    ] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove the targets that the file doesn't list.")] = False,
    as_json: Json = False,
) -> None:
    """Create or update the targets listed in a file; all of them or, if one is wrong, none."""
    from talaria.targetfile import action_for, read
    from tasks.targets import all_targets, remove, save

    wanted = read(file)
    with api() as access:
        there = access.run(all_targets)
        actions = {name: action_for(target, there, replace=replace) for name, target in wanted.items()}
        old = [one for one in there if prune and one.name not in wanted]
        for name, action in actions.items() if not dry_run else ():
            if action != "unchanged":
                access.run(save, wanted[name], name, replace=replace)
        for one in old if not dry_run else ():
            access.run(remove, f"{one.type_name}/{one.name}")
    actions |= {one.name: "removed" for one in old}
    done = [{"name": name, "action": action} for name, action in actions.items()]
    if as_json:
        print_json({"dry_run": dry_run, "targets": done})
        return
    for name, action in actions.items():
        print(f"{name}: {'would be ' if dry_run and action != 'unchanged' else ''}{action}")


@app.command("list", epilog="Example: talaria target list --json")
def list_(as_json: Json = False) -> None:
    """All targets; one whose settings are not valid any more is listed as broken, with the reason."""
    from tasks.checking import last_checks
    from tasks.targets import all_targets

    with api() as access:
        targets = access.run(all_targets)
        checks = access.run(last_checks, targets)
    found = [_entry(one, checks.get(one.name)) for one in targets]
    if as_json:
        print_json({"targets": found})
        return
    rows = [
        [
            one["name"],
            one["type"],
            one["direction"] or "",
            enabled(one),
            _place(one),
            one["broken"] or one.get("description", ""),
            checked(one),
        ]
        for one in found
    ]
    table("", ["name", "type", "direction", "enabled", "where", "description", "last check"], rows)


def _entry(one: Target | Broken, check: dict[str, Any] | None) -> dict[str, Any]:
    """Return what `list` shows of a target."""
    from blocks import Target
    from talaria.targetfile import values_of
    from tasks.targets import facts

    state = None if check is None else {"ok": check["ok"], "time": check["time"]}
    values = values_of(one, secrets=True) if isinstance(one, Target) else {}
    return {"name": one.name, **values, **facts(one), "last_check": state}


@app.command(epilog="Example: talaria target show pacs")
def show(name: Name, as_json: Json = False) -> None:
    """One target's settings; secrets are never shown."""
    from talaria.targetfile import values_of
    from tasks.targets import load

    with api() as access:
        (target,) = access.run(load, [name])
    values = {"name": target.name, **values_of(target, secrets=True)}
    if as_json:
        defaults = target.model_dump(mode="json")
        secret = {f for f, info in type(target).model_fields.items() if "SecretStr" in str(info.annotation)}
        print_json(
            {"name": target.name}
            | {k: v for k, v in defaults.items() if k != "block_type_slug" and k not in secret}
            | values
        )
        return
    for field, value in values.items():
        print(f"{field}: {value}")


@app.command(epilog="Example: talaria target remove old-pacs")
def remove(name: Name, as_json: Json = False) -> None:
    """Remove a target; what was delivered stays in the ledger."""
    from tasks import targets

    with api() as access:
        access.run(targets.remove, name)
    _done(name, "removed", as_json)


@app.command(epilog="Example: talaria target rename pacs archive-pacs")
def rename(
    old: Annotated[str, typer.Argument(help="Its name now.")],
    new: Annotated[str, typer.Argument(help="Its name from now on.")],
    as_json: Json = False,
) -> None:
    """Give a target another name."""
    from blocks.base import check_name
    from tasks import targets

    check_name(new)
    with api() as access:
        (target,) = access.run(targets.load, [old])
        if access.run(targets.documents, [new]):
            raise ValueError(f"a target named {new} is there already")
        access.run(targets.save, target, new)
        access.run(targets.remove, old)
    _done(new, f"renamed from {old}", as_json)


@app.command(epilog="Example: talaria target enable pacs")
def enable(name: Name, as_json: Json = False) -> None:
    """Let a target take part again."""
    _set_enabled(name, True, as_json)


@app.command(epilog="Example: talaria target disable pacs")
def disable(name: Name, as_json: Json = False) -> None:
    """Take a target out: dispatches to it are refused, queued ones wait."""
    _set_enabled(name, False, as_json)


@app.command(epilog="Example: talaria target export > targets.yaml")
def export(as_json: Json = False) -> None:
    """All targets as `apply` reads them, secrets left out."""
    import yaml

    from blocks import Target
    from talaria.targetfile import values_of
    from tasks.targets import all_targets
    from transfer.errors import Misconfigured

    with api() as access:
        found = access.run(all_targets)
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Misconfigured(f"several targets are named {', '.join(twice)}: rename or remove one of each")
    for one in found:
        if not isinstance(one, Target):
            say(f"talaria: {one.name} is left out: {one.reason}")
    document = {"targets": {one.name: values_of(one) for one in found if isinstance(one, Target)}}
    if as_json:
        print_json(document)
    else:
        print(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), end="")


@app.command(epilog="Example: talaria target test pacs --json")
def test(
    name: Annotated[str | None, typer.Argument(help="Name of the target.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Test every enabled target.")] = False,
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Test the targets of a file, saved or not.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check targets where dispatches run, step by step; where it can be removed, a probe is written."""
    if (name is not None) + all_ + (file is not None) != 1 and not (name and file):
        raise ValueError("say which: a NAME, --all, or --file FILE.yaml")
    from talaria.checks import check_file, check_saved

    found = check_file(file, name) if file else check_saved(name)
    if as_json:
        print_json(found[0] if name and found else {"targets": found})
    else:
        for one in found:
            rows = [[p["name"], p["result"], f"{p['ms']:.0f} ms", p["detail"]] for p in one["probes"]]
            table(f"{one['name']}: {'ok' if one['ok'] else 'not ok'}", ["probe", "result", "time", "detail"], rows)
    if not found:
        say("there are no targets to test")
    raise typer.Exit(DONE if all(one["ok"] for one in found) else NOT_ALL)


def _set_enabled(name: str, enabled: bool, as_json: bool) -> None:
    from tasks import targets

    with api() as access:
        (target,) = access.run(targets.load, [name])
        target.enabled = enabled
        access.run(targets.save, target, target.name)
    _done(target.name, "enabled" if enabled else "disabled", as_json)


def _done(name: str, action: str, as_json: bool) -> None:
    if as_json:
        print_json({"name": name, "action": action})
    else:
        print(f"{name}: {action}")


def _place(values: dict[str, Any]) -> str:
    """Return where a target is, in a few words."""
    parts = [str(values[key]) for key in ("host", "port", "url", "endpoint_url", "bucket", "folder") if values.get(key)]
    return " ".join(parts)
