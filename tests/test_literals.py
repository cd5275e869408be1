"""Literals: tensors of no state_dict, made anew bit for bit where a module is traced."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hubaoti.compiler.literals import MOST_LITERALS, make_literal, require_unread, write_out_buffers
from hubaoti.errors import CompileFailed

TENSORS = {
    "frequencies": 1 / 10000 ** (torch.arange(0, 64, 2) / 64),
    "positions": torch.arange(512)[None],
    "backwards": torch.arange(10, 0, -2, dtype=torch.int32),
    "zeros": torch.zeros(1, 512, dtype=torch.int64),
    "a scale": torch.tensor(5.65, dtype=torch.bfloat16),
    "a causal mask": torch.ones(9, 9, dtype=torch.bool).tril(),
    "signs": torch.tensor([0.0, -0.0, float("inf"), float("nan"), -0.0]),
    "precise": torch.tensor([[0.1, 1 / 3], [2.0**-1074, 1e308]], dtype=torch.float64),
    "nothing": torch.empty(0, 3),
}


def remade(tensor: torch.Tensor) -> torch.Tensor:
    make = make_literal(tensor)
    assert make is not None
    return make()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("what", TENSORS)
def test_a_tensor_is_made_anew_bit_for_bit(what: str) -> None:
    tensor = TENSORS[what]
    made = remade(tensor)
    assert (made.dtype, made.shape, made.device) == (tensor.dtype, tensor.shape, tensor.device)
    assert bits(made) == bits(tensor)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.sampled_from([1, 2]))
def test_runs_of_numbers_are_made_anew(numbers: list[int], rows: int) -> None:
    for dtype in (torch.int64, torch.float32):
        tensor = torch.tensor([numbers] * rows, dtype=dtype)
        assert torch.equal(remade(tensor), tensor)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("rope", TENSORS["frequencies"][:4].clone(), persistent=False)
        self.register_buffer("kept", torch.ones(4))
        self.table = torch.tensor([1.0, 2.0, 4.0, 8.0])  # a plain tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.rope + self.table * self.kept


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_a_program_reads_nothing_but_what_the_state_dict_has() -> None:
    module, x = Outer().eval(), torch.randn(2, 4)
    expected, before = module(x), {name: each for name, each in module.inner.named_buffers()}
    with write_out_buffers(module), torch.no_grad():
        program = torch.export.export(module, (x,), strict=False)
    names = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    read = {s.target for s in program.graph_signature.input_specs if s.arg.name in names}
    assert read - {None} == {"inner.linear.weight", "inner.linear.bias", "inner.kept"}
    assert torch.equal(program.module()(x), expected)
    assert "forward" not in vars(module) and "rope" not in vars(module.inner)
    assert {name: each for name, each in module.inner.named_buffers()} == before
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("read", [False, True])
def test_a_large_table_is_refused_by_name_where_it_is_read(read: bool) -> None:
    module, x = Outer().eval(), torch.randn(2, 4)
    module.inner.register_buffer("large", torch.arange(MOST_LITERALS + 1).sin(), persistent=False)
    if read:
        module.inner.forward = lambda x: x * module.inner.large[4:8]  # type: ignore[method-assign]
    with write_out_buffers(module) as unwritten, torch.no_grad():
        program = torch.export.export(module, (x,), strict=False)
    assert unwritten == {"inner.large"}
    if not read:
        require_unread(program, unwritten)
        return
    with pytest.raises(CompileFailed, match=r"inner\.large is in no state_dict") as caught:
        require_unread(program, unwritten)
    assert "persistent" in caught.value.hint
