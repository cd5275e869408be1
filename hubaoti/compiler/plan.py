"""The plan: which regions a model is compiled as, with which dims and buckets, into which graphs.

Nothing is compiled here, and nothing has memory yet: `hubaoti compile --explain` prints a plan.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hubaoti.compiler import cache as caches
from hubaoti.compiler.export import export
from hubaoti.compiler.faces import Face, sliding, with_cache
from hubaoti.compiler.images import AXES, of_any_size
from hubaoti.compiler.infer import Dims, face_of
from hubaoti.compiler.looks import look, runs_of
from hubaoti.compiler.observe import Observed, observe
from hubaoti.compiler.regions import Group, alone, attributes, blocks_of, groups_of, is_block
from hubaoti.compiler.request import Range, Request
from hubaoti.compiler.shapes import (
    Bounds,
    bounded,
    bucket_name,
    example_sizes,
    of_dims,
    require_covered,
)
from hubaoti.compiler.source import Source, attention_of
from hubaoti.errors import BadRequest, CompileFailed, HubaotiError
from hubaoti.extents import Extent
from hubaoti.runtime.checks import dtype_of
from hubaoti.runtime.template import takes_containers

ROOT = "root"


@dataclass(frozen=True, slots=True)
class Unit:
    """One graph to build: the face it has, for which sizes, and the modules it serves."""

    id: str
    modules: tuple[str, ...]
    face: Face
    bounds: Bounds
    order: int = 0

    @property
    def region(self) -> str:
        """The first of the modules, which is the one that is compiled."""
        return self.modules[0]


@dataclass(frozen=True, slots=True)
class Plan:
    """All graphs of a model, the dims of all of them, and what was left out, and why."""

    source: Source
    dims: Bounds
    units: tuple[Unit, ...]
    left_out: tuple[str, ...] = ()


def plan(source: Source, request: Request, device: torch.device) -> Plan:
    """Find the regions of a model, how they are called, and which graphs serve them.

    Raises:
        BadDim: a dim that the model does not have, or a shape that no bucket serves.
        CompileFailed: no block of it can be compiled; the reasons are in the message.
    """
    blocks = blocks_to_compile(source, device)
    if blocks:
        varied = of_any_size(source, request.dims, lambda s: observed_with(s, blocks, device))
        if varied is not source and ({*AXES} & {*request.dims} or traces(varied, blocks, device)):
            source = varied
    own = {name: sizes for name, sizes in request.dims.items() if name in source.default_dims}
    dims = bounded(own, source.default_dims, source.positions)
    forms: list[Form] = [Form(Group(ROOT, ("",)), "", source.face)]
    left_out: list[str] = []
    if blocks:
        found = Dims(dict(source.looks), related=not source.calls and "height" not in source.looks)
        source, forms, left_out = forms_of(source, blocks, dims, found, device)
        dims |= {name: span(found.series[name]) for name in found.series if name not in dims}
    else:
        require_no_cache(source)
        source = replace(source, regions="none")
        forms = [Form(Group(ROOT, ("",)), "", whole_call(source, device))]
    dims = bounded(request.dims, dims, source.positions)
    require_covered(dims, request.buckets)
    units = [unit for form in forms for unit in in_buckets(form, dims, request.buckets)]
    used = {name for unit in units for name in unit.bounds} | {*source.default_dims}
    kept = {name: sizes for name, sizes in dims.items() if name in used and name != "filled"}
    return Plan(source, kept, tuple(units), tuple(left_out))


def require_no_cache(source: Source) -> None:
    """Refuse a graph of a whole model over a KV cache: a graph takes that of one layer.

    Raises:
        BadRequest: it was to generate.
    """
    if source.program.task == "generate":
        raise BadRequest(
            f"{type(source.model).__name__} has a KV cache for each layer, and a graph takes one",
            hint="compile its blocks: leave --regions none out, or name them with --regions PATH",
        )


def traces(source: Source, blocks: Mapping[str, nn.Module], device: torch.device) -> bool:
    """Whether torch traces a model's blocks for every size of images; some code counts with one."""
    found = Dims(dict(source.looks), related=False)
    _, forms, left_out = forms_of(source, blocks, source.default_dims, found, device)
    known = {name: span(sizes) for name, sizes in found.series.items()} | source.default_dims
    try:
        for form in forms:
            bounds = {name: known[name] for name in form.face.dims}
            block = blocks[form.group.modules[0]]
            export(block, form.face, bounds, bare_inputs(form.face, bounds), frozenset(bounds))
    except HubaotiError:
        return False
    return not left_out


def bare_inputs(face: Face, bounds: Bounds) -> list[torch.Tensor]:
    """Inputs without values at sizes to trace with."""
    sizes = example_sizes(bounds)
    shapes = [
        [n if isinstance(n, int) else Extent.parse(n).at(sizes) for n in entry.shape]
        for entry in face.inputs
    ]
    return [
        torch.empty(shape, dtype=dtype_of(entry.dtype), device="meta")
        for shape, entry in zip(shapes, face.inputs, strict=True)
    ]


