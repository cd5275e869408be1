"""Faces: a module as a function of its tensors, with the dims that their sizes follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.artifact.schema import Cache, Input
from hubaoti.compiler.capture import Call, make_call
from hubaoti.compiler.infer_dims import Dims, infer_signature
from hubaoti.compiler.kv_inputs import Sliding, Static
from hubaoti.compiler.signature import (
    CallSignature,
    FlatModule,
    add_cache_inputs,
    make_names_unique,
    specialize_full_window,
    substitute,
)
from hubaoti.errors import CompileFailed

HIDDEN = Input(name="hidden", dtype="float32", shape=("batch", "seq", 8), values="real")
MASK = Input(name="mask", dtype="bool", shape=("batch", 1, "seq", "filled"), values="mask")
TEMPLATE = {
    "args": [{"tensor": 0}],
    "kwargs": {"mask": {"tensor": 1}, "past_key_values": {"cache": True}},
}
HELD = torch.empty(2, 4, 6, 16, dtype=torch.bfloat16, device="meta")


def named(*shapes: tuple[int | str, ...]) -> CallSignature:
    """A face of inputs of these shapes."""
    inputs = tuple(
        Input(name=f"x{at}", dtype="float32", shape=shape, values="real")
        for at, shape in enumerate(shapes)
    )
    return CallSignature(
        {"args": [{"tensor": at} for at in range(len(shapes))], "kwargs": {}}, inputs
    )


# Dims


def test_its_dims_come_in_the_order_of_its_inputs() -> None:
    assert named(("seq", 4), ("batch+seq", "2*cache")).dims == ("seq", "batch", "cache")


def test_sizes_are_read_off_tensors() -> None:
    face = named(("batch", "seq"), ("seq", 4))
    assert face.read_sizes([torch.empty(2, 5), torch.empty(5, 4)]) == {"batch": 2, "seq": 5}


def test_a_dim_that_stands_alone_nowhere_is_solved_for() -> None:
    face = named(("4*batch", "seq"), ("seq+7", "image+text"))
    sizes = face.read_sizes([torch.empty(12, 5), torch.empty(12, 9)])
    assert sizes == {"batch": 3, "seq": 5}


names = st.sampled_from(["batch", "seq", "cache"])
extents = st.builds(
    DimExpr.of, st.dictionaries(names, st.integers(1, 4), min_size=1), st.integers(-3, 9)
)
some_sizes = st.fixed_dictionaries({name: st.integers(1, 50) for name in ("batch", "seq", "cache")})


@given(extents, st.dictionaries(names, st.integers(1, 50) | extents), some_sizes)
def test_what_is_substituted_has_the_size_of_what_it_stands_for(
    extent: DimExpr, others: dict[str, int | DimExpr], sizes: dict[str, int]
) -> None:
    values = {
        name: other if isinstance(other, int) else other.at(sizes) for name, other in others.items()
    }
    assert substitute(extent, others).at(sizes) == extent.at(sizes | values)


def test_a_dim_of_one_size_becomes_a_number_in_every_shape() -> None:
    face = named(("batch", "seq", 8), ("2*seq+1", "filled"))
    other = face.substitute_dims({"seq": 5, "filled": DimExpr.of({"batch": 1}, 3)})
    assert [entry.shape for entry in other.inputs] == [("batch", 5, 8), (11, "batch+3")]
    assert other.template == face.template


def test_no_two_inputs_have_one_name() -> None:
    assert [entry.name for entry in make_names_unique((HIDDEN, HIDDEN, MASK, HIDDEN))] == [
        "hidden",
        "hiddenx",
        "mask",
        "hiddenxx",
    ]


class Plus(nn.Module):
    """Computes with two of its inputs, and with the shape of a third."""

    def forward(self, x: torch.Tensor, y: Any, z: torch.Tensor) -> torch.Tensor:
        return x + z[:, : y[0].shape[0]]


NESTED = CallSignature(
    {"args": [{"tensor": 0}, {"tuple": [{"tensor": 1}]}], "kwargs": {"z": {"tensor": 2}}},
    (
        Input(name="x", dtype="float32", shape=("batch", "seq"), values="real"),
        Input(name="y", dtype="int64", shape=("seq", 2), values="position"),
        Input(name="z", dtype="float32", shape=("batch", "seq+1"), values="real"),
    ),
)


def test_an_input_that_is_not_computed_with_is_none() -> None:
    face = NESTED.drop_inputs(frozenset({1}))
    assert [entry.name for entry in face.inputs] == ["x", "z"]
    assert face.template == {
        "args": [
            {"tensor": 0},
            {"tuple": [{"any": {"dtype": "int64", "shape": ["seq", 2]}}]},
        ],
        "kwargs": {"z": {"tensor": 1}},
    }
    x, z = torch.randn(3, 5), torch.randn(3, 6)
    (whole,) = FlatModule(Plus(), NESTED)(x, torch.zeros(5, 2, dtype=torch.int64), z)
    (found,) = FlatModule(Plus(), face)(x, z)
    assert torch.equal(found, whole)


def test_an_input_that_alone_tells_of_a_dim_stays() -> None:
    face = named(("batch", "seq"), ("filled", 2), ("batch", 4))
    assert face.drop_inputs(frozenset({1})).inputs == face.inputs
    assert len(face.drop_inputs(frozenset({2})).inputs) == 2


# Caches


def test_a_cache_is_three_inputs_more_two_of_them_written() -> None:
    face = add_cache_inputs(CallSignature(TEMPLATE, (HIDDEN, MASK)), HELD, HELD[..., :8])
    keys, values, position = face.inputs[2:]
    assert (keys.name, keys.dtype, keys.shape) == ("keys", "bfloat16", ("batch", 4, "cache", 16))
    assert values.shape == ("batch", 4, "cache", 8)
    assert keys.mutated and values.mutated and not position.mutated
    assert (position.shape, position.dtype, position.values) == (("seq",), "int64", "position")
    assert face.cache == Cache(kind="static", keys=2, values=3, position=4)


def test_a_block_that_no_input_tells_what_is_filled_has_no_cache() -> None:
    with pytest.raises(CompileFailed, match="how much of its cache is filled") as caught:
        add_cache_inputs(CallSignature(TEMPLATE, (HIDDEN,)), HELD, HELD)
    assert "eager" in caught.value.hint


def test_a_full_window_has_a_fixed_cache_and_no_position() -> None:
    face = specialize_full_window(
        add_cache_inputs(CallSignature(TEMPLATE, (HIDDEN, MASK)), HELD, HELD), window=32
    )
    assert [(entry.name, entry.shape) for entry in face.inputs] == [
        ("hidden", ("batch", "seq", 8)),
        ("mask", ("batch", 1, "seq", "seq+31")),
        ("keys", ("batch", 4, 32, 16)),
        ("values", ("batch", 4, 32, 16)),
    ]
    assert face.cache == Cache(kind="sliding", keys=2, values=3, window=32)
    assert face.dims == ("batch", "seq")


# A module as a function


class Noted(nn.Module):
    """Keeps what it was given, and answers with what it was made with."""

    def __init__(self, answer: Any = None) -> None:
        super().__init__()
        self.layer_idx = 2
        self.answer = answer
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.given = (args, kwargs)
        return args[0] if self.answer is None else self.answer


def face_like(*calls: Call) -> CallSignature:
    return infer_signature(calls, Dims({"seq": (6, 11, 13)}), None)


def test_a_module_gets_what_it_got_when_it_was_captured() -> None:
    def forward(x: torch.Tensor, **rest: Any) -> None: ...

    calls = [
        make_call(forward, (torch.ones(s, 2),), {"pair": (torch.ones(s), 3), "length": s})
        for s in (6, 11, 13)
    ]
    module = Noted()
    flat = FlatModule(module, face_like(*calls))
    x, y = torch.randn(20, 2), torch.randn(20)
    (answer,) = flat(x, y)
    assert answer is x
    (given,), kwargs = module.given
    assert given is x
    assert kwargs["pair"][0] is y and kwargs["pair"][1] == 3
    assert kwargs["length"] == 20


ANSWERS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "a tensor": (torch.ones(1), {"tensor": 0}, ("output",)),
    "a tuple": (
        (torch.ones(1), None, torch.ones(2)),
        {"tuple": [{"tensor": 0}, None, {"tensor": 1}]},
        ("output_0", "output_2"),
    ),
    "a model's output": (
        BaseModelOutput(last_hidden_state=torch.ones(1)),  # type: ignore[arg-type]
        {
            "fields": {"last_hidden_state": {"tensor": 0}},
            "class": "transformers.modeling_outputs.BaseModelOutput",
        },
        ("output_last_hidden_state",),
    ),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_is_its_tensors_and_the_template_of_the_rest(case: str) -> None:
    answer, template, names = ANSWERS[case]
    flat = FlatModule(Noted(answer), named((1,)))
    tensors = flat(torch.ones(1))
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)
    assert (flat.template, flat.names) == (template, names)


def test_an_answer_that_no_graph_gives_is_refused_by_its_class() -> None:
    with pytest.raises(CompileFailed, match="output_1 is a builtins.set") as caught:
        FlatModule(Noted((torch.ones(1), {1, 2})), named((1,)))(torch.ones(1))
    assert caught.value.hint


def cached_call(face: CallSignature) -> tuple[Any, list[torch.Tensor]]:
    """The cache that a module gets, and the tensors that it was called with."""
    module = Noted()
    sizes = {"batch": 2, "seq": 3, "filled": 5, "cache": 9}
    tensors = [
        torch.zeros([n if isinstance(n, int) else DimExpr.parse(n).at(sizes) for n in entry.shape])
        for entry in face.inputs
    ]
    FlatModule(module, face)(*tensors)
    return module.given[1]["past_key_values"], tensors


def test_a_block_finds_the_given_cache_wherever_its_own_layer_would_be() -> None:
    face = add_cache_inputs(CallSignature(TEMPLATE, (HIDDEN, MASK)), HELD, HELD)
    cache, tensors = cached_call(face)
    assert len(cache.layers) == 3, "its layer number is 2"
    assert isinstance(cache.layers[2], Static)
    assert [*cache.layers[2].held] == tensors[2:4]
    assert cache.layers[2].position is tensors[4]
    assert (cache.layers[2].filled, cache.get_seq_length(2)) == (5, 2)


def test_a_block_with_a_full_window_finds_that() -> None:
    face = specialize_full_window(
        add_cache_inputs(CallSignature(TEMPLATE, (HIDDEN, MASK)), HELD, HELD), window=4
    )
    cache, tensors = cached_call(face)
    assert isinstance(cache.layers[2], Sliding)
    assert [*cache.layers[2].held] == tensors[2:4]
    assert cache.layers[2].filled == 4 + 3 - 1


def test_while_it_is_traced_the_module_s_forward_is_the_function() -> None:
    module = Noted()
    flat = FlatModule(module, named((2,), (3,)))
    with flat.replace_own_forward():
        assert len(module(torch.ones(2), torch.ones(3))) == 1
        assert len(module(x0=torch.ones(2), x1=torch.ones(3))) == 1
        assert [tensor.shape for tensor in module.given[0]] == [(2,), (3,)]
    assert "forward" not in vars(module)
