"""Whole numbers that choose rows: a program checks them itself, before it reads by them.

Inductor asserts indices inside of its parallel loops, where an exception ends the process. Here
each index that a caller can make too large is clamped, so that no loop reads beyond its table, and
that nothing had to be clamped is asserted in a step of its own, of which the caller hears.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from hubaoti.artifact.schema import Cache, Input

_aten = torch.ops.aten
MESSAGE = "index out of bounds"
_WHOLE = {torch.int64, torch.int32}

_ALONG_A_DIM = {
    *("index_select", "index_add", "index_copy", "index_reduce", "gather"),
    *("scatter", "scatter_add", "scatter_reduce"),
}
_BY_LISTS = {"index", "index_put", "_unsafe_index", "_unsafe_index_put"}
# Of a class for each row; one number says that a row has none.
_BY_CLASSES = {"nll_loss_nd", "nll_loss", "nll_loss2d", "cross_entropy_loss"}
# What these answer does not depend on the numbers that they are given.
_FIXED = {
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "sym_size"),
}
# What these answer are places along a dim; of those with two answers it is the second.
_PLACES = {"argsort", "argmax", "argmin"}
_WITH_PLACES = {"sort", "max", "min", "median", "mode", "cummax", "cummin", "topk", "kthvalue"}


@dataclass(frozen=True, slots=True)
class _Index:
    """A tensor of numbers that choose among `table`'s rows along `dim`; all elements without one.

    With `from_end` numbers below zero count from the end; `ignored` is one that chooses nothing.
    Of classes that no table has there are `classes`.
    """

    numbers: Node
    table: Node
    dim: int | None
    from_end: bool = False
    ignored: int | None = None
    classes: int | None = None

    @property
    def rows(self) -> Any:
        """How many rows there are to choose from; a symbol where that follows from a dim."""
        if self.classes is not None:
            return self.classes
        shape = self.table.meta["val"].shape
        return prod(shape) if self.dim is None else shape[self.dim]


def guard_indices(
    program: ExportedProgram, inputs: Sequence[tuple[Node, Input]], cache: Cache | None
) -> int:
    """Have a program check each index that follows from its inputs; how many there are.

    `inputs` are its placeholders with what the manifest says of them. Ids below a table's rows, and
    the places of a KV cache, are checked before each call already.
    """
    given = dict(inputs)
    count = _guard_graph(
        program.graph, {*given}, lambda index: _is_checked(index, given, inputs, cache)
    )
    for part in program.graph_module.modules():  # as of autocast that is off for a while
        if isinstance(part, GraphModule) and part is not program.graph_module:
            inside = {node for node in part.graph.nodes if node.op == "placeholder"}
            count += _guard_graph(part.graph, inside, lambda index: False)
            part.recompile()
    if count:
        program.graph_module.recompile()
        program.graph.lint()
    return count


def _guard_graph(graph: Graph, given: Set[Node], is_known: Callable[[_Index], bool]) -> int:
    """Guard the indices of a graph that follow from what it is given; how many there are."""
    count = 0
    for node in [*graph.nodes]:
        for index in _find_indices(node):
            if is_known(index) or not _can_exceed_rows(index, given):
                continue
            takes = index.numbers in node.all_input_nodes
            # Else it is a number that was taken out of a tensor.
            user = node if takes else _bind_arguments(node)["index"]
            with graph.inserting_before(user):
                user.replace_input_with(index.numbers, _clamp_index(graph, index))
            count += 1
    return count


def _find_indices(node: Node) -> Iterator[_Index]:
    """The indices that an operation takes; none of an operation that no finder knows."""
    find = _FINDERS.get(_read_op_name(node))
    if find is not None:
        yield from (index for index in find(_bind_arguments(node)) if _is_row_index(index))


def _bind_arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operation by the names that its schema has for them, defaults too."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    defaults = {each.name: each.default_value for each in schema}
    return defaults | dict(zip(defaults, node.args, strict=False)) | node.kwargs


def _is_row_index(index: _Index) -> bool:
    """Whether these are numbers that choose rows, and not a mask over them."""
    nodes = (index.numbers, index.table)
    if not all(isinstance(node, Node) and "val" in node.meta for node in nodes):
        return False
    return index.numbers.meta["val"].dtype in _WHOLE and index.table.meta["val"].dim() > 0


def _find_select_index(given: Mapping[str, Any]) -> Iterator[_Index]:
    """One row, where its number is an element of a tensor."""
    number = given["index"]
    if _read_op_name(number) in {"item", "_local_scalar_dense"}:
        yield _Index(number.args[0], given["self"], given["dim"], from_end=True)


def _find_list_indices(given: Mapping[str, Any]) -> Iterator[_Index]:
    """Advanced indexing: numbers or None for each dim; a mask stands for its dims."""
    dim = 0
    for each in given["indices"]:
        is_mask = isinstance(each, Node) and each.meta["val"].dtype in {torch.bool, torch.uint8}
        if isinstance(each, Node) and not is_mask:
            yield _Index(each, given["self"], dim, from_end=True)
        dim += each.meta["val"].dim() if is_mask else 1


def _find_loss_classes(given: Mapping[str, Any]) -> Iterator[_Index]:
    """A loss, of the scores of all classes and the class of each row."""
    dim = min(1, given["self"].meta["val"].dim() - 1)
    yield _Index(given["target"], given["self"], dim, ignored=given["ignore_index"])


def _find_one_hot_classes(given: Mapping[str, Any]) -> Iterator[_Index]:
    """`one_hot`; without a number of classes it cannot be exported."""
    classes = given["num_classes"]
    if isinstance(classes, int) and classes >= 0:
        yield _Index(given["self"], given["self"], None, classes=classes)


def _find_unpool_places(given: Mapping[str, Any]) -> Iterator[_Index]:
    """Places that a pooling took its numbers from."""
    sizes = given["output_size"]
    if isinstance(sizes, (list, tuple)) and all(isinstance(size, int) for size in sizes):
        yield _Index(given["indices"], given["self"], None, classes=prod(sizes))


# By what an operation is called; each takes the arguments by name.
_FINDERS: Mapping[str, Callable[[Mapping[str, Any]], Iterable[_Index]]] = {
    **dict.fromkeys(
        ("embedding", "embedding_bag", "_embedding_bag"),
        lambda given: [_Index(given["indices"], given["weight"], 0)],
    ),
    **dict.fromkeys(
        _ALONG_A_DIM, lambda given: [_Index(given["index"], given["self"], given["dim"])]
    ),
    **dict.fromkeys(_BY_LISTS, _find_list_indices),
    **dict.fromkeys(
        ("take", "put"), lambda given: [_Index(given["index"], given["self"], None, from_end=True)]
    ),
    **dict.fromkeys(_BY_CLASSES, _find_loss_classes),
    "index_fill": lambda given: [
        _Index(given["index"], given["self"], given["dim"], from_end=True)
    ],
    "take_along_dim": lambda given: [_Index(given["indices"], given["self"], given["dim"])],
    "one_hot": _find_one_hot_classes,
    "select": _find_select_index,
    **dict.fromkeys(("max_unpool2d", "max_unpool3d"), _find_unpool_places),
}


def _is_checked(
    index: _Index,
    given: Mapping[Node, Input],
    inputs: Sequence[tuple[Node, Input]],
    cache: Cache | None,
) -> bool:
    """Whether the runtime looks at these very numbers before each call."""
    entry = given.get(index.numbers)
    if entry is None:
        return False
    if entry.values.startswith("ids<"):
        return isinstance(index.rows, int) and int(entry.values[4:]) <= index.rows
    if cache is None or cache.position is None:
        return False
    places = {inputs[place][0] for place in (cache.keys, cache.values)}
    return index.numbers is inputs[cache.position][0] and index.table in places


def _can_exceed_rows(index: _Index, given: Set[Node]) -> bool:
    """Whether a caller can make numbers larger than what they choose from.

    What a comparison answers is 0 or 1, and what is found by sorting is a place.
    """
    waiting, seen = [index.numbers], {index.numbers}
    while waiting:
        node = waiting.pop()
        if node in given:
            return True
        if _is_bounded(node, index.rows):
            continue
        waiting += [each for each in node.all_input_nodes if each not in seen]
        seen |= {*node.all_input_nodes}
    return False


def _is_bounded(node: Node, rows: Any) -> bool:
    """Whether an operation answers nothing that there are not rows for, whatever it is given."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.dtype is torch.bool:
        return True
    found: Any = node
    has_places = _read_op_name(node) in _PLACES
    if node.target is operator.getitem and node.args[1] == 1:
        found = node.args[0]
        has_places = _read_op_name(found) in _WITH_PLACES
    if not has_places:
        return _read_op_name(node) in _FIXED
    return _is_no_more(_read_size_along(found), rows)


