"""The whole road of compiling: source, capture, export, lower, describe, check, bundle."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
import transformers

from hubaoti import __version__
from hubaoti.artifact import manifest as manifests
from hubaoti.artifact.bundle import Bundle, make_file_entry, write_bundle, write_manifest
from hubaoti.artifact.manifest import (
    Build,
    BuildRecord,
    File,
    Manifest,
    ModelSource,
    Target,
    compute_key,
)
from hubaoti.artifact.requirements import Requirements
from hubaoti.compiler import elf
from hubaoti.compiler.constants import save_tensors
from hubaoti.compiler.graph_build import BuiltGraph as BuiltUnit
from hubaoti.compiler.graph_build import build_unit
from hubaoti.compiler.inductor import LEVELS, choose_inductor_options
from hubaoti.compiler.parallel import build_all, choose_job_count
from hubaoti.compiler.plan import GraphPlan, Plan
from hubaoti.compiler.request import DEFAULT_LEVEL, CompileRequest
from hubaoti.disk import OUTPUT, TEMPORARY, require_disk_room
from hubaoti.errors import BadRequest, CompileFailed
from hubaoti.host.match import Refusal, judge_level
from hubaoti.host.memory import OVERHEAD, Peak, require_memory
from hubaoti.host.probe import Host
from hubaoti.progress import Progress
from hubaoti.runtime.call_template import collect_template_words, takes_containers
from hubaoti.runtime.golden import GOLDEN, sample_answers
from hubaoti.runtime.input_checks import describe_layout, has_memory

# Of what hubaoti puts into graphs beside a model's code: attention, caches, quantized weights,
# templates. It is raised when one of them changes, so that no key stands for two programs; of what
# a change does not touch the version stays, so that what is built already is found.
_VERSION = 2
_CAREFUL = 3  # looks at the numbers that choose rows, and carries what is left in containers
_BY_ITSELF = 4  # of a layout: takes inputs of any strides
_ROOM = 64 << 20  # bytes on disk that one graph takes while it is built, at most


@dataclass(frozen=True, slots=True)
class Job:
    """A plan and all that its key is made of; `key` says whether it is already built."""

    plan: Plan
    build: Build
    target: Target
    device: torch.device

    @classmethod
    def of(cls, plan: Plan, request: CompileRequest, target: Target, device: torch.device) -> Job:
        """The job that a request asks for."""
        return cls(plan, describe_build(plan, request, target), target, device)

    @property
    def key(self) -> str:
        """The sha256 of program, build and target."""
        return compute_key(self.plan.source.program, self.build, self.target)


def build(
    job: Job,
    origin: ModelSource,
    host: Host,
    output: Path,
    progress: Progress,
    jobs: int | None = None,
) -> Bundle:
    """Compile a job into the bundle `output`; no weight is read.

    `progress` is called with the name of each step as it starts. `jobs` units are compiled at a
    time, by default as many as memory and cores allow.

    Raises:
        HubaotiError: of the step that failed; nothing is left behind.
        NotEnoughMemory, DiskFull: there is too little of it, which is seen before.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    for unit in job.plan.units:
        _refuse_without_memory(job.plan, unit)
    weights = max(_sum_unit_bytes(job.plan, unit) for unit in job.plan.units)
    require_memory(weights + OVERHEAD, f"{job.plan.units[0].id} of {origin.model}")
    at_once = choose_job_count(jobs, len(job.plan.units), weights, job.device)
    with Peak.watch() as peak, write_bundle(output) as scratch:
        require_disk_room(scratch, _ROOM * len(job.plan.units), OUTPUT)
        for folder in ("/tmp", tempfile.gettempdir()):  # ours, and that of g++
            require_disk_room(Path(folder), _ROOM * at_once, TEMPORARY)
        (scratch / "graphs").mkdir()

        def one(unit: GraphPlan) -> BuiltUnit:
            return build_unit(job, unit, scratch, progress)

        built = build_all(job.plan.units, one, at_once, scratch, progress)
        files = _write_golden(built, scratch)
        graphs = tuple(each.graph for each in built)
        needs = elf.merge_needs([each.needs for each in built])
        manifest = Manifest(
            schema=manifests.find_oldest_schema(graphs),
            program=job.plan.source.program,
            build=job.build,
            target=job.target,
            key=job.key,
            source=origin,
            requires=derive_requirements(job.target, needs),
            graphs=graphs,
            files=(*(file for each in built for file in each.files), *files),
            checks=tuple(check for each in built for check in each.checks),
            built=BuildRecord(
                at=started.isoformat(timespec="seconds"),
                seconds=round(time.perf_counter() - clock, 1),
                peak_bytes=peak.bytes,
                host=f"{host.cpu}, {host.cores} cores",
                hubaoti=__version__,
                transformers=transformers.__version__,
            ),
        )
        # What we would refuse to read we do not write.
        manifests.parse_manifest(manifest.to_json(), "the new manifest")
        write_manifest(scratch, manifest)
    return Bundle.read(output)


