"""Whether a graph's answers are what its manifest says of them: their dtypes and their shapes.

Golden answers do not tell: they come from where the manifest does, and may be samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.artifact.schema import Graph as Entry
from hubaoti.errors import BadInput
from hubaoti.runtime.input_checks import name_dtype


def require_described(
    entry: Entry, outputs: Sequence[torch.Tensor], sizes: Mapping[str, int]
) -> None:
    """See that outputs are of the dtypes and shapes that the manifest says, at these dims.

    Raises:
        BadInput: one is not.
    """
    for item, tensor in zip(entry.outputs.tensors, outputs, strict=False):
        said = [_compute_size(size, sizes) for size in item.shape]
        is_same = len(said) == tensor.ndim and all(
            size is None or size == found for size, found in zip(said, tensor.shape, strict=True)
        )
        if not is_same or name_dtype(tensor.dtype) != item.dtype:
            at = ", ".join(f"{dim}={size}" for dim, size in sizes.items())
            raise BadInput(
                f"graph {entry.id} answers {name_dtype(tensor.dtype)} {[*tensor.shape]} as "
                f"{item.name} at {at or 'its only sizes'}; its manifest says {item.dtype} "
                f"{[*item.shape]}",
                hint="the manifest is wrong: its publisher must compile it again",
            )


def read_dim_sizes(entry: Entry, inputs: Sequence[torch.Tensor]) -> dict[str, int]:
    """The sizes of the dims of a call, as its inputs have them."""
    found: dict[str, int] = {}
    for item, tensor in zip(entry.inputs, inputs, strict=True):
        for said, size in zip(item.shape, tensor.shape, strict=True):
            extent = DimExpr.parse(said) if isinstance(said, str) else None
            solved = extent.solve(size) if extent else None
            if extent and solved is not None:
                found.setdefault(extent.dims[0], solved)
    return found


def _compute_size(said: str | int | None, sizes: Mapping[str, int]) -> int | None:
    """A size of the manifest in numbers; None where nobody knows it."""
    if not isinstance(said, str):
        return said
    extent = DimExpr.parse(said)
    return extent.at(sizes) if {*extent.dims} <= {*sizes} else None
