"""A module that somebody built, with the calls that it received, as a source to compile."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hubaoti.artifact.dim_expr import DimExpr
from hubaoti.compiler.capture import Call, Calls
from hubaoti.compiler.dims import span_sizes
from hubaoti.compiler.from_config import NATIVE, Source
from hubaoti.compiler.infer_dims import (
    Dims,
    Series,
    infer_signature,
    mix_sizes,
    read_stated_dims,
    vary_call,
)
from hubaoti.compiler.regions import find_blocks
from hubaoti.compiler.request import DTYPES, CompileRequest, Range, Shape
from hubaoti.compiler.signature import CallSignature
from hubaoti.errors import BadDim, BadRequest
from hubaoti.program.identity import identify_module_program

_CONTAINERS = {list, dict, set, OrderedDict}


def make_source(
    module: nn.Module, request: CompileRequest
) -> tuple[Source, tuple[dict[str, Range], ...]]:
    """A module as a source, and a bucket for each set of calls where there are several.

    Dims come from the request's calls of different sizes, or from `shapes`, which names them; their
    bounds are the sizes that were seen, unless the request has others.

    Raises:
        BadRequest: no call came, calls have different structures, or one holds a KV cache.
        BadDim: `shapes` names what is not there; a dim of the request is in no input.
    """
    sets, shapes = _read_call_sets(request.calls, module), request.shapes
    calls = [call.without_device() for each in sets for call in _require_calls(each)]
    _refuse_caches(module, calls)
    steps = {name: sizes.step for name, sizes in request.dims.items()}
    looked = vary_call(calls[0], shapes, steps) if shapes and len(calls) == 1 else calls
    dims = read_stated_dims(looked, shapes)
    kind = type(module).__name__
    regions = request.regions or ("auto" if find_blocks(module, "auto") else "none")
    try:
        face = infer_signature(looked, dims, None, kind)
    except BadRequest:
        if regions == "none" or shapes:
            raise
        # Its blocks may be called alike though the module is not, as with lists of image sizes.
        dims, face = Dims({}, related=False), CallSignature(calls[0].template, ())
    recorded = {name: dims.series[name] for name in face.dims}
    bounds = {name: span_sizes(sizes) for name, sizes in recorded.items()}
    if shapes and len(calls) == 1:
        _require_bounded(bounds, request)
    source = Source(
        model=module,
        program=identify_module_program(module),
        regions=regions,
        dtype=request.dtype or _find_main_dtype(module),
        attention=_read_attention(module),
        face=face,
        default_dims=bounds,
        config=_get_config(module),
        looks=mix_sizes(recorded),
        recorded=recorded,
        stated=frozenset(request.dims) | _list_named_dims(shapes),
        live=True,
        calls=() if face.inputs else tuple(calls),
        layout=request.layout,
        unpadded=request.layout is not None and _is_unpadded(calls),
    )
    return source, _make_buckets([len(_require_calls(each)) for each in sets], recorded)


def _read_call_sets(calls: Any, model: nn.Module) -> list[Any]:
    """The calls of a module as sets."""
    if calls is None:
        raise BadRequest(
            f"{type(model).__name__} is a module, and how it is called is not known",
            hint="record calls: with hubaoti.capture(module) as calls: ...; compile(..., "
            "calls=calls)",
        )
    if isinstance(calls, Calls):
        return [calls]
    each = list(calls)
    if all(isinstance(call, Call) for call in each):
        return [each]
    if not all(isinstance(one, (Calls, list, tuple)) for one in each):
        raise BadRequest(
            f"calls are {type(calls).__name__} of {type(each[0]).__name__}",
            hint="give what hubaoti.capture recorded, or a list of such",
        )
    return each


def _refuse_caches(module: nn.Module, calls: Sequence[Call]) -> None:
    """Refuse calls that hold a KV cache."""
    if not any(call.caches for call in calls):
        return
    alone = not getattr(_get_config(module), "is_encoder_decoder", False)
    folder = ", or compile the model from its folder with --task generate"
    raise BadRequest(
        f"a call of {type(module).__name__} holds a KV cache, which is made while it runs",
        hint=f"capture calls with use_cache=False{folder if alone else ''}",
    )


def _is_unpadded(calls: Sequence[Call]) -> bool:
    """Whether the masks of all calls left nothing out."""
    named = (pair for call in calls for pair in zip(call.names, call.tensors, strict=True))
    return all(bool(tensor.all()) for name, tensor in named if "mask" in name)


def _require_calls(calls: Calls | Sequence[Call]) -> Sequence[Call]:
    """The calls of one set, of which there is at least one."""
    if isinstance(calls, Calls):
        return calls.require()
    if not calls or not all(isinstance(call, Call) for call in calls):
        raise BadRequest("a set of calls holds no calls", hint="see hubaoti.capture")
    return calls


def _require_bounded(bounds: Mapping[str, Range], request: CompileRequest) -> None:
    """Of a dim that only a name tells of, no size but one was seen: its bounds must be given."""
    for name in (each for each in bounds if each not in request.dims):
        raise BadDim(
            f"{name} is named, and only one size of it was seen",
            hint=f'give its bounds: dims={{"{name}": (1, 4096)}}, or calls of other sizes',
        )


def _list_named_dims(shapes: Mapping[str, Shape]) -> frozenset[str]:
    """The dims that shapes name, also within extents as `2*seq`."""
    words = (size for shape in shapes.values() for size in shape if isinstance(size, str))
    return frozenset(name for word in words for name in DimExpr.parse(word).dims)


def _find_main_dtype(module: nn.Module) -> str:
    """The dtype that most of a module's numbers have."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    found = counts.most_common(1)
    dtype = str(found[0][0]).removeprefix("torch.") if found else "none"
    if dtype not in DTYPES:
        raise BadRequest(
            f"{type(module).__name__} computes in {dtype}",
            hint=f"convert it before: {', '.join(DTYPES)}",
        )
    return dtype