def _refuse_without_memory(plan: Plan, unit: GraphPlan) -> None:
    """Refuse tensors whose values are not what lies in their memory: a graph reads nothing else.

    Raises:
        CompileFailed: with the tensor's name.
    """
    module = plan.source.model.get_submodule(unit.region)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not has_memory(tensor):
            where = f"{unit.region}.{name}".lstrip(".")
            raise CompileFailed(
                f"source: {where} has no plain memory{describe_layout(tensor)}",
                hint="give the module plain tensors: to_dense(), clone()",
            )


def _sum_unit_bytes(plan: Plan, unit: GraphPlan) -> int:
    """The memory of one module of a unit, in bytes."""
    module = plan.source.model.get_submodule(unit.region)
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _write_golden(built: Sequence[BuiltUnit], scratch: Path) -> tuple[File, ...]:
    """The golden answers of all graphs, as one file."""
    answers = {name: tensor for each in built for name, tensor in each.golden.items()}
    if not answers:
        return ()
    save_tensors(sample_answers(answers), scratch / GOLDEN)
    return (make_file_entry(scratch, GOLDEN),)


def resolve_device(name: str) -> torch.device:
    """The device with its index, where it has one.

    Raises:
        BadRequest: this torch has no such device.
    """
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise BadRequest(
            f"this torch ({torch.__version__}) sees no {name}", hint="see: hubaoti doctor"
        )
    return torch.device("cuda", device.index or 0)


def choose_target(host: Host, device: torch.device, level: str | None) -> Target:
    """The kind of host to build for; graphs are checked here, so this host must be of it.

    Raises:
        BadRequest: the level is unknown, or above this host's.
    """
    level = level or choose_level(host)
    if level not in LEVELS:
        raise BadRequest(f"unknown level {level!r}", hint=f"one of: {', '.join(LEVELS)}")
    cuda = device.type == "cuda"
    major, minor = torch.cuda.get_device_capability(device) if cuda else (0, 0)
    target = Target(
        device="cuda" if cuda else "cpu",
        os=host.os,
        level=level,
        torch=str(torch.__version__),
        git=str(torch.version.git_version),
        cuda=torch.version.cuda if cuda else None,
        sm=10 * major + minor if cuda else None,
    )
    refusal = judge_level(derive_requirements(target), host)
    if isinstance(refusal, Refusal):
        raise BadRequest(
            f"a graph for {refusal.need} cannot be checked here: {refusal.have}",
            hint=f"compile for {choose_level(host)}, or on another machine",
        )
    return target


def choose_level(host: Host) -> str:
    """The level that most machines of a fleet have, or this host's where that is lower."""
    if host.machine != "x86_64":
        return "aarch64"
    return min(DEFAULT_LEVEL, host.level)


def derive_requirements(target: Target, needs: elf.Needs | None = None) -> Requirements:
    """What `match` will judge. Native CUDA code runs on any driver of the toolkit's major version.

    Source: CUDA Compatibility, "minor version compatibility".
    """
    return Requirements(
        device=target.device,
        os=target.os,
        torch=target.torch,
        level=target.level,
        cuda=target.cuda,
        driver=f"{target.cuda.split('.')[0]}.0" if target.cuda else None,
        sm=target.sm,
        glibc=needs.glibc if needs else None,
        glibcxx=needs.glibcxx if needs else None,
        cxxabi=needs.cxxabi if needs else None,
        libraries=needs.libraries if needs else (),
    )


def describe_build(plan: Plan, request: CompileRequest, target: Target) -> Build:
    """The options, as the manifest and the key have them."""
    return Build(
        regions=plan.source.regions,
        dims={name: (sizes.low, sizes.high, sizes.step) for name, sizes in plan.dims.items()},
        dtype=plan.source.dtype,
        attention=plan.source.attention,
        quantization=request.quantize,
        mode=request.mode,
        buckets=tuple(
            {name: (sizes.low, sizes.high) for name, sizes in bucket.items()}
            for bucket in request.buckets
        ),
        options={**choose_inductor_options(target), **cast("dict[str, Any]", request.inductor)},
        version=_choose_build_version(plan),
        layout=request.layout or msgspec.UNSET,  # type: ignore[arg-type]
    )


def _choose_build_version(plan: Plan) -> int:
    """The version of what is put into the graphs of a plan."""
    if plan.source.layout is not None:
        return _BY_ITSELF
    # As users call a model's own forward: positions left out, flags that say nothing given or not.
    as_called = plan.source.program.task == "forward" and not plan.source.live
    return _CAREFUL if as_called or any(map(_needs_care, plan.units)) else _VERSION


def _needs_care(unit: GraphPlan) -> bool:
    """Whether a graph takes numbers that may choose rows, floats that were told from whole numbers
    only since, or what its module may write into."""
    cache = unit.face.cache
    inputs = [
        each for index, each in enumerate(unit.face.inputs) if not cache or index != cache.position
    ]
    chosen = any(each.values == "position" or each.values.startswith("any<") for each in inputs)
    template = unit.face.template
    return chosen or "float" in collect_template_words(template) or takes_containers(template)
