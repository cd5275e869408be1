"""Inputs of any strides, for loaders that give a graph whatever its module was given.

Inductor's loops step through an input as if it were contiguous, and nothing looks whether one is:
of a view, as a block of Flux gives the next one, they read other numbers. Our own runtime copies
such an input before the call; here the graph does it.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from hubaoti.artifact.schema import Input
from hubaoti.compiler.symbols import list_placeholders
from hubaoti.errors import CompileFailed

# Inductor neither lowers nor decomposes this one: it is called as it is, sees the strides that its
# tensor really has, and answers a contiguous one.
_COPY = torch.ops.aten.detach_copy.default


def take_any_strides(program: ExportedProgram, inputs: tuple[Input, ...]) -> None:
    """Have a program read a contiguous copy of each of its inputs.

    Raises:
        CompileFailed: it writes into some, which are the caller's own and cannot be copies.
    """
    if written := [entry.name for entry in inputs if entry.mutated]:
        raise CompileFailed(
            f"export: it writes into {', '.join(written)}, and those loaders do not look how a "
            "tensor that they are given lies in memory",
            hint="compile a module inside of it, or leave --layout zerogpu out",
        )
    graph = program.graph
    given = [*zip(list_placeholders(program), inputs, strict=True)]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node, entry in given:
        users = [user for user in node.users if user.op != "output"]
        if not entry.shape or not users:
            continue
        with graph.inserting_before(first):
            copy = graph.call_function(_COPY, (node,))
        copy.meta["val"] = node.meta["val"]
        for user in users:
            user.replace_input_with(node, copy)
    program.graph_module.recompile()
    graph.lint()
