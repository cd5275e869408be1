"""The plan: which regions a model is compiled as, with which dims and buckets, into which graphs.

Nothing is compiled here, and nothing has memory yet: `hubaoti compile --explain` prints a plan.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hubaoti.compiler import kv_inputs as caches
from hubaoti.compiler.dims import (
    DimRanges,
    choose_example_sizes,
    limit_dims,
    require_covered,
    span_sizes,
)
from hubaoti.compiler.export import export
from hubaoti.compiler.fake_run import BlockCalls, observe
from hubaoti.compiler.from_config import Source, use_attention
from hubaoti.compiler.graph_plans import (
    WHOLE_MODEL,
    Form,
    GraphPlan,
    add_causal,
    add_lengths,
    add_unmasked,
    read_told_width,
    split_into_buckets,
)
from hubaoti.compiler.images import AXES, vary_image_size
from hubaoti.compiler.infer_dims import Dims, infer_signature
from hubaoti.compiler.regions import (
    Group,
    find_blocks,
    find_lone_blocks,
    group_blocks,
    is_block,
    list_block_attributes,
)
from hubaoti.compiler.request import CompileRequest
from hubaoti.compiler.sample_calls import count_runs, prepare_sample_call
from hubaoti.compiler.signature import CallSignature, add_cache_inputs, specialize_full_window
from hubaoti.errors import BadRequest, CompileFailed, HubaotiError
from hubaoti.runtime.call_template import CAUSAL, takes_containers


@dataclass(frozen=True, slots=True)
class Plan:
    """All graphs of a model, the dims of all of them, and what was left out, and why."""

    source: Source
    dims: DimRanges
    units: tuple[GraphPlan, ...]
    left_out: tuple[str, ...] = ()


def make_plan(source: Source, request: CompileRequest, device: torch.device) -> Plan:
    """Find the regions of a model, how they are called, and which graphs serve them.

    Raises:
        BadDim: a dim that the model does not have, or a shape that no bucket serves.
        CompileFailed: no block of it can be compiled; the reasons are in the message.
    """
    blocks = _choose_blocks(source, device)
    if blocks:
        varied = vary_image_size(source, request.dims, lambda s: _observe_blocks(s, blocks, device))
        if varied is not source and (
            {*AXES} & {*request.dims} or _can_trace(varied, blocks, device)
        ):
            source = varied
    own = {name: sizes for name, sizes in request.dims.items() if name in source.default_dims}
    dims = limit_dims(own, source.default_dims, source.positions)
    left_out: list[str] = []
    if blocks:
        found = Dims(dict(source.looks), related=not source.calls and "height" not in source.looks)
        source, forms, left_out = _find_forms(source, blocks, dims, found, device)
        dims |= {name: span_sizes(found.series[name]) for name in found.series if name not in dims}
    else:
        _require_no_cache(source)
        source = replace(source, regions="none")
        face = _derive_whole_signature(source, device)
        own_masks = _looks_at_own_masks(source, face, device)
        forms = [Form(Group(WHOLE_MODEL, ("",)), "", face, own_masks=own_masks)]
    dims = limit_dims(request.dims, dims, source.positions)
    require_covered(dims, request.buckets)
    units = [unit for form in forms for unit in split_into_buckets(form, dims, request.buckets)]
    if request.is_for_gpus and choose_tracing_attention(source) == caches.ATTENTION:
        units = [each for unit in units for each in add_unmasked(unit)]
    if request.is_for_gpus:
        units = _add_told(source, units, add_causal)
    used = {name for unit in units for name in unit.bounds} | {*source.default_dims}
    kept = {name: sizes for name, sizes in dims.items() if name in used and name != "filled"}
    return Plan(source, kept, tuple(units), tuple(left_out))


def add_fa3_graphs(plan: Plan) -> Plan:
    """The plan with graphs for FlashAttention-3 before those of decoders' blocks that take masks.

    The same plan where there are none.
    """
    units = _add_told(plan.source, plan.units, add_lengths)
    return replace(plan, units=tuple(units)) if len(units) > len(plan.units) else plan


def _add_told(
    source: Source, units: Sequence[GraphPlan], add: Callable[[GraphPlan], list[GraphPlan]]
) -> list[GraphPlan]:
    """Units, and what is added to those whose attention looks at nothing that comes later."""
    if source.attention != "sdpa":
        return [*units]
    parts = (source.model.get_submodule(unit.region) for unit in units)
    told = [any(getattr(p, CAUSAL, False) for p in part.modules()) for part in parts]
    pairs = zip(units, told, strict=True)
    return [each for unit, is_told in pairs for each in (add(unit) if is_told else [unit])]


def drop_told_graphs(plan: Plan, widest: int) -> Plan:
    """The plan without graphs that are told lengths of heads that are wider than a kernel takes.

    The same plan where there are none.
    """
    units = tuple(unit for unit in plan.units if (read_told_width(unit) or 0) <= widest)
    return plan if len(units) == len(plan.units) else replace(plan, units=units)


def _require_no_cache(source: Source) -> None:
    """Refuse a graph of a whole model over a KV cache: a graph takes that of one layer."""
    if source.program.task == "generate":
        raise BadRequest(
            f"{type(source.model).__name__} has a KV cache for each layer, and a graph takes one",
            hint="compile its blocks: leave --regions none out, or name them with --regions PATH",
        )


def _can_trace(source: Source, blocks: Mapping[str, nn.Module], device: torch.device) -> bool:
    """Whether torch traces a model's blocks for every size of images; some code counts with one."""
    found = Dims(dict(source.looks), related=False)
    _, forms, left_out = _find_forms(source, blocks, source.default_dims, found, device)
    known = {name: span_sizes(sizes) for name, sizes in found.series.items()} | source.default_dims
    try:
        for form in forms:
            bounds = {name: known[name] for name in form.face.dims}
            inputs = form.face.make_empty_inputs(choose_example_sizes(bounds), "meta")
            export(
                blocks[form.group.modules[0]], form.face, bounds, inputs, stated=frozenset(bounds)
            )
    except HubaotiError:
        return False
    return not left_out


