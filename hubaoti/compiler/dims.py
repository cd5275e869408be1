"""Dims: their bounds, and the sizes at which a graph is traced and checked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hubaoti.compiler.request import Range, check_dim
from hubaoti.errors import BadDim

Sizes = dict[str, int]
DimRanges = dict[str, Range]
# A dim of these is at most the next one: what a call brings, what a cache then holds, what it can.
NESTED = ("seq", "filled", "cache")


@dataclass(frozen=True, slots=True)
class Probe:
    """Dims at which a graph is compared with eager; what was `requested` before a cap, and why."""

    sizes: Sizes
    requested: Sizes | None = None
    capped: str | None = None


def limit_dims(
    requested: Mapping[str, Range], default: DimRanges, positions: int | None
) -> DimRanges:
    """The dims of a model with the requested bounds.

    Raises:
        BadDim: it has no such dim, its positions end before the requested maximum, or a cache is
            smaller than what one call brings.
    """
    if "filled" in requested:
        raise BadDim(
            "filled is nobody's to say: it goes from what a call brings to what a cache holds",
            hint="bound those: --dim seq=1:4096 --dim cache=16:32768",
        )
    for name in requested.keys() - default.keys():
        names = ", ".join(default) or "none"
        raise BadDim(f"the model has no dim {name!r}", hint=f"its dims are: {names}")
    dims: DimRanges = {**default, **requested}
    for name in ("seq", "cache"):
        if positions is not None and name in dims and dims[name].high > positions:
            raise BadDim(
                f"{name} goes up to {dims[name].high}, the model has {positions} positions",
                hint=f"end it there: --dim {name}={min(dims[name].low, positions)}:{positions}",
            )
    if "cache" in dims and dims["seq"].high > dims["cache"].high:
        if "seq" in requested and "cache" in requested:
            raise BadDim(
                f"seq goes up to {dims['seq'].high}, the cache to {dims['cache'].high}",
                hint=f"one call fills no more than the cache: --dim seq=1:{dims['cache'].high}",
            )
        # The one of which nobody said how far it goes is made to fit the other.
        fitted, fixed = ("seq", "cache") if "cache" in requested else ("cache", "seq")
        high = dims[fixed].high
        dims[fitted] = Range(min(dims[fitted].low, high), high)
    return dims


def limit_graph_dims(
    dims: DimRanges, names: Iterable[str], bucket: Mapping[str, Range]
) -> DimRanges:
    """The bounds of a graph's dims: the model's, or the bucket's where it has the dim.

    A call fits into its cache, so that a cache of fewer places than a call brings has no graph.

    Raises:
        BadDim: no call fits into a bucket's cache.
    """
    found = {name: sizes for name, sizes in dims.items() if name not in bucket}
    for name, sizes in bucket.items():
        found[name] = Range(sizes.low, sizes.high, dims[name].step)
    if "cache" in found:
        seq, cache = found["seq"], found["cache"]
        most = min(seq.high, cache.high // seq.step * seq.step)
        found["seq"] = Range(seq.low, most, seq.step)
        least = _round_up(max(seq.low, cache.low), cache)
        found["cache"] = _ensure_several_lengths(Range(least, cache.high, cache.step), seq)
        found["filled"] = Range(seq.low, cache.high)
        check_dim("seq", found["seq"])
    return {name: found[name] for name in names}


def _ensure_several_lengths(cache: Range, seq: Range) -> Range:
    """The lengths of a cache, and one that is shorter where there is but one, which calls fill.

    Of a constant length torch takes what is filled to be another: a part of a tensor is laid out in
    another way than the whole.
    """
    if cache.low < cache.high or seq.low >= cache.high:
        return cache
    return Range(cache.high - 1, cache.high)


def _round_up(size: int, sizes: Range) -> int:
    """The next size that keeps to the steps of a dim."""
    return -(-size // sizes.step) * sizes.step


def require_covered(dims: DimRanges, buckets: Sequence[Mapping[str, Range]]) -> None:
    """Refuse buckets that leave a shape of the dims to no graph.

    Sizes between two neighbouring ends of the buckets are alike, so one of each is looked at.

    Raises:
        BadDim: a bucket leaves the dims, or a shape is in no bucket; the message names it.
    """
    for bucket in buckets:
        for name, sizes in bucket.items():
            _require_inside(dims, name, sizes)
    names = sorted({name for bucket in buckets for name in bucket})
    cuts = [_split_range(dims[name], [b[name] for b in buckets if name in b]) for name in names]
    for gap in itertools.product(*cuts) if buckets else ():
        shape = {name: sizes.low for name, sizes in zip(names, gap, strict=True)}
        if not any(bucket_holds(bucket, shape) for bucket in buckets):
            words = ",".join(f"{name}={sizes}" for name, sizes in zip(names, gap, strict=True))
            raise BadDim(
                f"no bucket serves {words}", hint=f"add a bucket {words}, or narrow the dims"
            )


def _require_inside(dims: DimRanges, name: str, sizes: Range) -> None:
    """Refuse a bucket over a dim that is not there, or beyond its bounds."""
    if name not in dims:
        raise BadDim(
            f"a bucket is over {name!r}, which the model does not have",
            hint=f"its dims are: {', '.join(dims)}",
        )
    check_dim(name, Range(sizes.low, sizes.high, dims[name].step))
    if sizes.low < dims[name].low or sizes.high > dims[name].high:
        raise BadDim(
            f"the bucket {name}={sizes} is outside of the dim, {name}={dims[name]}",
            hint="widen the dim with --dim, or narrow the bucket",
        )


def _split_range(dim: Range, buckets: Sequence[Range]) -> list[Range]:
    """A dim, cut where a bucket begins, and where the sizes after one begin."""
    ends = (bucket.high + dim.step for bucket in buckets)
    cuts = sorted({dim.low, *(bucket.low for bucket in buckets), *ends, dim.high + dim.step})
    inside = [cut for cut in cuts if cut <= dim.high + dim.step]
    return [Range(low, after - dim.step) for low, after in itertools.pairwise(inside)]


def span_sizes(sizes: Sequence[int]) -> Range:
    """The bounds of the sizes that were seen, of which there is one at least."""
    return Range(min(sizes), max(sizes))


def bucket_holds(bucket: Mapping[str, Range], sizes: Mapping[str, int]) -> bool:
    """Whether a shape is in a bucket."""
    return all(bounds.low <= sizes[name] <= bounds.high for name, bounds in bucket.items())


def name_bucket(bucket: Mapping[str, Range]) -> str:
    """A bucket as a part of a graph's name: `seq1`, `seq2_4096`."""
    words = (
        f"{name}{sizes.low}" + (f"_{sizes.high}" if sizes.high != sizes.low else "")
        for name, sizes in bucket.items()
    )
    return ".".join(words)


