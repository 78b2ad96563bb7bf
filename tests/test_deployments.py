"""Files of `deployments/` are what Docker Compose, Kubernetes and systemd take, and what they start is let start.

`tests/engine/test_deployed.py` starts all of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import jsonschema
import kubernetes_validate
import pytest
import yaml
from prefect_redis.client import RedisMessagingSettings, get_async_redis_client
from prefect_redis.messaging import RedisMessagingConsumerSettings

from talaria.__main__ import main
from talaria.engine.registry import description_of, queue_of
from talaria.engine.table import FLOWS
from talaria.entrance import entrance
from talaria.listener import is_loopback
from talaria.settings import POOL, Settings
from tests.deployed import COMPOSE, FOLDER, MANIFESTS, Started, below, composed, image, of_kind, pods, unit
from transfer.home import Home

KUBERNETES = "1.31"
ROOT = FOLDER.parent
PREFECTS = 45  # connections that a Prefect server takes at most: pools of 15 for its API and its services
HOST_ENV = {"PREFECT_API_AUTH_STRING": "talaria:lab", "TALARIA_LEDGER": "postgresql://talaria:lab@database/talaria"}
UNITS = {
    "talaria.service": unit("talaria.service", given={}),
    "talaria-host.conf": unit("talaria.service", "talaria-host.conf", given=HOST_ENV),
}
HOSTS = {
    name: one
    for name, one in [
        *((f"compose {name}", one) for name, one in composed().items()),
        *((f"kubernetes {name}", one) for name, one in pods().items()),
        ("image", image()),
        *UNITS.items(),
    ]
    if one.command[:2] == ["talaria", "up"]
}


def test_compose_takes_its_file() -> None:
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    jsonschema.Draft7Validator(schema).validate(COMPOSE)
    for one in COMPOSE["services"].values():  # what a schema can't say
        assert set(one.get("depends_on", {})) <= set(COMPOSE["services"])
        assert set(one.get("networks", ())) <= set(COMPOSE["networks"]) and ("networks" in one) != (
            "network_mode" in one
        )
        mounted = [str(volume).partition(":")[0] for volume in one.get("volumes", [])]
        assert all(name in COMPOSE["volumes"] or name in ("${SOURCES", "${ARCHIVE") for name in mounted)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_kubernetes_takes_its_manifests(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    spec = manifest.get("spec", {})
    if "selector" in spec and manifest["kind"] != "Service":
        assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    if manifest["kind"] == "Service":
        apps = [
            one["spec"]["template"].get("metadata", {}).get("labels")
            for one in MANIFESTS
            if "template" in one.get("spec", {})
        ]
        assert spec["selector"] in apps


def test_a_wrong_manifest_is_refused() -> None:
    wrong = json.loads(json.dumps(MANIFESTS[-1]))
    wrong["spec"]["template"]["spec"]["containers"][0]["comand"] = ["talaria"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_every_setting_that_they_name_is_one() -> None:
    known = {f"TALARIA_{name.upper()}" for name in Settings.model_fields}
    for path in [one for one in FOLDER.rglob("*") if one.is_file()]:
        assert set(re.findall(r"\bTALARIA_[A-Z_]+", path.read_text())) <= known, path.name


def test_both_say_the_same_of_prefect_s_servers() -> None:
    (config,) = [one["data"] for one in of_kind("ConfigMap") if one["metadata"]["name"] == "prefect-server"]
    compose = COMPOSE["services"]["server-a"]["environment"]
    assert config.items() <= compose.items()
    assert set(compose) - set(config) == {
        "PREFECT_API_DATABASE_CONNECTION_URL",
        "PREFECT_SERVER_API_AUTH_STRING",
        "PREFECT_SERVER_ENCRYPTION_KEY",
    }


def test_the_unit_of_a_server_has_what_the_others_have() -> None:
    text = (FOLDER / "talaria-prefect-server.service").read_text()
    ours = unit("talaria-prefect-server.service", given={}).env
    compose = composed()["server-a"].env
    own = {"PREFECT_HOME", "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"}  # of one server
    assert {name: value for name, value in ours.items() if name not in own}.items() <= compose.items()
    named = set(re.findall(r"PREFECT_\w+", text)) | {
        name for name in compose if "redis" in name.lower() + compose[name]
    }
    assert named >= {name for name in compose if name.startswith("PREFECT_")}


def test_a_server_leaves_a_redis_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen: it waited for ever on a connection that had broken without a word, and its workers heard of nothing.

    Seen, too: given ten seconds, it held who had asked for a run for six minutes. With host and port, and no URL,
    `redis` tries each command eleven times; to tell an event, Prefect gives three.
    """
    for name, value in composed()["server-a"].env.items():
        if name.startswith("PREFECT_REDIS_MESSAGING_"):
            monkeypatch.setenv(name, value)
    settings, reads = RedisMessagingSettings(), RedisMessagingConsumerSettings()
    assert settings.socket_timeout and settings.socket_timeout > reads.block.total_seconds()
    assert settings.socket_connect_timeout == settings.socket_timeout
    connection = get_async_redis_client().connection_pool.make_connection()
    assert connection.socket_timeout == settings.socket_timeout
    assert connection.retry.get_retries() == 1  # one that broke while it was idle is no error
    assert 3 * 2 * settings.socket_timeout == 18  # as docs/scaling.md says


