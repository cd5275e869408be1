"""What torch is doing around a call that no graph can do: each has its reason."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from hubaoti.runtime.fallback import CannotServe

# Private, checked on torch 2.11 to 2.15; each tells of what torch has no public word for.
_functions = torch._C._len_torch_function_stack
_function_modes: Any = _get_current_function_mode_stack
_jit_traces: Any = torch.jit.is_tracing  # type: ignore[attr-defined]


def refuse_watchers() -> None:
    """Refuse what wants to see each operation and leaves no mark on tensors.

    Asked at each call, so it is short; what leaves a mark is asked by `refuse_modes`.

    Raises:
        CannotServe: with the reason.
    """
    # `with torch.device(…)` changes no operation on tensors.
    if _functions() and not all(isinstance(mode, DeviceContext) for mode in _function_modes()):
        raise CannotServe("modes", "a torch function mode is on")
    if forward_ad._current_level >= 0:
        raise CannotServe("transforms", "forward gradients are computed")
    if _jit_traces():
        raise CannotServe("tracing", "torch.jit traces")


def refuse_modes(device: torch.device) -> None:
    """Refuse what torch does to each operation beside computing it.

    Raises:
        CannotServe: with the reason.
    """
    if torch.is_autocast_enabled(device.type):
        raise CannotServe("autocast", f"autocast is on for {device.type}")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise CannotServe("transforms", "a transform of torch.func is on")
    modes = _get_current_dispatch_mode_stack()
    if modes:
        raise CannotServe("modes", f"{type(modes[-1]).__name__} is on")


def wants_gradient(item: Any) -> bool:
    """Whether gradients are wanted of what a call gives."""
    return isinstance(item, torch.Tensor) and item.requires_grad