def _derive_whole_signature(source: Source, device: torch.device) -> CallSignature:
    """How a whole model is called: positions are its own affair, and so are flags that say nothing.

    Blocks are given tables of positions, which are whole where the model is given positions; who
    calls a model gives none.
    """
    if source.live or source.program.task != "forward":
        return source.face
    face = source.face.drop_argument("position_ids")
    runs = [prepare_sample_call(replace(source, face=face), 0, {}, device)]
    try:
        (seen,) = observe(source.model, {"": source.model}, runs, device).values()
    except CompileFailed:  # what it is worth is seen when it is exported
        return face
    return face.accept_any(seen.idle)


def _looks_at_own_masks(source: Source, face: CallSignature, device: torch.device) -> bool:
    """Whether a whole module gives its attention the mask that it is called with, as it is."""
    if not any(item.values == "mask" and len(item.shape) == 4 for item in face.inputs):
        return False
    run = prepare_sample_call(replace(source, face=face), 0, {}, device)
    try:
        (seen,) = observe(source.model, {"": source.model}, [run], device).values()
    except CompileFailed:  # as above
        return False
    return seen.own_masks


def _choose_blocks(source: Source, device: torch.device) -> Mapping[str, nn.Module]:
    """The blocks that were asked for; none where the whole model is to be one graph."""
    if source.regions == "none":
        return {}
    blocks = find_blocks(source.model, source.regions)
    if blocks or source.regions != "auto":
        return blocks
    return _find_reused_blocks(source, find_lone_blocks(source.model), device)


def _find_reused_blocks(
    source: Source, blocks: Mapping[str, nn.Module], device: torch.device
) -> dict[str, nn.Module]:
    """Those of some blocks that the model calls more than once, as ALBERT does its only one."""
    try:
        runs = [prepare_sample_call(source, 0, blocks, device)] if blocks else []
        with use_attention(source.model, source.attention):
            found = observe(source.model, blocks, runs, device)
    except CompileFailed:  # it cannot be run so; as one graph it may be compiled
        return {}
    return {path: blocks[path] for path, seen in found.items() if seen.times > 1}


def _find_forms(
    source: Source,
    blocks: Mapping[str, nn.Module],
    dims: DimRanges,
    found: Dims,
    device: torch.device,
) -> tuple[Source, list[Form], list[str]]:
    """The forms of a model's blocks, and what stays eager, and why; `found` learns their dims."""
    before = {path: list_block_attributes(block) for path, block in blocks.items()}
    source, observed = _observe_blocks(source, blocks, device)
    if parts := _split_hybrid_blocks(blocks, observed):
        return _find_forms(source, parts, dims, found, device)
    found.series = dict(source.looks)
    forms: list[Form] = []
    left_out = [f"{path}: {seen.problem}" for path, seen in observed.items() if seen.problem]
    fine = {path: seen for path, seen in observed.items() if not seen.problem}
    for group in group_blocks(blocks, fine, before):
        path = group.modules[0]
        try:
            faces = _infer_block_signatures(source, blocks[path], fine[path], dims, found)
        except (CompileFailed, BadRequest) as error:
            left_out.append(f"{group.id}: {error}")
            continue
        windows = {face.cache.window for face in faces.values() if face.cache} - {None}
        window = next(iter(windows), None)
        own_masks = fine[path].own_masks
        forms += [Form(group, suffix, face, window, own_masks) for suffix, face in faces.items()]
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


