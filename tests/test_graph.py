"""Graph: nothing unchecked reaches native code, and what is bound is used as it lies there."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from hubaoti.artifact.bundle import Bundle
from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.artifact.package import unpack_all
from hubaoti.artifact.schema import Cache, Input, Outputs
from hubaoti.artifact.schema import Graph as Entry
from hubaoti.errors import (
    BadInput,
    BadRequest,
    CannotOpen,
    DigestMismatch,
    HubaotiError,
    MissingConstant,
    MissingOps,
    NotEnoughMemory,
    OutOfBounds,
)
from hubaoti.runtime.container import Container
from hubaoti.runtime.graph import (
    Graph,
    choose_graph_device,
    explain_refusal,
    open_graph,
)
from hubaoti.runtime.input_checks import fit_to_slot
from hubaoti.runtime.library import Library
from hubaoti.runtime.runners import OnDevice, open_native_runner, open_public_runner
from hubaoti.runtime.weights import Checkpoint, load_constants

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def entry(roberta_bundle: Bundle) -> Entry:
    return roberta_bundle.manifest.graphs[0]


@pytest.fixture(scope="module")
def values(roberta_bundle: Bundle, entry: Entry, tiny_roberta: Path) -> dict[str, torch.Tensor]:
    """The graph's constants, from the model's checkpoint."""
    return load_constants(entry, roberta_bundle.path, Checkpoint(tiny_roberta, CPU), CPU)


@pytest.fixture(scope="module")
def graph(roberta_unpacked: Path, entry: Entry, values: dict[str, torch.Tensor]) -> Graph:
    """The tiny classifier, ready to be called."""
    opened = open_graph(roberta_unpacked, entry, CPU)
    opened.bind(values)
    return opened


def inputs(batch: int = 3, seq: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(5, 5 + batch * seq).view(batch, seq)
    mask = torch.ones(batch, seq, dtype=torch.int64)
    mask[1:, seq - 2 :] = 0
    return ids, mask


def expected(tiny_roberta: Path, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    import transformers

    model = transformers.RobertaForSequenceClassification.from_pretrained(tiny_roberta).eval()
    with torch.no_grad():
        return model(ids, mask).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("batch", "seq"), [(1, 2), (3, 7), (32, 2), (1, 64), (5, 33)])
def test_it_answers_as_eager_with_the_checkpoint_s_weights(
    batch: int, seq: int, graph: Graph, tiny_roberta: Path
) -> None:
    ids, mask = inputs(batch, seq)
    (found,) = graph(ids, mask)
    torch.testing.assert_close(found, expected(tiny_roberta, ids, mask), atol=1e-5, rtol=0)


def test_constants_are_bound_by_reference(
    roberta_unpacked: Path, entry: Entry, values: dict[str, torch.Tensor]
) -> None:
    mine = {name: tensor.clone() for name, tensor in values.items()}
    graph = open_graph(roberta_unpacked, entry, CPU)
    graph.bind(mine)
    before = graph(*inputs())[0].clone()
    mine["classifier.out_proj.bias"] += 1
    torch.testing.assert_close(graph(*inputs())[0], before + 1)


def test_constants_outlive_the_names_that_they_were_bound_by(
    roberta_unpacked: Path, entry: Entry, values: dict[str, torch.Tensor], graph: Graph
) -> None:
    other = open_graph(roberta_unpacked, entry, CPU)
    other.bind({name: tensor.clone() for name, tensor in values.items()})
    ballast = [torch.full((1000,), float("nan")) for _ in range(100)]
    assert torch.equal(other(*inputs())[0], graph(*inputs())[0])
    del ballast


def test_two_graphs_of_one_library_keep_their_own_constants(
    roberta_unpacked: Path, entry: Entry, values: dict[str, torch.Tensor], graph: Graph
) -> None:
    before = graph(*inputs())[0].clone()
    other = open_graph(roberta_unpacked, entry, CPU)
    other.bind({name: torch.zeros_like(tensor) for name, tensor in values.items()})
    assert not other(*inputs())[0].any()
    assert torch.equal(graph(*inputs())[0], before)


def test_the_public_loader_gives_the_same_numbers(
    roberta_unpacked: Path,
    entry: Entry,
    values: dict[str, torch.Tensor],
    graph: Graph,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._C import _aoti

    monkeypatch.delattr(_aoti, "AOTIModelContainerRunnerCpu")
    public = open_graph(roberta_unpacked, entry, CPU)
    assert type(public._runner).__name__ == "PublicRunner"
    with pytest.raises(BadInput, match="no constants yet"):
        public(*inputs())
    assert public.read_constant_fqns() == graph.read_constant_fqns()
    public.bind(values)
    assert torch.equal(public(*inputs())[0], graph(*inputs())[0])


def test_short_calls_are_torch_s_runner_s_and_long_ones_the_library_s_own(
    roberta_unpacked: Path,
    entry: Entry,
    values: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    native = Container.run
    monkeypatch.setattr(
        Container, "run", lambda self, given: asked.append("") or native(self, given)
    )
    graph = open_graph(roberta_unpacked, entry, CPU)
    graph.bind(values)
    given = [*inputs()]
    short, long = graph.run(given, small=True), graph.run(given, small=False)
    assert torch.equal(short[0], long[0]) and len(asked) == 1
    twice = {name: value * 2 for name, value in values.items()}
    graph.bind(twice)  # both read the new ones
    short, long = graph.run(given, small=True), graph.run(given, small=False)
    assert torch.equal(short[0], long[0]) and len(asked) == 2


def test_a_torch_without_the_private_module_takes_the_public_way(
    roberta_unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch._C._aoti", None)
    monkeypatch.delattr(torch._C, "_aoti")
    with monkeypatch.context() as inner:
        inner.setattr("hubaoti.runtime.runners.open_public_runner", lambda *_: "the public one")
        (library,) = roberta_unpacked.rglob("*.wrapper.so")
        found: Any = open_native_runner(roberta_unpacked, Library.at(library), CPU)
        assert found == "the public one"
    assert open_public_runner is not None


@pytest.mark.parametrize(("current", "switched"), [(1, []), (0, [1, 0])])
def test_a_gpu_s_runner_is_called_with_its_gpu_as_the_current_one(
    current: int, switched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: the runner stands for torch's, which asks for the current device's stream."""
    now, moves = [current], []

    class Device:
        def __init__(self, index: int) -> None:
            self.index, self.before = index, now[0]

        def __enter__(self) -> None:
            moves.append(self.index)
            now[0] = self.index

        def __exit__(self, *_: object) -> None:
            moves.append(self.before)
            now[0] = self.before

    class Native:
        def run(self, inputs: list[int]) -> list[int]:
            if now != [1]:
                raise RuntimeError("another device's stream")
            return inputs

        def get_call_spec(self) -> list[str]:
            return ["of the runner within"]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    container: Any = object.__new__(Container)
    container._device, container._given = torch.device("cuda", 1), [None]
    monkeypatch.setattr(container, "_run_in_current_stream", Native().run)
    assert container.run([3]) == [3]
    assert (now, moves) == ([current], switched), "a library's own interface goes the same way"
    moves.clear()
    runner: Any = OnDevice(Native(), torch.device("cuda", 1))  # type: ignore[arg-type]
    assert runner.run([3]) == [3]
    assert (now, moves) == ([current], switched)
    assert runner.get_call_spec() == ["of the runner within"]
    assert not hasattr(runner, "get_constant_names_to_dtypes")


