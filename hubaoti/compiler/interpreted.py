"""What a package for a GPU answers, before anybody gets it and without that GPU.

In a process under the stand-in the package is opened as its users open it. Each launch of its
host code is computed by Triton's interpreter, and each op of ATen by the CPU, over the same memory;
and what comes of it is compared with the program that the package was made of. So sizes, strides,
grids, masks, constants, the order of arguments and what is written in place are looked at, at any
size in the dims. Not looked at: the GPU itself, its rounding, what its blocks do to each other when
they run at once, and the libraries with which it computes products and attention.
"""

from __future__ import annotations

import hashlib
import re
import signal
import time
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from hubaoti.artifact.schema import Check, Graph
from hubaoti.compiler.cubins import KERNELS
from hubaoti.compiler.dims import DimRanges, Sizes, choose_probes
from hubaoti.errors import CheckFailed
from hubaoti.host.processes import ChildOutput, collect_records, describe_exit, list_search_path
from hubaoti.host.wire import ErrorRecord
from hubaoti.settings import merge_environment

if TYPE_CHECKING:
    from hubaoti.compiler.stand_in import StandIn

# Largest difference that is allowed, as a part of the largest value: of a half type from float32,
# else from the program's own dtype. Measured are 1e-6 and 1e-2.
INTERPRETED_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 1e-2}
_COMMENT = re.compile(r"^//.*$", re.MULTILINE)
_ABOVE = re.compile(
    r"^ *@triton_heuristics\.\w+\(.*?^ *\)\n(?= *@triton\.jit$)", re.MULTILINE | re.DOTALL
)
_MODULE = "hubaoti.compiler.interpreter.child"
_START = 60.0  # seconds for a process to begin and to make constants
_PATIENCE = 2.0  # times the seconds: a point takes longer than was thought
_LARGEST = 40  # of a dim
_ALONE = {"TRITON_INTERPRET": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


class InterpretRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of the process: folders and files as paths, sizes as `points`.

    `package` is unpacked; `program` is what `saved_program.save_program` wrote; `keep` what
    `inductor.lower` kept; `shipped` the folder in which constants that are files of the artifact
    lie. `most` is what a half type is allowed where its program is as far from float32 itself, else
    `tolerance`. Points are asked one after the other while `seconds` and `memory` (bytes) last.
    `ops` are modules that register ops of the program.
    """

    entry: Graph
    package: bytes
    program: bytes
    keep: bytes
    shipped: bytes
    points: list[dict[str, int]]
    tolerance: float
    most: float
    seconds: float
    memory: int
    device: int = 0
    ops: tuple[str, ...] = ()
    search: list[bytes] = msgspec.field(default_factory=list_search_path)


class Begun(msgspec.Struct, frozen=True, tag=True):
    """A point that is asked for now."""

    sizes: dict[str, int]


class Compared(msgspec.Struct, frozen=True, tag=True):
    """A point at which the package answered what its program does."""

    check: Check


class LeftOut(msgspec.Struct, frozen=True, tag=True):
    """A point that was not asked for, and why."""

    sizes: dict[str, int]
    reason: str


class Uninterpreted(msgspec.Struct, frozen=True, tag=True):
    """A kernel or an op that could not be computed, with its name."""

    reason: str


class Finished(msgspec.Struct, frozen=True, tag=True):
    """All was said that there is to say."""


_KINDS = (Begun, Compared, LeftOut, Uninterpreted, Finished)
Answer = Begun | Compared | LeftOut | Uninterpreted | Finished | ErrorRecord


@dataclass(frozen=True, slots=True)
class Interpretation:
    """What came of it: comparisons, what could not be computed, and points that did not fit."""

    checks: tuple[Check, ...]
    not_interpreted: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


def digest_sources(keep: Path) -> str:
    """The sha256 of all that is interpreted of a package, by what `inductor.lower` kept of it.

    That is its host code, and of each kernel the function, its arguments and its block sizes. Not
    of it are comments, which say where and how it was compiled, and what stands above a kernel,
    which names the GPU.
    """
    digest = hashlib.sha256((keep / KERNELS).read_bytes())
    for path in sorted(keep.rglob("*.cpp")):
        text = _ABOVE.sub("", _COMMENT.sub("", path.read_text()))
        digest.update(f"\0{path.name}\0{text}".encode())
    return digest.hexdigest()


def interpret(request: InterpretRequest, stand_in: StandIn, capability: int) -> Interpretation:
    """Compare a package with its program at each point, in a process of its own.

    Raises:
        CheckFailed: it answers or writes something else, its host code refuses, or it ends the
            process; the message names the graph, and the kernel or op where one is to blame.
        MissingConstant: a constant that ships with the artifact is not in its file.
    """
    own = stand_in.environment([capability], memory=request.memory) | _ALONE
    environment = merge_environment(own)
    patience = _START + _PATIENCE * request.seconds
    begun = time.monotonic()
    output = collect_records(_MODULE, request, Answer, patience, environment=environment)
    return read_answers(request, output, ended=time.monotonic() - begun > patience)


def read_answers(
    request: InterpretRequest, output: ChildOutput, *, ended: bool = False
) -> Interpretation:
    """What the process said, or the error that it met; it may have been `ended` for its time.

    Raises:
        HubaotiError: as it was raised there; CheckFailed where the process ended before its time.
    """
    found: dict[type, list[Any]] = {each: [] for each in _KINDS}
    for record in output.records:
        if isinstance(record, ErrorRecord):
            raise record.rebuild()
        found[type(record)].append(record)
    sizes = found[Begun][-1].sizes if found[Begun] else {}
    last = ": " * bool(output.last) + output.last
    # Of each point one of these is told, in their order.
    untold = request.points[len(found[Compared]) + len(found[LeftOut]) :]
    if ended:
        found[LeftOut] += [LeftOut(each, f"time: it took too long{last}") for each in untold]
    elif not found[Finished] and output.code == -signal.SIGKILL:  # the system's, for want of memory
        reason = f"memory: {describe_exit(output.code)}{last}"
        found[LeftOut] += [LeftOut(each, reason) for each in untold]
    elif not found[Finished] and output.code < 0:
        raise CheckFailed(
            f"check, interpreted: graph {request.entry.id} at {sizes}: "
            f"{describe_exit(output.code)}{last}",
            hint="a kernel reads or writes where it has no memory, or writes into a weight; this "
            "model stays eager with these dims",
        )
    elif not found[Finished]:
        found[Uninterpreted].append(Uninterpreted(f"{describe_exit(output.code)}{last}"))
    checks = tuple(each.check for each in found[Compared])
    reasons = tuple(dict.fromkeys(each.reason for each in found[Uninterpreted]))
    return Interpretation(checks, reasons, tuple(found[LeftOut]))


def choose_points(bounds: DimRanges) -> list[Sizes]:
    """The corners of dims that end early, for an interpreter takes long; the soonest done first."""
    near = {}
    for name, sizes in bounds.items():
        most = max(sizes.low, _LARGEST // sizes.step * sizes.step)
        near[name] = replace(sizes, high=min(sizes.high, most))
    return sorted(choose_probes(near), key=lambda sizes: prod(sizes.values()))
