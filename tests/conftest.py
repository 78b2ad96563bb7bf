"""What every test starts from: an environment that names no certificates, proxies, credentials or servers."""

from __future__ import annotations

import atexit
import functools
import gc
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import hypothesis
import pytest

from tests.dealing import Dealer, ordered, unit_of

# What passes once passes again: `make test` draws the same examples each time, `make test-all` new ones.
hypothesis.settings.register_profile("same", derandomize=True, database=None)
hypothesis.settings.load_profile("same")

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


# What a test leaves open at the end is closed by name; finalizers, which warn of it, come after that: the handler that
# runs them is registered with the first of them, and the first comes last.
weakref.finalize(_clear, str)

_clear()  # before any module of ours, or of a library, reads it at import


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop what tests share (servers, folders): a worker process of pytest-xdist ends without its exit handlers."""
    if hasattr(config, "workerinput"):
        atexit._run_exitfuncs()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Pass over what is imported and collected, half a million objects, whenever garbage is looked for."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


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
    for inner, folders, _ in os.walk(folder):  # a closed one is opened before it is looked into
        for name in folders:
            if not os.path.islink(os.path.join(inner, name)):
                os.chmod(os.path.join(inner, name), 0o700)
    shutil.rmtree(folder)


@pytest.fixture
def quick_passwords(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hash passwords in a thousandth of the time; tests/front/test_users.py and those of whole servers do not."""
    from argon2 import PasswordHasher

    from talaria.front import users

    monkeypatch.setattr(users, "_hasher", PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
    users._nobodys.cache_clear()
    yield
    users._nobodys.cache_clear()


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


# ---- tests that mount: those with `@pytest.mark.mounts` run in a mount namespace of their own, a file's in one process

UNSHARED = "TALARIA_TEST_UNSHARED"  # in that process: the file that takes what became of them
_mounting: list[str] = []
_ended: dict[str, str] = {}  # by node id: "" for a test that passed, else what was wrong


# What a test finds depends on who runs it: root, or a user whom others' files are closed to.
USERS = re.compile(r"\b(chmod|chown|geteuid|getuid|setuid|as_nobody|unshare|IS_ROOT|temporary_user|getpwuid)\b")
USERS_FIXTURES = {"as_nobody", "disk", "open_folder", "public"}
OF_EVERY_SERVER = ("test_check_ok", "test_push_then_read_back_equal")  # of the suite: that the server starts at all


def _depends_on_the_user(item: pytest.Item) -> bool:
    function = getattr(item, "function", None)
    if function is None:
        return False
    if not USERS_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())) or function.__name__ in OF_EVERY_SERVER:
        return True
    return _names_users(function)


@functools.cache
def _names_users(function: Callable[..., object]) -> bool:
    # Most files name none at all; to find where a function of theirs ends takes longer than to import them.
    named = _file_names_users(inspect.getsourcefile(function) or "")
    return named and USERS.search(inspect.getsource(function)) is not None


@functools.cache
def _file_names_users(path: str) -> bool:
    return USERS.search(Path(path).read_text("utf-8")) is not None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Pass over files that hold no test whose result depends on who runs it, where only such tests are wanted."""
    if collection_path.suffix != ".py" or not re.match(r"as_user\b", config.option.markexpr):
        return None
    near = [path for path in (collection_path, collection_path.with_name("conftest.py")) if path.exists()]
    text = "".join(path.read_text("utf-8") for path in near)
    fixtures = any(re.search(rf"\b{name}\b", text) for name in USERS_FIXTURES)
    return None if fixtures or USERS.search(text) or collection_path.name == "conformance.py" else True


# Before the options -m and -k choose, and after it.
@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    for item in filter(_depends_on_the_user, items):
        item.add_marker("as_user")
    mounting = [item for item in items if item.get_closest_marker("mounts")]
    _mounting[:] = [item.nodeid for item in mounting]
    for item in mounting:
        item.add_marker(pytest.mark.timeout(600))  # the first of a file waits for all
    yield
    processes = getattr(config, "workerinput", {}).get("workercount", 1)
    if processes > 1:
        place = ordered(item.nodeid for item in items)
        items.sort(key=lambda item: place[unit_of(item.nodeid)])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Dealer | None:
    """Deal tests out in our own way, unless another one is asked for."""
    return Dealer(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if UNSHARED in os.environ and (report.failed or report.when == "call"):
        with open(os.environ[UNSHARED], "a", encoding="utf-8") as file:
            print(json.dumps([report.nodeid, report.longreprtext if report.failed else ""]), file=file)


@functools.cache
def _run_unshared(root: Path, file: str) -> str:
    """Run a file's in a process whose mounts nobody else sees, and which end with it; return what went wrong at all."""
    namespace = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--mount"]
    tried = subprocess.run([*namespace, "true"], capture_output=True, text=True)
    if tried.returncode:
        return f"no file system can be mounted here: {tried.stderr.strip()}"
    own = [node for node in _mounting if node.startswith(f"{file}::")]
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as reports:
        ran = subprocess.run(
            [*namespace, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *own],
            cwd=root,
            env={**os.environ, UNSHARED: reports.name},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node, wrong in map(json.loads, reports):
            _ended[node] = _ended.get(node) or wrong
    return "" if ran.returncode in (0, 1) else ran.stdout  # 1: tests failed, which is reported by name


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Report of a test that mounts what became of it in the other process."""
    if pyfuncitem.get_closest_marker("mounts") is None or UNSHARED in os.environ:
        return None
    file = pyfuncitem.nodeid.partition("::")[0]
    wrong = _run_unshared(pyfuncitem.config.rootpath, file) or _ended.get(pyfuncitem.nodeid, "it was not run")
    if wrong:
        pytest.fail(wrong, pytrace=False)
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
