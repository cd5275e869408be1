"""Programs for loaders that give a graph whatever its module was given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hubaoti.artifact.schema import Input
from hubaoti.compiler.strides import take_any_strides
from hubaoti.errors import CompileFailed


class Adding(nn.Module):
    """A module that may write into what it is given."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 2 * (x.add_(y) if self.in_place else x + y)


def exported(*, in_place: bool) -> tuple[torch.export.ExportedProgram, tuple[Input, ...]]:
    """The program of such a module, and what a manifest says of its inputs."""
    tensors = torch.zeros(2, 3), torch.zeros(2, 3)
    program = torch.export.export(Adding(in_place=in_place), tensors, strict=False)
    written = {"x": in_place, "y": False}
    inputs = (
        Input(name=name, dtype="float32", shape=(2, 3), values="real", mutated=mutated)
        for name, mutated in written.items()
    )
    return program, tuple(inputs)


def test_a_program_reads_copies_of_its_inputs_and_nothing_else() -> None:
    program, inputs = exported(in_place=False)
    take_any_strides(program, inputs)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    copies = [user for node in placeholders for user in node.users]
    assert [each.target for each in copies] == [torch.ops.aten.detach_copy.default] * 2
    x, y = torch.arange(12.0).view(2, 6)[:, ::2], torch.ones(3, 2).t()
    torch.testing.assert_close(program.module(check_guards=False)(x, y), 2 * (x + y))


def test_a_module_that_writes_into_what_it_is_given_is_refused() -> None:
    """A view would be written as if it were contiguous: beside what the caller gave."""
    with pytest.raises(CompileFailed, match="writes into x") as caught:
        take_any_strides(*exported(in_place=True))
    assert "--layout zerogpu" in caught.value.hint
