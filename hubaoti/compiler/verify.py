"""The compiled graph against eager, at the corners of the dims.

Without the model's weights: its parameters get values by the golden rule, the graph is bound to the
same memory, and both answer the same inputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hubaoti.compiler.constants import tensors_of
from hubaoti.compiler.regions import attributes
from hubaoti.compiler.shapes import Bounds, Probe, Sizes, nested, probes
from hubaoti.errors import BadDim, CheckFailed, CompileFailed, first_line
from hubaoti.manifest import Check
from hubaoti.manifest import Graph as Entry
from hubaoti.runtime.golden import inputs_for, shape_at, width
from hubaoti.runtime.graph import Graph
from hubaoti.runtime.weights import shipped_tensors

# Largest difference allowed, as a part of the largest value: float32 sums in another order, the
# half types also round where eager keeps a fused step's result, or the other way round.
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 1e-2}
COARSE = {"float8dq": 1e-1}  # activations are rounded to three bits, here or there another way
SECONDS = 12.0  # of eager, for all probes of a graph
ATTEMPT = 3.0  # of eager alone, before a graph is compiled
FEW_TOKENS = 16  # a call of fewer takes as long: it waits for the weights
MANY_TOKENS = 64  # and of these on a busy machine; a probe too long only shortens the next
MEMORY = 256 << 20  # bytes of activations, for one probe
LIVE = 8  # tensors of the size of what goes in and out that are held at once

Eager = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Trial:
    """What a graph is compared with, and the budget's facts: `scores` is attention heads."""

    entry: Entry
    bounds: Bounds
    eager: Eager
    module: nn.Module
    device: torch.device
    tolerance: float
    scores: int = 0
    width: int = 0

    def inputs(self, sizes: Sizes) -> list[torch.Tensor]:
        """The same inputs for the same sizes, on the device."""
        return [tensor.to(self.device) for tensor in inputs_for(self.entry, sizes)]


def attempt(trial: Trial, points: Sequence[Sizes]) -> frozenset[str]:
    """Ask eager alone, before minutes are spent on what it cannot do either.

    Returns the names of the inputs that it writes.

    Raises:
        CompileFailed: it cannot answer at the first point, writes to its own tensors, or changes
            from call to call.
        BadDim: it can, and fails at other ones.
    """
    before = versions(trial.module)
    written: set[str] = set()
    seconds_per_token, left = 0.0, ATTEMPT
    for at, sizes in enumerate(points):
        probe = capped(sizes, trial, seconds_per_token, left)
        start = time.perf_counter()
        try:
            written |= asked(trial, probe.sizes)
            if at == 0:
                refuse_state(trial, probe.sizes)
        except CompileFailed:
            raise
        except Exception as why:  # whatever a model's code raises
            told = f"source: at {named(probe.sizes)} eager itself fails: {first_line(why)}"
            if at == 0:
                hint = "the model wants other inputs, or these sizes are too small"
                raise CompileFailed(told, hint=hint) from why
            raise BadDim(told, hint=f"narrow the dims: {words(trial.bounds)}") from why
        spent = time.perf_counter() - start
        left -= spent
        seconds_per_token = spent / max(tokens(probe.sizes), FEW_TOKENS)
        for changed in sorted(name for name, _ in versions(trial.module) ^ before):
            raise CompileFailed(
                f"source: at {named(probe.sizes)} the model writes to its own {changed}",
                hint="a graph's constants must stay as they are: this model stays eager",
            )
    return frozenset(written)


def asked(trial: Trial, sizes: Sizes) -> set[str]:
    """Call eager; the names of the inputs that it wrote."""
    inputs = trial.inputs(sizes)
    before = [tensor._version for tensor in inputs]
    with torch.no_grad():
        outputs = trial.eager(*inputs)
        outputs[0].flatten()[:1].cpu()  # a GPU tells of its errors late
    changed = zip(trial.entry.inputs, inputs, before, strict=True)
    return {item.name for item, tensor, version in changed if tensor._version != version}


def words(bounds: Bounds) -> str:
    """Bounds as `--dim` takes them."""
    return " ".join(f"--dim {name}={sizes}" for name, sizes in bounds.items())


def refuse_state(trial: Trial, sizes: Sizes) -> None:
    """Ask the same again: what a module then has changed of itself no graph could carry.

    Raises:
        CompileFailed: it counts its calls, or keeps what it was given.
    """
    before = attributes(trial.module)
    asked(trial, sizes)
    for old, new in zip(before, attributes(trial.module), strict=False):
        if old != new:
            raise CompileFailed(
                f"source: at {named(sizes)} the module changes its own {old.partition(' = ')[0]}",
                hint="a graph cannot keep what changes from call to call: this module stays eager",
            )


def versions(model: nn.Module) -> set[tuple[str, tuple[int, int]]]:
    """Each tensor of a model by name, with what changes when it is replaced or written."""
    return {(name, (id(each), each._version)) for name, each in tensors_of(model).items()}


def verify(graph: Graph, trial: Trial) -> tuple[Check, ...]:
    """Compare at every probe point, as far as time and memory allow.

    Raises:
        CheckFailed: the graph answers, or writes, something else than eager.
    """
    checks: list[Check] = []
    seen: list[Sizes] = []
    seconds_per_token, left = 0.0, SECONDS
    for sizes in probes(trial.bounds):
        probe = capped(sizes, trial, seconds_per_token, left)
        if probe.sizes in seen:
            continue
        seen.append(probe.sizes)
        inputs = trial.inputs(probe.sizes)
        with torch.no_grad():
            start = time.perf_counter()
            expected = answers(trial.entry, inputs, trial.eager)
            spent = time.perf_counter() - start
            found = answers(trial.entry, inputs, graph)
        left -= spent
        seconds_per_token = spent / max(tokens(probe.sizes), MANY_TOKENS)
        checks.append(compared(graph.entry.id, probe, found, expected, trial.tolerance))
    return tuple(checks)


