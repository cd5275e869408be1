"""Requirements: what an artifact needs of a host, as its manifest says and `match` judges."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from packaging.version import Version

from hubaoti.artifact.kernel_pin import KernelPin
from hubaoti.artifact.variant import Variant
from hubaoti.errors import BadManifest, BadRequest

_MANIFEST_HINT = "the manifest was not written by hubaoti, or was changed; pull another artifact"

_MOST = 500  # libraries, and kernels: each that is missing is told of

_CUDA = re.compile(r"[1-9][0-9]?\.[0-9]{1,2}")
_RELEASE = re.compile(r"[0-9]{1,4}(?:\.[0-9]{1,4}){1,3}")
# What torch's wheels, and the nvidia wheels that it needs, bring along; libcuda is the driver's.
_OF_TORCH = re.compile(r"lib(torch|c10|gomp|gfortran|shm|caffe2|nv|nccl|cu(?!da\.))")
_SONAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,254}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What an artifact needs of a host: the manifest's `requires`; only valid ones exist.

    `torch` (with its local tag), `cuda` (toolkit), `sm` and `level` are what it was built for;
    `driver` is the oldest CUDA that the driver must serve; `ptx` the lowest sm that the PTX it
    carries serves (None: it carries none); `shared_memory` the bytes that its largest block takes.

    Raises:
        BadManifest: a field is malformed, or two contradict each other.
    """

    device: str
    os: str
    torch: str
    level: str
    cuda: str | None = None
    driver: str | None = None
    sm: int | None = None
    ptx: int | None = None
    glibc: str | None = None
    glibcxx: str | None = None
    cxxabi: str | None = None
    libraries: tuple[str, ...] = ()
    shared_memory: int | None = None
    kernels: tuple[KernelPin, ...] = ()

    def __post_init__(self) -> None:
        gpu, memory = self.device == "cuda", self.shared_memory
        valid = {
            "device": self.device in ("cpu", "cuda"),
            "torch": read_version(self.torch) is not None,
            "cuda": gpu == (self.cuda is not None),
            "driver": self.driver is None or (gpu and _matches_pattern(_CUDA, self.driver)),
            "ptx": self.ptx is None or (gpu and _is_between(10, self.ptx, 999)),
            "shared_memory": memory is None or (gpu and _is_between(0, memory, 2**31)),
            "glibc": self.glibc is None or _matches_pattern(_RELEASE, self.glibc),
            "glibcxx": self.glibcxx is None or _matches_pattern(_RELEASE, self.glibcxx),
            "cxxabi": self.cxxabi is None or _matches_pattern(_RELEASE, self.cxxabi),
            "libraries": _is_list_of(lambda each: _matches_pattern(_SONAME, each), self.libraries),
            "kernels": _is_list_of(lambda each: isinstance(each, KernelPin), self.kernels),
        }
        for name, is_valid in valid.items():
            _require_valid(is_valid, name, getattr(self, name))
        try:
            str(self.variant)
        except BadRequest as error:
            raise BadManifest(f"requires: {error}", hint=_MANIFEST_HINT) from error

    @property
    def variant(self) -> Variant:
        """The variant that these requirements are of: what the artifact's path must say."""
        return Variant(series(Version(self.torch)), self.cuda, self.sm, self.level, self.os)


def read_version(text: object) -> Version | None:
    """A version of PEP 440; None for anything else."""
    if not isinstance(text, str) or len(text) > 100:
        return None
    try:
        return Version(text)
    except ValueError:
        return None


def series(version: Version) -> str:
    """Such as "2.13": what torch keeps its compiled interface for."""
    return f"{version.major}.{version.minor}"


def comes_with_torch(library: str) -> bool:
    """Whether an installation of torch brings a library along, by its name."""
    return _OF_TORCH.match(library) is not None


def _matches_pattern(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_list_of(is_valid: Callable[[object], bool], value: object) -> bool:
    return isinstance(value, tuple) and len(value) <= _MOST and all(map(is_valid, value))


def _is_between(least: int, value: object, most: int) -> bool:
    # bool is an int, and JSON's true is no number.
    return type(value) is int and least <= value <= most


def _require_valid(condition: bool, what: str, value: object) -> None:
    if not condition:
        raise BadManifest(f"requires: malformed {what}: {value!r:.120}", hint=_MANIFEST_HINT)
