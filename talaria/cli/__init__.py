"""The command line.

Modules here import what is heavy inside functions, and only where no API answers (`local`, `demo`): Prefect takes two
seconds, what reads settings and speaks HTTP half of one. Nothing else imports from here.
"""

from __future__ import annotations

from typing import Annotated

import typer

from talaria.cli import audit, jobs, notify, query, quick, retrieve, send, serve, source, target, user

quick.install()
app = typer.Typer(
    name="talaria",
    no_args_is_help=True,
    rich_markup_mode=None,  # Rich takes 0.2 s to print a help
    pretty_exceptions_enable=False,
    help="Delivers DICOM studies, and results made from them, to targets, and proves the delivery.",
    epilog="Exit codes: 0 done, 1 not everything was delivered or healthy, 2 wrong use or bad configuration, "
    "3 the server or the state directory can't be reached.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"talaria {version('talaria')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Read the options that stand before every command."""


app.add_typer(target.app, name="target")
app.add_typer(source.app, name="source")
app.add_typer(notify.app, name="notify")
app.add_typer(jobs.app, name="jobs")
app.add_typer(audit.app, name="audit")
app.add_typer(user.user, name="user")
app.add_typer(user.token, name="token")
send.add_to(app)
query.add_to(app)
retrieve.add_to(app)
serve.add_to(app)
