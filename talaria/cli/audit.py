"""`talaria audit show` and `talaria audit verify`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from talaria.cli.output import DONE, NOT_ALL, Json, print_json, say_whose
from talaria.console import say
from transfer.audit import Trail, entries, verify
from transfer.home import Home

app = typer.Typer(no_args_is_help=True, help="Look at the audit trail: who did what.")


@app.command(epilog="Example: talaria audit show --last 20 --who anna")
def show(
    last: Annotated[int, typer.Option(min=1, help="How many of the newest entries.")] = 50,
    who: Annotated[str, typer.Option(help="Only entries of this user.")] = "",
    event: Annotated[str, typer.Option(help="Only this event, as in login or delivery.")] = "",
    as_json: Json = False,
) -> None:
    """List what was done, oldest first."""
    found = [
        one
        for one in entries(_trail())
        if (not who or one.get("who") == who) and (not event or one.get("event") == event)
    ][-last:]
    if as_json:
        print_json({"entries": found})
        return
    for one in found:
        details = json.dumps(one.get("details", {}), ensure_ascii=False, separators=(", ", ": "))[1:-1].replace('"', "")
        where = f" from {one['source']}" if one.get("source") else ""
        print(f"{one['n']:>6} {one['time']} {one['event']} {one['result']} {one['who']}{where} {details}".rstrip())


@app.command("verify", epilog="Example: talaria audit verify --head 3f2a…")
def check(
    head: Annotated[str, typer.Option(help="Hash of an entry that was noted elsewhere, and must be there.")] = "",
    as_json: Json = False,
) -> None:
    """Check that no entry was altered, removed, put in or moved since it was written; exit 1 if one was."""
    number, digest, faults = verify(_trail(), head)
    if as_json:
        print_json({
            "ok": not faults,
            "entries": number,
            "head": digest,
            "faults": [{"line": fault.line, "what": fault.what} for fault in faults],
        })  # fmt: skip
    else:
        for fault in faults:
            say(f"line {fault.line}: {fault.what}" if fault.line else fault.what)
        print(f"{number} entries, head {digest}" + ("" if not faults else f", {len(faults)} faults"))
    raise typer.Exit(NOT_ALL if faults else DONE)


def _trail() -> Trail:
    from talaria.settings import load_settings

    load_settings()
    say_whose("audit trails")
    return Trail(Home.current())
