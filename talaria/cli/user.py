"""`talaria user` and `talaria token`: who may log in at the front door of this machine."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from talaria.cli.output import Json, print_json, say_whose, table
from talaria.console import say
from transfer.home import Home

if TYPE_CHECKING:
    from talaria.front.tokens import Tokens
    from talaria.front.users import Users

user = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="People who may log in, kept in `users.json` of the state directory.",
)
token = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Tokens for scripts; a token is shown once, when it is made."
)

Name = Annotated[str, typer.Argument(help="Name of the user.")]
RoleOption = Annotated[str, typer.Option("--role", help="viewer (look), operator (dispatch, test) or admin (targets).")]


@user.command(epilog="Example: talaria user add anna --role operator")
def add(
    name: Name,
    role: RoleOption = "viewer",
    no_password: Annotated[
        bool, typer.Option("--no-password", help="Known by the header of a trusted proxy alone.")
    ] = False,
    if_missing: Annotated[bool, typer.Option("--if-missing", help="Leave one who is there as they are.")] = False,
    as_json: Json = False,
) -> None:
    """Add a user; the password is asked for, or is the first line of stdin."""
    from talaria.front.access import Role

    users, given = _users(), Role.of(role)
    if if_missing and (there := users.role_of(name)) is not None:
        _done({"name": name, "role": there.label, "action": "none"}, f"{name}: is there already", as_json)
        return
    users.check(name)
    users.add(name, given, None if no_password else _password())
    _record("added", name, role=given.label)
    _done({"name": name, "role": given.label, "action": "added"}, f"{name}: added as {given.label}", as_json)


@user.command("list", epilog="Example: talaria user list --json")
def list_users(as_json: Json = False) -> None:
    """List users and their roles."""
    found = [{"name": one.name, "role": one.role.label, "password": one.password} for one in _users().all()]
    if as_json:
        print_json({"users": found})
    else:
        rows = [[one["name"], one["role"], "yes" if one["password"] else "no (proxy)"] for one in found]
        table("", ["name", "role", "password"], rows)


@user.command(epilog="Example: talaria user remove anna")
def remove(name: Name, as_json: Json = False) -> None:
    """Remove a user; their sessions end."""
    _users().remove(name)
    _record("removed", name)
    _done({"name": name, "action": "removed"}, f"{name}: removed", as_json)


@user.command(epilog="Example: talaria user passwd anna")
def passwd(name: Name, as_json: Json = False) -> None:
    """Give a user another password; their sessions end."""
    users = _users()
    users.check(name, there=True)
    users.change(name, password=_password())
    _record("password", name)
    _done({"name": name, "action": "password changed"}, f"{name}: password changed", as_json)


@user.command(epilog="Example: talaria user role anna --role admin")
def role(name: Name, role: RoleOption, as_json: Json = False) -> None:
    """Give a user another role; their sessions end."""
    from talaria.front.access import Role

    given = Role.of(role)
    _users().change(name, role=given)
    _record("role", name, role=given.label)
    _done({"name": name, "role": given.label, "action": "role changed"}, f"{name}: {given.label} now", as_json)


@token.command(epilog="Example: talaria token create --role operator --expires 90d --name night-script")
def create(
    role: RoleOption = "viewer",
    expires: Annotated[str, typer.Option(help="How long it is valid, as in 90d, 12h or 30m; or never.")] = "90d",
    name: Annotated[str, typer.Option(help="Its name in the audit trail and in `created_by` of runs.")] = "",
    as_json: Json = False,
) -> None:
    """Make a token, and print it: it can't be shown again."""
    from talaria.front.access import Role
    from talaria.front.tokens import seconds_of

    given, seconds = Role.of(role), seconds_of(expires)
    one, text = _tokens().create(given, seconds, name)
    _record("token created", one.name, role=given.label, token=one.id)
    if as_json:
        print_json({"id": one.id, "name": one.name, "role": role, "expires": _time(one.expires), "token": text})
    else:
        say(f"token {one.id} ({one.name}), {given.label}, valid until {_time(one.expires) or 'it is revoked'}:")
        print(text)


@token.command("list", epilog="Example: talaria token list")
def list_tokens(as_json: Json = False) -> None:
    """List tokens, without their secrets."""
    found: list[dict[str, Any]] = [
        {
            "id": one.id,
            "name": one.name,
            "role": one.role.label,
            "created": _time(one.created),
            "expires": _time(one.expires),
            "expired": one.expires is not None and one.expires <= datetime.now(UTC).timestamp(),
        }
        for one in _tokens().all()
    ]
    if as_json:
        print_json({"tokens": found})
    else:
        rows = [[one["id"], one["name"], one["role"], one["created"], _until(one)] for one in found]
        table("", ["id", "name", "role", "created", "expires"], rows)


@token.command(epilog="Example: talaria token revoke 3f9a1c20")
def revoke(which: Annotated[str, typer.Argument(help="Its id, or its name.")], as_json: Json = False) -> None:
    """Revoke a token, which is not valid from then on."""
    one = _tokens().revoke(which)
    _record("token revoked", one.name, token=one.id)
    _done({"id": one.id, "name": one.name, "action": "revoked"}, f"{one.id} ({one.name}): revoked", as_json)


def _users() -> Users:
    from talaria.front.users import Users
    from talaria.settings import load_settings

    load_settings()
    say_whose("users")
    return Users(Home.current())


def _tokens() -> Tokens:
    from talaria.front.tokens import Tokens
    from talaria.settings import load_settings

    load_settings()
    say_whose("tokens")
    return Tokens(Home.current())


def _password() -> str:
    """Return a password: asked for twice at a terminal, else the first line of stdin."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    from getpass import getpass

    one = getpass("Password: ")
    if getpass("Again: ") != one:
        raise ValueError("the two are not the same")
    return one


def _record(what: str, name: str, **details: Any) -> None:
    from transfer.audit import Event, record

    record(Event.USER_CHANGED, change=what, name=name, **details)


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _until(one: dict[str, Any]) -> str:
    return "expired" if one["expired"] else one["expires"] or "never"


def _done(document: dict[str, Any], line: str, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        print(line)
