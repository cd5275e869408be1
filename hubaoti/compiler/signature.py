"""Faces: how a module is called, with the dims that the sizes of its tensors follow.

`infer_dims.py` finds a face from calls; here is what is done with one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import nn

from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.artifact.schema import Cache, Input, Write
from hubaoti.compiler import kv_inputs as caches
from hubaoti.compiler.capture import Frozen, Opaque, bind_arguments, replace_forward, thaw_arguments
from hubaoti.errors import CompileFailed
from hubaoti.runtime.containers import ContainerChange, Contents, get_at_path
from hubaoti.runtime.input_checks import name_dtype, parse_dtype


@dataclass(frozen=True, slots=True)
class CallSignature:
    """A call template, the tensors it takes, and the KV cache among them."""

    template: dict[str, Any]
    inputs: tuple[Input, ...]
    cache: Cache | None = None

    @property
    def dims(self) -> tuple[str, ...]:
        """The dims of the inputs, in their order."""
        found = (dim for _, _, extent in self.list_extents() for dim in extent.dims)
        return tuple(dict.fromkeys(found))

    def list_extents(self) -> Iterator[tuple[int, int, DimExpr]]:
        """Input, axis and extent of each size that changes."""
        for index, entry in enumerate(self.inputs):
            for axis, size in enumerate(entry.shape):
                if isinstance(size, str):
                    yield index, axis, DimExpr.parse(size)

    def read_sizes(self, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The sizes of the dims, as tensors have them; symbols while tracing."""
        found: dict[str, Any] = {}
        for index, axis, extent in self.list_extents():
            if extent.plain:
                found.setdefault(extent.dims[0], tensors[index].shape[axis])
        for index, axis, extent in self.list_extents():
            if len(extent.terms) == 1 and extent.dims[0] not in found:
                size = tensors[index].shape[axis]
                found[extent.dims[0]] = (size - extent.plus) // extent.terms[0][1]
        return found

    def make_empty_inputs(
        self, sizes: Mapping[str, int], device: torch.device | str
    ) -> list[torch.Tensor]:
        """The tensors of a call at some sizes, whose values do not matter."""
        shapes = [
            [n if isinstance(n, int) else DimExpr.parse(n).at(sizes) for n in entry.shape]
            for entry in self.inputs
        ]
        return [
            torch.empty(shape, dtype=parse_dtype(entry.dtype), device=device)
            for shape, entry in zip(shapes, self.inputs, strict=True)
        ]

    def substitute_dims(self, extents: Mapping[str, int | DimExpr]) -> CallSignature:
        """The face with sizes or other extents in the place of dims."""
        shapes = [list(entry.shape) for entry in self.inputs]
        for index, axis, extent in self.list_extents():
            shapes[index][axis] = encode_extent(substitute(extent, extents))
        inputs = tuple(
            msgspec.structs.replace(entry, shape=tuple(shape))
            for entry, shape in zip(self.inputs, shapes, strict=True)
        )
        return CallSignature(self.template, inputs, self.cache)

    def drop_inputs(self, unused: Set[int]) -> CallSignature:
        """The face without inputs that are not computed with; their dims others have, too.

        A graph cannot leave out an input that it has, and who calls a block may give none.
        """
        known = {d for index, _, e in self.list_extents() if index not in unused for d in e.dims}
        needed = {index for index, _, extent in self.list_extents() if not known >= {*extent.dims}}
        faces: dict[int | None, Any] = {
            index: {"any": {"dtype": entry.dtype, "shape": list(entry.shape)}}
            for index, entry in enumerate(self.inputs)
            if index in unused - needed
        }
        return self._keep_inputs(self.template, faces)

    def drop_argument(self, name: str) -> CallSignature:
        """The face of calls that do not give one of the keyword arguments, a tensor."""
        kwargs = {key: item for key, item in self.template["kwargs"].items() if key != name}
        index = self.template["kwargs"].get(name, {}).get("tensor")
        return self._keep_inputs({**self.template, "kwargs": kwargs}, {index: None})

    def _keep_inputs(self, template: Any, dropped: Mapping[int | None, Any]) -> CallSignature:
        """The face of a template without some inputs, by what stands in the place of each."""
        kept = [index for index in range(len(self.inputs)) if index not in dropped]
        places: dict[int | None, Any] = dict(dropped)
        places |= {index: {"tensor": place} for place, index in enumerate(kept)}
        inputs = tuple(self.inputs[index] for index in kept)
        return CallSignature(_renumber_tensors(template, places), inputs, self.cache)

    def accept_any(self, idle: Set[str]) -> CallSignature:
        """The face that takes any value of the keyword arguments on which nothing depends."""
        kwargs = self.template["kwargs"]
        free = {name: {"any": kwargs[name]} for name in kwargs if name in idle}
        return CallSignature({**self.template, "kwargs": kwargs | free}, self.inputs, self.cache)