def choose_probes(dims: DimRanges) -> list[Sizes]:
    """All dims smallest, an odd middle, each dim at its largest with the others smallest, and a
    point at which they are alike for each two that are nowhere yet.

    A program is traced where no two dims are alike, and what a model does where they are is seen
    only there.
    """
    smallest = {name: sizes.low for name, sizes in dims.items()}
    middle = {name: choose_odd_middle(sizes) for name, sizes in dims.items()}
    corners = [smallest | {name: sizes.high} for name, sizes in dims.items()]
    points = [nest_sizes(point, dims) for point in (smallest, middle, *corners)]
    for one, other in itertools.combinations(dims, 2):
        is_seen = any(point[one] == point[other] for point in points)
        if not is_seen and (tie := _choose_tie(one, other, smallest, dims)):
            points.append(tie)
    return [point for index, point in enumerate(points) if point not in points[:index]]


def _choose_tie(one: str, other: str, smallest: Sizes, dims: DimRanges) -> Sizes | None:
    """The smallest point at which two dims are alike, if there is one."""
    others = dims[other].sizes
    common = next((size for size in dims[one].sizes if size in others), None)
    if common is None:
        return None
    point = nest_sizes(smallest | {one: common, other: common}, dims)
    return point if point[one] == point[other] else None


def nest_sizes(sizes: Sizes, dims: DimRanges) -> Sizes:
    """The sizes, made such that a call fits into what is filled, and that into the cache."""
    fitting = dict(sizes)
    for inner, outer in itertools.pairwise(name for name in NESTED if name in sizes):
        if "filled" in sizes:
            least = _round_up(max(fitting[outer], fitting[inner]), dims[outer])
            fitting[outer] = min(least, dims[outer].high)
    return fitting


def choose_odd_middle(sizes: Range) -> int:
    """An odd size between the bounds, not far above the smallest: a shape nobody tuned for."""
    if sizes.step > 1:
        return min(sizes.low + sizes.step, sizes.high)
    middle = min((sizes.low + sizes.high) // 2, sizes.low + 60) | 1
    return max(sizes.low, min(middle, sizes.high))


def choose_example_sizes(dims: DimRanges) -> Sizes:
    """Sizes to trace with: no two alike, none 0 or 1, which tracing would take for constants.

    Where there is room they are multiples of the smallest size, and not that size: a model that
    takes only multiples of 8, of which 8 is the smallest, takes those, and is seen to do so.
    """
    sizes: Sizes = {}
    order = sorted(dims, key=lambda name: NESTED.index(name) if name in NESTED else -1)
    for name in order:
        inner = [sizes[each] + 1 for each in NESTED if each in sizes and name in NESTED]
        bounds, least = dims[name], max([3, *inner])
        candidates = [_list_multiples(max(least, bounds.low), bounds.step, bounds.high)]
        if name != "filled":
            # And room for the dims that hold this one.
            outer = NESTED[NESTED.index(name) + 1 :] if name in NESTED else ()
            high = min([bounds.high, *(dims[each].high - 2 for each in outer if each in dims)])
            candidates.insert(0, _list_multiples(max(least, 2 * bounds.low), bounds.low, high))
        sizes[name] = next(
            (n for n in itertools.chain(*candidates) if n not in sizes.values()), bounds.high
        )
    return {name: sizes[name] for name in dims}


def _list_multiples(least: int, unit: int, high: int) -> range:
    """The multiples of a unit from `least` to `high`."""
    return range(-(-least // unit) * unit, high + 1, unit)
