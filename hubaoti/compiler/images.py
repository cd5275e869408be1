"""Images of any size, for models that take them: those whose blocks are given maps.

A config names one size. A network of convolutions takes any other as well, and is called with it:
so it is looked at with images of several sizes, and its maps have dims. What counts its patches, or
has a table of their places, keeps the size of its config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import msgspec

from hubaoti.compiler.fake_run import BlockCalls
from hubaoti.compiler.from_config import Source
from hubaoti.compiler.request import Range
from hubaoti.errors import CompileFailed

_BATCH = (97, 101, 107)  # at looks: none is a size of a map by chance
_SMALLEST_SIDE = 64  # pixels: a network may halve a side six times
AXES = {"height": 2, "width": 3}
_Observe = Callable[[Source], tuple[Source, Mapping[str, BlockCalls]]]


def vary_image_size(source: Source, requested: Mapping[str, Range], observe: _Observe) -> Source:
    """The source with its images' height and width as dims, where its blocks are given maps.

    Their bounds are those that were asked for; else from half of the config's size to twice it.
    """
    entry = next((each for each in source.face.inputs if each.name == "pixel_values"), None)
    if entry is None or source.live or not all(isinstance(n, int) for n in entry.shape[1:]):
        return source
    sizes = {name: int(entry.shape[axis] or 0) for name, axis in AXES.items()}
    bounds = {
        name: requested.get(name, Range(max(size // 2, min(size, _SMALLEST_SIDE)), 2 * size))
        for name, size in sizes.items()
    }
    shaped = msgspec.structs.replace(entry, shape=(*entry.shape[:2], *AXES))
    inputs = tuple(shaped if each is entry else each for each in source.face.inputs)
    varied = replace(
        source,
        face=replace(source.face, inputs=inputs),
        default_dims=source.default_dims | bounds,
        looks=source.looks
        | {"batch": _BATCH}
        | _choose_image_looks(bounds["height"], bounds["width"]),
    )
    try:
        _, observed = observe(varied)
    except CompileFailed:
        return source
    return varied if all(map(_is_given_maps, observed.values())) else source


def _choose_image_looks(height: Range, width: Range) -> dict[str, tuple[int, ...]]:
    """Sizes at which to look: the ends of both, which do not change together."""
    middle = [(sizes.low + sizes.high) // 2 for sizes in (height, width)]
    return {
        "height": (height.low, middle[0], height.high),
        "width": (width.high, width.low, middle[1]),
    }


def _is_given_maps(seen: BlockCalls) -> bool:
    """Whether of a block's call nothing changes with the size of images but the sides of maps."""
    if seen.problem or any(call.template != seen.calls[0].template for call in seen.calls):
        return False
    return all(
        len({*sizes}) == 1 or (len(shapes[0]) == 4 and axis in AXES.values())
        for shapes in zip(*(call.sizes for call in seen.calls), strict=True)
        for axis, sizes in enumerate(zip(*shapes, strict=True))
        if axis > 0
    )
