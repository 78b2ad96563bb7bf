"""Messages at real servers: a mail server with TLS and login, a web server, a program; and what can go wrong there."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from blocks.rule import CommandRule, EmailRule, Rule, WebhookRule
from talaria.notify import mail as mailing
from talaria.notify import sending
from talaria.notify.errors import NotSent
from talaria.notify.words import Letter, letter
from talaria.testing.process import free_port, until
from tests.servers.certificates import Authority
from tests.servers.proxy import PASSWORD as PROXY_PASSWORD
from tests.servers.proxy import USER as PROXY_USER
from tests.servers.proxy import tinyproxy
from tests.servers.receiver import Receiver, receiver
from tests.servers.smtp import ODD_PASSWORD, ODD_USER, PASSWORD, USER, MailServer, smtp
from transfer import silent
from transfer.messages import StoredMessage

TO = "team@example.org"


def made(recipient: str = TO, number: int = 7) -> Letter:
    entry = {"event": "dispatch.failed", "target": "pacs", "cause": "outage", "count": 2, "first": 1.7e9, "last": 1.7e9}
    body = {"entries": {"x": entry}}
    return letter(StoredMessage("ops", recipient, number, body=body, made=time.time()), "home", "host-1")


def send(rule: Rule, one: Letter | None = None) -> None:
    asyncio.run(sending.send(rule.named("ops"), one or made()))


def failure(rule: Rule, one: Letter | None = None) -> NotSent:
    with pytest.raises(NotSent) as found:
        send(rule, one)
    return found.value


# ---- e-mail


@pytest.fixture(scope="module", params=["starttls", "tls"])
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[MailServer, str]]:
    with smtp(tmp_path_factory.mktemp("mail"), request.param) as one:
        yield one, request.param


@pytest.fixture
def mail(shared: tuple[MailServer, str]) -> tuple[MailServer, dict[str, Any]]:
    one, security = shared
    one.messages.clear()
    one.refused.clear()
    one.asked.clear()
    one.answer, one.delay_s, one.stays = "", 0.0, False
    one.quitting.clear()
    return one, {
        "host": "localhost", "port": one.port, "security": security, "ca_cert": str(one.ca), "user": USER,
        "password": PASSWORD, "sender": "talaria@example.org", "to": [TO],
    }  # fmt: skip


def test_an_e_mail_arrives_over_tls_with_a_login(mail: tuple[MailServer, dict[str, Any]]) -> None:
    server, fields = mail
    send(EmailRule(**fields))
    (message,) = server.to(TO)
    assert message["From"] == "talaria@example.org" and message["To"] == TO
    assert message["Subject"] == "[Talaria host-1] pacs: 2 dispatches failed (outage)"
    assert message["Message-ID"] == f"<{made().id}@example.org>" and message["Auto-Submitted"] == "auto-generated"
    assert "may pass by itself" in message.get_content()


def test_text_beyond_ascii_is_sent_in_seven_bits(mail: tuple[MailServer, dict[str, Any]]) -> None:
    server, fields = mail
    one = made()
    send(EmailRule(**fields), replace(one, text=one.text + "Zugriff verweigert für 田中\n"))
    (message,) = server.to(TO)
    assert "Zugriff verweigert für 田中" in message.get_content()
    assert message["Content-Transfer-Encoding"] in ("base64", "quoted-printable")


@pytest.mark.parametrize(
    ("name", "shown"),
    [("3f9a0c11ab12", "[127.0.0.1]"), ("ct_host.example.org", "[127.0.0.1]"), ("t-1.example.org", "t-1.example.org")],
)
def test_a_mail_server_that_takes_full_names_only_is_told_one_or_our_address(
    mail: tuple[MailServer, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, name: str, shown: str
) -> None:
    server, fields = mail
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    send(EmailRule(**fields | {"host": "127.0.0.1"}))
    assert server.names[-1] == shown and len(server.to(TO)) == 1


def test_a_wrong_password_a_refused_recipient_and_a_refused_message_are_told_in_words(
    mail: tuple[MailServer, dict[str, Any]],
) -> None:
    server, fields = mail
    words = str(failure(EmailRule(**fields | {"password": "wrong-secret"})))
    assert "refuses the login: 535" in words and "wrong-secret" not in words
    server.refused.add("gone@example.org")
    assert "refuses the recipient: 550 5.1.1 no such user here" in str(
        failure(EmailRule(**fields), made("gone@example.org"))
    )
    server.answer = "452 4.2.2 mailbox is full"
    assert "refuses the message: 452 4.2.2 mailbox is full" in str(failure(EmailRule(**fields)))
    assert server.messages == []


@pytest.mark.parametrize("without", [(), ("PLAIN",), ("PLAIN", "LOGIN")])
def test_a_login_may_have_letters_beyond_ascii(without: tuple[str, ...], tmp_path: Path) -> None:
    with smtp(tmp_path, without=without) as server:
        rule = EmailRule(
            host="localhost", port=server.port, ca_cert=str(server.ca), sender="talaria@example.org", to=[TO],
            user=ODD_USER, password=ODD_PASSWORD,
        )  # fmt: skip
        if len(without) < 2:
            send(rule)
            assert len(server.to(TO)) == 1
            rule.password = SecretStr("schwarzes Käse")
            assert "refuses the login: 535" in str(failure(rule))
        else:
            assert "neither AUTH PLAIN nor LOGIN" in str(failure(rule))


def test_a_mail_server_is_trusted_only_by_its_certificate(
    mail: tuple[MailServer, dict[str, Any]], tmp_path: Path
) -> None:
    server, fields = mail
    other = Authority(tmp_path / "other")
    words = str(failure(EmailRule(**fields | {"ca_cert": str(other.ca)})))
    assert "its certificate is not trusted" in words and "ca_cert" in words
    assert server.asked == []  # nothing was said before


def test_a_mail_server_that_is_down_silent_or_slow_costs_a_try(
    mail: tuple[MailServer, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, fields = mail
    assert "can't be reached" in str(failure(EmailRule(**fields | {"port": free_port()})))
    server.delay_s = 3600
    monkeypatch.setattr(mailing, "TAKEN_S", 0.1)  # and not what it may take to answer anything else
    assert "no answer to the whole message within 0.1 s" in str(failure(EmailRule(**fields | {"timeout_s": 60})))
    monkeypatch.setattr(mailing, "TAKEN_S", 80.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        words = str(failure(EmailRule(**fields | {"port": silent.getsockname()[1], "timeout_s": 0.5})))
        assert "no answer within 0.5 s" in words
    monkeypatch.setattr(sending, "MOST_S", 0.5)
    assert "it took longer" in str(failure(EmailRule(**fields | {"timeout_s": 60})))


def test_a_message_is_sent_when_it_is_taken_also_where_the_server_does_not_let_us_go(
    mail: tuple[MailServer, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would come again and again, at each try."""
    server, fields = mail
    server.stays = True

    async def late() -> None:
        async with asyncio.timeout(None) as end:
            sent = asyncio.create_task(sending.send(EmailRule(**fields).named("ops"), made()))
            await asyncio.to_thread(server.quitting.wait, 60)
            end.reschedule(0)  # the time for a try is up just then
            await sent

    monkeypatch.setattr(mailing, "QUIT_S", 3600.0)
    asyncio.run(late())
    monkeypatch.setattr(mailing, "QUIT_S", 0.1)
    send(EmailRule(**fields))
    assert len(server.to(TO)) == 2


