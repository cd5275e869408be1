"""Observe: a model of any size runs without storage, and tells what its blocks are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor

from hubaoti.compiler.fake_run import Arguments, BlockCalls, init_empty_parameters, observe
from hubaoti.compiler.from_config import load_source
from hubaoti.compiler.plan import make_plan
from hubaoti.compiler.request import CompileRequest
from hubaoti.errors import CompileFailed

CPU = torch.device("cpu")


class Block(nn.Module):
    """Adds a weight, times a number, to what it is given."""

    def __init__(self, times: float = 2.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.times = times

    def forward(self, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return x + self.weight * self.times


class Model(nn.Module):
    """Calls its blocks one after the other, all but the last."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.register_buffer("shift", torch.full((4,), 3.0))

    def forward(self, x: torch.Tensor, **rest: Any) -> torch.Tensor:
        for block in self.blocks[:-1]:
            x = block(x + self.shift, **rest)
        return x


def looks(*rows: int, **rest: Any) -> list[Callable[[], Arguments]]:
    """One call for each number of rows."""

    def call(count: int) -> Callable[[], Arguments]:
        return lambda: ((torch.empty(count, 4),), rest)

    return [call(count) for count in rows]


def observed(model: Model, *rows: int, **rest: Any) -> dict[str, BlockCalls]:
    """What each block saw, by its number."""
    blocks = {f"blocks.{name}": block for name, block in model.blocks.named_children()}
    found = observe(model, blocks, looks(*rows, **rest), CPU)
    return {path.removeprefix("blocks."): seen for path, seen in found.items()}


# Storage


def test_a_module_made_inside_has_no_memory_and_its_buffers_are_real() -> None:
    with init_empty_parameters():
        model = Model(Block(), nn.Linear(2, 2))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model.get_buffer("shift"), torch.full((4,), 3.0))
    assert not Block().weight.is_meta, "modules made afterwards are as ever"


def test_after_an_error_modules_have_memory_again() -> None:
    with pytest.raises(ZeroDivisionError), init_empty_parameters():
        1 / 0  # noqa: B018
    assert not Block().weight.is_meta


def test_what_a_parameter_was_it_stays() -> None:
    frozen = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16).t(), requires_grad=False)
    with init_empty_parameters():
        holder = nn.Module()
        holder.register_parameter("frozen", frozen)
        holder.register_parameter("none", None)
    found = holder.get_parameter("frozen")
    assert (found.shape, found.dtype, found.requires_grad) == ((3, 2), torch.bfloat16, False)
    assert found.stride() == frozen.stride()
    assert holder.none is None


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    """The most memory that this process has held since, in bytes above what it held at first."""

    def now(word: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(word)) << 10

    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        pytest.skip("the system does not let a process forget its peak")
    before = now("VmRSS")
    yield lambda: now("VmHWM") - before


