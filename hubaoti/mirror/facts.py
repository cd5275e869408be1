"""What manifests say that is asked of all of them at once: by a list, or a collection.

The index keeps it of each until its file changes, so that of ten thousand none is read again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubaoti.artifact.manifest import FILENAME, Manifest
from hubaoti.mirror.steps import EIGHTH

if TYPE_CHECKING:
    from hubaoti.mirror.store import Mirror


@dataclass(frozen=True, slots=True)
class Facts:
    """The model, the task, the seconds that compiling took, and the kernels' ids.

    Of a manifest that is not whole nothing is known; of some models neither name nor task.
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
    root, known = f"{mirror.root}/artifacts", _read_known(mirror)
    found, new = dict[str, Facts](), list[tuple[object, ...]]()
    for digest in digests:
        stamp = _stamp(f"{root}/{digest}/{FILENAME}")
        before, facts = known.get(digest, (0, Facts()))
        if stamp != before:
            artifact = mirror.read(digest)
            facts = Facts.of(artifact.manifest) if artifact else Facts()
            if artifact:
                new.append((digest, stamp, facts.model, facts.task, facts.seconds, facts.kernels))
        found[digest] = facts
    if new:
        mirror.usage.jot(
            "insert or replace into facts select ?1, ?2, ?3, ?4, ?5, ?6 from artifacts "
            "where digest = ?1",
            *new,
        )
    return found


def _read_known(mirror: Mirror) -> dict[str, tuple[int, Facts]]:
    """What the index has kept, with the stamps of the files that said so."""
    if not mirror.index.has_step(EIGHTH):
        return {}
    found = mirror.index.select("select digest, stamp, model, task, seconds, kernels from facts")
    return {digest: (stamp, Facts(*said)) for digest, stamp, *said in found}


def _stamp(file: str) -> int:
    """What changes with a file: its time in nanoseconds; 0 where it is not there."""
    try:
        return os.stat(file).st_mtime_ns  # noqa: PTH116 - ten thousand times: a Path takes longer
    except OSError:
        return 0
