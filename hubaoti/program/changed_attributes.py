"""A model beside one that its class makes of its config: the attributes that somebody set since."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hubaoti.program.adapters import is_of_peft, separate_adapters
from hubaoti.program.model_code import Code
from hubaoti.program.module_fingerprint import OWN, convert_plain_value, is_ours, is_plain
from hubaoti.program.reachable_code import find_functions, function_module

_HOOKED = {"_hf_hook", "_old_forward"}  # accelerate's: its `forward` is the module's own
_DEEP = 3  # levels of values within values
_FILLING = {
    "uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_",
    "kaiming_uniform_", "kaiming_normal_", "orthogonal_", "fill_", "zero_", "copy_",
}  # fmt: skip
_MOST = 32  # kinds of models that are kept

Part = tuple[str, dict[str, Any]]
# What classes make of configs, in this process; None where they make nothing without weights.
BUILT: dict[tuple[type, Code, str, str], dict[str, Part] | None] = {}


def is_as_built(model: nn.Module, code: Code, task: str, listing: AttributeListing) -> bool:
    """Whether the attributes that code reads for a task are those that the model's class gave it.

    Its class makes another one of the same config, without memory for weights. Parts that only the
    other has are ones that the model was made without.
    """
    config: Any = model.config
    kept = {**config} if isinstance(config, Mapping) else vars(config)  # by itself, too
    key = (type(model), code, task, f"{kept}")
    if key in BUILT:
        other = BUILT[key]
    else:
        while len(BUILT) >= _MOST:
            BUILT.pop(next(iter(BUILT)), None)
        other = BUILT[key] = _build_same_model(model, listing)
    return other is not None and all(
        _is_like(path, listing.part(part), other)
        for path, part in _list_parts_beside_peft(model).items()
    )


def _list_parts_beside_peft(model: nn.Module) -> dict[str, nn.Module]:
    """A model's parts by their paths; adapters stand aside, or were compiled with it, and what
    peft wraps whole, as a head that is saved too, is its own affair."""
    parts = separate_adapters(model)[0]
    wrapped = tuple(f"{path}." for path, part in parts.items() if is_of_peft(part))
    return {p: part for p, part in parts.items() if not f"{p}.".startswith(wrapped)}


def _is_like(path: str, part: Part, other: dict[str, Part]) -> bool:
    """Whether a part is as in the other model; it may say None where that one has a part."""
    kind, attributes = part
    prefix = f"{path}." if path else ""
    left = {k: v for k, v in attributes.items() if v is not None or f"{prefix}{k}" not in other}
    return other.get(path) == (kind, left)


def _build_same_model(model: nn.Module, listing: AttributeListing) -> dict[str, Part] | None:
    """The parts of a model of the same class and config; None where it cannot be made."""
    kind: Any = type(model)
    try:
        config = copy.deepcopy(model.config)
        with torch.device("meta"), torch.random.fork_rng(devices=[]), _Unfilled():
            other = kind.from_config(config) if isinstance(config, Mapping) else kind(config)
        return {path: listing.part(part) for path, part in other.named_modules()}
    except Exception:  # whatever a constructor does with tensors that have no values
        return None


class _Unfilled(TorchFunctionMode):
    """Tensors without memory are not filled, in this thread alone: it would be for nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("tensor")
        name = getattr(func, "__name__", "")
        if name in _FILLING and isinstance(first, torch.Tensor) and first.is_meta:
            return first
        return func(*args, **kwargs)


class AttributeListing:
    """The attributes of modules as plain values; tensors, dtypes and devices do not count.

    `counts` decides by an attribute's name; `special` describes a config.
    """

    def __init__(self, counts: Callable[[str], bool], special: Callable[[Any], Any]) -> None:
        self.counts = counts
        self.special = special
        self.configs: dict[int, tuple[Any, Any]] = {}

    def part(self, module: nn.Module) -> Part:
        """A module by its class and attributes."""
        cls, own = type(module), vars(module)
        left_out = OWN if own.keys().isdisjoint(_HOOKED) else {*OWN, "forward"}
        if is_ours(cls):  # a Linear whose weight was quantized in place
            cls, left_out = cls.__mro__[1], {*left_out, *cls.__annotations__}
        kind = f"{cls.__module__}.{cls.__qualname__}"
        names = [name for name in own.keys() - left_out if name == "forward" or self.counts(name)]
        return kind, {n: self.value(own[n]) for n in sorted(names) if not is_ours(own[n])}

    def value(self, value: Any, depth: int = 0) -> Any:
        """An attribute as plain values; an object by its class and the functions that it calls."""
        if isinstance(value, (torch.Tensor, torch.dtype, torch.device)):
            return "tensor"
        if is_plain(value):
            return convert_plain_value(value)
        if (known := self.config(value)) is not NotImplemented:
            return known
        if depth < _DEEP and isinstance(value, Mapping):
            return {f"{key}": self.value(item, depth + 1) for key, item in value.items()}
        if depth < _DEEP and isinstance(value, (list, tuple)):
            return [self.value(item, depth + 1) for item in value]
        named = [f"{function_module(each)}.{each.__qualname__}" for each in find_functions(value)]
        kind = value if isinstance(value, type) else type(value)
        return [f"{kind.__module__}.{kind.__qualname__}", *named]

    def config(self, value: Any) -> Any:
        """A config, described once for all who keep it."""
        if id(value) not in self.configs:
            known = self.special(value)
            if known is NotImplemented:
                return known
            self.configs[id(value)] = (value, known)
        return self.configs[id(value)][1]
