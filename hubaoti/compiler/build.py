"""The whole road of compiling: source, capture, export, lower, describe, check, bundle."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch
import transformers

from hubaoti import __version__
from hubaoti import manifest as manifests
from hubaoti.bundle import Bundle, file_entry, write_manifest, writing
from hubaoti.compiler import elf
from hubaoti.compiler.constants import save
from hubaoti.compiler.inductor import LEVELS, options_for
from hubaoti.compiler.jobs import build_all, how_many
from hubaoti.compiler.plan import Plan, Unit
from hubaoti.compiler.request import DEFAULT_LEVEL, Request
from hubaoti.compiler.unit import Built as BuiltUnit
from hubaoti.compiler.unit import build_unit
from hubaoti.disks import OUTPUT, TEMPORARY, require_room
from hubaoti.errors import BadRequest, CompileFailed
from hubaoti.host import Host
from hubaoti.manifest import Build, Built, File, Manifest, Source, Target, key_of
from hubaoti.match import Refusal, judge_level
from hubaoti.memory import OVERHEAD, Peak, require_memory
from hubaoti.requirements import Requirements
from hubaoti.runtime.checks import beside_memory, has_memory
from hubaoti.runtime.golden import GOLDEN, kept
from hubaoti.runtime.template import takes_containers, words_of
from hubaoti.steps import Say

# Of what hubaoti puts into graphs beside a model's code: attention, caches, quantized weights,
# templates. It is raised when one of them changes, so that no key stands for two programs; of what
# a change does not touch the version stays, so that what is built already is found.
VERSION = 2
CAREFUL = 3  # looks at the numbers that choose rows, and carries what is left in containers
BY_ITSELF = 4  # of a layout: takes inputs of any strides
ROOM = 64 << 20  # bytes on disk that one graph takes while it is built, at most


@dataclass(frozen=True, slots=True)
class Job:
    """A plan and all that its key is made of; `key` says whether it is already built."""

    plan: Plan
    build: Build
    target: Target
    device: torch.device

    @classmethod
    def of(cls, plan: Plan, request: Request, target: Target, device: torch.device) -> Job:
        """The job that a request asks for."""
        return cls(plan, build_of(plan, request, target), target, device)

    @property
    def key(self) -> str:
        """The sha256 of program, build and target."""
        return key_of(self.plan.source.program, self.build, self.target)


def build(
    job: Job, origin: Source, host: Host, output: Path, say: Say, jobs: int | None = None
) -> Bundle:
    """Compile a job into the bundle `output`; no weight is read.

    `say` is called with the name of each step as it starts. `jobs` units are compiled at a time, by
    default as many as memory and cores allow.

    Raises:
        HubaotiError: of the step that failed; nothing is left behind.
        NotEnoughMemory, DiskFull: there is too little of it, which is seen before.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    for unit in job.plan.units:
        refuse_without_memory(job.plan, unit)
    weights = max(bytes_of(job.plan, unit) for unit in job.plan.units)
    require_memory(weights + OVERHEAD, f"{job.plan.units[0].id} of {origin.model}")
    at_once = how_many(jobs, len(job.plan.units), weights, job.device)
    with Peak.watched() as peak, writing(output) as scratch:
        require_room(scratch, ROOM * len(job.plan.units), OUTPUT)
        for folder in ("/tmp", tempfile.gettempdir()):  # ours, and that of g++
            require_room(Path(folder), ROOM * at_once, TEMPORARY)
        (scratch / "graphs").mkdir()

        def one(unit: Unit) -> BuiltUnit:
            return build_unit(job, unit, scratch, say)

        built = build_all(job.plan.units, one, at_once, scratch, say)
        files = write_golden(built, scratch)
        graphs = tuple(each.graph for each in built)
        manifest = Manifest(
            schema=manifests.schema_of(graphs),
            program=job.plan.source.program,
            build=job.build,
            target=job.target,
            key=job.key,
            source=origin,
            requires=requirements(job.target, needs_of(built)),
            graphs=graphs,
            files=(*(file for each in built for file in each.files), *files),
            checks=tuple(check for each in built for check in each.checks),
            built=Built(
                at=started.isoformat(timespec="seconds"),
                seconds=round(time.perf_counter() - clock, 1),
                peak_bytes=peak.bytes,
                host=f"{host.cpu}, {host.cores} cores",
                hubaoti=__version__,
                transformers=transformers.__version__,
            ),
        )
        # What we would refuse to read we do not write.
        manifests.parse(manifest.to_json(), "the new manifest")
        write_manifest(scratch, manifest)
    return Bundle.read(output)


