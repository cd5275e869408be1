"""The whole road of compiling: source, capture, export, lower, describe, check, bundle."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from hubaoti import __version__
from hubaoti.artifact import manifest as manifests
from hubaoti.artifact.bundle import Bundle, make_file_entry, write_bundle, write_manifest
from hubaoti.artifact.manifest import Manifest
from hubaoti.artifact.requirements import Requirements
from hubaoti.artifact.schema import BuildRecord, File, ModelSource, Target
from hubaoti.compiler import elf
from hubaoti.compiler.constants import save_tensors
from hubaoti.compiler.graph_build import BuiltGraph, build_unit
from hubaoti.compiler.host_code import LEVELS
from hubaoti.compiler.job import Job
from hubaoti.compiler.parallel import build_all, choose_job_count
from hubaoti.compiler.plan import GraphPlan, Plan
from hubaoti.compiler.request import DEFAULT_LEVEL
from hubaoti.disk import OUTPUT, TEMPORARY, require_disk_room
from hubaoti.errors import BadRequest, CompileFailed
from hubaoti.host.match import Refusal, judge_level
from hubaoti.host.memory import OVERHEAD, Peak, require_memory
from hubaoti.host.probe import Host
from hubaoti.progress import Progress
from hubaoti.runtime.golden import GOLDEN, sample_answers
from hubaoti.runtime.input_checks import describe_layout, has_memory

_ROOM = 64 << 20  # bytes on disk that one graph takes while it is built, at most


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
    weights = max(_sum_unit_bytes(job.plan, unit) for unit in job.plan.units)
    require_memory(weights + OVERHEAD, f"{job.plan.units[0].id} of {origin.model}")
    at_once = choose_job_count(jobs, len(job.plan.units), weights, job.device)
    with Peak.watch() as peak, write_bundle(output) as scratch:
        require_disk_room(scratch, _ROOM * len(job.plan.units), OUTPUT)
        for folder in ("/tmp", tempfile.gettempdir()):  # ours, and that of g++
            require_disk_room(Path(folder), _ROOM * at_once, TEMPORARY)
        (scratch / "graphs").mkdir()

        def one(unit: GraphPlan) -> BuiltGraph:
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


def _write_golden(built: Sequence[BuiltGraph], scratch: Path) -> tuple[File, ...]:
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
        **(asdict(needs) if needs else {}),
    )
