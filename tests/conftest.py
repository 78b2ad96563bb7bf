"""What every test starts from: an environment that names no certificates, proxies, credentials or servers."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

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


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can reach; pytest's own are closed to all but the one who runs it."""
    folder = Path(tempfile.mkdtemp(prefix="talaria-open-"))
    folder.chmod(0o777)
    yield folder
    for inner, _, _ in os.walk(folder):
        os.chmod(inner, 0o700)
    shutil.rmtree(folder)


NOBODY = 65534


@pytest.fixture
def as_nobody() -> Callable[[], AbstractContextManager[None]]:
    """Give up root's power over permissions for a while, if we have it."""

    @contextmanager
    def dropped() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        groups, group = os.getgroups(), os.getegid()
        os.setgroups([])
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(group)
            os.setgroups(groups)

    return dropped


# ---- tests that mount: `@pytest.mark.mounts` runs one in a mount namespace of its own, where it may

UNSHARED = "TALARIA_TEST_UNSHARED"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that mounts in a process whose mounts nobody else sees, and which end with it."""
    if pyfuncitem.get_closest_marker("mounts") is None or UNSHARED in os.environ:
        return None
    root = [] if os.geteuid() == 0 else ["--map-root-user"]
    ran = subprocess.run(
        [
            "unshare",
            *root,
            "--mount",
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            pyfuncitem.nodeid,
        ],
        cwd=pyfuncitem.config.rootpath,
        env={**os.environ, UNSHARED: "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
    return True


@pytest.fixture
def disk(tmp_path: Path) -> Callable[[str], Path]:
    """Mount a small file system in memory; its argument are mount(8)'s options, as in `size=2m`."""

    def mounted(options: str) -> Path:
        assert UNSHARED in os.environ, "mark the test with @pytest.mark.mounts"
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
        return folder

    return mounted