def _renumber_tensors(template: Any, places: Mapping[int | None, Any]) -> Any:
    """A template whose tensors have other places."""
    if isinstance(template, list):
        return [_renumber_tensors(item, places) for item in template]
    if not isinstance(template, dict):
        return template
    if isinstance(template.get("tensor"), int) and len(template) == 1:
        return places[template["tensor"]]
    return {key: _renumber_tensors(item, places) for key, item in template.items()}


def substitute(extent: DimExpr, extents: Mapping[str, int | DimExpr]) -> DimExpr:
    """An extent with sizes or extents in the place of its dims."""
    terms: dict[str, int] = {}
    plus = extent.plus
    for name, factor in extent.terms:
        value = extents.get(name, DimExpr(((name, 1),)))
        if isinstance(value, int):
            plus += factor * value
            continue
        plus += factor * value.plus
        for inner, times in value.terms:
            terms[inner] = terms.get(inner, 0) + factor * times
    return DimExpr.of(terms, plus)


def encode_extent(extent: DimExpr) -> int | str:
    """An extent as a manifest has it: a number where it has no dims."""
    return str(extent) if extent.terms else extent.plus


def make_names_unique(inputs: tuple[Input, ...]) -> tuple[Input, ...]:
    """Inputs of which no two have one name."""
    named: dict[str, Input] = {}
    for entry in inputs:
        name = entry.name
        while name in named:
            name += "x"
        named[name] = msgspec.structs.replace(entry, name=name)
    return tuple(named.values())


def add_cache_inputs(
    face: CallSignature, keys: torch.Tensor, values: torch.Tensor
) -> CallSignature:
    """The face of a decoder's block whose cache is among its inputs.

    Raises:
        CompileFailed: no input tells how much of the cache is filled.
    """
    if "filled" not in face.dims:
        raise CompileFailed(
            "capture: no input of the block tells how much of its cache is filled",
            hint="its attention takes no mask: it stays eager",
        )
    held = (
        Input(
            name=name,
            dtype=name_dtype(keys.dtype),
            shape=("batch", tensor.shape[1], "cache", tensor.shape[3]),
            values="real",
            mutated=True,
        )
        for name, tensor in (("keys", keys), ("values", values))
    )
    position = Input(name="position", dtype="int64", shape=("seq",), values="position")
    index = len(face.inputs)
    return CallSignature(
        face.template,
        make_names_unique((*face.inputs, *held, position)),
        Cache(kind="static", keys=index, values=index + 1, position=index + 2),
    )


def specialize_full_window(face: CallSignature, window: int) -> CallSignature:
    """The same block when its window is full: the oldest entries leave as the new ones come."""
    assert face.cache is not None
    inputs = tuple(entry for index, entry in enumerate(face.inputs) if index != face.cache.position)
    cache = Cache(kind="sliding", keys=face.cache.keys, values=face.cache.values, window=window)
    full: dict[str, int | DimExpr] = {"cache": window, "filled": DimExpr.of({"seq": 1}, window - 1)}
    return CallSignature(face.template, inputs, cache).substitute_dims(full)


