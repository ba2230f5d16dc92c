"""Outgoing HTTP: proxies and certificates of the environment, keys in headers, and addresses that can be shown."""

import os
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies

from vstar_engine.errors import VstarError

if TYPE_CHECKING:
    import httpx


def usable_key(key: str | None, named: str) -> str | None:
    """Returns a key without the space around it, None for an empty one; ValueError, without the key, for a broken one."""
    key = (key or "").strip().strip("\ufeff").strip()
    if any(not "!" <= letter <= "~" for letter in key):
        raise ValueError(f"{named} holds a space, a line break or a letter that no header can carry; give one key alone")
    return key or None


def shown_address(url: str) -> str:
    """Returns an address without what may be secret in it: a user's name and password, and the query."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "an address that cannot be read"
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def client_for(
    url: str, headers: Mapping[str, str], timeout: float, error: type[VstarError], **settings: Any
) -> "httpx.Client":
    """Makes a client for one server; an `error` names the variable of the environment that cannot be followed."""
    import httpx

    name, proxy = _proxy_for(url)
    try:
        if proxy is None:
            # a transport of our own, so that httpx does not look for proxies
            transport = httpx.HTTPTransport(trust_env=url.startswith("https://"))
            return httpx.Client(transport=transport, headers=headers, timeout=timeout, **settings)
        return httpx.Client(proxy=proxy, headers=headers, timeout=timeout, **settings)
    except ImportError as missing:
        raise error(f"{name} names a SOCKS proxy, which needs the socksio package; install it, or unset {name}") from missing
    except (ValueError, httpx.InvalidURL) as wrong:
        raise error(f"{name} holds no address of a proxy that can be used; give http://HOST:PORT, or unset it") from wrong
    except OSError as unread:
        named = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
        if not named:
            raise
        raise error(f"{' or '.join(named)} names certificates that cannot be read: {unread.strerror}") from unread


def _proxy_for(url: str) -> tuple[str, str | None]:
    """Returns the variable that names an address's proxy, and the proxy; None for this machine and what NO_PROXY lists."""
    parts, proxies = urlsplit(url), getproxies()
    kind = parts.scheme if parts.scheme in proxies else "all"
    named = [name for name in (f"{kind}_proxy", f"{kind.upper()}_PROXY") if os.environ.get(name)]
    name = named[0] if named else f"{kind.upper()}_PROXY"
    if kind not in proxies or _is_excepted(parts.hostname or "", parts.port, proxies.get("no", "")):
        return name, None
    proxy = proxies[kind]
    return name, proxy if "://" in proxy else f"http://{proxy}"


def _is_excepted(host: str, port: int | None, listed: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        address = None
    if host == "localhost" or host.endswith(".localhost") or (address is not None and address.is_loopback):
        return True
    for entry in listed.replace(",", " ").split():
        name, _, last = entry.rpartition(":")
        if name and last.isdecimal() and (":" not in name or name.endswith("]")):
            if int(last) != port:
                continue
            entry = name
        entry = entry.strip("[]").removeprefix("*.").lstrip(".").lower()
        if entry == "*" or host == entry or host.endswith(f".{entry}"):
            return True
        try:
            if address is not None and address in ip_network(entry, strict=False):
                return True
        except ValueError:
            continue
    return False
