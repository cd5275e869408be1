"""Regions: repeated blocks are found in any module, and never grouped wrongly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from hubaoti.compiler.fake_run import Arguments, observe
from hubaoti.compiler.regions import Group, find_blocks, group_blocks
from hubaoti.errors import BadRequest

CPU = torch.device("cpu")


class Block(nn.Module):
    """Two layers and their number: what all blocks here are."""

    def __init__(self, index: int = 0, width: int = 4, dtype: Any = None) -> None:
        super().__init__()
        self.layer_idx = index
        self.up = nn.Linear(4, width, dtype=dtype)
        self.down = nn.Linear(width, 4, dtype=dtype)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(self.up(x))


class Stack(nn.Module):
    """Calls blocks one after the other."""

    def __init__(self, *blocks: nn.Module, kind: Any = nn.ModuleList) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.layers = kind(blocks) if kind is nn.ModuleList else kind(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.layers:
            answer = block(x)
            x = answer[0] if isinstance(answer, tuple) else answer
        return x


def groups(model: nn.Module, *tensors: torch.Tensor, regions: str = "auto") -> tuple[Group, ...]:
    """The groups of a model's blocks, as it is run at two sizes."""
    given = tensors or (torch.empty(3, 4),)
    blocks = find_blocks(model, regions)

    def call(more: int) -> Callable[[], Arguments]:
        return lambda: (
            tuple(torch.empty(t.shape[0] + more, *t.shape[1:], dtype=t.dtype) for t in given),
            {},
        )

    return group_blocks(blocks, observe(model, blocks, [call(0), call(2)], CPU))


def members(model: nn.Module) -> list[tuple[str, ...]]:
    return [tuple(m.rpartition(".")[2] for m in group.modules) for group in groups(model)]


TOGETHER = [("0", "1", "2")]


# Finding


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential])
def test_blocks_of_one_class_in_a_list_are_one_group(kind: Any) -> None:
    model = Stack(Block(0), Block(1), Block(2), kind=kind)
    assert groups(model) == (Group("layers", ("layers.0", "layers.1", "layers.2")),)


def test_only_the_outermost_blocks_are_found() -> None:
    inner = [nn.Sequential(Block(), Block()) for _ in range(2)]
    assert [*find_blocks(Stack(*inner), "auto")] == ["layers.0", "layers.1"]


def test_blocks_within_other_modules_are_found_at_their_paths() -> None:
    model = nn.ModuleDict({"encoder": Stack(Block(), Block()), "decoder": Stack(Block(), Block())})
    assert [*find_blocks(model, "auto")] == [
        "encoder.layers.0",
        "encoder.layers.1",
        "decoder.layers.0",
        "decoder.layers.1",
    ]


def test_the_odd_one_among_equal_blocks_is_a_region_of_its_own() -> None:
    model = Stack(Block(0), Block(1), Block(2, width=8))
    assert members(model) == [("0", "1"), ("2",)]


def test_layers_and_activations_are_no_blocks() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    assert find_blocks(plain, "auto") == {}
    assert find_blocks(Stack(Block()), "auto") == {}, "one block is not repeated"


@pytest.mark.parametrize("name", ["_no_split_modules", "_repeated_blocks"])
def test_what_a_model_calls_its_blocks_is_a_region_even_if_there_is_one(name: str) -> None:
    model = Stack(Block())
    setattr(model, name, ["Block"])
    assert [*find_blocks(model, "auto")] == ["layers.0"]
    setattr(model, name, None)
    assert find_blocks(model, "auto") == {}


def test_a_path_is_that_module_or_the_children_of_that_list() -> None:
    model = Stack(Block(), Block(), kind=nn.Sequential)
    assert [*find_blocks(model, "layers.1")] == ["layers.1"]
    assert [*find_blocks(model, "layers")] == ["layers.0", "layers.1"]
    assert [*find_blocks(model, "layers.1.up")] == ["layers.1.up"]


