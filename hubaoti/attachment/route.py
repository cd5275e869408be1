"""How calls of one look are answered: by which graph, of inputs that are made how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hubaoti.artifact.schema import Graph as Entry
from hubaoti.runtime.kv_cache import CacheState


@dataclass(frozen=True, slots=True)
class InputShape:
    """What an input is made into; the last axis is cut to what is filled where `cut` says so."""

    place: int
    sizes: tuple[int, ...]
    cut: bool


@dataclass(frozen=True, slots=True)
class Route:
    """How calls of one look are answered: by graph number `graph`, with some inputs made anew.

    `numbers` are those that the call had to give, `filled` what is served of a cache, `sizes` the
    bytes of each input that stays as it is; `small` says that one thread is enough.
    """

    graph: int
    small: bool
    shapes: tuple[InputShape, ...]
    sizes: tuple[int, ...]
    numbers: tuple[int, ...]
    filled: tuple[int, int, int] | None


def find_filled_range(
    entry: Entry, sizes: Mapping[str, int], grown: int | None
) -> tuple[int, int, int] | None:
    """What may be filled for a route to be taken again: from, to, and in which steps."""
    if grown is not None:
        return grown, grown, 1
    return (*entry.bounds["filled"], entry.steps.get("filled", 1)) if "filled" in sizes else None


def is_within(route: Route, held: CacheState | None) -> bool:
    """Whether what is filled is what a route's graph was compiled for."""
    if route.filled is None or held is None:
        return held is None or not held.is_filling
    low, high, step = route.filled
    return low <= held.filled <= high and held.filled % step == 0
