"""Memory lent to blocks that have none: shared, given back, and there again when it is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hubaoti.compiler.from_config import Source, load_source
from hubaoti.compiler.materialize import give_memory_back, lend_memory
from hubaoti.compiler.request import CompileRequest
from hubaoti.runtime.synthetic import make_synthetic

CPU = torch.device("cpu")
WIDTH = 4096


@pytest.fixture(scope="module")
def bare(tiny_decoder: Path) -> Source:
    """The decoder without memory."""
    return load_source(tiny_decoder, CompileRequest(task="generate"), CPU)


def blocks_of(source: Source) -> list[nn.Module]:
    return [source.model.get_submodule(f"model.layers.{at}") for at in range(2)]


def test_two_blocks_share_one_memory_and_give_it_back(bare: Source) -> None:
    blocks = blocks_of(bare)
    before = [dict(block.named_parameters()) for block in blocks]
    with lend_memory(blocks, CPU, live=False) as (module, twin):
        assert (module, twin) == (blocks[0], blocks[1])
        for name, parameter in module.named_parameters():
            assert parameter is twin.get_parameter(name)
            assert torch.equal(
                parameter, make_synthetic(name, parameter.shape, torch.float32, "constant")
            )
        others = [p for p in bare.model.parameters() if p.is_meta]
        assert len(others) == 3, "embedding, last norm and head have no memory"
    for block, kept in zip(blocks, before, strict=True):
        assert all(block.get_parameter(name) is old for name, old in kept.items())


def test_memory_is_given_back_after_an_error(bare: Source) -> None:
    with pytest.raises(ZeroDivisionError), lend_memory(blocks_of(bare), CPU, live=False):
        1 / 0  # noqa: B018
    assert all(parameter.is_meta for parameter in bare.model.parameters())


class Tied(nn.Module):
    """One parameter by two names, made without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False, device="meta")
        self.second = nn.Linear(3, 3, bias=False, device="meta")
        self.second.weight = self.first.weight


def test_a_tied_parameter_stays_tied() -> None:
    module = Tied()
    with lend_memory([module, module], CPU, live=False):
        assert module.first.weight is module.second.weight
        assert not module.first.weight.is_meta
    assert module.first.weight is module.second.weight
    assert module.first.weight.is_meta


def test_a_live_module_keeps_its_values() -> None:
    module = nn.Linear(2, 2)
    before = module.weight.clone()
    with lend_memory([module], CPU, live=True) as (same, twin):
        assert same is twin is module
        assert torch.equal(module.weight, before)
    assert torch.equal(module.weight, before)


def resident() -> int:
    """The memory that this process holds, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


def test_what_a_compiler_needs_it_has_and_afterwards_the_values_are_there_again() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH, device="meta"), nn.LayerNorm(8, device="meta"))
    with lend_memory([module], CPU, live=False):
        before = {name: each.clone() for name, each in module.named_parameters()}
        places = [each.data_ptr() for each in module.parameters()]
        held = resident()
        with give_memory_back(module):
            assert held - resident() > 0.9 * 4 * WIDTH * WIDTH
            assert [each.data_ptr() for each in module.parameters()] == places
        for name, each in module.named_parameters():
            assert torch.equal(each, before[name])
    assert all(each.is_meta for each in module.parameters())


def test_of_a_live_module_nothing_is_given_back() -> None:
    module = nn.Linear(2, 2)
    before = module.weight.clone()
    with lend_memory([module], CPU, live=True), give_memory_back(module):
        assert torch.equal(module.weight, before)
    assert torch.equal(module.weight, before)
