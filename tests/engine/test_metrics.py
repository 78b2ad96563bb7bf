"""`/metrics` as Prometheus scrapes it: from a running `talaria up`, with a viewer's token."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as parsed

from talaria.metrics.families import MOST_TARGETS, OTHERS, exposed
from talaria.metrics.gather import Figures, Gatherer
from talaria.testing import studies
from tasks.dispatch.ends import UNKNOWN
from tests.engine.material import folder, totals
from tests.servers.certificates import Authority
from tests.servers.up import Talaria
from transfer import listening
from transfer.happenings import DISPATCHES, Total
from transfer.home import Home
from transfer.listening import ListenerStatus

MONITORING = Path(__file__).parents[2] / "deployments/monitoring"


@pytest.fixture(scope="module")
def token(up: Talaria) -> str:
    return str(up.told("token", "create", "--role", "viewer", "--name", f"prometheus-{time.time_ns()}")["token"])


def scraped(up: Talaria, token: str, accept: str = "text/plain;version=0.0.4") -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}", "Accept": accept}
    return httpx.get(f"http://127.0.0.1:{up.port}/metrics", headers=headers, timeout=300, trust_env=False)


def values(text: str) -> dict[tuple[str, ...], float]:
    """Samples by name and the values of their labels, sorted by the labels' names."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in parsed(text)
        for sample in family.samples
    }


def test_a_scraper_with_a_token_gets_figures_that_prometheus_takes(up: Talaria, token: str, tmp_path: Path) -> None:
    source = tmp_path / studies.PATIENT_NAME.replace("^", "_")
    studies.ct(source, 3)
    authority = Authority(tmp_path / "ca")
    listening.write(Home(up.home), ListenerStatus(11112, 2, 7, 1, 40, 4000, time.time(), 3))
    leaf = authority.leaf("talaria")
    secured = {"tls_cert": str(leaf.cert), "tls_key": str(leaf.key), "ca_cert": str(authority.ca)}
    up.apply(
        measured=folder(tmp_path / "measured"),
        unmeasured=folder(tmp_path / "lost", max_attempts=1, retry_delay_s=0),
        secured={"type": "dicom-tls", "host": "127.0.0.1", "port": 1, "aet_target": "PACS", **secured},
    )
    (tmp_path / "lost").rmdir()
    sent = up.told("send", str(source), "--to", "measured,unmeasured", code=1)

    assert httpx.get(f"http://127.0.0.1:{up.port}/metrics", trust_env=False).status_code == 401
    assert scraped(up, "tal_00000000_" + "x" * 43).status_code == 401
    found: dict[tuple[str, ...], float] = {}

    def fresh() -> bool:  # what was gathered before is answered for a few seconds
        nonlocal found
        answer = scraped(up, token)
        assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
        found = values(answer.text)
        return ("talaria_dispatch_seconds_count", "delivered", "measured") in found

    up.until(fresh)
    text = scraped(up, token).text
    assert found["talaria_prefect_up",] == found["talaria_ledger_up",] == 1
    assert found["talaria_dispatches_total", "delivered", "measured"] == 1
    assert found["talaria_dispatches_total", "failed", "measured"] == 0  # so that a first failure is an increase
    assert found["talaria_dispatches_total", "failed", "unmeasured"] == 1
    unknown = totals(up, UNKNOWN).get((DISPATCHES, "failed"), 0)  # other tests may have asked for one
    assert found["talaria_dispatches_total", "failed", UNKNOWN] == unknown
    assert found["talaria_items_total", "delivered", "measured"] == 3
    assert found["talaria_bytes_total", "delivered", "measured"] == sent["targets"]["measured"]["bytes"]
    seconds = sent["targets"]["measured"]["seconds"]
    assert found["talaria_dispatch_seconds_sum", "delivered", "measured"] == pytest.approx(seconds, abs=0.01)
    assert found["talaria_dispatch_seconds_bucket", "+Inf", "delivered", "measured"] == 1
    assert found["talaria_queue_runs", "normal"] >= 0 and found["talaria_queue_oldest_seconds", "normal"] >= 0
    assert found["talaria_workers_online",] >= 1
    assert found["talaria_breaker_open", "measured"] == 0 and found["talaria_target_enabled", "measured"] == 1
    assert found["talaria_ledger_bytes",] > 0 and found["talaria_prefect_bytes",] > 0
    assert found["talaria_disk_size_bytes", "state directory"] >= found["talaria_disk_free_bytes", "measured"] > 0
    assert found["talaria_certificate_expires_seconds", "secured", "own"] > 0
    assert found["talaria_listener_associations", "11112"] == 2
    assert found["talaria_listener_requests_total", "refused", "11112"] == 1
    assert found["talaria_listener_requests_total", "tls_failed", "11112"] == 3
    assert source.name not in text and str(tmp_path) not in text and sent["dispatch_id"] not in text
    assert not any(private in text for private in studies.PHI)
    promtool = ["promtool", "check", "metrics"]
    ran = subprocess.run(promtool, input=text, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    open_metrics = scraped(up, token, "application/openmetrics-text;version=1.0.0")
    assert "openmetrics-text" in open_metrics.headers["content-type"] and open_metrics.text.endswith("# EOF\n")


def test_rules_and_dashboard_name_only_what_is_there(up: Talaria, token: str) -> None:
    text = scraped(up, token).text
    there = {sample.name for family in parsed(text) for sample in family.samples}
    # A family without samples has its type all the same.
    there |= set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))
    rules = yaml.safe_load((MONITORING / "talaria.rules.yml").read_text())["groups"][0]["rules"]
    panels = json.loads((MONITORING / "grafana-dashboard.json").read_text())["panels"]
    queries = [one["expr"] for one in rules] + [one["expr"] for panel in panels for one in panel["targets"]]
    named = {name for query in queries for name in re.findall(r"\b(talaria_\w+)", query)}
    assert len(named) > 20
    assert {name for name in named if name not in there and name.removesuffix("_bucket") not in there} == set()


