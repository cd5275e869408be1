"""Export: one trace for every size of the dims, or words that say why not."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY
from torch import nn

from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.artifact.schema import Input
from hubaoti.compiler.dims import DimRanges, choose_example_sizes
from hubaoti.compiler.export import Exported, export, refuse_beyond, run_exporter
from hubaoti.compiler.from_config import load_source
from hubaoti.compiler.guards import Fixes, Lines, limit_by_guards
from hubaoti.compiler.request import CompileRequest, Range
from hubaoti.compiler.signature import CallSignature, add_cache_inputs, specialize_full_window
from hubaoti.errors import BadDim, CompileFailed

CPU = torch.device("cpu")
DIMS = {"batch": Range(1, 8), "seq": Range(8, 64)}


def face_like(**shapes: tuple[int | str, ...]) -> CallSignature:
    """Keyword arguments of these shapes."""
    inputs = tuple(
        Input(name=name, dtype="float32", shape=shape, values="real")
        for name, shape in shapes.items()
    )
    return CallSignature(
        {"args": [], "kwargs": {name: {"tensor": i} for i, name in enumerate(shapes)}}, inputs
    )


ROWS = face_like(x=("batch", "seq"))


def exported(
    module: nn.Module, face: CallSignature, bounds: DimRanges, *stated: str, **sizes: int
) -> Exported:
    """Export at the sizes that the compiler would trace at, or at others."""
    chosen = choose_example_sizes(bounds) | sizes
    tensors = [
        torch.zeros(
            [n if isinstance(n, int) else DimExpr.parse(n).at(chosen) for n in entry.shape],
            dtype=getattr(torch, entry.dtype),
        )
        for entry in face.inputs
    ]
    return export(module.eval(), face, bounds, tensors, frozenset(stated))


def shapes(found: Exported) -> dict[str, tuple[int | str, ...]]:
    return {entry.name: entry.shape for entry in found.face.inputs}


def at(module: type[nn.Module], code: str) -> str:
    """Where a line of a module's code stands, as an error tells it."""
    lines, first = inspect.getsourcelines(module)
    line = next(first + n for n, text in enumerate(lines) if text.strip() == code)
    return f"{Path(__file__).name}:{line}: {code}"


# What a graph takes and answers


def test_inputs_and_outputs_are_named_with_their_dims(tiny_llama: Path) -> None:
    source = load_source(tiny_llama, CompileRequest(dtype="float32"), CPU)
    bounds = {"batch": Range(1, 8), "seq": Range(2, 32)}
    tensors = [torch.zeros(3, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.int64)]
    found = export(source.model, source.face, bounds, tensors, frozenset())
    assert {(i.name, i.values) for i in found.face.inputs} == {
        ("input_ids", f"ids<{source.vocabulary}"),
        ("attention_mask", "mask"),
    }
    (output,) = found.outputs.tensors
    assert output.shape == ("batch", "seq", VOCABULARY)
    assert found.outputs.template == {"tuple": [{"tensor": 0}]}
    assert found.bounds == bounds