@contextmanager
def odd_server(*answers: bytes, endless: bool = False) -> Iterator[tuple[int, threading.Event]]:
    """A server that gives these answers, one to each line; an endless one repeats the first until it is hung up on."""
    broken, over = threading.Event(), threading.Event()

    def flood(sock: socket.socket, answer: bytes) -> None:
        sock.setblocking(False)
        while not over.is_set():
            readable, writable, _ = select.select([sock], [sock], [], 0.1)
            try:
                if readable and not sock.recv(65_536):
                    broken.set()
                    return
                if writable:
                    sock.send(answer)
            except BlockingIOError:
                continue
            except ConnectionError:  # a reset, where the other side has left something unread
                broken.set()
                return

    def serve(sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as lines, suppress(OSError):
            for answer in answers:
                if endless:
                    flood(sock, answer)
                    return
                sock.sendall(answer)
                lines.readline()

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: serve(listener.accept()[0]))
        yield listener.getsockname()[1], broken
        over.set()


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([b"554 too many\x1b[31m of you\r\n"], "refuses the connection: 554 too many [31m of you"),
        ([b"220 hi\r\n", b"250 AUTH GSSAPI\r\n"], ": SMTP AUTH extension not supported"),
        ([b"220 hi\r\n", b"250-hi\r\n250 AUTH GSSAPI\r\n"], ": No suitable authentication method"),
        ([b"220 hi\r\n", b"250-hi\r\n250 AUTH CRAM-MD5\r\n", b"334 abcde\r\n"], "can't be understood"),
    ],
)
def test_a_mail_server_that_makes_no_sense_costs_a_try(answers: list[bytes], words: str) -> None:
    with odd_server(*answers) as (port, _):
        rule = EmailRule(
            host="127.0.0.1",
            port=port,
            security="none",
            sender="t@example.org",
            to=[TO],
            user="talaria",
            password="pass",
        )
        assert words in str(failure(rule))


