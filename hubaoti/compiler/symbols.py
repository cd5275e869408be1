"""Torch's symbols of a program, as what they are of our dims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.compiler.dims import DimRanges
from hubaoti.compiler.signature import CallSignature, encode_extent


def map_symbols(program: ExportedProgram, face: CallSignature, bounds: DimRanges) -> dict[Any, Any]:
    """Torch's symbols, as what they are of our dims."""
    symbols: dict[Any, Any] = {}
    for index, axis, extent in face.list_extents():
        size = get_fake_value(program, index).shape[axis]
        if isinstance(size, int) or len(size.node.expr.free_symbols) != 1:
            continue
        (symbol,) = size.node.expr.free_symbols
        if symbol not in symbols:
            named = sum(factor * sympy.Symbol(name) for name, factor in extent.terms)
            symbols[symbol] = sympy.solve(size.node.expr - named - extent.plus, symbol)[0]
    return symbols


def encode_size(size: Any, symbols: Mapping[Any, Any]) -> str | int | None:
    """A size as the manifest says it: a number, a sum of dims, or None for another expression."""
    if isinstance(size, int):
        return size
    expression = sympy.expand(size.node.expr.subs(symbols))
    terms: dict[str, int] = {}
    plus = 0
    for term, factor in expression.as_coefficients_dict().items():
        if not factor.is_Integer:
            return None
        if term == 1:
            plus = int(factor)
        elif term.is_Symbol and term not in symbols:
            terms[str(term)] = int(factor)
        else:
            return None
    return encode_extent(DimExpr.of(terms, plus))


def get_fake_value(program: ExportedProgram, index: int) -> Any:
    """The fake tensor of one user input: torch's symbols for its sizes, and no values."""
    return list_placeholders(program)[index].meta["val"]


def list_parts(program: ExportedProgram) -> list[torch.fx.GraphModule]:
    """A program's graph, and those within it."""
    return [
        part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)
    ]


def list_placeholders(
    program: ExportedProgram, kind: InputKind = InputKind.USER_INPUT
) -> list[torch.fx.Node]:
    """The nodes of a program's inputs of a kind, in order; by default what a call gives."""
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is kind]
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [nodes[name] for name in names]
