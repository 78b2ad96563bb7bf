"""TLS as every protocol here uses it: contexts from paths or PEM text, and the cause of a failed handshake.

Sources: PS3.15 Annex B.9 and B.10 (BCP 195 profiles), RFC 9325 (BCP 195), RFC 8446 section 6 (alerts).
"""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transfer.errors import Denied, DispatchError, Interrupted, Misconfigured, NotTrusted

DAY_S = 86_400
MOST_CHARS, MOST_NAMES = 300, 50  # of what a peer's certificate says
# TLS 1.2 suites of RFC 9325 section 4.2: forward secrecy and authenticated encryption. TLS 1.3 has no others.
STRICT_SUITES = "ECDHE+AESGCM:DHE+AESGCM"
# Beside them, for peers of the first BCP 195 profile (RFC 7525): ChaCha20, and CBC with SHA-2.
SUITES = STRICT_SUITES + ":ECDHE+CHACHA20:ECDHE+AES+SHA256:ECDHE+AES+SHA384:DHE+AES+SHA256"
# For peers that know neither: TLS 1.0 and later, key exchange by RSA, short keys. An explicit choice.
LEGACY_SUITES = SUITES + ":ECDHE+AES:DHE+AES:RSA+AES:ECDHE+3DES:RSA+3DES:!aNULL:!eNULL:@SECLEVEL=0"
NONDOWNGRADING, LEGACY = "bcp195-nondowngrading", "legacy"
MOST_OFFERED = 8  # cipher suites that a peer is asked for, one handshake each

# X509_V_ERR_* of OpenSSL's x509_vfy.h, in the words of somebody who must do something about it.
_EXPIRED, _NOT_YET_VALID, _REVOKED = 10, 9, 23
_WRONG_NAME = (62, 64)  # host name, IP address
_UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21, 24)

