"""What an artifact needs against what this host has: every reason.

`judge` reads a manifest's requirements and never its path. Each row of the table is one function
that answers a Refusal (it cannot run here), a Compromise (it runs, and is not made for this host)
or None; a verdict is all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from typing import Any

from packaging.version import Version

from hubaoti.artifact.kernel_variant import KernelHost
from hubaoti.artifact.requirements import Requirements, comes_with_torch, read_version, series
from hubaoti.host.gpu_limits import count_shared_memory
from hubaoti.host.probe import Gpu, Host

NO_KERNEL = "pull an sdpa recipe, which needs no kernel"


class MatchResult(StrEnum):
    """How well an artifact fits a host, best first."""

    EXACT = "exact"
    COMPATIBLE = "compatible"
    INCOMPATIBLE = "incompatible"


@dataclass(frozen=True, slots=True)
class Reason:
    """What an artifact needs, what the host has, and what a person can do about it."""

    need: str
    have: str
    advice: str


@dataclass(frozen=True, slots=True)
class Refusal(Reason):
    """Why an artifact cannot run here: one refusal makes it incompatible."""


@dataclass(frozen=True, slots=True)
class NoKernel(Refusal):
    """Why a kernel that an artifact calls cannot be had here, as its kind of host could."""


@dataclass(frozen=True, slots=True)
class Compromise(Reason):
    """Why an artifact that runs here is compatible and not exact."""


Finding = Refusal | Compromise | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Every reason; `device` is the host's GPU that was chosen, None for a CPU or a refusal."""

    refusals: tuple[Refusal, ...] = ()
    notes: tuple[Compromise, ...] = ()
    device: int | None = None

    @property
    def fit(self) -> MatchResult:
        """Any refusal makes it incompatible, any note compatible."""
        if self.refusals:
            return MatchResult.INCOMPATIBLE
        return MatchResult.COMPATIBLE if self.notes else MatchResult.EXACT

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON has it: fit, device, and all reasons as records."""
        return {"fit": str(self.fit), **asdict(self)}


def judge(requires: Requirements, host: Host, device_index: int | None = None) -> Verdict:
    """Whether an artifact runs on a host, with every reason.

    `device_index` is a place in `host.gpus`. Without it any GPU will do: the verdict is on the one
    that fits best, the first of equals, and if none fits it has the refusals of all of them.
    """
    found = [row(requires, host) for row in _HOST_ROWS]
    device = None
    if requires.device == "cuda":
        device, on_gpu = _choose_gpu(requires, host, device_index)
        found.extend(on_gpu)
    verdict = _make_verdict(found, device)
    return _make_verdict(found, None) if verdict.refusals else verdict


def _make_verdict(found: Iterable[Finding], device: int | None) -> Verdict:
    """Equal findings, as of two GPUs of one kind, are said once."""
    found = dict.fromkeys(found)
    return Verdict(
        refusals=tuple(each for each in found if isinstance(each, Refusal)),
        notes=tuple(each for each in found if isinstance(each, Compromise)),
        device=device,
    )


def judge_gpus(requires: Requirements, gpus: Sequence[Gpu]) -> Verdict:
    """Which of some GPUs fits an artifact best, whatever their host is like.

    If none fits, the verdict has the refusals of all of them: none where there is no GPU.
    """
    found = [
        _make_verdict([row(requires, gpu) for row in _GPU_ROWS], i) for i, gpu in enumerate(gpus)
    ]
    best = min(found, key=rank_verdict, default=Verdict())
    if best.refusals:
        return _make_verdict((each for verdict in found for each in verdict.refusals), None)
    return best


def _choose_gpu(
    requires: Requirements, host: Host, index: int | None
) -> tuple[int | None, list[Finding]]:
    """The GPU that fits best and what was found on it; if none fits, what was found on each."""
    first = index or 0
    chosen = host.gpus if index is None else host.gpus[first : first + 1]
    if not chosen or first < 0:
        return None, [_describe_missing_gpu(requires, host, index)]
    verdict = judge_gpus(requires, chosen)
    device = None if verdict.device is None else first + verdict.device
    return device, [*verdict.refusals, *verdict.notes]


def _describe_missing_gpu(requires: Requirements, host: Host, index: int | None) -> Refusal:
    need = f"an NVIDIA GPU of {_format_arch(requires.sm)}"
    if host.gpus:
        have = f"{len(host.gpus)} of them, counted from 0"
        return Refusal(f"{need} as GPU {index}", have, "choose one of them, or name none")
    said = ("NVML", "CUDA_VISIBLE_DEVICES")
    notes = "".join(f" ({note})" for note in host.notes if note.startswith(said))
    return Refusal(
        need, f"no NVIDIA GPU{notes}", "pull a cpu variant, or use a host that has a GPU"
    )


# The rows of the table that ask the host


def _judge_os(requires: Requirements, host: Host) -> Finding:
    if requires.os == host.os:
        return None
    return Refusal(
        need=f"the operating system {requires.os}",
        have=host.os or "an unknown system",
        advice=f"pull a {host.os} variant, or compile one here",
    )


def _judge_torch(requires: Requirements, host: Host) -> Finding:
    """Same release and local tag: exact; same major.minor, both final: compatible.

    Final is what is no alpha, beta, rc or dev build: those change their C interface from day to
    day. A post-release is final.
    """
    built, here = Version(requires.torch), read_version(host.torch.version if host.torch else None)
    need, have = f"torch {requires.torch}", _describe_torch(host)
    if here is None:
        return Refusal(need, have, f"install torch {series(built)}")
    if built == here:
        return None
    final = not built.is_prerelease and not here.is_prerelease
    if final and series(built) == series(here) and built.epoch == here.epoch:
        return Compromise(need, have, f"install torch {requires.torch} to match exactly")
    alone = here.is_prerelease or series(built) == series(here)  # another variant is no better
    other = "compile one here" if alone else f"pull a torch{series(here)} variant"
    return Refusal(need, have, f"{other}, or install torch {requires.torch}")


def _judge_cuda(requires: Requirements, host: Host) -> Finding:
    """The toolkit of the host's torch: same: exact; same major, not older: compatible."""
    if requires.cuda is None:
        return None
    built = parse_cuda_version(requires.cuda)
    here = parse_cuda_version(host.torch.cuda if host.torch else None)
    need = f"torch built with CUDA {requires.cuda}"
    install = f"install a torch that is built with CUDA {requires.cuda}"
    if here is None:
        advice = f"{install}, or pull a cpu variant"
        return Refusal(need, f"{_describe_torch(host)}, without CUDA", advice)
    have = f"CUDA {here[0]}.{here[1]}"
    if built == here:
        return None
    if built is not None and built[0] == here[0] and built <= here:
        return Compromise(need, have, f"pull a cu{here[0]}{here[1]} variant to match exactly")
    return Refusal(need, have, f"pull a cu{here[0]}{here[1]} variant, or {install}")


