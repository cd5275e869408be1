"""The compiled graph against eager, at the corners of the dims.

Without the model's weights: its parameters get values by a fixed rule, the graph is bound to the
same memory, and both answer the same inputs.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubaoti.compiler.constants import tensors_of
from hubaoti.compiler.request import Range
from hubaoti.compiler.shapes import Probe, Sizes, example_inputs, probes
from hubaoti.compiler.source import Source
from hubaoti.errors import BadDim, CheckFailed, CompileFailed, first_line
from hubaoti.manifest import Check
from hubaoti.manifest import Graph as Entry
from hubaoti.runtime.graph import Graph
from hubaoti.runtime.weights import shipped_tensors

# Largest difference allowed, as a part of the largest value: float32 sums in another order, the
# half types also round where eager keeps a fused step's result, or the other way round.
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 1e-2}
SECONDS = 20.0  # of eager, for one probe
FEW_TOKENS = 16  # a call of fewer takes as long: it waits for the weights
MEMORY = 512 << 20  # bytes of activations, for one probe


def fill(model: nn.Module) -> None:
    """Give parameters values: the same ones for a name and shape, of a trained model's size."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.empty(parameter.shape, dtype=torch.float32)
        scale = 0.02 if parameter.dim() > 1 else 0.1
        values.normal_(0.0, scale, generator=generator)
        if parameter.dim() == 1 and name.endswith("weight"):
            values += 1.0  # a norm's scale
        with torch.no_grad():
            parameter.copy_(values)


def attempt(source: Source, dims: dict[str, Range], device: torch.device) -> None:
    """Ask eager alone, before minutes are spent on what it cannot do either.

    Raises:
        CompileFailed: it cannot answer the smallest inputs, or writes to its own tensors.
        BadDim: it can, and fails at larger ones.
    """
    before = versions(source.model)
    for at, sizes in enumerate(probes(dims)):
        probe = capped(sizes, dims, source, 0.0)
        try:
            with torch.no_grad():
                outputs = source.model(**example_inputs(probe.sizes, source.vocabulary, device))
                outputs[0].flatten()[:1].cpu()  # a GPU tells of its errors late
        except Exception as why:  # whatever a model's code raises
            told = f"source: at {named(probe.sizes)} eager itself fails: {first_line(why)}"
            if at == 0:
                hint = "the model wants more than ids and a mask, or these sizes are too small"
                raise CompileFailed(told, hint=hint) from why
            raise BadDim(told, hint="narrow the dims: --dim batch=1:32 --dim seq=2:128") from why
        for written in sorted(name for name, _ in versions(source.model) ^ before):
            raise CompileFailed(
                f"source: at {named(probe.sizes)} the model writes to its own {written}",
                hint="a graph's constants must stay as they are: this model stays eager",
            )


def versions(model: nn.Module) -> set[tuple[str, tuple[int, int]]]:
    """Each tensor of a model by name, with what changes when it is replaced or written."""
    return {(name, (id(each), each._version)) for name, each in tensors_of(model).items()}


def verify(
    graph: Graph, source: Source, dims: dict[str, Range], device: torch.device
) -> tuple[Check, ...]:
    """Compare at every probe point, as far as time and memory allow.

    Raises:
        CheckFailed: the graph answers something else than eager.
    """
    checks = []
    seconds_per_token = 0.0
    for sizes in probes(dims):
        probe = capped(sizes, dims, source, seconds_per_token)
        inputs = example_inputs(probe.sizes, source.vocabulary, device)
        with torch.no_grad():
            start = time.perf_counter()
            expected = source.model(**inputs)
            spent = time.perf_counter() - start
            found = graph(*(inputs[item.name] for item in graph.entry.inputs))
        seconds_per_token = spent / max(inputs["input_ids"].numel(), FEW_TOKENS)
        checks.append(compared(graph.entry.id, probe, found, expected, source.dtype))
    return tuple(checks)


def compared(
    graph: str,
    probe: Probe,
    found: list[torch.Tensor],
    expected: tuple[torch.Tensor, ...],
    dtype: str,
) -> Check:
    """One comparison, as the manifest keeps it.

    Raises:
        CheckFailed: shapes differ, or a value by more than the dtype's tolerance.
    """
    absolute, relative = 0.0, 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            raise CheckFailed(
                f"check: at {named(probe.sizes)} graph {graph} gives {list(ours.shape)}, "
                f"eager {list(theirs.shape)}",
                hint="this model cannot be compiled with these dims; it stays eager",
            )
        difference, largest = distance(ours, theirs)
        absolute = max(absolute, difference)
        relative = max(relative, difference / largest)
    tolerance = TOLERANCE[dtype]
    if relative > tolerance:
        raise CheckFailed(
            f"check: at {named(probe.sizes)} graph {graph} differs from eager by {relative:.1e} "
            f"of the largest value; {dtype} allows {tolerance:.0e}",
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
    ours, theirs = ours.double(), theirs.double()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    apart = torch.where(same, 0.0, ours - theirs).abs()
    difference = apart.nan_to_num(nan=float("inf")).max().item()
    finite = theirs[theirs.isfinite()].abs()
    return difference, (finite.max().item() if finite.numel() else 1.0) or 1.0


def capped(sizes: Sizes, dims: dict[str, Range], source: Source, seconds_per_token: float) -> Probe:
    """The probe, its largest dim halved until it fits into the budgets of time and memory."""
    small = dict(sizes)
    why = over_budget(small, source, seconds_per_token)
    while reason := over_budget(small, source, seconds_per_token):
        widest = max(small, key=lambda name: small[name] / dims[name].low)
        if small[widest] // 2 < dims[widest].low:
            break
        small[widest] //= 2
        why = reason
    return Probe(small, sizes, why) if small != sizes else Probe(small)


def over_budget(sizes: Sizes, source: Source, seconds_per_token: float) -> str | None:
    """Which budget these sizes would break, if any."""
    batch, seq = sizes["batch"], sizes["seq"]
    config: Any = source.config.get_text_config()
    width = 8 * config.hidden_size + (source.vocabulary if source.output == "logits" else 0)
    # Two outputs in double precision are held at once; a mask of scores a head is the other part.
    scores = seq * getattr(config, "num_attention_heads", 1)
    memory = batch * seq * (width + scores) * 8
    seconds = batch * seq * seconds_per_token
    if memory > MEMORY:
        return f"memory: it would take {memory >> 20} MiB, a probe has {MEMORY >> 20}"
    if seconds > SECONDS:
        return f"time: it would take {seconds:.0f} s, a probe has {SECONDS:.0f}"
    return None


def constants_of(model: nn.Module, entry: Entry, folder: Path) -> Mapping[str, torch.Tensor]:
    """The memory that eager uses, for the graph: parameters by name, the rest from its file."""
    device = next(model.parameters()).device
    return tensors_of(model) | dict(shipped_tensors(entry, folder, device))


def named(sizes: Sizes) -> str:
    """Sizes in words."""
    return ", ".join(f"{name} = {size}" for name, size in sizes.items())
