"""The types of target as Prefect blocks: described, validated, saved and loaded, secrets masked."""

from __future__ import annotations

from typing import Any

import pytest
from prefect.blocks.core import Block
from prefect.testing.standard_test_suites import BlockStandardTestSuite
from pydantic import SecretStr, ValidationError

from blocks import TYPES, Target
from blocks.dicom_tls import DicomTlsTarget
from talaria import targetfile
from tasks import DRIVERS
from tests.targets.fields import NEEDED, SECRET, filled, secrets_of
from transfer.errors import Misconfigured


@pytest.mark.parametrize("name", NEEDED)
class TestEveryBlock(BlockStandardTestSuite):
    @pytest.fixture
    def block(self, name: str) -> type[Block]:
        return TYPES[name]

    @pytest.fixture(autouse=True)
    def _each_by_name(self, name: str) -> None:
        """Run every test of the suite for every type."""

    def test_has_a_valid_image(self, block: type[Block]) -> None:
        assert str(block._logo_url).startswith("https://")  # not fetched: tests have no network

    def test_has_what_every_target_has(self, block: type[Block]) -> None:
        for field in Target.model_fields:
            assert field in block.model_fields

    def test_hides_its_secrets(self, name: str) -> None:
        target = filled(name)
        for text in (repr(target), str(target), target.model_dump_json(), repr(target.model_dump())):
            assert SECRET not in text
        for field in secrets_of(type(target)):
            assert isinstance(getattr(target, field), SecretStr | type(None))

    def test_refuses_unknown_fields_and_directions_that_it_has_not(self, name: str) -> None:
        with pytest.raises(ValidationError):
            TYPES[name](**NEEDED[name], colour="red")
        if not TYPES[name].can_query:
            with pytest.raises(ValidationError, match="query"):
                TYPES[name](**NEEDED[name], direction="query")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("contact", "nobody"),
            ("max_attempts", 0),
            ("retry_delay_s", -1),
            ("connect_timeout_s", 0),
            ("idle_timeout_s", 0),
            ("concurrency", 0),
            ("max_dispatches", 0),
            ("bandwidth_limit", 0),
            ("window", "whenever"),
            ("window", "18:00-06:00 Mon-Fri Atlantis/Center"),
            ("verify", "hoped"),
            ("direction", "sideways"),
        ],
    )
    def test_refuses_wrong_values(self, name: str, field: str, value: Any) -> None:
        with pytest.raises(ValidationError, match=field):
            TYPES[name](**NEEDED[name], **{field: value})

    def test_defaults_are_those_of_the_design(self, name: str) -> None:
        target = TYPES[name](**NEEDED[name])
        assert (target.direction, target.contact, target.exclude, target.enabled) == ("store", "", "", True)
        assert (target.max_attempts, target.retry_delay_s, target.retry_max_delay_s) == (5, 30, 900)
        assert (target.connect_timeout_s, target.idle_timeout_s, target.max_dispatches) == (10, 60, 2)
        assert (target.bandwidth_limit, target.window, target.verify) == (None, None, "accepted")


@pytest.mark.parametrize("name", [n for n in NEEDED if "host" in TYPES[n].model_fields and n != "xnat"])
@pytest.mark.parametrize("host", ["-oProxyCommand=x", "a b", "", "a\nb", "$(id)", "a;b"])
def test_hosts_that_are_none_are_refused(name: str, host: str) -> None:
    with pytest.raises(ValidationError, match="host"):
        TYPES[name](**{**NEEDED[name], "host": host})


URLS = {"dicomweb": "url", "s3": "endpoint_url", "xnat": "host"}


@pytest.mark.parametrize("name", URLS)
@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("pacs/dicom-web", "must begin with http"),
        ("ftp://pacs", "must begin with http"),
        ("http://", "names no host"),
        ("http://pacs:0", "names no host"),
        ("http://pacs:99999", "not a URL"),
        ("http://[::1", "not a URL"),
        (f"http://lab:{SECRET}@pacs/x", "must not hold a user or password: use"),
        (f"http://{SECRET}@pacs/x", "must not hold a user or password: use"),
        ("http://pacs/x?y=1", "remove what follows"),
        ("http://pacs/x#y", "remove what follows"),
        ("http://pa cs/x", "without blanks"),
        ("http://pacs/x\r\nHost: y", "without blanks"),
        ("http://pacs/a/../b", "'..'"),
        ("http://-pacs/", "not a host name"),
    ],
)
def test_urls_that_are_not_valid(name: str, url: str, advice: str) -> None:
    with pytest.raises(ValidationError, match=URLS[name]) as caught:
        TYPES[name](**{**NEEDED[name], URLS[name]: url})
    assert advice in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", URLS)
def test_urls_are_kept_in_one_form(name: str) -> None:
    target = TYPES[name](**{**NEEDED[name], URLS[name]: " HTTPS://[::1]:8443/a%20b/ "})
    assert getattr(target, URLS[name]) == "https://[::1]:8443/a%20b"


@pytest.mark.parametrize("aet", ["", "A" * 17, "BACK\\SLASH", "TAB\t", "   "])
def test_ae_titles_that_are_none_are_refused(aet: str) -> None:
    with pytest.raises(ValidationError, match="aet_target"):
        TYPES["dicom"](host="h", aet_target=aet)


@pytest.mark.parametrize("aet", ["ARCHIVE", "My PACS.1", "A" * 16, "a-b_c"])
@pytest.mark.parametrize("host", ["10.0.0.1", "pacs_1.local", "::1", "fe80::1", "sender"])
def test_nodes_that_real_networks_have_are_taken(aet: str, host: str) -> None:
    assert TYPES["dicom"](host=host, aet_target=aet).aet_target == aet  # type: ignore[attr-defined]


def test_a_refused_value_is_not_repeated() -> None:
    with pytest.raises(Misconfigured) as caught:
        targetfile.make("a", {"type": "sftp", **NEEDED["sftp"], "password": SECRET, "port": "x"})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", TYPES)
def test_what_a_type_offers_is_what_its_driver_does(name: str) -> None:
    """The direction that a block takes, its text, and the functions of its driver, which `target types` lists."""
    driver, cls = DRIVERS[name], TYPES[name]
    can_query = driver.find is not None
    assert cls.can_query == can_query
    assert can_query == (driver.retrieve is not None)
    text = " ".join((cls.__doc__ or "").split())
    assert ("quer" in text) == can_query or issubclass(cls, DicomTlsTarget)  # whose text refers to DICOM's
