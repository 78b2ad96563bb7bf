"""Rules as people make them, and the messages of a running `talaria up`: to a mail server and a web server."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
import yaml
from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.context import refresh_global_settings_context

from blocks.rule import CommandRule, Rule, WebhookRule
from talaria.metrics import disks
from talaria.notify import lookout
from talaria.notify.lookout import look
from talaria.notify.notifier import Notifier
from talaria.service import Office
from talaria.service import rules as saving
from talaria.settings import client_environment
from talaria.testing import studies
from talaria.testing.process import free_port
from tests.engine.material import dicom, folder, later, source, study
from tests.servers.certificates import Authority
from tests.servers.qr import archive
from tests.servers.receiver import Receiver, receiver
from tests.servers.smtp import PASSWORD, USER, MailServer, smtp
from tests.servers.up import Talaria
from transfer.happenings import Happening
from transfer.home import Home
from transfer.ledger import Ledger

KEY = "a-signing-key"


@pytest.fixture(scope="module")
def mail(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MailServer]:
    with smtp(tmp_path_factory.mktemp("mail")) as one:
        yield one


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as one:
        yield one


@pytest.fixture
def rules(up: Talaria, mail: MailServer, hook: Receiver, tmp_path: Path) -> Iterator[Path]:
    """A file with two rules, applied; they are removed at the end, to tell nothing of other tests."""
    at_once = {"group_s": 0, "every_s": 0}
    path = tmp_path / "talaria.yaml"
    ops = {
        "type": "email", "host": "localhost", "port": mail.port, "ca_cert": str(mail.ca), "user": USER,
        "password": "${MAIL_PASSWORD}", "sender": "talaria@example.org", "to": ["team@example.org"], "contact": True,
    }  # fmt: skip
    web = {"type": "webhook", "url": hook.url, "secret": "${HOOK_KEY}", "on": ["dispatch.failed", "dispatch.delivered"]}
    # Folders of names that no other test's targets have.
    named = {"targets": ["notified-*"]} | at_once
    path.write_text(
        yaml.safe_dump(
            {
                "targets": {"notified-good": folder(tmp_path / "good")},
                "notify": {"ops": ops | named, "web": web | named},
            }
        )
    )
    env = {"MAIL_PASSWORD": PASSWORD, "HOOK_KEY": KEY}
    applied = up.here("notify", "apply", str(path), "--json", env=env)
    assert applied.returncode == 0, applied.stderr
    assert [one["action"] for one in json.loads(applied.stdout)["rules"]] == ["created", "created"]
    again = json.loads(up.here("notify", "apply", str(path), "--json", env=env).stdout)
    assert [one["action"] for one in again["rules"]] == ["unchanged", "unchanged"]
    yield path
    for name in ("ops", "web"):
        up.told("notify", "remove", name)
    assert up.told("notify", "list")["rules"] == []


def failing(up: Talaria, tmp_path: Path, name: str = "gone") -> str:
    """Send a study to a target that fails, and to one that doesn't."""
    source = tmp_path / studies.PATIENT_NAME.replace("^", "_")
    if not source.exists():
        studies.ct(source, 2)
    gone = folder(tmp_path / name, max_attempts=1, retry_delay_s=0, contact="gone@example.org")
    up.apply(notified_gone=gone, notified_good=folder(tmp_path / "good"))
    (tmp_path / name).rmdir()
    return str(up.told("send", str(source), "--to", "notified-gone,notified-good", code=1)["flow_run_id"])


