"""The process that opens a package under the stand-in and compares what it answers.

It is begun with `TRITON_INTERPRET=1` and without torch's cache of device memory, so that each
tensor has memory of its own: what reads or writes beyond it ends the process.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path

import msgspec
import torch

from hubaoti.artifact.schema import Check, Graph
from hubaoti.compiler.cpu_program import ProgramOnCpu
from hubaoti.compiler.dims import Probe, Sizes
from hubaoti.compiler.interpreted import Answer, Compared, InterpretRequest, LeftOut, Uninterpreted
from hubaoti.compiler.interpreter import NotInterpreted
from hubaoti.compiler.interpreter.calls import Calls
from hubaoti.compiler.interpreter.kernels import read_kernels
from hubaoti.compiler.interpreter.language import prepare
from hubaoti.compiler.interpreter.memory import carry_over, see_on_host
from hubaoti.compiler.precision import HALF, InFloat32, widen
from hubaoti.compiler.saved_program import load_program
from hubaoti.compiler.verify import record_comparison
from hubaoti.errors import CheckFailed, HubaotiError, MissingConstant
from hubaoti.host.processes import join_parent
from hubaoti.host.wire import ErrorRecord
from hubaoti.runtime.golden import estimate_answer_memory, make_golden_inputs
from hubaoti.runtime.graph import Graph as Open
from hubaoti.runtime.graph import open_graph
from hubaoti.runtime.input_checks import parse_dtype
from hubaoti.runtime.synthetic import fill_synthetic
from hubaoti.runtime.weights import load_shipped_tensors

_BASE = 700 << 20  # bytes of a process that has torch and Triton


def main() -> None:
    """Answer one request: a record for each point, until something cannot be computed."""
    channel = join_parent(is_awaited=True)
    request: InterpretRequest = channel.receive(InterpretRequest)
    try:
        for answer in answer_request(request):
            channel.send(answer)
    except HubaotiError as error:
        channel.send(ErrorRecord.of(error))


def answer_request(request: InterpretRequest) -> Iterator[Answer]:
    """What comes of each point, in their order.

    Raises:
        CheckFailed: the package answers or writes something else than its program.
        MissingConstant: a constant that ships with the artifact is not in its file.
    """
    with tempfile.TemporaryDirectory(prefix="hubaoti-") as scratch:
        try:
            yield from _compare_points(request, Path(scratch))
        except NotInterpreted as error:
            yield Uninterpreted(str(error))


def _compare_points(request: InterpretRequest, scratch: Path) -> Iterator[Answer]:
    """Open, bind, and ask at each point that fits into what is left of time and memory."""
    begun, spent, before = time.monotonic(), 0.0, 1
    comparison = None
    for sizes in request.points:
        work = prod(sizes.values())
        left = request.seconds - (time.monotonic() - begun)
        if reason := _find_broken_budget(request, sizes, spent * work / before, left):
            yield LeftOut(sizes, reason)
            continue
        comparison = comparison or _prepare_comparison(request, scratch)
        start = time.monotonic()
        yield Compared(_compare(comparison, sizes, request.tolerance))
        spent, before = time.monotonic() - start, work


def _find_broken_budget(
    request: InterpretRequest, sizes: Sizes, expected: float, left: float
) -> str | None:
    """Which budget a point would break, if any."""
    memory = _BASE + estimate_answer_memory(request.entry, sizes)
    if memory > request.memory:
        return f"memory: it would take {memory >> 20} MiB, and has {request.memory >> 20}"
    if expected > left:
        return f"time: it would take {expected:.0f} s, and {max(left, 0.0):.0f} are left"
    return None


@dataclass(frozen=True, slots=True)
class _Comparison:
    """An open package whose calls are computed, and its program, bound to the same constants.

    Of a half type the program's answers in float32 are the reference.
    """

    graph: Open
    calls: Calls
    program: ProgramOnCpu
    is_half: bool


def _prepare_comparison(request: InterpretRequest, scratch: Path) -> _Comparison:
    """Open the package as users do, and bind it and the programs to the same constants."""
    entry, device = request.entry, torch.device("cuda", request.device)
    prepare()
    calls = Calls(read_kernels(Path(request.keep), scratch))
    calls.listen()
    graph = open_graph(Path(request.package), entry, device)
    constants = _make_constants(entry, Path(request.shipped), device)
    graph.bind(constants)
    seen = {name: see_on_host(tensor) for name, tensor in constants.items()}
    for constant in entry.constants:
        seen |= dict.fromkeys(constant.aliases, seen[constant.fqn])
    program = load_program(Path(request.program))
    for name in program.graph_signature.parameters:  # those that nobody reads
        if name not in seen:
            seen[name] = torch.zeros_like(program.state_dict[name])
    run = ProgramOnCpu(program)
    run.bind(seen)
    return _Comparison(graph, calls, run, bool(_list_dtypes(entry) & {*HALF}))


def _list_dtypes(entry: Graph) -> set[torch.dtype]:
    """The dtypes of what a graph takes and gives."""
    names = {each.dtype for each in entry.inputs} | {each.dtype for each in entry.constants}
    return {*map(parse_dtype, names | {each.dtype for each in entry.outputs.tensors})}


def _make_constants(entry: Graph, folder: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Every constant of a graph on the device, by the golden rule or shipped, written by the host.

    They exist once: programs read the same memory.

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
        found[constant.fqn] = tensor
    return found


def _compare(comparison: _Comparison, sizes: Sizes, tolerance: float) -> Check:
    """One comparison, with float32 and else with the package's own dtype: a choice that numbers
    decide, as of an expert, may be another in either.

    Raises:
        CheckFailed: it differs from both by more than the tolerance.
    """
    entry = comparison.graph.entry
    inputs = make_golden_inputs(entry, sizes)
    found = _ask_package(comparison, inputs)
    failure: CheckFailed | None = None
    for in_float32 in (True, False) if comparison.is_half else (False,):
        expected = _ask_program(entry, comparison.program, inputs, in_float32)
        near = [_round_to(each, like) for each, like in zip(expected, found, strict=False)]
        expected[: len(near)] = near
        try:
            check = record_comparison(entry.id, Probe(sizes), found, expected, tolerance)
        except CheckFailed as error:
            failure = failure or error
            continue
        extra = {"dtype": "float32"} if in_float32 else {}
        return msgspec.structs.replace(check, where="interpreted", **extra)
    assert failure is not None
    message = str(failure).replace("eager", "its program").replace("check:", "check, interpreted:")
    raise CheckFailed(message, hint=failure.hint) from failure


def _round_to(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A float32 answer in the half type that a package gives."""
    is_wide = value.dtype == torch.float32 and like.dtype in HALF
    return value.to(like.dtype) if is_wide else value


def _ask_program(
    entry: Graph, program: ProgramOnCpu, inputs: list[torch.Tensor], in_float32: bool
) -> list[torch.Tensor]:
    """What the program answers, and then the inputs that it may write, as it left them."""
    own = [widen(each).clone() if in_float32 else each.clone() for each in inputs]
    with InFloat32() if in_float32 else nullcontext():  # type: ignore[no-untyped-call]
        answers = program(*own)
    written = zip(entry.inputs, own, strict=True)
    return [*answers, *(tensor for item, tensor in written if item.mutated)]


def _ask_package(comparison: _Comparison, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the package answers, and then the inputs that it may write, on the CPU.

    Raises:
        NotInterpreted: a kernel or an op cannot be computed.
        CheckFailed: its host code or a kernel of it refuses.
    """
    graph = comparison.graph
    own = [carry_over(each, graph.device) for each in inputs]
    with comparison.calls.compute(graph.entry.id):
        answers = graph(*own)
    written = zip(graph.entry.inputs, own, strict=True)
    given = [*answers, *(tensor for item, tensor in written if item.mutated)]
    return [see_on_host(each).clone() for each in given]