def whole_call(source: Source, device: torch.device) -> Face:
    """How a whole model is called: positions are its own affair, and so are flags that say nothing.

    Blocks are given tables of positions, which are whole where the model is given positions; who
    calls a model gives none.
    """
    if source.live or source.program.task != "forward":
        return source.face
    face = source.face.leaving_out("position_ids")
    runs = [look(replace(source, face=face), 0, {}, device)]
    try:
        (seen,) = observe(source.model, {"": source.model}, runs, device).values()
    except CompileFailed:  # what it is worth is seen when it is exported
        return face
    return face.freed(seen.idle)


def blocks_to_compile(source: Source, device: torch.device) -> Mapping[str, nn.Module]:
    """The blocks that were asked for; none where the whole model is to be one graph."""
    if source.regions == "none":
        return {}
    blocks = blocks_of(source.model, source.regions)
    if blocks or source.regions != "auto":
        return blocks
    return called_again(source, alone(source.model), device)


def called_again(
    source: Source, blocks: Mapping[str, nn.Module], device: torch.device
) -> dict[str, nn.Module]:
    """Those of some blocks that the model calls more than once, as ALBERT does its only one."""
    try:
        runs = [look(source, 0, blocks, device)] if blocks else []
        with attention_of(source.model, source.attention):
            found = observe(source.model, blocks, runs, device)
    except CompileFailed:  # it cannot be run so; as one graph it may be compiled
        return {}
    return {path: blocks[path] for path, seen in found.items() if seen.times > 1}


def span(series: Sequence[int]) -> Range:
    """The bounds of the sizes that were seen."""
    return Range(min(series), max(series))


@dataclass(frozen=True, slots=True)
class Form:
    """One way in which the modules of a group are called; `suffix` ends the name of its graph.

    `window` is how many places their KV cache has at most, whatever others have.
    """

    group: Group
    suffix: str
    face: Face
    window: int | None = None


def forms_of(
    source: Source,
    blocks: Mapping[str, nn.Module],
    dims: Bounds,
    found: Dims,
    device: torch.device,
) -> tuple[Source, list[Form], list[str]]:
    """The forms of a model's blocks, and what stays eager, and why; `found` learns their dims."""
    before = {path: attributes(block) for path, block in blocks.items()}
    source, observed = observed_with(source, blocks, device)
    if parts := parts_beside_states(blocks, observed):
        return forms_of(source, parts, dims, found, device)
    found.series = dict(source.looks)
    forms: list[Form] = []
    left_out = [f"{path}: {seen.problem}" for path, seen in observed.items() if seen.problem]
    fine = {path: seen for path, seen in observed.items() if not seen.problem}
    for group in groups_of(blocks, fine, before):
        path = group.modules[0]
        try:
            faces = faces_of(source, blocks[path], fine[path], dims, found)
        except (CompileFailed, BadRequest) as why:
            left_out.append(f"{group.id}: {why}")
            continue
        windows = {face.cache.window for face in faces.values() if face.cache} - {None}
        window = next(iter(windows), None)
        forms += [Form(group, suffix, face, window) for suffix, face in faces.items()]
    if not forms:
        reasons = "; ".join(left_out) or "the model calls none of them"
        generates = source.program.task == "generate"
        raise CompileFailed(
            f"capture: none of the blocks can be compiled: {reasons}",
            hint="generate with it as it is; --task forward compiles its calls without a cache"
            if generates
            else "compile the whole model with --regions none, or one place with --regions PATH",
        )
    return source, forms, left_out


def parts_beside_states(
    blocks: Mapping[str, nn.Module], observed: Mapping[str, Observed]
) -> dict[str, nn.Module]:
    """The blocks, but of those that keep recurrent states beside keys and values their parts, of
    which the attention can be served; none where there is no such block."""
    mixed = [path for path, seen in observed.items() if seen.recurrent and seen.attends]
    parts = {
        f"{path}.{name}": part
        for path in mixed
        for name, part in blocks[path].named_children()
        if is_block(part)
    }
    kept = {path: block for path, block in blocks.items() if path not in mixed}
    return kept | parts if parts else {}


def observed_with(
    source: Source, blocks: Mapping[str, nn.Module], device: torch.device
) -> tuple[Source, dict[str, Observed]]:
    """What the blocks are given, with the fastest attention that the model can have.

    A module may take only sizes that go together, as those of its calls.
    """
    tries = [(tracing_attention(source), source.looks)]
    if source.live and source.recorded != source.looks:
        tries.append((source.attention, source.recorded))
    elif source.attention != "eager" and not source.live:
        tries.append(("eager", source.looks))
    for attention, sizes in tries:
        looked = replace(source, looks=sizes)
        looks = [look(looked, at, blocks, device) for at in range(runs_of(looked))]
        try:
            with attention_of(source.model, attention):
                found = observe(source.model, blocks, looks, device, source.unpadded)
        except CompileFailed as why:
            if (attention, sizes) == tries[-1] or not (source.live or "attention" in str(why)):
                raise
            continue
        kept = "sdpa" if attention == caches.ATTENTION else attention
        return replace(looked, attention=kept), found
    raise AssertionError("the last try answers or raises")


