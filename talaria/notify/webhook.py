"""Messages as JSON to a web server, signed as Standard Webhooks 1.0.0 has it (github.com/standard-webhooks)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import ssl
import time

import httpx

from blocks.rule import WebhookRule
from protocols.http.head import retry_after
from protocols.http.proxy import Proxy
from protocols.net.tls import Tls
from talaria import __version__
from talaria.notify.errors import NotSent
from talaria.notify.words import Letter
from transfer.errors import DispatchError

KEY = "whsec_"  # begins a key in base64
MOST_AFTER_S = 86_400.0
logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs URLs, which may hold a key


async def post(rule: WebhookRule, one: Letter) -> None:
    """Post a message; return when the server has answered with success.

    Raises:
        NotSent: it can't be reached, or answers otherwise.
    """
    body, url = json.dumps(one.document, ensure_ascii=False).encode(), rule.url.get_secret_value()
    try:
        context = Tls(ca=rule.ca_cert).client()
        async with (
            # Neither redirects nor proxies and credentials of the environment: it goes where the rule says.
            httpx.AsyncClient(
                verify=context,
                follow_redirects=False,
                trust_env=False,
                timeout=rule.timeout_s,
                proxy=_proxy(rule, url, context),
            ) as client,
            client.stream("POST", url, content=body, headers=_headers(rule, one, body)) as got,
        ):
            status, said = got.status_code, f"it answers {got.status_code} {got.reason_phrase}".rstrip()
            after, location = got.headers.get("retry-after", ""), got.headers.get("location")
    except httpx.TimeoutException as exc:
        raise NotSent(f"no answer within {rule.timeout_s:g} s") from exc
    except httpx.ProxyError as exc:
        raise NotSent(f"the proxy refuses it: {exc}") from exc
    except httpx.HTTPError as exc:
        raise NotSent(f"it can't be reached: {str(exc) or type(exc).__name__}") from exc
    except DispatchError as exc:
        raise NotSent(exc.message) from exc
    except (httpx.InvalidURL, ValueError) as exc:  # of a name that IDNA does not know, say
        raise NotSent(f"url can't be used: {exc}") from exc
    if 300 <= status < 400 and location:
        raise NotSent(f"{said}, which leads elsewhere: redirects are not followed, correct url")
    if not 200 <= status < 300:
        raise NotSent(said, min(retry_after(after) or 0.0, MOST_AFTER_S))


def _proxy(rule: WebhookRule, url: str, context: ssl.SSLContext) -> httpx.Proxy | None:
    """Return the proxy that a rule means for its URL.

    Raises:
        Misconfigured: the environment names none that can be used.
    """
    proxy = Proxy.of(rule.proxy.get_secret_value(), url)
    if proxy is None:
        return None
    login = (proxy.user, proxy.password) if proxy.user else None
    return httpx.Proxy(proxy.url, auth=login, ssl_context=context if proxy.scheme == "https" else None)


def _headers(rule: WebhookRule, one: Letter, body: bytes) -> dict[str, str]:
    now = str(int(time.time()))
    found = {
        "Content-Type": "application/json",
        "User-Agent": f"talaria/{__version__}",
        "webhook-id": one.id,
        "webhook-timestamp": now,
    }
    if secret := rule.secret.get_secret_value():
        found["webhook-signature"] = signature(secret, one.id, now, body)
    if token := rule.token.get_secret_value():
        found["Authorization"] = f"Bearer {token}"
    return found


def signature(secret: str, message: str, time: str, body: bytes) -> str:
    """Return the signature of a message.

    Raises:
        NotSent: a key that begins with whsec_ is not base64.
    """
    key = secret.encode()
    if secret.startswith(KEY):
        try:
            key = base64.b64decode(secret.removeprefix(KEY), validate=True)
        except ValueError:
            key = b""
        if not key:  # with an empty one, anybody could sign
            raise NotSent("secret begins with whsec_, and what follows is not base64: correct secret")
    digest = hmac.digest(key, f"{message}.{time}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode('ascii')}"