def test_a_gpu_s_library_with_ops_of_torch_s_executor_is_such_a_runner(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._C import _aoti

    (tmp_path / "x.wrapper.json").touch()
    made = lambda *given: given  # noqa: E731
    monkeypatch.setattr(_aoti, "AOTIModelContainerRunnerCuda", made, raising=False)
    library = tmp_path / "x.wrapper.so"
    runner: Any = open_native_runner(tmp_path, Library.at(library), torch.device("cuda", 1))
    assert isinstance(runner, OnDevice)
    assert runner._runner == (f"{library}", 1, "cuda:1", f"{tmp_path}", True)


def test_a_runner_of_a_gpu_is_called_by_one_thread_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside, most = [0], [0]

    class Native:
        def run(self, inputs: list[int]) -> list[int]:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.01)  # as an op in Python, which lets other threads go on
            inside[0] -= 1
            return inputs

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    runner: Any = OnDevice(Native(), torch.device("cuda", 0))  # type: ignore[arg-type]
    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(runner.run, [[n] for n in range(8)])] == [[n] for n in range(8)]
    assert most == [1]


def test_a_graph_without_constants_is_not_called(roberta_unpacked: Path, entry: Entry) -> None:
    with pytest.raises(BadInput, match="no constants yet") as caught:
        open_graph(roberta_unpacked, entry, CPU)(*inputs())
    assert caught.value.hint


