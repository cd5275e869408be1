"""Shapes: bounds, the points of the checks, and example inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hubaoti.compiler.request import Range
from hubaoti.compiler.shapes import bounded, example_inputs, example_sizes, odd_middle, probes
from hubaoti.errors import BadDim

some_range = st.tuples(st.integers(1, 2000), st.integers(0, 2000)).map(
    lambda pair: Range(pair[0], pair[0] + pair[1])
)
some_dims = st.fixed_dictionaries({"batch": some_range, "seq": some_range})
DEFAULT = {"batch": Range(1, 32), "seq": Range(2, 512)}


@given(some_dims)
def test_every_probe_is_within_the_dims_and_every_corner_is_probed(dims: dict[str, Range]) -> None:
    points = probes(dims)
    for point in points:
        assert all(dims[name].low <= size <= dims[name].high for name, size in point.items())
    lows = {name: sizes.low for name, sizes in dims.items()}
    assert lows in points
    for name, sizes in dims.items():
        assert lows | {name: sizes.high} in points
    assert all(points.count(point) == 1 for point in points)


@given(some_range)
def test_the_middle_is_odd_where_there_is_an_odd_size_above_the_lowest(sizes: Range) -> None:
    middle = odd_middle(sizes)
    assert sizes.low <= middle <= sizes.high
    if sizes.high - sizes.low >= 2:
        assert middle % 2 == 1


@given(some_dims)
def test_sizes_to_trace_with_are_within_and_look_like_no_constant(dims: dict[str, Range]) -> None:
    sizes = example_sizes(dims)
    assert all(dims[name].low <= size <= dims[name].high for name, size in sizes.items())
    assert all(sizes[name] > 2 for name, bounds in dims.items() if bounds.high > 2)
    roomy = all(b.high - max(b.low, 3) > 1 for b in dims.values())
    if roomy:
        assert sizes["batch"] != sizes["seq"]


def test_asked_bounds_replace_the_model_s_own() -> None:
    assert bounded({"seq": Range(2, 64)}, DEFAULT, None) == DEFAULT | {"seq": Range(2, 64)}
    assert bounded({}, DEFAULT, 512) == DEFAULT


def test_a_dim_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(BadDim, match="'seq'"):
        bounded({"seq": Range(2, 64)}, {"batch": Range(1, 2)}, None)


def test_seq_ends_where_the_model_s_positions_end() -> None:
    assert bounded({"seq": Range(2, 128)}, DEFAULT, 128)["seq"].high == 128
    with pytest.raises(BadDim, match="has 128 positions") as caught:
        bounded({"seq": Range(2, 129)}, DEFAULT, 128)
    assert "--dim seq=2:128" in caught.value.hint


def test_a_model_without_a_table_has_any_number_of_positions() -> None:
    assert bounded({"seq": Range(2, 10**6)}, DEFAULT, None)["seq"].high == 10**6


@given(st.integers(1, 9), st.integers(1, 40), st.integers(5, 1000))
def test_example_inputs_are_of_the_vocabulary_and_every_row_has_a_token(
    batch: int, seq: int, vocabulary: int
) -> None:
    made = example_inputs({"batch": batch, "seq": seq}, vocabulary, torch.device("cpu"))
    ids, mask = made["input_ids"], made["attention_mask"]
    assert ids.shape == mask.shape == (batch, seq)
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.min() >= 0 and ids.max() < vocabulary
    assert set(mask.unique().tolist()) <= {0, 1}
    assert mask.sum(1).min() >= 1
    if batch > 1 and seq > 1:
        assert mask.min() == 0, "no row is padded"


def test_example_inputs_are_always_the_same() -> None:
    sizes, cpu = {"batch": 2, "seq": 5}, torch.device("cpu")
    first, second = (example_inputs(sizes, 99, cpu)["input_ids"] for _ in range(2))
    assert torch.equal(first, second)