def test_a_path_that_is_not_there_names_the_near_ones() -> None:
    model = Stack(Block(), Block())
    with pytest.raises(BadRequest, match="no module 'layer.1'") as caught:
        find_blocks(model, "layer.1")
    assert "layers.1" in caught.value.hint
    with pytest.raises(BadRequest) as caught:
        find_blocks(model, "qqqq")
    assert "--explain" in caught.value.hint


def test_a_block_that_is_never_called_is_in_no_group() -> None:
    class Skips(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0](self.layers[1](x))

    assert members(Skips(Block(0), Block(1), Block(2))) == [("0", "1")]


# Equal blocks


class Buffered(Block):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.register_buffer("shift", torch.full((4,), float(index)))
        self.dropout_prob = 0.1 * index

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) + self.shift


def test_buffers_numbers_and_what_training_uses_may_differ() -> None:
    assert members(Stack(*map(Buffered, range(3)))) == TOGETHER


class Shaped(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x).reshape(-1, 4) * x.shape[0]


def test_what_depends_on_sizes_alone_is_equal() -> None:
    assert members(Stack(*map(Shaped, range(3)))) == TOGETHER


# Blocks that look alike: of three, the one in the middle computes something else.


class Twin(Block):
    """Another class of the same tensors."""


class Cast(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x.to(self.up.weight.dtype)).float()


class Config:
    def __init__(self, scale: float) -> None:
        self.scale = scale


class ByConfig(Block):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.config = Config(1.0 + index % 2)

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) * self.config.scale


class ByPrivate(Block):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._residual = index % 2 == 0

    def forward(self, x: torch.Tensor) -> Any:
        return x + super().forward(x) if self._residual else super().forward(x)


