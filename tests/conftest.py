"""What every test starts from: an environment that names no certificates, proxies, credentials or servers."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile

import pytest

# They would override what a test, or a target, names itself. Tests of exactly that set them on their own.
AMBIENT = re.compile(
    r"(REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|SSL_CERT_(FILE|DIR)|NODE_EXTRA_CA_CERTS|(HTTPS?|ALL|FTP|NO|SOCKS)_PROXY"
    r"|AWS_.*|BOTO_CONFIG|SSH_(AUTH_SOCK|AGENT_PID|ASKPASS.*)|RSYNC_.*|TCP_NODELAY|DCMDICTPATH|PREFECT_.*|TALARIA_.*)",
    re.IGNORECASE,
)
KEPT = re.compile(r"TALARIA_TEST_.*|PREFECT_.*_LOGGING_.*", re.IGNORECASE)


def _clear() -> None:
    for name in [name for name in os.environ if AMBIENT.fullmatch(name) and not KEPT.fullmatch(name)]:
        del os.environ[name]
    # Metadata services of clouds don't answer here, and asking them takes seconds.
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    home = tempfile.mkdtemp(prefix="talaria-prefect-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ["PREFECT_HOME"] = home  # never the user's own settings and database


_clear()  # before any module of ours, or of a library, reads it at import


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give each test a home and a state directory of its own, so that none reads or writes the user's."""
    home = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("TALARIA_HOME", str(home / "talaria"))
