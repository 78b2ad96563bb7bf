"""What `deployments/` starts, as a container engine, Kubernetes or systemd would: commands, environments, folders."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[1] / "deployments"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
MANIFESTS: list[dict[str, Any]] = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
# What people put into `.env` and into the secret, by the names that the files' heads give them.
GIVEN = {
    "POSTGRES_PASSWORD": "lab",
    "API_AUTH": "talaria:lab",
    "ENCRYPTION_KEY": "bGFiLWxhYi1sYWItbGFiLWxhYi1sYWItbGFiLWxhYi0=",
    "ADMIN_PASSWORD": "a long password",
    "SOURCES": "/share/incoming",
    "ARCHIVE": "/share/archive",
    "NAME": "talaria.example",
}
SECRETS = {
    "api-auth": "talaria:lab",
    "encryption-key": GIVEN["ENCRYPTION_KEY"],
    "admin-password": GIVEN["ADMIN_PASSWORD"],
    "prefect-database": "postgresql+asyncpg://talaria:lab@postgres/prefect",
    "ledger": "postgresql://talaria:lab@postgres/talaria",
}


@dataclass(frozen=True)
class Started:
    """One process that is started.

    Attributes:
        env: its whole environment, but for what every system has.
        before: what runs to its end before it, in the same state directory.
        volumes: where folders of its own are mounted, which outlive it.
        shared: where folders are mounted that others have as well.
        files: secrets that are mounted, by path.
    """

    name: str
    command: list[str]
    env: dict[str, str]
    before: tuple[Started, ...] = ()
    volumes: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)


def image() -> Started:
    """The image alone."""
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    (words,) = re.findall(r"^ENV (.+)$", text, re.MULTILINE)
    (command,) = re.findall(r"^CMD (.+)$", text, re.MULTILINE)
    env = dict(one.split("=", 1) for one in shlex.split(words))
    del env["PATH"]
    return Started("image", json.loads(command), env)


# ---- Compose


def composed() -> dict[str, Started]:
    """The services of compose.yaml, by name."""
    return {name: _service(name) for name in COMPOSE["services"]}


def _service(name: str) -> Started:
    one = COMPOSE["services"][name]
    ours = one["image"] == "talaria"
    env = {key: interpolated(str(value)) for key, value in one.get("environment", {}).items()}
    volumes = [interpolated(str(volume)).split(":") for volume in one.get("volumes", [])]
    before = [
        _service(other)
        for other, how in one.get("depends_on", {}).items()
        if how["condition"] == "service_completed_successfully"
    ]
    return Started(
        name,
        [interpolated(part) for part in one.get("command", [])],
        {**(image().env if ours else {}), **env},
        tuple(before),
        tuple(volume[1] for volume in volumes if not volume[0].startswith("/")),
        tuple(volume[1] for volume in volumes if volume[0].startswith("/")),
    )


def interpolated(text: str) -> str:
    """Return a text as Compose has it after interpolation: `${NAME:?}`, `${NAME:-default}`, and `$$` for a dollar."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name, default = match[1], match[2]
        if name not in GIVEN and not (default or "").startswith(":-"):
            raise AssertionError(f"${name} is not among what is given")
        return GIVEN.get(name) or str(default)[2:]

    return re.sub(r"\$\$|\$\{([A-Z_]+)(:[?-][^}]*)?\}", value, text)


# ---- Kubernetes


def pods() -> dict[str, Started]:
    """What runs in the first pod of each workload, by the workload's name."""
    return {one["metadata"]["name"]: _pod(one) for one in MANIFESTS if "template" in one.get("spec", {})}


def of_kind(kind: str) -> Iterator[dict[str, Any]]:
    return (one for one in MANIFESTS if one["kind"] == kind)


def _pod(workload: Mapping[str, Any]) -> Started:
    name, pod = workload["metadata"]["name"], workload["spec"]["template"]["spec"]
    claimed = {one["metadata"]["name"] for one in workload["spec"].get("volumeClaimTemplates", [])}
    before = [_container(f"{name}-0", one, pod, claimed) for one in pod.get("initContainers", [])]
    (main,) = pod["containers"]
    return _container(f"{name}-0", main, pod, claimed, tuple(before))