@pytest.mark.parametrize("security", ["none", "tls"])
def test_a_mail_server_that_never_ends_is_hung_up_on(security: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "MOST_S", 0.5)
    piece = b"220-welcome\r\n" if security == "none" else b"\x16\x03\x03\x00\x04\x00\x00\x00\x00"  # a hello request
    with odd_server(piece, endless=True) as (port, broken):
        rule = EmailRule(host="127.0.0.1", port=port, security=security, sender="t@example.org", to=[TO])
        failure(rule)
        assert broken.wait(60)


def test_a_server_that_protects_otherwise_is_told_so(mail: tuple[MailServer, dict[str, Any]]) -> None:
    """The usual mistake: port 465 with starttls, or 587 with tls."""
    server, fields = mail
    other = {"tls": "starttls", "starttls": "tls"}[str(fields["security"])]
    words = str(failure(EmailRule(**fields | {"security": other, "timeout_s": 0.5})))
    assert f"set security to {fields['security']}" in words and server.asked == []


def test_a_server_without_starttls_gets_neither_password_nor_message(tmp_path: Path) -> None:
    with smtp(tmp_path, "none", login=False) as server:
        fields = {"host": "127.0.0.1", "port": server.port, "sender": "talaria@example.org", "to": [TO]}
        assert "STARTTLS" in str(failure(EmailRule(**fields, user=USER, password=PASSWORD)))
        assert server.asked == []
        send(EmailRule(**fields, security="none"))
        assert len(server.to(TO)) == 1


# ---- webhooks


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as one:
        yield one


def test_a_webhook_is_signed_and_its_id_is_the_same_in_each_try(hook: Receiver) -> None:
    rule = WebhookRule(url=hook.url, secret="whsec_" + base64.b64encode(b"key of ours").decode(), token="tok")
    for _ in range(2):
        send(rule, made(""))
    one, two = hook.taken
    assert one.headers["webhook-id"] == two.headers["webhook-id"] == one.document["id"] == made("").id
    signed = f"{one.headers['webhook-id']}.{one.headers['webhook-timestamp']}.".encode() + one.body
    expected = base64.b64encode(hmac.digest(b"key of ours", signed, hashlib.sha256)).decode()
    assert one.headers["webhook-signature"] == f"v1,{expected}"
    assert one.headers["authorization"] == "Bearer tok" and one.headers["content-type"] == "application/json"
    assert one.document["events"][0]["target"] == "pacs" and one.document["events"][0]["count"] == 2
    assert abs(int(one.headers["webhook-timestamp"]) - time.time()) < 300


