"""Fields of a DICOMweb target."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from prefect.testing.standard_test_suites import BlockStandardTestSuite
from pydantic import ValidationError

from blocks.dicomweb import DicomWebTarget
from tasks.dicomweb import driver
from tests.targets.dicomweb_target.services import PASSWORD, TOKEN


class TestBlock(BlockStandardTestSuite):
    @pytest.fixture
    def block(self) -> type[DicomWebTarget]:
        return DicomWebTarget

    def test_has_a_valid_image(self, block: Any) -> None:
        """Fetching it needs the internet: only its form is looked at."""
        assert str(block._logo_url).startswith("https://")


@pytest.mark.parametrize(
    "fields",
    [
        {"url": "http://pacs/dicom-web"},
        {"url": "https://pacs.example.org:8443/a/b/"},
        {"url": "http://[::1]:8042/dicom-web"},
        {"url": "file:///data/dicom"},
        {"url": "file://localhost/data/My%20Files"},
        {"url": "http://pacs", "http_user": "u", "http_password": "p:ä"},
        {"url": "http://pacs", "http_user": "u"},
        {"url": "http://pacs", "access_token": TOKEN},
        {"url": "http://pacs", "token_url": "https://login/t?x=1", "client_id": "c", "client_secret": "s"},
        {"url": "http://pacs", "stow_url_prefix": "/rs/store/", "qido_url_prefix": "q", "wado_url_prefix": ""},
    ],
)
def test_good_fields(fields: dict[str, Any]) -> None:
    DicomWebTarget(**fields)


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({}, "url"),
        ({"url": ""}, "must begin with"),
        ({"url": "pacs/dicom-web"}, "must begin with http"),
        ({"url": "ftp://pacs"}, "must begin with http"),
        ({"url": "http://"}, "names no host"),
        ({"url": f"http://lab:{PASSWORD}@pacs/x"}, "use http_user and http_password"),
        ({"url": "http://pacs/x?y=1"}, "remove what follows"),
        ({"url": "http://pacs/x#y"}, "remove what follows"),
        ({"url": "http://pa cs/x"}, "without blanks"),
        ({"url": "http://pacs/x\r\nHost: y"}, "without blanks"),
        ({"url": "http://pacs:99999/"}, "not a URL"),
        ({"url": "http://pacs/a/../b"}, "'..'"),
        ({"url": "file://server/share"}, "three slashes"),
        ({"url": "file:///data?x"}, "%3F"),
        ({"url": "file:data"}, "three slashes"),
        ({"url": "file:///da\nta"}, "control characters"),
        ({"url": "file:///da%0Ata"}, "control characters"),
        ({"url": "http://pacs", "stow_url_prefix": "http://other/rs"}, "path below url"),
        ({"url": "http://pacs", "qido_url_prefix": "a/../../b"}, "'..'"),
        ({"url": "http://pacs", "http_user": "u", "access_token": TOKEN}, "one way to authorize"),
        ({"url": "http://pacs", "http_password": PASSWORD}, "without http_user"),
        ({"url": "http://pacs", "http_user": "a:b"}, "colon"),
        ({"url": "http://pacs", "http_user": "a\nb"}, "control characters"),
        ({"url": "http://pacs", "access_token": "Bearer abc"}, "without line breaks and the word Bearer"),
        ({"url": "http://pacs", "token_url": "https://login/t"}, "needs client_id"),
        ({"url": "http://pacs", "client_id": "c", "client_secret": "s"}, "need token_url"),
        ({"url": "http://pacs", "tls_key": "k"}, "tls_cert"),
        ({"url": "file:///data", "http_user": "u"}, "no meaning for a folder"),
        ({"url": "http://pacs", "batch_bytes": 0}, "greater than or equal"),
        ({"url": "http://pacs", "batch_items": 0}, "greater than or equal"),
        ({"url": "http://pacs", "nonsense": 1}, "nonsense"),
    ],
)
def test_bad_fields(fields: dict[str, Any], advice: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DicomWebTarget(**fields)
    assert advice in str(caught.value)
    assert PASSWORD not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_defaults_and_names() -> None:
    target = DicomWebTarget(url="HTTPS://pacs/rs/")
    assert target.url == "https://pacs/rs"
    assert (target.batch_bytes, target.batch_items, target.concurrency) == (20_000_000, 100, 4)
    assert target.can_query
    assert target.folder is None
    for url, folder in (
        ("file:///data/My%20Files", "/data/My Files"),
        ("FILE:///data/My Files", "/data/My Files"),
        ("file:///data/f%C3%B6%20100%25/ö+%2B;[x]", "/data/fö 100%/ö++;[x]"),
        ("file:///data/caf%E9", os.fsdecode(b"/data/caf\xe9")),
        ("file:///data/a%3Fb%23c", "/data/a?b#c"),
    ):
        assert DicomWebTarget(url=url).folder == Path(folder)
    assert driver.facts.dicom_only


def test_secrets_are_not_shown() -> None:
    secrets: dict[str, Any] = {"http_password": PASSWORD, "tls_cert": "c", "tls_key": "k3y-text"}
    target = DicomWebTarget(url="http://pacs", http_user="u", **secrets)
    for text in (repr(target), str(target), target.model_dump_json()):
        assert PASSWORD not in text
        assert "k3y-text" not in text