def _split_hybrid_blocks(
    blocks: Mapping[str, nn.Module], observed: Mapping[str, BlockCalls]
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


def _observe_blocks(
    source: Source, blocks: Mapping[str, nn.Module], device: torch.device
) -> tuple[Source, dict[str, BlockCalls]]:
    """What the blocks are given, with the fastest attention that the model can have.

    A module may take only sizes that go together, as those of its calls.
    """
    tries = [(choose_tracing_attention(source), source.looks)]
    if source.live and source.recorded != source.looks:
        tries.append((source.attention, source.recorded))
    elif source.attention != "eager" and not source.live:
        tries.append(("eager", source.looks))
    for attention, sizes in tries:
        looked = replace(source, looks=sizes)
        looks = [
            prepare_sample_call(looked, index, blocks, device)
            for index in range(count_runs(looked))
        ]
        try:
            with use_attention(source.model, attention):
                found = observe(source.model, blocks, looks, device, source.unpadded)
        except CompileFailed as error:
            if (attention, sizes) == tries[-1] or not (source.live or "attention" in str(error)):
                raise
            continue
        kept = "sdpa" if attention == caches.ATTENTION else attention
        return replace(looked, attention=kept), found
    raise AssertionError("the last try answers or raises")


def choose_tracing_attention(source: Source, unit: GraphPlan | None = None) -> str:
    """The attention that graphs are traced with: ours where heads are grouped, or over a cache.

    Over a cache transformers' own repeats keys in memory; and what it repeats torch 2.11 does not
    export for every length. A `unit` that takes only some masks has one that does not look at them.
    """
    if unit is not None and (unit.unmasked or unit.masks):
        caches.register_attention()
        return caches.UNMASKED if unit.unmasked else caches.TOLD[unit.masks or ""]
    if source.attention != "sdpa" or source.live or not _uses_attention_registry(source.model):
        return source.attention
    if source.program.task != "generate" and not _has_groups(source.config):
        return source.attention
    caches.register_attention()
    return caches.ATTENTION


def _uses_attention_registry(model: nn.Module) -> bool:
    """Whether a model asks transformers for its attention by name.

    Code of before that has its own for each name it knows, and takes the slow one for any other.
    """
    files = {type(module).__module__ for module in model.modules()}
    return any(hasattr(sys.modules.get(file), "ALL_ATTENTION_FUNCTIONS") for file in files)


def _has_groups(config: Any) -> bool:
    """Whether several heads of a model share keys and values."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    return (getattr(text, "num_key_value_heads", None) or heads) != heads


def _infer_block_signatures(
    source: Source, block: nn.Module, seen: BlockCalls, dims: DimRanges, found: Dims
) -> dict[str, CallSignature]:
    """How a block is called, by the suffix of its graph's name: once, or twice with a window.

    Raises:
        CompileFailed, BadRequest: no graph can be called so.
    """
    if seen.recurrent:
        raise CompileFailed(
            "it keeps recurrent states in the cache, or an index of its keys, and graphs carry "
            "nothing but keys and values"
        )
    face = infer_signature(seen.calls, found, source.vocabulary, type(block).__name__)
    if source.layout is None:  # loaders without a manifest give a graph all that a call has
        face = face.drop_inputs(seen.unused).accept_any(seen.idle)
    held = next((cache for call in seen.calls for cache in call.caches), None)
    if held is None:
        return {"": face}
    _refuse_shared(seen, face, type(block).__name__)
    if not all(isinstance(layer, caches.Seen) for layer in getattr(held, "layers", [None])):
        raise CompileFailed(
            "it is given a KV cache that the model makes for itself; captured with "
            "use_cache=False it is given none"
        )
    puts = [put for layer in held.layers for put in getattr(layer, "puts", ())]
    index = caches.count_layers(block) - 1
    puts = held.layers[index].puts or puts
    if not puts:
        return {"": face}
    face = add_cache_inputs(face, *puts[0])
    window = caches.find_layer_window(source.config, index)
    if window is None or "cache" not in dims or dims["cache"].high < window:
        return {"": face}
    return {"": face, "-full": specialize_full_window(face, window)}


def _refuse_shared(seen: BlockCalls, face: CallSignature, kind: str) -> None:
    """Refuse a block that gives others what it has of its KV cache, or takes such from them.

    A graph sees of a cache what is filled, the module all of it: one that answers after the other
    would be given keys of another length.
    """
    if seen.writes or takes_containers(face.template):
        does = "leaves something in" if seen.writes else "takes lists or dictionaries in"
        raise CompileFailed(
            f"capture: {kind} {does} its call, beside its KV cache",
            hint="compile the model with --task forward; its generate stays eager",
        )
