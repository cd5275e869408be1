"""Blocks of an eager model, recorded, and their compiled graphs in their place.

Nothing here is shared with the compiler's own checks: a model with random weights runs as
transformers runs it, and each call of a block is kept with its answer. Where transformers leaves a
mask out, or gives a table of one row for all rows, a graph wants the whole: that is made here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import Cache

from hubaoti.bundle import Bundle
from hubaoti.compiler.calls import replaced
from hubaoti.extents import Extent
from hubaoti.manifest import Graph as Entry
from hubaoti.manifest import Input
from hubaoti.package import unpack_all
from hubaoti.runtime.checks import dtype_of
from hubaoti.runtime.graph import Graph, open_graph
from hubaoti.runtime.weights import shipped_tensors

CPU = torch.device("cpu")


class Unlike(Exception):
    """A graph cannot be called as eager called its block; the message says where they differ."""


class Elsewhere(Exception):
    """Another graph serves a call, or none that there could be: a window becomes full in it."""


@dataclass(frozen=True)
class Held:
    """What a block's layer of the KV cache held, and how many of its places were filled."""

    keys: torch.Tensor
    values: torch.Tensor
    filled: int


@dataclass
class Recorded:
    """One call of a block: what it was given, what its cache held, what it answered and wrote."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    causal: bool
    before: Held | None = None
    after: Held | None = None
    answer: list[torch.Tensor] = field(default_factory=list)


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model whose every parameter matters: matrices that keep sizes, norms and biases off rest.

    As transformers would begin a training, attention looks everywhere alike and biases are zero,
    and a graph that left them out would pass.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, each in model.named_parameters():
            noise = torch.randn(each.shape, generator=draw)
            if each.dim() > 1:
                each.copy_(noise * each.shape[-1] ** -0.5)
            else:
                each.add_(noise * 0.1) if name.endswith("weight") else each.copy_(noise * 0.1)
    return model.eval()


@contextmanager
def recording(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, list[Recorded]]]:
    """Keep every call that the modules at some paths receive inside the block."""
    found: dict[str, list[Recorded]] = {path: [] for path in paths}
    with ExitStack() as around:
        for path, calls in found.items():
            block = model.get_submodule(path)
            around.enter_context(replaced(block, noting(block, calls)))
        yield found


def noting(block: nn.Module, calls: list[Recorded]) -> Any:
    """A block's own `forward`, which keeps what goes in and out."""
    forward = block.forward
    own = any(getattr(module, "is_causal", False) for module in block.modules())
    layer = layer_of(block)

    def noted(*args: Any, **kwargs: Any) -> Any:
        causal = kwargs.get("is_causal", own)  # as transformers' sdpa decides without a mask
        call = Recorded(*tree_map(copied, (args, kwargs)), causal)
        cache = next((each for each in (*args, *kwargs.values()) if isinstance(each, Cache)), None)
        call.before = held(cache, layer)
        answer = forward(*args, **kwargs)
        call.after = held(cache, layer)
        call.answer = [copied(leaf) for leaf in tree_leaves(answer) if is_tensor(leaf)]
        calls.append(call)
        return answer

    return noted


def layer_of(block: nn.Module) -> int | None:
    """The number of a block's layer in a cache."""
    numbers = (vars(module).get("layer_idx") for module in block.modules())
    return next((number for number in numbers if number is not None), None)


def held(cache: Cache | None, layer: int | None) -> Held | None:
    """A copy of one layer of a cache; None where there is none, or nothing is in it yet."""
    if cache is None or layer is None or not cache.layers[layer].is_initialized:
        return None
    each: Any = cache.layers[layer]
    return Held(each.keys.clone(), each.values.clone(), int(each.get_seq_length()))


def is_tensor(leaf: Any) -> bool:
    """Whether a leaf of a call is a tensor."""
    return isinstance(leaf, torch.Tensor)


def copied(leaf: Any) -> Any:
    """A tensor's copy; anything else as it is."""
    return leaf.detach().clone() if is_tensor(leaf) else leaf


def opened(bundle: Bundle, entry: Entry, scratch: Path, model: nn.Module) -> Iterator[Graph]:
    """The graph, opened and bound anew for each module that it serves, by reference."""
    folder = scratch / entry.id
    if not folder.exists():
        unpack_all(bundle.path / entry.file, folder)
    for path in entry.modules:
        graph = open_graph(folder, entry, CPU)
        module = model.get_submodule(path)
        own: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
        own |= dict(module.named_buffers(remove_duplicate=False))
        graph.bind(own | dict(shipped_tensors(entry, bundle.path, CPU)))
        yield graph


def adapted(entry: Entry, call: Recorded) -> list[torch.Tensor]:
    """The inputs of a graph for a recorded call: expanded, with the masks that were left out.

    Raises:
        Elsewhere: the cache is as another graph wants it.
        Unlike: the graph has another call, or cannot have these sizes.
    """
    template = {"dict": {"args": [*entry.call["args"]], "kwargs": {"dict": entry.call["kwargs"]}}}
    value = {"args": [*call.args], "kwargs": call.kwargs}
    given = dict(tensors_at(template, value, "the call"))
    cached(entry, call, given)
    sizes = sizes_of(entry, given)
    return [fitted(item, given.get(at), sizes, call.causal) for at, item in enumerate(entry.inputs)]