def test_a_webhook_with_a_plain_key_and_one_without(hook: Receiver) -> None:
    send(WebhookRule(url=hook.url, secret="plain"), made(""))
    send(WebhookRule(url=hook.url), made(""))
    one, two = hook.taken
    signed = f"{one.headers['webhook-id']}.{one.headers['webhook-timestamp']}.".encode() + one.body
    expected = base64.b64encode(hmac.digest(b"plain", signed, hashlib.sha256)).decode()
    assert one.headers["webhook-signature"] == f"v1,{expected}" and "webhook-signature" not in two.headers


def test_answers_other_than_success_are_failures_and_redirects_lead_nowhere(hook: Receiver) -> None:
    rule = WebhookRule(url=hook.url + "?key=hidden-key", token="hidden-token")
    hook.status = 500
    assert "answers 500" in str(failure(rule))
    hook.status, hook.retry_after = 429, "120"
    refused = failure(rule)
    assert "answers 429" in str(refused) and refused.after_s == 120
    hook.retry_after = format_datetime(datetime.now(UTC) + timedelta(hours=2), usegmt=True)
    assert 7000 < failure(rule).after_s <= 7200, "a date, as RFC 9110 allows"
    for key in ("whsec_", "whsec_Schlüssel"):  # anybody could sign with an empty one
        assert "is not base64: correct secret" in str(failure(WebhookRule(url=hook.url, secret=key)))
    for odd in ("http://xn--a.b/", f"http://127.0.0.1:9/{'x' * 70_000}"):
        assert "url can't be used" in str(failure(WebhookRule(url=odd)))
    hook.retry_after = "soon"
    assert failure(rule).after_s == 0
    with receiver() as elsewhere:
        hook.status, hook.location = 307, elsewhere.url
        words = str(failure(rule))
        assert "redirects are not followed" in words and elsewhere.url not in words
        assert elsewhere.asked == []
    assert "hidden" not in words


def test_a_receiver_that_is_down_silent_or_not_trusted(hook: Receiver, tmp_path: Path) -> None:
    assert "can't be reached" in str(failure(WebhookRule(url=f"http://127.0.0.1:{free_port()}/")))
    hook.hold.set()
    assert "no answer within 0.3 s" in str(failure(WebhookRule(url=hook.url, timeout_s=0.3)))
    authority = Authority(tmp_path / "ca")
    with receiver(authority) as secured:
        send(WebhookRule(url=secured.url, ca_cert=str(authority.ca)), made(""))
        assert len(secured.taken) == 1
        assert "certificate" in str(failure(WebhookRule(url=secured.url)))
        assert len(secured.asked) == 1


