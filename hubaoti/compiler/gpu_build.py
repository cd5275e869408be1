"""From a unit's program to its graphs for GPUs, none of which need be here.

The program is compared with eager on the CPU, in its own dtype and in float32, and gives the golden
answers. Then it is lowered for each capability, in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from hubaoti.artifact.schema import Build, Check, DeviceCode, Graph
from hubaoti.compiler import elf, verify
from hubaoti.compiler.built import BuiltGraph, BuiltUnit, fill_tied_constants, record_golden
from hubaoti.compiler.callspec import ARCHIVE
from hubaoti.compiler.cpu_program import ProgramOnCpu, list_constants
from hubaoti.compiler.cubins import read_device_code
from hubaoti.compiler.gpu_lowering import KEEP, PACKAGE, UNPACKED, LowerRequest, lower_elsewhere
from hubaoti.compiler.interpreted import (
    INTERPRETED_TOLERANCE,
    InterpretRequest,
    choose_points,
    digest_sources,
    interpret,
)
from hubaoti.compiler.job import Job
from hubaoti.compiler.materialize import free_memory
from hubaoti.compiler.options import find_measuring
from hubaoti.compiler.parallel import try_all
from hubaoti.compiler.precision import HALF
from hubaoti.compiler.saved_program import find_op_modules, save_program
from hubaoti.compiler.stand_in import StandIn
from hubaoti.compiler.traced import CPU, Traced, describe_graph, describe_package, make_trial
from hubaoti.errors import CompileFailed, HubaotiError
from hubaoti.host.wire import ErrorRecord
from hubaoti.progress import Progress
from hubaoti.runtime.graph_ops import describe_schemas

_INTERPRET_SECONDS = 40.0  # of all points of a graph
_INTERPRET_MEMORY = 8 << 30  # bytes, of a graph's weights and activations


@dataclass(frozen=True, slots=True)
class GpuTools:
    """What stands in for GPUs, how many graphs are built side by side, and the memory of each.

    The memory is in bytes: a process that interprets takes no more.
    """

    stand_in: StandIn
    at_once: int
    memory: int


@dataclass(frozen=True, slots=True)
class _Compared:
    """A program that was compared with eager, saved at `path`; its entry, and what came of it.

    `ops` are the modules that register ops of it which not every process has.
    """

    traced: Traced
    path: Path
    entry: Graph
    checks: tuple[Check, ...]
    ops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Build:
    """One job's graph, by a name of its own, and the bundle in the making that it belongs to."""

    id: str
    job: Job
    scratch: Path
    compared: _Compared
    tools: GpuTools

    @property
    def sm(self) -> int:
        """The capability that it is built for, 90 for 9.0."""
        return self.job.target.sm or 0

    @property
    def gpu(self) -> str:
        """What it is built for, as `sm90`, or `sm90-fa3`."""
        return self.job.gpu

    @property
    def folder(self) -> Path:
        """Where what is not published lies."""
        return self.compared.path.parent / self.id


def build_for_gpus(
    jobs: Sequence[Job],
    traced: Traced,
    scratches: Sequence[Path],
    progress: Progress,
    tools: GpuTools,
) -> BuiltUnit:
    """Build a unit for the GPU of each job, from one program; where one fails, the others go on.

    Raises:
        HubaotiError: of a step that failed for all of them.
    """
    with tempfile.TemporaryDirectory(dir=scratches[0]) as name:
        folder = Path(name)
        progress(f"check {traced.unit.id}")
        compared, answers = _compare(jobs[0], traced, scratches[0], folder / "program.pt2")
        free_memory(traced.place.module)
        builds = [
            _Build(f"{traced.unit.id}-{job.gpu}", job, scratch, compared, tools)
            for job, scratch in zip(jobs, scratches, strict=True)
        ]
        lowered = map(_take_graph, try_all(builds, _lower_one, tools.at_once, folder, progress))
        progress(f"interpret {traced.unit.id}")
        graphs = _interpret_all(builds, [*lowered], tools.at_once, folder)
    return BuiltUnit(tuple(graphs), answers)


