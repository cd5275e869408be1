"""Adapters that stand over a module's layers, and when the layers under them answer alone.

As peft's say it (`tuners_utils.BaseTunerLayer`, checked on 0.17 to 0.21), which are found by their
attributes: peft is not imported. An adapter that is merged into its layer's own weight, disabled,
or of a name that is not active, leaves the answer to that layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_SOME = 8  # bytes, at four places of a tensor


def stands_aside(adapter: Any) -> bool:
    """Whether the layer under an adapter answers for both.

    A merged one that is disabled takes its part out again when it is called.
    """
    disabled = bool(getattr(adapter, "disable_adapters", False))
    if getattr(adapter, "merged", False):
        return not disabled
    kinds = getattr(adapter, "adapter_layer_names", ())  # of the parts that were added
    added: list[Any] = [getattr(adapter, kind, None) for kind in kinds]
    names = set[str]().union(*(each.keys() for each in added if hasattr(each, "keys")))
    return bool(kinds) and (disabled or names.isdisjoint(_list_active_adapters(adapter)))


def _list_active_adapters(adapter: Any) -> tuple[str, ...]:
    """The names of adapters that are to be heard, whether a layer has them or not."""
    return (*getattr(adapter, "active_adapters", ()),)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in a module, and the tensors that it brings."""

    path: str
    layer: Any
    tensors: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, path: str, layer: Any) -> Adapter:
        """The adapter at a path of a module."""
        others = [part for name, part in layer.named_children() if name != "base_layer"]
        own = [each for part in others for each in (*part.parameters(), *part.buffers())]
        return cls(path, layer, (*layer.parameters(recurse=False), *own))

    def mode(self) -> tuple[Any, ...]:
        """What it is set to: merged, disabled, which names are heard and how loud."""
        merged = getattr(self.layer, "merged_adapters", None)
        return (
            self.layer.merged if merged is None else (*merged,),
            getattr(self.layer, "disable_adapters", False),
            _list_active_adapters(self.layer),
            (*getattr(self.layer, "scaling", {}).items(),),
        )

    def state(self) -> tuple[Any, ...]:
        """Its mode, and what tells that it was given other tensors.

        peft merges into `weight.data`, of which no version of the weight tells.
        """
        return (*self.mode(), *map(tensor_version, self.tensors))


def tensor_version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to, where it lies, and, on a CPU, some of what it holds.

    What is written through `.data`, as by peft's merging, no tensor counts; inference tensors count
    nothing.
    """
    place, count = tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return hash((place, count))
    last = max(tensor.nbytes - _SOME, 0)
    some = [ctypes.string_at(place + last * n // 3, min(_SOME, tensor.nbytes)) for n in range(4)]
    return hash((place, count, *some))


def separate_adapters(
    module: nn.Module, kept: Collection[str] = ()
) -> tuple[dict[str, nn.Module], list[Adapter]]:
    """A module and all within it by every name that they have, without adapters; and these.

    `kept` are the paths of adapters that are parts as any other.
    """
    adapters: list[Adapter] = []

    def walk(path: str, part: Any) -> Iterator[tuple[str, nn.Module]]:
        while hasattr(part, "merged") and isinstance(getattr(part, "base_layer", None), nn.Module):
            adapters.append(Adapter.of(path, part))
            if path in kept:
                break
            part = part.base_layer
        yield path, part
        for name, child in part._modules.items():
            if child is not None:
                yield from walk(f"{path}.{name}" if path else name, child)

    return dict(walk("", module)), adapters


def list_own_parts(model: nn.Module) -> list[nn.Module]:
    """A model's parts without what peft put there: its code is no code of the model."""
    return [part for part in separate_adapters(model)[0].values() if not is_of_peft(part)]


def is_of_peft(part: nn.Module) -> bool:
    """Whether peft made a part, as what wraps a whole model or head."""
    return type(part).__module__.partition(".")[0] == "peft"


def unwrap_peft(module: nn.Module) -> nn.Module:
    """The model in a PeftModel, which has the paths and the config of the model's own."""
    own = getattr(module, "get_base_model", None)
    base = own() if callable(own) and hasattr(module, "peft_config") else module
    return base if isinstance(base, nn.Module) else module