def test_the_environment_s_proxy_gets_nothing(hook: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        send(WebhookRule(url=hook.url), made(""))
        assert len(hook.taken) == 1 and proxy.asked == []


def test_a_webhook_goes_by_way_of_the_proxy_of_its_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in most hospitals, which let nothing out otherwise."""
    authority, login = Authority(tmp_path / "ca"), f"{PROXY_USER}:{PROXY_PASSWORD}@"
    with receiver(authority) as secured, receiver() as plain, tinyproxy(tmp_path / "p", password=PROXY_PASSWORD) as way:
        at = f"127.0.0.1:{way.port}"
        for hook in (secured, plain):
            given = {"url": hook.url, "ca_cert": str(authority.ca)}
            send(WebhookRule(**given, proxy=f"http://{login}{at}"), made(""))
            assert len(hook.taken) == way.seen(hook.port) == 1
            words = str(failure(WebhookRule(**given, proxy=f"http://{PROXY_USER}:wr0ng@{at}"), made("")))
            assert "40" in words or "proxy" in words, words
            assert "wr0ng" not in words and len(hook.taken) == 1
        monkeypatch.setenv("HTTPS_PROXY", f"http://{login}{at}")
        for excepted, seen in (("", 1), ("127.0.0.1", 0)):
            monkeypatch.setenv("NO_PROXY", excepted)
            before = way.seen(secured.port)
            send(WebhookRule(url=secured.url, ca_cert=str(authority.ca), proxy="environment"), made(""))
            assert way.seen(secured.port) - before == seen


# ---- commands


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir(mode=0o755)
    monkeypatch.setenv("TALARIA_NOTIFY_COMMANDS", str(folder))
    return folder


def program(folder: Path, text: str, name: str = "page") -> CommandRule:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return CommandRule(command=name, arguments=["one", "two; touch evil"])


def test_a_program_gets_the_message_and_nothing_of_our_environment(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_SERVER_ENCRYPTION_KEY", "swordfish")
    out = tmp_path / "out"
    rule = program(programs, f'cat > {out}; env > {out}.env; printf "%s|" "$@" > {out}.args')
    send(rule, made(""))
    assert json.loads(out.read_text())["events"][0]["cause"] == "outage"
    env = Path(f"{out}.env").read_text()
    assert "swordfish" not in env and "TALARIA_RULE=ops" in env
    assert Path(f"{out}.args").read_text() == "one|two; touch evil|"


def test_a_program_that_fails_or_hangs_is_killed_with_all_that_it_started(programs: Path, tmp_path: Path) -> None:
    words = str(failure(program(programs, "echo no pager; exit 3")))
    assert "ended with exit code 3: no pager" in words
    pid = tmp_path / "pid"
    rule = program(programs, f"sleep 3600 & echo $! > {pid}.part; mv {pid}.part {pid}; wait", "hangs")
    rule.timeout_s = 2.0
    assert "had not ended after 2 s" in str(failure(rule))
    child = int(pid.read_text())
    end = time.monotonic() + 60
    while _runs(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_a_program_prints_fills_no_disk(programs: Path, tmp_path: Path) -> None:
    """Only the end of it is of use. What the program has started may live on, with its output open."""
    pid = tmp_path / "pid"
    started = f"sleep 3600 & echo $! > {pid}"
    size = "stat -L -c 'it takes %s bytes' /proc/$$/fd/1"
    rule = program(programs, f"head -c 100000000 /dev/zero; echo; {started}; {size}; exit 7")
    assert "ended with exit code 7: it takes 0 bytes" in str(failure(rule))
    os.kill(int(pid.read_text()), signal.SIGKILL)


def test_a_folder_of_programs_on_a_share_that_is_silent_holds_nobody_up(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over, stat, rule = threading.Event(), os.stat, program(programs, "true")

    def hangs(path: Any, *args: Any, **more: Any) -> os.stat_result:
        if str(path).startswith(str(programs)):
            over.wait(120)
        return stat(path, *args, **more)

    monkeypatch.setattr(silent, "LOOK_S", 0.1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", hangs)
        assert "its file system does not answer" in str(failure(rule))
        over.set()
    until(lambda: not silent._is_silent(str(programs)))
    send(rule)


def test_only_programs_of_the_administrator_s_folder_are_run(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = program(programs, "true")
    send(rule)
    (programs / "page").chmod(0o777)
    assert "can be changed by other users" in str(failure(rule))
    (programs / "page").chmod(0o644)
    assert "no program that can be run" in str(failure(rule))
    assert "has no program other" in str(failure(CommandRule(command="other")))
    monkeypatch.delenv("TALARIA_NOTIFY_COMMANDS")
    assert "TALARIA_NOTIFY_COMMANDS" in str(failure(rule))
    for name in ("../page", "/bin/sh", ".hidden", "a/b", ""):
        with pytest.raises(ValueError, match="command"):
            CommandRule(command=name)
    assert os.listdir(programs) == ["page"]