def _container(
    name: str, one: Mapping[str, Any], pod: Mapping[str, Any], claimed: set[str], before: tuple[Started, ...] = ()
) -> Started:
    env = {**(image().env if one["image"] == "talaria" else {}), **_links(pod)}
    for source in one.get("envFrom", []):
        (config,) = [m for m in of_kind("ConfigMap") if m["metadata"]["name"] == source["configMapRef"]["name"]]
        env |= config["data"]
    for variable in one.get("env", []):
        env[variable["name"]] = variable["value"] if "value" in variable else _from(variable["valueFrom"], name)
    kinds = {volume["name"]: volume for volume in pod.get("volumes", [])}
    mounts = {mount["name"]: mount["mountPath"] for mount in one.get("volumeMounts", [])}
    files = {
        f"{path}/{item['path']}": SECRETS[item["key"]]
        for volume, path in mounts.items()
        for item in kinds.get(volume, {}).get("secret", {}).get("items", [])
    }
    shared = [path for volume, path in mounts.items() if "persistentVolumeClaim" in kinds.get(volume, {})]
    own = [path for volume, path in mounts.items() if volume in claimed]
    return Started(name, one.get("command", []), env, before, tuple(own), tuple(shared), files)


def _from(source: Mapping[str, Any], name: str) -> str:
    if "secretKeyRef" in source:
        return SECRETS[source["secretKeyRef"]["key"]]
    assert source == {"fieldRef": {"fieldPath": "metadata.name"}}
    return name


def _links(pod: Mapping[str, Any]) -> dict[str, str]:
    """What Kubernetes adds for each service of the namespace, unless the pod refuses it, and always for its own."""
    services = [
        (one["metadata"]["name"], one["spec"]["ports"][0]["port"])
        for one in of_kind("Service")
        if one["spec"].get("clusterIP") != "None"
    ]
    if not pod.get("enableServiceLinks", True):
        services = []
    env = dict[str, str]()
    for number, (service, port) in enumerate([("kubernetes", 443), *services]):
        name, host = service.upper().replace("-", "_"), f"10.96.0.{number + 1}"
        env |= {
            f"{name}_SERVICE_HOST": host,
            f"{name}_SERVICE_PORT": str(port),
            f"{name}_PORT": f"tcp://{host}:{port}",
            f"{name}_PORT_{port}_TCP": f"tcp://{host}:{port}",
            f"{name}_PORT_{port}_TCP_PROTO": "tcp",
            f"{name}_PORT_{port}_TCP_PORT": str(port),
            f"{name}_PORT_{port}_TCP_ADDR": host,
        }
    return env


def below(folder: Path, one: Started, share: Path | None = None) -> Started:
    """Return the process with its volumes and files below a folder, and what it shares below `share`; makes them."""
    moves = {path: f"{share or folder}{path}" for path in one.shared}
    moves |= {path: f"{folder}{path}" for path in (*one.volumes, *(str(Path(name).parent) for name in one.files))}

    def moved(text: str) -> str:
        for path, there in moves.items():
            text = re.sub(rf"(?<![\w/.-]){re.escape(path)}(?![\w.-])", there, text)
        return text

    for there in moves.values():
        Path(there).mkdir(parents=True, exist_ok=True)
    for path, text in one.files.items():
        Path(moved(str(Path(path).parent)), Path(path).name).write_text(text)
    return replace(
        one,
        command=[moved(part) for part in one.command],
        env={name: moved(value) for name, value in one.env.items()},
        before=tuple(below(folder, other, share) for other in one.before),
        volumes=tuple(map(moved, one.volumes)),
        shared=tuple(map(moved, one.shared)),
    )


# ---- systemd


def unit(*files: str, given: Mapping[str, str]) -> Started:
    """What a unit and its drop-ins start.

    Args:
        given: what its files of the environment hold.
    """
    env, command = dict[str, str](), list[str]()
    for line in "\n".join((FOLDER / name).read_text() for name in files).splitlines():
        key, _, value = line.partition("=")
        if key == "Environment":
            env |= dict(one.split("=", 1) for one in shlex.split(value))
        elif key == "EnvironmentFile":
            env |= given
        elif key == "ExecStart":
            command = shlex.split(value)
    return Started(files[0], [Path(command[0]).name, *command[1:]], env)
