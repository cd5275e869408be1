"""What a package for a GPU answers, before anybody gets it and without that GPU.

In a process under the stand-in the package is opened as its users open it. Each launch of its
host code is computed by Triton's interpreter, and each op of ATen by the CPU, over the same memory;
and what comes of it is compared with the program that the package was made of. So sizes, strides,
grids, masks, constants, the order of arguments and what is written in place are looked at, at any
size in the dims. Not looked at: the GPU itself, its rounding, and the libraries with which it
computes products and attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import msgspec

from hubaoti.artifact.schema import Check, Graph
from hubaoti.compiler.dims import DimRanges, Sizes, choose_probes
from hubaoti.errors import CheckFailed
from hubaoti.host.processes import ChildOutput, collect_records, describe_exit
from hubaoti.host.wire import ErrorRecord

if TYPE_CHECKING:
    from hubaoti.compiler.stand_in import StandIn

# Largest difference from float32 that is allowed, as a part of the largest value.
INTERPRETED_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}
_MODULE = "hubaoti.compiler.interpreter.child"
_START = 60.0  # seconds for a process to begin and to make constants
_PATIENCE = 2.0  # times the seconds: a point takes longer than was thought
_LARGEST = 40  # of a dim
_ALONE = {"TRITON_INTERPRET": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


class InterpretRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of the process: folders and files as paths, sizes as `points`.

    `package` is unpacked; `program` is what `saved_program.save_program` wrote; `keep` what
    `inductor.lower` kept; `shipped` the folder in which constants that are files of the artifact
    lie. Points are asked one after the other while `seconds` and `memory` (bytes) last.
    """

    entry: Graph
    package: str
    program: str
    keep: str
    shipped: str
    points: list[dict[str, int]]
    tolerance: float
    seconds: float
    memory: int
    device: int = 0


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


Answer = Compared | LeftOut | Uninterpreted | ErrorRecord


@dataclass(frozen=True, slots=True)
class Interpretation:
    """What came of it: comparisons, what could not be computed, and points that did not fit."""

    checks: tuple[Check, ...]
    not_interpreted: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


def interpret(request: InterpretRequest, stand_in: StandIn, capability: int) -> Interpretation:
    """Compare a package with its program at each point, in a process of its own.

    Raises:
        CheckFailed: it answers or writes something else, its host code refuses, or it ends the
            process; the message names the graph, and the kernel or op where one is to blame.
        MissingConstant: a constant that ships with the artifact is not in its file.
    """
    environment = stand_in.environment([capability], memory=request.memory) | _ALONE
    patience = _START + _PATIENCE * request.seconds
    output = collect_records(_MODULE, request, Answer, patience, environment=environment)
    return read_answers(request, output)


def read_answers(request: InterpretRequest, output: ChildOutput) -> Interpretation:
    """What the process said, or the error that it met.

    Raises:
        HubaotiError: as it was raised there; CheckFailed where the process ended before its time.
    """
    found: dict[type, list[Any]] = {Compared: [], LeftOut: [], Uninterpreted: []}
    for record in output.records:
        if isinstance(record, ErrorRecord):
            raise record.rebuild()
        found[type(record)].append(record)
    told = len(found[Compared]) + len(found[LeftOut])
    if told < len(request.points) and not found[Uninterpreted]:
        raise CheckFailed(
            f"check: graph {request.entry.id}, interpreted: {describe_exit(output.code)}"
            f"{_quote(output.last)}",
            hint="a kernel reads or writes where it has no memory, or asks for too much of it; "
            "this model stays eager with these dims",
        )
    checks = tuple(each.check for each in found[Compared])
    reasons = tuple(dict.fromkeys(each.reason for each in found[Uninterpreted]))
    return Interpretation(checks, reasons, tuple(found[LeftOut]))


def _quote(line: str) -> str:
    """The last line that a process printed, behind a colon."""
    return f": {line}" if line else ""


def choose_points(bounds: DimRanges) -> list[Sizes]:
    """The corners of dims that end early, for an interpreter takes long; the soonest done first."""
    near = {}
    for name, sizes in bounds.items():
        most = max(sizes.low, _LARGEST // sizes.step * sizes.step)
        near[name] = replace(sizes, high=min(sizes.high, most))
    return sorted(choose_probes(near), key=lambda sizes: prod(sizes.values()))
