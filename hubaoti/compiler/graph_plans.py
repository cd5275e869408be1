"""The graphs to build for a form of modules: by buckets, and for a GPU one that needs no mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hubaoti.artifact.schema import Input
from hubaoti.compiler.dims import DimRanges, limit_graph_dims, name_bucket
from hubaoti.compiler.regions import Group
from hubaoti.compiler.request import Range
from hubaoti.compiler.signature import CallSignature

WHOLE_MODEL = "root"


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """One graph to build: the face it has, for which sizes, and the modules it serves."""

    id: str
    modules: tuple[str, ...]
    face: CallSignature
    bounds: DimRanges
    order: int = 0
    own_masks: bool = False  # all that its attention is told is the mask of the call
    unmasked: bool = False  # its mask says nothing in the calls that it serves
    masks: Literal["causal", "padded"] | None = None  # what it says there, where it is that alone

    @property
    def region(self) -> str:
        """The first of the modules, which is the one that is compiled."""
        return self.modules[0]


@dataclass(frozen=True, slots=True)
class Form:
    """One way in which the modules of a group are called; `suffix` ends the name of its graph.

    `window` is how many places their KV cache has at most, whatever others have. With `own_masks`
    their attention looks at the masks of their calls, and at none that they make themselves.
    """

    group: Group
    suffix: str
    face: CallSignature
    window: int | None = None
    own_masks: bool = False


def split_into_buckets(
    form: Form, dims: DimRanges, buckets: Sequence[Mapping[str, Range]]
) -> list[GraphPlan]:
    """The units of one form: one for all sizes, or one for each bucket, in their order.

    A bucket over a dim that the face does not have says nothing about it. A window that is no
    length of the caches asked for is one of its layers' caches, which have its places.
    """
    face, name = form.face, f"{form.group.id}{form.suffix}"
    if "cache" in face.dims and form.window is not None and form.window not in dims["cache"]:
        dims = {**dims, "cache": Range(min(form.window, dims["cache"].low), dims["cache"].high)}
        buckets = [{n: b for n, b in bucket.items() if n != "cache"} for bucket in buckets]
    named = [{n: b for n, b in bucket.items() if n in face.dims} for bucket in buckets]
    kept = [bucket for index, bucket in enumerate(named) if bucket and bucket not in named[:index]]
    return [
        GraphPlan(
            f"{name}-{name_bucket(bucket)}" if bucket else name,
            form.group.modules,
            face,
            limit_graph_dims(dims, face.dims, bucket),
            order,
            form.own_masks,
        )
        for order, bucket in enumerate(kept or [{}])
    ]


def add_unmasked(unit: GraphPlan) -> list[GraphPlan]:
    """A unit, and where it decodes over a static cache, before it one for calls without padding.

    A GPU's kernels take half the time where no mask is (45 in the place of 87 us over 256 places),
    and of one token all that is filled is looked at: only padding would be hidden.
    """
    cache, seq = unit.face.cache, unit.bounds.get("seq")
    one_mask = _find_mask_shape(unit)[-1:] == ("filled",)
    if cache is None or cache.kind != "static" or seq is None or seq.low > 1 or not one_mask:
        return [unit]
    decode = replace(
        unit,
        id=f"{unit.id}-decode",
        bounds={**unit.bounds, "seq": Range(1, 1)},
        order=2 * unit.order,
        unmasked=True,
    )
    return [decode, replace(unit, order=2 * unit.order + 1)]


def add_causal(unit: GraphPlan) -> list[GraphPlan]:
    """A unit, and where it sees whole texts, before it one for calls whose mask is causal alone.

    So is that of texts without padding, for which torch's own sdpa takes a kernel without a mask.
    """
    shape = _find_mask_shape(unit)
    if unit.face.cache is not None or len(shape) != 4 or shape[2] != shape[3]:
        return [unit]
    told = replace(unit, id=f"{unit.id}-causal", masks="causal", order=2 * unit.order)
    return [told, replace(unit, order=2 * unit.order + 1)]


def add_lengths(unit: GraphPlan) -> list[GraphPlan]:
    """A unit, and before it one that is told where texts begin and end over a static cache.

    FlashAttention-3 takes no masks, and such lengths.
    """
    masks = [item for item in unit.face.inputs if item.values == "mask"]
    whole, shape = replace(unit, order=2 * unit.order + 1), _find_mask_shape(unit)
    if unit.unmasked or shape[3:] != ("filled",) or not _takes_lengths(unit, masks[0]):
        return [whole]
    told = replace(unit, id=f"{unit.id}-padded", masks="padded", order=2 * unit.order)
    return [told, whole]


def _find_mask_shape(unit: GraphPlan) -> tuple[int | str, ...]:
    """The shape of the one mask that a unit's attention is told; none where it is another."""
    masks = [item for item in unit.face.inputs if item.values == "mask"]
    return masks[0].shape if unit.own_masks and len(masks) == 1 else ()


def read_told_width(unit: GraphPlan) -> int | None:
    """How wide the heads are in a graph that is told where texts begin; None of any other."""
    cache = unit.face.cache
    if unit.masks != "padded" or cache is None:
        return None
    width = unit.face.inputs[cache.keys].shape[-1]
    assert isinstance(width, int)  # else there were no such graph
    return width


def _takes_lengths(unit: GraphPlan, mask: Input) -> bool:
    """Whether the kernel attends over a unit's static cache, and its mask hides or does not."""
    cache = unit.face.cache
    if cache is None or cache.kind != "static" or mask.dtype != "bool":
        return False
    (*_, width), (*_, of_values) = (unit.face.inputs[n].shape for n in (cache.keys, cache.values))
    return width == of_values and width in range(8, 257, 8)
