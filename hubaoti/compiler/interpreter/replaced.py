"""Ops that a GPU has and a CPU has not, or has otherwise: attention, scaled and mixed products.

Attention and products are computed in float32, as a GPU sums up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._ops import OpOverload
from torch.nn.functional import scaled_dot_product_attention

from hubaoti.compiler.interpreter import NotInterpreted
from hubaoti.compiler.precision import multiply_scaled
from hubaoti.runtime.attention_ops import REFERENCES


class _Uncomputed:
    """Stands for an answer that nobody needs for what a graph says, as sums for a gradient."""


UNCOMPUTED: Any = _Uncomputed()
_FP8_BLOCK = 2  # dims of scales


def find_replacement(op: OpOverload) -> Callable[..., Any] | None:
    """What computes an op instead of the CPU's own, if anything does.

    Raises:
        NotInterpreted: nothing does, and the CPU's own would be another.
    """
    name = _name(op)
    if name in _UNLIKE:
        raise NotInterpreted(f"{op}: {_UNLIKE[name]}")
    if name in _ATTENTION:
        return partial(_call_attention, op)
    return _REPLACED.get(f"{name}.{op._overloadname}") or _REPLACED.get(name)


def _name(op: OpOverload) -> str:
    """An op's name without its namespace."""
    return op._schema.name.partition("::")[2]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    causal: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """Attention of (batch, heads, rows, width) in float32; heads of a group share keys."""
    masks = [each for each in (bias, causal) if each is not None]
    mask = sum((each.float() for each in masks), torch.zeros(())) if masks else None
    made = scaled_dot_product_attention(
        query.float(),
        key.float(),
        value.float(),
        mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return made.to(query.dtype)


def _mask_future(rows: int, keys: int, *, last: bool) -> torch.Tensor:
    """Where no row looks at what comes after it; the `last` row sees all, or the first one key."""
    seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows if last else 0)
    return torch.zeros(rows, keys).masked_fill(~seen, float("-inf"))


def _call_attention(op: OpOverload, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """A kernel of attention by its schema: each has other arguments and answers."""
    given = dict(zip((each.name for each in op._schema.arguments), args, strict=False)) | kwargs
    if given.get("dropout_p"):
        raise NotInterpreted("attention with dropout: a GPU draws other numbers")
    query, key = given["query"], given["key"]
    rows, keys = query.shape[-2], key.shape[-2]
    causal = None
    if given.get("is_causal"):
        causal = _mask_future(rows, keys, last=_ATTENTION[_name(op)])
    bias, scale = given.get("attn_bias"), given.get("scale")
    known = {"max_q": rows, "max_k": keys}
    rest = [known.get(each.name, UNCOMPUTED) for each in op._schema.returns[1:]]
    return (_attend(query, key, given["value"], bias, causal, scale), *rest)


def _multiply_scaled(  # noqa: PLR0913 - the op's own
    left: torch.Tensor,
    right: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_result: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """`_scaled_mm` with one scale for all, or one for each row and column."""
    wanted = ((1, (left.shape[0], 1)), (1, (1, right.shape[1])))
    for scale, (single, rows) in zip((scale_a, scale_b), wanted, strict=True):
        if scale.dtype != torch.float32 or (scale.numel() != single and scale.shape != rows):
            raise NotInterpreted("_scaled_mm with a scale for each of several blocks")
    return multiply_scaled(left, right, scale_a, scale_b, bias, scale_result, out_dtype)


def _multiply_scaled_into(*args: Any, out: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """`_scaled_mm.out`."""
    return out.copy_(_multiply_scaled(*args, **kwargs))


def _multiply_int8(left: torch.Tensor, right: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`_weight_int8pack_mm`: weights of whole numbers, a scale for each row of them."""
    return (left.float() @ right.float().T * scales.float()).to(left.dtype)


def _multiply_wide(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """`mm.dtype`: a product in float32 of half types."""
    return (left.float() @ right.float()).to(out_dtype)


def _multiply_wide_into(*args: Any, out: torch.Tensor) -> torch.Tensor:
    """`mm.dtype_out`."""
    return out.copy_(_multiply_wide(*args))


def _multiply_groups(
    left: torch.Tensor,
    right: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`_grouped_mm` of rows that belong to groups, each with a matrix of its own."""
    if left.dim() == 3 and right.dim() == 3:
        return (left.float() @ right.float()).to(out_dtype or left.dtype)
    if left.dim() != 2 or right.dim() != 3 or offs is None or bias is not None:
        raise NotInterpreted("_grouped_mm of other than rows in groups")
    made = torch.zeros(left.shape[0], right.shape[-1], dtype=out_dtype or left.dtype)
    start = 0
    for group, end in enumerate(offs.tolist()):
        made[start:end] = (left[start:end].float() @ right[group].float()).to(made.dtype)
        start = end
    return made


# Of causal attention whether its last row sees all keys, or its first one key.
_ATTENTION = {
    "_scaled_dot_product_flash_attention": True,
    "_scaled_dot_product_efficient_attention": False,
    "_scaled_dot_product_cudnn_attention": False,
}
_REPLACED: dict[str, Callable[..., Any]] = {
    "_scaled_mm.": _multiply_scaled,
    "_scaled_mm.out": _multiply_scaled_into,
    "_weight_int8pack_mm": _multiply_int8,
    "mm.dtype": _multiply_wide,
    "mm.dtype_out": _multiply_wide_into,
    "_grouped_mm": _multiply_groups,
    **REFERENCES,
}
# What the CPU has under the same name is another, or reads another layout.
_UNLIKE = {
    "_weight_int4pack_mm": "a GPU packs such weights in its own order",
    "_flash_attention_forward_quantized": "only a GPU has it",
    "_scaled_dot_product_flash_attention_quantized": "only a GPU has it",
    "_scaled_grouped_mm": "only a GPU has it",
}
