"""How far the answers of two sides are apart; nothing here is shared with the compiler's checks."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_SAME = 1e-4  # of the largest value, for sides that are measured


def find_difference(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
    """The largest difference, as a part of the largest value of its tensor; inf for other shapes.

    Raises:
        ValueError: one of them has more tensors.
    """
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return float("inf")
        difference = (ours - theirs).abs()
        difference[(ours == theirs) | (ours.isnan() & theirs.isnan())] = 0.0  # equal infinities
        scale = theirs[theirs.isfinite()].abs().max().clamp(min=1e-30)
        worst = max(worst, (difference.max() / scale).nan_to_num(nan=float("inf")).item())
    return worst


def require_same(
    found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], what: str = "the sides"
) -> None:
    """End the run where two sides that are measured do not answer alike.

    Raises:
        SystemExit: they differ.
    """
    if find_difference(found, expected) > _SAME:
        raise SystemExit(f"{what} answer differently")
