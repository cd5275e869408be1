"""Keys that tests sign with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hubaoti.hub.keys import make_key_pair
from hubaoti.mirror.signer import Signer


@dataclass(frozen=True)
class Pair:
    """A private key, its public one, and what trust.toml calls it."""

    private: Path
    public: Path
    signer: Signer


def make_pair(folder: Path, name: str) -> Pair:
    """A new key of this name in a folder."""
    private = folder / f"{name}.pem"
    public, sha256 = make_key_pair(private)
    return Pair(private, public, Signer(key=sha256))
