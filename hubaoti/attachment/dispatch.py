"""Which graph answers a call, and what has to be done to its inputs before.

All blocks that share graphs share the routes to them, so that what is worked out for the first
block of a model holds for the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from hubaoti.artifact.schema import Graph as Entry
from hubaoti.attachment.expand import (
    ExpandedInputs,
    compute_shape,
    current_stream,
    find_axis,
    is_expandable,
    is_grown,
    read_dims,
)
from hubaoti.attachment.masks import Says, has_all_rows, wants
from hubaoti.attachment.route import InputShape, Route, find_filled_range, is_within
from hubaoti.attachment.torch_modes import refuse_modes
from hubaoti.errors import BadInput, BadManifest, OutOfBounds
from hubaoti.program.output_capturing import find_unread_flags
from hubaoti.runtime.call_template import CAUSAL, CallPlan, describe_value
from hubaoti.runtime.capturing import find_told
from hubaoti.runtime.containers import Answers
from hubaoti.runtime.fallback import CannotServe
from hubaoti.runtime.input_checks import (
    BadValue,
    Checks,
    Overlap,
    Slot,
    describe_layout,
    has_memory,
)
from hubaoti.runtime.known_calls import KnownCalls
from hubaoti.runtime.kv_cache import CacheState, put_cache

_MASKED = ("sdpa", "eager")  # of which transformers leave a mask out that would say nothing
_PLAIN = (torch.Tensor, nn.Parameter)
_NOTHING = torch.empty(0, dtype=torch.bool, device="cpu")  # stands where an input is left out
_REASONS: dict[type, str] = {Overlap: "overlap", BadValue: "values"}


class Dispatcher:
    """The graphs that serve the same modules, in their order, and the routes to them."""

    def __init__(
        self,
        entries: Sequence[Entry],
        block: nn.Module,
        device: torch.device,
        expands: bool,
        attention: str,
    ) -> None:
        """`attention` is what the graphs were compiled from: that of a block without a config."""
        self.entries = sorted(entries, key=lambda entry: entry.order)
        self.device = device
        self.checks = [Checks(entry, device) for entry in self.entries]
        first = max(self.entries, key=lambda entry: len(entry.inputs))
        _refuse_other_calls(first, self.entries)
        own = partial(type(block).forward, block)  # whatever somebody has put over it
        self.plan = CallPlan(first.call, len(first.inputs), own, find_unread_flags(block))
        self.answers = [Answers(entry.outputs) for entry in self.entries]
        self._expanded = ExpandedInputs()
        self.has_cache = first.cache is not None
        self._rows, self._seq = find_axis(first, "batch"), find_axis(first, "seq")
        # Who made a model of transformers gives one row for all, and leaves masks out.
        self._expands = expands
        self._config = next((p.config for p in block.modules() if hasattr(p, "config")), None)
        self._leaves_out = expands or (self._config is not None and _says_without_a_mask(block))
        self._masks = sum(item.values == "mask" for item in first.inputs)
        self._compiled_from = attention
        is_said = any(getattr(part, CAUSAL, False) for part in block.modules())
        self._could_be_causal = bool(first.call["kwargs"].get(CAUSAL, is_said))
        self._known: dict[Says, KnownCalls[Route]] = {each: KnownCalls() for each in Says}
        places = [index for index, item in enumerate(first.inputs) if item.values == "mask"]
        asking = any(map(wants, self.entries))
        self._mask = places[0] if asking and len(places) == 1 else None
        self._only_steps = not any(entry.masks for entry in self.entries)
        self.takes_lengths = any(entry.masks == "padded" for entry in self.entries)
        self._position: tuple[tuple[int, int, int], torch.Tensor] | None = None

    def read_sizes(self, found: Sequence[Any]) -> tuple[int, int]:
        """Rows and tokens of a call of a decoder's block."""
        sizes = []
        for place in (self._rows, self._seq):
            tensor = found[place[0]] if place else None
            if place is None or not isinstance(tensor, torch.Tensor) or tensor.dim() <= place[1]:
                raise CannotServe("arguments", "the tokens are not where they were")
            sizes.append(tensor.shape[place[1]])
        return sizes[0], sizes[1]

    def add_cache(self, found: list[Any], held: CacheState) -> None:
        """Put the layer of a cache among the inputs, and the places that are written."""
        entry = self._find_entry(held)
        assert entry.cache is not None
        put_cache(entry.cache, held, found, self._positions(held))

    def find_route(
        self,
        inputs: Sequence[Any],
        numbers: Sequence[Any],
        held: CacheState | None,
        who: str | None,
    ) -> Route:
        """The route of a call of the block at a path, or of one that is captured without.

        Raises:
            CannotServe: there is none, with the reason.
        """
        said = self._read_mask(inputs, held, who)
        known, look = self._known[said], inputs
        route = known.find(look)
        if route is None:
            look = self._mark_gaps(inputs, held)
            route = known.find(look)
        if route is not None and route.numbers == tuple(numbers) and is_within(route, held):
            return route
        refuse_modes(self.device)
        route = self._find(inputs, numbers, held, said, who)
        known.add(look, route)
        return route

    def _read_mask(self, inputs: Sequence[Any], held: CacheState | None, who: str | None) -> Says:
        """What the mask of a call says, where a graph wants to know.

        Anything in a call that is captured, as the next replay may bring another: unless whoever
        captures asks it before each.
        """
        is_step = held is not None and held.seq == 1
        if self._mask is None or (self._only_steps and not is_step):
            return Says.ANYTHING
        if who is None:
            is_told = find_told(inputs[self._mask]) is not None
            return Says.PADDED if is_told else Says.ANYTHING
        if held is not None and held.slides:
            return Says.ANYTHING
        refuse_modes(self.device)
        mask = inputs[self._mask]
        if mask is None:
            return Says.CAUSAL if self._is_causal and not is_step else Says.ANYTHING
        if type(mask) not in _PLAIN or not mask.dim() or not has_memory(mask):
            return Says.ANYTHING
        return self._expanded.read_mask(mask, held.filled if held else None, who)

    def follow(
        self, route: Route, inputs: list[Any], held: CacheState | None, who: str | None
    ) -> list[torch.Tensor]:
        """The inputs as the route's graph takes them, for the block at a path.

        Raises:
            CannotServe: two share memory that is written, or an id is no id.
        """
        filled = held.filled if held is not None else None
        checks = self.checks[route.graph]
        if who is None and self._mask is not None and self.entries[route.graph].masks == "padded":
            inputs[self._mask] = find_told(inputs[self._mask])
        for shape in route.shapes:
            inputs[shape.place] = self._make_input(
                checks.slots[shape.place], shape, inputs, filled, who
            )
        try:
            return checks.fit_known(inputs, route.sizes)
        except BadInput as error:
            raise CannotServe(_REASONS.get(type(error), "layout"), f"{error}") from error

    def _mark_gaps(self, inputs: Sequence[Any], held: CacheState | None) -> Sequence[Any]:
        """The inputs with something in the place of those that are left out, which has a look.

        Over a cache a mask is left out only while nothing is in it.
        """
        whole = [_NOTHING if item is None else item for item in inputs]
        if any(item is _NOTHING for item in whole):
            self._require_plain_mask(held)
        return whole

    @property
    def _attention(self) -> Any:
        """The name of the attention that the block has now."""
        return getattr(self._config, "_attn_implementation", self._compiled_from)

    @property
    def _is_causal(self) -> bool:
        """Whether without a mask nothing is looked at that comes later, as transformers' sdpa does.

        To its eager attention a mask is what is added, so that none hides nothing.
        """
        return self._attention == "sdpa" and self._could_be_causal

    def _require_plain_mask(self, held: CacheState | None) -> None:
        """Refuse to make a mask that would say something else than leaving it out."""
        if self._attention not in _MASKED:
            message = f"a mask is left out, of an attention that is {self._attention}"
            raise CannotServe("arguments", f"{message}, not {' or '.join(_MASKED)}")
        if self._masks != 1:
            raise CannotServe("arguments", "a mask is left out, and there are several")
        # Of one token sdpa looks at all places, those that are empty among them; eager always does.
        looks = held is not None and (held.before or held.seq == 1 or held.slides)
        if looks or (held is not None and not self._is_causal):
            raise CannotServe("arguments", "a mask is left out, over a cache that has more places")

    def _positions(self, held: CacheState) -> torch.Tensor:
        """Where new entries go, the same for all layers of a step."""
        if held.is_captured:
            return held.make_positions()
        key = (held.before, held.seq, current_stream(self.device))
        known = self._position
        if known is None or known[0] != key:
            known = (key, held.make_positions())
            if type(known[1]) is torch.Tensor:  # and not one of a mode that is refused yet
                self._position = known
        return known[1]

    def _find_entry(self, held: CacheState) -> Entry:
        """A graph for a window that is full, or becomes so, or for one that is not."""
        for entry in self.entries:
            if entry.cache is not None and entry.cache.kind == _choose_cache_kind(held):
                return entry
        reason = "window" if held.is_filling else "cache"
        raise CannotServe(reason, "no graph was compiled for a window that is full")

    def _find(
        self,
        inputs: Sequence[Any],
        numbers: Sequence[Any],
        held: CacheState | None,
        said: Says,
        who: str | None,
    ) -> Route:
        """The route by the first graph that can; the last one's reason where none can."""
        problems: list[CannotServe] = []
        for index, entry in enumerate(self.entries):
            if entry.cache is not None and entry.cache.kind != _choose_cache_kind(held):
                continue
            if said < wants(entry):
                continue
            try:
                return self._try(index, inputs[: len(entry.inputs)], numbers, held, who)
            except CannotServe as error:
                problems.append(error)
        if not problems:
            raise CannotServe("arguments", "its mask says more than any graph of it is told")
        raise problems[-1]

    def _try(
        self,
        index: int,
        inputs: Sequence[Any],
        numbers: Sequence[Any],
        held: CacheState | None,
        who: str | None,
    ) -> Route:
        """The route by one graph, which is refused where that cannot answer."""
        entry, checks = self.entries[index], self.checks[index]
        for slot, item in zip(checks.slots, inputs, strict=True):
            self._require_kind(slot, item)
        filled = held.filled if held is not None else None
        sizes = read_dims(entry, inputs)
        if filled is not None and "filled" in entry.bounds:
            sizes["filled"] = filled
        grown = filled if held is not None and held.is_filling else None
        shapes = [*self._plan_shapes(entry, inputs, sizes, grown)]
        made = [*inputs]
        for shape in shapes:
            made[shape.place] = self._make_input(
                checks.slots[shape.place], shape, inputs, filled, None if who is None else ""
            )
        try:
            checks.examine(made)
        except (OutOfBounds, BadInput) as error:
            raise CannotServe("shape", f"{error}", sizes) from error
        self._require_numbers(numbers, sizes)
        replaced = {shape.place for shape in shapes}
        # By what calls are known by, and not by what is cut to what is filled in this one.
        given = [new if old is None else old for old, new in zip(inputs, made, strict=True)]
        return Route(
            graph=index,
            small=checks.is_small(given),
            shapes=tuple(shapes),
            sizes=tuple(0 if n in replaced else t.nbytes for n, t in enumerate(made)),
            numbers=tuple(numbers),
            filled=find_filled_range(entry, sizes, grown),
        )

    def _require_kind(self, slot: Slot, item: Any) -> None:
        """Refuse what is no plain tensor of the graph's dtype and device."""
        name = slot.entry.name
        if item is None:
            if slot.entry.values != "mask" or not self._leaves_out:
                raise CannotServe("arguments", f"{name} is left out")
            return
        _require_plain_input(name, item)
        if item.device != self.device or item.layout is not torch.strided:
            raise CannotServe("device", f"{name} is {item.layout} on {item.device}")
        if item.dtype != slot.dtype:
            raise CannotServe("dtype", f"{name} is {item.dtype}; the graph takes {slot.dtype}")
        if not has_memory(item):
            raise CannotServe("layout", f"{name} has no plain memory{describe_layout(item)}")
        if slot.entry.mutated and not item.is_contiguous():
            raise CannotServe("layout", f"{name}, which is written, is a view")

    def _plan_shapes(
        self, entry: Entry, inputs: Sequence[Any], sizes: Mapping[str, int], grown: int | None
    ) -> Iterator[InputShape]:
        """What has to be made of the inputs for them to have the sizes of one call.

        In the call in which a window becomes full, masks of `grown` places are of a full one.
        """
        for place, (item, tensor) in enumerate(zip(entry.inputs, inputs, strict=True)):
            wanted = compute_shape(item, sizes)
            cut = bool(item.shape) and item.shape[-1] == "filled"
            if wanted is None:
                if tensor is None:
                    raise CannotServe("arguments", f"{item.name} is left out, of unknown sizes")
                if not tensor.is_contiguous():
                    raise CannotServe("layout", f"{item.name} is a view")
                continue
            same = tensor is not None and tuple(tensor.shape) == wanted
            if item.mutated or (same and tensor.is_contiguous() and not cut):
                continue
            # The input that says how many rows there are stands for itself.
            expands = self._expands and (self._rows is None or place != self._rows[0])
            if place == self._mask and entry.masks and not has_all_rows(tensor, wanted):
                raise CannotServe("arguments", f"{item.name} has one row for all")
            grows = item.values == "mask" and is_grown(tensor, wanted, grown)
            less = expands and tensor is not None and is_expandable(tensor.shape, wanted, cut)
            if same or tensor is None or less or grows:
                yield InputShape(place, wanted[:-1] if cut else wanted, cut)

    def _make_input(
        self,
        slot: Slot,
        shape: InputShape,
        inputs: Sequence[Any],
        filled: int | None,
        who: str | None,
    ) -> torch.Tensor:
        """An input made into a shape; one that was left out is made."""
        sizes = (*shape.sizes, filled) if shape.cut and filled is not None else shape.sizes
        source = inputs[shape.place]
        if source is None:
            # Over another sequence, as over an encoder's answer, everything is looked at.
            own = slot.entry.shape[-1] in {slot.entry.shape[-2], "filled"}
            causal = own and self._is_causal
            return self._expanded.make_mask(sizes, slot.dtype, self.device, causal, who)
        cut = filled if shape.cut else None
        return self._expanded.expand(source, sizes, cut, who)

    def _require_numbers(self, numbers: Sequence[Any], sizes: Mapping[str, int]) -> None:
        """Refuse a number that does not follow from the dims as it did."""
        for number, extent in zip(numbers, self.plan.extents, strict=True):
            known = all(dim in sizes for dim in extent.dims)
            if type(number) is not int or not known or extent.at(sizes) != number:
                raise CannotServe(
                    "arguments", f"a number is {number!r:.40}, not {extent}", {**sizes}
                )