def tensors_at(template: Any, value: Any, where: str) -> Iterator[tuple[int, Any]]:
    """Walk a template and a value together: what stands in the place of each tensor.

    Raises:
        Unlike: they have another structure, or another constant.
    """
    if isinstance(template, dict):
        ((word, inner),) = template.items()
        if word == "tensor":
            yield inner, value
        elif word in {"dict", "fields"}:
            same_names(inner, value, where)
            for name in (each for each in inner if each in value):
                yield from tensors_at(inner[name], value[name], f"{where}: {name}")
        elif word == "tuple":
            yield from tensors_at([*inner], [*value], where)
        # Sizes are what the shapes say; a cache has its own tensors; "any" is not computed with.
        return
    yield from listed(template, value, where)


def listed(template: Any, value: Any, where: str) -> Iterator[tuple[int, Any]]:
    """The same of a list, or of a constant.

    Raises:
        Unlike: they differ.
    """
    if isinstance(template, list) and isinstance(value, list) and len(template) == len(value):
        for at, (item, inner) in enumerate(zip(template, value, strict=True)):
            yield from tensors_at(item, inner, f"{where}[{at}]")
    elif is_tensor(value) or template != value:
        kind = f"a tensor {list(value.shape)}" if is_tensor(value) else repr(value)
        raise Unlike(f"{where} is {kind}, the graph has {template!r}")


def same_names(template: Mapping[str, Any], value: Mapping[str, Any], where: str) -> None:
    """Refuse keywords that only one of them has; what may be anything may be missing, too.

    Raises:
        Unlike: with their names.
    """
    free = {name for name, item in template.items() if isinstance(item, dict) and "any" in item}
    if odd := (template.keys() ^ value.keys()) - free:
        raise Unlike(f"{where}: only one of graph and eager has {', '.join(sorted(odd))}")


def cached(entry: Entry, call: Recorded, given: dict[int, Any]) -> None:
    """Put the cache that a block was called with into a graph's inputs, and cut its masks to it.

    Raises:
        Elsewhere: the graph is for a full window and this one is not, or the other way round.
    """
    cache, before = entry.cache, call.before
    if cache is None:
        return
    if before is None:
        raise Elsewhere("nothing is in the cache before the first call")
    seq = sizes_of(entry, given).get("seq", 1)
    full = cache.window is not None and before.filled >= cache.window
    places = before.keys.shape[2]
    if (cache.kind == "sliding") != full or (not full and before.filled + seq > places):
        raise Elsewhere("the window is not full before the call, and is after it")
    given[cache.keys], given[cache.values] = before.keys.clone(), before.values.clone()
    if cache.position is None:
        return
    given[cache.position] = torch.arange(before.filled, before.filled + seq)
    for at, item in enumerate(entry.inputs):
        if "filled" in item.shape and is_tensor(given.get(at)):
            axis = item.shape.index("filled")
            given[at] = given[at].narrow(axis, 0, before.filled + seq)


def sizes_of(entry: Entry, given: Mapping[int, Any]) -> dict[str, int]:
    """The sizes of the dims in a call; an axis of one may stand for any size."""
    sizes: dict[str, int] = {}
    for at, item in enumerate(entry.inputs):
        tensor = given.get(at)
        if not is_tensor(tensor):
            continue
        if tensor.dim() != len(item.shape):
            raise Unlike(f"{item.name} is {list(tensor.shape)}, the graph has {list(item.shape)}")
        for size, named in zip(tensor.shape, item.shape, strict=True):
            if isinstance(named, str) and (extent := Extent.parse(named)).plain:
                dim = extent.dims[0]
                sizes[dim] = max(sizes.get(dim, 1), size)
    return sizes


def fitted(item: Input, value: Any, sizes: Mapping[str, int], causal: bool) -> torch.Tensor:
    """One input as the graph takes it.

    Raises:
        Unlike: it is no tensor, and no mask that could be made.
    """
    shape = [n if isinstance(n, int) else Extent.parse(n).at(sizes) for n in item.shape]
    if is_tensor(value):
        try:
            return value.expand(shape).contiguous()  # type: ignore[no-any-return]
        except RuntimeError as why:
            raise Unlike(f"{item.name} is {list(value.shape)}, the graph wants {shape}") from why
    if value is not None or item.values != "mask":
        raise Unlike(f"{item.name} is {value!r}, the graph wants a tensor")
    looked = torch.ones(shape, dtype=torch.bool)
    if causal and len(shape) == 4:
        looked = looked.tril()
    dtype = dtype_of(item.dtype)
    if dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype).masked_fill_(~looked, torch.finfo(dtype).min)
    return looked.to(dtype)


def apart(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
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