def tracing_attention(source: Source) -> str:
    """The attention that graphs are traced with: ours where heads are grouped, or over a cache.

    Over a cache transformers' own repeats keys in memory; and what it repeats torch 2.11 does not
    export for every length.
    """
    if source.attention != "sdpa" or source.live or not takes_any(source.model):
        return source.attention
    if source.program.task != "generate" and not has_groups(source.config):
        return source.attention
    caches.register()
    return caches.ATTENTION


def takes_any(model: nn.Module) -> bool:
    """Whether a model asks transformers for its attention by name.

    Code of before that has its own for each name it knows, and takes the slow one for any other.
    """
    files = {type(module).__module__ for module in model.modules()}
    return any(hasattr(sys.modules[file], "ALL_ATTENTION_FUNCTIONS") for file in files)


def has_groups(config: Any) -> bool:
    """Whether several heads of a model share keys and values."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    return (getattr(text, "num_key_value_heads", None) or heads) != heads


def faces_of(
    source: Source, block: nn.Module, seen: Observed, dims: Bounds, found: Dims
) -> dict[str, Face]:
    """How a block is called, by the suffix of its graph's name: once, or twice with a window.

    Raises:
        CompileFailed, BadRequest: no graph can be called so.
    """
    if seen.recurrent:
        raise CompileFailed(
            "it keeps recurrent states in the cache, or an index of its keys, and graphs carry "
            "nothing but keys and values"
        )
    face = face_of(seen.calls, found, source.vocabulary, type(block).__name__)
    if source.layout is None:  # loaders without a manifest give a graph all that a call has
        face = face.without(seen.unused).freed(seen.idle)
    held = next((cache for call in seen.calls for cache in call.caches), None)
    if held is None:
        return {"": face}
    refuse_shared(seen, face, type(block).__name__)
    if not all(isinstance(layer, caches.Seen) for layer in getattr(held, "layers", [None])):
        raise CompileFailed(
            "it is given a KV cache that the model makes for itself; captured with "
            "use_cache=False it is given none"
        )
    puts = [put for layer in held.layers for put in getattr(layer, "puts", ())]
    index = caches.layers_of(block) - 1
    puts = held.layers[index].puts or puts
    if not puts:
        return {"": face}
    face = with_cache(face, *puts[0])
    window = caches.window_of(source.config, index)
    if window is None or "cache" not in dims or dims["cache"].high < window:
        return {"": face}
    return {"": face, "-full": sliding(face, window)}


def refuse_shared(seen: Observed, face: Face, kind: str) -> None:
    """Refuse a block that gives others what it has of its KV cache, or takes such from them.

    A graph sees of a cache what is filled, the module all of it: one that answers after the other
    would be given keys of another length.

    Raises:
        CompileFailed: with the block's class.
    """
    if seen.writes or takes_containers(face.template):
        does = "leaves something in" if seen.writes else "takes lists or dictionaries in"
        raise CompileFailed(
            f"capture: {kind} {does} its call, beside its KV cache",
            hint="compile the model with --task forward; its generate stays eager",
        )


def in_buckets(form: Form, dims: Bounds, buckets: Sequence[Mapping[str, Range]]) -> list[Unit]:
    """The units of one form: one for all sizes, or one for each bucket, in their order.

    A bucket over a dim that the face does not have says nothing about it. A window that is no
    length of the caches asked for is one of its layers' caches, which have its places.
    """
    face, name = form.face, f"{form.group.id}{form.suffix}"
    if "cache" in face.dims and form.window is not None and not has(dims["cache"], form.window):
        dims = {**dims, "cache": Range(min(form.window, dims["cache"].low), dims["cache"].high)}
        buckets = [{n: b for n, b in bucket.items() if n != "cache"} for bucket in buckets]
    named = [{n: b for n, b in bucket.items() if n in face.dims} for bucket in buckets]
    kept = [bucket for at, bucket in enumerate(named) if bucket and bucket not in named[:at]]
    return [
        Unit(
            f"{name}-{bucket_name(bucket)}" if bucket else name,
            form.group.modules,
            face,
            of_dims(dims, face.dims, bucket),
            order,
        )
        for order, bucket in enumerate(kept or [{}])
    ]


def has(sizes: Range, size: int) -> bool:
    """Whether a size is one of a dim's."""
    return sizes.low <= size <= sizes.high and size % sizes.step == 0
