"""A program that crosses to another process without its weights, and is put on a device there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.export.passes import move_to_device_pass
from torch.utils._pytree import tree_unflatten

from hubaoti.compiler.symbols import list_placeholders
from hubaoti.runtime.graph_ops import WITH_TORCH

# The namespaces of ops that every process has.
_EVERYWHERE = {*WITH_TORCH, "higher_order", "torchao"}


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write a program with one element for each weight; `program` itself keeps its weights.

    What lowers a program needs the dtypes and shapes of weights and no values. Constants that are
    no weights, as tables that a module computes, are written as they are. Private, checked on torch
    2.11 to 2.15: `_example_inputs`, which is written into the file where it is not None.
    """
    weights, examples = dict(program.state_dict), program._example_inputs
    try:
        for name in program.graph_signature.parameters:
            one = torch.zeros((), dtype=weights[name].dtype).expand(weights[name].shape)
            program.state_dict[name] = nn.Parameter(one, requires_grad=False)
        program._example_inputs = None  # else torch pickles them
        with warnings.catch_warnings(action="ignore"):  # that a weight has one element
            torch.export.save(program, path)
    finally:
        program.state_dict.update(weights)
        program._example_inputs = examples


def load_program(path: Path) -> ExportedProgram:
    """The program of a file that `save_program` wrote, on the CPU; its weights have no values."""
    return torch.export.load(path)


def put_on_device(program: ExportedProgram, device: torch.device) -> ExportedProgram:
    """A program whose tensors are on a device: its weights as memory that nobody wrote.

    Torch's own move would copy the one element of each weight over all of it.
    """
    weights = list_placeholders(program, InputKind.PARAMETER)
    for name, node in zip(program.graph_signature.parameters, weights, strict=True):
        like = node.meta["val"]
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        program.state_dict[name] = nn.Parameter(made, requires_grad=False)
    moved = move_to_device_pass(program, str(device))
    # AOTInductor asks for a call, whose tensors may have names.
    examples = [*_make_examples(moved, device)]
    moved._example_inputs = tree_unflatten(examples, moved.call_spec.in_spec)
    return moved


def _make_examples(program: ExportedProgram, device: torch.device) -> Iterator[Any]:
    """Inputs of a call at the sizes that the program was traced with."""
    for node in list_placeholders(program):
        like = node.meta["val"]
        shape = [size if isinstance(size, int) else size.node.hint for size in like.shape]
        yield torch.empty(shape, dtype=like.dtype, device=device)


def find_op_modules(program: ExportedProgram) -> tuple[str, ...]:
    """The modules that register ops of a program which not every process has.

    Private, checked on torch 2.11 to 2.15: `torch._library.custom_ops.OPDEFS`, which knows where a
    `torch.library.custom_op` was written. Of others nothing is known; whoever loads the program
    without them is told which op it lacks.
    """
    from torch._library import custom_ops

    defined = getattr(custom_ops, "OPDEFS", {})
    modules = program.graph_module.modules()
    graphs = [each.graph for each in modules if isinstance(each, torch.fx.GraphModule)]
    targets = {node.target for graph in graphs for node in graph.nodes}
    ops = {
        f"{target.namespace}::{target._opname}"
        for target in targets
        if isinstance(target, torch._ops.OpOverload) and target.namespace not in _EVERYWHERE
    }
    found = {defined[name]._init_fn.__module__ for name in ops if name in defined}
    return tuple(sorted(found - {"__main__"}))
