"""Attention of a program, given to CUDA's kernels by their names.

Exported on a CPU, `scaled_dot_product_attention` stays one node. Where that lies on a CUDA device,
torch chooses a kernel by what the building machine is and has switched on, and leaves guards of the
example's sizes. Here the program says which kernel it means, by the node's own dtype and sizes: the
same on every machine, and right at every size within the dims.

What torch's own choice looks at before it takes a kernel, and the kernels' fakes do not, stands
here (`sdp_utils.cpp` and both kernels' host code, of torch 2.11 to 2.15).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import pad

from hubaoti.compiler.symbols import list_parts
from hubaoti.errors import CompileFailed, first_line
from hubaoti.runtime.attention_ops import FA3, call_forward

_aten = torch.ops.aten
FLASH, EFFICIENT = "flash", "efficient"

_HALF = (torch.bfloat16, torch.float16)
_UNIT = 8  # elements of which a kernel wants widths, strides and offsets to be multiples
_WIDEST = 256  # heads that flash takes
_ROW = 16  # the same of a mask's rows, in bfloat16 and float32
_MOST = 65535  # blocks along the second and the third axis of a launch
# Kernels multiply a mask by log2(e), in float32. Below this that would be minus infinity, and a row
# that is masked by such numbers alone zeros, where eager answers the mean of the values.
_LOWEST = -1e38
_NOT_OURS = {  # attention that was chosen for another device, or has no kernel that stands here
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_fused_attention_overrideable",
    "_fused_sdp_choice",
    "flex_attention",
}


def choose_kernels(dtype: str, sm: int, attention: str = "sdpa") -> tuple[str, ...]:
    """The kernels that may be named in a build of a dtype for a capability, the best first.

    None in bfloat16 below 80: a program that attends is refused there, by `name_attention`. Whether
    there can be FlashAttention-3 is `flash_attention.refuse_fa3`'s to say.
    """
    if sm < 80:
        return () if dtype == "bfloat16" else (EFFICIENT,)
    best = (FA3,) if attention == FA3 else ()
    return (*best, FLASH, EFFICIENT) if dtype in {"bfloat16", "float16"} else (EFFICIENT,)


def name_attention(
    program: ExportedProgram, kernels: Sequence[str], widest: int = _WIDEST
) -> ExportedProgram:
    """The program with a kernel's name in the place of each attention; the same without any.

    FlashAttention-3 takes heads up to `widest`.

    Raises:
        CompileFailed: none of the kernels computes what a node does, or attention was chosen for
            another device already.
    """
    targets = _list_targets(program)
    if foreign := sorted(targets & _NOT_OURS):
        raise CompileFailed(
            f"attention: the model calls {foreign[0]}, which is no kernel of CUDA's",
            hint="let it call torch.nn.functional.scaled_dot_product_attention",
        )
    if "scaled_dot_product_attention" not in targets:
        return program

    def decompose(  # noqa: PLR0913 - as torch calls it
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        call = _Attention(query, key, value, attn_mask, is_causal, scale, widest)
        if dropout_p:
            raise _refuse(
                call, f"drops {dropout_p:g} of what it sees", "call .eval() on the module"
            )
        return _attend(call, enable_gqa, kernels)

    table = {_aten.scaled_dot_product_attention.default: decompose}
    _forget_sums(program)
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch about torch
            named: ExportedProgram = program.run_decompositions(table)
    except CompileFailed as error:  # to whose words torch adds what it was doing
        raise CompileFailed(first_line(error), hint=error.hint) from None
    return named


def _forget_sums(program: ExportedProgram) -> None:
    """Let torch decompose a loaded program of which a size is a sum, as `image+text`.

    Private, checked on torch 2.11 to 2.15: what loads a program notes the range of such a size
    among those of symbols, which what decomposes it minds (`expected sympy.Symbol`). Sizes keep
    their ranges, which follow from the symbols'.
    """
    values = (node.meta.get("val") for node in program.graph.nodes)
    modes = (each.fake_mode for each in values if hasattr(each, "fake_mode"))
    ranges = getattr(next((mode.shape_env for mode in modes), None), "var_to_range", {})
    for size in [size for size in ranges if not size.is_Symbol]:
        del ranges[size]


def _list_targets(program: ExportedProgram) -> set[str]:
    """What a program calls, without namespaces and overloads; in the graphs within it, too."""
    calls = (
        node.target
        for part in list_parts(program)
        for node in part.graph.nodes
        if callable(node.target)
    )
    return {str(call).removeprefix("aten.").partition(".")[0] for call in calls}


@dataclass(frozen=True, slots=True)
class _Attention:
    """What one node is given; (batch, heads, rows, width) once it has four axes.

    Each axis of a mask has the size of (batch, heads, rows, keys), or 1. Heads up to `widest` may
    be given to FlashAttention-3.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    causal: bool
    scale: float | None
    widest: int = _WIDEST

    def __str__(self) -> str:
        query, key, value = (list(each.shape) for each in self.tensors)
        masked = f" under a mask {list(self.mask.shape)}" if self.mask is not None else ""
        dtype = str(self.query.dtype).removeprefix("torch.")
        return f"query {query}, key {key}, value {value}{masked} in {dtype}"

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    @property
    def heads(self) -> tuple[Any, Any, Any]:
        """How many heads query, key and value have."""
        return self.query.shape[1], self.key.shape[1], self.value.shape[1]

    @property
    def group(self) -> int:
        """How many heads of the query look at one head of the keys."""
        heads, of_keys, _ = self.heads
        return int(heads // of_keys)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> _Attention:
        """The same of changed tensors."""
        query, key, value = map(change, self.tensors)
        mask = None if self.mask is None else change(self.mask)
        return replace(self, query=query, key=key, value=value, mask=mask)


def _refuse(call: _Attention, reason: str, advice: str) -> CompileFailed:
    """The error of attention that no kernel computes."""
    return CompileFailed(f"attention: {call}: it {reason}", hint=advice)


def _is(size: Any, other: Any) -> bool:
    """Whether two sizes are equal wherever the dims are; asking leaves no guard."""
    return statically_known_true(size == other)


def _broadcast(sizes: Iterable[Any]) -> Any:
    """The size of an axis along which some have one element for all."""
    return next((size for size in sizes if not _is(size, 1)), 1)


def _spread(tensor: torch.Tensor, shape: Sequence[Any]) -> torch.Tensor:
    """A view with the leading axes of a shape, along which it has one element, or as many."""
    kept = tensor.shape[len(shape) :]
    known = all(_is(*pair) for pair in zip(tensor.shape, shape, strict=False))
    return tensor if known else tensor.expand(*shape, *kept)


def _attend(call: _Attention, is_grouped: bool, kernels: Sequence[str]) -> torch.Tensor:
    """What a node answers, of tensors with any number of axes, as sdpa takes them."""
    axes = max(each.dim() for each in call.tensors)
    if call.mask is not None and call.mask.dim() > axes:
        raise _refuse(call, "has a mask with more axes", "give it as many as the query has")
    call = call.map(lambda each: _add_axes(each, axes))
    if axes < 4:
        place = 0 if is_grouped or axes == 2 else 1  # the heads are there, or else the batch
        lifted = call.map(lambda each: each.unsqueeze(place))
        return _attend(lifted, is_grouped, kernels).squeeze(place)
    lead = [_broadcast(sizes) for sizes in zip(*(t.shape[:-3] for t in call.tensors), strict=True)]
    if axes > 4:
        flat = call.map(lambda each: _spread(each, lead).flatten(0, -4))
        answer = _attend(flat, is_grouped, kernels)
        return answer.reshape(*lead, *answer.shape[1:])
    query, key, value = (_spread(each, lead) for each in call.tensors)
    return _call_kernel(_share_heads(replace(call, query=query, key=key, value=value)), kernels)


def _add_axes(tensor: torch.Tensor, axes: int) -> torch.Tensor:
    """A view with so many axes, of which the first ones have one element; itself where it has."""
    return tensor if tensor.dim() == axes else tensor[(None,) * (axes - tensor.dim())]


def _share_heads(call: _Attention) -> _Attention:
    """The same with as many heads of values as of keys, each for one group of the query's.

    Raises:
        CompileFailed: that cannot be, or is not known.
    """
    if not all(isinstance(count, int) and count <= _MOST for count in call.heads):
        raise _refuse(call, "has heads that no launch has room for", "give them to it as the batch")
    heads, of_keys, of_values = call.heads
    if heads == 1:
        heads = max(of_keys, of_values)
        call = replace(call, query=call.query.expand(-1, heads, -1, -1))
    if heads % of_keys or heads % of_values:
        raise _refuse(call, "has heads that no group of keys is for", "divide them evenly")
    if of_keys != of_values:
        key, value = _repeat_heads(call.key, heads), _repeat_heads(call.value, heads)
        call = replace(call, key=key, value=value)
    return call


def _repeat_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Each head as often as queries look at it; `repeat_interleave` leaves guards on torch 2.11."""
    group = heads // int(tensor.shape[1])
    return tensor.index_select(1, torch.arange(heads, device=tensor.device) // group)


def _call_kernel(call: _Attention, kernels: Sequence[str]) -> torch.Tensor:
    """What the best of the kernels that can answers.

    Raises:
        CompileFailed: none can.
    """
    width, of_keys, of_values = (each.shape[3] for each in call.tensors)
    if not all(isinstance(each, int) and each > 0 for each in (width, of_keys, of_values)):
        raise _refuse(call, "has a width that changes with a dim, or none", "let it stay eager")
    if call.query.dtype not in (*_HALF, torch.float32):
        raise _refuse(call, "is computed by no kernel of CUDA's", "try --dtype float32")
    scale = width**-0.5 if call.scale is None else call.scale  # of the width without padding
    call = replace(call, scale=scale)
    if FA3 in kernels and width <= call.widest and _fits_flash(call):
        answer = _call_fa3(call)
    elif FLASH in kernels and _fits_flash(call):
        answer = _call_flash(call)
    elif EFFICIENT in kernels:
        answer = _call_efficient(call)
    else:
        advice = "try --dtype float16 or --dtype float32, or build for sm80 and newer"
        raise _refuse(call, "is computed by no kernel of CUDA's at this capability", advice)
    return answer if answer.shape[3] == of_values else answer[..., :of_values]


def _fits_flash(call: _Attention) -> bool:
    """Whether flash, of either kind, answers this as eager does, at every size.

    Causal, flash lets the last row see the last key and eager the first row the first, which is one
    where there are as many. Its launch has no room for no rows.
    """
    batch, _, rows, width = call.query.shape
    keys = call.key.shape[2]
    return (
        call.mask is None
        and call.query.dtype in _HALF
        and call.value.shape[3] == width <= _WIDEST
        and all(statically_known_true(size >= 1) for size in (batch, rows, keys))
        and statically_known_true(batch <= _MOST)
        and (not call.causal or _is(rows, keys))
    )


def _call_flash(call: _Attention) -> torch.Tensor:
    """Flash, which takes groups as they are."""
    name = _aten._scaled_dot_product_flash_attention.default
    tensors = map(_align, call.tensors)
    answer: torch.Tensor = name(*tensors, 0.0, call.causal, False, scale=call.scale)[0]
    return answer


def _call_fa3(call: _Attention) -> torch.Tensor:
    """FlashAttention-3, which answers what flash does, and has rows before heads."""
    query, key, value = (_align(each).transpose(1, 2) for each in call.tensors)
    return call_forward(query, key, value, call.scale, call.causal).transpose(1, 2)


def _call_efficient(call: _Attention) -> torch.Tensor:
    """The memory-efficient kernel, which takes masks, and no groups.

    So the heads of a group become rows of one head, and no cache is repeated. Rows that see the
    more the further down they stand cannot: there each has as many keys of its own.
    """
    batch, heads, rows, _ = call.query.shape
    if call.mask is not None:
        call = replace(call, mask=_drop_repeats(call.mask))
    if call.group > 1 and call.causal:
        key, value = (_repeat_heads(each, heads) for each in (call.key, call.value))
        call = replace(call, key=key, value=value)
    elif call.group > 1:
        call = _fold_groups(call)
    name = _aten._scaled_dot_product_efficient_attention.default
    mask = None if call.mask is None else _lay_mask(call)
    tensors = map(_align, call.tensors)
    answer: torch.Tensor = name(*tensors, mask, False, 0.0, call.causal, scale=call.scale)[0]
    if call.query.shape[1] != heads:
        answer = _lay_out(answer).view(batch, heads, rows, answer.shape[3])
    return answer


def _fold_groups(call: _Attention) -> _Attention:
    """The same with a head of the query for each of the keys, and the rows of a whole group."""
    group = (int(call.key.shape[1]), call.group)
    query = _split_heads(_lay_out(call.query), group).flatten(2, 3)
    mask = call.mask
    if mask is not None and not (_is(mask.shape[1], 1) and _is(mask.shape[2], 1)):
        split = (1, 1) if _is(mask.shape[1], 1) else group
        mask = _split_heads(mask, split).expand(-1, -1, group[1], call.query.shape[2], -1)
        mask = _lay_out(mask).flatten(2, 3)
    return replace(call, query=query, mask=mask)


def _lay_out(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy, of which a reshape is a view; inductor drops one that changes nothing.

    `contiguous()` would be nothing where the tensor is laid out so, and inductor may lay it out in
    another way (torch 2.11: a `cat` of transposed parts). What view a reshape of any layout can be
    is a guard of the example's sizes.
    """
    return tensor.clone(memory_format=torch.contiguous_format)


def _split_heads(tensor: torch.Tensor, group: tuple[int, int]) -> torch.Tensor:
    """The heads of a tensor on two axes: whose keys they look at, and which of those they are."""
    split: torch.Tensor = tensor.unflatten(1, group)  # type: ignore[no-untyped-call]
    return split


def _lay_mask(call: _Attention) -> torch.Tensor:
    """The mask as numbers to add, in rows that the kernel reads by whole vectors.

    They are longer than the keys are many, by at least one: else whether there is a gap between
    rows would be a question to the example.
    """
    assert call.mask is not None
    dtype, keys = call.query.dtype, call.key.shape[2]
    mask = call.mask
    if mask.dtype is torch.bool:
        mask = torch.where(mask, 0.0, float("-inf")).to(dtype)
    else:
        least = max(_LOWEST, torch.finfo(dtype).min)
        mask = torch.where(mask == float("-inf"), mask, mask.clamp(min=least)).to(dtype)
    if _is(mask.shape[3], 1):
        mask = mask.expand(-1, -1, -1, keys)
    laid = pad(mask, (0, _ROW - keys % _ROW))[..., :keys]
    return laid.expand(*call.query.shape[:3], keys)


def _drop_repeats(mask: torch.Tensor) -> torch.Tensor:
    """A mask with one element along each axis along which it was expanded."""
    for axis, (size, stride) in enumerate(zip(mask.shape, mask.stride(), strict=True)):
        if _is(stride, 0) and not _is(size, 1):
            mask = mask.select(axis, 0).unsqueeze(axis)
    return mask


def _align(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or one padded with zeros, such that kernels can read it by whole vectors."""
    short = -tensor.shape[3] % _UNIT
    *outer, inner = tensor.stride()
    places = (*outer, tensor.storage_offset())
    if not short and inner == 1 and all(_is(place % _UNIT, 0) for place in places):
        return tensor
    # A clone would do for strides, but inductor drops one that differs in its offset alone.
    padded = pad(tensor, (0, short or _UNIT))
    return padded if short else padded[..., : tensor.shape[3]]
