"""The compiled graph against eager, at the corners of the dims.

Without the model's weights: its parameters get values by the golden rule, the graph is bound to the
same memory, and both answer the same inputs.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import nn

from hubaoti.artifact.schema import Check, Input, Output
from hubaoti.artifact.schema import Graph as Entry
from hubaoti.compiler.constants import collect_named_tensors
from hubaoti.compiler.dims import DimRanges, Probe, Sizes, choose_probes, nest_sizes
from hubaoti.compiler.precision import InFloat32, widen
from hubaoti.compiler.regions import list_block_attributes
from hubaoti.errors import BadDim, CheckFailed, CompileFailed, first_line
from hubaoti.runtime.golden import (
    dtype_itemsize,
    make_golden_inputs,
    measure_difference,
    resolve_shape,
)
from hubaoti.runtime.weights import load_shipped_tensors

# Largest difference allowed, as a part of the largest value: float32 sums in another order, the
# half types also round where eager keeps a fused step's result, or the other way round.
CHECK_TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 1e-2}
COARSE = {"float8dq": 1e-1}  # activations are rounded to three bits, here or there another way
CHECK_SECONDS = 12.0  # of eager, for all probes of a graph
_ATTEMPT_SECONDS = 3.0  # of eager alone, before a graph is compiled
_FEW_TOKENS = 16  # a call of fewer takes as long: it waits for the weights
_MANY_TOKENS = 64  # and of these on a busy machine; a probe too long only shortens the next
MEMORY = 256 << 20  # bytes of activations, for one probe
_FLOAT32_SECONDS = 4.0  # of eager in float32, which takes several times as long
_PROGRAM_MEMORY = 64 << 20  # of a program's, whose weights are in memory beside all that lowers it
_HELD_TENSORS = 8  # tensors of the size of what goes in and out that are held at once

_Eager = Callable[..., tuple[torch.Tensor, ...]]
_Answer = Callable[..., Sequence[torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What budgets look at: a graph, its dims, and its model's attention heads and width."""

    entry: Entry
    bounds: DimRanges
    heads: int = 0
    width: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial(Workload):
    """What a graph is compared with."""

    eager: _Eager
    module: nn.Module
    tolerance: float

    def make_inputs(self, sizes: Sizes) -> list[torch.Tensor]:
        """The same inputs for the same sizes."""
        return make_golden_inputs(self.entry, sizes)


def try_eager(trial: Trial, points: Sequence[Sizes]) -> frozenset[str]:
    """Ask eager alone, before minutes are spent on what it cannot do either.

    Returns the names of the inputs that it writes.

    Raises:
        CompileFailed: it cannot answer at the first point, writes to its own tensors, or changes
            from call to call.
        BadDim: it can, and fails at other ones.
    """
    before = _snapshot_versions(trial.module)
    written: set[str] = set()
    seconds_per_token, left = 0.0, _ATTEMPT_SECONDS
    for index, sizes in enumerate(points):
        probe = cap_probe(sizes, trial, seconds_per_token, left)
        start = time.perf_counter()
        try:
            written |= _call_eager(trial, probe.sizes)
            if index == 0:
                _refuse_state(trial, probe.sizes)
        except CompileFailed:
            raise
        except Exception as error:  # whatever a model's code raises
            message = (
                f"source: at {format_sizes(probe.sizes)} eager itself fails: {first_line(error)}"
            )
            if index == 0:
                hint = "the model wants other inputs, or these sizes are too small"
                raise CompileFailed(message, hint=hint) from error
            bounds = " ".join(f"--dim {name}={sizes}" for name, sizes in trial.bounds.items())
            raise BadDim(message, hint=f"narrow the dims: {bounds}") from error
        spent = time.perf_counter() - start
        left -= spent
        seconds_per_token = spent / max(count_tokens(probe.sizes), _FEW_TOKENS)
        for changed in sorted(name for name, _ in _snapshot_versions(trial.module) ^ before):
            raise CompileFailed(
                f"source: at {format_sizes(probe.sizes)} the model writes to its own {changed}",
                hint="a graph's constants must stay as they are: this model stays eager",
            )
    return frozenset(written)


