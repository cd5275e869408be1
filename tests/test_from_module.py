"""A module from Python: compiled from its calls, or refused; in any case left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from opened import opened, unpacked
from torch import nn
from transformers import DynamicCache

import hubaoti
from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.schema import Graph as Entry
from hubaoti.compiler.capture import Calls
from hubaoti.compiler.from_module import make_source
from hubaoti.compiler.plan import Plan, make_plan
from hubaoti.compiler.request import CompileRequest, Range
from hubaoti.compiler.traced import choose_trace_sizes, name_constants_file
from hubaoti.errors import BadDim, BadRequest, CompileFailed, HubaotiError, OutOfBounds
from hubaoti.settings import Settings

CPU = torch.device("cpu")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Where this file's modules are compiled."""
    folder = tmp_path_factory.mktemp("live")
    return Settings(home=folder / "home", endpoint="http://127.0.0.1:9")


def calls_of(module: nn.Module, *given: tuple[tuple[Any, ...], dict[str, Any]]) -> Calls:
    """The recorded calls of a module with these arguments."""
    with hubaoti.capture(module) as calls, torch.no_grad():
        for args, kwargs in given:
            module(*args, **kwargs)
    return calls


def rows(*shapes: tuple[int, ...]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Calls with one tensor of each shape."""
    return [((torch.randn(shape),), {}) for shape in shapes]


class Everything(nn.Module):
    """Inputs by place and by name, one that it writes; a dictionary with None and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.factor = 2.0

    def forward(self, x: torch.Tensor, scale: float = 1.0, *, memory: torch.Tensor) -> Any:
        y = self.drop(self.linear(x)) * self.factor * scale
        memory.add_(y.sum(1))
        return {"y": y, "nothing": None, "sums": (y.sum((1, 2)),)}


def call_everything(batch: int, seq: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, memory = torch.randn(batch, seq, 8), torch.randn(batch, 8)
    return (x, 0.5), {"memory": memory}


class Doubled(nn.Module):
    """Its second input is twice as long as its first, whose length is a multiple of eight."""

    offset: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("offset", torch.arange(8.0))
        self.table = torch.arange(8.0).flip(0)  # a plain tensor, in no state_dict

    def forward(self, x: torch.Tensor, pairs: torch.Tensor) -> Any:
        batch, seq, width = x.shape
        eights = self.linear(x).view(batch, seq // 8, 8, width).sum(2)
        halves = self.linear(pairs).view(batch, seq, 2, width).sum(2)
        return x + halves + self.offset, eights * self.table


def state_of(module: nn.Module) -> Any:
    """All that a module is, to be compared."""
    tensors = {name: (id(t), t.clone()) for name, t in module.state_dict(keep_vars=True).items()}
    parts = [(part.training, {**vars(part)}) for part in module.modules()]
    return tensors, parts


def same_state(before: Any, after: Any) -> bool:
    """Whether a module is as it was."""
    (tensors, parts), (now, now_parts) = before, after
    same = tensors.keys() == now.keys() and all(
        tensors[name][0] == now[name][0] and torch.equal(tensors[name][1], now[name][1])
        for name in tensors
    )
    return same and all(
        mode == now_mode and own.keys() == now_own.keys() and all(own[n] is now_own[n] for n in own)
        for (mode, own), (now_mode, now_own) in zip(parts, now_parts, strict=True)
    )


# Compiled: three small graphs, of which two side by side


@pytest.fixture(scope="module")
def everything() -> Everything:
    """A module that is being trained, with a `forward` of its own put over the class's."""
    torch.manual_seed(3)
    module = Everything()
    module.linear.eval()
    return module


@pytest.fixture(scope="module")
def steps(everything: Everything, home: Settings) -> tuple[Bundle, bool]:
    """The module compiled from two sets of calls, and whether it was left as it was."""
    one = calls_of(everything, call_everything(1, 1), call_everything(3, 1))
    more = calls_of(everything, call_everything(1, 2), call_everything(3, 6))
    before = state_of(everything)
    folder = home.home.parent / "steps"
    bundle = hubaoti.compile(everything, folder, calls=[one, more], jobs=2, settings=home)
    return bundle, same_state(before, state_of(everything))


@pytest.fixture(scope="module")
def stepped(steps: tuple[Bundle, bool], home: Settings) -> dict[str, Path]:
    """The unpacked graphs."""
    return unpacked(steps[0], home.home.parent / "unpacked")


@pytest.fixture(scope="module")
def doubled() -> Doubled:
    torch.manual_seed(4)
    return Doubled().eval()


@pytest.fixture(scope="module")
def stated(doubled: Doubled, home: Settings) -> Bundle:
    """A module compiled from one call, whose sizes are named."""
    calls = calls_of(doubled, ((torch.randn(2, 16, 8), torch.randn(2, 32, 8)), {}))
    return hubaoti.compile(
        doubled,
        home.home.parent / "stated",
        calls=calls,
        shapes={"x": ("batch", "seq", None), "pairs": ("batch", "2*seq", None)},
        dims={"batch": (1, 4), "seq": (8, 64, 8)},
        settings=home,
    )


def test_a_module_is_as_it_was_after_it_was_compiled(
    steps: tuple[Bundle, bool], everything: Everything
) -> None:
    assert steps[1]
    assert everything.training and not everything.linear.training
    assert "forward" not in vars(everything)


def test_each_set_of_calls_has_a_graph_of_its_own(steps: tuple[Bundle, bool]) -> None:
    manifest = steps[0].manifest
    assert manifest.build.buckets == ({"x_1": (1, 1)}, {"x_1": (2, 6)})
    assert [graph.order for graph in manifest.graphs] == [0, 1]
    assert [graph.bounds for graph in manifest.graphs] == [
        {"x_0": (1, 3), "x_1": (1, 1)},
        {"x_0": (1, 3), "x_1": (2, 6)},
    ]
    assert len({graph.id for graph in manifest.graphs}) == 2
    assert all(graph.modules == ("",) for graph in manifest.graphs)


def test_inputs_have_the_names_and_dims_of_the_calls(steps: tuple[Bundle, bool]) -> None:
    graph = steps[0].manifest.graphs[1]
    assert [(item.name, item.shape, item.mutated) for item in graph.inputs] == [
        ("x", ("x_0", "x_1", 8), False),
        ("memory", ("x_0", 8), True),
    ]
    assert graph.call == {"args": [{"tensor": 0}, 0.5], "kwargs": {"memory": {"tensor": 1}}}


def test_the_template_of_an_answer_is_the_module_s(steps: tuple[Bundle, bool]) -> None:
    outputs = steps[0].manifest.graphs[1].outputs
    assert [(item.name, item.shape) for item in outputs.tensors] == [
        ("output_y", ("x_0", "x_1", 8)),
        ("output_sums_0", ("x_0",)),
    ]
    assert outputs.template == {
        "dict": {"y": {"tensor": 0}, "nothing": None, "sums": {"tuple": [{"tensor": 1}]}},
        "order": ["y", "nothing", "sums"],
    }


def test_an_artifact_is_named_by_what_was_compiled(steps: tuple[Bundle, bool]) -> None:
    manifest = steps[0].manifest
    steps[0].check()
    assert (manifest.program.task, manifest.source.model) == ("forward", "Everything")
    assert str(manifest.recipe) == "float32-native"


def serving(bundle: Bundle, **sizes: int) -> Entry:
    """The graph that serves these sizes: the first whose bounds hold them."""
    return next(
        graph
        for graph in bundle.manifest.graphs
        if all(low <= sizes[name] <= high for name, (low, high) in graph.bounds.items())
    )


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (3, 6), (2, 3)], ids=str)
def test_a_graph_answers_and_writes_what_the_module_does(
    sizes: tuple[int, int],
    steps: tuple[Bundle, bool],
    stepped: dict[str, Path],
    everything: Everything,
) -> None:
    """At recorded sizes and at others; with other weights than those it was compiled with."""
    other = copy.deepcopy(everything).eval()
    with torch.no_grad():
        other.linear.weight.add_(1)
    entry = serving(steps[0], x_0=sizes[0], x_1=sizes[1])
    graph = opened(steps[0], entry, stepped[entry.id], other)
    (x, scale), kwargs = call_everything(*sizes)
    memory = kwargs["memory"].clone()
    with torch.no_grad():
        expected = other(x, scale, **kwargs)
    y, sums = graph(x, memory)
    torch.testing.assert_close(y, expected["y"], **CLOSE)
    torch.testing.assert_close(sums, expected["sums"][0], **CLOSE)
    torch.testing.assert_close(memory, kwargs["memory"], **CLOSE)


def test_the_written_input_was_compared_too(steps: tuple[Bundle, bool]) -> None:
    """Its values stand in the golden answers, beside those of the two outputs."""
    for graph in steps[0].manifest.graphs:
        assert graph.golden is not None
        assert len(graph.golden.tolerances) == 3


def test_sizes_that_were_named_are_the_dims(stated: Bundle) -> None:
    (graph,) = stated.manifest.graphs
    assert (graph.bounds, graph.steps) == ({"batch": (1, 4), "seq": (8, 64)}, {"seq": 8})
    assert [item.shape for item in graph.inputs] == [
        ("batch", "seq", 8),
        ("batch", "2*seq", 8),
    ]
    assert stated.manifest.build.dims == {"batch": (1, 4, 1), "seq": (8, 64, 8)}
    assert all(check.dims["seq"] % 8 == 0 for check in stated.manifest.checks)


def test_a_dim_goes_in_its_steps_and_others_follow(
    stated: Bundle, doubled: Doubled, tmp_path: Path
) -> None:
    (entry,) = stated.manifest.graphs
    other = copy.deepcopy(doubled)
    with torch.no_grad():
        other.linear.bias.add_(1)
    graph = opened(stated, entry, unpacked(stated, tmp_path)[entry.id], other)
    for batch, seq in ((1, 16), (3, 40), (4, 64), (1, 8)):
        x, pairs = torch.randn(batch, seq, 8), torch.randn(batch, 2 * seq, 8)
        with torch.no_grad():
            expected = other(x, pairs)
        for ours, theirs in zip(graph(x, pairs), expected, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
    with pytest.raises(OutOfBounds, match="in steps of 8"):
        graph(torch.randn(1, 12, 8), torch.randn(1, 24, 8))
    with pytest.raises(HubaotiError, match=r"2\*seq"):
        graph(torch.randn(1, 16, 8), torch.randn(1, 31, 8))


# Refused, before anything is lowered


class Linear(nn.Module):
    """One layer over whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.count = 0
        self.kept: Any = None
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor, z: Any = None) -> Any:
        return self.linear(x) if z is None else self.linear(x) + z


class Counts(Linear):
    def forward(self, x: torch.Tensor, z: Any = None) -> Any:
        self.count += 1
        return self.linear(x) * self.count


class Sums(Linear):
    def forward(self, x: torch.Tensor, z: Any = None) -> Any:
        self.kept = self.linear(x).sum(0) + (0 if self.kept is None else self.kept)
        return x + self.kept


class Writes(Linear):
    def forward(self, x: torch.Tensor, z: Any = None) -> Any:
        self.seen.add_(x.mean(0))
        return self.linear(x) + self.seen


class Eights(Linear):
    def forward(self, x: torch.Tensor, z: Any = None) -> Any:
        eights = x.view(x.shape[0], x.shape[1] // 8, 8)
        return self.linear(eights).sum(1)


class Flattens(Linear):
    def forward(self, x: torch.Tensor, z: Any = None) -> Any:
        return self.linear(x).flatten(1) + z


class Prefers(Linear):
    def forward(self, x: torch.Tensor, z: Any = None) -> Any:
        if x.shape[0] == 3:
            return self.linear(x) + 1
        return self.linear(x)


class AnswersItself(Linear):
    def forward(self, x: torch.Tensor, z: Any = None) -> Any:
        return self.linear(x), self


class AnswersSizes(Linear):
    def forward(self, x: torch.Tensor, z: Any = None) -> Any:
        return self.linear(x), x.shape[0]


def line_of(kind: type, words: str) -> int:
    """The line of this file at which a class has these words."""
    lines = Path(__file__).read_text().splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith(f"class {kind.__name__}("))
    return next(at + 1 for at, line in enumerate(lines) if at > start and words in line)


@pytest.fixture
def nothing_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(*_: object) -> NoReturn:
        raise AssertionError("it was lowered")

    monkeypatch.setattr("hubaoti.compiler.graph_build.lower", lower)


NAMED = {"shapes": {"x": ("batch", "seq")}, "dims": {"batch": (1, 4), "seq": (8, 64)}}
WIDE = {"shapes": {"x": (None, "seq", None), "z": (None, "wide")}}
REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, Any, type[HubaotiError], str, str]] = {
    "a counter": (
        Counts,
        rows((2, 8), (5, 8)),
        {},
        CompileFailed,
        "source root: at x_0 = 2 the module changes its own .count",
        "stays eager",
    ),
    "what it keeps of one call for the next": (
        Sums,
        rows((2, 8), (5, 8)),
        {},
        CompileFailed,
        "source root: at x_0 = 2 the module changes its own .kept",
        "stays eager",
    ),
    "a buffer that it writes": (
        Writes,
        rows((2, 8), (5, 8)),
        {},
        CompileFailed,
        "source root: at x_0 = 2 the model writes to its own seen",
        "stays eager",
    ),
    "multiples of 8": (
        Eights,
        rows((2, 16)),
        NAMED,
        BadDim,
        "seq must be a multiple of 8, at test_from_module.py:"
        f"{line_of(Eights, 'view')}: eights = x.view(x.shape[0], x.shape[1] // 8, 8)",
        "--dim seq=8:64:8",
    ),
    "sizes that go together": (
        Flattens,
        [((torch.randn(2, 3, 8), torch.randn(2, 24)), {})],
        {**WIDE, "dims": {"seq": (1, 9), "wide": (8, 72)}},
        BadDim,
        f"wide must always be 8*seq, at test_from_module.py:{line_of(Flattens, 'flatten')}: return",
        '"8*seq"',
    ),
    "a dim of one size": (
        Prefers,
        rows((3, 8)),
        {"shapes": {"x": ("batch", None)}, "dims": {"batch": (1, 4)}},
        BadDim,
        "the model's code makes batch the constant 3, at test_from_module.py:"
        f"{line_of(Prefers, 'shape[0] == 3')}: if x.shape[0] == 3:",
        "--dim batch=3:3",
    ),
    "an answer that no graph gives": (
        AnswersItself,
        rows((2, 8), (5, 8)),
        {},
        CompileFailed,
        "AnswersItself",
        "answers tensors",
    ),
    "a size as an answer": (
        AnswersSizes,
        rows((2, 8), (5, 8)),
        {},
        CompileFailed,
        "output_1 is a torch.SymInt",
        "answers tensors",
    ),
    "a call that never came": (Linear, [], {}, BadRequest, "Linear was never called", "capture"),
    "calls of two structures": (
        Linear,
        [*rows((2, 8)), ((torch.randn(5, 8), torch.randn(5, 8)), {})],
        {},
        BadRequest,
        "different structures: x (float32 of 2 axes) and x (float32 of 2 axes), z (float32",
        "one structure",
    ),
    "a dim that no input has": (
        Linear,
        rows((2, 8), (5, 8)),
        {"dims": {"depth": (1, 2)}},
        BadDim,
        "'depth'",
        "its dims are: x_0",
    ),
    "no bounds for a dim that had one size": (
        Linear,
        rows((2, 8)),
        {"shapes": {"x": ("batch", None)}},
        BadDim,
        "batch is named, and only one size of it was seen",
        'dims={"batch": (1, 4096)}',
    ),
    "a bucket beyond the dims": (
        Linear,
        rows((2, 8), (5, 8)),
        {"buckets": [{"x_0": (1, 9)}]},
        BadDim,
        "x_0=1:9 is outside of the dim, x_0=2:5",
        "--dim",
    ),
    "an argument that is no tensor": (
        Linear,
        [((torch.randn(2, 8), torch.Generator()), {})],
        {},
        BadRequest,
        "z is a torch._C.Generator",
        "capture a module inside",
    ),
    "a kv cache": (
        Linear,
        [((torch.randn(2, 8), DynamicCache()), {})],
        {},
        BadRequest,
        "KV cache",
        "--task generate",
    ),
    "a dtype that is none of ours": (
        lambda: Linear().double(),
        [((torch.randn(2, 8).double(),), {})],
        {},
        BadRequest,
        "Linear computes in float64",
        "float32",
    ),
    "a place that is not there": (
        Linear,
        rows((2, 8), (5, 8)),
        {"regions": "liner"},
        BadRequest,
        "'liner'",
        "near: linear",
    ),
}


def recorded(module: nn.Module, given: Any) -> Calls:
    """The calls that a module was given; it is not run, so that it may be given anything."""
    with hubaoti.capture(module, n=len(given) or None, run=not given) as calls:
        for args, kwargs in given:
            module(*args, **kwargs)
    return calls


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compiled_is_refused_before_it_is_lowered(
    case: str, home: Settings, tmp_path: Path, nothing_is_lowered: None
) -> None:
    """With the reason and the remedy; nothing is left of it but, where it failed, a report."""
    make, given, asked, kind, message, hint = REFUSED[case]
    module = make()
    calls = recorded(module, given)
    before = state_of(module)
    with pytest.raises(HubaotiError) as caught:
        hubaoti.compile(module, tmp_path / "bundle", calls=calls, settings=home, **asked)
    assert type(caught.value) is kind, caught.value
    assert message in str(caught.value)
    assert hint in caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} <= {"bundle.report.txt"}
    assert same_state(before, state_of(module))


def test_a_module_without_calls_is_told_how_to_record_them(home: Settings) -> None:
    for calls in (None, [], [[]]):
        with pytest.raises(BadRequest, match="is called is not known|holds no calls") as caught:
            hubaoti.explain(Linear(), calls=calls, settings=home)
        assert "hubaoti.capture" in caught.value.hint


def test_a_gap_between_sets_of_calls_is_named(home: Settings) -> None:
    module = Linear()
    one, more = calls_of(module, *rows((1, 8))), calls_of(module, *rows((4, 8), (9, 8)))
    with pytest.raises(BadDim, match="(?m)no bucket serves x_0=2:3$") as caught:
        hubaoti.explain(module, calls=[one, more], settings=home)
    assert "add a bucket x_0=2:3" in caught.value.hint
    buckets = [{"x_0": (1, 1)}, {"x_0": (2, 9)}]
    found = hubaoti.explain(module, calls=[one, more], buckets=buckets, settings=home)
    assert [graph["dims"] for graph in found.graphs] == [{"x_0": "1:1"}, {"x_0": "2:9"}]


class Packed(nn.Module):
    """A layer as of a quantizer's package, whose op torch can only run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Linear(8, 8)
        self.register_buffer("qweight", torch.ones(8, 8, dtype=torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.hubaoti_tests.packed_product(self.norm(x), self.qweight)
        return self.scale(product)  # type: ignore[no-any-return]


@pytest.mark.parametrize("regions", ["auto", "none"])
def test_an_op_without_a_fake_is_refused_by_its_name(
    regions: str, home: Settings, tmp_path: Path
) -> None:
    library = torch.library.Library("hubaoti_tests", "FRAGMENT")
    library.define("packed_product(Tensor x, Tensor weight) -> Tensor")
    library.impl("packed_product", lambda x, weight: x @ weight.float(), "CPU")
    module = nn.Sequential(Packed(), Packed()).eval()
    calls = calls_of(module, *rows((2, 8), (5, 8)))
    with pytest.raises(CompileFailed, match=r"hubaoti_tests\.packed_product") as caught:
        hubaoti.compile(module, tmp_path / "x", calls=calls, regions=regions, settings=home)
    assert "register_fake" in caught.value.hint
    library._destroy()


# Planned only


def shapes_of(found: Any) -> dict[str, list[Any]]:
    """The inputs of the only graph."""
    (graph,) = found.graphs
    shapes: dict[str, list[Any]] = graph["inputs"]
    return shapes


def test_one_call_without_names_has_its_own_sizes(home: Settings) -> None:
    module = Linear()
    found = hubaoti.explain(module, calls=calls_of(module, *rows((2, 8))), settings=home)
    assert (shapes_of(found), found.dims) == ({"x": [2, 8]}, {})


def test_calls_recorded_in_inference_mode_are_as_good(home: Settings) -> None:
    module = Linear()
    with hubaoti.capture(module) as calls, torch.inference_mode():
        for size in (2, 5):
            module(torch.randn(size, 8))
    found = hubaoti.explain(module, calls=calls, settings=home)
    assert found.dims == {"x_0": "2:5"}


def test_bounds_that_are_asked_for_are_wider_than_what_was_seen(home: Settings) -> None:
    module = Linear()
    calls = calls_of(module, *rows((2, 8), (5, 8)))
    found = hubaoti.explain(module, calls=calls, dims={"x_0": (1, 64)}, settings=home)
    assert found.dims == {"x_0": "1:64"}


def test_calls_may_come_as_a_list(home: Settings) -> None:
    module = Linear()
    calls = calls_of(module, *rows((2, 8), (5, 8)))
    keys = {hubaoti.explain(module, calls=each, settings=home).key for each in (calls, [*calls])}
    assert len(keys) == 1


class Block(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


class Remembers(Block):
    """A block that keeps tables of what it computed, as some rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, torch.Tensor] = {}
        self.last: torch.Tensor | None = None
        self.register_buffer("longest", torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seq = x.shape[1]
        if seq not in self.tables:
            self.tables[seq] = torch.arange(float(seq))
        if seq > self.longest.numel():
            self.register_buffer("longest", torch.arange(float(seq)))
        self.last = self.tables[seq][:, None] + self.longest[:seq, None]
        return super().forward(x) * self.last


class Stack(nn.Module):
    """A model of equal blocks."""

    def __init__(self, kind: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_equal_blocks_are_one_graph_by_default(home: Settings) -> None:
    stack = Stack()
    calls = calls_of(stack, *rows((1, 3, 8), (2, 5, 8)))
    found = hubaoti.explain(stack, calls=calls, settings=home)
    (graph,) = found.graphs
    assert (found.regions, graph["id"]) == ("auto", "blocks")
    assert graph["modules"] == ["blocks.0", "blocks.1", "blocks.2"]
    assert graph["inputs"] == {"x": ["x_0", "x_1", 8]}


def test_equal_blocks_that_keep_tables_are_one_graph(home: Settings) -> None:
    stack = Stack(Remembers)
    calls = calls_of(stack, *rows((1, 3, 8), (2, 5, 8)))
    assert len(hubaoti.explain(stack, calls=calls, settings=home).graphs) == 1


def planned(module: nn.Module, calls: Calls, shapes: Any, request: CompileRequest) -> Plan:
    """The plan of a module."""
    source, buckets = make_source(module, replace(request, calls=[calls], shapes=shapes))
    return make_plan(source, replace(request, buckets=request.buckets or buckets), CPU)


def test_graphs_of_a_whole_module_have_files_of_their_own(doubled: Doubled) -> None:
    given = (((torch.randn(n, 8, 8), torch.randn(n, 16, 8)), {}) for n in (1, 3))
    buckets = ({"x_0": Range(1, 1)}, {"x_0": Range(2, 3)})
    found = planned(doubled, calls_of(doubled, *given), {}, CompileRequest(buckets=buckets))
    assert len({name_constants_file(unit) for unit in found.units}) == len(found.units) == 2


def test_a_dim_is_traced_at_one_of_its_steps(doubled: Doubled) -> None:
    calls = calls_of(doubled, ((torch.randn(1, 16, 8), torch.randn(1, 32, 8)), {}))
    dims = {"batch": Range(1, 4), "seq": Range(8, 64, 8)}
    shapes = {"x": ("batch", "seq", None), "pairs": ("batch", "2*seq", None)}
    found = planned(doubled, calls, shapes, CompileRequest(dims=dims))
    assert choose_trace_sizes(found.source, found.units[0])["seq"] % 8 == 0


@pytest.mark.parametrize("run", [True, False])
def test_a_module_answers_after_it_was_planned_as_it_did_before(run: bool, home: Settings) -> None:
    """What it keeps of a run without storage has no values, and is not there afterwards."""
    stack = Stack(Remembers)
    fresh = copy.deepcopy(stack)
    given = rows((2, 5, 8), (1, 3, 8))
    with hubaoti.capture(stack, n=2, run=run) as calls, torch.no_grad():
        for args, _ in given:
            stack(*args)
    before = state_of(stack)
    hubaoti.explain(stack, calls=calls, settings=home)
    assert same_state(before, state_of(stack))
    for args, _ in given:
        with torch.no_grad():
            assert torch.equal(stack(*args), fresh(*args))


def test_what_is_no_module_is_told_so(home: Settings, tmp_path: Path) -> None:
    """As a whole pipeline is."""
    pipeline: Any = type("Pipeline", (), {"transformer": Linear()})()
    for verb in (hubaoti.compile, hubaoti.explain):
        with pytest.raises(BadRequest, match="a Pipeline is neither") as caught:
            verb(pipeline, tmp_path / "bundle", settings=home)
        assert "pipe.transformer" in caught.value.hint
