"""The messages of ssh(1) and what they mean: for all of its own errors it exits with 255.

Its own words go to a log, apart from what the host says to everybody (banners) and from what programs there write to
their standard error: neither may be taken for an answer to us.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from protocols.ssh.handshake import FULL
from protocols.ssh.login import Login, LoginFacts, why_denied, why_not_trusted
from protocols.ssh.memfiles import tail
from transfer.errors import Busy, Denied, DispatchError, Interrupted, Misconfigured, NotTrusted, TimedOut, Unreachable

WORDS_CHARS = 400  # of a program's own words in a message of ours
FIRST_CHARS = 120  # of these, from the beginning of a long text; the rest is its end, where the reason stands

DENIED = (
    r"Permission denied \(|Too many authentication failures|No more authentication methods|Account.*(locked|expired)"
    r"|password has expired"
)
# Before the login. The first pattern that fits counts. Source: OpenSSH; it never translates these.
REFUSED: tuple[tuple[str, type[DispatchError]], ...] = (
    (r"Host key verification failed|HOST IDENTIFICATION HAS CHANGED|host key is known for|revoked host key",
     NotTrusted),
    (DENIED, Denied),
    (FULL.pattern, Busy),
    (r"(kex|ssh)_exchange_identification: .*([Cc]losed|reset)", Busy),
    (r"(kex|ssh)_exchange_identification", Misconfigured),
    (r"banner exchange: .*invalid|Bad remote protocol version|Protocol major versions differ", Misconfigured),
    (r"[Tt]imed out during banner exchange|Connection to \S+ port \d+ timed out|Connection timed out", TimedOut),
    (r"Unable to negotiate|no matching .* found|Bad configuration option|Bad SSH2 cipher|unknown key type",
     Misconfigured),
    (r"Could not resolve hostname|[Cc]onnect to host .* port \d+:|No route to host|Connection refused", Unreachable),
)  # fmt: skip
# At any time; after the login nothing but these: nobody can be refused any more.
BROKEN: tuple[tuple[str, type[DispatchError]], ...] = (
    (r"[Ss]ubsystem request failed|exec request failed|shell request failed", Misconfigured),
    (r"Timeout, server .* not responding", TimedOut),
    (r"open failed: connect failed", Unreachable),  # of a jump host, on to the host
    (r"administratively prohibited|open failed|Session open refused|stdio forwarding failed", Busy),
    (r"[Cc]onnection (reset|closed|aborted)|Broken pipe|[Dd]isconnect(ed|ing)?|Corrupted|message authentication code",
     Interrupted),
)  # fmt: skip
_NOISE = re.compile(
    r"debug\d: |OpenSSH_|Authenticated to |Warning: Permanently added|Transferred: |Bytes per second|Killed by signal"
)
_HOST_KEY = re.compile(r"Server host (?:key|certificate): (\S+) (SHA256:\S+)")
_METHOD = re.compile(r"Authenticated to .* using \"([\w-]+)\"|Authentication succeeded \(([\w-]+)\)")
_SOFTWARE = re.compile(r"remote software version (.+)")
_NO_SSH = re.compile(r"exchange_identification: banner line \d+: (.*)")  # what came instead of SSH's first line
_CIPHER = re.compile(r"kex: client->server cipher: (\S+)")


@dataclass(frozen=True)
class Said:
    """The messages of one ssh(1).

    Attributes:
        log: file with its own words.
        errors: file with the host's words to everybody, and the standard error of what runs there.
        way: the same for the ssh that leads through the jump host.
        texts: the content of both files, once they may be gone.
    """

    login: Login
    hide: Callable[[str], str]
    log: str
    errors: str
    way: Said | None = None
    texts: tuple[str, str] | None = field(default=None, repr=False)

    def kept(self) -> Said:
        """Return a copy that doesn't need the files any more."""
        texts = self.logged, self.stderr
        return replace(self, way=self.way.kept() if self.way else None, texts=texts)

    @property
    def logged(self) -> str:
        """All of ssh's own messages."""
        return self.texts[0] if self.texts else text_of(tail(self.log))

    @property
    def facts(self) -> LoginFacts:
        """What is known about the connection so far."""
        text = self.logged
        key, method = _HOST_KEY.search(text), _METHOD.search(text)
        software, cipher = _SOFTWARE.search(text), _CIPHER.search(text)
        return LoginFacts(
            *((key[1], key[2]) if key else ("", "")),
            method=(method[1] or method[2]) if method else "",
            software=software[1].strip() if software else "",
            cipher=cipher[1] if cipher else "",
        )

    @property
    def words(self) -> str:
        """ssh's own messages without those that it logs when all is well."""
        lines = (line.strip() for line in self.logged.splitlines())
        return " ".join(line for line in lines if line and not _NOISE.match(line) and not set(line) <= {"@", " "})

    @property
    def stderr(self) -> str:
        """The standard error of what runs there."""
        return self.texts[1] if self.texts else text_of(tail(self.errors))

    def failure(self, code: int | None, *, begun: bool = True) -> DispatchError:
        """Return why the connection, or the login, failed, or the session ended.

        Outcomes: NotTrusted (host key), Denied (login), Unreachable, TimedOut, Busy, Interrupted, Misconfigured.

        Args:
            code: ssh's exit code.
            begun: whether the command on the host has sent anything.
        """
        facts, words, shown = self.facts, self.words, self.login.shown
        if self.way is not None and not facts.software:
            if self.way.words:
                return self.way.failure_of_way(code)
            if not self.way.facts.method:  # it is silent, and has not let us in
                shown = f"jump_host {self.way.login.shown}"
        if facts.method:
            kind = next((error for pattern, error in BROKEN if re.search(pattern, words)), Interrupted)
            said = short(words or self.stderr or f"ssh ended with exit code {code}", self.hide)
            return kind(f"{shown}: {said}{'' if begun or kind is not Interrupted else ENDED_AT_ONCE}")
        # Lines may come before SSH's own: only where that never came are they instead of it.
        came = "" if facts.software else " ".join(_NO_SSH.findall(self.logged))
        text = f"{words}\n{came}"
        kind = next((error for pattern, error in (*REFUSED, *BROKEN) if re.search(pattern, text)), Unreachable)
        if kind is NotTrusted:
            if facts.fingerprint in self.login.pins:
                # Several hosts answer to this name, and another one than now did when it was asked for its key.
                return Busy(f"{shown}: the host shows {facts.fingerprint}, pinned, but not shown before")
            return NotTrusted(why_not_trusted(self.login, facts, words))
        if kind is Busy and came and not re.search(FULL, came):
            return Misconfigured(f"{shown}: what answers is not SSH: {short(came, self.hide)}")
        said = words or ("" if facts.software else self.stderr.strip()) or f"ssh ended with exit code {code}"
        advice = f": {why_denied(self.login)}" if kind is Denied else ""
        return kind(f"{shown}: {short(said, self.hide)}{advice}")

    def failure_of_way(self, code: int | None) -> DispatchError:
        """Return why this ssh, to a jump host, has failed."""
        error = self.failure(code)
        # sshd_config, AllowTcpForwarding and PermitOpen; of a session, the words mean that there are enough of them.
        prohibited = "administratively prohibited" in self.words
        return (Misconfigured if prohibited else type(error))(f"jump_host {error.message}")


ENDED_AT_ONCE = (
    ": the server let us in and ended the session at once. It does so where the account's chroot folder doesn't belong "
    "to root, or others may write to it (sshd_config, ChrootDirectory); its log names the reason"
)


def short(text: str, hide: Callable[[str], str] = str) -> str:
    """Return another program's words on one line, cut to their end where they are too long for a message.

    Args:
        hide: removes what must not show; called before the cut, which might leave half of it.
    """
    text = " ".join(hide(text).split())
    if len(text) <= WORDS_CHARS:
        return text
    return f"{text[:FIRST_CHARS]} … {text[FIRST_CHARS + 3 - WORDS_CHARS :]}"


def text_of(data: bytes) -> str:
    """Return a program's output as text."""
    return data.decode("utf-8", "replace").replace("\r", "")