def test_a_failure_is_told_by_mail_to_team_and_contact_and_by_webhook(
    up: Talaria, rules: Path, mail: MailServer, hook: Receiver, tmp_path: Path
) -> None:
    run = failing(up, tmp_path)
    up.until(lambda: mail.to("team@example.org") and mail.to("gone@example.org"))
    # One message or two: what ends within a second of each other may be collected together.
    up.until(lambda: {one["event"] for got in hook.taken for one in got.document["events"]} >= {
        "dispatch.failed", "dispatch.delivered"})  # fmt: skip
    for recipient in ("team@example.org", "gone@example.org"):
        text = mail.to(recipient)[0].get_content()
        assert "notified-gone: a dispatch failed" in text and run in text
    told = "".join(message.as_string() for _, message in mail.messages) + "".join(
        got.body.decode() for got in hook.taken
    )
    assert not any(private in told for private in studies.PHI) and str(tmp_path) not in told
    assert all(got.headers["webhook-signature"].startswith("v1,") for got in hook.taken)

    listed = up.told("notify", "list")["rules"]
    places = {one["name"]: (one["type"], one["leads_to"]) for one in listed}
    assert places == {
        "ops": ("email", "team@example.org, contacts"),
        "web": ("webhook", hook.url.removesuffix("/hook")),
    }
    up.until(lambda: up.told("notify", "show", "web")["messages"][0]["state"] == "sent")
    shown = up.told("notify", "show", "ops")
    assert set(shown["password"]) == {"*"} and shown["to"] == ["team@example.org"]
    every = json.dumps([listed, shown, up.told("notify", "show", "web")]) + up.here("notify", "list").stdout
    assert PASSWORD not in every and KEY not in every and hook.url not in every
    changed = [one for one in up.told("audit", "show", "--last", "1000")["entries"] if one["event"] == "rule-changed"]
    assert {one["details"]["rule"] for one in changed} >= {"ops", "web"} and PASSWORD not in json.dumps(changed)

    tested = up.told("notify", "test", "ops", "--to", "me@example.org")
    assert tested["recipients"] == [{"recipient": "me@example.org", "ok": True, "detail": ""}]
    assert "test of the rule ops" in mail.to("me@example.org")[0]["Subject"]
    hook.status = 503
    failed = up.told("notify", "test", "web", code=1)
    assert not failed["ok"] and "answers 503" in failed["recipients"][0]["detail"]


def test_a_message_that_was_on_its_way_when_the_server_was_killed_is_sent_once(
    up: Talaria, rules: Path, hook: Receiver, tmp_path: Path
) -> None:
    hook.hold.set()
    run = failing(up, tmp_path)
    up.until(lambda: hook.asked)
    up.child("talaria.front").kill()
    hook.hold.clear()

    def told() -> list[str]:
        return [
            got.headers["webhook-id"]
            for got in hook.taken
            if run in got.body.decode() and "dispatch.failed" in got.body.decode()
        ]

    up.until(told)
    up.until(lambda: all(one["state"] == "sent" for one in up.told("notify", "show", "web")["messages"]))
    assert len(set(told())) == 1


def test_wrong_rules_are_refused_with_a_sentence_and_without_their_secrets(up: Talaria, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"type": "webhook", "url": "ftp://h", "secret": "swordfish"}, "url is not a web address"),
        ({"type": "emial"}, "did you mean email?"),
        ({"type": "email", "host": "m", "sender": "a@b.c", "recipients": ["x@y.z"]}, "unknown field 'recipients'"),
        ({"type": "command", "command": "page"}, "TALARIA_NOTIFY_COMMANDS"),
        ({"type": "webhook", "url": "http://h/", "on": ["dispatch.lost"]}, "on"),
    ]
    for values, words in wrong:
        path.write_text(yaml.safe_dump({"notify": {"ops": values}}))
        ran = up.here("notify", "apply", str(path))
        assert ran.returncode == 2 and words in ran.stderr and "swordfish" not in ran.stderr, ran.stderr
    path.write_text(yaml.safe_dump({"targets": {}}))
    assert "names no rule" in up.here("notify", "apply", str(path)).stderr
    assert up.here("notify", "show", "nobody").returncode == 2
    assert {"webhook", "email", "command"} == set(up.told("notify", "types")["types"])


# ---- what nobody reports


@pytest.fixture
def prefect(up: Talaria) -> Iterator[None]:
    """This process as a client of the server of `up`."""
    with mock.patch.dict(os.environ, {**up.env, **client_environment(Home(up.home), up.url)}):
        refresh_global_settings_context()
        yield
    refresh_global_settings_context()


def looked(up: Talaria, rule: WebhookRule, times: int = 2, certificate: str = "") -> list[Happening]:
    """What is found when somebody looks several times, in a ledger of its own."""

    async def case() -> list[Happening]:
        async with get_client() as client:
            with Ledger(up.folder / f"looked-{time.time_ns()}.sqlite") as ledger:
                for _ in range(times):
                    await look(client, Home(up.home), ledger, [rule.named("ops")], certificate)
                return ledger.happenings.waiting(100)

    return asyncio.run(case())


