"""What a mask says: whether a graph that is told lengths, or nothing, answers as one with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum

import torch

from hubaoti.artifact.schema import Graph as Entry
from hubaoti.attachment.step_call import Place


class Says(IntEnum):
    """What a mask says, in the order in which it is simpler; each may be taken for those before.

    `CAUSAL`: the last row sees all places, each row above it one less. `PADDED`: the same, but for
    places before the first of a text, which no row of it sees.
    """

    ANYTHING = 0
    PADDED = 1
    CAUSAL = 2

    @classmethod
    def _missing_(cls, value: object) -> Says:
        """What a device says that computes nothing: any number."""
        return cls.ANYTHING


def wants(entry: Entry) -> Says:
    """What the mask of a call has to say for a graph to serve it; of one row, causal is nothing."""
    if entry.unmasked is True or entry.masks == "causal":
        return Says.CAUSAL
    return Says.PADDED if entry.masks == "padded" else Says.ANYTHING


def has_all_rows(mask: torch.Tensor | None, wanted: Sequence[int]) -> bool:
    """Whether a mask that is made into a shape has all of its rows and places, or is left out."""
    return mask is None or (mask.shape[-2] == wanted[-2] and mask.shape[-1] >= wanted[-1])


def read_mask(mask: torch.Tensor) -> torch.Tensor:
    """What a mask (batch, heads, rows, places) says, as a number on the CPU, which is waited for.

    One of fewer axes has a single row. A number that is neither 0 nor as low as can be says
    something, and a row of such numbers alone sees all: what is added is not told from padding.
    """
    floating = mask.dtype.is_floating_point
    seen = mask == 0 if floating else mask != 0
    rows, places = mask.shape[-2:] if mask.dim() > 2 else (1, mask.shape[-1])
    row = torch.arange(rows, device=mask.device)[:, None]
    place = torch.arange(places, device=mask.device)
    causal = place <= row + (places - rows)
    is_causal = (seen == causal).all()
    if floating:
        least = torch.finfo(mask.dtype).min
        return Says.CAUSAL * (is_causal & (seen | (mask <= least)).all()).int().cpu()
    if mask.dim() != 4 or mask.shape[1] != 1:  # lengths are a text's, whatever the head
        return Says.CAUSAL * is_causal.int().cpu()
    first = places - seen[..., -1:, :].sum(-1, keepdim=True)
    is_padded = ((seen == (causal & (place >= first))) & (first < places)).all()
    return torch.maximum(Says.CAUSAL * is_causal.int(), Says.PADDED * is_padded.int()).cpu()


def find_step_mask(tensors: Mapping[Place, torch.Tensor], rows: int, places: int) -> Place | None:
    """Where a step has the one mask that says which of all places of its cache are looked at."""
    found = [
        place
        for place, each in tensors.items()
        if each.dtype is torch.bool and each.shape == (rows, 1, 1, places)
    ]
    return found[0] if len(found) == 1 else None


def read_step_mask(mask: torch.Tensor, counts: Sequence[torch.Tensor]) -> Says:
    """What the mask of a step says of all places of a cache, which is waited for.

    `PADDED` where each text is seen from its first place to the one that is written now, and
    nothing else is; `counts` are how many places each layer has filled, on the mask's device.
    """
    count, place = counts[0], torch.arange(mask.shape[-1], device=mask.device)
    first = torch.minimum(count + 1 - mask.sum(-1, keepdim=True), count)  # of nothing seen: none
    is_padded = (mask == ((place >= first) & (place <= count))).all()
    return Says(int(Says.PADDED * (is_padded & (torch.stack([*counts]) == count).all()).int()))


def show_unfilled(mask: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The same mask with all places behind the one that is written seen: hidden are the first ones.

    A graph that is told lengths counts what its mask hides, and looks at no more than is filled.
    """
    return mask | (torch.arange(mask.shape[-1], device=mask.device) > count)
