"""Linears that hold their weight quantized, in the very tensors that a graph reads.

A graph of quantized weights makes its constants of a module's own, which then has both. Where the
module gives its own up, it holds a quarter or an eighth of them, and what it answers itself is what
the graph answers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from hubaoti.artifact.schema import Constant
from hubaoti.errors import BadRequest
from hubaoti.runtime.heap import release_pages
from hubaoti.runtime.quantize import TILE, make_quantized
from hubaoti.runtime.recipes import GROUP

_Parts = Mapping[str, Tensor]
_WRITES = {"__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv"))}
_SETS = {"requires_grad_", "share_memory_"}  # no value


def _writes(name: str) -> bool:
    """Whether a function of torch writes into its tensor, by its name."""
    return name in _WRITES or (name.endswith("_") and name[-2:] != "__" and name not in _SETS)


def _refuse_writing() -> NoReturn:
    raise BadRequest(
        "the weight of a Linear is quantized, and what is written into it would be lost",
        hint="merge adapters, or take them out, before attach(..., quantize=True); a plain "
        "weight is quantized where load_state_dict loads it",
    )


class _MadeWeight(Tensor):
    """A weight that was made of its parts, and is gone when nobody looks at it any more.

    Whatever is computed of it is a plain tensor. What is written into it is refused, as peft writes
    what it merges, for it would be lost.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if _writes(func.__name__) and isinstance(args[0], cls):
            _refuse_writing()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @property
    def data(self) -> Tensor:
        """As every tensor has it; it is written into as the weight is."""
        return self.detach().as_subclass(_MadeWeight)

    @data.setter
    def data(self, value: object) -> None:
        _refuse_writing()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class QuantizedLinear(nn.Linear):
    """A Linear whose `weight` is made of its parts whenever somebody asks for it.

    It is a Linear in all else: it is called, moved, copied, pickled and found as one. Its parts are
    buffers by torchao's names. A state that has a plain weight is quantized as it is loaded; one
    that is given to its weight as `data` is refused.
    """

    recipe: str
    dtype: torch.dtype  # of the weight: that of the model, which not every part has

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight as it was rounded, made anew."""
        found = WEIGHTS[self.recipe](self, self._buffers).to(self.dtype)  # type: ignore[arg-type]
        return found if torch.compiler.is_compiling() else found.as_subclass(_MadeWeight)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.recipe}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """As `.to()` and its like do it; the weight would have been converted too."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self._device)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    @property
    def _device(self) -> torch.device:
        return next(self.buffers()).device

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *more: Any) -> None:
        """Take a plain weight for what is made of it."""
        plain = state.pop(f"{prefix}weight", None)
        if plain is not None:
            plain = plain.to(self._device, self.dtype)
            state |= {
                f"{prefix}{part}": _make_part(self.recipe, part, plain) for part in self._buffers
            }
        super()._load_from_state_dict(state, prefix, *more)


def _make_part(recipe: str, part: str, weight: Tensor) -> Tensor:
    """One part of a quantized weight, by torchao's name for it."""
    return make_quantized(f"{recipe}.{part}", weight.detach())


def _dequantize_scaled(layer: nn.Linear, parts: _Parts) -> Tensor:
    """The weight of values that have one scale a row, in the dtype of the scales."""
    return parts["qdata"].to(parts["scale"].dtype) * parts["scale"]


def _dequantize_int4(layer: nn.Linear, parts: _Parts) -> Tensor:
    """Four-bit values, which only the kernel that reads them knows how to find.

    Private, checked on torch 2.13: the two ops in the graphs, which are given one row for each
    column of the weight.
    """
    packed, scales = parts["qdata"], parts["scale_and_zero"]
    if packed.device.type == "cpu":
        rows = torch.eye(layer.in_features, dtype=scales.dtype)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, GROUP, scales).t()  # type: ignore[no-any-return]
    width = -(-layer.in_features // TILE[1]) * TILE[1]
    rows = torch.eye(layer.in_features, width, dtype=scales.dtype, device=packed.device)
    found = torch.ops.aten._weight_int4pack_mm(rows, packed, GROUP, scales)
    return found.t()[: layer.out_features]  # type: ignore[no-any-return]


WEIGHTS: dict[str, Callable[[nn.Linear, _Parts], Tensor]] = {
    "int8wo": _dequantize_scaled,
    "int4wo": _dequantize_int4,
    "float8dq": _dequantize_scaled,
}
NEEDS = {
    "int8wo": {"qdata", "scale"},
    "int4wo": {"qdata", "scale_and_zero"},
    "float8dq": {"qdata", "scale"},
}


def _find_quantized_layers(constants: Collection[Constant]) -> dict[str, tuple[str, set[str]]]:
    """The Linears whose weights are quantized: by name the recipe, and the parts that are read."""
    found: dict[str, tuple[str, set[str]]] = {}
    for constant in constants:
        place = find_quantized_constant(constant)
        if place is not None:
            recipe, _, part = str(constant.origin.transform).partition(".")
            found.setdefault(place.rpartition(".")[0], (recipe, set()))[1].add(part)
    return found


def find_quantized_constant(constant: Constant) -> str | None:
    """Where a module that is quantized has a constant; None of one that is not made of a weight."""
    source, transform = constant.origin.module, constant.origin.transform
    recipe, _, part = (transform or "").partition(".")
    if source is None or recipe not in WEIGHTS or source.rpartition(".")[2] != "weight":
        return None
    return f"{source.removesuffix('weight')}{part}"


def refuse_other_layers(module: nn.Module, constants: Collection[Constant]) -> None:
    """Refuse what cannot be quantized in place; asked before anything is.

    Raises:
        BadRequest: a layer is no plain Linear.
    """
    for name in _find_quantized_layers(constants):
        kind = type(module.get_submodule(name))
        if kind not in {nn.Linear, QuantizedLinear}:
            raise BadRequest(
                f"{name} is a {kind.__qualname__}, not a Linear whose weight can be replaced",
                hint="attach without quantize=True: the graphs then have weights of their own",
            )


class ConstantSketches:
    """Makes constants that look as those made of a module's weights, without their values.

    Equal layers have equal looks, so one of each is made: enough to tell whether a module fits.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, transform: str, weight: Tensor) -> Tensor:
        look = (transform, weight.dtype, weight.shape, weight.stride(), weight.device)
        if look not in self._known:
            self._known[look] = make_quantized(transform, torch.zeros_like(weight))
        return self._known[look]


def quantize_in_place(module: nn.Module, constants: Collection[Constant]) -> None:
    """Have a module hold what its graphs read in the place of what it is made of.

    One layer after the other, so that no more than one weight is there twice.
    """
    former = []
    for name, (recipe, parts) in _find_quantized_layers(constants).items():
        layer = module.get_submodule(name)
        if not isinstance(layer, QuantizedLinear):
            assert isinstance(layer, nn.Linear)
            start = layer.weight.data_ptr()
            former.append((start, start + layer.weight.nbytes))
            quantize_linear(layer, recipe, parts | NEEDS[recipe])
    release_pages(former)


def quantize_linear(layer: nn.Linear, recipe: str, parts: Collection[str]) -> None:
    """Replace a Linear's weight by its parts; the layer itself stays who it is."""
    weight = layer.weight.detach()
    tensors = {part: _make_part(recipe, part, weight) for part in sorted(parts)}
    del layer.weight
    layer.__class__ = QuantizedLinear
    assert isinstance(layer, QuantizedLinear)
    layer.recipe, layer.dtype = recipe, weight.dtype
    for part, tensor in tensors.items():
        layer.register_buffer(part, tensor)
