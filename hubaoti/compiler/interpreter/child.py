"""The process that opens a package under the stand-in and compares what it answers.

It is begun with `TRITON_INTERPRET=1` and without torch's cache of device memory, so that each
tensor has memory of its own: what reads or writes beyond it ends the process.
"""

from __future__ import annotations

import operator
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import torch
from torch.export import ExportedProgram

from hubaoti.artifact.schema import Check, Graph
from hubaoti.compiler.cpu_program import ProgramOnCpu
from hubaoti.compiler.dims import Probe, Sizes
from hubaoti.compiler.interpreted import (
    Answer,
    Begun,
    Compared,
    Finished,
    InterpretRequest,
    LeftOut,
    Uninterpreted,
)
from hubaoti.compiler.interpreter import NotInterpreted
from hubaoti.compiler.interpreter.calls import Calls, OutOfTime
from hubaoti.compiler.interpreter.kernels import read_kernels
from hubaoti.compiler.interpreter.language import prepare
from hubaoti.compiler.interpreter.memory import carry_over, forbid_writes, see_on_host
from hubaoti.compiler.precision import HALF, InFloat32, widen
from hubaoti.compiler.request import Range
from hubaoti.compiler.saved_program import load_program
from hubaoti.compiler.stand_in import require_stand_in
from hubaoti.compiler.verify import (
    Workload,
    cap_probe,
    count_tokens,
    record_comparison,
)
from hubaoti.errors import CheckFailed, HubaotiError, MissingConstant
from hubaoti.host.processes import join_parent
from hubaoti.host.wire import ErrorRecord
from hubaoti.runtime.attention_ops import answer_by_reference
from hubaoti.runtime.custom_ops import register_ops
from hubaoti.runtime.golden import (
    estimate_answer_memory,
    make_golden_inputs,
    measure_difference,
)
from hubaoti.runtime.graph import Graph as Open
from hubaoti.runtime.graph import open_graph
from hubaoti.runtime.input_checks import parse_dtype
from hubaoti.runtime.synthetic import fill_synthetic
from hubaoti.runtime.weights import load_shipped_tensors

_BASE = 700 << 20  # bytes of a process that has torch and Triton
_MANY_TOKENS = 64  # a call of fewer takes as long: each launch has its cost
_NO_TIME = "time: there is none left"


def main() -> None:
    """Answer one request: a record for each point, until something cannot be computed."""
    channel = join_parent(is_awaited=True)
    request: InterpretRequest = channel.receive(InterpretRequest)
    try:
        require_stand_in()
        register_ops(request.ops, request.search)
        with answer_by_reference("cuda"):  # else it is not there; who computes it is `Calls`
            for answer in answer_request(request):
                channel.send(answer)
        channel.send(Finished())
    except HubaotiError as error:
        channel.send(ErrorRecord.of(error))


def answer_request(request: InterpretRequest) -> Iterator[Answer]:
    """What comes of each point, in their order.

    Raises:
        CheckFailed: the package answers or writes something else than its program.
        MissingConstant: a constant that ships with the artifact is not in its file.
    """
    # Where the sources are that the build removes: this process may be ended, or end itself.
    with tempfile.TemporaryDirectory(dir=os.fsdecode(request.keep)) as scratch:
        try:
            yield from _compare_points(request, Path(scratch))
        except NotInterpreted as error:
            yield Uninterpreted(str(error))


def _compare_points(request: InterpretRequest, scratch: Path) -> Iterator[Answer]:
    """Open, bind, and ask at each point, or at a smaller one that fits what is left of time."""
    entry, deadline = request.entry, time.monotonic() + request.seconds
    work, comparison, seconds_per_token = _find_workload(entry), None, 0.0
    seen: list[Sizes] = []
    for sizes in request.points:
        left = deadline - time.monotonic()
        probe = cap_probe(sizes, work, seconds_per_token, left)
        needed = _BASE + estimate_answer_memory(entry, probe.sizes)
        if needed > request.memory or left < 0.0:
            reason = f"memory: it would take {needed >> 20} MiB" if left >= 0.0 else _NO_TIME
            yield LeftOut(sizes, reason)
            continue
        if probe.sizes in seen:  # capped to one that was asked
            yield LeftOut(sizes, probe.capped or _NO_TIME)
            continue
        seen.append(probe.sizes)
        yield Begun(probe.sizes)
        comparison = comparison or _prepare_comparison(request, scratch)
        start = time.monotonic()
        try:
            allowed = request.tolerance, request.most
            yield Compared(_compare(comparison, probe, allowed, deadline))
        except OutOfTime as error:
            yield LeftOut(sizes, f"{_NO_TIME}: it ended in {error}")
        spent = time.monotonic() - start
        seconds_per_token = spent / max(count_tokens(probe.sizes), _MANY_TOKENS)