def _judge_driver(requires: Requirements, host: Host) -> Finding:
    """The driver serves the CUDA that is needed."""
    needed, here = parse_cuda_version(requires.driver), parse_cuda_version(host.driver_cuda)
    if needed is None or (here is not None and here >= needed):
        return None
    have = f"driver {host.driver}, which serves CUDA {host.driver_cuda}"
    return Refusal(
        need=f"a driver that serves CUDA {requires.driver}",
        have="no NVIDIA driver" if here is None else have,
        advice="install or upgrade the driver, or pull a variant of an older CUDA",
    )


def judge_level(requires: Requirements, host: Host) -> Finding:
    """The host's CPU level is the one built for, or above it in the same family."""
    from archspec.cpu import TARGETS

    built, here = TARGETS.get(requires.level), TARGETS.get(host.level)
    name = f" ({host.cpu})" * (host.cpu != host.level)
    need, have = f"a CPU of level {requires.level}", f"{host.level}{name}"
    if built is None or here is None:
        advice = "upgrade archspec, which does not know both levels, or compile for this host"
        return Refusal(need, have, advice)
    if built == here:
        return None
    if here > built:
        return Compromise(need, have, f"it runs here; one for {host.level} may be faster")
    what = f"{host.level} or below" if built.family == here.family else f"{here.family} machines"
    return Refusal(need, have, f"pull a variant for {what}, or compile one here")


def _judge_minimum(what: str, requires: Requirements, host: Host) -> Finding:
    """The host's C or C++ library is as new as what was built for it."""
    needed, have = getattr(requires, what.lower()), getattr(host, what.lower())
    here = read_version(have)
    if needed is None or (here is not None and here >= Version(needed)):
        return None
    found = f"no {what}" if here is None else f"{what} {have}"
    new = "a newer distribution or container" if what == "glibc" else "a newer libstdc++"
    return Refusal(f"{what} {needed}", found, f"use {new}, or compile on this host")


def _judge_libraries(requires: Requirements, host: Host) -> Finding:
    """Every shared library that the graphs name can be found, or comes with a torch that is not."""
    if host.libraries is None:  # nobody could say
        return None
    needed = {each for each in requires.libraries if host.torch or not comes_with_torch(each)}
    missing = ", ".join(sorted(needed - host.libraries))
    have = "none of that name in torch's folder or where the loader looks"
    advice = f"install the packages that have {missing}"
    return Refusal(f"the libraries {missing}", have, advice) if missing else None