def _read_attention(module: nn.Module) -> str:
    """The attention that a model of transformers says it has, or that all parts of a module say.

    Else it is the module's own, as where they differ: none is put in the place of another.
    """
    parts = (getattr(part, "config", None) for part in module.modules())
    for configs in ((_get_config(module),), parts):
        words = {getattr(config, "_attn_implementation", None) for config in configs}
        names = [word for word in words if isinstance(word, str)]
        if len(names) == 1:
            return names[0]
    return NATIVE


def _get_config(module: nn.Module) -> Any:
    """The config of a model of transformers."""
    config = getattr(module, "config", None)
    return config if hasattr(config, "get_text_config") else None


def _make_buckets(
    counts: Sequence[int], recorded: Mapping[str, Series]
) -> tuple[dict[str, Range], ...]:
    """A bucket for each of several sets of calls, over the dims that changed between the sets."""
    if len(counts) < 2:
        return ()
    ends = [0, *itertools.accumulate(counts)]
    spans = {
        name: [span_sizes(sizes[start:end]) for start, end in itertools.pairwise(ends)]
        for name, sizes in recorded.items()
    }
    changed = {name: each for name, each in spans.items() if len({*each}) > 1}
    return tuple({name: each[i] for name, each in changed.items()} for i in range(len(counts)))


@contextmanager
def evaluate_unchanged(module: nn.Module) -> Iterator[None]:
    """Around work on somebody's module: inside it is in eval mode, afterwards it is as it was.

    Its code is asked with inputs of ours, and run without storage: what it counts, keeps and writes
    of that is of no use to its owner. Only parameters are not kept: they may fill the memory.
    """
    parts = [*module.modules()]
    kept = [
        (
            own,
            {**own},
            {name: each.copy() for name, each in own.items() if type(each) in _CONTAINERS},
        )
        for own in map(vars, parts)
    ]
    buffers = [
        (buffer, _get_tensor_version(buffer), buffer.detach().clone())
        for buffer in module.buffers()
    ]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for own, before, contents in kept:
            _restore_attributes(own, before, contents)
        for buffer, version, values in buffers:
            if _get_tensor_version(buffer) != version:
                buffer.detach().copy_(values)


def _restore_attributes(
    attributes: dict[str, Any], before: Mapping[str, Any], contents: Mapping[str, Any]
) -> None:
    """Give a module the attributes that it had; lists and dictionaries what they held."""
    for name in attributes.keys() - before.keys():
        del attributes[name]
    attributes.update(before)
    for name, content in contents.items():
        container = before[name]
        container.clear()
        (container.extend if isinstance(container, list) else container.update)(content)


def _get_tensor_version(tensor: torch.Tensor) -> int:
    """A number that changes when a tensor is written; a tensor of inference mode has none."""
    return -1 if tensor.is_inference() else tensor._version
