"""What a package for a GPU answers without one; and that what is wrong with one is found."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lowered_for_gpu
import msgspec
import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.nn import functional

from hubaoti.artifact.package import hash_file, list_members
from hubaoti.artifact.schema import (
    Build,
    Check,
    Constant,
    ConstantOrigin,
    Graph,
    Input,
    Output,
    Outputs,
)
from hubaoti.compiler.constants import save_tensors
from hubaoti.compiler.dims import Probe
from hubaoti.compiler.gpu_build import choose_tolerances
from hubaoti.compiler.interpreted import (
    Begun,
    Compared,
    Finished,
    InterpretRequest,
    LeftOut,
    Uninterpreted,
    digest_sources,
    interpret,
    read_answers,
)
from hubaoti.compiler.interpreter import NotInterpreted, child, language, libdevice, reductions
from hubaoti.compiler.interpreter.calls import explain_failure
from hubaoti.compiler.interpreter.launches import _split_axis
from hubaoti.compiler.saved_program import save_program
from hubaoti.compiler.stand_in import StandIn, build_stand_in
from hubaoti.compiler.stand_in.aten import SHIMS, Parameter, read_shims, write_shims
from hubaoti.errors import CheckFailed, MissingConstant
from hubaoti.host.probe import probe_host
from hubaoti.host.processes import ChildOutput
from hubaoti.host.wire import ErrorRecord
from hubaoti.runtime.input_checks import name_dtype
from hubaoti.settings import Settings

BUFFERS = "buffers.safetensors"
SM = 90
EXACT = 1e-5


class Block(nn.Module):
    """Attention under a mask, norms, a table that it computes, and a tensor that it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_a, self.norm_b = nn.LayerNorm(64), nn.LayerNorm(64)
        self.mix, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.register_buffer("table", torch.linspace(-1, 1, 512), persistent=False)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, seen: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """`x` is (batch, seq, 64), `mask` (batch, seq); `seen` counts where it looked."""
        seen.add_(mask.to(seen.dtype))
        parts = self.mix(self.norm_a(x)).view(*x.shape[:2], 3, 4, 16)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen_by_all = mask[:, None, None].expand(-1, 1, x.shape[1], -1)
        found = functional.scaled_dot_product_attention(query, key, value, seen_by_all)
        x = x + self.out(found.transpose(1, 2).reshape(x.shape))
        return self.norm_b(x) * self.table[: x.shape[1], None], x.flatten(1).cumsum(-1)


