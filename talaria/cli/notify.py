"""`talaria notify`: rules that write to people when something happens."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from talaria.cli.access import api
from talaria.cli.kinds import add_apply, print_done, print_types, shown, types_of
from talaria.cli.output import DONE, NOT_ALL, Json, print_json, table
from talaria.console import say

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,  # Rich takes 0.2 s to print a help
    help="Write to people when something happens: by webhook, e-mail or a command.\n\n"
    "Example: talaria notify apply talaria.yaml",
)
Name = Annotated[str, typer.Argument(help="Name of the rule, or its type and name as in email/ops.")]


@app.command(epilog="Example: talaria notify types --json")
def types(as_json: Json = False) -> None:
    """List the types of rule with their fields, and what rules may hear of."""
    document = types_of("rule", "rules")
    if as_json:
        print_json(document)
        return
    print_types(document["types"])
    print(f"events: {', '.join(document['events'])}")


add_apply(app, "rules", "notify", "talaria notify apply talaria.yaml --dry-run")


@app.command("list", epilog="Example: talaria notify list --json")
def list_(as_json: Json = False) -> None:
    """List all rules, each with its last message."""
    with api() as access:
        document = access.call("list_rules")
    if as_json:
        print_json(document)
        return
    rows = [
        [
            one["name"],
            one["type"],
            "broken" if one["broken"] else "yes" if one["enabled"] else "paused",
            one["leads_to"],
            one["broken"] or ", ".join(one.get("on", ["all but dispatch.delivered"])),
            _last(one["last"]),
        ]
        for one in document["rules"]
    ]
    table("", ["name", "type", "enabled", "to", "events", "last message"], rows)


@app.command(epilog="Example: talaria notify show ops")
def show(name: Name, as_json: Json = False) -> None:
    """Show one rule's settings, without secrets, and its newest messages with why they could not be sent."""
    with api() as access:
        values = access.call("show_rule", name=name)
    if as_json:
        print_json(values)
        return
    messages, note = values.pop("messages"), values.pop("note", "")
    for field, value in values.items():
        print(f"{field}: {shown(value)}")
    if note:
        say(note)
    for one in messages:
        to = f" to {one['recipient']}" if one["recipient"] else ""
        print(f"message {one['number']}{to}: {_last(one)}")


@app.command(epilog="Example: talaria notify test ops --to me@example.org")
def test(
    name: Name,
    to: Annotated[str, typer.Option(help="Of an e-mail rule, the address that gets the test message.")] = "",
    as_json: Json = False,
) -> None:
    """Send a test message by a saved rule, from where `talaria up` runs."""
    with api() as access:
        done = access.call("test_rule", name=name, to=to)
    if as_json:
        print_json(done)
    else:
        for one in done["recipients"]:
            where = f"{done['name']}: {one['recipient']}" if one["recipient"] else done["name"]
            print(f"{where}: {'sent' if one['ok'] else one['detail']}")
    raise typer.Exit(DONE if done["ok"] else NOT_ALL)


@app.command(epilog="Example: talaria notify pause ops")
def pause(name: Name, as_json: Json = False) -> None:
    """Pause a rule: it writes of nothing that happens meanwhile; what it has not sent waits, three days at most."""
    with api() as access:
        print_done(access.call("enable_rule", name=name, enabled=False), as_json)


@app.command(epilog="Example: talaria notify resume ops")
def resume(name: Name, as_json: Json = False) -> None:
    """Let a paused rule write again."""
    with api() as access:
        print_done(access.call("enable_rule", name=name, enabled=True), as_json)


@app.command(epilog="Example: talaria notify remove ops")
def remove(name: Name, as_json: Json = False) -> None:
    """Remove a rule, and what it has not sent yet."""
    with api() as access:
        print_done(access.call("remove_rule", name=name), as_json)


def _last(message: dict[str, Any] | None) -> str:
    """Return how a message stands, in a few words."""
    if message is None:
        return ""
    what = f"{message['state']}, {message['count']} happened"
    if message["state"] == "sent":
        return f"{what}, {message['ended']}"
    why = f": {message['error']}" if message["error"] else ""
    when = f", tried again {message['due']}" if message["tries"] else f", due {message['due']}"
    return what + (when if message["due"] else "") + why