def closed(scale: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * scale


class ByClosure(Block):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.act = closed(1.0 + index % 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.act(super().forward(x))


class ByPlainTensor(Block):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.table = torch.full((4,), float(index % 2))

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) + self.table


class Holder:
    """An object that no template could spell."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def add(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.tensor


class ByHeldTensor(Block):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.held = Holder(torch.full((4,), float(index % 2)))

    def forward(self, x: torch.Tensor) -> Any:
        return self.held.add(super().forward(x))


class ByMethod(Block):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.act = Holder(torch.full((4,), float(index % 2))).add

    def forward(self, x: torch.Tensor) -> Any:
        return self.act(super().forward(x))


class ByArray(Block):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.array = np.full(4, float(index % 2), dtype="float32")

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) + torch.from_numpy(self.array)


class ByIndex(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) * (self.layer_idx % 2 + 1)


class ByBranch(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x).relu() if self.layer_idx % 2 else super().forward(x)


class ByMadeTensor(Block):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) + torch.tensor([float(self.layer_idx % 2)])


class ByOrderOfWeights(Block):
    def forward(self, x: torch.Tensor) -> Any:
        first, second = (self.up, self.down) if self.layer_idx % 2 else (self.down, self.up)
        return second(first(x))


class ByOrderOfAnswers(Block):
    def forward(self, x: torch.Tensor) -> Any:
        a, b = self.up(x), self.down(x)
        return (a, b) if self.layer_idx % 2 else (b, a)


class ByHook(Block):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        if index % 2:
            self.up.register_forward_hook(lambda module, args, out: out + 1)


@functools.cache
def local_class(value: float) -> type[Block]:
    scale = torch.full((4,), value)

    class Local(Block):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x) * scale

    return Local


ALIKE: dict[str, Callable[[int], Block]] = {
    "class": lambda at: Twin(at) if at % 2 else Block(at),
    "shape": lambda at: Block(at, width=4 + at % 2),
    "dtype": lambda at: Cast(at, dtype=(torch.float32, torch.float64)[at % 2]),
    "config": ByConfig,
    "private attribute": ByPrivate,
    "closure": ByClosure,
    "plain tensor": ByPlainTensor,
    "tensor in an object": ByHeldTensor,
    "tensor behind a method": ByMethod,
    "array": ByArray,
    "index as a number": ByIndex,
    "index in a branch": ByBranch,
    "index in a tensor": ByMadeTensor,
    "index chooses a weight": ByOrderOfWeights,
    "index chooses an answer": ByOrderOfAnswers,
    "hook": ByHook,
    "class of one name": lambda at: local_class(float(at % 2))(at),
}


@pytest.mark.parametrize("case", ALIKE)
def test_blocks_that_look_alike_and_compute_something_else_are_apart(case: str) -> None:
    found = members(Stack(*map(ALIKE[case], range(3))))
    assert sorted(found) == [("0", "2"), ("1",)]


class ByInput(Block):
    """Reads one of two inputs of the same kind."""

    def forward(self, x: torch.Tensor, pair: Any = None) -> Any:
        return super().forward(x) + pair[self.layer_idx % 2]


def test_an_index_that_chooses_an_input_tells_blocks_apart() -> None:
    class Pairs(Stack):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            for block in self.layers:
                x = block(x, (y, y * 2))
            return x

    found = groups(Pairs(*map(ByInput, range(3))), torch.empty(3, 4), torch.empty(3, 4))
    assert [group.modules for group in found] == [("layers.0", "layers.2"), ("layers.1",)]


def test_blocks_that_are_called_in_other_ways_are_apart() -> None:
    class Calls(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for at, block in enumerate(self.layers):
                x = block(x) if at % 2 else block(x=x)
            return x

    assert members(Calls(*map(Block, range(3)))) == [("0", "2"), ("1",)]


def test_each_group_of_one_place_has_a_name_of_its_own() -> None:
    found = groups(Stack(*map(ByIndex, range(5))))
    assert [len(group.modules) for group in found] == [3, 2]
    names = [group.id for group in found]
    assert len({*names}) == 2 and all(name.startswith("layers.") for name in names)


# Real models

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def by_group(model: Any) -> dict[str, list[int]]:
    """The numbers of the blocks in each group of a transformers model."""
    blocks = find_blocks(model, "auto")

    def call(batch: int, seq: int) -> Callable[[], Arguments]:
        def given() -> Arguments:
            ids = torch.ones(batch, seq, dtype=torch.int64)
            more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            return ((), {"input_ids": ids, "attention_mask": ids, "use_cache": False, **more})

        return given

    found = group_blocks(blocks, observe(model, blocks, [call(2, 5), call(3, 7)], CPU))
    return {g.id: [int(path.rpartition(".")[2]) for path in g.modules] for g in found}


def test_sliding_and_full_layers_are_two_groups() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma3TextConfig(**TINY, sliding_window=4, layer_types=kinds)
    assert by_group(transformers.Gemma3ForCausalLM(config).eval()) == {
        "model.layers.sliding": [0, 2],
        "model.layers.full": [1, 3],
    }


def test_layers_of_a_mixture_and_dense_ones_are_two_groups() -> None:
    config = transformers.Qwen3MoeConfig(
        **TINY,
        mlp_only_layers=[1, 2],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
    )
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    model.set_experts_implementation("batched_mm")
    assert sorted(by_group(model).values()) == [[0, 3], [1, 2]]


def test_the_first_layer_that_makes_the_bias_of_positions_is_apart() -> None:
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=3, num_heads=2
    )
    found = by_group(transformers.T5Model(config).eval())
    assert sorted(found.values()) == [[0], [0], [1, 2], [1, 2]]
    assert {name.split(".")[0] for name in found} == {"encoder", "decoder"}


def test_all_layers_of_a_plain_decoder_are_one_group() -> None:
    small = {name: value for name, value in TINY.items() if name != "head_dim"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)).eval()
    assert by_group(model) == {"model.layers": [0, 1, 2, 3]}