def refuse_without_memory(plan: Plan, unit: Unit) -> None:
    """Refuse tensors whose values are not what lies in their memory: a graph reads nothing else.

    Raises:
        CompileFailed: with the tensor's name.
    """
    module = plan.source.model.get_submodule(unit.region)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not has_memory(tensor):
            where = f"{unit.region}.{name}".lstrip(".")
            raise CompileFailed(
                f"source: {where} has no plain memory{beside_memory(tensor)}",
                hint="give the module plain tensors: to_dense(), clone()",
            )


def bytes_of(plan: Plan, unit: Unit) -> int:
    """The memory of one module of a unit, in bytes."""
    module = plan.source.model.get_submodule(unit.region)
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def write_golden(built: Sequence[BuiltUnit], scratch: Path) -> tuple[File, ...]:
    """The golden answers of all graphs, as one file."""
    answers = {name: tensor for each in built for name, tensor in each.golden.items()}
    if not answers:
        return ()
    save(kept(answers), scratch / GOLDEN)
    return (file_entry(scratch, GOLDEN),)


def needs_of(built: Sequence[BuiltUnit]) -> elf.Needs:
    """What all libraries need together."""
    return elf.together([each.needs for each in built])


def device_of(name: str) -> torch.device:
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


def target_of(host: Host, device: torch.device, level: str | None) -> Target:
    """The kind of host to build for; graphs are checked here, so this host must be of it.

    Raises:
        BadRequest: the level is unknown, or above this host's.
    """
    level = level or default_level(host)
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
    refusal = judge_level(requirements(target), host)
    if isinstance(refusal, Refusal):
        raise BadRequest(
            f"a graph for {refusal.need} cannot be checked here: {refusal.have}",
            hint=f"compile for {default_level(host)}, or on another machine",
        )
    return target


def default_level(host: Host) -> str:
    """The level that most machines of a fleet have, or this host's where that is lower."""
    if host.machine != "x86_64":
        return "aarch64"
    return min(DEFAULT_LEVEL, host.level)


def requirements(target: Target, needs: elf.Needs | None = None) -> Requirements:
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


def build_of(plan: Plan, request: Request, target: Target) -> Build:
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
        options=options_for(target) | request.inductor,
        version=version_of(plan),
        layout=request.layout or msgspec.UNSET,  # type: ignore[arg-type]
    )


def version_of(plan: Plan) -> int:
    """The version of what is put into the graphs of a plan."""
    if plan.source.layout is not None:
        return BY_ITSELF
    # As users call a model's own forward: positions left out, flags that say nothing given or not.
    as_called = plan.source.program.task == "forward" and not plan.source.live
    return CAREFUL if as_called or any(map(needs_care, plan.units)) else VERSION


def needs_care(unit: Unit) -> bool:
    """Whether a graph takes numbers that may choose rows, floats that were told from whole numbers
    only since, or what its module may write into."""
    cache = unit.face.cache
    inputs = [each for at, each in enumerate(unit.face.inputs) if not cache or at != cache.position]
    chosen = any(each.values == "position" or each.values.startswith("any<") for each in inputs)
    template = unit.face.template
    return chosen or "float" in words_of(template) or takes_containers(template)
