"""Whether graphs claim to serve only sizes that their build was asked for.

A graph's `bounds` are what a call is judged by, and a graph checks nothing: of a size beyond those
that it was compiled for it answers something, whatever that is.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from hubaoti.artifact.schema import Build, Graph

_CACHE, _FILLED = "cache", "filled"
_Bounds = Mapping[str, tuple[int, int]]


def find_size_problems(build: Build, graphs: tuple[Graph, ...]) -> list[str]:
    """All of it, in words; of a good manifest nothing."""
    named = {f"dim {name}": sizes for name, sizes in build.dims.items()}
    pairs = ((n, b) for n, bucket in enumerate(build.buckets, 1) for b in bucket.items())
    named |= {f"bucket {n}, {name}": (low, high, 1) for n, (name, (low, high)) in pairs}
    found = [
        f"build: {name} goes from {low} to {high} in steps of {step}"
        for name, (low, high, step) in named.items()
        if not (0 <= low <= high and high > 0 and step > 0)
    ]
    if found:
        return found
    windows = [graph.cache.window for graph in graphs if graph.cache and graph.cache.window]
    for graph in graphs:
        found += _find_beyond(build, graph, min(windows, default=None))
    return found


def _find_beyond(build: Build, graph: Graph, window: int | None) -> list[str]:
    """Where the bounds of one graph leave the dims of its build, or all of its buckets."""
    found = []
    asked = {name: (low, high) for name, (low, high, _) in build.dims.items()}
    for name, sizes in graph.bounds.items():
        if (allowed := _allow(name, asked, window)) is None:
            found.append(f"{graph.id}: dim {name} is none of its build")
        elif not _holds(allowed, sizes):
            claim, least, most = f"{graph.id}: {name} goes from {sizes[0]} to {sizes[1]}", *allowed
            found.append(f"{claim}, its build was asked for {least} to {most}")
        elif not _keeps_step(build, graph, name):
            step = build.dims[name][2]
            found.append(f"{graph.id}: {name} takes sizes that are no multiples of {step}")
    if not found and not _is_in_bucket(build, graph, window):
        found.append(f"{graph.id}: its bounds are in none of the buckets of its build")
    return found


def _allow(name: str, asked: _Bounds, window: int | None) -> tuple[int, int] | None:
    """The sizes that a dim of a graph may have; None where nobody asked for such a dim.

    What is filled of a cache is no dim of a build: it ends where the cache does. A cache may be
    shorter than was asked: where all are of one length it is one less, so that it is a dim, and a
    layer with a window has no more places than that.
    """
    if name == _FILLED:
        return 0, asked[_CACHE][1] if _CACHE in asked else asked.get(_FILLED, (0, 0))[1]
    if name not in asked or name != _CACHE:
        return asked.get(name)
    low, high = asked[_CACHE]
    return min(low - 1, low if window is None else window), high


def _holds(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _keeps_step(build: Build, graph: Graph, name: str) -> bool:
    """Whether all sizes of a dim are multiples that the build has; a cache's need not be."""
    _, _, step = build.dims.get(name, (0, 0, 1))
    low, high = graph.bounds[name]
    is_one = low == high and low % step == 0
    return name == _CACHE or is_one or graph.steps.get(name, 1) % step == 0


def _is_in_bucket(build: Build, graph: Graph, window: int | None) -> bool:
    """Whether one bucket has all sizes of a graph, of the dims that both have.

    Buckets of caches say nothing of a layer with a window, whose caches have its places.
    """
    skips = [{_FILLED}] if window is None else [{_FILLED}, {_FILLED, _CACHE}]
    for bucket, skipped in product(build.buckets, skips):
        shared = [name for name in bucket if name in graph.bounds and name not in skipped]
        allowed = {name: _allow(name, bucket, window) for name in shared}
        if all(a is not None and _holds(a, graph.bounds[n]) for n, a in allowed.items()):
            return True
    return not build.buckets