Change = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]
REFUSED: dict[str, tuple[Change, type[Exception], str]] = {
    "too few": (lambda i, m: (i,), BadInput, "takes 2 inputs, got 1"),
    "too many": (lambda i, m: (i, m, m), BadInput, "takes 2 inputs, got 3"),
    "int32 ids": (lambda i, m: (i.int(), m), BadInput, "input_ids is a int32"),
    "float mask": (lambda i, m: (i, m.float()), BadInput, "attention_mask is a float32"),
    "bool mask": (lambda i, m: (i, m.bool()), BadInput, "attention_mask is a bool"),
    "one axis": (lambda i, m: (i[0], m), BadInput, "of 1 axes"),
    "three axes": (lambda i, m: (i[None], m), BadInput, "of 3 axes"),
    "another device": (lambda i, m: (i.to("meta"), m), BadInput, "on meta"),
    "sparse": (lambda i, m: (i.to_sparse(), m), BadInput, "input_ids is"),
    "seq too long": (lambda i, m: inputs(1, 65), OutOfBounds, "seq is 65; .* takes 2 to 64"),
    "seq too short": (lambda i, m: inputs(1, 1), OutOfBounds, "seq is 1;"),
    "no row": (lambda i, m: (i[:0], m[:0]), OutOfBounds, "batch is 0;"),
    "batch too large": (lambda i, m: inputs(33, 2), OutOfBounds, "batch is 33;"),
    "two batches": (lambda i, m: (i, m[:2]), BadInput, "another input has"),
    "two seqs": (lambda i, m: (i, m[:, :5]), BadInput, "another input has"),
    "an id above": (lambda i, m: (i + 30522, m), BadInput, "index out of bounds"),
    "an id below": (lambda i, m: (i - 30522, m), BadInput, "index out of bounds"),
}


# Of a value that native code refuses on another thread, the process dies.


@pytest.mark.parametrize("case", REFUSED)
def test_an_input_that_the_graph_was_not_compiled_for_is_refused(case: str, graph: Graph) -> None:
    change, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words) as caught:
        graph(*change(*inputs()))
    assert caught.value.hint  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value)
    assert len(graph(*inputs())) == 1, "the graph answers no more"