# Alerts by which a peer refuses our certificate or the want of one (OpenSSL's names of RFC 8446's).
_NO_CERTIFICATE = ("CERTIFICATE_REQUIRED", "PEER_DID_NOT_RETURN_A_CERTIFICATE")
_OUR_CERTIFICATE = ("BAD_CERTIFICATE", "UNSUPPORTED_CERTIFICATE", "CERTIFICATE_REVOKED", "CERTIFICATE_EXPIRED",
                    "CERTIFICATE_UNKNOWN", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT_ERROR")  # fmt: skip
_VERSION = ("PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "INAPPROPRIATE_FALLBACK")
# What OpenSSL says when the first bytes of the answer are no TLS record.
_PLAIN = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "UNEXPECTED_MESSAGE", "RECORD_LAYER_FAILURE",
          "PACKET_LENGTH_TOO_LONG", "BAD_RECORD_TYPE")  # fmt: skip


@dataclass(frozen=True)
class Tls:
    """The settings of our side of a TLS connection; paths, or PEM text.

    Attributes:
        ca: authorities that may vouch for the peer; the system's trust store if empty.
        cert: our certificate and its chain, if the peer asks for one.
        key: its private key; empty if it is in `cert`.
        key_password: of an encrypted key.
        verify_hostname: whether the peer's certificate must be for the host that we connect to.
        profile: `bcp195`, `bcp195-nondowngrading` for its strictest suites only, or `legacy` for old peers.
    """

    ca: str = ""
    cert: str = ""
    key: str = field(default="", repr=False)
    key_password: str = field(default="", repr=False)
    verify_hostname: bool = True
    profile: str = "bcp195"

    def client(self) -> ssl.SSLContext:
        """Return a context to connect with; the same one every time.

        Raises:
            Misconfigured: a file is missing or not valid; the message names the setting.
        """
        return self._client

    @cached_property
    def _client(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = self.verify_hostname
        self._fill(context)
        return context

    def server(self) -> ssl.SSLContext:
        """Return a context to listen with; the peer must show a certificate that `ca` vouches for.

        Raises:
            Misconfigured: as for `client`, or there is no certificate to show.
        """
        if not self.cert:
            raise Misconfigured("listening with TLS needs tls_cert and tls_key")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        self._fill(context)
        return context

    def _fill(self, context: ssl.SSLContext) -> None:
        if self.profile == LEGACY:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # that is what the profile is for
                context.minimum_version = ssl.TLSVersion.TLSv1
            context.set_ciphers(LEGACY_SUITES)
        else:
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers(STRICT_SUITES if self.profile == NONDOWNGRADING else SUITES)
        if self.ca:
            load_ca(context, self.ca)
        else:
            context.load_default_certs(
                ssl.Purpose.CLIENT_AUTH if context.protocol == ssl.PROTOCOL_TLS_SERVER else ssl.Purpose.SERVER_AUTH
            )
        if self.cert:
            load_cert(context, self.cert, self.key, self.key_password)


def offered(settings: Tls, shake: Callable[[ssl.SSLContext], ssl.SSLSocket]) -> tuple[str, list[str]]:
    """Return the cipher suites of a peer that has none in common with us, found by handshakes with profile `legacy`.

    Args:
        shake: connects and shakes hands; what it returns is closed.

    Returns:
        The TLS version and the names of suites; nothing if the profile doesn't help or suites are not the reason.
    """
    found: list[str] = []
    version = ""
    allowed = {suite["name"] for suite in settings.client().get_ciphers()}
    while len(found) < MOST_OFFERED:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        replace(settings, profile=LEGACY, ca="", verify_hostname=False)._fill(context)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # nothing is sent; it is asked what it speaks
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        if found:
            context.set_ciphers(":".join([LEGACY_SUITES, *(f"!{name}" for name in found)]))
        try:
            with shake(context) as sock:
                cipher = sock.cipher()
                version = version or sock.version() or ""
        except (OSError, DispatchError):
            break
        if cipher is None or cipher[0] in found:
            break
        found.append(cipher[0])
    too_old = version in ("TLSv1", "TLSv1.1")
    return version, found if found and (too_old or allowed.isdisjoint(found)) else []


def load_ca(context: ssl.SSLContext, ca: str) -> None:
    """Trust these authorities: path of a PEM file or of a folder of hashed ones, or PEM text.

    A certificate in the list is trusted as it stands, be it an authority, an intermediate one or the peer's own.
    """
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        if is_pem(ca):
            context.load_verify_locations(cadata=ca)
        elif Path(ca).is_dir():
            context.load_verify_locations(capath=ca)
        else:
            context.load_verify_locations(cafile=ca)
    except ssl.SSLError as exc:
        raise Misconfigured(f"ca_cert: no PEM certificates in {_name(ca)}") from exc
    except (OSError, ValueError) as exc:
        raise Misconfigured(f"ca_cert: {_name(ca)} can't be read: {_reason(exc)}") from exc


def load_cert(context: ssl.SSLContext, cert: str, key: str = "", password: str = "") -> None:
    """Show this certificate to peers that ask for one: paths, or PEM text."""
    asked = []

    def secret() -> str:
        asked.append(True)
        return password

    files = [_PemFile("tls_cert", cert)] + ([_PemFile("tls_key", key)] if key else [])
    try:
        # The function keeps OpenSSL from asking for the password on the terminal.
        context.load_cert_chain(files[0].path, files[-1].path if key else None, password=secret)
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise Misconfigured("tls_key does not belong to tls_cert") from exc
        if asked:
            what = "tls_key_password is wrong" if password else "tls_key is encrypted: set tls_key_password"
            raise Misconfigured(what) from exc
        raise Misconfigured("tls_cert or tls_key is not in PEM form") from exc
    except (OSError, ValueError) as exc:
        raise Misconfigured(f"tls_cert or tls_key can't be read: {_reason(exc)}") from exc
    finally:
        for file in files:
            file.close()


class _PemFile:
    """A path to PEM text, of an existing file or of one in memory: OpenSSL's loader only takes files."""

    def __init__(self, setting: str, value: str) -> None:
        self.fd = -1
        if not is_pem(value):
            self.path = value
            if not Path(value).is_file():
                # A key that was pasted without its first line must not show up here.
                shown = "" if setting == "tls_key" else f" {_name(value)}"
                raise Misconfigured(f"{setting}: no such file{shown}")
            return
        self.fd = os.memfd_create(setting, os.MFD_CLOEXEC)
        os.write(self.fd, value.encode())
        self.path = f"/proc/self/fd/{self.fd}"

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def is_pem(value: str) -> bool:
    """Return True for the text of a certificate or key, False for the path of its file."""
    return "-----BEGIN" in value


def _name(value: str) -> str:
    return "the PEM text" if is_pem(value) else value


def _reason(exc: Exception) -> str:
    return exc.strerror or str(exc) if isinstance(exc, OSError) else str(exc)


def classify(exc: OSError, where: str, *, has_cert: bool = False) -> DispatchError:
    """Return the error for a handshake that failed, or for a connection that a TLS alert ended.

    Args:
        where: the peer, as `host:port`.
        has_cert: whether we had a certificate to show.
    """
    if isinstance(exc, ssl.SSLCertVerificationError):
        return NotTrusted(f"{where}: {_untrusted(exc)}")
    reason = (getattr(exc, "reason", None) or "").upper()
    if not isinstance(exc, ssl.SSLError) or isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return Interrupted(f"{where}: the peer closed the connection during the TLS handshake")
    if any(reason.endswith(name) for name in _NO_CERTIFICATE):
        return _wants_certificate(where, has_cert, reason)
    if "ALERT" in reason:
        return _alert(reason, where, has_cert)
    if any(name in reason for name in _PLAIN):
        return Misconfigured(
            f"{where}: the peer does not speak TLS on this port: use its TLS port, or a type of target without TLS"
        )
    if any(name in reason for name in _VERSION):
        return _too_old(where)
    return Misconfigured(f"{where}: TLS handshake failed: {reason.lower().replace('_', ' ') or exc}")


def _alert(reason: str, where: str, has_cert: bool) -> DispatchError:
    name = reason.rpartition("ALERT_")[2]
    if any(name.endswith(known) for known in _VERSION):
        return _too_old(where)
    if name in _OUR_CERTIFICATE:
        if not has_cert:
            return _wants_certificate(where, has_cert, name)
        return Denied(f"{where}: the peer refuses our certificate ({_words(name)}): see tls_cert and what it trusts")
    if name == "HANDSHAKE_FAILURE":
        if not has_cert:
            return Misconfigured(
                f"{where}: the peer ended the TLS handshake (handshake failure): it may ask for a client "
                "certificate (set tls_cert and tls_key), or have no cipher suite of this tls_profile"
            )
        return Denied(
            f"{where}: the peer ended the TLS handshake (handshake failure): it may not trust tls_cert, or have no "
            "cipher suite of this tls_profile"
        )
    if name == "UNRECOGNIZED_NAME":
        return Misconfigured(f"{where}: the peer does not answer for this host name: correct host")
    return Misconfigured(f"{where}: the peer ended the TLS handshake ({_words(name)})")


def _wants_certificate(where: str, has_cert: bool, name: str) -> DispatchError:
    if has_cert:
        return Denied(f"{where}: the peer refuses our certificate ({_words(name)}): see tls_cert and what it trusts")
    return Misconfigured(f"{where}: the peer asks for a client certificate: set tls_cert and tls_key")


def _too_old(where: str) -> DispatchError:
    return Misconfigured(f"{where}: the peer and this side share no TLS version: the peer must offer TLS 1.2 or later")


def _words(name: str) -> str:
    return name.rpartition("ALERT_")[2].lower().replace("_", " ")


def _untrusted(exc: ssl.SSLCertVerificationError) -> str:
    code, text = exc.verify_code, exc.verify_message
    if code in _WRONG_NAME:
        return f"wrong name in the peer's certificate: {text.rstrip('.')}; correct host, or turn verify_hostname off"
    if code == _EXPIRED:
        return "the peer's certificate has expired: it must be renewed there"
    if code == _NOT_YET_VALID:
        return "the peer's certificate is not valid yet: compare the clocks of both machines"
    if code == _REVOKED:
        return "the peer's certificate has been revoked"
    if code in _UNKNOWN_AUTHORITY:
        return f"the peer's certificate comes from an unknown authority ({text}): set ca_cert to the one that signed it"
    return f"the peer's certificate is not accepted: {text}"


def peer_facts(sock: ssl.SSLSocket) -> str:
    """Return one line for a check: version, cipher suite, the certificate's owner, days to its expiry."""
    cipher = sock.cipher()
    parts = [sock.version() or "TLS", cipher[0] if cipher else "no cipher"]
    cert: dict[str, Any] = sock.getpeercert() or {}
    subject = {key: value for pairs in cert.get("subject", ()) for key, value in pairs}
    if subject:
        parts.append("certificate of " + (subject.get("commonName") or ", ".join(subject.values())))
    if "notAfter" in cert:
        days = (ssl.cert_time_to_seconds(cert["notAfter"]) - time.time()) / DAY_S
        parts.append(f"expires in {days:.0f} days")
    return ", ".join(parts)


def certificate(der: bytes) -> dict[str, Any]:
    """Return what people compare of a certificate; {} if it can't be read.

    Returns:
        `subject`, `issuer`, `names` (hosts and addresses that it is for), `expires` (ISO 8601), `days` until then (less
        than 0: since then), `fingerprint` (SHA-256, in pairs of digits as openssl writes it).
    """
    from cryptography import x509  # for checks only

    names: list[str] = []
    try:
        found = x509.load_der_x509_certificate(der)
        ends = found.not_valid_after_utc
        subject, issuer = found.subject.rfc4514_string(), found.issuer.rfc4514_string()
        with suppress(x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, ValueError):
            named = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            names = [str(one.value) for one in named if isinstance(one, x509.DNSName | x509.IPAddress)]
    except (x509.InvalidVersion, ValueError):
        return {}
    print_ = hashlib.sha256(der).hexdigest().upper()
    return {
        "subject": subject[:MOST_CHARS],
        "issuer": issuer[:MOST_CHARS],
        "names": [one[:MOST_CHARS] for one in names[:MOST_NAMES]],
        "expires": ends.isoformat(timespec="seconds"),
        "days": int((ends.timestamp() - time.time()) // DAY_S),
        "fingerprint": ":".join(print_[at : at + 2] for at in range(0, len(print_), 2)),
    }


def certificate_shown(sock: socket.socket, host: str, timeout_s: float) -> dict[str, Any]:
    """Return the certificate that a peer shows, whoever vouches for it; nothing is sent there. {} if it shows none.

    Args:
        sock: a new connection, which is closed.
        timeout_s: for each part of the answer.
    """
    sock.settimeout(timeout_s)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with context.wrap_socket(sock, server_hostname=host) as wrapped:
            return certificate(wrapped.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError):
        sock.close()
        return {}