def test_blocks_of_72_billion_weights_are_looked_at_in_no_memory(
    tmp_path: Path, peak: Callable[[], int]
) -> None:
    """Widths and dtype of Qwen2.5-72B, of which three blocks and the embedding are 10 GB."""
    config = transformers.Qwen2Config(
        vocab_size=152064,
        hidden_size=8192,
        intermediate_size=29568,
        num_hidden_layers=3,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        dtype="bfloat16",
        architectures=["Qwen2ForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    request = CompileRequest(task="generate")
    source = load_source(tmp_path, request, CPU)
    size = sum(p.numel() * p.itemsize for p in source.model.parameters())
    assert size > 10 * 10**9
    found = make_plan(source, request, CPU)
    assert [len(unit.modules) for unit in found.units] == [3]
    assert all(parameter.is_meta for parameter in source.model.parameters())
    assert peak() < 300 << 20


# What is seen


def test_each_block_s_first_call_of_each_run_is_noted() -> None:
    found = observed(Model(Block(), Block(), Block()), 2, 5)
    assert [*found] == ["0", "1"], "the last block is never called"
    for seen in found.values():
        assert [call.sizes for call in seen.calls] == [((2, 4),), ((5, 4),)]
        assert seen.calls[0].names == ("x",)
        assert seen.problem is None


def test_of_a_block_that_is_called_again_the_first_call_counts() -> None:
    class Again(Model):
        def forward(self, x: torch.Tensor, **rest: Any) -> torch.Tensor:
            (block,) = self.blocks
            return block(block(x)[:1])

    (seen,) = observed(Again(Block()), 3).values()
    assert [call.sizes for call in seen.calls] == [((3, 4),)]
    assert seen.operations.count("aten.add") == 1


def test_a_call_that_no_template_holds_is_the_block_s_problem() -> None:
    found = observed(Model(Block(), Block()), 2, mask={1, 2})
    assert found["0"].problem == "mask is a builtins.set"
    assert found["0"].calls == []


def test_calls_outlive_the_run_and_have_no_memory() -> None:
    (seen,) = observed(Model(Block(), Block()), 2).values()
    (tensor,) = seen.calls[0].tensors
    assert tensor.is_meta and not isinstance(tensor, FakeTensor)
    assert tensor.dtype == torch.float32


class Written(nn.Module):
    """A block of one line."""

    def __init__(self, line: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.line = line

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x, self.weight)


def operations(line: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> str:
    (seen,) = observed(Model(Written(line), Written(line)), 2).values()
    return seen.operations


def test_equal_blocks_do_equal_operations_on_another_s_tensors() -> None:
    found = observed(Model(Block(), Block(), Block()), 2)
    assert found["0"].operations == found["1"].operations != ""


@pytest.mark.parametrize(
    "other",
    [
        lambda x, w: w - x,
        lambda x, w: x - w * 1,
        lambda x, w: x + w,
        lambda x, w: x - x,
        lambda x, w: x - w[:1],
        lambda x, w: torch.sub(x, w, alpha=2),
        lambda x, w: (x - w).to(torch.float64),
    ],
)
def test_another_operation_number_or_wiring_is_another_text(
    other: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    assert operations(other) != operations(lambda x, w: x - w)


def test_numbers_that_are_computed_in_python_are_seen() -> None:
    found = observed(Model(Block(2.0), Block(2.5), Block()), 2)
    assert found["0"].operations != found["1"].operations


class Unread(nn.Module):
    """Computes with one of its inputs, answers another, and asks a third for its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor, mask: Any = None) -> Any:
        return x + self.weight * mask[2].shape[0], mask[1]


def test_inputs_that_a_block_neither_computes_with_nor_answers_are_unused() -> None:
    class Gives(Model):
        def forward(self, x: torch.Tensor, **rest: Any) -> torch.Tensor:
            pair = [x.sin(), x.cos(), x.tan()]
            return self.blocks[0](x, mask=pair)[0]

    (seen,) = observed(Gives(Unread()), 2, 3).values()
    assert seen.calls[0].names == ("x", "mask_0", "mask_1", "mask_2")
    assert seen.unused == {1, 3}


class Counted(Block):
    """Counts how often it runs."""

    runs = 0

    def forward(self, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        Counted.runs += 1
        return super().forward(x)


def test_a_block_that_did_what_another_had_done_does_not_run_again() -> None:
    """Each of a hundred equal blocks runs once, and all are seen in every run."""
    Counted.runs = 0
    found = observed(Model(Counted(), Counted(), Counted(3.0), Block()), 2, 3, 5)
    assert [len(seen.calls) for seen in found.values()] == [3, 3, 3]
    assert [call.sizes for call in found["1"].calls] == [((2, 4),), ((3, 4),), ((5, 4),)]
    assert Counted.runs == 3 + 2 + 2, "the odd one leads itself"


# What stays


def test_the_model_is_as_it_was() -> None:
    model = Model(Block(), Block(), Block())
    before = dict(model.named_parameters())
    values = {name: tensor.clone() for name, tensor in before.items()}
    observed(model, 2, 3)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(model.get_parameter(name) is tensor for name, tensor in before.items())
    assert all(torch.equal(model.get_parameter(name), values[name]) for name in values)
    assert all("forward" not in vars(block) for block in model.blocks)
    assert torch.is_grad_enabled()
    assert not isinstance(torch.empty(1), FakeTensor)
    assert torch.equal(model(torch.zeros(1, 4)), torch.full((1, 4), 10.0))


class Looks(Block):
    """Decides by the values it is given."""

    def forward(self, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return x * 2 if x.sum() > 3 else x


class Wants(Block):
    def forward(self, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        raise ValueError("You have to specify pixel_values\nand more")


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (Looks, "Model cannot be run without values, in blocks.1: DataDependent"),
        (Wants, "(?m)ValueError: You have to .*pixel_values$"),
    ],
)
def test_a_model_that_looks_at_values_is_refused_and_restored(
    block: Callable[[], nn.Module], words: str
) -> None:
    model = Model(Block(), block(), Block())
    with pytest.raises(CompileFailed, match=words) as caught:
        observed(model, 2)
    assert "--regions blocks.0" in caught.value.hint
    assert observe(model, {"blocks.0": model.blocks[0]}, looks(2), CPU).keys() == {"blocks.0"}
    assert "\n" not in str(caught.value)
    assert all("forward" not in vars(each) for each in model.blocks)
    assert not isinstance(torch.empty(1), FakeTensor)


class Decides(Model):
    """Asks for numbers between its blocks, as a rope that grows does, and for equal tensors."""

    def forward(self, x: torch.Tensor, **rest: Any) -> torch.Tensor:
        assert x.sum().item() == 0.0 and not torch.equal(x, x + 1)
        kept = x[:, : 4 - x.argmax().item()] if x.max() > 3 else x
        return super().forward(kept, **rest)


def test_a_number_that_is_asked_for_between_the_blocks_is_zero() -> None:
    found = observed(Decides(Block(), Block(), Block()), 2, 3)
    assert [call.sizes for call in found["1"].calls] == [((2, 4),), ((3, 4),)]


@lru_cache
def table(size: int) -> torch.Tensor:
    return torch.ones(size)


class Keeps(Block):
    """Asks a function of its file, which keeps what it made."""

    def forward(self, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return x + table(4)


def test_what_a_model_s_file_kept_of_the_run_is_forgotten() -> None:
    observed(Model(Keeps(), Block()), 2)
    assert not isinstance(table(4), FakeTensor)


def test_no_mode_is_left_over_by_a_failure() -> None:
    with pytest.raises(CompileFailed):
        observed(Model(Wants(), Block()), 2)
    with FakeTensorMode():  # which may not be entered within another one
        assert isinstance(torch.empty(1), FakeTensor)


# transformers' own models


@pytest.mark.parametrize("task", ["generate", "forward"])
def test_a_mask_stays_a_tensor_and_the_attention_is_restored(task: str, tiny_llama: Path) -> None:
    """Run with values, transformers would leave out a mask of ones."""
    request = CompileRequest(task=task)
    source = load_source(tiny_llama, request, CPU)
    (unit,) = make_plan(source, request, CPU).units
    (mask,) = [entry for entry in unit.face.inputs if entry.name == "attention_mask"]
    assert mask.dtype == "bool"
    assert mask.shape == ("batch", 1, "seq", "filled" if task == "generate" else "seq")
    assert source.model.config._attn_implementation == "sdpa"
    blocks = [m for m in source.model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
    assert blocks and all("forward" not in vars(block) for block in blocks)


# Flags on which nothing depends


class Flagged(Block):
    """Takes flags: one for its caller, one that adds to its answer, one that it computes by."""

    def forward(self, x: torch.Tensor, mask: Any = None, **flags: Any) -> Any:
        y = x * 3 if flags.get("triple") else x + self.weight
        return (y, x) if flags.get("both") else (y,)


class Calls(Model):
    def forward(self, x: torch.Tensor, **rest: Any) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, **rest)[0]
        return x


@pytest.mark.parametrize("value", [True, False])
def test_a_flag_is_idle_where_the_block_does_and_answers_the_same_either_way(value: bool) -> None:
    flags = {"use_cache": value, "triple": value, "both": value, "mask": None}
    found = observed(Calls(Flagged(), Flagged()), 2, 3, **flags)
    assert [seen.idle for seen in found.values()] == [{"use_cache"}] * 2
    assert found["0"].calls[0].template["kwargs"] == flags
    assert ("aten.mul" in found["0"].operations) is value, "what it did is what it was asked"


def test_a_block_that_cannot_take_the_other_flag_needs_the_one_it_had() -> None:
    class Refuses(Flagged):
        def forward(self, x: torch.Tensor, mask: Any = None, **flags: Any) -> Any:
            if flags["fast"]:
                raise NotImplementedError
            return super().forward(x)

    found = observed(Calls(Refuses()), 2, fast=False)
    assert found["0"].idle == frozenset()


class Growing(nn.Module):
    """A model whose table grows with what it is asked for, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(4, 8), persistent=False)
        self.blocks = nn.ModuleList([Reading(), Reading()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table.shape[0] < x.shape[1]:
            self.register_buffer("table", torch.ones(x.shape[1], 8), persistent=False)
        for block in self.blocks:
            x = block(x, self.table)
        return x


class Reading(nn.Linear):
    """A block that reads as many rows of a table as there are tokens."""

    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) + table[: x.shape[1]]


def test_each_look_begins_with_the_model_s_own_buffers() -> None:
    model = Growing().eval()
    calls = [lambda n=n: ((torch.empty(2, n, 8),), {}) for n in (9, 6, 3)]
    blocks = {f"blocks.{number}": block for number, block in enumerate(model.blocks)}
    found = observe(model, blocks, calls, CPU)
    rows = [call.tensors[1].shape[0] for call in found["blocks.0"].calls]
    assert rows == [9, 6, 4]
    assert model.table.shape[0] == 4