def _read_size_along(node: Node) -> Any:
    """The size along which an operation looks; of all elements where it names no dim."""
    given = _bind_arguments(node)
    shape, dim = given["self"].meta["val"].shape, given.get("dim")
    return shape[dim] if isinstance(dim, int) else prod(shape)


def _is_no_more(size: Any, rows: Any) -> bool:
    """Whether a size is known to be no more than another; two symbols are where they are one."""
    if isinstance(size, int) and isinstance(rows, int):
        return size <= rows
    return str(size) == str(rows)


def _read_op_name(node: Any) -> str:
    """The name of what a node calls, as `index_add`; nothing of what is not torch's own."""
    target: Any = getattr(node, "target", None)
    is_known = getattr(target, "namespace", None) == "aten"
    return target.overloadpacket.__name__.removesuffix("_") if is_known else ""


def _compute_row_limits(index: _Index, call: Callable[..., Node]) -> tuple[Node, Node]:
    """The least and the largest number, where there are as many rows as a dim says."""
    if index.dim is None:
        rows = call(_aten.sym_numel.default, index.table)
    else:
        rows = call(_aten.sym_size.int, index.table, index.dim)
    return call(operator.neg, rows), call(operator.sub, rows, 1)


def _clamp_index(graph: torch.fx.Graph, index: _Index) -> Node:
    """The numbers, clamped to what there is, after a step that fails where that changes them."""

    def call(target: Any, *args: Any) -> Node:
        node = graph.call_function(target, args)
        values = torch.fx.node.map_arg(args, lambda each: each.meta["val"])
        with index.numbers.meta["val"].fake_mode, torch.no_grad():
            node.meta["val"] = target(*values)
        return node

    rows = index.rows
    least, most = (-rows, rows - 1) if isinstance(rows, int) else _compute_row_limits(index, call)
    clamped = call(_aten.clamp.default, index.numbers, least if index.from_end else 0, most)
    if index.ignored is not None:
        nothing = call(_aten.eq.Scalar, index.numbers, index.ignored)
        clamped = call(_aten.where.self, nothing, index.numbers, clamped)
    fine = call(_aten.all.default, call(_aten.eq.Tensor, index.numbers, clamped))
    call(_aten._assert_async.msg, fine, MESSAGE)
    return clamped