def _call_eager(trial: Trial, sizes: Sizes) -> set[str]:
    """Call eager; the names of the inputs that it wrote."""
    inputs = trial.make_inputs(sizes)
    before = [tensor._version for tensor in inputs]
    with torch.no_grad():
        outputs = trial.eager(*inputs)
        outputs[0].flatten()[:1].cpu()  # a GPU tells of its errors late
    called = zip(trial.entry.inputs, inputs, before, strict=True)
    return {item.name for item, tensor, version in called if tensor._version != version}


def _refuse_state(trial: Trial, sizes: Sizes) -> None:
    """Ask the same again: what a module then has changed of itself no graph could carry."""
    before = list_block_attributes(trial.module)
    _call_eager(trial, sizes)
    for old, new in zip(before, list_block_attributes(trial.module), strict=False):
        if old != new:
            raise CompileFailed(
                f"source: at {format_sizes(sizes)} the module changes its own "
                f"{old.partition(' = ')[0]}",
                hint="a graph cannot keep what changes from call to call: this module stays eager",
            )


def _snapshot_versions(model: nn.Module) -> set[tuple[str, tuple[int, int]]]:
    """Each tensor of a model by name, with what changes when it is replaced or written."""
    named = collect_named_tensors(model).items()
    return {(name, (id(tensor), tensor._version)) for name, tensor in named}


def verify(
    answer: _Answer,
    trial: Trial,
    *,
    where: Literal["cpu"] | msgspec.UnsetType = msgspec.UNSET,
    in_float32: bool = False,
) -> tuple[Check, ...]:
    """Compare what `answer` says at every probe point, as far as time and memory allow.

    `where` stands in the checks. With `in_float32` both compute in float32 what they would in a
    half type, so that nothing hides behind rounding.

    Raises:
        CheckFailed: it answers, or writes, something else than eager.
    """
    tolerance = CHECK_TOLERANCE["float32"] if in_float32 else trial.tolerance
    dtype = "float32" if in_float32 else msgspec.UNSET
    make_mode: Callable[[], AbstractContextManager[Any]] = InFloat32 if in_float32 else nullcontext
    checks: list[Check] = []
    seen: list[Sizes] = []
    seconds_per_token, left = 0.0, _FLOAT32_SECONDS if in_float32 else CHECK_SECONDS
    memory = MEMORY if where is msgspec.UNSET else _PROGRAM_MEMORY >> in_float32
    for sizes in choose_probes(trial.bounds):
        probe = cap_probe(sizes, trial, seconds_per_token, left, memory)
        if probe.sizes in seen or (in_float32 and left < 0.0):
            continue
        seen.append(probe.sizes)
        inputs = trial.make_inputs(probe.sizes)
        with torch.no_grad(), make_mode():
            inputs = [widen(tensor) for tensor in inputs] if in_float32 else inputs
            start = time.perf_counter()
            expected = _collect_answers(trial.entry, inputs, trial.eager)
            spent = time.perf_counter() - start
            found = _collect_answers(trial.entry, inputs, answer)
        left -= spent
        seconds_per_token = spent / max(count_tokens(probe.sizes), _MANY_TOKENS)
        check = record_comparison(trial.entry.id, probe, found, expected, tolerance)
        checks.append(msgspec.structs.replace(check, where=where, dtype=dtype))
    return tuple(checks)


def _collect_answers(
    entry: Entry, inputs: Sequence[torch.Tensor], call: _Answer
) -> list[torch.Tensor]:
    """What a call answers, and then the inputs that it may write, as it left them."""
    mutated = [item.mutated for item in entry.inputs]
    own = [each.clone() if written else each for each, written in zip(inputs, mutated, strict=True)]
    return [*call(*own), *itertools.compress(own, mutated)]