def _find_workload(entry: Graph) -> Workload:
    """What caps points: the bounds of a graph, and what its inputs and outputs take."""
    bounds = {
        name: Range(low, high, entry.steps.get(name, 1))
        for name, (low, high) in entry.bounds.items()
    }
    return Workload(entry=entry, bounds=bounds)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """An open package whose calls are computed, and its program, bound to the same constants."""

    graph: Open
    calls: Calls
    program: ProgramOnCpu


def _prepare_comparison(request: InterpretRequest, scratch: Path) -> _Comparison:
    """Open the package as users do, and bind it and the programs to the same constants."""
    entry, device = request.entry, torch.device("cuda", request.device)
    prepare()
    calls = Calls(read_kernels(Path(os.fsdecode(request.keep)), scratch))
    calls.listen()
    graph = open_graph(Path(os.fsdecode(request.package)), entry, device)
    constants = _make_constants(entry, Path(os.fsdecode(request.shipped)), device)
    graph.bind(constants)
    program = load_program(Path(os.fsdecode(request.program)))
    return _Comparison(graph, calls, _bind_program(program, entry, constants))


def _bind_program(
    program: ExportedProgram, entry: Graph, constants: Mapping[str, torch.Tensor]
) -> ProgramOnCpu:
    """The program with a package's weights; of tables that it computed itself it keeps its own."""
    weights, seen = program.graph_signature.parameters, dict[str, torch.Tensor]()
    for constant in entry.constants:
        if not constant.origin.file or constant.fqn in weights:
            names = (constant.fqn, *constant.aliases)
            seen |= dict.fromkeys(names, see_on_host(constants[constant.fqn]))
    for name in weights:  # that the package does not read
        if name not in seen:
            seen[name] = torch.zeros_like(program.state_dict[name])
    run = ProgramOnCpu(program)
    run.bind(seen)
    return run


def _list_dtypes(entry: Graph) -> set[torch.dtype]:
    """The dtypes of what a graph takes and gives."""
    names = {each.dtype for each in entry.inputs} | {each.dtype for each in entry.constants}
    return {*map(parse_dtype, names | {each.dtype for each in entry.outputs.tensors})}


