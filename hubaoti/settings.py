"""What the environment says, read in one place, once, when the CLI or the face asks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ENDPOINT = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class Settings:
    """Where things are: our folder, the Hub, and the token for it.

    `token` is None when the environment has none; the client then uses the stored login.
    """

    home: Path
    endpoint: str = ENDPOINT
    token: str | None = None
    offline: bool = False

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read `HUBAOTI_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE`."""
        env = os.environ if env is None else env
        cache = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        home = Path(env.get("HUBAOTI_HOME") or cache / "hubaoti")
        return cls(
            home=home.expanduser().absolute(),
            endpoint=(env.get("HF_ENDPOINT") or ENDPOINT).rstrip("/"),
            # As huggingface_hub reads it: a file's last newline comes along easily.
            token="".join(env.get("HF_TOKEN", "").split()) or None,
            offline=env.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"},
        )

    def __repr__(self) -> str:
        """As a dataclass prints, without the token."""
        token = "set" if self.token else "unset"
        return f"Settings({self.home}, {self.endpoint}, token {token}, offline={self.offline})"

    @property
    def mirror(self) -> Path:
        """The local store."""
        return self.home / "mirror"

    @property
    def trust(self) -> Path:
        """The publishers whose code this machine may run."""
        return self.home / "trust.toml"


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set variables for a while, for libraries that can be told in no other way."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