def _compare(
    job: Job, traced: Traced, scratch: Path, path: Path
) -> tuple[_Compared, dict[str, torch.Tensor]]:
    """Compare a program with eager, have it answer the golden questions, and save it.

    Raises:
        CheckFailed: it answers something else than eager.
    """
    source, place, program = job.plan.source, traced.place, traced.exported.program
    entry, _ = describe_graph(traced, source, list_constants(program), scratch)
    run = _ProgramGraph(entry, ProgramOnCpu(program))
    run.bind(verify.share_constants(place.module, entry, scratch))
    trial = make_trial(source, traced.unit, entry, place)
    checks = verify.verify(run, trial, where="cpu")
    if getattr(torch, source.dtype) in HALF:
        checks += verify.verify(run, trial, where="cpu", in_float32=True)
    by_rule = not source.live and not place.made
    if by_rule:
        fill_tied_constants(entry, place.module)
    entry, answers = record_golden(run, scratch, by_rule)
    save_program(program, path)
    return _Compared(traced, path, entry, checks, find_op_modules(program)), answers


class _ProgramGraph:
    """A program with the face of an open graph."""

    def __init__(self, entry: Graph, program: ProgramOnCpu) -> None:
        self.entry, self.device, self.program = entry, CPU, program

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give it the constants of its entry, by their names."""
        named = dict(tensors)
        for constant in self.entry.constants:
            named |= dict.fromkeys(constant.aliases, tensors[constant.fqn])
        self.program.bind(named)

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Run it."""
        return self.program(*inputs)


@contextmanager
def _name_gpu(build: _Build) -> Iterator[None]:
    """Inside, errors of ours name the GPU that is built for."""
    try:
        yield
    except HubaotiError as error:
        message = f"{error}; built for {build.gpu}"
        raise type(error)(message, hint=error.hint) from error


def _lower_one(build: _Build) -> BuiltUnit:
    """Lower a program for one GPU, and describe what came of it."""
    compared, folder = build.compared, build.folder
    folder.mkdir()
    with _name_gpu(build):
        request = _make_request(build, folder)
        under = build.tools.stand_in.environment((request.sm,), reads=False)
        environment = build.tools.stand_in.link_environment() if request.measures else under
        lowered = lower_elsewhere(request, environment)
        shutil.move(folder / PACKAGE, build.scratch / compared.entry.file)
        read = lowered.fqns, lowered.call_spec
        source = build.job.plan.source
        entry, files = describe_package(compared.traced, source, read, build.scratch)
        entry = msgspec.structs.replace(
            entry,
            golden=compared.entry.golden,
            not_fa3=lowered.not_fa3 or msgspec.UNSET,
            ops=lowered.ops or msgspec.UNSET,
            device_code=_read_code(folder, build.sm) or msgspec.UNSET,
        )
        entry = msgspec.structs.replace(entry, schemas=describe_schemas(folder / UNPACKED, entry))
        library = next((folder / UNPACKED).rglob("*.wrapper.so"))
        needs = elf.read_needs(library)
        return BuiltUnit((BuiltGraph(entry, needs, files, compared.checks, lowered.ops),))


def _read_code(folder: Path, sm: int) -> DeviceCode | None:
    """What the kernels of a package take, which has to be for the capability that was asked.

    Where another package is interpreted in its place, nothing loads them before its users do.

    Raises:
        CompileFailed: they are for another one.
    """
    code = read_device_code(folder / KEEP, folder / UNPACKED)
    if code is not None and code.capability != sm:
        raise CompileFailed(
            f"build: kernels for sm{code.capability}, and sm{sm} was asked for",
            hint="report it with your torch and triton versions",
        )
    return code


def _take_graph(tried: BuiltUnit | HubaotiError) -> BuiltGraph | ErrorRecord:
    """The one graph of what was tried, or the error that it met."""
    return tried.graphs[0] if isinstance(tried, BuiltUnit) else ErrorRecord.keep(tried)


