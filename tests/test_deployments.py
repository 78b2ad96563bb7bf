"""Files of `deployments/` are what Docker Compose, Kubernetes and systemd take, and hold what the product has."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from talaria.settings import Settings

FOLDER = Path(__file__).parents[1] / "deployments"
KUBERNETES = "1.31"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
MANIFESTS: list[dict[str, Any]] = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))


def test_compose_takes_its_file() -> None:
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    jsonschema.Draft7Validator(schema).validate(COMPOSE)
    for one in COMPOSE["services"].values():  # what a schema can't say
        assert set(one.get("depends_on", {})) <= set(COMPOSE["services"])
        assert set(one["networks"]) <= set(COMPOSE["networks"])
        mounted = [str(volume).partition(":")[0] for volume in one.get("volumes", [])]
        assert all(name in COMPOSE["volumes"] or name.startswith("${SOURCES") for name in mounted)


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
    (config,) = [one["data"] for one in MANIFESTS if one["kind"] == "ConfigMap"]
    compose = COMPOSE["services"]["server-a"]["environment"]
    assert config.items() <= compose.items()
    assert set(compose) - set(config) == {
        "PREFECT_API_DATABASE_CONNECTION_URL",
        "PREFECT_SERVER_API_AUTH_STRING",
        "PREFECT_SERVER_ENCRYPTION_KEY",
    }


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


def test_panels_of_the_dashboard_do_not_cover_each_other() -> None:
    fields = set[tuple[int, int]]()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        own = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not own & fields and at["x"] + at["w"] <= 24, panel["title"]
        fields |= own
