"""What manifests say that is asked of all of them at once: by a list, or a collection.

A manifest is known by its digest, so what it says never changes: the index keeps it of each, and of
ten thousand none is read again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from hubaoti.artifact.manifest import Manifest
from hubaoti.mirror.steps import NINTH

if TYPE_CHECKING:
    from hubaoti.mirror.store import Mirror


@dataclass(frozen=True, slots=True)
class Facts:
    """The model, the task, the seconds that compiling took, and the kernels' ids.

    Of a manifest that was never read whole nothing is known; of some models neither name nor task.
    """

    model: str | None = None
    task: str | None = None
    seconds: float = 0.0
    kernels: str = ""

    @classmethod
    def of(cls, manifest: Manifest) -> Facts:
        """What a manifest says."""
        kernels = " ".join(pin.id for pin in manifest.requires.kernels)
        return cls(manifest.source.model, manifest.program.task, manifest.built.seconds, kernels)


def read_facts(mirror: Mirror, digests: Iterable[str]) -> dict[str, Facts]:
    """What the manifest of each artifact says, by its digest.

    Raises:
        HubaotiError: the index is damaged.
    """
    known, found = _read_known(mirror), dict[str, Facts]()
    new = list[tuple[object, ...]]()
    for digest in digests:
        if facts := known.get(digest):
            found[digest] = facts
        elif artifact := mirror.read(digest):
            found[digest] = facts = Facts.of(artifact.manifest)
            new.append((digest, *astuple(facts)))
        else:
            found[digest] = Facts()
    if new:
        mirror.usage.jot(
            "insert or replace into facts select ?1, ?2, ?3, ?4, ?5 from artifacts "
            "where digest = ?1",
            *new,
        )
    return found


def _read_known(mirror: Mirror) -> dict[str, Facts]:
    """What the index has kept."""
    if not mirror.index.has_step(NINTH):
        return {}
    found = mirror.index.select("select digest, model, task, seconds, kernels from facts")
    return {digest: Facts(*said) for digest, *said in found}
