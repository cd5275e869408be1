"""KernelVariant: the kind of host that a build of a kernel is for, in kernels' own grammar.

    torch2.11 builds   "torch" M N ["-cxx11" | "-cxx98"] "-" backend "-" machine "-" os
    stable ABI builds  "torch-stable-abi" M N "-" backend "-" machine "-" os

    torch211-cxx11-cu130-x86_64-linux    torch-stable-abi29-cu130-x86_64-linux    torch213-cpu-…

The major version has one digit, as there. What names no torch (`torch-universal`) has no native
ops, so it is none of these. `str` and `parse` are inverses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from packaging.version import Version

from hubaoti.errors import BadRequest

_GRAMMAR = re.compile(
    r"torch(?P<stable>-stable-abi)?(?P<major>[1-9])(?P<minor>0|[1-9][0-9]{0,2})"
    r"(?P<abi>-cxx(?:11|98))?-(?P<backend>cpu|cu[1-9][0-9]{1,2})"
    r"-(?P<machine>[a-z0-9]+(?:_[a-z0-9]+)*)-(?P<os>linux|darwin|windows)"
)
_LONGEST = 100  # characters
_LEVEL = re.compile(r"_v[0-9]+$")  # what archspec's name of a level has behind its family's


@dataclass(frozen=True, slots=True)
class KernelVariant:
    """A build's torch ("2.11"; the oldest one where it is `stable`), C++ ABI, backend, machine, os.

    `abi` is "cxx11", "cxx98" or None; `backend` is "cpu" or such as "cu130".
    """

    torch: str
    backend: str
    machine: str
    os: str
    stable: bool = False
    abi: str | None = None

    @classmethod
    def parse(cls, text: str) -> KernelVariant:
        """Read what `str` writes, and nothing else.

        Raises:
            BadRequest: the text names no build for a torch.
        """
        found = _GRAMMAR.fullmatch(text) if len(text) <= _LONGEST else None
        if found is None or (found["stable"] and found["abi"]):
            raise BadRequest(
                f"malformed variant of a kernel: {text!r:.120}",
                hint="write it as torch211-cxx11-cu130-x86_64-linux",
            )
        abi = found["abi"]
        return cls(
            torch=f"{found['major']}.{found['minor']}",
            backend=found["backend"],
            machine=found["machine"],
            os=found["os"],
            stable=found["stable"] is not None,
            abi=abi and abi.removeprefix("-"),
        )

    def __str__(self) -> str:
        framework = "torch-stable-abi" if self.stable else "torch"
        abi = f"-{self.abi}" if self.abi else ""
        torch = self.torch.replace(".", "")
        return f"{framework}{torch}{abi}-{self.backend}-{self.machine}-{self.os}"

    @property
    def cuda(self) -> tuple[int, int] | None:
        """The toolkit it was built with, (13, 0); None for a CPU."""
        digits = self.backend.removeprefix("cu")
        return None if self.backend == "cpu" else (int(digits[:-1]), int(digits[-1]))


@dataclass(frozen=True, slots=True)
class KernelHost:
    """What a build is judged by: a torch, the CUDA that is computed with (None: a CPU), a system.

    `machine` may be archspec's name of a CPU level: the machine is its family.
    """

    torch: str
    cuda: str | None
    machine: str
    os: str

    def list_misfits(self, variant: KernelVariant) -> list[str]:
        """Why a build cannot be loaded here, each as what it was built for; none where it can.

        As kernels has it: the very torch, or any from the stable ABI's on; CUDA of the same major
        version, and not a newer minor one.
        """
        torch, built = Version(self.torch), Version(variant.torch)
        series = Version(f"{torch.major}.{torch.minor}")
        found = []
        if series < built if variant.stable else series != built:
            found.append(f"torch {variant.torch}{' or newer' if variant.stable else ''}")
        if variant.abi == "cxx98":
            found.append("the C++ ABI of before 2011")
        if not self._serves_cuda(variant.cuda):
            found.append(_describe_backend(variant))
        if variant.machine != _LEVEL.sub("", self.machine):
            found.append(f"{variant.machine} machines")
        if variant.os != self.os:
            found.append(variant.os)
        return found

    def _serves_cuda(self, built: tuple[int, int] | None) -> bool:
        if built is None or self.cuda is None:
            return built is None and self.cuda is None
        major, minor, *_ = map(int, self.cuda.split("."))
        return built[0] == major and built[1] <= minor


def choose_variant(names: list[str], host: KernelHost) -> str | None:
    """The build that a host loads, of those of a repo, as kernels would choose; None: none fits.

    The stable ABI goes before a torch's own, the newest of it first; then the newest CUDA; then one
    that names no C++ ABI.
    """
    fitting = [each for each in map(_try_parse, names) if each and not host.list_misfits(each)]
    return str(max(fitting, key=_rank_variant)) if fitting else None


def _rank_variant(variant: KernelVariant) -> tuple[bool, Version, tuple[int, int], bool]:
    return variant.stable, Version(variant.torch), variant.cuda or (0, 0), variant.abi is None


def _try_parse(name: str) -> KernelVariant | None:
    """A folder's name as a build's; None for what is none."""
    try:
        return KernelVariant.parse(name)
    except BadRequest:
        return None


def _describe_backend(variant: KernelVariant) -> str:
    return "a CPU" if variant.cuda is None else "CUDA {}.{}".format(*variant.cuda)