def test_a_size_that_is_fixed_is_compared(graph: Graph) -> None:
    fixed = [
        msgspec.structs.replace(item, shape=(3, "seq")) if item.name == "input_ids" else item
        for item in graph.entry.inputs
    ]
    entry = msgspec.structs.replace(graph.entry, inputs=tuple(fixed))
    strict = Graph(entry, graph._runner, CPU)
    strict._ready = True
    assert torch.equal(strict(*inputs(3))[0], graph(*inputs(3))[0])
    with pytest.raises(BadInput, match="size 2 on axis 0, not 3"):
        strict(*inputs(2))


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """Equal values, every second place in memory."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), -1, dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """Equal values, the axes the other way round in memory."""
    return tensor.t().contiguous().t()


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """Equal values, four bytes off the multiple of eight."""
    raw = torch.zeros(tensor.numel() * 8 + 8, dtype=torch.uint8)
    offset = 4 if raw.data_ptr() % 8 == 0 else 0
    part = raw[offset : offset + tensor.numel() * 8]
    part.copy_(tensor.contiguous().view(-1).view(torch.uint8))
    with_address = torch.frombuffer(
        memoryview(raw.numpy())[offset : offset + tensor.numel() * 8], dtype=tensor.dtype
    )
    return with_address.view(tensor.shape)


@pytest.mark.parametrize("layout", [strided, transposed, shifted])
def test_an_input_that_is_only_read_is_copied_where_it_lies_otherwise(
    layout: Callable[[torch.Tensor], torch.Tensor], graph: Graph
) -> None:
    ids, mask = inputs()
    odd = layout(ids)
    assert torch.equal(odd, ids)
    assert not odd.is_contiguous() or odd.data_ptr() % 8
    assert torch.equal(graph(odd, layout(mask))[0], graph(ids, mask)[0])


@pytest.mark.parametrize("layout", [strided, transposed, shifted])
def test_an_input_that_the_graph_writes_is_refused_where_it_lies_otherwise(
    layout: Callable[[torch.Tensor], torch.Tensor], graph: Graph
) -> None:
    written = tuple(msgspec.structs.replace(item, mutated=True) for item in graph.entry.inputs)
    entry = msgspec.structs.replace(graph.entry, inputs=written)
    writing = Graph(entry, graph._runner, CPU)
    writing._ready = True
    ids, mask = inputs()
    with pytest.raises(BadInput, match="is written by the graph"):
        writing(layout(ids), mask)
    assert fit_to_slot(writing.checks.slots[0], ids) is ids


Wrong = Callable[[torch.Tensor], Any]
WRONG: dict[str, Wrong] = {
    "dtype": lambda t: t.double(),
    "shape": lambda t: t[:-1].clone(),
    "stride": lambda t: t.t().contiguous().t(),
    "device": lambda t: t.to("meta"),
    "alignment": lambda t: torch.frombuffer(
        memoryview(bytearray(t.numel() * 4 + 8))[1 : 1 + t.numel() * 4], dtype=torch.float32
    ).view(t.shape),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_constant_that_the_graph_was_not_compiled_for_is_refused(
    wrong: str, roberta_unpacked: Path, entry: Entry, values: dict[str, torch.Tensor]
) -> None:
    name = "classifier.dense.weight"
    opened = open_graph(roberta_unpacked, entry, CPU)
    with pytest.raises(MissingConstant, match=name) as caught:
        opened.bind(values | {name: WRONG[wrong](values[name])})
    assert caught.value.hint
    with pytest.raises(BadInput, match="no constants yet"):
        opened(*inputs())


def test_a_constant_that_is_not_given_is_named(
    roberta_unpacked: Path, entry: Entry, values: dict[str, torch.Tensor]
) -> None:
    name = "classifier.dense.weight"
    opened = open_graph(roberta_unpacked, entry, CPU)
    with pytest.raises(MissingConstant, match=f"{name}, which is not given"):
        opened.bind({key: value for key, value in values.items() if key != name})


def test_a_constant_that_the_manifest_does_not_list_is_named(
    roberta_unpacked: Path, entry: Entry, values: dict[str, torch.Tensor]
) -> None:
    fewer = msgspec.structs.replace(entry, constants=entry.constants[1:])
    with pytest.raises(MissingConstant, match="not in its manifest"):
        open_graph(roberta_unpacked, fewer, CPU).bind(values)


@pytest.mark.parametrize(
    ("target", "asked", "found"),
    [
        ("cpu", None, "cpu"),
        ("cpu", "cpu:0", "cpu"),
        ("cuda", None, "cuda:0"),
        ("cuda", "cuda", "cuda:0"),
        ("cuda", "cuda:3", "cuda:3"),
    ],
)
def test_a_device_is_named_as_its_tensors_name_it(target: str, asked: str, found: str) -> None:
    assert str(choose_graph_device(target, asked)) == found


@pytest.mark.parametrize("asked", ["cuda:0", "meta", "toaster"])
def test_a_device_that_the_graph_was_not_built_for_is_refused(asked: str) -> None:
    with pytest.raises(BadRequest, match=asked) as caught:
        choose_graph_device("cpu", asked)
    assert caught.value.hint == "ask for cpu"


@pytest.mark.parametrize("count", [0, 2])
def test_a_package_has_one_library(count: int, entry: Entry, tmp_path: Path) -> None:
    (one,) = [member for member in entry.members if member.path.endswith(".wrapper.so")]
    listed = msgspec.structs.replace(entry, members=(one,) * count)
    with pytest.raises(CannotOpen, match=f"has {count} libraries"):
        open_graph(tmp_path, listed, CPU)


def _replace_library(entry: Entry, content: bytes) -> Entry:
    """An entry of another package, of whose library these are the bytes."""
    sha256 = hashlib.sha256(content).hexdigest()
    members = tuple(
        msgspec.structs.replace(each, sha256=sha256) if each.path.endswith(".wrapper.so") else each
        for each in entry.members
    )
    return msgspec.structs.replace(entry, members=members, sha256=sha256)


def test_a_library_that_is_none_is_refused_in_one_line(entry: Entry, tmp_path: Path) -> None:
    (one,) = [member for member in entry.members if member.path.endswith(".wrapper.so")]
    library = tmp_path / one.path
    library.parent.mkdir(parents=True)
    content = b"no ELF file at all"
    library.write_bytes(content)
    with pytest.raises(DigestMismatch, match="other bytes"):
        open_graph(tmp_path, _replace_library(entry, b"another"), CPU)
    with pytest.raises(CannotOpen, match=f"cannot be opened: .*{one.path}") as caught:
        open_graph(tmp_path, _replace_library(entry, content), CPU)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_a_dtype_that_this_torch_does_not_have_is_refused(graph: Graph) -> None:
    odd = tuple(msgspec.structs.replace(item, dtype="float3") for item in graph.entry.inputs)
    with pytest.raises(BadInput, match="no dtype float3"):
        Graph(msgspec.structs.replace(graph.entry, inputs=odd), graph._runner, CPU)


def test_where_memory_is_limited_a_disk_that_allows_code_is_not_to_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "a.so: failed to map segment from shared object"
    monkeypatch.setattr("hubaoti.runtime.graph.is_limited", lambda: True)
    assert type(explain_refusal("root", tmp_path, why)) is NotEnoughMemory
    monkeypatch.setattr("hubaoti.runtime.graph.allows_code", lambda folder: False)
    assert type(explain_refusal("root", tmp_path, why)) is CannotOpen


@pytest.mark.parametrize(
    ("why", "kind", "word"),
    [
        ("Could not find schema for acme::attend", MissingOps, "acme::attend"),
        ("a.so: failed to map segment from shared object", CannotOpen, "does not allow code"),
        ("a.so: failed to map segment: Cannot allocate memory", NotEnoughMemory, "allocate"),
        ("std::bad_alloc", NotEnoughMemory, "bad_alloc"),
        ("libcudart.so.13: cannot open shared object file", CannotOpen, "libcudart"),
        ("\nodd\nmore", CannotOpen, "odd"),
    ],
)
def test_what_the_system_refuses_is_told_with_what_to_do(
    why: str, kind: type[HubaotiError], word: str
) -> None:
    error = explain_refusal("root", Path("/mirror"), why)
    assert type(error) is kind
    assert word in str(error)
    assert error.hint


# Sizes that follow from dims


class FakeRunner:
    """Stands for native code: counts how often it is reached."""

    def __init__(self) -> None:
        self.reached = 0

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        self.reached += 1
        return [inputs[0]]

    def get_constant_names_to_original_fqns(self) -> dict[str, str]:
        return {}

    def update_constant_buffer(self, *_: object) -> None:
        raise AssertionError("this graph has no constants")


def shaped(*shapes: tuple[int | str, ...], **fields: Any) -> tuple[Graph, FakeRunner]:
    """A graph of float inputs of these shapes, over dims of 1 to 9."""
    inputs = tuple(
        Input(name=f"x{at}", dtype="float32", shape=shape, values="real")
        for at, shape in enumerate(shapes)
    )
    dims = sorted(
        {d for s in shapes for n in s if isinstance(n, str) for d in DimExpr.parse(n).dims}
    )
    entry = Entry(
        id="layers",
        file="graphs/layers.pt2",
        sha256="0" * 64,
        size=0,
        members=(),
        modules=("",),
        bounds={dim: (1, 9) for dim in dims},
        call={"args": [], "kwargs": {}},
        inputs=inputs,
        outputs=Outputs(template=None, tensors=()),
        constants=(),
    )
    runner = FakeRunner()
    return Graph(msgspec.structs.replace(entry, **fields), runner, CPU), runner


FOLLOWS: dict[str, tuple[list[tuple[int | str, ...]], list[tuple[int, ...]]]] = {
    "a multiple": ([("batch", 2), ("4*batch", 2)], [(3, 2), (12, 2)]),
    "a multiple that comes first": ([("4*batch", 2), ("batch", 2)], [(12, 2), (3, 2)]),
    "a number more": ([("seq",), ("seq+7",)], [(5,), (12,)]),
    "a number less": ([("seq",), ("2*seq-1",)], [(5,), (9,)]),
    "a sum": ([("image",), ("text",), ("image+text",)], [(4,), (5,), (9,)]),
    "a sum that comes first": ([("image+text",), ("image",), ("text",)], [(9,), (4,), (5,)]),
    "a dim that stands alone nowhere": ([("4*batch", "seq+7")], [(12, 8)]),
}


@pytest.mark.parametrize("case", FOLLOWS)
def test_a_size_that_follows_from_the_dims_is_taken(case: str) -> None:
    shapes, sizes = FOLLOWS[case]
    graph, runner = shaped(*shapes)
    graph(*(torch.zeros(size) for size in sizes))
    assert runner.reached == 1


@pytest.mark.parametrize("case", FOLLOWS)
@pytest.mark.parametrize("more", [-1, 1])
def test_a_size_that_does_not_follow_never_reaches_native_code(case: str, more: int) -> None:
    """Each size of each input in turn is one off."""
    shapes, sizes = FOLLOWS[case]
    graph, runner = shaped(*shapes)
    for at, size in enumerate(sizes):
        for axis in range(len(size)):
            if shapes[at][axis] == "seq+7" and case == "a dim that stands alone nowhere":
                continue  # any number from 8 to 16 is one
            wrong = [[*each] for each in sizes]
            wrong[at][axis] += more
            with pytest.raises((BadInput, OutOfBounds)) as caught:
                graph(*(torch.zeros(each) for each in wrong))
            assert caught.value.hint
    assert runner.reached == 0


def test_what_a_size_does_not_follow_from_is_told() -> None:
    graph, _ = shaped(("batch", 2), ("4*batch", 2))
    with pytest.raises(BadInput, match=r"x1 has size 13 on axis 0, which is not 4\*batch"):
        graph(torch.zeros(3, 2), torch.zeros(13, 2))
    alone, _ = shaped(("4*batch",))
    with pytest.raises(BadInput, match=r"size 13 on axis 0, which is not 4\*batch"):
        alone(torch.zeros(13))
    with pytest.raises(OutOfBounds, match="batch is 10; graph layers takes 1 to 9"):
        alone(torch.zeros(40))


def test_a_dim_keeps_to_its_steps() -> None:
    graph, runner = shaped(("seq",), ("seq+1",), bounds={"seq": (8, 64)}, steps={"seq": 8})
    graph(torch.zeros(16), torch.zeros(17))
    for size in (12, 15, 17):
        with pytest.raises(OutOfBounds, match="takes 8 to 64 in steps of 8") as caught:
            graph(torch.zeros(size), torch.zeros(size + 1))
        assert caught.value.hint
    assert runner.reached == 1


def test_more_than_a_cache_holds_never_reaches_native_code() -> None:
    shapes = [("batch", "filled"), ("batch", "cache"), ("batch", "cache")]
    cache = Cache(kind="static", keys=1, values=2)
    graph, runner = shaped(*shapes, cache=cache)
    held = [torch.zeros(2, 5), torch.zeros(2, 5)]
    graph(torch.zeros(2, 5), *held)
    with pytest.raises(OutOfBounds, match="filled is 6, the cache holds 5") as caught:
        graph(torch.zeros(2, 6), *held)
    assert caught.value.hint
    assert runner.reached == 1


def test_a_graph_that_was_released_stays_shut_however_often(
    roberta_bundle: Bundle, roberta_unpacked: Path
) -> None:
    """Native code would read what is not there, and end the process."""
    entry = roberta_bundle.manifest.graphs[0]
    graph = open_graph(roberta_unpacked, entry, torch.device("cpu"))
    for _ in range(2):
        graph.release()
        with pytest.raises(BadInput, match="no constants yet"):
            graph.run([torch.zeros(1, 2, dtype=torch.int64)] * 2, small=True)


def test_a_library_that_is_loaded_is_used_again_wherever_its_package_lies(
    roberta_bundle: Bundle, entry: Entry, graph: Graph, tmp_path: Path
) -> None:
    """Else each opening from another folder maps it once more, for ever."""

    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(".wrapper.so")

    before = maps()
    for turn in range(20):
        folder = tmp_path / f"{turn}"
        unpack_all(roberta_bundle.path / entry.file, folder)
        assert open_graph(folder, entry, CPU).read_constant_fqns() == graph.read_constant_fqns()
    assert maps() == before


def test_what_is_loaded_is_the_file_that_was_hashed_whoever_has_its_name_by_then(
    roberta_bundle: Bundle, entry: Entry, tmp_path: Path
) -> None:
    code = """
        import os, sys
        from pathlib import Path
        import torch
        from hubaoti.artifact.bundle import Bundle
        from hubaoti.artifact.package import unpack_all
        from hubaoti.errors import DigestMismatch
        from hubaoti.runtime import graph, library
        bundle, work = Bundle.read(Path(sys.argv[1])), Path(sys.argv[2])
        entry = bundle.manifest.graphs[0]
        unpack_all(bundle.path / entry.file, work)
        (one,) = [each for each in entry.members if each.path.endswith(".wrapper.so")]
        place = work / one.path
        good, other = place.read_bytes(), work / "other"
        hold = library.hold_library

        def hold_and_lose(*given):
            held = hold(*given)
            other.write_bytes(b"no library at all")
            other.rename(place)
            return held

        graph.hold_library = hold_and_lose
        opened = graph.open_graph(work, entry, torch.device("cpu"))
        names = sorted(opened.read_constant_fqns())
        assert place.read_bytes() == b"no library at all"
        for _ in range(2):  # this one was loaded; its number is not another's
            again = graph.open_graph(work, entry, torch.device("cpu"))
            assert sorted(again.read_constant_fqns()) == names
        (held,) = library._HELD.values()
        os.close(held.handle)
        os.dup(0)  # which gets that number
        try:
            hold(work, one, entry.members)
        except DigestMismatch:
            print("refused")
        place.unlink()
        place.write_bytes(good)
        found = hold(work, one, entry.members)
        assert found.file != held.path and found.file.read_bytes() == good
        print("held")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), f"{roberta_bundle.path}", f"{tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["refused", "held"]