def test_who_asks_again_at_once_costs_nothing_more_and_a_server_that_is_away_little(tmp_path: Path) -> None:
    asked = []

    async def away() -> Any:
        asked.append(1)
        raise OSError

    async def many() -> list[Figures]:
        gatherer = Gatherer(away, Home(tmp_path))
        return await asyncio.gather(*(gatherer.figures() for _ in range(20)))

    found = asyncio.run(many())
    assert len(asked) == 1 and all(one is found[0] for one in found)
    text = exposed(found[0], "")[0].decode()
    assert "talaria_prefect_up 0.0" in text and "talaria_ledger_up 1.0" in text and "talaria_queue" not in text


def test_of_many_targets_those_with_few_dispatches_are_counted_together() -> None:
    totals = [
        Total(DISPATCHES, f"t{number}", "delivered", 2.0 if number < MOST_TARGETS else 1.0)
        for number in range(MOST_TARGETS + 500)
    ]
    found = values(exposed(Figures(ledger=True, totals=totals), "")[0].decode())
    counted = {key[-1]: value for key, value in found.items() if key[0] == "talaria_dispatches_total"}
    assert len(counted) == MOST_TARGETS + 2 and counted[OTHERS] == 500 and counted["t0"] == 2


def test_a_source_that_nobody_listens_for_is_shown_and_a_paused_one_is_not() -> None:
    ct = {"port": 11112, "aet": "CT", "state": "listening", "associations": 2, "receiving": 1, "full": False}
    mr = {"port": 11112, "aet": "MR", "state": "failed", "error": "the port is taken"}
    figures = Figures(received={"ct": ct, "mr": mr, "us": {"state": "paused"}})
    found = values(exposed(figures, "")[0].decode())
    up = {key[1]: value for key, value in found.items() if key[0] == "talaria_listener_up"}
    assert up == {"ct": 1, "mr": 0}
    assert found["talaria_listener_receiving", "ct"] == 1 and found["talaria_listener_full", "ct"] == 0
