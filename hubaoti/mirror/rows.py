"""What the index knows, as plain records."""

from __future__ import annotations

from dataclasses import dataclass

from hubaoti.settings import split_login


@dataclass(frozen=True, slots=True)
class PullOrigin:
    """Where an artifact came from: a path in a repo at a commit; all empty if built here, or opened
    from a folder."""

    endpoint: str = ""
    repo: str = ""
    commit: str = ""
    path: str = ""

    def __post_init__(self) -> None:
        # An older hubaoti kept an endpoint as it was spelled, its password included.
        if self.endpoint:
            object.__setattr__(self, "endpoint", split_login(self.endpoint)[0])

    @property
    def publisher(self) -> str:
        """The owner of the repo; empty if built here."""
        return self.repo.partition("/")[0]


BUILT_HERE = PullOrigin()


@dataclass(frozen=True, slots=True)
class Row:
    """One artifact as `mirror ls` lists it; `size` in bytes on disk, `added` in Unix seconds."""

    digest: str
    key: str
    recipe: str
    variant: str
    size: int
    added: float
    origin: PullOrigin


LOCKED = "locked"
"""What was asked for by a lockfile: whose the commit is, nobody asked."""


@dataclass(frozen=True, slots=True)
class Pin:
    """What was asked of which repo, at which commit, for which kind of host."""

    endpoint: str
    repo: str
    commit: str
    recipe: str
    host: str


@dataclass(frozen=True, slots=True)
class Signed:
    """Whose signature of an artifact was verified, as it lies at a path of a repo."""

    endpoint: str
    repo: str
    path: str
    signer: str

    @property
    def publisher(self) -> tuple[str, str]:
        """The endpoint, and the owner of the repo there."""
        return self.endpoint, self.repo.partition("/")[0]


@dataclass(frozen=True, slots=True)
class Promise:
    """All that is said of an artifact: its row, the graphs that it holds, which pulls gave it.

    A pull stands with the path that it gave.
    """

    row: Row
    graphs: tuple[str, ...]
    pulls: tuple[tuple[Pin, str], ...]
