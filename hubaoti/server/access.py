"""Who may do what: one token for writing and for private repos, and signatures for single errands.

A signature names its errand and its end, so what is signed for one upload serves no other. The
client sends no token with an LFS upload, and hf_xet only the one it was given: both carry these.
"""

from __future__ import annotations

import hmac
import time
from dataclasses import dataclass, field

LIFETIME = 3600
"""How many seconds a signature serves."""


@dataclass(frozen=True)
class Guard:
    """Judges tokens and signatures; both compare in constant time."""

    token: str = field(repr=False)
    secret: bytes = field(repr=False)

    def knows(self, authorization: str | None) -> bool:
        """Whether this `Authorization` header carries the token."""
        return hmac.compare_digest(bearer(authorization).encode(), self.token.encode())

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


def bearer(authorization: str | None) -> str:
    """The token of a `Bearer` header, "" when there is none."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
