"""What rsync and SFTP do alike: log in, check the way to the host, run the target's script."""

from __future__ import annotations

import re
import socket
import uuid
from dataclasses import replace
from pathlib import Path
from shlex import quote

from pydantic import SecretStr

from blocks.ssh import HostKeyPolicy, SshTarget
from protocols.net import hiding as hidden
from protocols.net.connection import place
from protocols.net.hiding import Hide, quieted
from protocols.ssh.account import Account, suits
from protocols.ssh.client import WAY_S, SshClient, greeting
from protocols.ssh.handshake import NothingInCommon
from protocols.ssh.keys import private_key
from protocols.ssh.login import Login, LoginFacts
from protocols.ssh.shell import NoScript, run_script
from tasks.driver import HookResult, Ran
from tasks.probes import reach
from transfer.errors import Busy, Denied, DispatchError, Misconfigured
from transfer.health import Health
from transfer.home import Home
from transfer.layout import names, private_parts
from transfer.outcome import Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import PushReport

MARKER = ".complete"
REPLACED = Outcome(Kind.WARNING, "replaced another file of this name")


def login(target: SshTarget) -> Login:
    """Return how to log in to a target, through its jump host if it has one.

    Raises:
        Misconfigured: a private key can't be used.
    """
    key, certificate = _key(target.private_key, target.passphrase)
    own = Login(
        host=target.host,
        port=target.port,
        user=target.user,
        key=key,
        certificate=certificate,
        password=target.password.get_secret_value(),
        pins=target.pins,
        accept_new=target.host_key_policy is HostKeyPolicy.ACCEPT_NEW,
        known_hosts=(Home.current().root / "known_hosts", Path("~/.ssh/known_hosts").expanduser()),
        connect_timeout_s=target.connect_timeout_s,
        idle_timeout_s=target.idle_timeout_s,
    )
    if not target.jump_host:
        return own
    user, host, port = target.jump
    if target.jump_private_key.get_secret_value().strip():
        key, certificate = _key(target.jump_private_key, target.jump_passphrase, "jump_")
    # Its password is the server's alone.
    jump = replace(
        own,
        host=host,
        port=port,
        user=user,
        key=key,
        certificate=certificate,
        password="",
        pins=target.jump_pins,
        prefix="jump_",
    )
    return replace(own, jump=jump)


def _key(key: SecretStr, passphrase: SecretStr, prefix: str = "") -> tuple[bytes, bytes]:
    """Return a private key and its certificate, empty if there is none; errors name the field."""
    text = key.get_secret_value().strip()
    if not text:
        return b"", b""
    try:
        return private_key(text, passphrase.get_secret_value())
    except Misconfigured as exc:
        raise Misconfigured(re.sub(r"\b(private_key|passphrase)\b", rf"{prefix}\1", exc.message)) from exc


def hiding(target: SshTarget, plan: Plan) -> Hide:
    """Return a function that hides, in a text, a patient's data that a layout makes names of folders from."""
    return hidden.hiding(parts=private_parts(plan, target.layout))


def under(folder: str, name: str) -> str:
    """Return a path below a folder on the server."""
    return f"{folder.rstrip('/')}/{name}"


def by_folder(target: SshTarget, plan: Plan) -> dict[str, list[Item]]:
    """Return the plan's items by folder, as the layout names it below the target's."""
    folders: dict[str, list[Item]] = {}
    by_path = names(plan, target.layout)
    for item in plan.items:
        folders.setdefault(by_path[item.path], []).append(item)
    return folders


