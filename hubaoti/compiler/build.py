"""The whole road of compiling: source, export, lower, describe, check, bundle."""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from safetensors.torch import save_file

from hubaoti import __version__
from hubaoti import manifest as manifests
from hubaoti.bundle import Bundle, file_entry, write_manifest, writing
from hubaoti.compiler import constants, elf, source, verify
from hubaoti.compiler.export import Exported, export
from hubaoti.compiler.inductor import LEVELS, lower, options_for
from hubaoti.compiler.request import DEFAULT_LEVEL, Range, Request
from hubaoti.compiler.shapes import bounded
from hubaoti.errors import BadRequest
from hubaoti.host import Host
from hubaoti.manifest import Build, Built, Check, File, Graph, Manifest, Source, Target, key_of
from hubaoti.match import Refusal, judge_level
from hubaoti.package import members_of, unpack_all
from hubaoti.requirements import Requirements
from hubaoti.runtime.graph import open_graph
from hubaoti.steps import Say

ROOT = "root"


@dataclass(frozen=True, slots=True)
class Lowered:
    """A compiled graph as the manifest has it, what its library needs, and how it was checked."""

    graph: Graph
    needs: elf.Needs
    files: tuple[File, ...]
    checks: tuple[Check, ...] = ()


def build(
    folder: Path, origin: Source, request: Request, host: Host, output: Path, say: Say
) -> Bundle:
    """Compile the model in `folder` into the bundle `output`; no weight is read.

    `say` is called with the name of each step as it starts.

    Raises:
        HubaotiError: of the step that failed; nothing is left behind.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    device = device_of(request.device)
    target = target_of(host, device, request.level)
    with writing(output) as scratch:
        say("source")
        model = source.load(folder, request.task, request.dtype, device)
        dims = bounded(request.dims, model.default_dims, model.positions)
        verify.attempt(model, dims, device)
        made = build_of(model, dims, target)
        lowered = lower_and_check(model, dims, target, made.options, scratch, say)
        manifest = Manifest(
            program=model.program,
            build=made,
            target=target,
            key=key_of(model.program, made, target),
            source=origin,
            requires=requirements(target, lowered.needs),
            graphs=(lowered.graph,),
            files=lowered.files,
            checks=lowered.checks,
            built=Built(
                at=started.isoformat(timespec="seconds"),
                seconds=round(time.perf_counter() - clock, 1),
                peak_bytes=peak_bytes(),
                host=f"{host.cpu}, {host.cores} cores",
                hubaoti=__version__,
                transformers=transformers.__version__,
            ),
        )
        # What we would refuse to read we do not write.
        manifests.parse(manifest.to_json(), "the new manifest")
        write_manifest(scratch, manifest)
    return Bundle.read(output)


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


def build_of(model: source.Source, dims: dict[str, Range], target: Target) -> Build:
    """The options, as the manifest and the key have them."""
    return Build(
        regions="none",
        dims={name: (sizes.low, sizes.high, sizes.step) for name, sizes in dims.items()},
        dtype=model.dtype,
        attention=model.attention,
        options=options_for(target),
    )


def lower_and_check(
    model: source.Source,
    dims: dict[str, Range],
    target: Target,
    options: dict[str, Any],
    scratch: Path,
    say: Say,
) -> Lowered:
    """Export and compile the one graph of a whole model, then compare it with eager."""
    device = next(model.model.parameters()).device
    say("export")
    exported = export(model, dims, device)
    say("compile")
    package = scratch / "graphs" / f"{ROOT}.pt2"
    package.parent.mkdir()
    lower(exported.program, target.level, options, package, say)
    say("check")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        unpacked = Path(folder)
        unpack_all(package, unpacked)
        entry = bare_graph(file_entry(scratch, f"graphs/{ROOT}.pt2"), package, exported, dims)
        lowered = described(model, entry, exported, unpacked, scratch)
        graph = open_graph(unpacked, lowered.graph, device)
        verify.fill(model.model)
        graph.bind(verify.constants_of(model.model, lowered.graph, scratch))
        return replace(lowered, checks=verify.verify(graph, model, dims, device))


def bare_graph(file: File, package: Path, exported: Exported, dims: dict[str, Range]) -> Graph:
    """The manifest's graph, its constants not yet known."""
    return Graph(
        id=ROOT,
        file=file.path,
        sha256=file.sha256,
        size=file.size,
        members=members_of(package),
        modules=("",),
        bounds={name: (sizes.low, sizes.high) for name, sizes in dims.items()},
        call={
            "args": [],
            "kwargs": {item.name: {"tensor": at} for at, item in enumerate(exported.inputs)},
        },
        inputs=exported.inputs,
        outputs=exported.outputs,
        constants=(),
    )


def described(
    model: source.Source, bare: Graph, exported: Exported, unpacked: Path, scratch: Path
) -> Lowered:
    """Add what only the compiled library can tell: the constants that it reads, and its needs."""
    device = next(model.model.parameters()).device
    fqns = open_graph(unpacked, bare, device).constant_fqns()
    listed, shipped = constants.describe(fqns, model.model, exported.program)
    files: tuple[File, ...] = ()
    if shipped:
        save_file(shipped, scratch / constants.BUFFERS)
        files = (file_entry(scratch, constants.BUFFERS),)
    libraries = [unpacked / m.path for m in bare.members if m.path.endswith(".wrapper.so")]
    return Lowered(
        msgspec.structs.replace(bare, constants=listed), elf.needs_of(libraries[0]), files
    )


def peak_bytes() -> int:
    """The most memory that this process and its largest child ever held together, at most."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return (own + child) << 10
