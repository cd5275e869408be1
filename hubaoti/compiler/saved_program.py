"""A program that crosses to another process without its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write a program with one element for each weight; `program` itself keeps its weights.

    What lowers a program needs the dtypes and shapes of weights and no values. Constants that are
    no weights, as tables that a module computes, are written as they are.
    """
    weights, examples = dict(program.state_dict), program._example_inputs
    try:
        for name in program.graph_signature.parameters:
            one = torch.zeros((), dtype=weights[name].dtype).expand(weights[name].shape)
            program.state_dict[name] = nn.Parameter(one, requires_grad=False)
        program._example_inputs = None  # else torch pickles them
        torch.export.save(program, path)
    finally:
        program.state_dict.update(weights)
        program._example_inputs = examples


def load_program(path: Path) -> ExportedProgram:
    """The program of a file that `save_program` wrote, on the CPU; its weights have no values."""
    return torch.export.load(path)
