"""The kinds of host to build for: this machine's, or those of GPUs that need not be here."""

from __future__ import annotations

from dataclasses import asdict

import torch

from hubaoti.artifact.kernel_pin import KernelPin
from hubaoti.artifact.requirements import Requirements
from hubaoti.artifact.schema import Target
from hubaoti.compiler import elf
from hubaoti.compiler.host_code import LEVELS
from hubaoti.compiler.request import DEFAULT_LEVEL, CompileRequest, parse_capabilities
from hubaoti.errors import BadRequest
from hubaoti.host.match import Refusal, judge_level
from hubaoti.host.probe import Host
from hubaoti.runtime.recipes import check_recipe


def choose_targets(host: Host, request: CompileRequest) -> list[Target]:
    """The kinds of host to build for: of each capability that was asked, else of the device.

    Host code runs here while graphs are checked, so this host must be of its level.

    Raises:
        BadRequest: the level is unknown, or above this host's; this torch builds for no GPU, or
            there is no such device.
        CompileFailed: one of them cannot run the quantization.
    """
    level = request.level or choose_level(host)
    if level not in LEVELS:
        raise BadRequest(f"unknown level {level!r}", hint=f"one of: {', '.join(LEVELS)}")
    capabilities = request.capabilities
    if request.device and request.device != "cpu":
        capabilities = (_read_capability(request.device),)
    targets = [_make_target(host, level, sm) for sm in capabilities or (None,)]
    for target in targets:
        if request.quantize:
            check_recipe(request.quantize, target.device, target.sm or 0)
        refusal = judge_level(derive_requirements(target), host)
        if isinstance(refusal, Refusal):
            raise BadRequest(
                f"a graph for {refusal.need} cannot be checked here: {refusal.have}",
                hint=f"compile for {choose_level(host)}, or on another machine",
            )
    return targets


def _read_capability(name: str) -> int:
    """The compute capability of a GPU of this machine, 90 for 9.0.

    Raises:
        BadRequest: this torch has no such device, or it is one that graphs are not built for.
    """
    device = torch.device(name)
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise BadRequest(
            f"this torch ({torch.__version__}) sees no {name}",
            hint="compile for a GPU that is not here: --for sm90; or see: hubaoti doctor",
        )
    major, minor = torch.cuda.get_device_capability(device)
    (capability,) = parse_capabilities([10 * major + minor])
    return capability


def _make_target(host: Host, level: str, sm: int | None) -> Target:
    """The kind of host with this torch, of a CPU level, and with a GPU of a capability."""
    if sm is not None and torch.version.cuda is None:
        raise BadRequest(
            f"this torch ({torch.__version__}) is a CPU build, and builds for no GPU",
            hint=f"install one that is built with CUDA: pip install --force-reinstall "
            f"torch=={torch.__version__.partition('+')[0]}; see: hubaoti doctor --build",
        )
    return Target(
        device="cpu" if sm is None else "cuda",
        os=host.os,
        level=level,
        torch=str(torch.__version__),
        git=str(torch.version.git_version),
        cuda=None if sm is None else torch.version.cuda,
        sm=sm,
    )


def choose_level(host: Host) -> str:
    """The level that most machines of a fleet have, or this host's where that is lower."""
    if host.machine != "x86_64":
        return "aarch64"
    return min(DEFAULT_LEVEL, host.level)


def derive_requirements(
    target: Target,
    needs: elf.Needs | None = None,
    shared_memory: int | None = None,
    kernels: tuple[KernelPin, ...] = (),
) -> Requirements:
    """What `match` will judge; `shared_memory` is in bytes, of the largest block.

    Native CUDA code runs on any driver of the toolkit's major version. Source: CUDA Compatibility,
    "minor version compatibility".
    """
    return Requirements(
        device=target.device,
        os=target.os,
        torch=target.torch,
        level=target.level,
        cuda=target.cuda,
        driver=f"{target.cuda.split('.')[0]}.0" if target.cuda else None,
        sm=target.sm,
        shared_memory=shared_memory,
        kernels=kernels,
        **(asdict(needs) if needs else {}),
    )
