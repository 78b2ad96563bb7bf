"""A Prefect server elsewhere, as `talaria up` and the commands look for it."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from talaria.errors import ServerError
from talaria.server import answers, healthy
from tests.servers.certificates import Authority, Leaf


@pytest.mark.parametrize("fault", ["", "unknown", "expired", "no file"])
def test_a_prefect_server_elsewhere_is_verified_as_its_clients_do(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An authority of one's own was taken for a server that is away, and `up` waited for it."""
    authority = Authority(tmp_path / "ca")
    file = {"unknown": "", "no file": str(tmp_path / "gone.pem")}.get(fault, str(authority.ca))
    monkeypatch.setenv("PREFECT_API_SSL_CERT_FILE", file)
    words = {"unknown": "self-signed|unable to get", "expired": "has expired", "no file": "gone.pem can't be used"}
    with secured(authority.leaf("server", expired=fault == "expired")) as url:
        if not fault:
            assert answers(url)
            return
        with pytest.raises(ServerError, match=words[fault]):
            answers(url)
        assert not healthy(url)


@pytest.mark.parametrize("unverified", [False, True])
def test_no_authority_of_the_system_alone_vouches_for_a_prefect_server(
    unverified: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect's clients don't know those: `up` found the server, and waited for ever as these did not."""
    authority = Authority(tmp_path / "ca")
    for name in ("PREFECT_API_SSL_CERT_FILE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    system = tmp_path / "system"
    system.mkdir()
    shutil.copy(authority.ca, system / "authority.pem")
    subprocess.run(["openssl", "rehash", str(system)], check=True, timeout=60)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path if unverified else system))
    monkeypatch.setenv("PREFECT_API_TLS_INSECURE_SKIP_VERIFY", "true" if unverified else "")
    with secured(authority.leaf("server")) as url:
        if unverified:
            assert answers(url)
        else:
            with pytest.raises(ServerError, match="is not trusted"):
                answers(url)


@pytest.mark.parametrize("url", ["localhost:4200/api", "htps://localhost:4200/api", "//localhost:4200/api"])
def test_what_is_no_url_of_a_prefect_server_is_not_waited_for(url: str) -> None:
    """It was taken for one of a server that is away."""
    with pytest.raises(ServerError, match="PREFECT_API_URL="):
        answers(url)


@contextmanager
def secured(leaf: Leaf) -> Iterator[str]:
    """A server that says that all is well, with this certificate; yields its URL."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(leaf.cert, leaf.key)
    with ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"https://127.0.0.1:{server.server_address[1]}/api"
        finally:
            server.shutdown()


class Health(BaseHTTPRequestHandler):
    """Says that all is well."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keep quiet."""