class Forms(nn.Module):
    """Kernels of many forms: reductions of every kind, scans, sorts, atomics, narrow numbers."""

    def forward(
        self, x: torch.Tensor, ids: torch.Tensor, h: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """`x` is (n, 48), `ids` (n,) below 16, `h` (n, 40) of float16."""
        half, positive = h.to(torch.bfloat16), x.abs() + 0.5
        return (
            *(torch.softmax(x, -1), x.argmax(-1), x.max(-1).values, x.sum(0), x.flatten().sum()),
            *(x.var(1), x.std(0), x.prod(-1), torch.logsumexp(x, 0), (x > 1).any(-1)),
            *(x.cumsum(1), x.cumsum(0), torch.logcumsumexp(x, 1)),
            *(torch.sort(x, -1).values, torch.topk(x, 3).values, x.median(-1).values),
            *(torch.zeros(16, 48).index_add(0, ids, x), x.t().contiguous() + 1),
            *((x[None] * x[:, None]).amax((0, 2)), h.float().sum(-1), half * half + half),
            *(x.clamp(-3, 3).to(torch.float8_e4m3fn).float(), x.to(torch.float8_e5m2).float()),
            *(ids * 3 // 2 % 5, ids.to(torch.int32) << 1, ids.to(torch.uint8) + 7, -(ids // -3)),
            *(torch.erf(x), torch.tanh(x), torch.pow(positive, x), torch.atan2(x, positive)),
            *(torch.lgamma(positive), torch.fmod(x, positive), functional.gelu(x), x.round()),
        )


class Masked(nn.Module):
    """One kernel, and a constant that two numbers are chosen for."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`x` and `mask` are (n, 48)."""
        return (torch.where(mask, 0.0, float("-inf")) + x * 2,)


@dataclass(frozen=True)
class Case:
    """A module as it is exported: inputs with the names of their sizes, and what those may be."""

    module: nn.Module
    inputs: Mapping[str, tuple[torch.Tensor, tuple[str | int, ...]]]
    bounds: Mapping[str, tuple[int, int]]
    values: Mapping[str, str]
    mutated: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Lowered:
    """A package, and all that is asked with it."""

    request: InterpretRequest
    stand_in: StandIn

    def interpret(self) -> Sequence[Check]:
        """Every point answered as its program does, or the error that says why not."""
        found = interpret(self.request, self.stand_in, SM)
        assert not found.not_interpreted
        assert not found.left_out
        return found.checks

    def damage(self, folder: Path, file: str, old: str, new: str) -> Lowered:
        """A copy with another text in one of its files, which had the first one."""
        home = Path(os.fsdecode(self.request.package)).parent
        shutil.copytree(home, folder)
        (path,) = (each for each in folder.rglob(file) if old.encode() in each.read_bytes())
        path.chmod(0o600)
        path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
        return replace(self, request=move_request(self.request, folder))


def move_request(request: InterpretRequest, folder: Path) -> InterpretRequest:
    """A request for a package and what was kept in another folder."""
    unpacked, keep = folder / "unpacked", os.fsencode(folder / "keep")
    members = tuple(
        msgspec.structs.replace(each, sha256=hash_file(unpacked / each.path))
        for each in request.entry.members
    )
    return msgspec.structs.replace(
        request,
        entry=msgspec.structs.replace(request.entry, members=members),
        package=os.fsencode(unpacked),
        keep=keep,
        shipped=os.fsencode(folder),
    )


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    torch_here = probe_host(Settings.from_env()).torch
    assert torch_here is not None
    home = tmp_path_factory.mktemp("home")
    home.chmod(0o700)
    return build_stand_in(torch_here, home)


def lower_case(case: Case, folder: Path, stand_in: StandIn, damage: str = "") -> Lowered:
    """Export on the CPU, lower under the stand-in, and describe what came of it."""
    program = export_case(case)
    folder.mkdir(exist_ok=True)
    save_program(program, folder / "program.pt2")
    script = Path(lowered_for_gpu.__file__)
    variables = os.environ | stand_in.environment([SM], reads=damage == lowered_for_gpu.FOLDED)
    command = [sys.executable, script, folder / "program.pt2", folder / "made", damage]
    home = str(Path(__file__).parents[1])
    subprocess.run(command, env=variables | {"PYTHONPATH": home}, check=True)
    fqns = json.loads((folder / "made" / "fqns.json").read_text())
    tensors = {**dict(case.module.named_parameters()), **dict(case.module.named_buffers())}
    tensors |= {name: each for name, each in program.constants.items() if name in fqns}
    shipped = {n: tensors[n] for n in fqns if not isinstance(tensors[n], nn.Parameter)}
    if shipped:
        save_tensors(shipped, folder / "made" / BUFFERS)
    entry = describe_case(case, program, {n: tensors[n] for n in fqns}, {*shipped})
    members = list_members(folder / "made" / "package.pt2")
    lows = {name: low for name, (low, _) in case.bounds.items()}
    highs = {name: high for name, (_, high) in case.bounds.items()}
    middle = {name: (low + high) // 2 | 1 for name, (low, high) in case.bounds.items()}
    request = InterpretRequest(
        entry=msgspec.structs.replace(entry, members=members),
        package=b"",
        program=os.fsencode(folder / "program.pt2"),
        keep=b"",
        shipped=b"",
        points=[lows, middle, highs],
        tolerance=EXACT,
        most=EXACT,
        seconds=120.0,
        memory=4 << 30,
    )
    return Lowered(move_request(request, folder / "made"), stand_in)


def export_case(case: Case) -> Any:
    """The program of a case, whose sizes are its dims."""
    dims = {name: Dim(name, min=low, max=high) for name, (low, high) in case.bounds.items()}
    shapes = tuple(
        {axis: dims[size] for axis, size in enumerate(shape) if isinstance(size, str)}
        for _, shape in case.inputs.values()
    )
    module = case.module.eval().requires_grad_(False)
    tensors = tuple(tensor for tensor, _ in case.inputs.values())
    return export(module, tensors, dynamic_shapes=shapes)


def describe_case(
    case: Case, program: Any, constants: Mapping[str, torch.Tensor], shipped: set[str]
) -> Graph:
    """The manifest's graph of a case."""
    answered = {*program.graph_signature.user_outputs}
    nodes = [node for node in program.graph.output_node().args[0] if node.name in answered]
    outputs = [node.meta["val"] for node in nodes]
    return Graph(
        id="root",
        file="graphs/root.pt2",
        sha256="0" * 64,
        size=1,
        members=(),
        modules=("",),
        bounds=dict(case.bounds),
        call={},
        inputs=tuple(
            Input(
                name=name,
                dtype=name_dtype(tensor.dtype),
                shape=shape,
                values=case.values.get(name, "real"),
                mutated=name in case.mutated,
            )
            for name, (tensor, shape) in case.inputs.items()
        ),
        outputs=Outputs(
            template=None,
            tensors=tuple(
                Output(name=f"o{i}", dtype=name_dtype(each.dtype), shape=(None,) * each.dim())
                for i, each in enumerate(outputs)
            ),
        ),
        constants=tuple(
            Constant(
                fqn=name,
                dtype=name_dtype(tensor.dtype),
                shape=tuple(tensor.shape),
                stride=tensor.stride(),
                origin=ConstantOrigin(file=BUFFERS)
                if name in shipped
                else ConstantOrigin(module=name),
            )
            for name, tensor in constants.items()
        ),
    )


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory, stand_in: StandIn) -> Lowered:
    sizes = ("batch", "seq")
    case = Case(
        Block(),
        {
            "x": (torch.randn(3, 12, 64), (*sizes, 64)),
            "mask": (torch.ones(3, 12, dtype=torch.bool), sizes),
            "seen": (torch.zeros(3, 12), sizes),
        },
        {"batch": (1, 4), "seq": (2, 40)},
        {"mask": "mask"},
        frozenset({"seen"}),
    )
    return lower_case(case, tmp_path_factory.mktemp("block"), stand_in)


def make_masked() -> Case:
    tensors = torch.randn(12, 48), torch.ones(12, 48, dtype=torch.bool)
    inputs = {name: (t, ("n", 48)) for name, t in zip(("x", "mask"), tensors, strict=True)}
    return Case(Masked(), inputs, {"n": (2, 300)}, {"mask": "mask"})


@pytest.mark.cuda
def test_a_package_answers_and_writes_what_its_program_does(block: Lowered) -> None:
    checks = block.interpret()
    assert [each.asked or each.dims for each in checks] == block.request.points
    assert all(each.where == "interpreted" and each.max_relative <= EXACT for each in checks)


@pytest.mark.cuda
def test_kernels_of_every_form_are_computed(tmp_path: Path, stand_in: StandIn) -> None:
    tensors = torch.randn(10, 48), torch.arange(10) % 16, torch.randn(10, 40).half()
    shapes: list[tuple[str | int, ...]] = [("n", 48), ("n",), ("n", 40)]
    inputs = dict(zip(("x", "ids", "h"), zip(tensors, shapes, strict=True), strict=True))
    case = Case(Forms(), inputs, {"n": (3, 200)}, {"ids": "ids<16"})
    assert len(lower_case(case, tmp_path, stand_in).interpret()) == 3


@pytest.mark.cuda
def test_a_wrong_constant_is_found(block: Lowered, tmp_path: Path) -> None:
    wrong = block.damage(tmp_path / "made", "*.wrapper.cpp", "1e-05", "1e-02")
    with pytest.raises(CheckFailed, match="interpreted: at .* differs from its program"):
        wrong.interpret()


@pytest.mark.cuda
def test_a_table_of_other_numbers_is_found(block: Lowered, tmp_path: Path) -> None:
    shutil.copytree(Path(os.fsdecode(block.request.package)).parent, tmp_path / "made")
    save_tensors({"table": torch.linspace(-1, 1.1, 512)}, tmp_path / "made" / BUFFERS)
    moved = replace(block, request=move_request(block.request, tmp_path / "made"))
    with pytest.raises(CheckFailed, match="differs from its program"):
        moved.interpret()


@pytest.mark.cuda
def test_two_exchanged_constants_are_found(block: Lowered, tmp_path: Path) -> None:
    """Their names stand in the library, where each place of a constant is told its own."""
    first = block.damage(tmp_path / "a", "*.wrapper.so", "norm_a.weight", "norm_x.weight")
    second = first.damage(tmp_path / "b", "*.wrapper.so", "norm_b.weight", "norm_a.weight")
    third = second.damage(tmp_path / "c", "*.wrapper.so", "norm_x.weight", "norm_b.weight")
    with pytest.raises(CheckFailed, match="differs from its program"):
        third.interpret()


@pytest.mark.cuda
def test_a_stride_of_the_example_s_length_is_found(block: Lowered, tmp_path: Path) -> None:
    code = next(Path(os.fsdecode(block.request.keep)).glob("*.wrapper.cpp")).read_text()
    strides = [word for word in ("64*ks0", "ks0*") if word in code]
    wrong = block.damage(
        tmp_path / "made", "*.wrapper.cpp", strides[0], strides[0].replace("ks0", "12")
    )
    with pytest.raises(CheckFailed, match=r"differs from its program|ended|crashed"):
        wrong.interpret()


@pytest.mark.cuda
def test_a_grid_that_is_one_short_is_found(tmp_path: Path, stand_in: StandIn) -> None:
    short = lower_case(make_masked(), tmp_path, stand_in, lowered_for_gpu.SHORT)
    with pytest.raises(CheckFailed, match="differs from its program"):
        short.interpret()


@pytest.mark.cuda
def test_a_kernel_that_writes_into_a_weight_ends(block: Lowered, tmp_path: Path) -> None:
    """What the program computed from the same weight afterwards would be as wrong."""
    code = next(Path(os.fsdecode(block.request.keep)).glob("*.wrapper.cpp")).read_text()
    load = re.search(r"tl.load\((in_ptr\d) \+ \(r0_1\), None", code)
    assert load, "a weight of a norm, read by all rows"
    spoilt = f"tl.store({load[1]} + (r0_1), 0.0, None); {load[0]}"
    with pytest.raises(CheckFailed, match=r"it crashed .*triton_"):
        block.damage(tmp_path / "made", "*.wrapper.cpp", load[0], spoilt).interpret()


@pytest.mark.cuda
def test_a_value_that_was_read_back_is_found(tmp_path: Path, stand_in: StandIn) -> None:
    """A device that computes nothing gives a folded constant whatever lay there."""
    folded = lower_case(make_masked(), tmp_path, stand_in, lowered_for_gpu.FOLDED)
    with pytest.raises(CheckFailed, match="differs from its program"):
        folded.interpret()


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("file", "old", "new", "alike"),
    [
        ("*.wrapper.cpp", f"cc={SM}", "cc=120", True),
        ("*.wrapper.cpp", "1e-05", "1e-02", False),
        ("*.wrapper.cpp", "launchKernel(", "launchKernel (", False),
        ("kernels.json", "BLOCK", "BLOCKS", False),
    ],
)
def test_packages_are_alike_whose_host_code_and_kernels_are(
    block: Lowered, tmp_path: Path, file: str, old: str, new: str, alike: bool
) -> None:
    changed = block.damage(tmp_path / "made", file, old, new)
    first, second = (
        digest_sources(Path(os.fsdecode(each.request.keep))) for each in (block, changed)
    )
    assert (first == second) == alike


@pytest.mark.cuda
def test_what_cannot_be_computed_is_named(block: Lowered, tmp_path: Path) -> None:
    unknown = block.damage(tmp_path / "made", "*.wrapper.cpp", "libdevice.rsqrt", "libdevice.brev")
    found = interpret(unknown.request, unknown.stand_in, SM)
    assert found.not_interpreted
    assert all(reason.startswith("triton_") for reason in found.not_interpreted)


@pytest.mark.cuda
def test_points_beyond_the_budget_are_left_out_and_said(block: Lowered) -> None:
    small = msgspec.structs.replace(block.request, memory=1 << 20)
    found = interpret(small, block.stand_in, SM)
    assert [each.sizes for each in found.left_out] == block.request.points
    assert "memory" in found.left_out[0].reason


def make_request(points: int = 2) -> InterpretRequest:
    entry = Graph(
        id="block",
        file="graphs/block.pt2",
        sha256="0" * 64,
        size=1,
        members=(),
        modules=(),
        bounds={"n": (1, 9)},
        call={},
        inputs=(),
        outputs=Outputs(template=None, tensors=()),
        constants=(),
    )
    return InterpretRequest(
        entry=entry,
        package=b"",
        program=b"",
        keep=b"",
        shipped=b"",
        points=[{"n": n} for n in range(1, 1 + points)],
        tolerance=EXACT,
        most=EXACT,
        seconds=1.0,
        memory=1,
    )


def make_check(size: int) -> Check:
    return Check(graph="block", dims={"n": size}, max_absolute=0, max_relative=0, tolerance=0)


def test_a_process_that_crashes_is_told_with_the_kernel_at_which_it_did() -> None:
    output = ChildOutput(
        [Begun({"n": 1}), Compared(make_check(1)), Begun({"n": 2})],
        -signal.SIGSEGV,
        "triton_poi_fused_add_0",
    )
    with pytest.raises(
        CheckFailed, match="block at {'n': 2}: it crashed .*: triton_poi_fused_add_0"
    ):
        read_answers(make_request(), output)


def test_a_process_that_took_too_long_leaves_points_out() -> None:
    output = ChildOutput(
        [Begun({"n": 1}), Compared(make_check(1)), Begun({"n": 2})], -signal.SIGKILL, "mm_out"
    )
    found = read_answers(make_request(), output, ended=True)
    assert len(found.checks) == 1
    assert found.left_out == (LeftOut({"n": 2}, "time: it took too long: mm_out"),)


def test_a_process_that_the_system_ended_says_nothing_of_the_package() -> None:
    output = ChildOutput([Begun({"n": 1}), Compared(make_check(1)), Begun({"n": 2})], -9, "mm_out")
    found = read_answers(make_request(), output)
    assert len(found.checks) == 1
    (left,) = found.left_out
    assert left.sizes == {"n": 2} and left.reason.startswith("memory: "), left


def test_a_process_that_ends_without_a_word_is_no_comparison() -> None:
    output = ChildOutput([], 1, "ModuleNotFoundError: No module named 'triton'")
    found = read_answers(make_request(), output)
    assert not found.checks
    assert found.not_interpreted[0].endswith("No module named 'triton'")


def test_an_error_there_is_the_same_error_here() -> None:
    record = ErrorRecord.of(MissingConstant("table", hint="compile again"))
    with pytest.raises(MissingConstant, match="table"):
        read_answers(make_request(), ChildOutput([record], 0))


def test_after_what_could_not_be_computed_nothing_is_missing() -> None:
    output = ChildOutput([Uninterpreted("triton_x: inline assembler"), Finished()], 0)
    assert read_answers(make_request(), output).not_interpreted == ("triton_x: inline assembler",)


@dataclass
class FakeOperation:
    """A reduction of Triton's interpreter: along an axis, with an operator of tensors."""

    axis: int | None
    keep_dims: bool
    combine_fn: Any

    def to_tensor(self, data: Any, dtype: Any) -> Any:
        return SimpleNamespace(handle=SimpleNamespace(data=np.asarray(data)), dtype=dtype)


def keep_later(a: Any, b: Any) -> Any:
    """An operator that is associative and not commutative: the second, if it is not zero."""
    chosen = np.where(b.handle.data != 0, b.handle.data, a.handle.data)
    return SimpleNamespace(handle=SimpleNamespace(data=chosen))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("keep_dims", [True, False])
def test_reductions_and_scans_keep_the_order_of_values(axis: int, keep_dims: bool) -> None:
    data = np.array([[1, 0, 3, 0], [0, 2, 0, 0]])
    operation = FakeOperation(axis, keep_dims, keep_later)
    value = operation.to_tensor(data, "int32")
    rows = data if axis == 1 else data.T
    last = [[n for n in row if n][-1:] or [0] for row in rows.tolist()]
    (reduced,) = reductions._reduce(operation, [value])
    assert reduced.handle.data.ravel().tolist() == [each for (each,) in last]
    assert reduced.handle.data.ndim == (2 if keep_dims else 1)
    (scanned,) = reductions._scan(operation, [value])
    found = scanned.handle.data if axis == 1 else scanned.handle.data.T
    filled = [[([0] + [n for n in row[: i + 1] if n])[-1] for i in range(len(row))] for row in rows]
    assert found.tolist() == filled


@pytest.mark.parametrize(
    ("found", "own", "passes", "quantization"),
    [
        (1.01, 1.5, "float32", None),  # near float32
        (1.5, 1.5, None, None),  # as the program in its own dtype: another expert was chosen
        (1.03, 0.985, "float32", None),  # twice as far from float32 as the program itself
        (1.03, 0.999, "", None),  # farther than that
        (1.05, 0.96, "", None),  # and no farther than twice the tolerance
        (float("nan"), 0.96, "", None),
        (1.09, 0.999, "float32", "float8dq"),  # which is coarser, and no less looked at
        (1.12, 0.93, "float32", "float8dq"),
        (1.12, 0.96, "", "float8dq"),
        (1.25, 0.8, "", "float8dq"),
        (1.05, 0.96, "", "int8wo"),
    ],
)
def test_a_half_type_is_as_near_to_float32_as_its_program_is(
    monkeypatch: pytest.MonkeyPatch,
    found: float,
    own: float,
    passes: str | None,
    quantization: str | None,
) -> None:
    answers = {True: torch.tensor([1.0]), False: torch.tensor([own], dtype=torch.bfloat16)}
    package = [torch.tensor([found], dtype=torch.bfloat16)]
    monkeypatch.setattr(child, "_ask_package", lambda *_: package)
    monkeypatch.setattr(child, "_ask_program", lambda _, __, is_wide: [answers[is_wide]])
    monkeypatch.setattr(child, "make_golden_inputs", lambda *_: [])
    monkeypatch.setattr(child, "_list_dtypes", lambda _: {torch.bfloat16})
    comparison: Any = SimpleNamespace(graph=SimpleNamespace(entry=SimpleNamespace(id="block")))
    build = Build(
        regions="auto", dims={}, dtype="bfloat16", attention="sdpa", quantization=quantization
    )
    probe, allowed = Probe({"batch": 1}), choose_tolerances(build)
    if passes == "":
        with pytest.raises(CheckFailed, match="differs from its program"):
            child._compare(comparison, probe, allowed, deadline=0.0)
    else:
        check = child._compare(comparison, probe, allowed, deadline=0.0)
        assert (check.dtype or None) == passes
        assert check.max_relative <= check.tolerance <= allowed[1]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp8e4nv", torch.float8_e4m3fn)],
)
def test_numbers_are_rounded_as_torch_rounds_them(name: str, dtype: torch.dtype) -> None:
    """To the even among two that are as near, and into the next power of two."""
    values = torch.tensor([1.99999, 1.0 + 2**-9, 1.0 + 3 * 2**-9, -0.0, 1e-8, 3.14159, -448.0])
    words = language._convert(values.numpy(), None, name)
    signed = torch.from_numpy(words.view(f"i{words.itemsize}"))
    assert signed.view(dtype).float().tolist() == values.to(dtype).float().tolist()
    again = language._convert(words, name, "fp32").view("float32")
    assert again.tolist() == values.to(dtype).float().tolist()