def test_a_dispatch_that_has_not_ended_in_time_is_late_once_unless_people_have_set_that_it_waits(
    up: Talaria, prefect: None, tmp_path: Path
) -> None:
    studies.ct(tmp_path / "study", 1)
    dead = dicom(free_port(), max_attempts=9, retry_delay_s=3600, retry_max_delay_s=3600)
    runs: list[str] = []

    def late(seconds: int) -> dict[str, dict[str, Any]]:
        rule = WebhookRule(url="http://h/", on=["dispatch.late"], late_s=seconds)
        return {one.about["run"]: one.about for one in looked(up, rule) if one.about["run"] in runs}

    with archive(study("L1", series=1)) as peer:
        up.apply(dead_slow=dead, shut=folder(tmp_path / "shut", window=later(5)), src=source(peer))
        for name in ("dead-slow", "shut"):
            runs.append(up.told("send", str(tmp_path / "study"), "--to", name, "--no-wait")["flow_run_id"])
        run, shut = runs
        asked = "retrieve", "src", "--accession", "L1", "--to", "dead-slow", "--no-wait"
        runs.append(retrieval := up.told(*asked)["flow_run_id"])
        try:
            up.until(lambda: (up.run(shut)["state"].get("message") or "").startswith("waits"))
            up.until(lambda: up.run(retrieval)["state_name"] == "AwaitingRetry")
            parents = {"parent_flow_run_id": {"any_": [retrieval]}}
            (part,) = [one["id"] for one in up.api("POST", "/flow_runs/filter", flow_runs=parents)]
            runs.append(part)
            up.until(lambda: late(1).keys() == {run, retrieval, part})
            found = late(1)
            for one in (run, retrieval, part):
                assert found[one] == found[one] | {"target": "dead-slow", "late_s": 1, "run": one}
            assert late(86_400) == {}
            up.told("jobs", "pause", retrieval)
            up.until(lambda: up.run(retrieval)["state_name"] == "Paused")
            up.until(lambda: late(1).keys() == {run})
        finally:
            for one in (run, shut, retrieval):
                up.here("jobs", "cancel", one)


