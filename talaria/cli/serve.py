"""`talaria up`, `status`, `recover`, `prune` and `demo`."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Any

import typer

from talaria.cli import remote
from talaria.cli.access import api
from talaria.cli.output import DONE, NO_SERVER, NOT_ALL, Json, checked, enabled, print_json, table
from talaria.console import say
from talaria.errors import Refused, ServerError, prefect_away
from transfer.home import Home

_AGE = re.compile(r"(\d+)([dhm])")
_SECONDS = {"d": 86_400, "h": 3_600, "m": 60}


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="Example: talaria up --port 4200 --workers 2")(up)
    app.command(epilog="Example: talaria status --json")(status)
    app.command(epilog="Example: talaria recover")(recover)
    app.command(epilog="Example: talaria prune --older-than 30d")(prune)
    app.command(epilog="Example: talaria demo")(demo)


def up(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on; default 4200.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=64, help="Worker processes; default 1.")] = None,
    tls_cert: Annotated[
        str | None, typer.Option(help="Certificate chain (PEM); read again when it has been renewed.")
    ] = None,
    tls_key: Annotated[str | None, typer.Option(help="Its private key (PEM, without a passphrase).")] = None,
    behind_proxy: Annotated[
        bool,
        typer.Option("--behind-proxy", help="A proxy with TLS stands in front; see docs/security.md."),
    ] = False,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let everybody on this machine in; loopback only.")
    ] = False,
) -> None:
    """Run the server with Prefect's UI, and workers, in the foreground; Ctrl-C drains and stops."""
    from talaria.settings import load_settings
    from talaria.up import up as serve

    settings = load_settings()
    given = {"tls_cert": tls_cert, "tls_key": tls_key, "behind_proxy": behind_proxy or None}
    settings = settings.model_copy(update={name: value for name, value in given.items() if value is not None})
    serve(
        settings,
        Home.current(),
        host or settings.host,
        port or settings.port,
        workers or settings.workers,
        auth=not no_auth,
    )


def status(as_json: Json = False) -> None:
    """Show what runs, what waits, and how the targets were when they were last checked."""
    document = _status()
    if not document["server"]["ok"]:
        named = os.environ.get("PREFECT_API_URL")
        document.setdefault("error", prefect_away(named) if named else "no server runs: `talaria up` starts it")
        say(f"talaria: {document['error']}")
    if as_json:
        print_json(document)
    else:
        server = document["server"]
        print(f"server: {'ok' if server['ok'] else 'not running'} {server['url'] or ''}".rstrip())
        for worker in document["workers"]:
            print(f"worker: {worker['name']} {worker['status'].lower()}, last seen {worker['last_seen']}")
        for name, count in document["queues"].items():
            print(f"queue {name}: {count} waiting")
        if server["ok"]:  # else nobody knows which targets there are
            if not document["workers"]:
                print("worker: none")
            rows = [[t["name"], t["type"], enabled(t), checked(t) or "never"] for t in document["targets"]]
            table("", ["target", "type", "enabled", "last check"], rows)
    raise typer.Exit(DONE if document["server"]["ok"] else NO_SERVER)


def _status() -> dict[str, Any]:
    """Return what `status` shows; starts nothing."""
    there = remote.found()
    if there is not None:
        try:
            with suppress(remote.NoApi), there:
                return there.call("status")
        except (ServerError, Refused) as exc:
            if isinstance(exc, Refused) and exc.code != NO_SERVER:
                raise
            away = {"server": {"ok": False, "url": there.shown}, "workers": [], "queues": {}, "targets": []}
            return away | {"error": str(exc)}
    from talaria.cli.local import status_of_server

    return status_of_server()


def recover(as_json: Json = False) -> None:
    """Take up what a crash left unfinished; `talaria up` does it by itself when it starts."""
    with api() as access:
        taken = access.call("recover_jobs")["recovered"]
    if as_json:
        print_json({"recovered": taken})
    else:
        print("\n".join(taken) or "nothing to take up")


def prune(
    older_than: Annotated[str, typer.Option(help="Age, as in 30d, 12h or 90m.", metavar="AGE")] = "30d",
    as_json: Json = False,
) -> None:
    """Forget old ledger rows, receipts and indexes of folders, and clear orphans of staging."""
    age = _AGE.fullmatch(older_than)
    if not age:
        raise ValueError(f"--older-than {older_than!r}: expected a number and d, h or m, as in 30d")
    done = _pruned(float(int(age[1]) * _SECONDS[age[2]]))
    if as_json:
        print_json(done)
    else:
        print(
            "{rows} ledger rows, {receipts} receipts, {staging} staging folders, {indexes} indexes removed".format(
                **done
            )
        )


def _pruned(age: float) -> dict[str, Any]:
    """Forget what is older than so many seconds, but nothing that runs need which have not ended."""
    from talaria.settings import load_settings

    shared = load_settings().keep_failed_days * _SECONDS["d"]
    home = Home.current()
    if remote.found() is None and not os.environ.get("PREFECT_API_URL"):
        from talaria.engine.leftovers import forget
        from talaria.engine.unended import unended

        runs = unended(home) if (home.root / "prefect").exists() else set()  # without it, there has never been a run
        if runs is not None:
            return asdict(forget(home, age, runs, age, shared))
    with api() as access:
        return access.call("prune", older_than_s=age)


def demo() -> None:
    """Send a study to an embedded PACS, an archive folder and a DICOMweb folder, and show the receipts."""
    from talaria.cli.demo import run

    raise typer.Exit(DONE if run() else NOT_ALL)