class Answers(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return {"twice": (torch.cat((x, x), 1), 7), "half": x.half(), "one": x.sum(1), "no": None}


def test_an_answer_s_sizes_are_said_in_the_dims() -> None:
    found = exported(Answers(), ROWS, DIMS)
    assert [(o.name, o.dtype, o.shape) for o in found.outputs.tensors] == [
        ("output_twice_0", "float32", ("batch", "2*seq")),
        ("output_half", "float16", ("batch", "seq")),
        ("output_one", "float32", ("batch",)),
    ]
    assert found.outputs.template == {
        "dict": {
            "twice": {"tuple": [{"tensor": 0}, 7]},
            "half": {"tensor": 1},
            "one": {"tensor": 2},
            "no": None,
        },
        "order": ["twice", "half", "one", "no"],
    }


class Flattens(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten()


def test_a_size_that_no_sum_of_dims_is_is_left_open() -> None:
    (output,) = exported(Flattens(), ROWS, DIMS).outputs.tensors
    assert output.shape == (None,)


def test_a_dim_of_one_size_is_that_size_in_every_shape() -> None:
    found = exported(Answers(), ROWS, DIMS | {"batch": Range(2, 2)})
    assert found.outputs.tensors[0].shape == (2, "2*seq")
    assert shapes(found) == {"x": ("batch", "seq")}


def test_a_dim_of_one_or_two_is_traced_with_room_above_and_keeps_its_bounds() -> None:
    """Else what lowers the program takes it for more than one, which is two."""
    found = exported(Answers(), ROWS, DIMS | {"batch": Range(1, 2)})
    assert found.bounds["batch"] == Range(1, 2)
    (traced,) = (r for r in found.program.range_constraints.values() if r.lower == 1)
    assert traced.upper > 2


class TwoPlaces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight[: x.shape[1]]


@pytest.mark.parametrize("stated", [(), ("seq",)])
def test_what_takes_two_at_most_is_traced_without_room_above(stated: tuple[str, ...]) -> None:
    module, bounds = TwoPlaces(), {"batch": Range(1, 2), "seq": Range(1, 2)}
    found = exported(module, ROWS, bounds, *stated)
    assert found.bounds == bounds
    highs = sorted(int(each.upper) for each in found.program.range_constraints.values())
    assert highs == [2, 3]
    for x in (torch.ones(1, 1), torch.ones(2, 2)):
        assert torch.equal(found.program.module()(x)[0], module(x))


class Adds(nn.Module):
    def forward(self, x: torch.Tensor, long: torch.Tensor) -> torch.Tensor:
        return x.sum() + long


def test_an_input_s_size_may_be_a_multiple_and_a_number_more() -> None:
    face = face_like(x=("batch", "seq"), long=("4*batch", "seq+7"))
    found = exported(Adds(), face, DIMS)
    assert shapes(found)["long"] == ("4*batch", "seq+7")
    assert found.outputs.tensors[0].shape == ("4*batch", "seq+7")


class Looks(nn.Module):
    """Looks up the rows of a table, and counts with other whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, kinds: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return self.table(kinds) * steps.float()[:, None]  # type: ignore[no-any-return]


def test_numbers_that_choose_rows_of_a_table_are_below_their_number() -> None:
    """Whatever numbers were seen; of others nothing is known, and nothing is refused."""
    names = ("kinds", "steps")
    inputs = tuple(Input(name=n, dtype="int64", shape=("rows",), values="any<3") for n in names)
    face = CallSignature({"args": [{"tensor": 0}, {"tensor": 1}], "kwargs": {}}, inputs)
    found = exported(Looks(), face, {"rows": Range(1, 8)})
    assert [entry.values for entry in found.face.inputs] == ["ids<7", "any<3"]


class Joins(nn.Module):
    def forward(self, image: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> Any:
        joined = torch.cat((image, text))
        return joined * mask


PARTS = {"image": Range(2, 8), "text": Range(4, 9)}


def test_a_sum_that_was_inferred_is_kept() -> None:
    found = exported(
        Joins(), face_like(image=("image",), text=("text",), mask=("image+text",)), PARTS
    )
    assert shapes(found)["mask"] == ("image+text",)
    assert found.outputs.tensors[0].shape == ("image+text",)
    assert found.bounds == PARTS


def test_a_sum_that_torch_finds_appears_as_one() -> None:
    """Of two calls nobody can tell; the model's code does."""
    face = face_like(image=("image",), text=("text",), mask=("total",))
    found = exported(Joins(), face, PARTS | {"total": Range(6, 17)}, image=3, text=5, total=8)
    assert shapes(found)["mask"] == ("image+text",)
    assert found.outputs.tensors[0].shape == ("image+text",)
    assert found.bounds == PARTS


# What the model's code decides


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        doubled = x * 2
        return doubled + self.weight


@pytest.mark.parametrize("stated", [(), ("seq",)])
def test_a_dim_of_which_only_one_size_fits_is_named_with_the_line(stated: tuple[str, ...]) -> None:
    line = at(Fixed, "return doubled + self.weight")
    bounds = DIMS | {"seq": Range(24, 30)}
    with pytest.raises(BadDim) as caught:
        exported(Fixed(), ROWS, bounds, *stated)
    assert str(caught.value) == f"export: the model's code makes seq the constant 24, at {line}"
    assert "--dim seq=24:24" in caught.value.hint


class Eights(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        doubled = x * 2
        return doubled.view(x.shape[0], -1, 8).sum(1)


def test_a_stated_dim_that_must_be_a_multiple_is_named_with_line_and_remedy() -> None:
    with pytest.raises(BadDim) as caught:
        exported(Eights(), ROWS, DIMS, "seq")
    line = at(Eights, "return doubled.view(x.shape[0], -1, 8).sum(1)")
    assert str(caught.value) == f"export: seq must be a multiple of 8, at {line}"
    assert caught.value.hint == "say so: --dim seq=8:64:8"


def test_the_remedy_for_a_multiple_works() -> None:
    bounds = DIMS | {"seq": Range(8, 64, 8)}
    assert exported(Eights(), ROWS, bounds, "seq").bounds == bounds


def test_a_dim_that_nobody_stated_becomes_the_multiple() -> None:
    bounds = DIMS | {"seq": Range(8, 67)}
    found = exported(Eights(), ROWS, bounds, "batch")
    assert found.bounds == DIMS | {"seq": Range(8, 64, 8)}
    assert shapes(found) == {"x": ("batch", "seq")}


class Twice(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        both = torch.cat((x, x))
        return both + y


PAIR = face_like(x=("a",), y=("b",))
TWO = {"a": Range(2, 8), "b": Range(4, 16)}


@pytest.mark.parametrize("stated", [("b",), ("a", "b")])
def test_a_stated_dim_that_follows_from_another_is_named_with_line_and_remedy(
    stated: tuple[str, ...],
) -> None:
    with pytest.raises(BadDim) as caught:
        exported(Twice(), PAIR, TWO, *stated, a=3, b=6)
    line = at(Twice, "return both + y")
    assert str(caught.value) == f"export: b must always be 2*a, at {line}"
    assert '("2*a", …)' in caught.value.hint


@pytest.mark.parametrize("stated", [(), ("a",)])
def test_a_dim_that_nobody_stated_follows_from_the_other(stated: tuple[str, ...]) -> None:
    found = exported(Twice(), PAIR, TWO, *stated, a=3, b=6)
    assert shapes(found) == {"x": ("a",), "y": ("2*a",)}
    assert found.bounds == {"a": Range(2, 8)}
    assert found.outputs.tensors[0].shape == ("2*a",)


def test_the_remedy_for_a_dim_that_follows_works() -> None:
    face = face_like(x=("a",), y=("2*a",))
    assert shapes(exported(Twice(), face, {"a": Range(2, 8)}, "a")) == {"x": ("a",), "y": ("2*a",)}


class OneMore(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        longer = torch.cat((x, x[:, :1]), 1)
        return longer.view(x.shape[0], -1, 4).sum(1)


@pytest.mark.parametrize("stated", [(), ("seq",)])
def test_sizes_that_no_steps_say_are_told_with_the_line(stated: tuple[str, ...]) -> None:
    line = at(OneMore, "return longer.view(x.shape[0], -1, 4).sum(1)")
    with pytest.raises(BadDim) as caught:
        exported(OneMore(), ROWS, DIMS, *stated, seq=11)
    assert str(caught.value) == f"export: seq must be 4*n-1 for a whole n, at {line}"
    assert "--dim seq=N:N" in caught.value.hint


class Upto(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(40))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        return x + self.table[:length]  # type: ignore[index]


def test_a_stated_dim_that_goes_too_far_is_named_with_the_narrower_range() -> None:
    with pytest.raises(BadDim) as caught:
        exported(Upto(), ROWS, DIMS, "seq")
    line = at(Upto, "return x + self.table[:length]  # type: ignore[index]")
    assert str(caught.value) == f"export: the model does not take every seq of 8:64, at {line}"
    assert caught.value.hint == "narrow it: --dim seq=8:40"
    exported(Upto(), ROWS, DIMS | {"seq": Range(8, 40)}, "seq")


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 20:
            return x * 2
        return x


@pytest.mark.parametrize(("size", "narrow"), [(16, Range(8, 20)), (30, Range(21, 64))])
def test_a_dim_that_nobody_stated_keeps_to_the_side_of_a_branch(size: int, narrow: Range) -> None:
    assert exported(Branches(), ROWS, DIMS, seq=size).bounds["seq"] == narrow


# What cannot be traced


class LooksAtItsInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if int(x.sum()) > 3 else x


class Cuts(nn.Module):
    """Cuts a mask out of a table of 64 rows; what is the whole table, torch takes for another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(64, 64, dtype=torch.bool).tril())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(self.table[: x.shape[1], : x.shape[1]], x.unsqueeze(1), 0.0)


def test_a_stated_dim_that_reaches_a_whole_table_is_named_with_limit_line_and_remedy() -> None:
    with pytest.raises(BadDim) as caught:
        exported(Cuts(), ROWS, DIMS, "seq")
    code = "return torch.where(self.table[: x.shape[1], : x.shape[1]], x.unsqueeze(1), 0.0)"
    assert str(caught.value) == (
        "export: seq goes up to 64, and the model's code takes 63 at most: of 64 it would do "
        f"something else, at {at(Cuts, code)}"
    )
    assert caught.value.hint == "end it there: --dim seq=8:63"


def test_a_dim_that_nobody_stated_ends_before_the_whole_table() -> None:
    assert exported(Cuts(), ROWS, DIMS).bounds["seq"] == Range(8, 63)
    assert exported(Cuts(), ROWS, DIMS | {"seq": Range(8, 63)}, "seq").bounds["seq"].high == 63


def test_of_what_is_filled_the_dims_that_a_user_names_are_told() -> None:
    """`filled` is nobody's word: it ends with the cache, and so does what a call brings."""
    fixes = Fixes(guards={"filled": ("n != 64",)})
    names = ("seq", "filled", "cache")
    bounds = {name: Range(1, 64) for name in names}
    found = limit_by_guards(fixes, bounds)
    assert found.ranges == dict.fromkeys(names, (None, 63))
    with pytest.raises(BadDim, match="^export: cache goes up to 64, and .* 63 at most") as caught:
        refuse_beyond(fixes, bounds, frozenset({"cache"}), Lines())
    assert caught.value.hint == "end it there: --dim cache=1:63"


def test_a_model_that_branches_on_values_stays_eager() -> None:
    with pytest.raises(CompileFailed, match="export: ") as caught:
        exported(LooksAtItsInput(), ROWS, DIMS)
    assert "traced" in caught.value.hint
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


class AnswersASet(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return {x}


def test_an_answer_that_no_graph_gives_is_refused_as_that() -> None:
    with pytest.raises(CompileFailed, match="output is a builtins.set"):
        exported(AnswersASet(), ROWS, DIMS)


def test_the_module_is_as_it_was_after_success_and_failure() -> None:
    for module in (Answers(), LooksAtItsInput()):
        try:
            exported(module, ROWS, DIMS)
        except CompileFailed:
            assert isinstance(module, LooksAtItsInput)
        assert "forward" not in vars(module)


# Caches


class Block(nn.Module):
    """Attention over what is in the cache."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor, past_key_values: Any) -> torch.Tensor:
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        keys, values = past_key_values.update(heads, heads, 0)
        looked = nn.functional.scaled_dot_product_attention(heads, keys, values, attn_mask=mask)
        return looked.transpose(1, 2).flatten(2)


CACHED = add_cache_inputs(
    CallSignature(
        {
            "args": [{"tensor": 0}, {"tensor": 1}],
            "kwargs": {"past_key_values": {"cache": True}},
        },
        (
            Input(name="x", dtype="float32", shape=("batch", "seq", 8), values="real"),
            Input(name="mask", dtype="float32", shape=("batch", 1, "seq", "filled"), values="mask"),
        ),
    ),
    torch.empty(1, 2, 3, 4),
    torch.empty(1, 2, 3, 4),
)


def cached(face: CallSignature, bounds: DimRanges) -> Exported:
    sizes = choose_example_sizes(bounds)
    tensors = [
        torch.zeros(
            [n if isinstance(n, int) else DimExpr.parse(n).at(sizes) for n in entry.shape],
            dtype=getattr(torch, entry.dtype),
        )
        for entry in face.inputs
    ]
    return export(Block(), face, bounds, tensors, frozenset(bounds))


def written(found: Exported) -> set[str]:
    """The inputs that a program writes; torch tells once it has taken the writes apart."""
    with warnings.catch_warnings(action="ignore"):  # of torch about torch
        apart = found.program.run_decompositions({})
    return {*apart.graph_signature.user_inputs_to_mutate.values()}


def test_a_block_s_cache_is_written_in_place_and_is_no_output() -> None:
    bounds = {
        "batch": Range(1, 4),
        "seq": Range(1, 40),
        "filled": Range(1, 64),
        "cache": Range(16, 64),
    }
    found = cached(CACHED, bounds)
    assert found.bounds == bounds
    assert [o.shape for o in found.outputs.tensors] == [("batch", "seq", 8)]
    assert len(written(found)) == 2
    assert shapes(found)["keys"] == ("batch", 2, "cache", 4)


def test_a_full_window_is_written_in_place() -> None:
    found = cached(specialize_full_window(CACHED, 8), {"batch": Range(1, 4), "seq": Range(1, 40)})
    assert shapes(found)["mask"] == ("batch", 1, "seq", "seq+7")
    assert shapes(found)["keys"] == ("batch", 2, 8, 4)
    assert len(written(found)) == 2


@pytest.mark.parametrize("word", ["export", "export_program"])
def test_transformers_exporter_gives_its_program_by_either_of_its_words(word: str) -> None:
    """From 5.23 on `export` answers a model of components, and `export_program` the program."""
    program, asked = object(), []

    def traced(*given: object) -> object:
        asked.append(given)
        return program if word == "export" else (program, "metadata")

    fake = type("FakeExporter", (), {"export": lambda *_: "a model", word: staticmethod(traced)})()
    module, inputs, config = nn.Identity(), {"x": torch.ones(2)}, object()
    assert run_exporter(fake, module, inputs, config) is program
    assert asked == [(module, inputs, config)]
