"""Who may do what: one token for writing and for private repos, and signatures for single errands.

Only requests to this endpoint's own names are answered: else a page that somebody looks at could
have its own name point here, and read what it likes.

A signature names its errand and its end, so what is signed for one upload serves no other. The
client sends no token with an LFS upload, and hf_xet only the one it was given: both carry these.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from hubaoti.errors import BadRequest

_NAME = re.compile(r"[a-z0-9_][a-z0-9_.-]*")  # of a host
LIFETIME = 3600
"""How many seconds a signature serves."""


@dataclass(frozen=True)
class Guard:
    """Judges tokens and signatures; both compare in constant time."""

    token: str = field(repr=False)
    secret: bytes = field(repr=False)

    def knows(self, authorization: str | None) -> bool:
        """Whether this `Authorization` header carries the token."""
        return hmac.compare_digest(read_bearer(authorization).encode(), self.token.encode())

    def sign(self, errand: str) -> str:
        """A signature for this errand, from now on for its lifetime."""
        end = int(time.time()) + LIFETIME
        return f"{end}.{self._mac(errand, str(end))}"

    def honours(self, errand: str, signature: str) -> bool:
        """Whether the signature is ours, for this errand, and still serves."""
        end, _, mac = signature.partition(".")
        if not hmac.compare_digest(self._mac(errand, end).encode(), mac.encode()):
            return False
        return int(end) > time.time()

    def _mac(self, errand: str, end: str) -> str:
        return hmac.new(self.secret, f"{errand}\n{end}".encode(), "sha256").hexdigest()


class Hosts:
    """The names that the endpoint has: those of loopback, and what it is told."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        """Of these names, and loopback's.

        Raises:
            BadRequest: one is no host's name.
        """
        self._names = {_require_host(name) for name in names}

    def hold(self, header: str) -> bool:
        """Whether a `Host` header names this endpoint."""
        host = parse_host(header)
        address = _parse_address(host)
        is_loopback = host == "localhost" or (address is not None and address.is_loopback)
        return is_loopback or host in self._names


def _require_host(name: str) -> str:
    """The host of a name that is allowed; BadRequest where it is none, as a URL."""
    host = parse_host(name)
    if _parse_address(host) or _NAME.fullmatch(host):
        return host
    raise BadRequest(f"{name!r} is no host's name", hint="write it as hub.example or 10.0.0.5")


def parse_host(text: str) -> str:
    """The host of `host[:port]`, in its one spelling; "" where that is none."""
    text = text.strip().lower()
    host, colon, port = text.rpartition(":")
    if _parse_address(text) or not (colon and port.isdecimal()):
        host = text
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return str(_parse_address(host) or host.removesuffix("."))


def _parse_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def read_bearer(authorization: str | None) -> str:
    """The token of a `Bearer` header, "" when there is none."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
