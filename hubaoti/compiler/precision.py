"""The numbers of a half type computed in float32, whoever computes them: a module, or a program.

One weight at a time is made wider, a part of a large one, so that this takes no more memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from hubaoti.runtime.attention_ops import REFERENCES

HALF = (torch.bfloat16, torch.float16)
_aten = torch.ops.aten
_PART = 4 << 20  # elements of a weight that are made wider at a time


class InFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it lasts, what would be computed in a half type is computed in float32.

    Tensors of half types are made wider where they are computed with, and not where they are only
    looked at in another shape; what comes of it is float32. What would be written into one is
    written into a copy, so that a call is given what it writes in float32.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """One operation."""
        kwargs = kwargs or {}
        if func.is_view or func is _aten.detach.default:
            return func(*args, **kwargs)
        if func in _PRODUCTS and _is_large(args[-1]):
            return _multiply_by_parts(*args, **kwargs)
        args, kwargs = tree_map(widen, (args, kwargs))
        return _INSTEAD.get(func, func)(*args, **kwargs)


def widen(value: Any) -> Any:
    """A tensor of a half type, or such a type itself, in float32; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dtype in HALF:
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value


def _is_large(weight: torch.Tensor) -> bool:
    """Whether a weight is made wider in parts."""
    return weight.dtype in HALF and weight.numel() > _PART


def _multiply_by_parts(*args: torch.Tensor, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    """`mm` or `addmm` in float32, of whose last matrix only some columns are wide at any time."""
    *bias, left, right = args
    left, columns = left.float(), max(1, _PART // max(1, right.shape[0]))
    made = left.new_empty(left.shape[0], right.shape[1])
    for start in range(0, right.shape[1], columns):
        part = slice(start, start + columns)
        torch.mm(left, right[:, part].float(), out=made[:, part])
    made *= alpha
    return made + beta * bias[0].float() if bias else made


def multiply_scaled(  # noqa: PLR0913 - the op's own
    left: torch.Tensor,
    right: torch.Tensor,
    scale_left: torch.Tensor,
    scale_right: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_result: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """`aten._scaled_mm` as a product in float32, with one scale for all or one a row and a column.

    As a GPU does, it scales the sums.
    """
    made = _multiply_by_parts(left, right) * scale_left * scale_right
    made = made if bias is None else made + bias.float()
    made = made if scale_result is None else made * scale_result
    # `to` would pass for a view here, and not be widened by the mode around this one.
    return _aten._to_copy.default(made, dtype=out_dtype or left.dtype)  # type: ignore[no-any-return]


_PRODUCTS = {_aten.mm.default, _aten.addmm.default}
_INSTEAD: dict[Any, Callable[..., Any]] = {
    _aten._scaled_mm.default: multiply_scaled,
    **{getattr(torch.ops.hubaoti, name).default: each for name, each in REFERENCES.items()},
}


class ScaledOnCpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it lasts, products of scaled tensors are computed as `multiply_scaled` has it.

    No CPU of torch 2.11 has scales by rows, and those of later ones add up in their own ways.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """One operation."""
        return _INSTEAD.get(func, func)(*args, **(kwargs or {}))


def compute_scaled(program: torch.fx.GraphModule) -> AbstractContextManager[Any]:
    """Around calls of a program on the CPU: what it has of scaled products is computed."""
    found = any(node.target in _INSTEAD for node in program.graph.nodes)
    return ScaledOnCpu() if found else nullcontext()  # type: ignore[no-untyped-call]
