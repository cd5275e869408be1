"""Dims: their bounds, the points at which a graph is checked, and example inputs for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hubaoti.compiler.request import Range
from hubaoti.errors import BadDim

Sizes = dict[str, int]


@dataclass(frozen=True, slots=True)
class Probe:
    """Dims at which a graph is compared with eager; `asked` is what a cap made smaller, and why."""

    sizes: Sizes
    asked: Sizes | None = None
    capped: str | None = None


def bounded(
    asked: dict[str, Range], default: dict[str, Range], positions: int | None
) -> dict[str, Range]:
    """The dims of a model with the asked bounds.

    Raises:
        BadDim: the model's positions end before the asked maximum.
    """
    for name in asked.keys() - default.keys():
        raise BadDim(f"the model has no dim {name!r}", hint=f"its dims are: {', '.join(default)}")
    dims = default | asked
    if positions is not None and dims["seq"].high > positions:
        raise BadDim(
            f"seq goes up to {dims['seq'].high}, the model has {positions} positions",
            hint=f"end it there: --dim seq={min(dims['seq'].low, positions)}:{positions}",
        )
    return dims


def probes(dims: dict[str, Range]) -> list[Sizes]:
    """All dims smallest, an odd middle, and each dim at its largest with the others smallest."""
    smallest = {name: sizes.low for name, sizes in dims.items()}
    middle = {name: odd_middle(sizes) for name, sizes in dims.items()}
    points = [smallest, middle]
    points += [smallest | {name: sizes.high} for name, sizes in dims.items()]
    return [point for at, point in enumerate(points) if point not in points[:at]]


def odd_middle(sizes: Range) -> int:
    """An odd size between the bounds, not far above the smallest: a shape nobody tuned for."""
    middle = min((sizes.low + sizes.high) // 2, sizes.low + 60) | 1
    return max(sizes.low, min(middle, sizes.high))


def example_sizes(dims: dict[str, Range]) -> Sizes:
    """Sizes to trace with: no two alike, none 0 or 1, which tracing would take for constants."""
    sizes: Sizes = {}
    for name, bounds in dims.items():
        candidates = (n for n in range(max(bounds.low, 3), bounds.high + 1))
        sizes[name] = next((n for n in candidates if n not in sizes.values()), bounds.high)
    return sizes


def example_inputs(sizes: Sizes, vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Token ids and a mask of these sizes, always the same; every second row is padded."""
    batch, seq = sizes["batch"], sizes["seq"]
    count = torch.arange(batch * seq, dtype=torch.int64).view(batch, seq)
    ids = (count * 7919 + 11) % vocabulary
    mask = torch.ones(batch, seq, dtype=torch.int64)
    mask[1::2, max(1, seq // 2) :] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
