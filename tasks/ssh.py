"""What rsync and SFTP do alike: log in, check the way to the host, run the target's script."""

from __future__ import annotations

import socket
import uuid
from pathlib import Path

from blocks.ssh import HostKeyPolicy, SshTarget
from protocols.net import hiding as hidden
from protocols.net.hiding import Hide, quieted
from protocols.ssh.client import Client, Facts, Login, greeting, quote
from protocols.ssh.keys import private_key
from protocols.ssh.shell import NoScript, run_script
from tasks.driver import HookResult, Ran
from tasks.probes import reach
from transfer.errors import Denied, DispatchError, Misconfigured
from transfer.health import Health
from transfer.home import Home
from transfer.layout import names, private_parts
from transfer.outcome import Kind, Outcome
from transfer.plan import Item, Plan
from transfer.receipt import PushReport

MARKER = ".complete"
REPLACED = Outcome(Kind.WARNING, "replaced another file of this name")


def login(target: SshTarget) -> Login:
    """Return how to log in to a target.

    Raises:
        Misconfigured: the private key can't be used.
    """
    key, certificate = b"", b""
    if text := target.private_key.get_secret_value().strip():
        key, certificate = private_key(text, target.passphrase.get_secret_value())
    return Login(
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


def hiding(target: SshTarget, plan: Plan) -> Hide:
    """Return what takes a patient's data, of which a layout may make names of folders, out of a text."""
    return hidden.hiding(parts=private_parts(plan, target.layout))


def under(folder: str, name: str) -> str:
    """Return a path below a folder on the server."""
    return f"{folder.rstrip('/')}/{name}"


def by_folder(target: SshTarget, plan: Plan) -> dict[str, list[Item]]:
    """Return the plan's items by the folder, below the target's, that the layout gives them."""
    folders: dict[str, list[Item]] = {}
    by_path = names(plan, target.layout)
    for item in plan.items:
        folders.setdefault(by_path[item.path], []).append(item)
    return folders


def hook(target: SshTarget, plan: Plan, report: PushReport, ran: Ran) -> HookResult:
    """Run `<folder>/<script> <destination folder> <target's name>` on the server, once per destination folder.

    Every folder gets its run even if one fails, and none another one once that was good; the result is the first that
    was not.

    Raises:
        Retryable: the link was lost before it ended.
        Misconfigured: the script is not there or not executable, or the account has no shell.
    """
    script = under(target.folder, target.hook_script)
    bad: int | None = 0
    said: list[str] = []
    hide = hiding(target, plan)
    with quieted(hide, target.name), Client(login(target), hide) as client:
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
    """Probe name and port; tell whether to go on."""

    def said(sock: socket.socket) -> str:
        line = greeting(sock, f"{target.host}:{target.port}", target.connect_timeout_s)
        if not line.startswith("SSH-"):
            raise Misconfigured(f"{target.host}:{target.port}: what answers is not SSH: {line[:80]!r}")
        return line

    sock = reach(health, target.host, target.port, target.connect_timeout_s, greeting=said)
    if sock is not None:
        sock.close()
    return sock is not None


def probe_login(health: Health, error: DispatchError | None, facts: Facts) -> bool:
    """Report how a login went, whose error (None if it went well) was kept; tell whether we are in."""
    got_in = bool(facts.method)
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
    """Return a shell script that fails if the target's own script can't be run."""
    script = quote(under(target.folder, target.hook_script))
    return f"[ -f {script} ] && [ -x {script} ]"


def no_script(target: SshTarget) -> NoScript:
    """The error for that."""
    return NoScript(f"{under(target.folder, target.hook_script)}: not there, or not executable for this user")