def test_a_certificate_is_told_of_30_7_and_1_days_before_it_expires_once_each(
    up: Talaria, prefect: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf = Authority(tmp_path / "ca").leaf("front")
    rule = WebhookRule(url="http://h/", on=["certificate.expires"]).named("ops")
    found: list[int] = []
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        known = lookout.certificates.known(str(leaf.cert), [], {})
        end = known[0].expires
        for days in (60, 29.5, 29, 6.5, 0.5, 0.4, -1):
            monkeypatch.setattr(lookout.certificates.time, "time", lambda days=days: end - days * 86_400)
            lookout._expiring(ledger, known)
            found.append(len(ledger.happenings.waiting(100)))
        monkeypatch.undo()
        happened = ledger.happenings.waiting(100)
    assert found == [0, 1, 1, 2, 3, 3, 3]
    assert [one.about["days"] for one in happened] == [29, 6, 0]
    assert all(rule.hears(one.event, one.about) and one.about["whose"] == "server" for one in happened)


def test_a_rule_that_is_replaced_by_one_of_another_type_is_there_at_every_moment(
    up: Talaria, prefect: None, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens while two types have its name is collected once, by the new one; after that, the old one is gone."""

    async def case() -> None:
        async with get_client() as client, httpx.AsyncClient() as raw:
            office, seen = Office(client, Home(up.home)), list[list[Rule]]()

            async def got() -> PrefectClient:
                return client

            notifier = Notifier(Home(up.home), raw, got, lambda: True)
            monkeypatch.setattr(notifier, "raw", client._client)
            old = CommandRule(command="page", targets=["nothing-*"])
            await saving.save_rule(office, old.named("replaced"), None, "created")
            removed = client.delete_block_document

            async def look(number: Any) -> None:
                seen.append(await notifier._rules())
                await removed(number)

            monkeypatch.setattr(client, "delete_block_document", look)
            new = {"replaced": {"type": "webhook", "url": hook.url, "targets": ["nothing-*"]}}
            done = await saving.apply_rules(office, new, replace=True)
            assert done["rules"] == [{"name": "replaced", "action": "replaced", "note": ""}] and len(seen) == 1
            seen.append(await notifier._rules())
            for found in seen:
                assert [type(one) for one in found if one.name == "replaced"] == [WebhookRule]
            monkeypatch.undo()
            # Two, as a crash in between leaves them: pausing one is no reason to remove the other.
            await old.named("replaced").asave("replaced", overwrite=True, client=client)
            await saving.enable_rule(office, "command/replaced", enabled=False)
            assert len(await saving.SAVED_RULES.documents(client, ["replaced"])) == 2
            for kind in ("command", "webhook"):
                await saving.remove_rule(office, f"{kind}/replaced")

    asyncio.run(case())


def test_a_disk_is_low_below_the_rule_s_share_and_told_of_once_a_day(
    up: Talaria, prefect: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = WebhookRule(url="http://h/", on=["disk.low"], free_percent=99.999)
    of_state = [one for one in looked(up, rule, times=3) if str(one.about.get("of", "")).startswith(disks.STATE)]
    assert len(of_state) == 1 and of_state[0].about["percent"] < 99.999
    assert looked(up, WebhookRule(url="http://h/", on=["disk.low"], free_percent=0.001)) == []


def test_a_rule_that_is_not_there_is_named_with_the_command_that_makes_rules(up: Talaria) -> None:
    for name in [one["name"] for one in up.told("notify", "list")["rules"]]:
        up.told("notify", "remove", name)
    asked = up.here("notify", "test", "nobody")
    assert asked.returncode == 2
    assert "no rule named nobody; there are none yet: `talaria notify apply FILE.yaml`" in asked.stderr


def test_a_rule_is_paused_and_resumed_by_command_and_by_the_api(up: Talaria, hook: Receiver, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"notify": {"halted": {"type": "webhook", "url": hook.url, "targets": ["no-*"]}}}))
    assert up.here("notify", "apply", str(path)).returncode == 0

    def listed() -> dict[str, Any]:
        (one,) = [one for one in up.told("notify", "list")["rules"] if one["name"] == "halted"]
        return one

    assert up.told("notify", "pause", "halted") == {"name": "halted", "action": "paused"}
    assert listed()["enabled"] is False and listed()["targets"] == ["no-*"]
    assert "paused" in up.here("notify", "list").stdout
    assert up.told("notify", "resume", "webhook/halted") == {"name": "halted", "action": "resumed"}
    assert listed()["enabled"] is True
    refused = up.here("notify", "pause", "nobody")
    assert refused.returncode == 2 and "no rule named nobody" in refused.stderr

    url = f"http://127.0.0.1:{up.port}/talaria/api/v1/rules/halted/enable"
    auth = tuple((up.home / "api.auth").read_text().strip().split(":", 1))
    answer = httpx.post(url, json={"enabled": False}, auth=auth, trust_env=False, timeout=300)  # type: ignore[arg-type]
    assert answer.json() == {"name": "halted", "action": "paused"} and listed()["enabled"] is False
    entries = up.told("audit", "show", "--event", "rule-changed", "--last", "3")["entries"]
    assert [one["details"]["change"] for one in entries] == ["paused", "resumed", "paused"]
    up.told("notify", "remove", "halted")


def test_rules_need_their_role(up: Talaria) -> None:
    token = up.told("token", "create", "--role", "viewer", "--name", f"rules-{time.time_ns()}")["token"]
    url = f"http://127.0.0.1:{up.port}/talaria/api/v1"
    with httpx.Client(headers={"Authorization": f"Bearer {token}"}, trust_env=False, timeout=300) as viewer:
        assert viewer.get(f"{url}/rules").status_code == 200
        assert viewer.post(f"{url}/rules", json={"rules": {}}).status_code == 403
        assert viewer.post(f"{url}/rules/ops/test").status_code == 403
        assert viewer.post(f"{url}/rules/ops/enable", json={"enabled": False}).status_code == 403
        assert viewer.delete(f"{url}/rules/ops").status_code == 403
