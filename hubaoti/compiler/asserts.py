"""What a program takes for granted of its sizes, looked at for every size within its dims.

A step that changes a program, as naming its attention does, asks torch about sizes. What torch
answers of the example alone becomes an assert, or a guard that nothing looks at any more: the graph
would be right at the example's sizes, and fail or be wrong at others.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._sympy.printers import PythonPrinter  # private, checked on torch 2.11 to 2.15

from hubaoti.compiler.dims import DimRanges, Sizes, nest_sizes
from hubaoti.compiler.signature import CallSignature
from hubaoti.compiler.symbols import list_parts, map_symbols
from hubaoti.errors import CompileFailed

_DRAWN = 10_000
_NEAR = 64  # sizes from a dim's smallest on, where half of the points are drawn
_CORNERS = 1024  # at most: of ten dims


def require_asserts_hold(program: ExportedProgram, bounds: DimRanges, face: CallSignature) -> None:
    """Refuse a program whose asserts and guards do not hold at all sizes within the bounds.

    One of a single dim is looked at for each of its sizes; one of several at the corners and at
    10,000 drawn points, which are the same ones each time. What depends on values of a call is left
    to the graph, which looks at them each time.

    Raises:
        CompileFailed: one does not hold; the message names it, and the sizes.
    """
    symbols = map_symbols(program, face, bounds)
    points = _draw_points(bounds)
    asserts = [(each, 0) for each in _list_asserts(program)]
    guards = [(_allow_ties(each), 2) for each in _list_guards(program)]
    for condition, least in (*asserts, *guards):
        if not condition.free_symbols <= {*symbols}:
            continue
        used = {symbol: symbols[symbol] for symbol in sorted(condition.free_symbols, key=str)}
        dims = sorted({str(dim) for size in used.values() for dim in size.free_symbols})
        alone = _list_sizes(dims[0], bounds) if len(dims) == 1 else None
        holds = _make_question(condition, used, dims, least)
        found = next((point for point in alone or points if not holds(point)), None)
        if found is not None:
            where = ", ".join(f"{name}={found[name]}" for name in dims)
            raise CompileFailed(
                f"lower: the graph would be right only where {_describe(condition, used)}, "
                f"which is not so at {where}",
                hint="narrow the dims to sizes at which it is, or make buckets of them",
            )


def drop_ties(program: ExportedProgram, bounds: DimRanges) -> None:
    """Remove a program's asserts that sizes are no others, as the example's were not.

    Torch makes them of its questions where it defers; where it does not, it exports without a word.
    Only of two dims, which are compared where they are alike (see `dims.choose_probes`): what is
    asked of a remainder, a sum or a value of a call stays.
    """
    steps = {1, *(sizes.step for sizes in bounds.values())}
    for node, condition in _iterate_asserts(program):
        if _is_tie(condition, steps):
            node.graph.erase_node(node)
    for part in list_parts(program):
        part.recompile()


def _is_tie(condition: Any, steps: Collection[int]) -> bool:
    """Whether it says that two dims differ; one with a step is so many times its symbol."""
    if not isinstance(condition, sympy.Ne) or free_unbacked_symbols(condition):
        return False
    sides = [each.as_coeff_Mul() for each in condition.args]
    return all(size.is_Symbol and count in steps for count, size in sides)


def _iterate_asserts(program: ExportedProgram) -> Iterator[tuple[Node, Any]]:
    """Each assert of a program of sizes, with what it says as sympy's expression."""
    for node in (node for part in list_parts(program) for node in list(part.graph.nodes)):
        if node.target is torch.ops.aten._assert_scalar.default and isinstance(node.args[0], Node):
            value = node.args[0].meta["val"]
            if isinstance(value, torch.SymBool):
                yield node, value.node.expr


def _list_asserts(program: ExportedProgram) -> list[Any]:
    """What a program asserts of sizes, as sympy's expressions."""
    return list(dict.fromkeys(condition for _, condition in _iterate_asserts(program)))


def _list_guards(program: ExportedProgram) -> list[Any]:
    """What torch found to be so while it made a program, as sympy's expressions."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    modes = (each.fake_mode for each in values if hasattr(each, "fake_mode"))
    environment = next((mode.shape_env for mode in modes), None)  # all have the same one
    return list(dict.fromkeys(guard.expr for guard in getattr(environment, "guards", ())))


def _allow_ties(guard: Any) -> Any:
    """A guard of several sizes without what it says of those that happen to be alike.

    Torch takes a size to be no other's, as the example's was not, as it does when it exports: it
    asks how tensors lie in memory, and there both answers are right where it is. (That it takes no
    size to be 1 is allowed for where the sizes are put in.)
    """
    if len(guard.free_symbols) < 2:
        return guard
    if isinstance(guard, sympy.Ne):
        return sympy.true
    weak = {sympy.StrictLessThan: sympy.Le, sympy.StrictGreaterThan: sympy.Ge}
    return weak[type(guard)](*guard.args) if type(guard) in weak else guard


def _list_sizes(name: str, bounds: DimRanges) -> list[Sizes]:
    """Each size of a dim."""
    return [{name: size} for size in bounds[name].sizes]


def _draw_points(bounds: DimRanges) -> list[Sizes]:
    """The corners of the dims, and points within that are the same ones each time."""
    ends = itertools.product(*((sizes.low, sizes.high) for sizes in bounds.values()))
    points = [dict(zip(bounds, end, strict=True)) for end in itertools.islice(ends, _CORNERS)]
    draw = random.Random(0)
    for index in range(_DRAWN):
        point = {}
        for name, sizes in bounds.items():
            near = min(sizes.high, sizes.low + _NEAR * sizes.step)
            high = near if index % 2 else sizes.high
            point[name] = draw.randrange(sizes.low, high + 1, sizes.step)
        points.append(point)
    return [nest_sizes(point, bounds) for point in points]


def _make_question(
    condition: Any, used: Mapping[Any, Any], dims: Sequence[str], least: int
) -> Callable[[Sizes], bool]:
    """Whether a condition holds at a point, or a symbol there is below `least`.

    Sympy itself would take seconds to put in so many numbers.
    """
    names = [sympy.Symbol(name) for name in dims]
    find_sizes = sympy.lambdify(names, [*used.values()], modules="math")
    ask = sympy.lambdify([*used], condition, modules=[{"math": math}], printer=PythonPrinter)

    def holds(point: Sizes) -> bool:
        sizes = [int(size) for size in find_sizes(*(point[name] for name in dims))]
        return min(sizes, default=least) < least or bool(ask(*sizes))

    return holds


def _describe(condition: Any, used: Mapping[Any, Any]) -> str:
    """A condition as a user reads it, of dims."""
    text: str = PythonPrinter().doprint(condition)
    for symbol, size in used.items():
        text = re.sub(rf"\b{symbol}\b", str(size) if size.is_Symbol else f"({size})", text)
    return text
