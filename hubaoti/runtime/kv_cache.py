"""A decoder block's layer of a static KV cache, as its graphs take it and write it in place.

Private, checked on transformers 5.15 to 5.24: `StaticLayer`, `StaticSlidingWindowLayer`, and those
that keep recurrent states besides, of `transformers.cache_utils`, by name and attributes;
transformers is not imported. A layer of any other class is left to eager.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hubaoti.artifact.schema import Cache
from hubaoti.artifact.schema import Graph as Entry
from hubaoti.runtime.capturing import is_capturing
from hubaoti.runtime.fallback import LONGER_CACHE, CannotServe
from hubaoti.runtime.input_checks import parse_dtype

_STATIC = {"StaticLayer", "LinearAttentionAndStaticFullAttentionLayer"}
SLIDING = {"StaticSlidingWindowLayer", "LinearAttentionAndStaticSlidingWindowAttentionLayer"}
_CACHES = "transformers.cache_utils"
_LAYER_NUMBERS = ("layer_idx", "layer_id", "layer_number")  # what models call a layer's own number
_COUNTED = "_hubaoti_filled"  # on a layer: its own count, at which version, and what that was
_CAPTURED = "captured"  # there: that is not known any more


@dataclass(slots=True)
class CacheState:
    """A layer of a cache in one call: what it holds, and how much of it was filled before.

    In a call that is captured all of its places are looked at.

    `room` are the places that are not filled yet: none where a window has seen more than it holds.
    It `slides` where its oldest entries leave, since it was full before the call or becomes so.
    """

    layer: Any
    keys: torch.Tensor
    values: torch.Tensor
    before: int
    seq: int
    is_sliding: bool
    empty: dict[str, Any] | None  # the layer as it was before it had tensors
    is_captured: bool = False  # how much is filled the device alone knows, at each replay
    room: int = field(init=False)
    slides: bool = field(init=False)

    def __post_init__(self) -> None:
        self.room = max(0, int(self.keys.shape[2]) - self.before)
        self.slides = self.is_sliding and self.seq > self.room

    @property
    def filled(self) -> int:
        """How many places are looked at: those filled before, and those of the new entries."""
        return self.before + self.seq

    @property
    def is_filling(self) -> bool:
        """Whether a window becomes full in this very call."""
        return self.slides and self.room > 0

    def require_room(self) -> None:
        """Refuse more than there are places for.

        Raises:
            CannotServe: there is no room.
        """
        if not self.slides and self.seq > self.room:
            places = self.keys.shape[2]
            message = f"there are {places} places, {self.before} are filled, and {self.seq} come"
            raise CannotServe("cache", message, advice=LONGER_CACHE)

    def slide(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Have a window that becomes full hold its entries as one that is: at its end.

        What is before them nobody looks at: `adapt` gives the mask as many places, left out.
        """
        if self.is_filling and self.before:
            for held in (keys, values):
                held[:, :, self.room :] = held[:, :, : self.before].clone()

    def make_positions(self) -> torch.Tensor:
        """The places of the new entries: int64, on the device of the cache."""
        if self.is_captured:
            counted: torch.Tensor = self.layer.cumulative_length
            return torch.arange(self.seq, device=self.keys.device) + counted
        return torch.arange(self.before, self.filled, device=self.keys.device)

    def undo(self) -> None:
        """Give a layer that was made for a graph back as it was: eager may want another dtype."""
        if self.empty is not None:
            vars(self.layer).clear()
            vars(self.layer).update(self.empty)

    def count_written(self) -> None:
        """Count the entries that a graph wrote, as the layer's own `update` would have."""
        count = self.layer.cumulative_length
        if not self.slides:
            count.add_(self.seq)
        if self.is_sliding:
            self.layer.cumulative_length_int += self.seq
        if count.device.type == "cpu":
            return
        # A device would have to be waited for; a replayed graph counts without anybody knowing.
        if getattr(self.layer, _COUNTED, None) != _CAPTURED and not count.is_inference():
            known = (weakref.ref(count), count._version, self.before + self.seq)
            setattr(self.layer, _COUNTED, known)


