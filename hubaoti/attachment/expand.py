"""Inputs as a graph wants them, of what a model gives: dims, whole masks, a row for each text.

Transformers leave out a mask that says nothing, and give one row of a table for all rows. A graph
has the whole, so it is made here: once for all blocks that are given the same tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.artifact.schema import Graph as Entry
from hubaoti.artifact.schema import Input
from hubaoti.attachment.masks import Says, read_mask
from hubaoti.runtime.fallback import CannotServe

_KEPT = 8  # adapted tensors that are remembered

_Key = tuple[Any, ...]


class ExpandedInputs:
    """Tensors made of others for the blocks of a model, in one pass through it.

    A block that asks for the same again is in another pass, in which the source may hold something
    else: what is written through numpy, no version tells.
    """

    def __init__(self) -> None:
        self._made: dict[_Key, tuple[Any, int, torch.Tensor, set[str]]] = {}

    def expand(
        self, source: torch.Tensor, shape: Sequence[int], filled: int | None, who: str | None
    ) -> torch.Tensor:
        """A tensor cut to the places that are filled, and with all of its rows, for a block.

        What an inference tensor was written since cannot be told: it is adapted each time. So is
        one for nobody, in a capture: at a replay only what was made in it is made again.
        """
        if who is None or source.is_inference():
            return expand_to_shape(source, shape, filled)
        key = (id(source), current_stream(source.device), *shape)
        found = self._made.get(key)
        same = found is not None and found[0]() is source and found[1] == source._version
        if found is not None and same and who not in found[3]:
            found[3].add(who)
            return found[2]
        made = expand_to_shape(source, shape, filled)
        if made is not source:
            self._keep(key, (weakref.ref(source), source._version, made, {who}))
        return made

    def read_mask(self, mask: torch.Tensor, filled: int | None, who: str) -> Says:
        """What a mask says of the places that are filled, or of all, which is waited for.

        An inference tensor is not asked: each block would have to.
        """
        if mask.is_inference():
            return Says.ANYTHING
        key = ("says", id(mask), current_stream(mask.device), filled)
        found = self._made.get(key)
        same = found is not None and found[0]() is mask and found[1] == mask._version
        if found is not None and same and who not in found[3]:
            found[3].add(who)
            return Says(int(found[2]))
        answer = read_mask(mask[..., :filled])
        self._keep(key, (weakref.ref(mask), mask._version, answer, {who}))
        return Says(int(answer))

    def make_mask(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        causal: bool,
        who: str | None,
    ) -> torch.Tensor:
        """The mask that was left out: all that is there is looked at, or all that was before."""
        if who is None:
            return _make_attention_mask(shape, dtype, device, causal)
        key = (None, current_stream(device), causal, dtype, device, *shape)
        found = self._made.get(key)
        if found is not None:
            return found[2]
        made = _make_attention_mask(shape, dtype, device, causal)
        self._keep(key, (None, 0, made, set()))
        return made

    def _keep(self, key: _Key, made: tuple[Any, int, torch.Tensor, set[str]]) -> None:
        """Remember the newest; those whose source is gone are the first to be forgotten."""
        alive = {k: v for k, v in self._made.items() if v[0] is None or v[0]() is not None}
        alive.pop(key, None)
        self._made = {**dict([*alive.items()][-(_KEPT - 1) :]), key: made}


def current_stream(device: torch.device) -> int:
    """The stream on which tensors are made here; what another one makes may not be there yet."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def expand_to_shape(source: torch.Tensor, shape: Sequence[int], filled: int | None) -> torch.Tensor:
    """A tensor cut and expanded to a shape, in memory of its own unless it has it already.

    A mask of fewer places than a full window has is given the others, which nobody looks at, first.
    """
    if filled is not None and source.shape[-1] > filled:
        source = source.narrow(-1, 0, filled)
    if 1 < source.shape[-1] < shape[-1]:
        before = (shape[-1] - source.shape[-1], 0)
        source = nn.functional.pad(source, before, value=_get_masked_value(source.dtype))
    return source.expand(shape).contiguous()


def _make_attention_mask(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, causal: bool
) -> torch.Tensor:
    """True, 1 or 0.0 where to look; as transformers' sdpa does it without a mask."""
    seen = torch.ones(tuple(shape), dtype=torch.bool, device=device)
    if causal and len(shape) == 4 and shape[2] > 1:
        seen = seen.tril()
    if dtype.is_floating_point:
        nothing = torch.zeros(seen.shape, dtype=dtype, device=device)
        return nothing.masked_fill_(~seen, _get_masked_value(dtype))
    return seen.to(dtype)


def _get_masked_value(dtype: torch.dtype) -> float:
    """What a mask of a dtype has where nobody looks."""
    return torch.finfo(dtype).min if dtype.is_floating_point else 0


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


def is_grown(tensor: Any, wanted: Sequence[int], grown: int | None) -> bool:
    """Whether a mask becomes another by places that are put before its own, all `grown` of them."""
    if tensor is None or grown is None or tensor.shape[-1] != grown or grown > wanted[-1]:
        return False
    return is_expandable(tensor.shape[:-1], wanted[:-1], False)
