"""Infer: which sizes are dims, and which follow from others, from calls of different sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.compiler.capture import Call, make_call
from hubaoti.compiler.infer_dims import (
    Dims,
    infer_signature,
    mix_sizes,
    read_stated_dims,
    vary_call,
)
from hubaoti.errors import BadDim, BadRequest

LOOKS = {"batch": (2, 3, 5), "seq": (6, 11, 13)}


def call(**given: Any) -> Call:
    """A call with tensors of these shapes; anything else is given as it is."""

    def value(item: Any) -> Any:
        if isinstance(item, tuple):
            return torch.empty(item)
        return item

    def forward(**kwargs: Any) -> None: ...

    return make_call(forward, (), {name: value(item) for name, item in given.items()})


def shapes(*calls: Call, dims: Dims | None = None) -> dict[str, tuple[int | str, ...]]:
    """The shape of each input, as inferred."""
    face = infer_signature(calls, dims or Dims({}), None)
    return {entry.name: entry.shape for entry in face.inputs}


# Sizes


def test_what_never_changes_is_a_number() -> None:
    assert shapes(call(x=(2, 8)), call(x=(3, 8))) == {"x": ("x_0", 8)}
    assert shapes(call(x=(2, 8))) == {"x": (2, 8)}


def test_sizes_that_change_together_are_one_dim() -> None:
    calls = [call(x=(b, s, 4), y=(s, b)) for b, s in ((2, 6), (3, 11), (5, 13))]
    assert shapes(*calls) == {"x": ("x_0", "x_1", 4), "y": ("x_1", "x_0")}


def test_known_dims_keep_their_names() -> None:
    calls = [call(x=(b, s), mask=(b, 1, s, s)) for b, s in zip(*LOOKS.values(), strict=True)]
    assert shapes(*calls, dims=Dims(dict(LOOKS))) == {
        "x": ("batch", "seq"),
        "mask": ("batch", 1, "seq", "seq"),
    }


def test_a_size_that_follows_from_a_dim_says_how() -> None:
    calls = [call(x=(s,), twice=(2 * s,), more=(s + 7,), both=(3 * s - 1,)) for s in (6, 11, 13)]
    assert shapes(*calls) == {
        "x": ("x_0",),
        "twice": ("2*x_0",),
        "more": ("x_0+7",),
        "both": ("3*x_0-1",),
    }


def test_the_order_in_which_inputs_come_does_not_matter() -> None:
    calls = [call(long=(4 * b,), rows=(b,)) for b in (2, 3, 5)]
    assert shapes(*calls) == {"long": ("4*rows_0",), "rows": ("rows_0",)}


def test_a_size_that_is_two_others_together_is_their_sum() -> None:
    calls = [call(image=(i, 4), text=(t, 4), mask=(i + t,)) for i, t in ((4, 7), (6, 12), (9, 14))]
    assert shapes(*calls) == {
        "image": ("image_0", 4),
        "text": ("text_0", 4),
        "mask": ("image_0+text_0",),
    }


def test_two_calls_are_too_few_to_tell_a_relation() -> None:
    calls = [call(x=(s,), twice=(2 * s,), sum=(3 * s + 1,)) for s in (6, 11)]
    found = shapes(*calls)
    assert {*map(str, found.values())} == {"('x_0',)", "('twice_0',)", "('sum_0',)"}


def test_of_a_half_it_is_the_other_that_is_twice() -> None:
    calls = [call(x=(2 * s,), half=(s,)) for s in (6, 11, 13)]
    assert shapes(*calls) == {"x": ("2*half_0",), "half": ("half_0",)}


def test_what_shrinks_while_another_grows_is_a_dim_of_its_own() -> None:
    calls = [call(x=(s,), rest=(20 - s,)) for s in (6, 11, 13)]
    found = shapes(*calls)
    assert found["x"] != found["rest"]
    assert all(DimExpr.parse(str(shape[0])).plain for shape in found.values())


sizes = st.lists(st.integers(1, 60), min_size=3, max_size=4, unique=True)


@given(sizes, st.integers(1, 5), st.integers(0, 9))
def test_what_is_inferred_holds_in_every_call(series: list[int], factor: int, plus: int) -> None:
    """Whatever relation is found, it is true of the calls that it was found in."""
    calls = [call(x=(n,), y=(factor * n + plus,), z=(n * n + 1, 3)) for n in series]
    dims = Dims({})
    face = infer_signature(calls, dims, None)
    for at, each in enumerate(calls):
        known = {name: sizes[at] for name, sizes in dims.series.items()}
        for entry, tensor in zip(face.inputs, each.tensors, strict=True):
            found = [n if isinstance(n, int) else DimExpr.parse(n).at(known) for n in entry.shape]
            assert found == list(tensor.shape)


def test_a_new_dim_takes_no_name_that_is_taken() -> None:
    dims = Dims({"x_0": (1, 2, 4)})
    assert shapes(*[call(x=(n,)) for n in (9, 12, 14)], dims=dims) == {"x": ("x_0x",)}
    assert dims.series == {"x_0": (1, 2, 4), "x_0x": (9, 12, 14)}


def test_of_calls_that_the_user_made_no_multiple_is_inferred() -> None:
    """Batches of 1, 2 and 3 and texts of 8, 16 and 24 have nothing to do with each other."""
    calls = [call(x=(n, 8 * n), y=(n + 8 * n,)) for n in (1, 2, 3)]
    assert shapes(*calls)["x"] == ("x_0", "8*x_0")
    assert shapes(*calls, dims=Dims({}, related=False)) == {"x": ("x_0", "x_1"), "y": ("x_0+x_1",)}


# Numbers


def test_a_number_that_follows_a_size_is_that_size() -> None:
    calls = [call(x=(s,), length=s, width=2 * s + 1, heads=4) for s in (6, 11, 13)]
    face = infer_signature(calls, Dims({}), None)
    assert face.template["kwargs"] == {
        "x": {"tensor": 0},
        "length": {"size": "x_0"},
        "width": {"size": "2*x_0+1"},
        "heads": 4,
    }


def test_numbers_within_lists_follow_sizes_too() -> None:
    calls = [call(x=(s,), grid=[[1, s], {"rows": s}]) for s in (6, 11, 13)]
    face = infer_signature(calls, Dims({}), None)
    assert face.template["kwargs"]["grid"] == [
        [1, {"size": "x_0"}],
        {"dict": {"rows": {"size": "x_0"}}},
    ]


@pytest.mark.parametrize(
    "values", [(0.5, 0.25, 0.125), (1, 9, 2), (True, False, True), ("a", "b", "c"), (6, None, 13)]
)
def test_a_value_that_follows_no_size_is_refused_with_what_it_was(values: tuple[Any, ...]) -> None:
    calls = [call(x=(s,), t=value) for s, value in zip((6, 11, 13), values, strict=True)]
    with pytest.raises(BadRequest, match="differ in a value that is no tensor") as caught:
        infer_signature(calls, Dims({}), None, "Flux")
    assert ", ".join(map(repr, values)) in str(caught.value)
    assert "Flux" in str(caught.value)
    assert "tensor" in caught.value.hint


def test_a_whole_float_is_no_size() -> None:
    calls = [call(x=(s,), t=float(s)) for s in (6, 11, 13)]
    with pytest.raises(BadRequest, match=r"6\.0, 11\.0, 13\.0"):
        infer_signature(calls, Dims({}), None)


# Structure


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (call(x=(2,), mask=(2,)), r"x \(float32 of 1 axes\) and x .*, mask \(float32 of 1 axes\)"),
        (call(x=(2, 1)), r"float32 of 1 axes\) and x \(float32 of 2 axes"),
        (call(x=torch.ones(2, dtype=torch.int64)), r"x \(int64 of 1 axes"),
        (call(y=(2,)), r"x \(.*\) and y \("),
    ],
)
def test_calls_of_another_structure_are_refused_with_both(other: Call, words: str) -> None:
    with pytest.raises(BadRequest, match=f"Flux have different structures: .*{words}") as caught:
        infer_signature([call(x=(2,)), other], Dims({}), None, "Flux")
    assert "one structure" in caught.value.hint


def test_what_is_a_literal_once_and_a_list_then_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"\[1, 2\]"):
        infer_signature([call(x=(2,), t=[1]), call(x=(2,), t=[1, 2])], Dims({}), None)


# What numbers mean


@pytest.mark.parametrize(
    ("name", "tensor", "values"),
    [
        ("x", torch.zeros(1), "real"),
        ("attention_mask", torch.zeros(1), "mask"),
        ("visible", torch.zeros(1, dtype=torch.bool), "mask"),
        ("position_ids", torch.zeros(1, dtype=torch.int64), "position"),
        ("input_ids", torch.tensor([3]), "ids<99"),
        ("decoder_input_ids", torch.tensor([3]), "ids<99"),
        ("timestep", torch.tensor([3, 8]), "any<9"),
        ("timestep", torch.empty(2, dtype=torch.int64, device="meta"), "any<1"),
        ("freqs", torch.zeros(1, dtype=torch.complex64), "real"),
    ],
)
def test_what_an_input_s_numbers_mean(name: str, tensor: torch.Tensor, values: str) -> None:
    face = infer_signature([call(**{name: tensor})], Dims({}), 99)
    assert [entry.values for entry in face.inputs] == [values]


def test_names_are_words_and_no_two_are_equal() -> None:
    given = {"Hidden States": (1,), "hidden_states": (2,), "0": (3,)}
    names = [entry.name for entry in infer_signature([call(**given)], Dims({}), None).inputs]
    assert names == ["hidden_states", "hidden_statesx", "x0"]


# Stated shapes


def test_stated_names_are_those_of_the_dims() -> None:
    calls = [call(hidden=(b, s, 4), mask=(b, s)) for b, s in ((2, 6), (3, 11))]
    dims = read_stated_dims(calls, {"hidden": ("batch", "seq", None)})
    assert dims.series == {"batch": (2, 3), "seq": (6, 11)}
    assert shapes(*calls, dims=dims) == {"hidden": ("batch", "seq", 4), "mask": ("batch", "seq")}


def test_stated_relations_hold_though_the_calls_are_too_few_to_tell() -> None:
    calls = [call(x=(s, 4), long=(2 * s,), more=(s + 7,)) for s in (6, 11)]
    named = {"x": ("seq", None), "long": ("2*seq",), "more": ("seq+7",)}
    assert shapes(*calls, dims=read_stated_dims(calls, named)) == {
        "x": ("seq", 4),
        "long": ("2*seq",),
        "more": ("seq+7",),
    }


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"hidden": ("batch", "2*batch", None)}, r"its shape says 2\*batch: that is \[4, 6\]"),
        ({"hidden": ("2*rows", "seq", None)}, "2\\*rows: rows stands alone nowhere"),
        ({"hidden": ("batch", "seq/2", None)}, "'seq/2' is no extent"),
        ({"ghost": ("batch",)}, "no input 'ghost'"),
        ({"hidden": ("batch", "seq")}, "hidden has 3 axes, its shape names 2"),
        ({"hidden": ("batch", "batch", None)}, r"batch is \(2, 3\) in one input, and \(6, 11\)"),
    ],
)
def test_a_stated_shape_that_no_call_has_is_refused(
    shape: dict[str, tuple[str | None, ...]], words: str
) -> None:
    calls = [call(hidden=(b, s, 4)) for b, s in ((2, 6), (3, 11))]
    with pytest.raises(BadDim, match=words) as caught:
        read_stated_dims(calls, shape)
    assert caught.value.hint


def test_one_call_is_varied_where_its_shapes_are_stated() -> None:
    named = {"hidden": ("batch", "seq", None), "mask": ("batch", "2*seq")}
    first = call(hidden=(2, 6, 4), mask=(2, 12))
    calls = vary_call(first, named, {})
    assert calls[0] is first and len(calls) == 3
    assert shapes(*calls, dims=read_stated_dims(calls, named)) == {
        "hidden": ("batch", "seq", 4),
        "mask": ("batch", "2*seq"),
    }
    assert all(tensor.is_meta for each in calls[1:] for tensor in each.tensors)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"x": ("2*rows",)}, "rows stands alone nowhere"),
        ({"x": ("rows", "columns")}, "x has 1 axes, its shape names 2"),
        ({"y": ("rows",)}, "no input 'y'"),
        ({"x": ("rows of x",)}, "no extent"),
    ],
)
def test_a_stated_shape_that_the_only_call_has_not_is_refused(
    named: dict[str, tuple[str, ...]], words: str
) -> None:
    with pytest.raises(BadDim, match=words) as caught:
        read_stated_dims(vary_call(call(x=(4,)), named, {}), named)
    assert caught.value.hint


def test_a_module_is_looked_at_with_each_dim_changed_alone() -> None:
    """Sizes of the calls come first; at the others no two dims change together."""
    looks = mix_sizes({"batch": (1, 2), "seq": (8, 16)})
    pairs = [*zip(looks["batch"], looks["seq"], strict=True)]
    assert pairs[:2] == [(1, 8), (2, 16)]
    assert {*pairs[2:]} == {(1, 8), (2, 8), (1, 16)}


def test_dims_of_one_size_are_varied_apart() -> None:
    """Two dims that happen to have one size in the only call are still two dims."""
    named = {"x": ("rows", "columns")}
    calls = vary_call(call(x=(4, 4)), named, {})
    assert shapes(*calls, dims=read_stated_dims(calls, named)) == {"x": ("rows", "columns")}