class CacheSlot:
    """Where a block's layer is in a cache, and what its graphs want of it."""

    def __init__(self, block: nn.Module, entries: Sequence[Entry]) -> None:
        numbers = {*find_layer_numbers(block)}
        self._index = numbers.pop() if len(numbers) == 1 else None
        self._caches = [(entry.cache, entry) for entry in entries if entry.cache is not None]

    def get_state(self, cache: Any, rows: int, seq: int, device: torch.device) -> CacheState:
        """The block's layer of a cache, made if nothing is in it yet.

        Raises:
            CannotServe: it is no static cache, or new entries do not fit as a graph writes them.
        """
        layer = self._find_layer(cache)
        is_sliding = type(layer).__name__ in SLIDING
        if is_capturing(device):
            return self._get_captured(layer, seq, is_sliding)
        empty = None if layer.is_initialized else {**vars(layer)}
        if empty is not None:
            self._initialize(layer, rows, device)
        before = _count_filled(layer, is_sliding)
        return CacheState(layer, layer.keys, layer.values, before, seq, is_sliding, empty)

    def _get_captured(self, layer: Any, seq: int, is_sliding: bool) -> CacheState:
        """The layer in a call that is replayed: how much is filled is read by the device.

        Raises:
            CannotServe: the layer itself counts in Python, or has no tensors on the device.
        """
        setattr(layer, _COUNTED, _CAPTURED)  # from now on the device alone knows
        if is_sliding:
            raise CannotServe("capture", "the layer of a window counts in Python, once")
        if not layer.is_initialized or layer.cumulative_length.device != layer.keys.device:
            raise CannotServe("capture", "the cache has no tensors on the device yet")
        before = int(layer.keys.shape[2]) - seq
        return CacheState(layer, layer.keys, layer.values, before, seq, False, None, True)

    def _find_layer(self, cache: Any) -> Any:
        """The block's own layer of a cache; one that is not static is refused."""
        layers = getattr(cache, "layers", None)
        if cache is None or not isinstance(layers, list):
            raise CannotServe("cache", f"the cache is {type(cache).__name__}")
        if "update" in vars(cache) or type(cache).update.__module__ != _CACHES:
            raise CannotServe("cache", f"the cache, a {type(cache).__name__}, has its own update")
        if self._index is None:
            raise CannotServe("layer", "the block does not say which layer of a cache is its own")
        layer = layers[self._index] if self._index < len(layers) else None
        named = type(layer).__name__ in _STATIC | SLIDING
        if not named or type(layer).__module__ != _CACHES:
            raise CannotServe("cache", f"the cache's layer is a {type(layer).__name__}")
        if "update" in vars(layer):
            raise CannotServe("cache", "the cache's layer has its own update")
        return layer

    def _initialize(self, layer: Any, rows: int, device: torch.device) -> None:
        """Have a layer make its tensors, as it would at its first `update`."""
        cache, entry = self._caches[0]
        empty = []
        for item in (entry.inputs[cache.keys], entry.inputs[cache.values]):
            _, heads, _, width = item.shape
            shape = [size if isinstance(size, int) else 0 for size in (rows, heads, 0, width)]
            empty.append(torch.empty(shape, dtype=parse_dtype(item.dtype), device=device))
        layer.lazy_initialization(*empty)


def list_static_tensors(cache: Any, device: torch.device) -> list[torch.Tensor] | None:
    """All tensors of a cache of static layers that lie on a device; None of any other cache."""
    found: list[torch.Tensor] = []
    for layer in getattr(cache, "layers", ()):
        if type(layer).__name__ != "StaticLayer" or not layer.is_initialized:
            return None
        found += [layer.keys, layer.values, layer.cumulative_length]
    is_whole = found and all(each.device == device for each in found)
    return found if is_whole else None


def find_layer_numbers(module: nn.Module) -> Iterator[int]:
    """The numbers that a module and what is in it have as layers of a model."""
    for part in module.modules():
        each = (vars(part).get(name) for name in _LAYER_NUMBERS)
        yield from (number for number in each if type(number) is int)


def _count_filled(layer: Any, is_sliding: bool) -> int:
    """How many entries a layer holds; read from the device only where nobody remembers.

    A window's layer counts in Python by itself.
    """
    if is_sliding:
        return int(layer.cumulative_length_int)
    count = layer.cumulative_length
    known: Any = getattr(layer, _COUNTED, _CAPTURED)
    if isinstance(known, str) or count.is_inference():
        return int(count)
    of, version, filled = known
    return int(filled) if of() is count and version == count._version else int(count)


def slide_window(
    face: Cache | None, held: CacheState | None, inputs: Sequence[torch.Tensor]
) -> None:
    """Have the window among a graph's inputs hold its entries as the graph finds them."""
    if held is not None and face is not None:
        held.slide(inputs[face.keys], inputs[face.values])


def put_cache(
    face: Cache, held: CacheState, inputs: list[Any], position: torch.Tensor | None
) -> None:
    """Give a graph its cache among its inputs."""
    inputs[face.keys], inputs[face.values] = held.keys, held.values
    if face.position is not None:
        inputs[face.position] = position