def _require_plain_input(name: str, item: Any) -> None:
    """Refuse what is more than a tensor, or not one."""
    if not isinstance(item, torch.Tensor):
        raise CannotServe("arguments", f"{name} is {describe_value(item)}, not a tensor")
    if type(item) not in _PLAIN:
        raise CannotServe("subclass", f"{name} is a {type(item).__name__}")
    if item.requires_grad and torch.is_grad_enabled():
        raise CannotServe("gradients", f"gradients are wanted of {name}")


def _refuse_other_calls(first: Entry, entries: Sequence[Entry]) -> None:
    """Refuse graphs that serve one module and are called in different ways."""
    for entry in entries:
        same = entry.call == first.call and first.inputs[: len(entry.inputs)]
        names = [item.name for item in same or ()]
        if names != [item.name for item in entry.inputs]:
            raise BadManifest(
                f"graphs {first.id} and {entry.id} serve one module and are called differently",
                hint="its publisher must compile it again",
            )


def _says_without_a_mask(block: nn.Module) -> bool:
    """Whether what a mask says that is left out is known of a block by itself: of transformers' own
    it is, where all of its attention looks one way."""
    looks = {bool(getattr(part, CAUSAL)) for part in block.modules() if hasattr(part, CAUSAL)}
    return type(block).__module__.startswith("transformers.") and len(looks) == 1


def _choose_cache_kind(held: CacheState | None) -> str:
    """The kind of cache that a call's graph has."""
    return "sliding" if held is not None and held.slides else "static"
