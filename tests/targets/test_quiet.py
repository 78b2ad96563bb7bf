"""What every type says passes one place: no secret, no patient's data, nothing of the peer where nothing is quoted."""

from __future__ import annotations

import base64
import threading
from pathlib import Path
from typing import Any

import pytest

from blocks.base import Target
from blocks.dicomweb import DicomWebTarget
from blocks.folder import FolderTarget
from blocks.xnat import XnatTarget
from talaria.testing import studies
from tasks.dispatch.delivery import Delivery
from tasks.driver import Driver
from tasks.quiet import Quiet
from transfer.errors import Busy, Denied, DispatchError, Misconfigured
from transfer.home import Home
from transfer.ledger import Ledger
from transfer.outcome import Kind, Outcome
from transfer.plan import Plan, scan
from transfer.receipt import PushReport, Receipt

SECRET = "hunter22-hunter22"
SAID = (
    f"no rights for {studies.PATIENT_NAME.replace('^', '  ')}, {studies.PATIENT_ID}, acc {studies.ACCESSION.lower()}, "
    f"{SECRET}, {base64.b64encode(f'anna:{SECRET}'.encode()).decode()}: status 403, A700"
)


def web(**fields: Any) -> Target:
    made = DicomWebTarget(url="http://127.0.0.1:9", http_user="anna", http_password=SECRET, **fields)
    return made.named("pacs")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    studies.dicom(tmp_path / "study" / "1.dcm")
    studies.dicom(tmp_path / "study" / "2.dcm")
    return scan([tmp_path / "study"])


def assert_quiet(text: str) -> None:
    for private in (*studies.PHI, SECRET, base64.b64encode(SECRET.encode()).decode()[4:-4]):
        assert private.casefold() not in text.casefold()


def delivered(target: Target, plan: Plan, home: Path, error: DispatchError) -> tuple[Delivery, Receipt]:
    """Deliver by a driver that reports one item with what a peer said, and then fails with it."""

    def push(_: Any, plan: Plan, report: PushReport) -> Receipt:
        report(plan.items[0], Outcome(Kind.REJECTED, SAID))
        report.put_off[plan.items[1].path] = SAID
        raise error from ValueError(SAID)

    driver = Driver(target=type(target), check=lambda _: None, push=push)  # type: ignore[arg-type,return-value]
    with Ledger(home / "ledger") as ledger:
        delivery = Delivery(driver, target, plan, ledger, Home(home), threading.Event())
        with pytest.raises(DispatchError) as caught:
            delivery.push()
        assert caught.value.__cause__ is None
        assert_quiet(f"{caught.value} {caught.value!r}")
        receipt = delivery.receipt()
    assert_quiet(repr(receipt) + repr(receipt.items) + " ".join(delivery.failures))
    return delivery, receipt


@pytest.mark.parametrize("kind", [Busy, Denied, Misconfigured])
def test_what_passes_a_delivery(tmp_path: Path, plan: Plan, kind: type[DispatchError]) -> None:
    delivery, receipt = delivered(web(), plan, tmp_path, kind(SAID))
    assert delivery.error is not None
    assert delivery.error.message.startswith("no rights for ***")
    assert delivery.error.message.endswith(": status 403, A700")
    assert all("403, A700" in item.detail for item in receipt.items)


@pytest.mark.parametrize("kind", [Busy, Denied, Misconfigured])
def test_nothing_is_quoted_where_the_target_says_so(tmp_path: Path, plan: Plan, kind: type[DispatchError]) -> None:
    delivery, receipt = delivered(web(quote_peer="none"), plan, tmp_path, kind(SAID))
    assert delivery.error is not None
    for text in (delivery.error.message, receipt.error or "", *(item.detail for item in receipt.items)):
        assert "no rights" not in text
        assert "403, A700" in text
    assert "quote_peer" in delivery.error.message


def test_every_type_has_the_option() -> None:
    from tasks import DRIVERS

    for name in DRIVERS:
        assert str(DRIVERS[name].target.model_fields["quote_peer"].default) == "short", name


def test_our_own_words_stay(tmp_path: Path) -> None:
    quiet = Quiet(FolderTarget(folder=str(tmp_path), quote_peer="none").named("archive"))
    changed = Outcome(Kind.REJECTED, "changed since the dispatch was planned")
    assert quiet.outcome(changed) == changed
    assert quiet.outcome(Outcome(Kind.WARNING, "stored under another UID, 1.2")).elsewhere


def test_a_probe_that_fails(tmp_path: Path) -> None:
    for target in (web(), XnatTarget(host="http://127.0.0.1:9", project_id="p", user="anna", password=SECRET)):
        assert_quiet(Quiet(target).text(f"401: {SECRET} {base64.b64encode(SECRET.encode()).decode()}"))


def test_short_numbers_of_patients_are_no_status(tmp_path: Path) -> None:
    studies.dicom(tmp_path / "1.dcm", PatientID="403", AccessionNumber="7000123")
    quiet = Quiet(web(), scan([tmp_path]))
    assert quiet.text("status 403 for 7000123") == "status 403 for ***"


def test_where_a_key_lies_and_the_proxy_are_no_secrets() -> None:
    for proxy in ("http://anna:s3cr%40t-word@proxy.example:3128", "environment"):
        target = web(proxy=proxy, tls_key="/etc/keys/talaria.pem", tls_cert="/etc/keys/talaria.crt")
        text = "/etc/keys/talaria.pem: by way of http://proxy.example:3128, set in the environment"
        assert Quiet(target).text(text) == text
    target = web(proxy="http://anna:s3cr%40t-word@proxy.example:3128")
    shown = Quiet(target).text("http://anna:s3cr%40t-word@proxy.example:3128 says s3cr@t-word")
    assert shown == "http://anna:***@proxy.example:3128 says ***"
