"""The whole road of compiling: source, capture, export, lower, describe, check, bundle."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import transformers

from hubaoti import __version__
from hubaoti.artifact import manifest as manifests
from hubaoti.artifact.bundle import Bundle, make_file_entry, write_bundle, write_manifest
from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.schema import BuildRecord, DeviceCode, File, ModelSource
from hubaoti.compiler import elf
from hubaoti.compiler.build_folder import find_build_disk
from hubaoti.compiler.built import BuiltGraph, BuiltUnit
from hubaoti.compiler.constants import save_tensors
from hubaoti.compiler.flash_attention import refuse_unused
from hubaoti.compiler.gpu_build import GpuTools
from hubaoti.compiler.graph_build import build_unit
from hubaoti.compiler.graph_plans import GraphPlan
from hubaoti.compiler.job import Job
from hubaoti.compiler.module_copy import lies_on_gpu
from hubaoti.compiler.parallel import build_all, choose_job_count
from hubaoti.compiler.plan import Plan
from hubaoti.compiler.reports import join_errors
from hubaoti.compiler.stand_in import StandIn
from hubaoti.compiler.targets import derive_requirements
from hubaoti.disk import OUTPUT, TEMPORARY, require_code, require_disk_room
from hubaoti.errors import CompileFailed, HubaotiError
from hubaoti.host.memory import OVERHEAD, Peak, read_available_memory, require_memory
from hubaoti.host.probe import Host
from hubaoti.host.wire import ErrorRecord
from hubaoti.progress import Progress
from hubaoti.runtime.attention_ops import FA3
from hubaoti.runtime.golden import GOLDEN, sample_answers
from hubaoti.runtime.input_checks import describe_layout, has_memory

_ROOM = 64 << 20  # bytes on disk that one graph takes while it is built, at most


def build(
    jobs: Mapping[Path, Job],
    origin: ModelSource,
    host: Host,
    progress: Progress,
    at_once: int | None = None,
    stand_in: StandIn | None = None,
) -> list[Bundle | HubaotiError]:
    """Compile jobs of one plan, each into the bundle whose folder it has; no weight is read.

    One that fails stops no other: in the order of the jobs there is each bundle, whole, or what
    happened to it.

    `progress` is called with the name of each step as it starts. `at_once` graphs are compiled at a
    time, by default as many as memory and cores allow. Jobs for GPUs need the `stand_in`.

    Raises:
        HubaotiError: of a step that failed for all of them; nothing is left behind.
        NotEnoughMemory, DiskFull: there is too little of it, which is seen before.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    plan = next(iter(jobs.values())).plan
    weights = max(_sum_unit_bytes(plan, unit) for unit in plan.units)
    require_memory(weights + OVERHEAD, f"{plan.units[0].id} of {origin.model}")
    at_once = choose_job_count(at_once, len(plan.units) * len(jobs), weights)
    # Of a module on a GPU each unit is copied from there, which a forked process cannot do.
    is_copied = plan.source.live and lies_on_gpu(plan.source.model)
    units_at_once = 1 if is_copied else min(at_once, len(plan.units))
    tools = None
    if stand_in is not None:
        memory = read_available_memory() // at_once
        tools = GpuTools(stand_in, max(1, at_once // units_at_once), memory)
    with Peak.watch() as peak, ExitStack() as ends:
        pending = [_PendingBundle.open(output, job, ends) for output, job in jobs.items()]
        scratches = [each.scratch for each in pending]
        _require_room(scratches, len(plan.units), at_once)
        if tools is not None:
            require_code(find_build_disk(), "set TMPDIR to")

        def one(unit: GraphPlan) -> BuiltUnit:
            found = build_unit([*jobs.values()], unit, scratches, progress, tools)
            errors = [each.rebuild() for each in found.graphs if isinstance(each, ErrorRecord)]
            if len(errors) == len(jobs):
                raise join_errors(errors)
            return found

        built = build_all(plan.units, one, units_at_once, scratches[0], progress)
        record = BuildRecord(
            at=started.isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - clock, 1),
            peak_bytes=peak.bytes,
            host=f"{host.cpu}, {host.cores} cores",
            hubaoti=__version__,
            transformers=transformers.__version__,
        )
        return [
            _finish(bundle, origin, [each.graphs[index] for each in built], built, record)
            for index, bundle in enumerate(pending)
        ]


@dataclass(frozen=True, slots=True)
class _PendingBundle:
    """A bundle in the making: its folder until then; what `end` does puts it where it belongs."""

    output: Path
    job: Job
    scratch: Path
    end: ExitStack

    @classmethod
    def open(cls, output: Path, job: Job, ends: ExitStack) -> _PendingBundle:
        """Begin one, which is removed with the others unless it was ended before."""
        end = ends.enter_context(ExitStack())
        return cls(output, job, end.enter_context(write_bundle(output)), end)


def _require_room(scratches: Sequence[Path], units: int, at_once: int) -> None:
    """See that there is room on the disks; and make the folders for graphs."""
    for scratch in scratches:
        require_disk_room(scratch, _ROOM * units * len(scratches), OUTPUT)
        require_code(scratch, "set -o, or TMPDIR where there is no -o, to")
        (scratch / "graphs").mkdir()
    for folder in ("/tmp", tempfile.gettempdir()):  # ours, and that of g++
        require_disk_room(Path(folder), _ROOM * at_once, TEMPORARY)


def _finish(
    pending: _PendingBundle,
    origin: ModelSource,
    graphs: Sequence[BuiltGraph | ErrorRecord],
    built: Sequence[BuiltUnit],
    record: BuildRecord,
) -> Bundle | HubaotiError:
    """Put one bundle in its place; or what happened to it, of which nothing is left then."""
    try:
        with pending.end:
            whole = [_require_built(each) for each in graphs]
            golden = _write_golden(built, pending.scratch)
            manifest = _make_manifest(pending.job, origin, whole, golden, record)
            write_manifest(pending.scratch, manifest)
        return Bundle.read(pending.output)
    except HubaotiError as error:
        return error


def _require_built(graph: BuiltGraph | ErrorRecord) -> BuiltGraph:
    """A graph that was built; else the error that it met is raised."""
    if isinstance(graph, ErrorRecord):
        raise graph.rebuild()
    return graph


def _make_manifest(
    job: Job,
    origin: ModelSource,
    built: Sequence[BuiltGraph],
    golden: tuple[File, ...],
    record: BuildRecord,
) -> Manifest:
    """The manifest of what was built for one kind of host."""
    graphs = tuple(each.graph for each in built)
    if job.build.attention == FA3 and not any(each.ops for each in built):
        raise refuse_unused(graphs)
    codes = [each.device_code for each in graphs if isinstance(each.device_code, DeviceCode)]
    needs = elf.merge_needs([each.needs for each in built])
    shared = max((each.shared_memory for each in codes), default=None)
    manifest = Manifest(
        schema=manifests.find_oldest_schema(job.build, graphs, job.pins),
        program=job.plan.source.program,
        build=job.build,
        target=job.target,
        key=job.key,
        source=origin,
        requires=derive_requirements(job.target, needs, shared, job.pins),
        graphs=graphs,
        files=(*(file for each in built for file in each.files), *golden),
        checks=tuple(check for each in built for check in each.checks),
        built=record,
    )
    # What we would refuse to read we do not write.
    manifests.parse_manifest(manifest.to_json(), "the new manifest")
    return manifest


def _sum_unit_bytes(plan: Plan, unit: GraphPlan) -> int:
    """The memory of one module of a unit, in bytes.

    Tensors whose values do not lie in it are refused: a graph reads nothing else.
    """
    module, total = plan.source.model.get_submodule(unit.region), 0
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not has_memory(tensor):
            where = f"{unit.region}.{name}".lstrip(".")
            raise CompileFailed(
                f"source: {where} has no plain memory{describe_layout(tensor)}",
                hint="give the module plain tensors: to_dense(), clone()",
            )
        total += tensor.nbytes
    return total


def _write_golden(built: Sequence[BuiltUnit], scratch: Path) -> tuple[File, ...]:
    """The golden answers of all graphs, as one file."""
    answers = {name: tensor for each in built for name, tensor in each.golden.items()}
    if not answers:
        return ()
    save_tensors(sample_answers(answers), scratch / GOLDEN)
    return (make_file_entry(scratch, GOLDEN),)