def answers(
    entry: Entry, inputs: Sequence[torch.Tensor], call: Callable[..., Sequence[torch.Tensor]]
) -> list[torch.Tensor]:
    """What a call answers, and then the inputs that it may write, as it left them."""
    own = [
        tensor.clone() if item.mutated else tensor
        for tensor, item in zip(inputs, entry.inputs, strict=True)
    ]
    outputs = call(*own)
    written = (tensor for tensor, item in zip(own, entry.inputs, strict=True) if item.mutated)
    return [*outputs, *written]


def compared(
    graph: str,
    probe: Probe,
    found: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    tolerance: float,
) -> Check:
    """One comparison, as the manifest keeps it.

    Raises:
        CheckFailed: shapes differ, or a value by more than the tolerance.
    """
    absolute, relative = 0.0, 0.0
    if len(found) != len(expected):
        raise CheckFailed(
            f"check: at {named(probe.sizes)} graph {graph} gives {len(found)} tensors, eager "
            f"{len(expected)}",
            hint="this model cannot be compiled with these dims; it stays eager",
        )
    for ours, theirs in zip(found, expected, strict=True):
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise CheckFailed(
                f"check: at {named(probe.sizes)} graph {graph} gives {ours.dtype} "
                f"{list(ours.shape)}, eager {theirs.dtype} {list(theirs.shape)}",
                hint="this model cannot be compiled with these dims; it stays eager",
            )
        difference, largest = distance(ours, theirs)
        absolute = max(absolute, difference)
        relative = max(relative, difference / largest)
    if relative > tolerance:
        raise CheckFailed(
            f"check: at {named(probe.sizes)} graph {graph} differs from eager by {relative:.1e} "
            f"of the largest value; {tolerance:.0e} is allowed",
            hint="try --dtype float32; if it differs there too, this model stays eager",
        )
    return Check(
        graph=graph,
        dims=probe.sizes,
        asked=probe.asked,
        max_absolute=absolute,
        max_relative=relative,
        tolerance=tolerance,
        capped=probe.capped,
    )


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """The largest difference and the largest value; infinite where only one of them answers nan."""
    if not ours.numel():
        return 0.0, 1.0
    ours, theirs = ours.double(), theirs.double()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    apart = torch.where(same, 0.0, ours - theirs).abs()
    difference = apart.nan_to_num(nan=float("inf")).max().item()
    finite = theirs[theirs.isfinite()].abs()
    return difference, (finite.max().item() if finite.numel() else 1.0) or 1.0


def capped(sizes: Sizes, trial: Trial, seconds_per_token: float, left: float = SECONDS) -> Probe:
    """The probe, its largest dim halved until it fits into the budgets of time and memory."""
    bounds = trial.bounds
    small = dict(sizes)
    why = over_budget(small, trial, seconds_per_token, left)
    while reason := over_budget(small, trial, seconds_per_token, left):
        widest = max(small, key=lambda name: small[name] / bounds[name].low)
        step = bounds[widest].step
        half = small[widest] // 2 // step * step
        if half < bounds[widest].low:
            break
        small[widest] = half
        if "cache" in small:
            small["filled"] = min(small["filled"], small["cache"])
            small["seq"] = min(small["seq"], small["filled"])
        why = reason
    small = nested(small, bounds)
    return Probe(small, sizes, why) if small != sizes else Probe(small)


def over_budget(sizes: Sizes, trial: Trial, seconds_per_token: float, left: float) -> str | None:
    """Which budget these sizes would break, if any."""
    entry = trial.entry
    tensors = [(item.shape, item.dtype) for item in entry.inputs]
    outputs = [(item.shape, item.dtype) for item in entry.outputs.tensors]
    moving = sum(math.prod(shape_at(entry, s, sizes)) * width(d) for s, d in (*tensors, *outputs))
    # Two outputs in double precision are held at once; a mask of scores a head is the other part.
    length = sizes.get("filled", sizes.get("seq", 1))
    scores = 8 * tokens(sizes) * (trial.scores * length + LIVE * trial.width)
    memory = LIVE * moving + scores
    seconds = tokens(sizes) * seconds_per_token
    if memory > MEMORY:
        return f"memory: it would take {memory >> 20} MiB, a probe has {MEMORY >> 20}"
    if seconds > left:
        return f"time: it would take {seconds:.0f} s, and {max(left, 0.0):.0f} are left"
    return None


def tokens(sizes: Sizes) -> int:
    """What a call brings: rows times what is in a row; what a cache holds already is no work."""
    return math.prod(size for name, size in sizes.items() if name not in {"filled", "cache"})


def constants_of(module: nn.Module, entry: Entry, folder: Path) -> Mapping[str, torch.Tensor]:
    """The memory that eager uses, for the graph: parameters by name, the rest from its file."""
    device = next(module.parameters()).device
    own = tensors_of(module)
    shipped = dict(shipped_tensors(entry, folder, device))
    return {**own, **shipped}


def named(sizes: Sizes) -> str:
    """Sizes in words."""
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())
