"""What is shown of a peer's certificate, whatever stands in it."""

from __future__ import annotations

import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from protocols.net.tls import certificate

ALTERNATIVE_NAME = x509.ObjectIdentifier("2.5.29.17")
BEGINS, ENDS = (datetime.datetime(year, 1, 1, tzinfo=datetime.UTC) for year in (2026, 2030))


def made(names: bytes) -> bytes:
    """Return a certificate whose alternative names are these bytes."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.OID_COMMON_NAME, "pacs")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 5, BEGINS, ENDS)
    builder = builder.add_extension(x509.UnrecognizedExtension(ALTERNATIVE_NAME, names), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (b"\x30\x06\x82\x04pacs", ["pacs"]),
        (b"\x30\x06\x87\x04\x7f\x00\x00\x01", ["127.0.0.1"]),
        (b"\x30\x04\xa5\x02\x81\x00", []),
        (b"\x30\x02\xa3\x00", []),
        (b"\x30\x01", []),
        (b"\x30\x07\x87\x05\x01\x02\x03\x04\x05", []),
    ],
    ids=["host", "address", "EDI party", "X.400", "cut", "address of five bytes"],
)
def test_a_certificate_with_odd_names_is_shown(names: bytes, shown: list[str]) -> None:
    found = certificate(made(names))
    assert (found["subject"], found["names"], found["expires"]) == ("CN=pacs", shown, "2030-01-01T00:00:00+00:00")


@pytest.mark.parametrize("der", [b"", b"\x30\x03\x02\x01\x00"])
def test_what_is_no_certificate_shows_nothing(der: bytes) -> None:
    assert certificate(der) == {}