def test_what_is_too_large_for_float8_is_its_largest_number() -> None:
    words = language._convert(np.array([1e6, -1e6], dtype="float32"), None, "fp8e4nv")
    assert language._convert(words, "fp8e4nv", "fp32").view("float32").tolist() == [448, -448]


def test_libdevice_s_functions_are_torch_s() -> None:
    x = np.array([0.25, 1.5, -2.5], dtype="float32")
    assert libdevice.compute_external("__nv_rintf", [x]).tolist() == [0, 2, -2]
    assert libdevice.compute_external("__nv_isnanf", [np.full(2, np.nan, dtype="float32")]).all()
    (found,) = libdevice.compute_external("__nv_atan2f", [x[:1], x[1:2]])
    assert found == pytest.approx(math.atan2(0.25, 1.5))
    with pytest.raises(NotInterpreted, match="__nv_brev"):
        libdevice.compute_external("__nv_brev", [x])


@pytest.mark.parametrize("count", [1, 2, 3, 63, 64, 65, 1000])
def test_blocks_of_a_grid_are_joined_without_a_rest(count: int) -> None:
    joined = [*_split_axis(count, 64)]
    covered = [block for place, size in joined for block in range(place * size, (place + 1) * size)]
    assert covered == [*range(count)]
    assert max(size for _, size in joined) <= 64


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NotInterpreted("inline assembler"), NotInterpreted),
        (ValueError("a shape"), NotInterpreted),
        (RuntimeError("\"addmm\" not implemented for 'Float8'"), NotInterpreted),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), CheckFailed),
        (AssertionError("index out of bounds"), CheckFailed),
    ],
)
def test_what_fails_says_something_of_the_package_or_of_the_interpreter(
    error: Exception, kind: type[Exception]
) -> None:
    found = explain_failure("block", "mm_out", error)
    assert isinstance(found, kind)
    assert "mm_out" in str(found)


def test_shims_are_read_from_torch_s_header(tmp_path: Path) -> None:
    header = tmp_path / SHIMS
    header.parent.mkdir(parents=True)
    header.write_text(
        "AOTI_TORCH_EXPORT AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, "
        "const int64_t* size, int64_t size_len_, double* scale);\n"
        "AOTI_TORCH_EXPORT AOTITorchError aoti_torch_cuda_narrow(AtenTensorHandle self);\n"
    )
    (shim,) = read_shims(tmp_path)  # a view is torch's own
    assert shim.name == "mm_out"
    assert shim.parameters[1] == Parameter("constint64_t*", "size")
    code = write_shims(tmp_path)
    assert "int32_t aoti_torch_cuda_mm_out(void * a0, void * a1, int64_t a2, void * a3)" in code
    assert 'answer("mm_out", arguments)' in code


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_the_written_c_is_compiled(tmp_path: Path) -> None:
    include = Path(torch.__file__).parent / "include"
    source = tmp_path / "aten.c"
    source.write_text(write_shims(include))
    subprocess.run(["gcc", "-fsyntax-only", "-Wall", "-Werror", source], check=True)
