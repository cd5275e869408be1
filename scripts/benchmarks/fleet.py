"""A fleet before one endpoint: hosts of several kinds that pull, and of each key one that builds.

No host is there: each is described by a file, as `pull --host` takes it, and has a home of its own.
What a compile would give is a bundle that is made up; it is pushed as one is.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from bundles import CUDA, make_bundle, make_gpu_host, make_host

from benchmarks.figures import Figure, make_figure
from hubaoti.artifact.schema import ModelSource
from hubaoti.errors import NoArtifact, NoMatch, RepoNotFound
from hubaoti.host.described import read_host
from hubaoti.host.probe import Gpu, Host
from hubaoti.hub.layout import RepoRef
from hubaoti.hub.pull import pull_artifact
from hubaoti.hub.push import Destination, push_bundles
from hubaoti.server import serve_in_thread
from hubaoti.settings import Settings

_TORCHES = ("2.11.0", "2.13.0", "2.15.0")
_GPUS = (80, 90, 100, 120)  # none of which runs what is for another
_DOWNLOADING = "downloading"


@dataclass(frozen=True)
class Fleet:
    """How many hosts there are, of all kinds, and how many keys they ask for together."""

    hosts: int = 1000
    keys: int = 50


@dataclass(frozen=True)
class Flight:
    """How many processes want one key at once, and how often that is tried."""

    processes: int = 32
    times: int = 10


def bench_fleet(
    scratch: Path,
    settings: Settings,
    rounds: int,
    fleet: Fleet = Fleet(),
    flight: Flight = Flight(),
) -> Iterator[Figure]:
    """Compiles of a fleet, for each key that was asked for; downloads of one key, for each time."""
    with serve_in_thread(scratch / "hub") as endpoint:
        here = replace(settings, endpoint=endpoint.url, token=endpoint.token)
        yield from _bench_hosts(scratch, here, fleet)
        yield from _bench_flight(scratch, here, flight)


def make_kinds(folder: Path) -> list[tuple[dict[str, Any], Path]]:
    """Twelve kinds of hosts: what is compiled for each, and the file that describes it."""
    kinds = []
    for torch, sm in itertools.product(_TORCHES, _GPUS):
        target = {**CUDA, "torch": f"{torch}+cu130", "sm": sm}
        host = replace(make_gpu_host(), gpus=(Gpu(f"fake sm{sm}", sm, 80 << 30),))
        assert host.torch is not None
        host = replace(host, torch=replace(host.torch, version=str(target["torch"])))
        file = folder / f"{torch}-{sm}.json"
        file.write_text(json.dumps(host.to_dict(), default=str))
        kinds.append((target, file))
    return kinds


def _bench_hosts(scratch: Path, here: Settings, fleet: Fleet) -> Iterator[Figure]:
    scratch = scratch / "fleet"
    scratch.mkdir()
    kinds, chance = make_kinds(scratch), random.Random(0)
    models = range(-(-fleet.keys // len(kinds)))
    keys = [*itertools.product(models, range(len(kinds)))][: fleet.keys]
    wants = keys + chance.choices(keys, k=fleet.hosts - len(keys))
    chance.shuffle(wants)
    compiled, pulled, spent = Counter[tuple[int, int]](), Counter[tuple[int, int]](), []
    for number, want in enumerate(wants):
        (target, file), ref = kinds[want[1]], RepoRef(f"fleet/model{want[0]}")
        own = replace(here, home=scratch / f"homes/{number}")
        host, began = read_host(file, make_host()), time.perf_counter()
        if _pull(ref, own, host):
            pulled[want] += 1
            spent.append((time.perf_counter() - began) * 1000)
            continue
        compiled[want] += 1
        source = ModelSource(model=ref.repo, commit="c" * 40)
        bundle = make_bundle(scratch / f"built/{number}", target, source=source, mode=f"m{want[0]}")
        push_bundles([bundle], Destination(ref), own)
    name = f"{fleet.hosts} hosts of {len(kinds)} kinds over {fleet.keys} keys"
    again = float(sum(compiled.values()) - fleet.keys)
    yield make_figure("fleet", f"{name}, compiles more than keys", [again], "", ("at most", 0))
    rest = float(fleet.hosts - fleet.keys - sum(pulled.values()))
    yield make_figure("fleet", f"{name}, others that did not pull", [rest], "", ("at most", 0))
    most = [float(each) for each in compiled.values()]
    yield make_figure("fleet", f"{name}, compiles a key", most, "", ("at least", 1))
    yield make_figure("fleet", f"{name}, a pull", spent, "ms")


def _pull(ref: RepoRef, settings: Settings, host: Host) -> bool:
    """Whether a repo has an artifact for a host, which is in its mirror then."""
    with suppress(NoArtifact, NoMatch, RepoNotFound):
        pull_artifact(ref, settings, host, trust=True)
        return True
    return False


def _bench_flight(scratch: Path, here: Settings, flight: Flight) -> Iterator[Figure]:
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.fleet"])
    others, most = list[float](), flight.processes
    start = context.Barrier(most, timeout=300)
    with context.Pool(most, initializer=_wait_at, initargs=(start,)) as pool:
        for turn in range(flight.times):
            bundle = make_bundle(scratch / f"flight{turn}", mode=f"flight{turn}")
            ref = RepoRef(f"fleet/flight{turn}")
            push_bundles([bundle], Destination(ref), here)
            own = replace(here, home=scratch / f"flown{turn}")
            work = [(ref.repo, own, bundle.manifest.digest)] * most
            downloads = pool.starmap(_fly, work, chunksize=1)
            others.append(float(sum(downloads) - 1))
    name = f"{most} processes on one key, {flight.times} times"
    yield make_figure("fleet", f"{name}, downloads more than one", others, "", ("at most", 0))


_START: Barrier | None = None


def _wait_at(start: Barrier) -> None:
    global _START
    _START = start


def _fly(repo: str, settings: Settings, digest: str) -> bool:
    """Pull at the same moment as all others; whether it was this process that downloaded."""
    steps: list[str] = []
    assert _START is not None
    _START.wait()
    pulled = pull_artifact(RepoRef(repo), settings, make_host(), trust=True, progress=steps.append)
    assert pulled.artifact.digest == digest
    return any(step.startswith(_DOWNLOADING) for step in steps)