def _interpret_all(
    builds: Sequence[_Build],
    graphs: Sequence[BuiltGraph | ErrorRecord],
    at_once: int,
    scratch: Path,
) -> list[BuiltGraph | ErrorRecord]:
    """The graphs with what is said of them once they were interpreted, or their errors.

    Graphs for several GPUs are interpreted as one where all that is interpreted of them is the same
    text: what else they have is machine code.
    """
    groups, own = dict[str, list[_Build]](), dict[str, BuiltGraph]()
    for build, graph in zip(builds, graphs, strict=True):
        if isinstance(graph, BuiltGraph):
            own[build.id] = graph
            groups.setdefault(digest_sources(build.folder / KEEP), []).append(build)
    questions = [_Question(tuple(group)) for group in groups.values()]

    def ask(question: _Question) -> BuiltUnit:
        first = question.builds[0]
        return BuiltUnit((_interpret(first, own[first.id]),))

    found = dict[str, BuiltGraph | ErrorRecord]()
    answers = try_all(questions, ask, at_once, scratch)
    for question, answer in zip(questions, answers, strict=True):
        found |= {build.id: _take_graph(answer) for build in question.builds}
    return [
        _describe_as(build, graph, found[build.id]) if isinstance(graph, BuiltGraph) else graph
        for build, graph in zip(builds, graphs, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Question:
    """Builds that are interpreted as one, the first of them."""

    builds: tuple[_Build, ...]

    @property
    def id(self) -> str:
        """The name of the graph, and the GPUs that it speaks for."""
        unit = self.builds[0].compared.traced.unit.id
        return "-".join((unit, *(build.gpu for build in self.builds)))


def _describe_as(
    build: _Build, graph: BuiltGraph, interpreted: BuiltGraph | ErrorRecord
) -> BuiltGraph | ErrorRecord:
    """A graph with what was said of one whose sources are the same; that one's error is its own."""
    if isinstance(interpreted, ErrorRecord):
        message = f"{interpreted.message}; built for {build.gpu}"
        return msgspec.structs.replace(interpreted, message=message)
    untold = interpreted.graph.not_interpreted
    entry = msgspec.structs.replace(graph.graph, not_interpreted=untold)
    return msgspec.structs.replace(graph, graph=entry, checks=interpreted.checks)


def _interpret(build: _Build, graph: BuiltGraph) -> BuiltGraph:
    """Have a graph interpreted, and say what was found, and what could not be asked."""
    question = _make_question(build, graph.graph, build.folder)
    found = interpret(question, build.tools.stand_in, build.sm)
    left_out = (f"{verify.format_sizes(each.sizes)}: {each.reason}" for each in found.left_out)
    untold = (*found.not_interpreted, *left_out)
    entry = msgspec.structs.replace(graph.graph, not_interpreted=untold or msgspec.UNSET)
    return msgspec.structs.replace(graph, graph=entry, checks=(*graph.checks, *found.checks))


def _make_question(build: _Build, entry: Graph, folder: Path) -> InterpretRequest:
    """What the process that interprets a package is asked."""
    tolerance, most = choose_tolerances(build.job.build)
    return InterpretRequest(
        entry=entry,
        package=os.fsencode(folder / UNPACKED),
        program=os.fsencode(build.compared.path),
        keep=os.fsencode(folder / KEEP),
        shipped=os.fsencode(build.scratch),
        points=choose_points(build.compared.traced.unit.bounds),
        tolerance=tolerance,
        most=most,
        seconds=_INTERPRET_SECONDS,
        memory=min(_INTERPRET_MEMORY, build.tools.memory),
        ops=build.compared.ops,
    )


def choose_tolerances(build: Build) -> tuple[float, float]:
    """How far a package may be from its program, as a part of the largest value; and from float32,
    where its program is half as far from that at least.

    In float8 an activation that is a little off is now and then rounded to another of few numbers,
    which the next layers do to all that comes of it. Of a block of FLUX's shape a package was 0.12
    off, and its program 0.09; by the root of the mean square the program was farther than it.
    """
    coarse = verify.COARSE.get(build.quantization or "", 0.0)
    tolerance = max(INTERPRETED_TOLERANCE[build.dtype], coarse)
    return tolerance, 2 * tolerance


def _make_request(build: _Build, folder: Path) -> LowerRequest:
    """What the process that lowers is asked."""
    job, traced = build.job, build.compared.traced
    bounds = traced.unit.bounds
    return LowerRequest(
        program=os.fsencode(build.compared.path),
        folder=os.fsencode(folder),
        sm=job.target.sm or 0,
        measures=bool(find_measuring(job.build.options)),
        inputs=traced.unit.face.inputs,
        bounds={name: (each.low, each.high, each.step) for name, each in bounds.items()},
        kernels=job.build.kernels or (),
        widest=job.widest,
        level=job.target.level,
        options=job.build.options,
        where=f"{job.key[:12]}-{traced.unit.id}",
        root=ARCHIVE if job.plan.source.layout else traced.unit.id,
        spec=traced.spec,
        ops=build.compared.ops,
    )