def test_leases_of_slots_outlive_whoever_keeps_them() -> None:
    """Seen: a server that began anew counted what had been held for ever; by default they are in its memory."""
    storage, here = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE", "prefect.server.concurrency.lease_storage.filesystem"
    ours = unit("talaria-prefect-server.service", given={})
    assert ours.env[storage] == here and ours.env["PREFECT_HOME"] == "/var/lib/talaria-prefect"
    assert "\nStateDirectory=talaria-prefect\n" in (FOLDER / "talaria-prefect-server.service").read_text()
    text = (ROOT / "docs" / "operations.md").read_text()
    (started,) = [one for one in text.split("\n\n") if "prefect server start" in one]
    assert f"export {storage}={here}\n" in started
    kept = COMPOSE["services"]["redis"]
    assert kept["command"][1:] == ["--appendonly", "yes"] and kept["volumes"] == ["messages:/data"]
    (pod,) = [one["spec"] for one in of_kind("StatefulSet") if one["metadata"]["name"] == "redis"]
    (redis,), (claim,) = pod["template"]["spec"]["containers"], pod["volumeClaimTemplates"]
    assert redis["args"] == kept["command"]
    assert redis["volumeMounts"] == [{"name": claim["metadata"]["name"], "mountPath": "/data"}]


def test_prefect_deploy_makes_the_deployments_that_up_makes() -> None:
    document = yaml.safe_load((FOLDER / "prefect.yaml").read_text())
    made = {one["entrypoint"]: one for one in document["deployments"]}
    for name, (flow, entrypoint) in FLOWS.items():
        assert made.pop(entrypoint) == {
            "name": "talaria",
            "entrypoint": entrypoint,
            "description": description_of(flow),
            "tags": ["talaria"],
            "enforce_parameter_schema": True,
            "work_pool": {"name": POOL, "work_queue_name": queue_of(name)},
        }
    assert not made


