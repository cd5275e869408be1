"""KernelPin: a kernel that graphs call, at one commit, by the bytes of every file of one build.

A kernel's own ops are named after its build; graphs call ours (`hubaoti::fa3_fwd`), so a pin says
which namespace they have in this one, and how they are called there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from hubaoti.artifact.canonical import digest_canonical
from hubaoti.artifact.kernel_variant import KernelHost, KernelVariant
from hubaoti.artifact.package import is_overlong
from hubaoti.artifact.repo_name import is_repo
from hubaoti.artifact.schema import File
from hubaoti.errors import BadManifest, BadRequest

_HINT = "pull another artifact, or compile with another kernel, or with sdpa, which needs none"
MOST_FILES = 1000
MOST_BYTES = 16 << 30  # of a kernel; the largest of today have 1 GB
_MOST_OPS = 32
_MOST_ARCHS = 100

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAMESPACE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_ARCH = re.compile(r"(?P<major>[1-9][0-9]?)\.(?P<minor>[0-9])(?P<suffix>[af]?)(?P<ptx>\+PTX)?")
_OP = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_SCHEMA = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\([\x20-\x7e]{0,8000}\) -> [\x20-\x7e]{1,400}")


@dataclass(frozen=True, slots=True)
class KernelOp:
    """An op of a kernel, without its namespace, and its schema as the kernel's library has it."""

    name: str
    schema: str


@dataclass(frozen=True, slots=True)
class KernelPin:
    """A kernel at one commit, and the `sms` that it was built for; none means any device.

    What can be loaded has all of the rest, but perhaps no `version` and no `archs`: its `variant`,
    the `namespace` of its ops, the `files` of that build by their paths below it, and the `ops`
    that are called. `archs` are capabilities in kernels' grammar.

    Raises:
        BadManifest: a field is malformed, or some of them are missing.
    """

    repo: str
    commit: str
    sms: tuple[int, ...] = ()
    version: int | UnsetType = UNSET
    variant: str | UnsetType = UNSET
    namespace: str | UnsetType = UNSET
    archs: tuple[str, ...] | UnsetType = UNSET
    files: tuple[File, ...] | UnsetType = UNSET
    ops: tuple[KernelOp, ...] | UnsetType = UNSET

    def __post_init__(self) -> None:
        valid = {
            "repo": is_repo(self.repo),
            "commit": _matches(_COMMIT, self.commit),
            "sms": _is_list_of(lambda sm: type(sm) is int and 10 <= sm <= 999, self.sms, 500),
            "version": self.version is UNSET
            or (type(self.version) is int and 0 <= self.version < 2**31),
            "archs": self.archs is UNSET
            or _is_list_of(lambda arch: _matches(_ARCH, arch), self.archs, _MOST_ARCHS),
        }
        build = (self.variant, self.namespace, self.files, self.ops)
        if any(each is not UNSET for each in build):
            valid |= {
                "variant": _is_variant(self.variant),
                "namespace": _matches(_NAMESPACE, self.namespace),
                "files": _are_files(self.files),
                "ops": _is_list_of(_is_op, self.ops, _MOST_OPS),
            }
        for name, is_valid in valid.items():
            if not is_valid:
                value = getattr(self, name)
                raise BadManifest(
                    f"requires: malformed kernel's {name}: {value!r:.120}", hint=_HINT
                )

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit}"

    @property
    def full_name(self) -> str:
        """Where it was found, and in which of its builds, for a person."""
        return str(self) if self.variant is UNSET else f"{self} ({self.variant})"

    @property
    def build(self) -> KernelBuild | None:
        """What is loaded; None where the pin says nothing of it."""
        parts = self.variant, self.namespace, self.files, self.ops
        variant, namespace, files, ops = parts
        if variant is UNSET or namespace is UNSET or files is UNSET or ops is UNSET:
            return None
        return KernelBuild(variant, namespace, files, ops)

    @property
    def id(self) -> str:
        """What a host calls it that has it: by its bytes, or, where they are not said, its name."""
        return self.build.digest if self.build else str(self)

    def list_misfits(self, host: KernelHost) -> list[str]:
        """Why a host cannot load it, each as what it was built for; none where nothing is said."""
        return host.list_misfits(KernelVariant.parse(self.build.variant)) if self.build else []

    def supports(self, sm: int) -> bool:
        """Whether it was built for a capability, 90 for 9.0; where it names none, it is for any."""
        if self.sms and sm not in self.sms:
            return False
        return self.archs is UNSET or any(_supports(arch, sm) for arch in self.archs)

    def describe_archs(self) -> str:
        """The capabilities that it was built for, in words."""
        named = [] if self.archs is UNSET else [*self.archs]
        return " or ".join([*(f"sm_{sm}" for sm in self.sms), *named])


@dataclass(frozen=True, slots=True)
class KernelBuild:
    """One build of a kernel: for which hosts, the namespace of its ops, its files, its ops."""

    variant: str
    namespace: str
    files: tuple[File, ...]
    ops: tuple[KernelOp, ...]

    @property
    def digest(self) -> str:
        """What tells it from every other build, whatever repo and commit it is found in."""
        files = sorted((file.path, file.sha256, file.size) for file in self.files)
        return digest_canonical(
            {"files": files, "namespace": self.namespace, "variant": self.variant}
        )

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.files)


def _supports(arch: str, sm: int) -> bool:
    """Whether code for an arch runs on a capability, as kernels has it.

    `9.0a` is exactly 9.0; `9.0+PTX` that and all newer ones; `8.0` and `10.0f` are that and newer
    ones of the same major version.
    """
    found = _ARCH.fullmatch(arch)
    assert found is not None  # only valid ones exist
    built = 10 * int(found["major"]) + int(found["minor"])
    if found["suffix"] == "a":
        return sm == built
    if found["ptx"] and not found["suffix"]:
        return sm >= built
    return sm // 10 == built // 10 and sm >= built


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_list_of(is_valid: Callable[[Any], bool], value: object, most: int) -> bool:
    return isinstance(value, tuple) and len(value) <= most and all(map(is_valid, value))


def _is_variant(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(KernelVariant.parse(value))
    except BadRequest:
        return False


def _is_op(op: object) -> bool:
    if not (isinstance(op, KernelOp) and _matches(_OP, op.name) and _matches(_SCHEMA, op.schema)):
        return False
    return op.schema.partition("(")[0] == op.name


def _are_files(files: object) -> bool:
    """Whether these are files of distinct paths that stay below their folder, and not too large.

    None lies below another, as if that were a folder.
    """
    if not isinstance(files, tuple) or not 0 < len(files) <= MOST_FILES:
        return False
    try:
        read = [msgspec.convert(msgspec.to_builtins(each), File) for each in files]
    except (msgspec.MsgspecError, TypeError):
        return False
    # As a disk that folds case would have them.
    paths = {file.path.casefold() for file in read}
    above = {str(each) for path in paths for each in PurePosixPath(path).parents}
    distinct = len(paths) == len(read) and not paths & above
    short = not any(is_overlong(path) for path in paths)
    return read == [*files] and distinct and short and sum(file.size for file in read) <= MOST_BYTES
