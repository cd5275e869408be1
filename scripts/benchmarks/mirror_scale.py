"""A mirror of ten thousand artifacts: listed, collected, and one of them found and opened.

They are small, and each has its own manifest, its own graph and a signature that is asked for. Some
have a graph that was compiled, each a copy of its own, so that every open of one is its first.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import quantiles

import msgspec
from bundles import make_bundle

from benchmarks.figures import Cost, Figure, make_figure, measure_cost
from benchmarks.minilm import find_minilm
from hubaoti import api
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.manifest import FILENAME
from hubaoti.artifact.package import unpack
from hubaoti.mirror import Mirror
from hubaoti.mirror.rebuild import restore_rows
from hubaoti.mirror.rows import Pin, Signed
from hubaoti.mirror.signer import Signer
from hubaoti.settings import Settings

_ENDPOINT, _OWNER = "https://hub", "acme"
_SIGNER = Signer(key="5" * 64)


def bench_mirror(
    scratch: Path,
    settings: Settings,
    rounds: int,
    bundle: Bundle | None = None,
    artifacts: int = 10_000,
    opened: int = 200,
) -> Iterator[Figure]:
    """Commands as users run them, beside a Python that does nothing; opens in one process."""
    bundle = bundle or api.compile(find_minilm(), scratch / "bundle", settings=settings)
    small = make_bundle(scratch / "small")
    pins = fill_mirror(settings.mirror, [bundle] * opened + [small] * (artifacts - opened))
    idle = [_measure([sys.executable, "-c", "pass"], settings) for _ in range(rounds)]
    for words, goal in (("ls", ("at most", 0.5)), ("ls --json", None), ("gc", None)):
        command = [sys.executable, "-m", "hubaoti.cli", "mirror", *words.split()]
        _measure(command, settings)  # the first one reads what nobody has read yet
        costs = [(_measure(command, settings), nothing) for nothing in idle]
        name = f"mirror {words} of {artifacts} artifacts"
        yield make_figure("mirror", name, [c.seconds - n.seconds for c, n in costs], "s", goal)
        yield make_figure(
            "mirror", f"{name}, of processors", [c.cpu - n.cpu for c, n in costs], "s"
        )
    opens = [*_measure_opens(settings, pins[:opened])]
    name = f"one of {artifacts} found and opened, its signature asked for"
    for cut, goal in ((50, None), (99, ("at most", 5))):
        spent = quantiles([each.seconds * 1000 for each in opens], n=100)[cut - 1]
        yield make_figure("mirror", f"{name}, p{cut}", [spent], "ms", goal)
        spent = quantiles([each.cpu * 1000 for each in opens], n=100)[cut - 1]
        yield make_figure("mirror", f"{name}, p{cut}, of processors", [spent], "ms")


def fill_mirror(root: Path, bundles: Sequence[Bundle]) -> list[Pin]:
    """Make a mirror with an artifact like each bundle; the pins of the pulls that gave them."""
    pins = [Pin(_ENDPOINT, f"{_OWNER}/m{at}", f"{at:040x}", "", "h") for at in range(len(bundles))]
    with Mirror.open(root) as mirror:
        mirror.index.select("pragma synchronous = off")
        mirror.trust.add(_ENDPOINT, _OWNER, _SIGNER)
        digests = [_lay_down(mirror, bundle, at) for at, bundle in enumerate(bundles)]
        restore_rows(mirror)
        for pin, digest, bundle in zip(pins, digests, bundles, strict=True):
            path = f"{bundle.manifest.recipe}/{bundle.manifest.variant}"
            mirror.index.record_pull(pin, digest, path)
            mirror.seen.record_signed(digest, Signed(_ENDPOINT, pin.repo, path, str(_SIGNER)))
    return pins


def _lay_down(mirror: Mirror, bundle: Bundle, at: int) -> str:
    """The files of one more artifact, which no row promises yet; its digest."""
    name = hashlib.sha256(f"{at}".encode()).hexdigest()
    graph = msgspec.structs.replace(bundle.manifest.graphs[0], sha256=name)
    source = msgspec.structs.replace(bundle.manifest.source, commit=f"{at:040x}")
    manifest = msgspec.structs.replace(bundle.manifest, graphs=(graph,), source=source)
    folder = mirror.root / "artifacts" / manifest.digest
    folder.mkdir(mode=0o700)
    for file in manifest.files:
        shutil.copyfile(bundle.path / file.path, folder / file.path)
    (folder / FILENAME).write_bytes(manifest.to_json())
    (mirror.root / "graphs" / name).mkdir(mode=0o700)
    unpack(bundle.path / graph.file, graph.members, mirror.root / "graphs" / name)
    return manifest.digest


def _measure(command: list[str], settings: Settings) -> Cost:
    """What a process takes, from its start to its end."""
    environment = {**os.environ, "HUBAOTI_HOME": str(settings.home)}
    with measure_cost() as cost:
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return cost


def _measure_opens(settings: Settings, pins: list[Pin]) -> Iterator[Cost]:
    """To find what a pull gave, to see that it may run, to hash its graph and open it."""
    import torch

    from hubaoti.runtime.graph import open_graph

    device = torch.device("cpu")
    random.Random(0).shuffle(pins)
    with Mirror.open(settings.mirror) as mirror:
        for pin in pins:
            with measure_cost() as cost:
                found = mirror.find_pull(pin)
                assert found is not None
                artifact, _ = found
                mirror.require_allowed(artifact.digest)
                entry = artifact.manifest.graphs[0]
                mirror.verify_graph(entry)
                open_graph(artifact.graph_folder(entry), entry, device)
            yield cost