@pytest.mark.usefixtures("quick_passwords")
@pytest.mark.parametrize("name", HOSTS)
def test_what_runs_talaria_is_let_start(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its whole environment, up to where the server would be started; no other host lets anybody in."""
    one = below(tmp_path, HOSTS[name])
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for before in one.before:
        if before.command[0] != "prefect":
            said(before)
    with mock.patch.dict(os.environ, one.env), mock.patch("talaria.up.up") as up:
        assert commanded(one.command) == 0
        (settings, home, host, port, workers), auth = up.call_args.args, up.call_args.kwargs["auth"]
        way = entrance(settings, home, host, port, auth=auth, upstream=one.env.get("PREFECT_API_URL", ""))
    assert workers == (1 if name in ("image", "talaria.service") else 2) and way.auth
    front = name in ("compose host-a", "kubernetes talaria")
    assert front != is_loopback(host) and front == bool(way.peers) == bool(way.hosts)
    if one.shared:
        folders = {part for key in ("TALARIA_SOURCES", "TALARIA_PLACES") for part in one.env[key].split(":")}
        assert folders == set(one.shared)


def commanded(command: list[str]) -> int:
    """Run a command of ours in this process, with its environment; return its exit code."""
    with mock.patch.object(sys, "argv", command):
        try:
            main()
        except SystemExit as exc:
            return int(exc.code or 0)
    return 0


def said(one: Started) -> None:
    """Run a shell's line, which puts a password into a command of ours."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(one.command, env={**os.environ, "PATH": path, **one.env}, check=True, capture_output=True)


def test_the_state_directory_can_be_made_in_a_volume_whose_root_is_somebody_else_s(
    open_folder: Path, as_nobody: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {name: one for name, one in HOSTS.items() if one.volumes}
    assert len(kept) == 4
    for name, one in kept.items():
        (path,) = one.volumes
        volume = open_folder / name
        volume.mkdir()
        volume.chmod(0o2777)  # as Kubernetes leaves it: root's, and the pod's group may write
        monkeypatch.setenv("TALARIA_HOME", str(volume / Path(one.env["TALARIA_HOME"]).relative_to(path)))
        with as_nobody():
            assert Home.current().root.stat().st_uid == os.geteuid()


def test_an_image_takes_what_a_clone_has_and_nothing_that_was_made() -> None:
    ignored = {one.strip("/").removeprefix("**/") for one in (ROOT / ".dockerignore").read_text().split("\n")}
    made = {one.strip("/") for one in (ROOT / ".gitignore").read_text().split()}
    assert ignored >= made | {".git"}
    assert not ignored & {path.name for path in (ROOT / "talaria").iterdir() if path.name != "__pycache__"}


def test_the_image_has_the_prefect_redis_that_is_tested() -> None:
    (version,) = re.findall(r"prefect-redis==([\d.]+)", (FOLDER / "Dockerfile").read_text())
    assert f'name = "prefect-redis"\nversion = "{version}"\n' in (ROOT / "uv.lock").read_text()


def test_postgresql_has_connections_for_all() -> None:
    """As docs/scaling.md reckons, for floods to two targets."""
    command = COMPOSE["services"]["postgres"]["command"]
    (most,) = [int(one.removeprefix("max_connections=")) for one in command if one.startswith("max_connections=")]
    hosts, workers, limit = 2, 2, Settings.model_fields["limit"].default
    assert most >= hosts * workers * ((1 + 4 * 2) * limit + 2) + 2 * PREFECTS


def test_systemd_takes_the_unit_of_a_server(tmp_path: Path) -> None:
    unit = (FOLDER / "talaria-prefect-server.service").read_text()
    path = tmp_path / "talaria-prefect-server.service"
    path.write_text(unit.replace("/opt/talaria/.venv/bin/prefect", "/bin/true").replace("User=talaria", "User=root"))
    if not shutil.which("systemd-analyze"):  # a container has none
        assert "ExecStart=/opt/talaria/.venv/bin/prefect server start" in unit
        return
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"SYSTEMD_LOG_LEVEL": "warning"},
    )
    assert path.name not in ran.stderr, ran.stderr


# ---- monitoring


MONITORING = FOLDER / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
VARIABLES = {"$target": ".*", "$__rate_interval": "5m"}  # of the dashboard, and what Grafana may put for them


def promtool(*arguments: str, given: str = "") -> str:
    """Run Prometheus' own tool, of Debian's package; what it says is returned where it is content."""
    ran = subprocess.run(
        ["promtool", *arguments], cwd=MONITORING, input=given, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_prometheus_takes_the_alert_rules_and_they_do_what_their_tests_say() -> None:
    promtool("check", "rules", "--lint-fatal", "talaria.rules.yml")
    promtool("test", "rules", "talaria.tests.yml")
    promtool("check", "config", "--syntax-only", "prometheus.yml")


def test_each_alert_is_tested_or_a_plain_comparison() -> None:
    rules = yaml.safe_load((MONITORING / "talaria.rules.yml").read_text())["groups"][0]["rules"]
    tests = yaml.safe_load((MONITORING / "talaria.tests.yml").read_text())["tests"]
    tested = {one["alertname"] for test in tests for one in test["alert_rule_test"]}
    assert {one["alert"] for one in rules} - tested == {"TalariaDown"}


def test_prometheus_takes_every_query_of_the_dashboard() -> None:
    queries = [one["expr"] for panel in DASHBOARD["panels"] for one in panel["targets"]]
    for name, value in VARIABLES.items():
        queries = [one.replace(name, value) for one in queries]
    assert len(queries) > 20 and not any("$" in one for one in queries)
    rules = [{"record": f"query:{number}", "expr": one} for number, one in enumerate(queries)]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "queries.yml"
        path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
        promtool("check", "rules", str(path))


def test_what_is_the_same_at_all_hosts_is_not_summed() -> None:
    """Each host of a Prefect server counts all that is there: a sum counts it as many times as there are hosts."""
    same = ("talaria_queue_runs", "talaria_runs_running", "talaria_workers_online", "talaria_breaker_open",
            "talaria_messages")  # fmt: skip
    queries = [one["expr"] for panel in DASHBOARD["panels"] for one in panel["targets"]]
    shared = [query for query in queries if any(name in query for name in same)]
    assert len(shared) >= len(same) and all(re.search(r"max( by \([a-z, ]+\))? ?\(talaria_", one) for one in shared)


def test_panels_of_the_dashboard_do_not_cover_each_other() -> None:
    fields = set[tuple[int, int]]()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        own = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not own & fields and at["x"] + at["w"] <= 24, panel["title"]
        fields |= own
