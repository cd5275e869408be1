"""Processes that do whatever can be done to one mirror, all at once; then every byte is hashed.

Its budget is for a third of the artifacts that they put there, again and again.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

from bundles import CPU, make_bundle

from benchmarks.figures import Figure, make_figure
from hubaoti.artifact.bundle import Bundle
from hubaoti.errors import ArtifactHeld, MirrorFull
from hubaoti.mirror import Mirror, PullOrigin
from hubaoti.mirror.gc import BUDGET, collect
from hubaoti.mirror.removal import remove
from hubaoti.settings import Settings

_BUNDLES, _SIZE = 24, 20_000  # bytes of each, about
_BUDGET = _BUNDLES // 3 * _SIZE
_PINS = 4  # bundles that are pinned now and then: less than the budget
_ORIGIN = PullOrigin("https://hub", "acme/mixed", "c" * 40, "path")
_HELD_UP = (ArtifactHeld, MirrorFull)  # what an operation may come to: another one has it pinned


def _put(mirror: Mirror, bundle: Bundle) -> None:
    files = {file.path: bundle.path / file.path for file in bundle.manifest.all_files()}
    mirror.put(bundle.manifest, files, _ORIGIN)


def _open(mirror: Mirror, bundle: Bundle) -> None:
    if mirror.artifact(bundle.manifest.digest):
        mirror.require_allowed(bundle.manifest.digest)
        mirror.usage.record_open(bundle.manifest.digest)


def _pin(mirror: Mirror, bundle: Bundle) -> None:
    if int(bundle.path.name) < _PINS and mirror.index.row(bundle.manifest.digest):
        mirror.usage.pin(bundle.manifest.digest)


def _unpin(mirror: Mirror, bundle: Bundle) -> None:
    mirror.usage.unpin(bundle.manifest.digest)


def _evict(mirror: Mirror, _: Bundle) -> None:
    collect(mirror, max_bytes=_BUDGET // 2)


def _collect(mirror: Mirror, _: Bundle) -> None:
    collect(mirror)


def _verify(mirror: Mirror, bundle: Bundle) -> None:
    # It may leave meanwhile: whoever opens one holds it, so that it stays.
    with mirror.leases.changing_files():
        if artifact := mirror.artifact(bundle.manifest.digest):
            mirror.verify(artifact)


def _remove(mirror: Mirror, bundle: Bundle) -> None:
    if mirror.index.row(bundle.manifest.digest):
        remove(mirror, bundle.manifest.digest)


# Each with how often it is done, of 100.
OPERATIONS: dict[Callable[[Mirror, Bundle], None], int] = {
    _put: 40,
    _open: 30,
    _pin: 4,
    _unpin: 6,
    _evict: 2,
    _collect: 4,
    _verify: 10,
    _remove: 4,
}


def mix(root: Path, folder: Path, seed: int, count: int) -> tuple[int, Counter[str]]:
    """So many random operations: the most bytes that were seen, and how often each was done."""
    chance, most, done = random.Random(seed), 0, Counter[str]()
    bundles = [Bundle.read(each) for each in sorted(folder.iterdir())]
    with Mirror.open(root) as mirror:
        for work in chance.choices([*OPERATIONS], [*OPERATIONS.values()], k=count):
            with suppress(*_HELD_UP):
                work(mirror, chance.choice(bundles))
                done[work.__name__] += 1
            most = max(most, mirror.usage.count_bytes())
    return most, done


def bench_mixed(
    scratch: Path, settings: Settings, rounds: int, operations: int = 20_000, processes: int = 8
) -> Iterator[Figure]:
    """Operations of all processes together; the most bytes of the budget; what is wrong after."""
    for at in range(_BUNDLES):
        content = random.Random(at).randbytes(_SIZE)
        make_bundle(scratch / f"bundles/{at:02}", CPU, {"root.so": content}, mode=f"{at}")
    with Mirror.open(settings.mirror) as mirror:
        mirror.usage.record_number(BUDGET, float(_BUDGET))
        mirror.trust.add(_ORIGIN.endpoint, _ORIGIN.publisher)
        each = operations // processes
        work = [(mirror.root, scratch / "bundles", seed, each) for seed in range(processes)]
        with get_context("spawn").Pool(processes) as pool:
            began = time.perf_counter()
            found = pool.starmap(mix, work)
            seconds = time.perf_counter() - began
        done = sum((counts for _, counts in found), Counter[str]())
        name = f"{operations} operations of {processes} processes"
        yield make_figure("mixed", f"{name}, a second", [sum(done.values()) / seconds], "")
        kinds = len(OPERATIONS)
        yield make_figure("mixed", f"{name}, kinds done", [len(done)], "", ("at least", kinds))
        most = max(most for most, _ in found) / _BUDGET
        yield make_figure("mixed", f"{name}, most of the budget", [most], "", ("at most", 1))
        wrong = float(count_wrong(mirror))
        yield make_figure("mixed", f"{name}, wrong after", [wrong], "", ("at most", 0))


def count_wrong(mirror: Mirror) -> int:
    """Artifacts that are listed and not whole, and what lies there that nobody promises."""
    wrong = 0
    for row in mirror.ls():
        artifact = mirror.artifact(row.digest)
        if artifact is None:
            wrong += 1
        else:
            mirror.verify(artifact)
    return wrong + len(collect(mirror).orphans) + len([*(mirror.root / "tmp").iterdir()])