def _make_constants(entry: Graph, folder: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Every constant of a graph on the device, by the golden rule or shipped, written by the host.

    Weights exist once: the program reads the same memory, so nobody may write into it.

    Raises:
        MissingConstant: one that should have come with the artifact is not in its file.
    """
    shipped = dict(load_shipped_tensors(entry, folder, torch.device("cpu")))
    found = {}
    for constant in entry.constants:
        dtype = parse_dtype(constant.dtype)
        tensor = torch.empty_strided(constant.shape, constant.stride, dtype=dtype, device=device)
        host = see_on_host(tensor)
        if not constant.origin.file:
            fill_synthetic(host, constant.fqn)
        elif constant.fqn in shipped:
            host.copy_(shipped[constant.fqn])
        else:
            raise MissingConstant(f"{constant.origin.file} has no {constant.fqn}")
        forbid_writes(tensor)
        found[constant.fqn] = tensor
    return found


def _compare(
    comparison: _Comparison, probe: Probe, allowed: tuple[float, float], deadline: float
) -> Check:
    """One comparison with the program, in which one of what may be expected is met.

    Raises:
        CheckFailed: none is.
    """
    entry = comparison.graph.entry
    inputs = make_golden_inputs(entry, probe.sizes)
    found = _ask_package(comparison, inputs, deadline)
    failure: CheckFailed | None = None
    for expected in _list_expectations(comparison, inputs, found, allowed):
        answers = _round_all(expected.answers, found)
        try:
            check = record_comparison(entry.id, probe, found, answers, expected.tolerance)
        except CheckFailed as error:
            failure = failure or error
            continue
        return msgspec.structs.replace(check, where="interpreted", dtype=expected.dtype)
    assert failure is not None
    message = str(failure).replace("eager", "its program").replace("check:", "check, interpreted:")
    raise CheckFailed(message, hint=failure.hint) from failure


class _Expected(NamedTuple):
    """Answers of the program, computed in `dtype` where that is another than its own."""

    answers: Sequence[torch.Tensor]
    tolerance: float
    dtype: Literal["float32"] | msgspec.UnsetType


def _list_expectations(
    comparison: _Comparison,
    inputs: list[torch.Tensor],
    found: Sequence[torch.Tensor],
    allowed: tuple[float, float],
) -> Iterator[_Expected]:
    """What a package may answer: in float32 and the like, what its program does.

    In a half type, what it does in float32. Else what it does in that type: a choice that numbers
    decide, as of an expert, may be another one in float32. Else what it does in float32, where each
    answer is twice as far from that as the program's own at most: roundings of many numbers add up.
    `allowed` is what differences are held to, and at the very last.
    """
    tolerance, most = allowed
    if not _list_dtypes(comparison.graph.entry) & {*HALF}:
        yield _Expected(_ask_program(comparison, inputs, False), tolerance, msgspec.UNSET)
        return
    wide = _ask_program(comparison, inputs, True)
    yield _Expected(wide, tolerance, "float32")
    own = _ask_program(comparison, inputs, False)
    yield _Expected(own, tolerance, msgspec.UNSET)
    limits = [max(tolerance, 2 * each) for each in _measure_each(own, wide)]
    if all(map(operator.le, _measure_each(found, wide), limits)):
        yield _Expected(wide, most, "float32")


def _measure_each(
    answers: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> Iterator[float]:
    """How far each answer is from another, as a part of the largest value."""
    for ours, theirs in zip(answers, expected, strict=False):
        difference, largest = inf, 1.0
        if ours.shape == theirs.shape:
            difference, largest = measure_difference(ours, theirs)
        yield difference / largest


def _round_all(answers: Sequence[torch.Tensor], like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Answers, those in float32 rounded to the half type in which a package gives them."""
    dtypes = [each.dtype for each in like] + [torch.float32] * (len(answers) - len(like))
    return [
        each.to(dtype) if each.dtype == torch.float32 and dtype in HALF else each
        for each, dtype in zip(answers, dtypes, strict=False)
    ]


def _ask_program(
    comparison: _Comparison, inputs: list[torch.Tensor], is_wide: bool
) -> list[torch.Tensor]:
    """What the program answers, and then the inputs that it may write, as it left them.

    Where `is_wide`, it computes in float32 what it would in a half type.
    """
    own = [widen(each.clone()) if is_wide else each.clone() for each in inputs]
    mode = InFloat32 if is_wide else nullcontext
    with torch.no_grad(), mode():
        answers = comparison.program(*own)
    written = zip(comparison.graph.entry.inputs, own, strict=True)
    return [*answers, *(tensor for item, tensor in written if item.mutated)]


def _ask_package(
    comparison: _Comparison, inputs: list[torch.Tensor], deadline: float
) -> list[torch.Tensor]:
    """What the package answers, and then the inputs that it may write, on the CPU.

    Raises:
        OutOfTime: it would go on after the deadline.
        NotInterpreted: a kernel or an op cannot be computed.
        CheckFailed: its host code or a kernel of it refuses, or it writes what is only read.
    """
    graph = comparison.graph
    own = [carry_over(each, graph.device) for each in inputs]
    with comparison.calls.compute(graph.entry.id, deadline):
        answers = graph(*own)
    for item, mine, given in zip(graph.entry.inputs, own, inputs, strict=True):
        if not item.mutated and measure_difference(see_on_host(mine), given)[0]:
            raise CheckFailed(
                f"check, interpreted: graph {graph.entry.id} writes {item.name}, which its program "
                "only reads",
                hint="this model cannot be compiled with these dims; it stays eager",
            )
    written = zip(graph.entry.inputs, own, strict=True)
    told = [*answers, *(tensor for item, tensor in written if item.mutated)]
    return [see_on_host(each).clone() for each in told]
