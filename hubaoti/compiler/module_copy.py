"""A module again, its tensors elsewhere: nothing is written on the one that it is a copy of."""

from __future__ import annotations

import functools
import re
import types
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hubaoti.errors import CompileFailed
from hubaoti.runtime.input_checks import has_memory

_NAMED = 3  # tensors that a refusal names of each device
_DEVICE = re.compile(r"(cpu|cuda)(:\d+)?")
_PLACING = ("_hf_hook", "_old_forward")  # of accelerate 0.20 to 1.14, which moves tensors by them
_Mover = Callable[[torch.Tensor], torch.Tensor]


def list_devices(module: nn.Module) -> dict[str, list[str]]:
    """The names of a module's parameters and buffers, by the device that they lie on."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        found[str(tensor.device)].append(name)
    return dict(found)


def lies_on_gpu(module: nn.Module) -> bool:
    """Whether any parameter or buffer of a module lies on a GPU."""
    return any(torch.device(name).type == "cuda" for name in list_devices(module))


def find_main_device(module: nn.Module) -> torch.device:
    """The device that most of a module's bytes lie on, the CPU for one without tensors.

    What accelerate offloaded lies nowhere.
    """
    sizes: Counter[torch.device] = Counter()
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            sizes[tensor.device] += tensor.nbytes
    found = sizes.most_common(1)
    return found[0][0] if found else torch.device("cpu")


def describe_devices(devices: dict[str, list[str]]) -> str:
    """Which tensors lie where, in words."""
    return ", ".join(
        f"{', '.join(names[:_NAMED])}{' and others' if names[_NAMED:] else ''} on {device}"
        for device, names in devices.items()
    )


def require_one_device(module: nn.Module) -> None:
    """Refuse a module of which no graph could read all tensors.

    Raises:
        CompileFailed: they lie on several devices, or nowhere, as those that accelerate offloads.
    """
    devices = list_devices(module)
    if len(devices) > 1 or "meta" in devices:
        raise CompileFailed(
            f"source: the tensors of {type(module).__name__} lie on no single device: "
            f"{describe_devices(devices)}",
            hint='put them there first, module.to("cuda"), or compile regions of it that lie on '
            "one: --regions PATH",
        )


def copy_to_cpu(module: nn.Module) -> nn.Module:
    """A copy of a module whose tensors lie on the CPU: of equal values, strides and ties.

    Its configs are the module's own, and so is all else that holds no tensors. Hooks with which
    accelerate moves tensors between devices are left out.
    """
    named = (*module.named_parameters(), *module.named_buffers())
    copied = copy_module(module, _Memory.of(tensor for _, tensor in named).copy, "cpu")
    for part in copied.modules():
        _drop_placing_hook(part)
    return copied


def copy_module(module: nn.Module, move: _Mover, device: str) -> nn.Module:
    """A copy of a module, with what `move` makes of each of its tensors, also of those that are no
    parameters and buffers; where it has noted a device, the copy has noted the given one.

    What is no module of it, no plain container and no tensor the two of them share.
    """
    return _Copier(move, device).copy_tree(module)


@dataclass(slots=True)
class _Copier:
    """What was copied already, by the id of what it is a copy of."""

    move: _Mover
    device: str
    made: dict[int, Any] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)  # an id is one object's only while it lives

    def copy_tree(self, module: nn.Module) -> nn.Module:
        """A module and all that are in it, of which each is made before any is filled."""
        parts = [*module.modules()]
        for part in parts:
            self._note(part, type(part).__new__(type(part)))
        for part in parts:
            own = {
                name: self._copy_device(name, value) or self.copy(value)
                for name, value in vars(part).items()
            }
            vars(self.made[id(part)]).update(own)
        return self.made[id(module)]  # type: ignore[no-any-return]

    def copy(self, value: Any) -> Any:
        """What stands in a copy in the place of a value."""
        if id(value) in self.made:
            return self.made[id(value)]
        if isinstance(value, torch.Tensor):
            return self._note(value, self.move(value))
        if isinstance(value, torch.device):
            return torch.device(self.device)
        if isinstance(value, functools.partial):
            called, *args = map(self.copy, (value.func, *value.args))
            return functools.partial(called, *args, **self.copy(value.keywords))
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.copy(value.__self__))
        return self._copy_container(value)

    def _copy_container(self, value: Any) -> Any:
        """A plain container with copies of what it holds; any other value itself."""
        if type(value) in {dict, OrderedDict, defaultdict}:
            made = self._note(value, value.copy())
            made.update({key: self.copy(item) for key, item in value.items()})
            return made
        if type(value) is list:
            made = self._note(value, [])
            made.extend(map(self.copy, value))
            return made
        if type(value) in {tuple, set, frozenset}:
            return type(value)(map(self.copy, value))
        if isinstance(value, tuple) and hasattr(value, "_make"):
            return type(value)._make(map(self.copy, value))
        return value

    def _copy_device(self, name: str, value: Any) -> str | None:
        """The device that an attribute names as text; None where it is no such attribute."""
        named = isinstance(value, str) and "device" in name and _DEVICE.fullmatch(value)
        return self.device if named else None

    def _note(self, value: Any, made: Any) -> Any:
        self.made[id(value)] = made
        self.kept.append(value)
        return made


@dataclass(frozen=True, slots=True)
class _Memory:
    """Memory of a module on the CPU: what several of its tensors share is copied once.

    `spans` has the bytes of each memory that are the module's, first and behind the last: it may be
    a part of something far larger.
    """

    spans: dict[int, tuple[int, int]]
    copies: dict[int, torch.Tensor]

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor]) -> _Memory:
        """That of some tensors, of which nothing is copied yet."""
        spans: dict[int, tuple[int, int]] = {}
        for tensor in filter(_is_plain, tensors):
            low, high = _find_span(tensor)
            first, last = spans.get(_find_memory(tensor), (low, high))
            spans[_find_memory(tensor)] = min(low, first), max(high, last)
        return cls(spans, {})

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same values on the CPU, a parameter where it is one."""
        with torch.no_grad():
            made = self._copy_values(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, requires_grad=tensor.requires_grad)
        return made

    def _copy_values(self, tensor: torch.Tensor) -> torch.Tensor:
        if not _is_plain(tensor):
            return tensor.to("cpu", copy=True)
        memory, own = _find_memory(tensor), _find_span(tensor)
        low, high = self.spans.setdefault(memory, own)
        if own[0] < low or own[1] > high or (own[0] - low) % tensor.itemsize:
            low, high = self.spans[memory] = own
            self.copies.pop(memory, None)
        if memory not in self.copies:
            seen = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            seen.set_(tensor.untyped_storage(), low, (high - low,))  # type: ignore[call-overload]
            self.copies[memory] = seen.to("cpu", copy=True)
        made = torch.empty(0, dtype=tensor.dtype)
        start = (own[0] - low) // tensor.itemsize
        held = self.copies[memory].untyped_storage()
        return made.set_(held, start, tensor.shape, tensor.stride())


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is what its memory says, and no class of somebody's own."""
    return (
        type(tensor) in {torch.Tensor, nn.Parameter} and has_memory(tensor) and not tensor.is_meta
    )


def _find_memory(tensor: torch.Tensor) -> int:
    """What tensors that share memory have in common."""
    return tensor.untyped_storage().data_ptr()


def _find_span(tensor: torch.Tensor) -> tuple[int, int]:
    """Of the bytes of its memory the first that a tensor has, and the one behind its last."""
    shape, strides = tuple(tensor.shape), tensor.stride()
    steps = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    first = int(tensor.storage_offset()) * tensor.itemsize
    return first, first + (1 + sum(steps) if tensor.numel() else 0) * tensor.itemsize


def _drop_placing_hook(part: nn.Module) -> None:
    """Give a copied module the forward that it had before accelerate placed its tensors."""
    own = vars(part)
    hook, before = (own.get(name) for name in _PLACING)
    if hook is not None and type(hook).__module__.partition(".")[0] == "accelerate":
        own.pop("_hf_hook")
        own.pop("forward", None)
        if before is not None and getattr(before, "__func__", None) is not type(part).forward:
            own["forward"] = before
        own.pop("_old_forward", None)
