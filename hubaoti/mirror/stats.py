"""What the mirror's counts come to: what it saved, what was missed, what nobody uses."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubaoti.artifact.misses import Misses, propose_command, propose_dims
from hubaoti.artifact.sizes import format_count
from hubaoti.mirror.answers import BUILT, HUB, MIRROR, Miss, Tier
from hubaoti.mirror.gc import list_kept, read_budget
from hubaoti.mirror.orphans import find_gone
from hubaoti.mirror.rows import Row
from hubaoti.mirror.usage import Use

if TYPE_CHECKING:
    from hubaoti.mirror.store import Mirror

_MISSES = {"NoMatch": "nothing of it fits", "NoArtifact": "it holds no artifact"}
_UNUSED = 7 * 24 * 3600  # seconds without an open, from which on something is of no use


@dataclass(frozen=True, slots=True)
class Unused:
    """An artifact that nobody opened for a week, or ever; `kept` is why it does not leave."""

    digest: str
    recipe: str
    variant: str
    size: int
    opens: int
    idle_seconds: float
    kept: str


@dataclass(frozen=True, slots=True)
class Stats:
    """What is here, who answered how often, and what to do about the rest."""

    artifacts: int
    bytes: int
    budget: int
    tiers: dict[str, Tier]
    hit_rate: float | None
    saved_compile_seconds: float
    saved_bytes: int
    misses: tuple[Miss, ...]
    compile_next: tuple[str, ...]
    unused: tuple[Unused, ...]


def summarize(mirror: Mirror, recorded: Sequence[Misses] = ()) -> Stats:
    """What was counted since the index was made.

    A hit is an answer by the mirror, among all that were asked for. Saved is what a compile would
    have taken for each answer by the mirror or a Hub, and a download for each by the mirror: of an
    artifact that was asked for often, as often. `recorded` are calls that no graph served, as
    attachments wrote them.

    Raises:
        HubaotiError: the index is damaged.
    """
    counted, gone = mirror.answers.read(), find_gone(mirror)
    rows = [row for row in mirror.index.rows() if row.digest not in gone]
    tiers = {name: counted.tiers.get(name, Tier()) for name in (MIRROR, HUB, BUILT)}
    asked = sum(tier.calls for tier in tiers.values()) + sum(each.calls for each in counted.misses)
    return Stats(
        artifacts=len(rows),
        bytes=sum(row.size for row in rows),
        budget=read_budget(mirror),
        tiers=tiers,
        hit_rate=tiers[MIRROR].calls / asked if asked else None,
        saved_compile_seconds=tiers[MIRROR].seconds + tiers[HUB].seconds,
        saved_bytes=tiers[MIRROR].bytes,
        misses=counted.misses,
        compile_next=tuple(_advise(counted.misses, recorded)),
        unused=tuple(_list_unused(mirror, rows)),
    )


def _advise(misses: Sequence[Miss], recorded: Sequence[Misses]) -> Iterator[str]:
    """What to compile, that which was missed most often first."""
    for miss in misses:
        yield (
            f"asked for {format_count(miss.calls, 'time')} and not there: {miss.what} "
            f"({_MISSES.get(miss.reason, miss.reason)})"
        )
    for each in sorted(recorded, key=lambda found: -sum(m.calls for m in found.missed)):
        if proposal := propose_dims(each):
            yield propose_command(each, proposal)


def _list_unused(mirror: Mirror, rows: Sequence[Row]) -> Iterator[Unused]:
    """What nobody opened for a week, the largest first."""
    uses, kept, now = mirror.usage.read(), list_kept(mirror), time.time()
    for row in sorted(rows, key=lambda each: -each.size):
        use = uses.get(row.digest, Use())
        idle = now - max(row.added, use.last)
        if idle > _UNUSED:
            why = kept.get(row.digest, "")
            yield Unused(row.digest, row.recipe, row.variant, row.size, use.opens, idle, why)


def format_prometheus(stats: Stats) -> str:
    """The counts in Prometheus' text format, to be written where its node exporter reads."""
    lines: list[str] = []

    def add(name: str, kind: str, meaning: str, values: dict[str, float]) -> None:
        lines.append(f"# HELP hubaoti_mirror_{name} {meaning}")
        lines.append(f"# TYPE hubaoti_mirror_{name} {kind}")
        lines.extend(f"hubaoti_mirror_{name}{label} {value}" for label, value in values.items())

    reasons: dict[str, float] = {}
    for miss in stats.misses:
        label = f'{{reason="{miss.reason}"}}'
        reasons[label] = reasons.get(label, 0) + miss.calls
    tiers: dict[str, float] = {f'{{tier="{n}"}}': each.calls for n, each in stats.tiers.items()}
    add("artifacts", "gauge", "Artifacts that are stored.", {"": stats.artifacts})
    add("bytes", "gauge", "Bytes of all artifacts.", {"": stats.bytes})
    add("budget_bytes", "gauge", "The most bytes of artifacts.", {"": stats.budget})
    add("answers_total", "counter", "Artifacts that were given, by who gave them.", tiers)
    add("misses_total", "counter", "Artifacts that were asked for and are nowhere.", reasons)
    seconds, saved = stats.saved_compile_seconds, stats.saved_bytes
    compiles = "A compile for each answer by mirror or hub."
    add("saved_compile_seconds_total", "counter", compiles, {"": seconds})
    add("saved_bytes_total", "counter", "A download for each answer by mirror.", {"": saved})
    return "\n".join(lines)
