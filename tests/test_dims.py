"""Shapes: bounds, buckets without gaps, the points of the checks, and sizes to trace with."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubaoti.compiler.dims import (
    DimRanges,
    bucket_holds,
    choose_example_sizes,
    choose_odd_middle,
    choose_probes,
    limit_dims,
    limit_graph_dims,
    name_bucket,
    require_covered,
)
from hubaoti.compiler.request import Range, make_bucket_ranges
from hubaoti.errors import BadDim

DEFAULT = {"batch": Range(1, 32), "seq": Range(2, 512)}
CACHED = {"batch": Range(1, 4), "seq": Range(1, 40), "cache": Range(16, 64)}
ALL = ("batch", "seq", "filled", "cache")


def ranges(most: int, steps: tuple[int, ...] = (1,)) -> st.SearchStrategy[Range]:
    """Ranges up to about `most`, whose ends keep to their step."""
    counts = st.integers(1, most)
    return st.builds(
        lambda low, more, step: Range(low * step, (low + more) * step, step),
        counts,
        st.integers(0, most),
        st.sampled_from(steps),
    )


some_dims = st.fixed_dictionaries({"batch": ranges(2000, (1, 8)), "seq": ranges(2000, (1, 8))})


@st.composite
def decoder_dims(draw: st.DrawFn) -> DimRanges:
    """The dims of a block with a cache, as a bucket or a model gives them to its graph."""
    seq, cache = draw(ranges(60, (1, 4))), draw(ranges(60, (1, 8)))
    if cache.high < seq.low:
        seq = Range(1, 60)
    return limit_graph_dims({"batch": Range(1, 4), "seq": seq, "cache": cache}, ALL, {})


def fits(dims: DimRanges, sizes: dict[str, int]) -> bool:
    """Whether sizes are within bounds, keep to steps, and a call fits into its cache."""
    inside = all(
        dims[name].low <= size <= dims[name].high and size % dims[name].step == 0
        for name, size in sizes.items()
    )
    order = [sizes[name] for name in ("seq", "filled", "cache") if "cache" in sizes]
    return inside and sizes.keys() == dims.keys() and order == sorted(order)


# Probes and examples


@given(some_dims)
def test_every_probe_is_within_the_dims_and_every_corner_is_probed(dims: DimRanges) -> None:
    points = choose_probes(dims)
    assert all(fits(dims, point) for point in points)
    lows = {name: sizes.low for name, sizes in dims.items()}
    assert lows in points
    for name, sizes in dims.items():
        assert lows | {name: sizes.high} in points
    assert all(points.count(point) == 1 for point in points)


@given(decoder_dims())
def test_at_every_probe_a_call_fits_into_its_cache(dims: DimRanges) -> None:
    points = choose_probes(dims)
    assert all(fits(dims, point) for point in points)
    for name, sizes in dims.items():
        assert any(point[name] == sizes.low for point in points)
        assert any(point[name] == sizes.high for point in points)


def test_two_dims_are_alike_somewhere() -> None:
    """A model may decide by that, and a program is traced where they are not."""
    dims = {"batch": Range(1, 16), "seq": Range(8, 512, 8), "image": Range(600, 700)}
    points = choose_probes(dims)
    assert {"batch": 8, "seq": 8, "image": 600} in points
    assert not any(point["image"] == point["seq"] for point in points), "they never are"
    nested = {"seq": Range(1, 40), "filled": Range(1, 64), "cache": Range(8, 64)}
    points = choose_probes(nested)
    assert all(point["seq"] <= point["filled"] <= point["cache"] for point in points)
    assert any(point["filled"] == point["cache"] for point in points)


@given(ranges(2000))
def test_the_middle_is_odd_where_there_is_an_odd_size_above_the_lowest(sizes: Range) -> None:
    middle = choose_odd_middle(sizes)
    assert sizes.low <= middle <= sizes.high
    if sizes.high - sizes.low >= 2:
        assert middle % 2 == 1


@given(some_dims)
def test_sizes_to_trace_with_are_within_and_look_like_no_constant(dims: DimRanges) -> None:
    sizes = choose_example_sizes(dims)
    assert fits(dims, sizes)
    assert all(sizes[name] > 2 for name, bounds in dims.items() if bounds.high > 2)
    roomy = all(b.high - max(b.low, 3) > b.step for b in dims.values())
    if roomy:
        assert sizes["batch"] != sizes["seq"]


@given(decoder_dims())
def test_sizes_to_trace_a_cache_with_differ_where_there_is_room(dims: DimRanges) -> None:
    sizes = choose_example_sizes(dims)
    assert fits(dims, sizes)
    room = dims["cache"].high - dims["cache"].step - max(dims["seq"].low + dims["seq"].step, 5)
    if dims["seq"].high > 4 and room > 1:
        assert len({*sizes.values()}) == len(sizes)


def test_sizes_to_trace_with_are_several_times_the_smallest() -> None:
    """Of a size that is one step only, tracing would take the number of steps for a constant."""
    dims = {"batch": Range(1, 8), "seq": Range(8, 64, 8), "wide": Range(8, 64)}
    assert choose_example_sizes(dims) == {"batch": 3, "seq": 24, "wide": 16}
    assert choose_example_sizes({"seq": Range(8, 8, 8)}) == {"seq": 8}
    assert choose_example_sizes({"seq": Range(20, 30)}) == {"seq": 20}


# Bounds


def test_asked_bounds_replace_the_model_s_own() -> None:
    assert limit_dims({"seq": Range(2, 64)}, DEFAULT, None) == DEFAULT | {"seq": Range(2, 64)}
    assert limit_dims({}, DEFAULT, 512) == DEFAULT


def test_a_dim_that_the_model_does_not_have_is_refused_with_those_it_has() -> None:
    with pytest.raises(BadDim, match="'depth'") as caught:
        limit_dims({"depth": Range(2, 64)}, DEFAULT, None)
    assert all(name in caught.value.hint for name in DEFAULT)


def test_seq_ends_where_the_model_s_positions_end() -> None:
    assert limit_dims({"seq": Range(2, 128)}, DEFAULT, 128)["seq"].high == 128
    with pytest.raises(BadDim, match="has 128 positions") as caught:
        limit_dims({"seq": Range(2, 129)}, DEFAULT, 128)
    assert "--dim seq=2:128" in caught.value.hint
    with pytest.raises(BadDim, match="cache goes up to 129") as caught:
        limit_dims({"cache": Range(16, 129)}, CACHED, 128)
    assert "--dim cache=16:128" in caught.value.hint


def test_a_model_without_a_table_has_any_number_of_positions() -> None:
    assert limit_dims({"seq": Range(2, 10**6)}, DEFAULT, None)["seq"].high == 10**6


def test_of_seq_and_cache_the_one_that_nobody_asked_for_gives_way() -> None:
    assert limit_dims({"cache": Range(8, 32)}, CACHED, None)["seq"] == Range(1, 32)
    assert limit_dims({"seq": Range(1, 99)}, CACHED, None)["cache"] == Range(16, 99)
    with pytest.raises(BadDim, match="seq goes up to 99, the cache to 64") as caught:
        limit_dims({"seq": Range(1, 99), "cache": Range(16, 64)}, CACHED, None)
    assert "--dim seq=1:64" in caught.value.hint


def test_what_is_filled_lies_between_a_call_and_its_cache() -> None:
    assert limit_graph_dims(CACHED, ALL, {}) == CACHED | {"filled": Range(1, 64)}
    step = limit_graph_dims(CACHED, ALL, {"seq": Range(1, 1)})
    assert (step["seq"], step["filled"]) == (Range(1, 1), Range(1, 64))
    long = limit_graph_dims(CACHED, ALL, {"seq": Range(20, 40)})
    assert (long["filled"], long["cache"]) == (Range(20, 64), Range(20, 64))
    small = limit_graph_dims(CACHED, ALL, {"cache": Range(16, 24)})
    assert (small["seq"], small["filled"], small["cache"]) == (
        Range(1, 24),
        Range(1, 24),
        Range(16, 24),
    )


def test_a_bucket_s_cache_that_no_call_fits_into_is_refused() -> None:
    dims = CACHED | {"seq": Range(20, 40)}
    with pytest.raises(BadDim, match="seq"):
        limit_graph_dims(dims, ALL, {"cache": Range(16, 18)})


def test_a_bucket_keeps_the_steps_of_its_dim() -> None:
    dims = DEFAULT | {"seq": Range(8, 64, 8)}
    assert limit_graph_dims(dims, dims, {"seq": Range(16, 64)})["seq"] == Range(16, 64, 8)


# Buckets


@st.composite
def dims_and_buckets(draw: st.DrawFn) -> tuple[DimRanges, list[dict[str, Range]]]:
    """One or two small dims, and a few buckets over some of them that keep to their steps."""
    names = draw(st.sampled_from([("seq",), ("batch", "seq")]))
    dims = {name: draw(ranges(4, (1, 2, 3))) for name in names}

    def within(bounds: Range) -> st.SearchStrategy[Range]:
        counts = st.integers(bounds.low // bounds.step, bounds.high // bounds.step)
        return st.tuples(counts, counts).map(
            lambda ends: Range(min(ends) * bounds.step, max(ends) * bounds.step)
        )

    one = st.fixed_dictionaries({}, optional={name: within(dims[name]) for name in names})
    return dims, draw(st.lists(one.filter(bool), min_size=1, max_size=4))


@given(dims_and_buckets())
def test_buckets_are_refused_exactly_where_a_shape_is_in_none(
    both: tuple[DimRanges, list[dict[str, Range]]],
) -> None:
    dims, buckets = both
    every = [range(sizes.low, sizes.high + 1, sizes.step) for sizes in dims.values()]
    shapes = [dict(zip(dims, sizes, strict=True)) for sizes in itertools.product(*every)]
    missing = [
        shape for shape in shapes if not any(bucket_holds(bucket, shape) for bucket in buckets)
    ]
    if not missing:
        require_covered(dims, buckets)
        return
    with pytest.raises(BadDim, match="no bucket serves") as caught:
        require_covered(dims, buckets)
    (gap,) = make_bucket_ranges([str(caught.value).removeprefix("no bucket serves ")])
    inside = [shape for shape in shapes if bucket_holds(gap, shape)]
    assert inside and all(shape in missing for shape in inside)


def test_the_gap_between_two_buckets_is_named() -> None:
    with pytest.raises(BadDim, match="(?m)no bucket serves seq=2:2$") as caught:
        require_covered(DEFAULT | {"seq": Range(1, 64)}, [{"seq": Range(1, 1)}, GAP])
    assert "bucket" in caught.value.hint
    require_covered(DEFAULT | {"seq": Range(1, 64)}, [])


GAP = {"seq": Range(3, 64)}


@pytest.mark.parametrize(
    ("bucket", "words"),
    [
        ({"depth": Range(1, 2)}, "over 'depth', which the model does not have"),
        ({"seq": Range(2, 513)}, "seq=2:513 is outside of the dim, seq=2:512"),
        ({"seq": Range(1, 512)}, "seq=1:512 is outside of the dim"),
        ({"seq": Range(9, 8)}, "seq goes from 9 to 8"),
    ],
)
def test_a_bucket_outside_of_the_dims_is_refused(bucket: dict[str, Range], words: str) -> None:
    with pytest.raises(BadDim, match=words) as caught:
        require_covered(DEFAULT, [{"seq": Range(2, 512)}, bucket])
    assert caught.value.hint


def test_a_bucket_that_does_not_keep_to_the_steps_is_refused() -> None:
    with pytest.raises(BadDim, match="in steps of 8"):
        require_covered({"seq": Range(8, 64, 8)}, [{"seq": Range(8, 12)}, {"seq": Range(16, 64)}])


@pytest.mark.parametrize(
    ("bucket", "name"),
    [
        ({"seq": Range(1, 1)}, "seq1"),
        ({"seq": Range(2, 4096)}, "seq2_4096"),
        ({"batch": Range(1, 4), "seq": Range(1, 1)}, "batch1_4.seq1"),
    ],
)
def test_a_bucket_s_name_says_its_sizes(bucket: dict[str, Range], name: str) -> None:
    assert name_bucket(bucket) == name


def test_what_is_filled_is_nobody_s_to_say() -> None:
    dims = {"seq": Range(1, 8), "filled": Range(1, 64), "cache": Range(8, 64)}
    with pytest.raises(BadDim, match="filled is nobody's to say"):
        limit_dims({"filled": Range(1, 8)}, dims, None)
