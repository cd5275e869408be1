"""Quantized weights: torchao puts them into a module, plain torch makes them from a checkpoint.

A compiled graph reads a quantized weight as plain tensors, its values and their scales. These are
in no checkpoint: who opens the graph makes them from the checkpoint's own weight, by the rule that
a transform's name stands for. torchao is needed to compile, and not to run.

    int8wo    8-bit weights, a scale a row; any CPU or GPU
    int4wo    4-bit weights, a scale and a zero for 128 of a row; the layout of tinygemm, which on
              a CPU is that CPU's own: made where it is used, never shipped
    float8dq  weights and activations in float8 (e4m3), a scale a row and a token, so that no answer
              depends on what else is in the batch; compute capability 8.9

Weights are quantized on the CPU, whatever they are for. Only int4wo's layout on a GPU is made by a
kernel of that GPU: it is attached where it was built before, and built no more.

A name is never given another meaning: what is changed gets a new name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hubaoti.errors import CompileFailed, MissingConstant, MissingDependency, first_line
from hubaoti.host.extras import format_install
from hubaoti.program.silence import silence_torchao
from hubaoti.runtime.input_checks import name_dtype
from hubaoti.runtime.recipes import GROUP, LayerFit, check_recipe

TILE = (8, 1024)  # what the GPU's int4 kernel pads a weight to
_FLOAT8 = torch.float8_e4m3fn
_TINY = 1e-12  # least activation; below it a token of zeros, as of padding, would become NaN


@dataclass(frozen=True, slots=True)
class Made:
    """A constant that is made: from which tensor of the module before, and by which transform.

    `dtype` and `shape` are that tensor's, and part of the rule: of a weight in another dtype the
    same transform makes other values.
    """

    source: str
    transform: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Quantized:
    """What was done to a module: its new tensors by name, and the Linears left, with the reason."""

    made: dict[str, Made]
    left: dict[str, str]


def quantize(module: nn.Module, recipe: str, device: str, sm: int = 0) -> Quantized:
    """Quantize a module's Linears in place, for a device; its tensors are plain ones afterwards.

    It is done where the module is, which is the CPU also for a GPU (see `check_recipe`).

    What computes with a weight without being a Linear (an embedding, a convolution, the fused
    experts of a mixture) stays as it is. A Linear that the recipe does not fit stays too, and is
    named in `left`. Give the module its values before: a filled quantized weight is noise.

    Raises:
        BadRequest: there is no such recipe.
        CompileFailed: the device cannot run it, it fits no layer, or this torchao means something
            else by it than `make_quantized` does.
        MissingDependency: torchao is not installed.
    """
    fit = check_recipe(recipe, device, sm)
    layers, left = _pick_linears(module, fit)
    if not layers:
        reasons = "; ".join(dict.fromkeys(left.values())) or "it has no Linear"
        raise CompileFailed(
            f"quantize: {recipe} fits no layer of {type(module).__name__}: {reasons}",
            hint="compile it without --quantize, or with another --dtype or recipe",
        )
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    with silence_torchao():
        parts = quantize_with_torchao(module, recipe, torch.device(device), layers)
    made = {}
    for name, weight in weights.items():
        source, dtype = _join_fqn(name, "weight"), name_dtype(weight.dtype)
        for index, part in enumerate(parts[name]):
            new = _join_fqn(name, f"parametrizations.weight.original{index}")
            made[new] = Made(source, f"{recipe}.{part}", dtype, tuple(weight.shape))
            _replace_by_runtime_values(module.get_parameter(new), made[new], weight)
    return Quantized(made, left)


def _pick_linears(module: nn.Module, fit: LayerFit) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The Linears to quantize, and the reason for each that is not."""
    holders: dict[int, list[str]] = {}
    for name, part in module.named_modules():
        for key, tensor in part.named_parameters(recurse=False):
            holders.setdefault(id(tensor), []).append(_join_fqn(name, key))
    layers, left = {}, {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            own = _join_fqn(name, "weight")
            others = [each for each in holders.get(id(layer.weight), ()) if each != own]
            if reason := _find_misfit(layer, fit, others):
                left[name] = reason
            else:
                layers[name] = layer
    return layers, left


def _find_misfit(layer: nn.Linear, fit: LayerFit, others: list[str]) -> str | None:
    """Why a layer is left as it is; None where it is quantized."""
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        return "its weight is computed from others"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "the module around it reads its weight"
    if layer.weight.dtype not in fit.dtypes:
        kinds = " or ".join(map(name_dtype, fit.dtypes))
        return f"its weight is {name_dtype(layer.weight.dtype)}, not {kinds}"
    if others:
        return f"its weight is {others[0]} too, which stays"
    for size, multiple, what in zip(layer.weight.shape, fit.sizes, ("out", "in"), strict=True):
        if not size or size % multiple:
            return f"{what}_features is {size}, no multiple of {multiple}"
    return None


def _join_fqn(name: str, key: str) -> str:
    """A tensor's fqn; the module itself has no name."""
    return f"{name}.{key}" if name else key


def quantize_with_torchao(
    module: nn.Module, recipe: str, device: torch.device, layers: Mapping[str, nn.Linear]
) -> dict[str, list[str]]:
    """Let torchao quantize, and take its tensors apart; the parts of each weight, in order.

    Checked on torchao 0.18: `torchao.utils.unwrap_tensor_subclass`, which gives a weight's parts
    to parametrizations, in the order of `__tensor_flatten__`. It looks at children only.
    """
    try:
        from torchao.quantization import quantize_
        from torchao.utils import unwrap_tensor_subclass

        config = make_torchao_config(recipe, device)
    except ImportError as error:
        raise MissingDependency(
            f"--quantize {recipe} needs torchao: {first_line(error)}",
            hint=format_install("quantize"),
        ) from error
    try:
        with torch.no_grad(), _allow_any_machine():
            quantize_(module, config, filter_fn=lambda _, name: name in layers)
            weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
            parts = {name: weight.__tensor_flatten__()[0] for name, weight in weights.items()}
            unwrap_tensor_subclass(nn.ModuleList([module]))
    except Exception as error:  # torchao raises of many kinds, and leaves what does not suit it
        raise CompileFailed(
            f"quantize: torchao cannot do {recipe} here: {type(error).__name__}: "
            f"{first_line(error)}",
            hint="try another recipe, or torchao 0.18",
        ) from error
    return parts


@contextmanager
def _allow_any_machine() -> Iterator[None]:
    """Around torchao's work: it would ask the GPU of this machine, whatever GPU the work is for.

    Private, checked on torchao 0.18: `quant_api._check_hardware_support`. Where it has another
    name, torchao refuses what this machine cannot run.
    """
    from torchao.quantization import quant_api

    name = "_check_hardware_support"
    kept = getattr(quant_api, name, None)
    if kept is None:
        yield
        return
    setattr(quant_api, name, lambda granularity: None)
    try:
        yield
    finally:
        setattr(quant_api, name, kept)


def make_torchao_config(recipe: str, device: torch.device) -> Any:
    """torchao's words for a recipe: nothing that depends on what else is installed.

    The settings that torchao recommends for inductor are not set: they would be neither in the
    key nor in the manifest. Private, checked on torchao 0.18: the only int4 layout for CPUs is in
    `torchao.prototype`. On a GPU it is tinygemm's, since the default one needs mslk.
    """
    from torchao import quantization as ao

    if recipe == "int8wo":
        return ao.Int8WeightOnlyConfig(granularity=ao.PerRow(), set_inductor_config=False)
    if recipe == "float8dq":
        from torchao.quantization.quantize_.common import KernelPreference

        return ao.Float8DynamicActivationFloat8WeightConfig(
            activation_dtype=_FLOAT8,
            weight_dtype=_FLOAT8,
            granularity=ao.PerRow(),
            activation_value_lb=_TINY,
            kernel_preference=KernelPreference.TORCH,
            set_inductor_config=False,
        )
    if device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
    return ao.Int4WeightOnlyConfig(
        group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )


def _replace_by_runtime_values(constant: nn.Parameter, made: Made, weight: Tensor) -> None:
    """Give a constant the very values that a runtime will make, if torchao's are the same.

    Where torchao's are NaN they are not asked for: in float8 it divides a row of zeros by zero.

    Raises:
        CompileFailed: they differ in layout or in a value.
    """
    ours, theirs = make_quantized(made.transform, weight), constant.detach()
    if not _are_equal_tensors(ours, theirs):
        raise CompileFailed(
            f"quantize: this torchao makes {made.transform} of {made.source} otherwise than a "
            "runtime would",
            hint="compile with torchao 0.18",
        )
    with torch.no_grad():
        constant.copy_(ours)


def _are_equal_tensors(ours: Tensor, theirs: Tensor) -> bool:
    """Whether dtype, shape and stride are equal, and values wherever `theirs` is a number."""
    if (ours.dtype, ours.stride()) != (theirs.dtype, theirs.stride()):
        return False
    if ours.shape != theirs.shape or not theirs.is_floating_point():
        return torch.equal(ours, theirs)
    known = theirs.float()  # float8 cannot be compared
    return bool(((ours.float() == known) | known.isnan()).all())


def make_lowering_constant(recipe: str, device: torch.device, fqn: str) -> Tensor | None:
    """A constant that is neither the module's nor the program's, but the lowering's.

    Private, checked on torch 2.13 (`torch._inductor.quantized_lowerings`): the CPU's int4 kernel
    takes the size of a group as a tensor, and each call gets one: `constant16`, `constant17`.
    """
    is_group = recipe == "int4wo" and device.type == "cpu" and re.fullmatch(r"constant\d+", fqn)
    return torch.tensor(GROUP) if is_group else None


def make_quantized(transform: str, weight: Tensor) -> Tensor:
    """The constant that a transform makes of a checkpoint's weight, on the weight's device.

    Raises:
        MissingConstant: no such transform is known.
    """
    if transform not in MAKERS:
        raise MissingConstant(
            f"unknown transform of a weight: {transform!r:.60}",
            hint="the graph was compiled by a newer hubaoti: upgrade this one",
        )
    with torch.no_grad():
        return MAKERS[transform](weight)


# The formulas are torchao's (quant_primitives.py of 0.18), rounded at the same places.


def compute_int8_scale(weight: Tensor) -> Tensor:
    """(out, 1), float32: half of 255 steps reach a row's largest value."""
    largest = weight.abs().amax(1, keepdim=True)
    return (largest / 127.5).clamp(min=torch.finfo(torch.float32).eps).float()


def _compute_int8_values(weight: Tensor) -> Tensor:
    """(out, in), int8: each weight in steps of its row's scale."""
    return (weight * (1.0 / compute_int8_scale(weight))).round().clamp(-128, 127).to(torch.int8)


def _make_int8_zeros(weight: Tensor) -> Tensor:
    """(out, 1), int8: symmetric, so zero is zero; the graph does not read it."""
    return torch.zeros((weight.shape[0], 1), dtype=torch.int8, device=weight.device)


def _group_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight as (out, groups, GROUP), with each group's scale and middle, (out, groups)."""
    on_cpu = weight.device.type == "cpu"
    if not on_cpu:
        out, size = weight.shape
        weight = pad(weight, (0, -size % TILE[1], 0, -out % TILE[0]))
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    low, high = groups.amin(2), groups.amax(2)
    least = 1e-6 if on_cpu else torch.finfo(weight.dtype).smallest_normal
    scale = ((high - low) / 15.0).clamp(min=least)
    return groups, scale, low + scale * 8.0


def _compute_int4_scales(weight: Tensor) -> Tensor:
    """(groups, out, 2), the weight's dtype: a scale, and the value in the middle."""
    _, scale, middle = _group_weight(weight)
    return torch.stack((scale, middle), -1).transpose(0, 1).contiguous()


def _pack_int4_values(weight: Tensor) -> Tensor:
    """Two values a byte, in the order in which this device's int4 kernel reads them.

    Private, checked on torch 2.13: the two ops that pack for the two ops in the graphs.
    """
    groups, scale, middle = _group_weight(weight)
    low = middle - scale * 8.0
    steps = ((groups - low.unsqueeze(2)) / scale.unsqueeze(2)).round().clamp(0, 15)
    values = steps.to(torch.int32).reshape(groups.shape[0], -1)
    if weight.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)  # type: ignore[no-any-return]
    pairs = (values[:, ::2] << 4 | values[:, 1::2]).to(torch.uint8)
    return torch.ops.aten._convert_weight_to_int4pack(pairs, 8)  # type: ignore[no-any-return]


def _compute_float8_scale(weight: Tensor) -> Tensor:
    """(out, 1), float32: the largest float8 is a row's largest value."""
    return (weight.abs().amax(1, keepdim=True) / torch.finfo(_FLOAT8).max).float()


def _compute_float8_values(weight: Tensor) -> Tensor:
    """(out, in), float8; a row of zeros stays zeros."""
    scale = _compute_float8_scale(weight)
    largest = torch.finfo(_FLOAT8).max
    scaled = (weight.float() / scale).clamp(-largest, largest)
    return scaled.masked_fill(scale == 0, 0.0).to(_FLOAT8)


# By a recipe's name, and torchao's for a part of its tensor.
MAKERS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8wo.qdata": _compute_int8_values,
    "int8wo.scale": compute_int8_scale,
    "int8wo.zero_point": _make_int8_zeros,
    "int4wo.qdata": _pack_int4_values,
    "int4wo.scale_and_zero": _compute_int4_scales,
    "float8dq.qdata": _compute_float8_values,
    "float8dq.scale": _compute_float8_scale,
}