def record_comparison(
    graph: str,
    probe: Probe,
    found: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    tolerance: float,
) -> Check:
    """One comparison, as the manifest keeps it.

    Raises:
        CheckFailed: shapes differ, or a value by more than the tolerance; or eager answers nan
            alone, which anything would be equal to.
    """
    where = f"check: at {format_sizes(probe.sizes)} graph {graph}"
    stays = "this model cannot be compiled with these dims; it stays eager"
    if len(found) != len(expected):
        raise CheckFailed(f"{where} gives {len(found)} tensors, eager {len(expected)}", hint=stays)
    absolute, relative = 0.0, 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise CheckFailed(
                f"{where} gives {ours.dtype} {list(ours.shape)}, "
                f"eager {theirs.dtype} {list(theirs.shape)}",
                hint=stays,
            )
        if theirs.is_floating_point() and theirs.numel() and theirs.isnan().all():
            raise CheckFailed(
                f"{where} cannot be compared: eager itself answers nothing but nan",
                hint="its weights or inputs make it so; where numbers grow too large for float16, "
                "try --dtype bfloat16",
            )
        difference, largest = measure_difference(ours, theirs)
        absolute = max(absolute, difference)
        relative = max(relative, difference / largest)
    if relative > tolerance:
        raise CheckFailed(
            f"{where} differs from eager by {relative:.1e} of the largest value; "
            f"{tolerance:.0e} is allowed",
            hint="try --dtype float32; if it differs there too, this model stays eager",
        )
    return Check(
        graph=graph,
        dims=probe.sizes,
        asked=probe.requested,
        max_absolute=absolute,
        max_relative=relative,
        tolerance=tolerance,
        capped=probe.capped,
    )


def cap_probe(
    sizes: Sizes,
    work: Workload,
    seconds_per_token: float,
    left: float = CHECK_SECONDS,
    most: int = MEMORY,
) -> Probe:
    """The probe, its largest dim halved until it fits into the budgets of time and memory."""
    bounds = work.bounds
    small = dict(sizes)
    broken = find_broken_budget(small, work, seconds_per_token, left, most)
    while reason := find_broken_budget(small, work, seconds_per_token, left, most):
        widest = max(small, key=lambda name: small[name] / bounds[name].low)
        step = bounds[widest].step
        half = small[widest] // 2 // step * step
        if half < bounds[widest].low:
            break
        small[widest] = half
        if "cache" in small:
            small["filled"] = min(small["filled"], small["cache"])
            small["seq"] = min(small["seq"], small["filled"])
        broken = reason
    small = nest_sizes(small, bounds)
    return Probe(small, sizes, broken) if small != sizes else Probe(small)


def find_broken_budget(
    sizes: Sizes, work: Workload, seconds_per_token: float, left: float, most: int = MEMORY
) -> str | None:
    """Which budget these sizes would break, if any."""
    tensors: list[Input | Output] = [*work.entry.inputs, *work.entry.outputs.tensors]
    moving = sum(
        math.prod(resolve_shape(work.entry, each.shape, sizes)) * dtype_itemsize(each.dtype)
        for each in tensors
    )
    # Two outputs in double precision are held at once; a mask of scores a head is the other part.
    length = sizes.get("filled", sizes.get("seq", 1))
    scores = 8 * count_tokens(sizes) * (work.heads * length + _HELD_TENSORS * work.width)
    memory = _HELD_TENSORS * moving + scores
    seconds = count_tokens(sizes) * seconds_per_token
    if memory > most:
        return f"memory: it would take {memory >> 20} MiB, a probe has {most >> 20}"
    if seconds > left:
        return f"time: it would take {seconds:.0f} s, and {max(left, 0.0):.0f} are left"
    return None


def count_tokens(sizes: Sizes) -> int:
    """What a call brings: rows times what is in a row; what a cache holds already is no work."""
    return math.prod(size for name, size in sizes.items() if name not in {"filled", "cache"})


def share_constants(module: nn.Module, entry: Entry, folder: Path) -> Mapping[str, torch.Tensor]:
    """The memory that eager uses, for the graph: parameters by name, the rest from its file."""
    shipped = load_shipped_tensors(entry, folder, torch.device("cpu"))
    return collect_named_tensors(module) | dict(shipped)


def format_sizes(sizes: Sizes) -> str:
    """Sizes as an error message has them: `batch = 1, seq = 8`."""
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())
