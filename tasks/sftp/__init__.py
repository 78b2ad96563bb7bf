"""SFTP targets: folders on servers; no shell is needed.

A file is written beside its final place under a temporary name that depends on the dispatch and the path alone, so that
another attempt finds it and continues it; when its length is right it is renamed and reported. The marker comes when
every file of its folder is there.
"""

from __future__ import annotations

import asyncio
import posixpath
from collections.abc import Awaitable
from contextlib import suppress

from blocks.sftp import Rename, SftpTarget
from protocols.net.hiding import quieted
from protocols.ssh.client import SshClient
from protocols.ssh.packets import FLAG_CREATE, FLAG_TRUNCATE, FLAG_WRITE, Code, Status
from protocols.ssh.sftp import Sftp
from protocols.ssh.shell import Shell
from tasks import ssh
from tasks.driver import Driver, Facts
from tasks.sftp.files import Sending
from tasks.sftp.remote import encoded, first, is_there, plain, together
from tasks.sftp.verify import verify
from transfer.errors import DispatchError, Misconfigured
from transfer.health import Health
from transfer.plan import Plan
from transfer.receipt import Level, PushReport, Receipt

LOOK_S = 0.2  # between two looks at whether to stop


def check(target: SftpTarget) -> Health:
    """Probe name, port, host key, login, the subsystem, writing and renaming in the folder, and the script."""
    health = Health()
    rest = ["trust", "authenticate", "sftp", "authorize", "rename", *(["hook"] if target.on_complete else [])]
    if ssh.probe_host(health, target):
        try:
            with SshClient(ssh.login(target)) as client:
                asyncio.run(_check(health, target, client))
        except DispatchError:
            with health.probe("authenticate"):
                raise
    health.skip(*(name for name in rest if name not in {probe.name for probe in health.probes}))
    return health


async def _check(health: Health, target: SftpTarget, client: SshClient) -> None:
    if not await asyncio.to_thread(ssh.probe_account, health, client):
        return
    started = client.start("sftp", subsystem=True)
    session, error = None, None
    try:
        session = await Sftp.begin(started)
    except DispatchError as exc:
        error = exc
    if not ssh.probe_login(health, error, started.facts):
        return
    with health.probe("sftp") as probe:
        if session is None:
            raise error or Misconfigured("the server has no SFTP")
        names = sorted(name.decode("ascii", "replace") for name in session.extensions)
        probe.detail = f"version 3; extensions: {', '.join(names) or 'none'}"
    if session is None:
        return
    try:
        await _check_folder(health, target, session)
    finally:
        await session.close()
    if target.on_complete:
        with health.probe("hook"):
            await asyncio.to_thread(_check_script, target, client)


async def _check_folder(health: Health, target: SftpTarget, session: Sftp) -> None:
    """Write, rename and remove a file in the folder or, if that doesn't exist, in the nearest one above it."""
    folder = target.folder
    above = [folder]
    while folder.strip("./"):
        folder = posixpath.dirname(folder.rstrip("/")) or ("/" if folder.startswith("/") else ".")
        above.append(folder)
    failed: Status | None = None
    renamed = ""
    with health.probe("authorize") as probe:
        for candidate in above:
            name = encoded(ssh.under(candidate, ssh.probe_name()))
            try:
                await session.close_file(await session.open(name, FLAG_WRITE | FLAG_CREATE | FLAG_TRUNCATE))
            except Status as exc:
                failed = failed or exc
                if exc.code != Code.NO_SUCH_FILE or await is_there(session, candidate):
                    raise plain(exc, candidate) from exc
                continue
            renamed = await _probe_rename(session, name)
            probe.detail = f"{candidate}: a file was written and removed"
            if candidate != target.folder:
                probe.detail += f"; {target.folder} will be made"
            break
        else:
            if failed is not None:
                raise plain(failed, target.folder) from failed
    if health.error is None:
        with health.probe("rename") as probe:
            probe.detail = renamed
            if not renamed and target.rename is Rename.AUTO:
                raise Misconfigured("the server can't rename files: set rename to never")


async def _probe_rename(session: Sftp, name: bytes) -> str:
    """Rename the probe file and remove it; return how it was renamed, "" if that failed."""
    found = ""
    for how, call in (("posix-rename@openssh.com", session.posix_rename), ("rename", session.rename)):
        if how == "rename" or how.encode() in session.extensions:
            with suppress(Status):
                await call(name, name + b"-")
                name, found = name + b"-", how
                break
    with suppress(Status):
        await session.remove(name)
    return found


def _check_script(target: SftpTarget, client: SshClient) -> None:
    with Shell(client) as shell:
        if shell.run(ssh.script_there(target))[0]:
            raise ssh.no_script(target)


def push(target: SftpTarget, plan: Plan, report: PushReport) -> Receipt:
    """Write every pending file, then the marker; report each file when it has its final name."""
    report.check()
    hide = ssh.hiding(target, plan)
    with quieted(hide, target.name), SshClient(ssh.login(target), hide, report.check) as client:
        return asyncio.run(_unless_cancelled(_push(Sending(target, plan, report, client)), report))


async def _push(sending: Sending) -> Receipt:
    sessions = [await Sftp.connect(sending.client)]
    try:
        await sending.files(sessions)
        session = await sending.live(sessions)
        verified = await verify(sending, session)
        await sending.mark(session)
    except BaseException:
        await asyncio.shield(together(one.close(by_force=True) for one in sessions))
        raise
    await together(one.close() for one in sessions)
    notes = tuple(map(sending.hide, sending.notes))
    return sending.report.receipt(sending.target.name, sending.plan, verified, notes)


async def _unless_cancelled(push: Awaitable[Receipt], report: PushReport) -> Receipt:
    """Run a push; stop it when the dispatch is cancelled."""

    async def ask() -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            report.check()

    main, asking = asyncio.ensure_future(push), asyncio.create_task(ask())
    await asyncio.wait((main, asking), return_when=asyncio.FIRST_COMPLETED)
    if asking.done() and not main.done():
        main.cancel()
    asking.cancel()
    results = await asyncio.gather(main, asking, return_exceptions=True)
    if isinstance(results[0], asyncio.CancelledError) and isinstance(results[1], BaseException):
        raise results[1]
    if isinstance(results[0], BaseException):
        raise first(results[0])
    return results[0]


driver = Driver(
    target=SftpTarget,
    check=check,
    push=push,
    hook=ssh.hook,
    facts=Facts(
        keeps_names=True,
        resumes=True,
        reconnects=True,
        verifies_by=(Level.ACCEPTED, Level.LISTED, Level.PROVEN),
    ),
)