def hook(target: SshTarget, plan: Plan, report: PushReport, ran: Ran) -> HookResult:
    """Run `<folder>/<script> <destination folder> <target's name>` on the server, once per destination folder.

    Every folder gets its run even if one fails, and none a second one after success; return the first result that is
    not a success, if there is one.

    Raises:
        Retryable: the link was lost before it ended.
        Misconfigured: the script is not there or not executable, or the account has no shell.
    """
    script = under(target.folder, target.hook_script)
    bad: int | None = 0
    said: list[str] = []
    hide = hiding(target, plan)
    with quieted(hide, target.name), SshClient(login(target), hide, report.check) as client:
        folders = sorted(folder for folder in by_folder(target, plan) if folder not in ran)
        for name in folders:
            report.check()
            code, output = run_script(
                client,
                script,
                (under(target.folder, name), target.name),
                timeout_s=target.hook_timeout_s,
                check=report.check,
            )
            said.append(f"{hide('/' + name)[1:]}: {output}" if len(folders) > 1 else output)
            bad = bad if bad != 0 else code
            if code == 0:
                ran.add(name)
    return HookResult(bad, "\n".join(said))


def probe_host(health: Health, target: SshTarget) -> bool:
    """Probe name and port (the jump host's, if there is one, and the way on from there); return True if all is well."""
    _, host, port = target.jump if target.jump_host else ("", target.host, target.port)

    def said(sock: socket.socket) -> str:
        return _greeted(sock, place(host, port), target.connect_timeout_s)

    sock = reach(health, host, port, target.connect_timeout_s, greeting=said)
    if sock is not None:
        sock.close()
    if sock is not None and target.jump_host:
        with health.probe("jump_host") as probe:
            probe.detail = _greeted_behind(target)
    return health.error is None


def _greeted(sock: socket.socket, where: str, timeout_s: float) -> str:
    line = greeting(sock, where, timeout_s)
    if not line:
        raise Busy(f"{where}: the host closed the connection before its first line: too many clients?")
    if not line.startswith("SSH-"):
        raise Misconfigured(f"{where}: what answers is not SSH: {line[:80]!r}")
    return line


def _greeted_behind(target: SshTarget) -> str:
    """Return the greeting of the host behind the jump host."""
    way_there = login(target).jump
    assert way_there is not None  # noqa: S101 - for the type checker
    with SshClient(way_there) as jump:
        sock, way = jump.through(target.host, target.port)
        with sock:
            try:
                # The jump host has to let us in first.
                wait_s = 2 * target.connect_timeout_s + target.idle_timeout_s
                return _greeted(sock, place(target.host, target.port), wait_s)
            except DispatchError as exc:
                if way.exit_code(WAY_S) is not None and way.words:
                    raise way.said.failure_of_way(way.process.returncode) from exc
                raise


def probe_account(health: Health, client: SshClient) -> bool:
    """Probe host key and login; return whether to go on. What paramiko can't do, the later probes with ssh(1) show."""
    if not suits(client):
        return True
    account = Account(client)
    error: DispatchError | None = None
    try:
        account.begin()
    except NothingInCommon:
        return True
    except DispatchError as exc:
        error = exc
    account.close()
    return probe_login(health, error, account.facts)


def probe_login(health: Health, error: DispatchError | None, facts: LoginFacts) -> bool:
    """Report the result of a login from its error, None if it went well; return whether we are in."""
    got_in = bool(facts.method)
    if got_in and any(probe.name == "authenticate" for probe in health.probes):
        return True  # paramiko was let in before, and has reported it
    with health.probe("trust") as probe:
        if error is not None and not got_in and not isinstance(error, Denied):
            raise error
        probe.detail = f"{facts.key_type} {facts.fingerprint}"
    if health.error is None:
        with health.probe("authenticate") as probe:
            if error is not None and not got_in:
                raise error
            probe.detail = f"by {facts.method}; cipher {facts.cipher}"
    return health.error is None


def probe_name() -> str:
    """Return a name for a file that a check writes and removes."""
    return f".talaria-probe-{uuid.uuid4().hex[:12]}"


def script_there(target: SshTarget) -> str:
    """Return a shell command that fails if the target's own script can't be run."""
    script = quote(under(target.folder, target.hook_script))
    return f"[ -f {script} ] && [ -x {script} ]"


def no_script(target: SshTarget) -> NoScript:
    """Return the error for a script that can't be run."""
    return NoScript(f"{under(target.folder, target.hook_script)}: not there, or not executable for this user")