def _judge_kernels(requires: Requirements, host: Host) -> Finding:
    """Every pinned kernel is here, or may be fetched."""
    missing = ", ".join(str(pin) for pin in requires.kernels if pin.id not in host.kernels)
    if not missing or not host.offline:
        return None
    return NoKernel(
        need=f"the kernels {missing}",
        have="no copy of them, and no network: HF_HUB_OFFLINE is set",
        advice="unset HF_HUB_OFFLINE to fetch them, or pull an sdpa recipe",
    )


def _judge_kernel_builds(requires: Requirements, host: Host) -> Finding:
    """Every pinned kernel was built for this torch, its CUDA, and this system."""
    if (torch := host.torch) is None:  # another row says so
        return None
    cuda = torch.cuda if requires.device == "cuda" else None
    here = KernelHost(torch.version, cuda, host.machine, host.os)
    misfits = {pin.repo: pin.list_misfits(here) for pin in requires.kernels}
    built = [
        f"{' and '.join(each)} for the kernel {repo}" for repo, each in misfits.items() if each
    ]
    have = f"{_describe_torch(host)} on {host.machine} {host.os}"
    return NoKernel(", ".join(built), have, NO_KERNEL) if built else None


# The rows that ask one GPU


def _judge_sm(requires: Requirements, gpu: Gpu) -> Finding:
    """Same capability: exact; PTX for this one or a lower: compatible."""
    need, have = _format_arch(requires.sm), f"{_format_arch(gpu.sm)} ({gpu.name})"
    if requires.sm == gpu.sm:
        return None
    advice = _suggest_variant(gpu)
    if requires.ptx is not None and requires.ptx <= gpu.sm:
        return Compromise(need, have, f"the driver compiles its PTX at the first call; {advice}")
    carried = "no PTX" if requires.ptx is None else f"PTX from {_format_arch(requires.ptx)} on"
    return Refusal(f"{need} (carries {carried})", have, advice)


def _judge_shared_memory(requires: Requirements, gpu: Gpu) -> Finding:
    """A block may have the shared memory that the largest one takes."""
    most = count_shared_memory(gpu.sm)
    if requires.shared_memory is None or requires.shared_memory <= most:
        return None
    return Refusal(
        need=f"{requires.shared_memory} bytes of shared memory a block",
        have=f"{most} bytes on {_format_arch(gpu.sm)} ({gpu.name})",
        advice=_suggest_variant(gpu),
    )


def _judge_kernel_archs(requires: Requirements, gpu: Gpu) -> Finding:
    """Every pinned kernel was built for this capability."""
    built = {pin.repo: pin.describe_archs() for pin in requires.kernels if not pin.supports(gpu.sm)}
    need = ", ".join(f"{archs} for the kernel {repo}" for repo, archs in built.items())
    have = f"{_format_arch(gpu.sm)} ({gpu.name})"
    return NoKernel(need, have, NO_KERNEL) if built else None


_HOST_ROWS: tuple[Callable[[Requirements, Host], Finding], ...] = (
    _judge_os,
    _judge_torch,
    _judge_cuda,
    _judge_driver,
    judge_level,
    *(partial(_judge_minimum, what) for what in ("glibc", "GLIBCXX", "CXXABI")),
    _judge_libraries,
    _judge_kernels,
    _judge_kernel_builds,
)
_GPU_ROWS: tuple[Callable[[Requirements, Gpu], Finding], ...] = (
    _judge_sm,
    _judge_shared_memory,
    _judge_kernel_archs,
)


def rank_verdict(verdict: Verdict) -> int:
    """Its place among all fits: 0 is exact, the best."""
    return tuple(MatchResult).index(verdict.fit)


def parse_cuda_version(text: str | None) -> tuple[int, int] | None:
    """The first two numbers of a CUDA version; None where there are none."""
    found = re.match(r"([0-9]{1,4})\.([0-9]{1,4})", text or "")
    return (int(found[1]), int(found[2])) if found else None


def _describe_torch(host: Host) -> str:
    return f"torch {host.torch.version}" if host.torch else "no torch"


def _format_arch(sm: int | None) -> str:
    return f"sm_{sm}"


def _suggest_variant(gpu: Gpu) -> str:
    if gpu.sm == 0:
        return "see what nvidia-smi says of this GPU"
    return f"pull an sm{gpu.sm} variant, or compile one here"
