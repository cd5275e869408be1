"""Numbers that choose rows: those that no table has are refused, all others answer as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from hubaoti.artifact.schema import Cache, Input
from hubaoti.compiler.index_guards import MESSAGE, guard_indices
from hubaoti.compiler.symbols import list_placeholders

ROWS, WIDTH = 50, 4
Use = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Using(nn.Module):
    """A table, and what is done with it and numbers of a caller."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(ROWS, WIDTH), requires_grad=False)
        self.use = use

    def forward(self, x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return self.use(self.table, x, numbers)


def column(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers for `gather` and `scatter`, one for each column."""
    return numbers[:, None].expand(-1, WIDTH)


UNGUARDED: dict[str, Use] = {
    "embedding": lambda table, x, n: functional.embedding(n, table),
    "indexing": lambda table, x, n: x + table[n],
    "indexing of the second axis": lambda table, x, n: table.t()[:, n].t() * x,
    "indexing of two axes": lambda table, x, n: table[n, 0] + x[:, 0],
    "index_select": lambda table, x, n: table.index_select(0, n),
    "index_add": lambda table, x, n: table.index_add(0, n, x),
    "index_copy": lambda table, x, n: table.clone().index_copy_(0, n, x),
    "index_fill": lambda table, x, n: table.index_fill(0, n, 1.0),
    "index_put": lambda table, x, n: table.index_put((n,), x, accumulate=True),
    "assignment": lambda table, x, n: assigned(table, x, n),
    "gather": lambda table, x, n: table.gather(0, column(n)),
    "scatter": lambda table, x, n: table.scatter(0, column(n), x),
    "scatter_add": lambda table, x, n: table.scatter_add(0, column(n), x),
    "scatter_reduce": lambda table, x, n: table.scatter_reduce(0, column(n), x, "amax"),
    "take": lambda table, x, n: table[:, 0].contiguous().take(n),
    "take_along_dim": lambda table, x, n: table.take_along_dim(column(n), 0),
    "one_hot": lambda table, x, n: functional.one_hot(n, ROWS).float() @ table,
    "after arithmetic": lambda table, x, n: table[(n + 3) // 1 - 3],
    "as whole numbers of real ones": lambda table, x, n: table[(x[:, 0] * 0 + n).long()],
    "of 32 bits": lambda table, x, n: functional.embedding(n.int(), table),
}
BOUNDED: dict[str, Use] = {
    "the best": lambda table, x, n: table[x.topk(2).indices],
    "the largest": lambda table, x, n: table[x.argmax(-1)],
    "the largest of two answers": lambda table, x, n: table[x.max(-1).indices],
    "an order": lambda table, x, n: x[x[:, 0].argsort()],
    "places that are counted": lambda table, x, n: table[(n != 1).int().cumsum(0).clamp(max=9)],
    "no numbers of the caller": lambda table, x, n: table[torch.arange(3)] + x.sum(),
}


def assigned(table: torch.Tensor, x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """A table some of whose rows were replaced."""
    table = table.clone()
    table[numbers] = x
    return table


def exported(use: Use, values: str = "any<50", size: int = 6) -> tuple[Any, Using, int]:
    """The guarded program of a use, its module, and how many indices are guarded."""
    module = Using(use).eval()
    x, numbers = torch.randn(size, WIDTH), torch.arange(size)
    rows = torch.export.Dim("rows", min=2, max=500)
    shapes = ({0: rows}, {0: rows})
    with torch.no_grad():
        program = torch.export.export(module, (x, numbers), dynamic_shapes=shapes, strict=False)
    entries = [
        Input(name="x", dtype="float32", shape=("rows", WIDTH), values="real"),
        Input(name="numbers", dtype="int64", shape=("rows",), values=values),
    ]
    found = guard_indices(program, [*zip(list_placeholders(program), entries, strict=True)], None)
    return program, module, found


@pytest.mark.parametrize("name", UNGUARDED)
def test_a_number_that_no_table_has_is_an_error_and_others_answer_as_before(name: str) -> None:
    program, module, found = exported(UNGUARDED[name])
    assert found == 1
    run = program.module()
    x, numbers = torch.randn(9, WIDTH), torch.randperm(ROWS)[:9]
    torch.testing.assert_close(run(x, numbers), module(x, numbers))
    for wrong in (ROWS, -ROWS - 1, 1 << 20):
        numbers[4] = wrong
        with pytest.raises(RuntimeError, match=MESSAGE):
            run(x, numbers)


@pytest.mark.parametrize("name", ["indexing", "assignment", "index_fill"])
def test_numbers_that_count_from_the_end_still_do(name: str) -> None:
    program, module, _ = exported(UNGUARDED[name])
    x, numbers = torch.randn(3, WIDTH), torch.tensor([-1, 0, -ROWS + 1])
    torch.testing.assert_close(program.module()(x, numbers), module(x, numbers))


def test_a_class_that_counts_for_nothing_is_none_that_is_missing() -> None:
    def loss(table: torch.Tensor, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(x @ table.t(), n, ignore_index=-100)

    program, module, found = exported(loss)
    assert found == 1
    x, numbers = torch.randn(3, WIDTH), torch.tensor([1, -100, 49])
    torch.testing.assert_close(program.module()(x, numbers), module(x, numbers))
    numbers[0] = ROWS
    with pytest.raises(RuntimeError, match=MESSAGE):
        program.module()(x, numbers)


@pytest.mark.parametrize("name", BOUNDED)
def test_what_sizes_bound_is_not_asked_again(name: str) -> None:
    assert exported(BOUNDED[name])[2] == 0


@pytest.mark.parametrize(
    "use",
    [
        lambda table, x, n: table[x[:, 0].argmax()] + x,
        lambda table, x, n: table[torch.bucketize(x[:, 0], table[:, 0].sort().values)],
        lambda table, x, n: table[n[0]] + x,
        lambda table, x, n: table[n[-1].item()] + x,
    ],
    ids=["a place among more rows", "a bucket beyond the last", "one row", "one row by a number"],
)
def test_a_place_of_something_larger_and_a_single_number_are_asked_too(use: Use) -> None:
    assert exported(use)[2] == 1


def test_one_row_by_a_number_that_no_table_has_is_an_error() -> None:
    program, module, _ = exported(lambda table, x, n: table[n[0]] + x)
    x, numbers = torch.randn(3, WIDTH), torch.tensor([-3, 0, 1])
    torch.testing.assert_close(program.module()(x, numbers), module(x, numbers))
    numbers[0] = ROWS
    with pytest.raises(RuntimeError, match=MESSAGE):
        program.module()(x, numbers)


def test_what_stands_in_a_part_of_a_program_is_guarded_too() -> None:
    def inside(table: torch.Tensor, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return table[n] + x

    program, module, found = exported(inside)
    assert found == 1
    x, numbers = torch.randn(3, WIDTH), torch.tensor([1, 2, 3])
    torch.testing.assert_close(program.module()(x, numbers), module(x, numbers))
    numbers[0] = ROWS
    with pytest.raises(RuntimeError, match=MESSAGE):
        program.module()(x, numbers)


def test_ids_that_are_looked_at_before_a_call_are_not_asked_again_unless_the_table_is_smaller() -> (
    None
):
    embedding = UNGUARDED["embedding"]
    assert exported(embedding, "ids<50")[2] == 0
    assert exported(embedding, "ids<51")[2] == 1


def test_the_places_of_a_cache_are_looked_at_before_a_call_and_no_other_table() -> None:
    class Cached(nn.Module):
        def forward(self, keys: torch.Tensor, new: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            keys.index_copy_(2, at, new)
            return keys.sum() + torch.arange(9.0)[at].sum()

    keys, new, at = torch.zeros(1, 1, 8, 2), torch.ones(1, 1, 2, 2), torch.arange(2)
    with torch.no_grad():
        program = torch.export.export(Cached(), (keys, new, at), strict=False)
    entries = [
        Input(name=name, dtype=dtype, shape=shape, values=values, mutated=name == "keys")
        for name, dtype, shape, values in (
            ("keys", "float32", (1, 1, 8, 2), "real"),
            ("new", "float32", (1, 1, 2, 2), "real"),
            ("position", "int64", (2,), "position"),
        )
    ]
    cache = Cache(kind="static", keys=0, values=0, position=2)
    pairs = [*zip(list_placeholders(program), entries, strict=True)]
    assert guard_indices(program, pairs, cache) == 1


def test_what_is_not_torch_s_own_is_not_taken_for_it() -> None:
    """Its arguments have other names, and mean something else."""
    with torch.library._scoped_library("hubaoti_guards", "FRAGMENT") as library:
        library.define("take(Tensor x, Tensor where) -> Tensor")
        library.impl("take", lambda x, where: x + where.sum(), "CompositeExplicitAutograd")
        torch.library.register_fake("hubaoti_guards::take", lambda x, where: x + 0, lib=library)
        take = torch.ops.hubaoti_guards.take
        module = Using(lambda table, x, n: take(x, n))
        program = torch.export.export(module, (torch.randn(3, WIDTH), torch.tensor([1, 2, 3])))
        assert guard_indices(program, [], None) == 0
