"""Settings, and the environment of Prefect's processes. Imports nothing heavy: every command begins here."""

from __future__ import annotations

import base64
import errno
import os
import secrets
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from talaria.home import settings_files
from transfer import roots, shared
from transfer.home import Home
from transfer.live import FOLLOWED_HERE
from transfer.validation import check_aet, meant, numbers_only, what_is_wrong
from transfer.window import DispatchWindow

KEEP = ("keep_days", "keep_limit", "keep_failed_days")  # bounds of what is remembered
EVENTS_S = 86_400  # for how long what a follower of events has missed is looked up
POOL = "talaria"  # the work pool at the server that workers take runs from
NO_PROXY = ("no_proxy", "NO_PROXY")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Variables of ours that set nothing of `talaria up`.
NO_SETTINGS = {"url", "token", "ca", "rule", "front", FOLLOWED_HERE.removeprefix("TALARIA_").lower()}
ALIKE = 0.8  # of 1: `source` and `sources` are 0.92, Kubernetes' `service_port` and `scp_port` 0.7
_WHERE = " (a variable TALARIA_..., or a key of talaria.toml)"


class Settings(BaseSettings):
    """`TALARIA_*` variables, then `talaria.toml` in the current folder or in the state directory."""

    model_config = SettingsConfigDict(env_prefix="TALARIA_", extra="ignore")

    home: Path = Field(default=Path("~/.talaria"), description="State directory.")
    host: str = Field(default="127.0.0.1", description="Address that `talaria up` listens on.")
    port: int = Field(default=4200, ge=1, le=65535, description="Port that `talaria up` listens on.")
    hosts: str = Field(default="", description="Names, separated by commas, that users reach `talaria up` by.")
    tls_cert: str = Field(default="", description="Certificate chain (PEM) of `talaria up`.")
    tls_key: str = Field(default="", description="Its private key (PEM, without a passphrase).")
    behind_proxy: bool = Field(default=False, description="Whether a proxy with TLS stands in front of `talaria up`.")
    proxy_peers: str = Field(
        default="127.0.0.1,::1", description="Addresses or networks, separated by commas, of that proxy."
    )
    proxy_user_header: str = Field(default="", description="Header in which that proxy names who has logged in.")
    proxy_role: str = Field(
        default="", description="Role of those whom that proxy names and `talaria user add` hasn't: empty for none."
    )
    workers: int = Field(default=1, ge=1, le=64, description="Worker processes of `talaria up`.")
    limit: int = Field(default=8, ge=1, le=256, description="Dispatches at once in one worker.")
    scp_aet: str = Field(default="TALARIA", description="AE title of the Storage SCP that C-MOVE sends to.")
    scp_port: int = Field(
        default=11_112, ge=0, le=65535, description="Port of the Storage SCP; open while C-MOVE is used. 0: no C-MOVE."
    )
    scp_host: str = Field(default="", description="Address that the Storage SCP listens on; empty for all.")
    spool_limit: int = Field(
        default=20 << 30, ge=1 << 20, description="Bytes that each retrieval keeps between fetching and sending."
    )
    upload_limit: int = Field(
        default=50 << 30, ge=1 << 20, description="Bytes of one upload through the pages, unpacked."
    )
    keep_days: int = Field(
        default=90,
        ge=1,
        le=36_500,
        description="Days that ended dispatches are remembered for: ledger, receipts, runs.",
    )
    keep_limit: int = Field(
        default=10 << 30,
        ge=1 << 20,
        description="Bytes that this may take; beyond them, the oldest is forgotten sooner.",
    )
    keep_failed_days: int = Field(
        default=14,
        ge=0,
        le=36_500,
        description="Days that links to the files of dispatches that were given up are kept for a retry.",
    )
    ledger: SecretStr = Field(
        default=SecretStr(""), description="URL (postgresql://) of the ledger that several hosts share; empty: a file."
    )
    lease: float = Field(
        default=30.0, ge=2, le=3600, description="Seconds after which others take up the runs of a silent host."
    )
    host_name: str = Field(
        default="", pattern=r"^[A-Za-z0-9._-]*$", description="Name of this host among those; empty for the system's."
    )
    shared_sources: str = Field(
        default="", description="Folders that each of those hosts has, at the same path with the same files."
    )
    shared_places: str = Field(
        default="", description="Folders below which what one of those hosts writes lies on each, at the same path."
    )
    off_peak: str = Field(default="22:00-06:00", description="Off-peak hours, as in a target's window.")
    sources: str = Field(default="", description="Folders, separated by `:` or commas, that hold what may be sent.")
    places: str = Field(
        default="", description="Folders below which folder targets, file:// targets and retrievals may write."
    )
    notify_commands: str = Field(
        default="", description="Folder of the programs that rules of type command may run; empty for none."
    )

    log_json: bool = Field(default=False, description="Whether logs are JSON, one object per line.")
    audit_syslog: str = Field(default="", description="Syslog server for audit messages over TLS, host or host:port.")
    audit_syslog_ca: str = Field(default="", description="PEM file of the authority that its certificate is from.")
    audit_syslog_cert: str = Field(default="", description="PEM file of our certificate, where it wants one.")
    audit_syslog_key: str = Field(default="", description="PEM file of the key of that certificate.")

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, values: Any) -> Any:
        """Refuse the truth values of TOML where a number is wanted."""
        return numbers_only(values, cls.model_fields)

    @field_validator("sources", "places", "shared_sources", "shared_places", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """Accept a list, as TOML has them."""
        return os.pathsep.join(map(str, value)) if isinstance(value, list) else value

    @field_validator("scp_aet")
    @classmethod
    def _aet(cls, value: str) -> str:
        return check_aet(value)

    @field_validator("home", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        """Take an empty name for none: a path would be the current folder, whatever that is."""
        return value or "~/.talaria"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        files = settings_files()
        _check_known(files)
        return (init_settings, env_settings, *(InitSettingsSource(settings_cls, one) for one in files.values()))


def _check_known(files: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raise ValueError for a key of a file that is no setting: what it was to set would have its default, unnoticed."""
    for file, values in files.items():
        for name, value in values.items():
            if name in Settings.model_fields:
                continue
            plainly = name.lower().removeprefix("talaria_")
            hint = f"write {plainly}" if plainly in Settings.model_fields else meant(plainly, Settings.model_fields)
            if isinstance(value, dict):
                hint = "settings stand in no section"
            raise ValueError(f"{file}: unknown setting {name!r}" + (f": {hint}" if hint else ""))


def misspelt() -> list[str]:
    """Return a line for each variable that looks like a setting and is none, as TALARIA_SOURCE.

    Others may have set one, as Kubernetes does for a service of our name, so that none is refused.
    """
    from difflib import get_close_matches

    known = set(Settings.model_fields) | NO_SETTINGS
    given = sorted(name for name in os.environ if name.startswith("TALARIA_"))
    said = []
    for name in given:
        word = name.removeprefix("TALARIA_").lower()
        alike = [] if word in known else get_close_matches(word, Settings.model_fields, n=1, cutoff=ALIKE)
        said += [f"{name} is no setting, and is not heeded: did you mean TALARIA_{one.upper()}?" for one in alike]
    return said


def load_settings() -> Settings:
    """Read the settings and apply them to everything in this process.

    Raises:
        ValueError: a setting is wrong; the message names it and what is allowed.
    """
    try:
        settings = Settings()
    except ValidationError as exc:
        raise ValueError(f"setting {what_is_wrong(exc.errors(), Settings.model_fields)}{_WHERE}") from exc
    try:
        DispatchWindow.parse(settings.off_peak)
    except ValueError as exc:
        raise ValueError(f"setting off_peak: {exc}{_WHERE}") from exc
    os.environ["TALARIA_HOME"] = str(settings.home.expanduser().absolute())
    os.environ["TALARIA_OFF_PEAK"] = settings.off_peak
    ledger = settings.ledger.get_secret_value()
    if ledger and not ledger.startswith(("postgresql://", "postgres://")):
        raise ValueError(f"setting ledger: it must begin with postgresql://{_WHERE}")  # it may hold a password
    os.environ["TALARIA_LEDGER"], os.environ["TALARIA_LEASE"] = ledger, str(settings.lease)
    os.environ["TALARIA_HOST_NAME"] = settings.host_name
    folders = {
        roots.SOURCES: settings.sources,
        roots.PLACES: settings.places,
        shared.SOURCES: settings.shared_sources,
        shared.PLACES: settings.shared_places,
    }
    for name, value in folders.items():
        os.environ[name] = os.pathsep.join(roots.parse(name, value))
    if settings.notify_commands and not Path(settings.notify_commands).is_absolute():
        raise ValueError(f"setting notify_commands: it must be an absolute path{_WHERE}")
    if settings.audit_syslog.strip():
        from talaria.audit.syslog import SyslogTarget

        try:
            SyslogTarget.of(settings.audit_syslog.strip())
        except ValueError as exc:
            raise ValueError(f"setting {exc}{_WHERE}") from exc
    os.environ["TALARIA_LOG_JSON"] = "yes" if settings.log_json else "no"
    audit = ("notify_commands", "audit_syslog", "audit_syslog_ca", "audit_syslog_cert", "audit_syslog_key")
    for name in ("scp_aet", "scp_port", "scp_host", "spool_limit", "upload_limit", *KEEP, *audit):
        os.environ[f"TALARIA_{name.upper()}"] = str(getattr(settings, name))
    return settings


def secret(home: Home, name: str, make: str) -> str:
    """Return a secret of the state directory, made on first use; its file is whole or missing, mode 0600.

    Raises:
        OSError: it can't be written, or somebody else can read or change it.
    """
    path = home.root / name
    if found := _kept(path):
        return found
    with home.exclusive(f"secret-{name}"):
        if found := _kept(path):
            return found
        fd, part = tempfile.mkstemp(prefix=f".{name}.", dir=home.root)  # with mode 0600
        try:
            with open(fd, "w", encoding="ascii") as file:
                file.write(make + "\n")
                file.flush()
                os.fsync(fd)
            Path(part).replace(path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
    return make


def _kept(path: Path) -> str:
    """Return the secret in a file; "" if there is none, or only an empty file that a full disk once left."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return ""
    if info.st_uid != os.geteuid() or info.st_mode & 0o077 or not stat.S_ISREG(info.st_mode):
        raise PermissionError(errno.EPERM, "a secret that others can read or change: remove it", str(path))
    return path.read_text(encoding="ascii").strip()


def auth_string(home: Home) -> str:
    """Return the machine's own token, `user:password`: its holder is admin on this machine."""
    return secret(home, "api.auth", f"talaria:{secrets.token_urlsafe(24)}")


def worker_auth(home: Home) -> str:
    """Return the credential of the product's own processes, the only one that secrets of targets are sent to."""
    return secret(home, "worker.auth", f"worker:{secrets.token_urlsafe(24)}")


# Of the embedded server, where its database is PostgreSQL's. Prefect opens fifteen connections at most, and closes all
# but five after each use: what was prepared on them went with them, and half of all statements were prepared anew.
CONNECTIONS = {
    "PREFECT_SERVER_DATABASE_SQLALCHEMY_POOL_SIZE": "15",
    "PREFECT_SERVER_DATABASE_SQLALCHEMY_MAX_OVERFLOW": "0",
    # Some 150 are in use, some of them by the number of rows.
    "PREFECT_SERVER_DATABASE_SQLALCHEMY_CONNECT_ARGS_PREPARED_STATEMENT_CACHE_SIZE": "500",
}


def server_environment(home: Home, url: str) -> dict[str, str]:
    """Return the environment of the embedded server, whose own processes reach its API at `url`."""
    key = secret(home, "encryption.key", base64.urlsafe_b64encode(secrets.token_bytes(32)).decode("ascii"))
    return client_environment(home, url) | {
        "PREFECT_SERVER_ENCRYPTION_KEY": key,
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        **{name: os.environ.get(name, value) for name, value in CONNECTIONS.items()},
        "PREFECT_UI_API_URL": "/api",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
        # Else each change of a task run's state is a transaction of its own.
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
        # Each look costs more than what it finds: pauses whose time is over, and runs that have not begun in time.
        "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_LOOP_SECONDS": "20",
        "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "20",
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "false",
        "PREFECT_EVENTS_MAXIMUM_WEBSOCKET_BACKFILL": f"PT{EVENTS_S}S",
        # Also a request that the gate forgot would need it.
        "PREFECT_SERVER_API_AUTH_STRING": worker_auth(home),
    }


def client_environment(home: Home, url: str) -> dict[str, str]:
    """Return the environment of a process of ours that is a client of the embedded server."""
    host = urlsplit(url).hostname or ""
    return {
        # Prefect's clients would give our password to a proxy of the environment.
        **(dict.fromkeys(NO_PROXY, _excepting(host)) if host else {}),
        "PREFECT_HOME": str(home.root / "prefect"),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_CLIENT_METRICS_ENABLED": "false",
        # Each client would ask for both before its first call; our server is of our version, and wants no token.
        "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "false",
        "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
        "PREFECT_API_AUTH_STRING": worker_auth(home),
        FOLLOWED_HERE: "1",
    }


def _excepting(host: str) -> str:
    """Return the hosts that the environment excepts from its proxies, and one more.

    Both spellings get all of them, because programs read only one: urllib the small one, others the first they find.
    """
    hosts = [one.strip() for name in NO_PROXY for one in os.environ.get(name, "").split(",") if one.strip()]
    return "*" if "*" in hosts else ",".join(dict.fromkeys([*hosts, host]))
