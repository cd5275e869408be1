"""What was asked of this machine, and what answered: the mirror, a Hub, a compile, or nobody.

Counted as it happens, if that can be at once; a count that is lost is no error.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hubaoti.artifact.manifest import Manifest
from hubaoti.errors import NoArtifact, NoMatch
from hubaoti.host.probe import Host
from hubaoti.mirror.index import Index
from hubaoti.mirror.steps import SIXTH
from hubaoti.mirror.usage import Usage

MIRROR, HUB, BUILT, MISSED = "mirror", "hub", "built", "missed"
_MOST = 1000  # different misses that are kept, the latest


@dataclass(frozen=True, slots=True)
class Tier:
    """How often a tier answered; bytes that were downloaded or need not be; compile seconds."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Miss:
    """What was asked for and is nowhere, why, how often, when last (Unix seconds)."""

    what: str
    reason: str
    calls: int
    last: float


@dataclass(frozen=True, slots=True)
class Counted:
    """All counts: hits by tier, and misses, the most frequent first."""

    tiers: dict[str, Tier] = field(default_factory=dict)
    misses: tuple[Miss, ...] = ()


class Answers:
    """The counts of an index."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def record(self, tier: str, manifest: Manifest) -> None:
        """Count an artifact that a tier gave: this never fails."""
        self._add(tier, "", "", manifest.size, manifest.built.seconds)

    def _add(self, tier: str, reason: str, what: str, size: int, seconds: float) -> None:
        Usage(self._index).jot(
            "insert into answers values (?, ?, ?, 1, ?, ?, ?) on conflict do update set "
            "calls = calls + 1, bytes = bytes + excluded.bytes, at = excluded.at, "
            "seconds = seconds + excluded.seconds",
            (tier, reason, what, size, seconds, time.time()),
        )

    @contextmanager
    def counting_misses(self, repo: str, host: Host) -> Iterator[None]:
        """Around asking a repo: counted where it has nothing, or only for other kinds of host."""
        try:
            yield
        except (NoArtifact, NoMatch) as error:
            what = f"{repo} for {_describe_host(host)}"
            self._add(MISSED, type(error).__name__, what, 0, 0.0)
            self._forget_oldest()
            raise

    def _forget_oldest(self) -> None:
        Usage(self._index).jot(
            "delete from answers where tier = ?1 and at < (select at from answers where tier = ?1 "
            "order by at desc limit 1 offset ?2)",
            (MISSED, _MOST - 1),
        )

    def read(self) -> Counted:
        """All that was counted.

        Raises:
            HubaotiError: the index is damaged.
        """
        if not self._index.has_step(SIXTH):
            return Counted()
        columns = "sum(calls), sum(bytes), sum(seconds)"
        hits = self._index.select(
            f"select tier, {columns} from answers where tier != ? group by tier", MISSED
        )
        misses = self._index.select(
            "select what, reason, calls, at from answers where tier = ? order by calls desc, what",
            MISSED,
        )
        tiers = {str(tier): Tier(*values) for tier, *values in hits}
        return Counted(tiers, tuple(Miss(*each) for each in misses))


def _describe_host(host: Host) -> str:
    """The kind of a host in a few words, much as variants are called."""
    torch = f"torch {host.torch.version}" if host.torch else "no torch"
    gpus = dict.fromkeys(f"sm{gpu.sm}" for gpu in host.gpus)
    return " ".join((torch, *gpus, host.level, host.os))
