"""The scales of float8 activations, as plain ops: who loads a program need not have torchao."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

_aten = torch.ops.aten
_CHOOSE = "torchao.choose_scale_float8.default"


def write_out_scales(program: ExportedProgram) -> None:
    """Replace torchao's own op that chooses scales, in place, by what it computes.

    Nothing else is decomposed: views of what attention answers would be those of the CPU's kernel.
    Private, checked on torchao 0.18: `torchao::choose_scale_float8`, in blocks that are rows. Under
    another name it stays, and the process that loads the program says which op it lacks.
    """
    graph = program.graph_module.graph
    for node in [each for each in graph.nodes if str(each.target) == _CHOOSE]:
        with graph.inserting_before(node):
            node.replace_all_uses_with(_choose_scale(graph, *node.args, **node.kwargs))
        graph.erase_node(node)
    program.graph_module.recompile()


def _choose_scale(  # noqa: PLR0913 - the op's own
    graph: Graph,
    tensor: Any,
    block_size: Any,
    float8_dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
    hp_value_lb: float | None = None,
    hp_value_ub: float | None = None,
) -> Node:
    """(…, 1), float32: the largest float8 is a token's largest value, clamped to the bounds.

    Source: `_choose_scale_float8` of torchao 0.18.
    """
    largest = _insert(
        graph, _aten.amax.default, _insert(graph, _aten.abs.default, tensor), [-1], True
    )
    if hp_value_lb is not None or hp_value_ub is not None:
        largest = _insert(graph, _aten.clamp.default, largest, hp_value_lb, hp_value_ub)
    scale = _insert(graph, _aten.div.Tensor, largest, torch.finfo(float8_dtype).max)
    return _insert(graph, _aten.to.dtype, scale, torch.float32)


def _insert(graph: Graph, op: Any, *args: Any) -> Node:
    """A call of an op, with what torch knows of its answer."""
    node = graph.call_function(op, args)
    with torch.no_grad():
        node.meta["val"] = op(*(a.meta["val"] if isinstance(a, Node) else a for a in args))
    return node
