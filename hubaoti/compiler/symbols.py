"""Torch's symbols of a program, as what they are of our dims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from hubaoti.compiler.faces import Face
from hubaoti.compiler.shapes import Bounds
from hubaoti.extents import Extent

ATTEMPTS = 4  # at refining dims; torch tells of one thing at a time


def symbols_of(program: ExportedProgram, face: Face, bounds: Bounds) -> dict[Any, Any]:
    """Torch's symbols, as what they are of our dims."""
    symbols: dict[Any, Any] = {}
    for at, axis, extent in face.extents():
        size = fake(program, at).shape[axis]
        if isinstance(size, int) or len(size.node.expr.free_symbols) != 1:
            continue
        (symbol,) = size.node.expr.free_symbols
        if symbol not in symbols:
            named = sum(factor * sympy.Symbol(name) for name, factor in extent.terms)
            symbols[symbol] = sympy.solve(size.node.expr - named - extent.plus, symbol)[0]
    return symbols


def extent_of(size: Any, symbols: Mapping[Any, Any]) -> Extent | None:
    """The extent that torch's expression is; None where it is no sum of dims."""
    if isinstance(size, int):
        return Extent.of({}, size)
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
    return Extent.of(terms, plus)


def fake(program: ExportedProgram, at: int) -> Any:
    """What torch knows of an input."""
    return placeholders(program)[at].meta["val"]


def placeholders(program: ExportedProgram) -> list[torch.fx.Node]:
    """The graph's user inputs, in order."""
    names = [
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT
    ]
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [nodes[name] for name in names]
