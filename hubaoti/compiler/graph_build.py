"""One unit, built: given memory, traced, and lowered, described, checked for each kind of host."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from hubaoti.artifact.package import unpack_all
from hubaoti.compiler import elf, verify
from hubaoti.compiler.built import BuiltGraph, BuiltUnit, fill_tied_constants, record_golden
from hubaoti.compiler.callspec import ARCHIVE
from hubaoti.compiler.gpu_build import GpuTools, build_for_gpus
from hubaoti.compiler.graph_plans import GraphPlan
from hubaoti.compiler.inductor import lower
from hubaoti.compiler.job import Job
from hubaoti.compiler.materialize import give_memory_back, lend_memory
from hubaoti.compiler.traced import (
    CPU,
    Traced,
    add_package,
    describe_package,
    draft_graph,
    make_trial,
    trace,
)
from hubaoti.errors import HubaotiError
from hubaoti.host.wire import ErrorRecord
from hubaoti.progress import Progress
from hubaoti.runtime.graph import open_graph
from hubaoti.runtime.graph_ops import describe_schemas


def build_unit(
    jobs: Sequence[Job],
    unit: GraphPlan,
    scratches: Sequence[Path],
    progress: Progress,
    tools: GpuTools | None = None,
) -> BuiltUnit:
    """Compile one unit of a plan for the target of each job, into the bundle in its scratch.

    The targets are one CPU, or GPUs, for which it takes `tools`.

    Raises:
        HubaotiError: of the step that failed; the message names the unit.
    """
    source = jobs[0].plan.source
    modules = [source.model.get_submodule(path) for path in (unit.modules[0], unit.modules[-1])]
    with _name_unit(unit), lend_memory(modules, CPU, source.live) as (module, twin):
        progress(f"export {unit.id}")
        traced = trace(jobs, unit, module, twin)
        if jobs[0].target.device == "cuda":
            assert tools is not None
            built = build_for_gpus(jobs, traced, scratches, progress, tools)
            return _name_failures(built, unit)
        return _lower_and_check(jobs[0], traced, scratches[0], progress)


@contextmanager
def _name_unit(unit: GraphPlan) -> Iterator[None]:
    """Around work on a unit: errors name it behind their step."""
    try:
        yield
    except HubaotiError as error:
        raise _add_name(error, unit) from error


def _add_name(error: HubaotiError, unit: GraphPlan) -> HubaotiError:
    """An error with its unit's name behind its step."""
    step, colon, reason = str(error).partition(": ")
    message = f"{step} {unit.id}: {reason}" if colon else f"{unit.id}: {step}"
    return type(error)(message, hint=f"{error.hint}{_advise_smaller_cache(unit)}")


def _name_failures(built: BuiltUnit, unit: GraphPlan) -> BuiltUnit:
    """What was built, in which errors name the unit."""
    graphs = [
        ErrorRecord.of(_add_name(each.rebuild(), unit), *each.notes)
        if isinstance(each, ErrorRecord)
        else each
        for each in built.graphs
    ]
    return msgspec.structs.replace(built, graphs=tuple(graphs))


def _advise_smaller_cache(unit: GraphPlan) -> str:
    """What to do where only the form for a full window fails."""
    cache = unit.face.cache
    if cache is None or cache.window is None:
        return ""
    return f"; a cache below the window needs no such graph: --dim cache=1:{cache.window - 1}"


def _lower_and_check(job: Job, traced: Traced, scratch: Path, progress: Progress) -> BuiltUnit:
    """From a program to a graph for this machine's CPU that was compared with eager."""
    unit = traced.unit
    progress(f"compile {unit.id}")
    package = scratch / "graphs" / f"{unit.id}.pt2"
    where = f"{job.key[:12]}-{unit.id}"
    root = ARCHIVE if job.plan.source.layout else unit.id
    program = traced.exported.program
    with give_memory_back(traced.place.module):
        lower(program, job.target.level, job.build.options, package, where, traced.spec, root)
    progress(f"check {unit.id}")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        unpack_all(package, Path(folder))
        return _check_graph(job, traced, Path(folder), scratch)


def _check_graph(job: Job, traced: Traced, unpacked: Path, scratch: Path) -> BuiltUnit:
    """Describe a compiled graph, compare it with eager, and ask it the golden questions."""
    source, place = job.plan.source, traced.place
    bare = add_package(draft_graph(traced.unit), scratch)
    opened = open_graph(unpacked, bare, CPU)
    read = opened.read_constant_fqns(), opened.read_call_spec()
    entry, files = describe_package(traced, source, read, scratch)
    entry = msgspec.structs.replace(entry, schemas=describe_schemas(unpacked, entry))
    graph = open_graph(unpacked, entry, CPU)
    graph.bind(verify.share_constants(place.module, entry, scratch))
    checks = verify.verify(graph, make_trial(source, traced.unit, entry, place))
    by_rule = not source.live and not place.made
    if by_rule:
        fill_tied_constants(entry, place.module)
    entry, answers = record_golden(graph, scratch, by_rule)
    libraries = [unpacked / m.path for m in entry.members if m.path.endswith(".wrapper.so")]
    built = BuiltGraph(entry, elf.read_needs(libraries[0]), files, checks)
    return BuiltUnit((built,), answers)