@dataclass(slots=True)
class FlatModule:
    """A module as a function of a flat list of tensors; `outputs` is the template of its answer."""

    module: nn.Module
    face: CallSignature
    names: tuple[str, ...] = ()
    template: Any = None
    writes: tuple[Write, ...] = ()
    _forward: Callable[..., Any] = field(init=False)
    _layers: int = field(init=False)

    def __post_init__(self) -> None:
        self._forward = self.module.forward
        self._layers = caches.count_layers(self.module)

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors that the module answers, and that it leaves in containers of its call.

        Raises:
            CompileFailed: what it answers or leaves is neither a tensor nor a plain value, or is
                put together in another way than before.
        """
        sizes = self.face.read_sizes(tensors)
        known: dict[str, Any] = {
            "size": lambda text: DimExpr.parse(text).at(sizes),
            "cache": None,
            "device": tensors[0].device if tensors else "cpu",
        }
        if self.face.cache is not None:
            known["cache"] = self._make_cache(self.face.cache, tensors, sizes)
        args, kwargs = thaw_arguments(self.face.template, tensors, known)
        named = bind_arguments(self._forward, args, kwargs)
        before = Contents(named)
        answer = self._forward(*args, **kwargs)
        changes = before.changes()
        frozen = Frozen(given={id(get_at_path(named, each.path)): each.path for each in changes})
        try:
            template = frozen.freeze(answer, "output")
            frozen.given = before.places
            writes = tuple(_describe_write(change, frozen) for change in changes)
        except Opaque as error:
            raise CompileFailed(
                f"capture: the module answers, or leaves in its arguments, what a graph cannot: "
                f"{error}",
                hint="compile a module inside that answers tensors",
            ) from error
        if self.names and (template, writes) != (self.template, self.writes):
            raise CompileFailed(
                "capture: what the module answers, or leaves in its arguments, is put together in "
                "another way at other sizes",
                hint="narrow the dims to sizes at which it is not: this call stays eager",
            )
        self.template, self.writes, self.names = template, writes, tuple(frozen.names)
        return tuple(frozen.tensors)

    def _make_cache(
        self, cache: Cache, tensors: Sequence[torch.Tensor], sizes: Mapping[str, Any]
    ) -> Any:
        """The cache of a call, whose tensors are among its inputs."""
        keys, values = tensors[cache.keys], tensors[cache.values]
        layer: caches.Layer
        if cache.position is None:
            assert cache.window is not None
            looked = self._find_mask_length(tensors, cache.window)
            layer = caches.Sliding(keys, values, sizes["seq"], looked)
        else:
            kind = caches.Told if caches.attends_by_lengths(self.module) else caches.Static
            layer = kind(keys, values, tensors[cache.position], sizes["filled"])
        return caches.make_cache(layer, self._layers)

    def _find_mask_length(self, tensors: Sequence[torch.Tensor], window: int) -> Any:
        """The length of the mask over a full window; None where there is no mask."""
        length = DimExpr.of({"seq": 1}, window - 1)
        places = ((index, axis) for index, axis, e in self.face.list_extents() if e == length)
        return next((tensors[index].shape[axis] for index, axis in places), None)

    def replace_own_forward(self) -> AbstractContextManager[None]:
        """Around tracing: the module's own `forward` is this function."""

        def forward(*tensors: torch.Tensor, **named: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self(*tensors, *(named[entry.name] for entry in self.face.inputs if named))

        return replace_forward(self.module, forward)


def _describe_write(change: ContainerChange, frozen: Frozen) -> Write:
    """What a module left in a container of its call, as the manifest has it."""
    name = "_".join(map(str, change.path))
    if not all(type(key) in {str, int} for key, _ in change.items):
        raise Opaque(f"{name} has keys that are neither words nor whole numbers")
    items = tuple((key, frozen.freeze(item, f"{name}_{key}")) for key, item in change.items)
    return Write(into=change.path, items=items)
