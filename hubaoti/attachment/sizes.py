"""Sizes of a call's tensors, as the dims of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.artifact.manifest import Graph as Entry
from hubaoti.artifact.manifest import Input
from hubaoti.runtime.fallback import CannotServe


def find_axis(entry: Entry, dim: str) -> tuple[int, int] | None:
    """The first input and axis that have a dim's size."""
    for place, item in enumerate(entry.inputs):
        if dim in item.shape:
            return place, item.shape.index(dim)
    return None


def read_dims(entry: Entry, inputs: Sequence[Any]) -> dict[str, int]:
    """The sizes of the dims in a call; an axis of one may stand for any size."""
    sizes: dict[str, int] = {}
    for item, tensor in zip(entry.inputs, inputs, strict=True):
        if tensor is None:
            continue
        if tensor.dim() != len(item.shape):
            raise CannotServe(
                "shape", f"{item.name} has {tensor.dim()} axes, not {len(item.shape)}"
            )
        for size, named in zip(tensor.shape, item.shape, strict=True):
            if isinstance(named, str) and (extent := DimExpr.parse(named)).plain:
                dim = extent.dims[0]
                sizes[dim] = max(sizes.get(dim, 1), size)
    return sizes


def compute_shape(item: Input, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """The shape of an input at some sizes; None where they do not tell."""
    try:
        return tuple(n if isinstance(n, int) else DimExpr.parse(n).at(sizes) for n in item.shape)
    except KeyError:
        return None


def is_expandable(shape: Sequence[int], wanted: Sequence[int], cut: bool) -> bool:
    """Whether a tensor becomes another by expanding it, and by cutting its last axis."""
    pairs = [*zip(shape, wanted, strict=True)]
    whole = pairs[:-1] if cut else pairs
    fits = not cut or pairs[-1][0] >= pairs[-1][1]
    return fits and all(have in (1, want) for have, want in whole)
