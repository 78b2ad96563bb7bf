"""What happens becomes messages: grouped, limited in rate, each sent once, whoever is killed and however many hosts."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from unittest.mock import AsyncMock

import httpx
import pytest

from blocks.folder import FolderTarget
from blocks.rule import CommandRule, EmailRule, Rule, WebhookRule
from talaria.notify import notifier
from talaria.notify.collect import collect
from talaria.notify.notifier import Notifier
from talaria.notify.words import letter
from talaria.testing import studies
from talaria.testing.process import as_loaded
from tests.servers.postgresql import PostgreSql, postgresql
from tests.servers.receiver import Receiver, receiver
from tests.servers.smtp import PASSWORD, USER, smtp
from transfer import database
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.messages import MOST_KEPT, OPEN, SENT, StoredMessage

AT_ONCE = {"group_s": 0, "every_s": 0}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("TALARIA_HOME", str(tmp_path / "home"))
    return Home.current()


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as one:
        yield one


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgreSql]:
    with postgresql() as one:
        yield one


def failed(ledger: Ledger, count: int, cause: str = "outage", target: str = "pacs", **more: Any) -> None:
    with ledger.together():
        for number in range(count):
            about = {"target": target, "cause": cause, "run": f"run-{number}", "dispatch": f"d{number}", "unsent": 3}
            hidden = {"paths": ["/in/DOE_JOHN"], "words": "can't read /in/DOE_JOHN/1.dcm", "plain": False}
            ledger.happenings.happened("dispatch.failed", about | hidden | more)


def webhook(one: Receiver, name: str = "ops", **fields: Any) -> Rule:
    return WebhookRule(url=one.url, **AT_ONCE | fields).named(name)


class Alone(Notifier):
    """A notifier with rules of its own, where no Prefect server is."""

    def __init__(self, home: Home, *rules: Rule) -> None:
        async def nobody() -> Any:
            raise AssertionError("Prefect is not needed")

        super().__init__(home, httpx.AsyncClient(), nobody, lambda: True)
        self.rules, self._watched_at = list(rules), time.monotonic() + 1e9

    async def _rules(self) -> list[Rule]:
        return self.rules


def running(*notifiers: Notifier, until: Callable[[], object]) -> None:
    """Run notifiers until a condition holds."""

    async def case() -> None:
        tasks = [asyncio.create_task(one.run()) for one in notifiers]
        end = time.monotonic() + as_loaded(60)
        while not await asyncio.to_thread(until):
            assert time.monotonic() < end, "waited in vain"
            await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    asyncio.run(case())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifier, "LOOK_S", 0.02)
    monkeypatch.setattr(notifier, "FIRST_S", 0.02)
    monkeypatch.setattr(notifier, "LONGEST_S", 0.2)


def newest(home: Home, rule: str = "ops") -> StoredMessage:
    """The last message of a rule; one without a number if there is none."""
    with Ledger(home.ledger) as ledger:
        return next(iter(ledger.messages.newest(rule, 1)), StoredMessage(rule, "", 0))


def test_a_thousand_failures_are_one_message_with_a_count_and_each_cause_apart(home: Home, hook: Receiver) -> None:
    with Ledger(home.ledger) as ledger:
        failed(ledger, 1000)
        failed(ledger, 7, "rejected", rejected=2, unsent=0)
        while collect(ledger, [webhook(hook)], {}):
            pass
    running(Alone(home, webhook(hook)), until=lambda: hook.taken)
    (one,) = hook.taken
    outage, rejected = one.document["events"]
    assert (outage["cause"], outage["count"], outage["unsent"]) == ("outage", 1000, 3000)
    assert (rejected["cause"], rejected["count"], rejected["rejected"]) == ("rejected", 7, 14)
    assert len(outage["dispatches"]) == 5
    assert one.document["text"].endswith("pacs: 1000 dispatches failed (outage), and 1 more")
    with Ledger(home.ledger) as ledger:
        assert ledger.happenings.waiting(1) == [] and len(ledger.messages.newest("ops", 9)) == 1


def test_no_path_and_no_sentence_with_one_is_told_unless_that_is_asked_for(home: Home, hook: Receiver) -> None:
    rules = [webhook(hook), webhook(hook, "all", paths=True)]
    with Ledger(home.ledger) as ledger:
        failed(ledger, 1)
        failed(ledger, 1, "refused", words="the bucket is not there", plain=True)
    running(Alone(home, *rules), until=lambda: len(hook.taken) == 2)
    found = {one.document["rule"]: one.body.decode() for one in hook.taken}
    assert "DOE" not in found["ops"] and "the bucket is not there" in found["ops"]
    assert "/in/DOE_JOHN" in found["all"] and "can't read" in found["all"]
    assert not any(private in text for text in found.values() for private in studies.PHI)


def test_rules_hear_of_what_they_name(home: Home) -> None:
    rule = WebhookRule(url="http://h/", on=["dispatch.failed", "source.stuck"], targets=["pacs*"], sources=["ct"])
    assert rule.hears("dispatch.failed", {"target": "pacs-2"}) and rule.hears("source.stuck", {"source": "ct"})
    assert not rule.hears("dispatch.failed", {"target": "archive"}) and not rule.hears("target.up", {"target": "pacs"})
    assert not rule.hears("source.stuck", {"source": "mr"})
    every = WebhookRule(url="http://h/")
    assert every.hears("dispatch.failed", {"target": "x"}) and not every.hears("dispatch.delivered", {"target": "x"})
    assert every.hears("dispatch.late", {"late_s": 3600}) and not every.hears("dispatch.late", {"late_s": 60})
    assert not WebhookRule(url="http://h/", enabled=False).hears("dispatch.failed", {"target": "x"})


def test_the_contact_of_a_target_that_was_just_saved_is_known(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[Any] = [FolderTarget(folder="/a", contact="a@example.org").named("one")]

    async def all_of(*args: Any) -> list[Any]:
        return there

    async def none(*args: Any) -> list[Any]:
        return []

    monkeypatch.setattr("tasks.targets.TARGETS.all", all_of)
    monkeypatch.setattr("tasks.sources.saved.KEPT.all", none)
    changed = [0]
    notifier = Notifier(home, cast(Any, None), cast(Any, none), lambda: True, saved=lambda: changed[0])
    assert asyncio.run(notifier._known_contacts()) == {"target/one": "a@example.org"}
    there.append(FolderTarget(folder="/b", contact="b@example.org").named("two"))
    assert "target/two" not in asyncio.run(notifier._known_contacts()), "they are not asked for each second"
    changed[0] += 1
    assert asyncio.run(notifier._known_contacts())["target/two"] == "b@example.org"


def test_contacts_hear_of_their_own_target_and_the_others_of_all(home: Home, tmp_path: Path) -> None:
    with smtp(tmp_path / "mail") as server:
        rule = EmailRule(
            host="localhost", port=server.port, ca_cert=str(server.ca), user=USER, password=PASSWORD, contact=True,
            sender="talaria@example.org", to=["team@example.org"], **AT_ONCE,
        ).named("ops")  # fmt: skip
        with Ledger(home.ledger) as ledger:
            failed(ledger, 2)
            failed(ledger, 1, target="archive")
            failed(ledger, 1, target="nobodys")
            contacts = {"target/pacs": "pacs@example.org", "target/archive": "team@example.org"}
            contacts["source/ct"] = "ct@example.org"
            ledger.happenings.happened("source.stuck", {"source": "ct"})
            collect(ledger, [rule], contacts)
        running(Alone(home, rule), until=lambda: len(server.messages) == 3)
        texts = {name: message.get_content() for name, message in server.messages}
        # A mailbox that several of them lead to drops what it has already, by this.
        assert len({message["Message-ID"] for _, message in server.messages}) == 3
    assert texts.keys() == {"team@example.org", "pacs@example.org", "ct@example.org"}
    assert "pacs: 2 dispatches failed" in texts["pacs@example.org"] and "archive" not in texts["pacs@example.org"]
    assert all(word in texts["team@example.org"] for word in ("pacs", "archive", "nobodys", "ct: is stuck"))


def test_no_two_messages_have_one_id(home: Home, hook: Receiver) -> None:
    """Receivers drop what they have already; numbers begin again where a rule was removed and comes back."""
    with Ledger(home.ledger) as ledger:
        for _ in range(2):
            failed(ledger, 1)
            collect(ledger, [webhook(hook)], {})
            running(Alone(home, webhook(hook)), until=lambda: newest(home).state == SENT)
            ledger.messages.drop("ops")
    ids = [one.headers["webhook-id"] for one in hook.taken]
    assert len(set(ids)) == 2 and all("-ops-1-" in one for one in ids)


def test_later_failures_wait_for_the_rate_and_are_told_together(home: Home, hook: Receiver) -> None:
    rule = webhook(hook, every_s=3600)
    with Ledger(home.ledger) as ledger:
        failed(ledger, 1)
        running(Alone(home, rule), until=lambda: newest(home).state == SENT)
        for _ in range(3):
            failed(ledger, 5)
            collect(ledger, [rule], {})
        one, two = ledger.messages.newest("ops", 9)
        assert one.state == OPEN and one.due > ledger.now() + 3500 and two.state == SENT
        assert [entry["count"] for entry in one.body["entries"].values()] == [15]
    assert len(hook.taken) == 1


def test_a_receiver_that_fails_gets_the_message_when_it_is_back_and_the_failure_is_seen(
    home: Home, hook: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    hook.status = 500
    with Ledger(home.ledger) as ledger:
        failed(ledger, 1)
    running(Alone(home, webhook(hook)), until=lambda: len(hook.asked) >= 3)
    waiting = newest(home)
    assert waiting.state == OPEN and "answers 500" in waiting.error and waiting.tries >= 3
    assert "rule ops is tried again" in caplog.text and "answers 500" in caplog.text
    hook.status = 200
    running(Alone(home, webhook(hook)), until=lambda: newest(home).state == SENT)
    assert len(hook.taken) == 1
    assert len({one.headers["webhook-id"] for one in hook.asked}) == 1


def test_a_message_that_nobody_takes_is_given_up_after_days(
    home: Home, hook: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notifier, "GIVE_UP_S", -1.0)
    hook.status = 500
    with Ledger(home.ledger) as ledger:
        failed(ledger, 1)
    running(Alone(home, webhook(hook)), until=lambda: newest(home).state == "failed")
    assert "is given up: it answers 500" in caplog.text


def test_a_message_that_has_waited_for_days_is_tried_as_long_as_others(home: Home, hook: Receiver) -> None:
    """A rule may write once a week, and a server may have been off: the first try may meet a busy mail server."""
    hook.status = 500
    with Ledger(home.ledger) as ledger:
        failed(ledger, 1)
        collect(ledger, [webhook(hook)], {})
        ledger._db.execute("UPDATE messages SET made=made-?, due=due-?", (8 * 86_400, 86_400))
    running(Alone(home, webhook(hook)), until=lambda: newest(home).tries >= 2)
    assert newest(home).state == OPEN
    hook.status = 200
    running(Alone(home, webhook(hook)), until=lambda: newest(home).state == SENT)


@pytest.mark.parametrize("silent", [False, True])
def test_a_look_that_fails_or_never_ends_holds_up_no_message(
    home: Home, hook: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, silent: bool
) -> None:
    over = asyncio.Event()

    async def look(*args: Any) -> None:
        if silent:
            await over.wait()
        raise TypeError("a run with odd parameters")

    monkeypatch.setattr("talaria.notify.lookout.look", look)
    monkeypatch.setattr(notifier, "STOP_S", 0.1)
    one = Alone(home, webhook(hook))
    one.client, one._watched_at = AsyncMock(), -notifier.WATCH_S  # type: ignore[method-assign]
    with Ledger(home.ledger) as ledger:
        failed(ledger, 1)
    running(one, until=lambda: newest(home).state == SENT)
    assert len(hook.taken) == 1 and ("a run with odd parameters" in caplog.text) is not silent


def test_one_recipient_that_is_refused_does_not_hold_up_the_other(home: Home, tmp_path: Path) -> None:
    with smtp(tmp_path / "mail") as server:
        server.refused.add("gone@example.org")
        rule = EmailRule(
            host="localhost", port=server.port, ca_cert=str(server.ca), user=USER, password=PASSWORD,
            sender="talaria@example.org", to=["gone@example.org", "team@example.org"], **AT_ONCE,
        ).named("ops")  # fmt: skip
        with Ledger(home.ledger) as ledger:
            failed(ledger, 1)
        running(Alone(home, rule), until=lambda: server.messages and server.asked.count("gone@example.org") >= 2)
        assert [name for name, _ in server.messages] == ["team@example.org"]
        with Ledger(home.ledger) as ledger:
            states = {one.recipient: (one.state, one.error) for one in ledger.messages.newest("ops", 9)}
    assert states["team@example.org"] == (SENT, "") and "refuses the recipient" in states["gone@example.org"][1]


def test_who_is_no_recipient_any_more_is_not_written_to(home: Home, tmp_path: Path) -> None:
    with smtp(tmp_path / "mail") as server:
        rule = EmailRule(
            host="localhost", port=server.port, ca_cert=str(server.ca), user=USER, password=PASSWORD,
            sender="talaria@example.org", to=["gone@example.org"], **AT_ONCE,
        ).named("ops")  # fmt: skip
        with Ledger(home.ledger) as ledger:
            failed(ledger, 1)
            collect(ledger, [rule], {})
        rule.to = ["team@example.org"]
        running(Alone(home, rule), until=lambda: newest(home).state == "failed")
        assert server.asked == [] and "does not write to this recipient any more" in newest(home).error


def test_a_slow_receiver_holds_up_no_other_rule(home: Home, hook: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifier, "STOP_S", 0.1)
    with receiver() as slow:
        slow.hold.set()
        with Ledger(home.ledger) as ledger:
            failed(ledger, 1)
        rules = [webhook(slow, "slow", timeout_s=60), webhook(hook)]
        running(Alone(home, *rules), until=lambda: slow.asked and hook.taken)
        slow.hold.clear()
    assert len(hook.taken) == 1


def test_what_was_due_when_the_process_was_killed_is_still_sent_once(home: Home, hook: Receiver) -> None:
    hook.hold.set()
    with Ledger(home.ledger) as ledger:
        failed(ledger, 4)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_notify, args=(home, webhook(hook)))
    process.start()
    end = time.monotonic() + as_loaded(60)
    while not hook.asked and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)  # between the claim and the answer
    process.join()
    assert newest(home).state == OPEN and hook.taken == []
    hook.hold.clear()
    running(Alone(home, webhook(hook)), until=lambda: newest(home).state == SENT)
    sent = [one for one in hook.taken if one.document["events"][0]["count"] == 4]
    assert len({one.headers["webhook-id"] for one in sent}) == 1  # so that a receiver takes it once
    assert newest(home).number == 1


def _notify(home: Home, rule: Rule) -> None:
    asyncio.run(Alone(home, rule).run())


def test_of_several_hosts_that_share_a_ledger_one_sends_each_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres: PostgreSql, hook: Receiver
) -> None:
    url = postgres.new()
    monkeypatch.setenv("TALARIA_LEDGER", url)
    homes = [Home(tmp_path / name) for name in ("a", "b", "c")]
    for one in homes:
        one.root.mkdir(mode=0o700)
    rules = [webhook(hook, f"rule-{number}", group_s=1) for number in range(4)]
    with Ledger(url) as ledger:
        failed(ledger, 300)
        running(*(Alone(one, *rules) for one in homes), until=lambda: len(hook.taken) >= 4)
        running(*(Alone(one, *rules) for one in homes), until=lambda: not ledger.messages.due())
        assert all(one.state == SENT for rule in rules for one in ledger.messages.newest(rule.name, 9))
    counts = {one.document["rule"]: one.document["events"][0]["count"] for one in hook.taken}
    assert len(hook.taken) == 4 and counts == {rule.name: 300 for rule in rules}
    database._engine(url).dispose()


def test_messages_of_a_removed_rule_are_forgotten_and_of_a_disabled_one_kept(home: Home, hook: Receiver) -> None:
    with Ledger(home.ledger) as ledger:
        failed(ledger, 1)
        collect(ledger, [webhook(hook), webhook(hook, "gone")], {})
    running(
        Alone(home, webhook(hook, enabled=False)),
        until=lambda: newest(home).tries and not _has(home, "gone"),
    )
    assert newest(home).error == "the rule is paused" and hook.asked == []
    with Ledger(home.ledger) as ledger:
        assert ledger.messages.counts() == {("ops", "open"): 1}, "none that an alert should be about"
    running(Alone(home, webhook(hook)), until=lambda: hook.taken)


def _has(home: Home, rule: str) -> bool:
    with Ledger(home.ledger) as ledger:
        return bool(ledger.messages.newest(rule, 1))


def test_words_name_what_happened_to_whom_and_for_how_long() -> None:
    def entry(event: str, **more: Any) -> dict[str, Any]:
        return {"event": event, "cause": "", "count": 1, "first": 1.7e9, "last": 1.7e9} | more

    body = {
        "entries": {
            "a": entry("certificate.expires", target="pacs", whose="peer", days=7),
            "b": entry("disk.low", of="state directory of host-1", percent=4.2, free=1, size=2),
            "c": entry("target.down", target="pacs", cause="outage", failures=5),
        }
    }
    one = letter(StoredMessage("ops", "", 1, body=body, made=1.7e9), "home", "host-1")
    assert one.subject == "[Talaria host-1] state directory of host-1: the disk is low: 4.2 % is free, and 2 more"
    assert "pacs: a certificate expires in 7 days" in one.text and "shown by it" in one.text
    assert [each["event"] for each in one.document["events"]] == ["disk.low", "target.down", "certificate.expires"]
    assert one.document["events"][0]["first"] == "2023-11-14T22:13:20Z"
    assert json.loads(json.dumps(one.document)) == one.document


@pytest.mark.parametrize(
    ("days", "words"),
    [(7, "a certificate expires in 7 days ("), (1, "expires in 1 day ("), (0, "expires today, or has expired (")],
)
def test_a_certificate_that_has_expired_is_told_so(days: int, words: str) -> None:
    entry = {"event": "certificate.expires", "target": "pacs", "cause": "", "count": 1, "first": 1.7e9, "last": 1.7e9}
    one = letter(StoredMessage("ops", "", 1, body={"entries": {"x": {**entry, "days": days}}}), "home", "host-1")
    assert words in one.text


@pytest.mark.parametrize(
    "address",
    ["a", "a@[1.2.3.4", "a@b..c", "a@b.", "(a@b", "a@b(c)", ".a@b.org", "a..b@c.org", "a:b@c.org", "a\\b@c.org",
     "a@b@c", "a b@c.org", '"a"@b.org', "müller@klinik.example", "a@müller.example", "a@b.org\x7f"],
)  # fmt: skip
def test_an_address_that_nothing_can_be_sent_to_is_refused(address: str) -> None:
    fields = {"host": "m", "sender": "t@example.org", "to": ["b@c.org"]}
    for wrong in ({"to": [address]}, {"sender": address}):
        with pytest.raises(ValueError, match="is not an e-mail address"):
            EmailRule(**fields | wrong)
    with pytest.raises(ValueError, match="is not an e-mail address"):
        FolderTarget(folder="/x", contact=address)


@pytest.mark.parametrize("address", ["a@b", "o'neil+x=1@x-y.example.org", "a@[192.0.2.1]", "root@localhost"])
def test_an_address_that_a_mail_server_takes_is_taken(address: str) -> None:
    assert EmailRule(host="m", sender=address, to=[f" {address} "]).to == [address]
    assert FolderTarget(folder="/x", contact=address).contact == address


@pytest.mark.parametrize(
    ("cls", "fields", "words"),
    [
        (WebhookRule, {"url": "ftp://h/x"}, "not a web address"),
        (WebhookRule, {"url": "https://u:swordfish@h/"}, "must not hold a user"),
        (WebhookRule, {"url": "http://elsewhere/", "token": "swordfish"}, "over https only"),
        (WebhookRule, {"url": "https://h/", "on": []}, "on"),
        (WebhookRule, {"url": "https://h/", "on": ["dispatch.swordfish"]}, "on"),
        (EmailRule, {"host": "m", "sender": "a@b.c"}, "names nobody"),
        (EmailRule, {"host": "m", "sender": "a@b.c\nBcc: x@y.z", "to": ["b@c.d"]}, "e-mail address"),
        (EmailRule, {"host": "m", "sender": "a@b.c", "to": ["b@c.d"], "password": "swordfish"}, "without user"),
        (
            EmailRule,
            {"host": "m", "sender": "a@b.c", "to": ["b@c.d"], "user": "u", "security": "none"},
            "over TLS only",
        ),
        (CommandRule, {"command": "a b"}, "command"),
    ],
)
def test_a_rule_that_can_t_work_is_refused_without_its_secrets(cls: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as found:
        cls(**fields)
    assert "swordfish" not in str(found.value).replace("dispatch.swordfish", "")


def test_what_happens_while_a_rule_can_not_be_loaded_is_told_by_it_later(home: Home, hook: Receiver) -> None:
    ops, other = webhook(hook), webhook(hook, "other", targets=["archive"])
    with Ledger(home.ledger) as ledger:
        failed(ledger, 3)
        failed(ledger, 2, target="archive")
        assert collect(ledger, [ops], {}, {"other"}) == 5
        failed(ledger, 1, target="archive")
        assert collect(ledger, [ops], {}, {"other"}) == 1
        assert not ledger.messages.newest("other", 9) and ("other", "kept") not in ledger.messages.counts()
        ledger.messages.prune(time.time() + 60)
        collect(ledger, [ops, other], {})
        assert collect(ledger, [ops, other], {}) == 0 and not ledger.messages.keeping()
        (one,) = ledger.messages.newest("other", 9)
        (entry,) = one.body["entries"].values()
        assert (entry["target"], entry["count"]) == ("archive", 3)
        assert sum(entry["count"] for entry in ledger.messages.newest("ops", 1)[0].body["entries"].values()) == 6


def test_what_is_kept_for_a_rule_that_can_not_be_loaded_is_bounded(home: Home, hook: Receiver) -> None:
    with Ledger(home.ledger) as ledger:
        failed(ledger, MOST_KEPT)
        failed(ledger, 7, target="newest")
        while collect(ledger, [], {}, {"ops"}):
            pass
        while collect(ledger, [webhook(hook)], {}):
            pass
        counts = {one["target"]: one["count"] for one in ledger.messages.newest("ops", 1)[0].body["entries"].values()}
        assert counts == {"pacs": MOST_KEPT - 7, "newest": 7}
        failed(ledger, 1)
        collect(ledger, [], {}, {"ops"})
        collect(ledger, [], {})  # the rule is removed
        assert not ledger.messages.keeping()


def test_times_in_a_webhook_are_written_alike(home: Home, hook: Receiver) -> None:
    rule = webhook(hook, on=["target.down"])
    with Ledger(home.ledger) as ledger:
        ledger.happenings.happened("target.down", {"target": "pacs", "failures": 5, "since": 1_795_980_902.6})
        collect(ledger, [rule], {})
        (entry,) = letter(ledger.messages.newest("ops", 1)[0], "home", "host").document["events"]
    assert entry["since"] == "2026-11-29T19:35:02Z" and entry["first"].endswith("Z") and entry["last"].endswith("Z")
