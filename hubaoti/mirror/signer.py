"""Who has to sign what a publisher publishes, and the keys and roots by which that is seen.

trust.toml names them by the sha256 of their files, which lie in `$HUBAOTI_HOME/keys`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubaoti.disk import explain_disk_errors, open_plain
from hubaoti.errors import HubaotiError
from hubaoti.mirror.folders import make_private, refuse_shared

_DIGEST = re.compile(r"[0-9a-f]{64}")
_LONG_DIGEST = re.compile(r"(key |root )([0-9a-f]{12})[0-9a-f]{52}$")
LARGEST_KEY = 1 << 20  # bytes; a root of trust of sigstore has some ten thousand


@dataclass(frozen=True, slots=True)
class Signer:
    """The holder of a key, or an identity that a root of trust vouches for.

    `key` is the sha256 of a public key. `identity` stands in the certificate that signs, and
    `root` is the sha256 of what that hangs on: certificates, or where an `issuer` is named, who
    logged that identity in, sigstore's trust configuration (None is that of its public instance).

    Raises:
        ValueError: it is neither, or both.
    """

    key: str | None = None
    identity: str | None = None
    issuer: str | None = None
    root: str | None = None

    def __post_init__(self) -> None:
        given = [each for each in asdict(self).values() if each is not None]
        if not all(isinstance(each, str) and each for each in given):
            raise ValueError("a key, an identity, an issuer and a root are texts")
        if not all(_DIGEST.fullmatch(each) for each in (self.key, self.root) if each is not None):
            raise ValueError("a key and a root are named by their sha256, 64 digits")
        if self.key is not None and len(given) > 1:
            raise ValueError("a key needs no identity, no issuer and no root")
        if self.key is None and (self.identity is None or len(given) < 2):
            raise ValueError("an identity needs an issuer or a root")

    def __str__(self) -> str:
        """In words, which are no other signer's."""
        if self.key is not None:
            return f"key {self.key}"
        named = f"identity {_quote(self.identity or '')}"
        issued = "" if self.issuer is None else f" of {_quote(self.issuer)}"
        return named + issued + ("" if self.root is None else f" by root {self.root}")

    def describe(self) -> str:
        """In fewer words, for people: of a digest its beginning."""
        return _LONG_DIGEST.sub(r"\1\2", str(self))

    def to_entry(self) -> dict[str, str]:
        """The fields of trust.toml that say it."""
        return {name: each for name, each in asdict(self).items() if each is not None}

    @classmethod
    def take_from(cls, entry: dict[str, Any]) -> Signer | None:
        """What the fields of an entry say, which are taken out of it; None where none do."""
        found = {name: entry.pop(name) for name in cls.__slots__ if name in entry}
        return cls(**found) if found else None


def _quote(name: str) -> str:
    """A name as it is; quoted where it could be read as more than one word, or as a quoted one."""
    return name if name.split() == [name] and not name.startswith('"') else json.dumps(name)


@dataclass(frozen=True, slots=True)
class Keys:
    """The folder of public keys and roots; each file is called by its sha256."""

    folder: Path

    def keep(self, content: bytes) -> str:
        """Keep a file; its sha256, by which it is found."""
        name = digest(content)
        with explain_disk_errors(self.folder):
            make_private(self.folder)
            path, scratch = self.folder / name, self.folder / f".{name}~{os.getpid()}"
            scratch.write_bytes(content)
            scratch.chmod(0o600)
            scratch.replace(path)
        return name

    def find(self, name: str, whose: str) -> bytes:
        """A file by its sha256, hashed again.

        Raises:
            HubaotiError: it is not here, or another.
            UnsafeFolder: others may write it.
        """
        path = self.folder / name
        refuse_shared(self.folder)
        refuse_shared(path)
        try:
            with open_plain(path) as file:
                content = file.read()
        except FileNotFoundError as error:
            raise HubaotiError(
                f"{path}, by which signatures of {whose} are looked at, cannot be read: "
                "there is no such file",
                hint=f"give it once more: hubaoti trust add {whose} --key (or --root) FILE",
            ) from error
        if digest(content) != name:
            hint = f"remove it, and give it once more: hubaoti trust add {whose} --key FILE"
            raise HubaotiError(f"{path} has other bytes than its name says", hint=hint)
        return content


def digest(content: bytes) -> str:
    """The name of a public key or a root, by which trust.toml means it."""
    return hashlib.sha256(content).hexdigest()
